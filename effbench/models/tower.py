"""The tower view: what a method sees of a model. It knows no library; `timm_tower` and `openclip_tower` do.

A tower is a stack of transformer blocks. Wrapping it puts effbench's loop in place of the library's: the loop runs
each block's own parts and carries the state of the tokens through, so that tokens may be dropped or merged between
attention and MLP, where no library hook reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effbench.errors import InvalidError, UsageError
from effbench.models.attention import AttentionCore
from effbench.models.decoder import Decoder, decoder_of
from effbench.models.token_state import BlockLoop, TokenBypass, TokenEdit, TokenState


def _refuse_direct_call(block: nn.Module, *_: Any) -> None:
    raise InvalidError(
        "a block that drops or merges tokens was called outside effbench's loop",
        "forward_intermediates, gradient checkpointing and timm's attn_mask are not supported on an edited tower",
    )


class Tower:
    """One wrapped stack of transformer blocks.

    Attributes:
        name: the library's class, for messages.
        blocks: the library's blocks, in order.
        width: of the tokens.
        prefix: number of prefix tokens (class, registers).
        has_class_token: token 0 is a class token that the tower pools from or attends with.
        grid: (height, width) in patches, None for text.
        module: the library's module that holds the blocks.
        stem: the part of it that the images enter, which makes patches of them; None for text.
        patch: side of a patch in pixels.
        ignores_sizes: the tokens are pooled without a look at their sizes, by attention or by the library alone.
        resize: lets the tower take its images at another side in pixels, scaling them itself; None where it cannot.
    """

    def __init__(
        self,
        name: str,
        loop: BlockLoop,
        blocks: Any,
        width: int,
        has_class_token: bool,
        module: nn.Module,
        patch: int = 0,
        resize: Callable[[int], None] | None = None,
        ignores_sizes: bool = False,
        stem: nn.Module | None = None,
    ) -> None:
        self.name = name
        self.stem = stem
        self.loop = loop
        self.blocks = blocks
        self.width = width
        self.has_class_token = has_class_token
        self.module = module
        self.patch = patch
        self.resize = resize
        self.ignores_sizes = ignores_sizes

    @property
    def prefix(self) -> int:
        return self.loop.prefix

    @property
    def heads(self) -> int:
        """Of the attention in the first block."""
        return self.blocks[0].attn.num_heads

    @property
    def grid(self) -> tuple[int, int] | None:
        return self.loop.grid

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def patch_tokens(self) -> int:
        """Patch tokens that enter the first block."""
        return self.grid[0] * self.grid[1] if self.grid else 0

    def keep_blocks(self, kept: Iterable[int]) -> None:
        """Remove all blocks but some, in place; the keys of the state_dict count those that are left from 0.

        Args:
            kept: 0-based indices; they stay in the tower's order.

        Raises:
            UsageError: no such block, or none is left.
        """
        wanted = sorted(set(kept))
        if not wanted:
            raise UsageError(f"no block of {self.name} would be left", "remove fewer")
        blocks = [self._block(index) for index in wanted]
        del self.blocks[:]
        self.blocks.extend(blocks)
        if hasattr(self.loop, "layers"):  # as OpenCLIP's Transformer counts them
            self.loop.layers = len(blocks)

    def after_attention(self, block: int, edit: TokenEdit) -> None:
        """Place an edit between attention and MLP of a block.

        Args:
            block: 0-based index.

        Raises:
            UsageError: no such block, the block already reduces its tokens, or a later one needs their grid.
        """
        target = self._block(block)
        if target.token_edit is not None:
            self._refuse(block, edit.name, target.token_edit.name, "both reduce the tokens in")
        if not edit.keeps_grid:
            for later in range(block + 1, len(self)):
                self._refuse_without_grid(later, edit)
        for earlier in range(block) if edit.needs_grid else ():
            self._refuse_after_reduction(block, edit, earlier)
        reference = next(target.parameters())
        target.token_edit = edit.to(reference.device, reference.dtype).train(target.training)
        target.register_forward_pre_hook(_refuse_direct_call)

    def attend(self, block: int, core: AttentionCore) -> None:
        """Put a method's attention in place of a block's dense one.

        Raises:
            UsageError: no such block, another method did so already, or an earlier block breaks up the grid it needs.
        """
        target = self._block(block)
        if target.attn.core is not None:
            self._refuse(block, core.name, target.attn.core.name, "both replace the attention in")
        for earlier in range(block) if core.needs_grid else ():
            self._refuse_after_reduction(block, core, earlier)
        if core.needs_grid and target.token_bypass is not None:
            self._refuse(block, core.name, target.token_bypass.name, f"{core.name} needs the whole grid in")
        target.attn.core = core.train(target.training)

    def around(self, block: int, bypass: TokenBypass) -> None:
        """Let only some tokens through a block.

        Raises:
            UsageError: no such block, or another method acts on its tokens already.
        """
        target = self._block(block)
        other = target.token_bypass or target.token_edit
        if other is not None:
            self._refuse(block, bypass.name, other.name, "both choose the tokens in")
        self._refuse_without_grid(block, bypass)
        target.token_bypass = bypass.train(target.training)
        target.register_forward_pre_hook(_refuse_direct_call)

    def _refuse_without_grid(self, block: int, edit: TokenEdit | TokenBypass) -> None:
        """Refuse an edit that breaks up the grid which a method needs in a block."""
        target = self.blocks[block]
        for method in (target.attn.core, target.token_edit):
            if method is not None and method.needs_grid:
                self._refuse(block, edit.name, method.name, f"{edit.name} breaks the grid that {method.name} needs in")

    def _refuse_after_reduction(self, block: int, method: AttentionCore | TokenEdit, earlier: int) -> None:
        """Refuse a method that needs the grid which an earlier block breaks up."""
        edit = self.blocks[earlier].token_edit
        if edit is not None and not edit.keeps_grid:
            self._refuse(block, method.name, edit.name, f"{edit.name} breaks the grid that {method.name} needs in")

    def _block(self, index: int) -> nn.Module:
        if not 0 <= index < len(self):
            raise UsageError(
                f"block {index} does not exist: {self.name} has blocks 0 to {len(self) - 1}",
                "choose other blocks, e.g. at=" + "/".join(str(len(self) * q // 4) for q in (1, 2, 3)),
            )
        return self.blocks[index]

    def _refuse(self, block: int, method: str, other: str, why: str) -> None:
        if method == other != TokenEdit.name:
            raise UsageError(f"{method} acts in block {block} already", "apply it once, to a model without it")
        raise UsageError(
            f"{other} and {method} conflict: {why} block {block}",
            f"give them different blocks, e.g. with at=, or compare {other} and {method} as two arms",
        )


class ScaleImages:
    """Scales the images that enter a module, (batch, 3, height, width), to `size` pixels a side, as PIL's bicubic does.

    `native` is the side that the module took before.
    """

    def __init__(self, size: int, native: int) -> None:
        self.size = size
        self.native = native

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images, *rest = inputs
        if images.shape[-1] == images.shape[-2] == self.size:
            return inputs
        # a CPU scales no half precision
        scaled = nn.functional.interpolate(images.float(), (self.size, self.size), mode="bicubic", antialias=True)
        return (scaled.to(images.dtype), *rest)


def scaling(module: nn.Module) -> ScaleImages | None:
    """What scales the images that enter a module or a part of it; None where nothing does."""
    hooks = (hook for part in module.modules() for hook in part._forward_pre_hooks.values())
    return next((hook for hook in hooks if isinstance(hook, ScaleImages)), None)


def scale_images(module: nn.Module, size: int, native: int) -> None:
    """Let a module scale the images that it is given, as the last of such calls says."""
    known = scaling(module)
    if known is None:
        module.register_forward_pre_hook(ScaleImages(size, native))
    else:
        known.size = size


def patches_along(size: int, patch: int) -> int:
    """Patches of `patch` pixels along the side of an image of `size` pixels.

    Raises:
        UsageError: they do not fit, or are fewer than two; names the nearest sizes that do.
    """
    if size < 2 * patch:
        least = f"use size={2 * patch} or more"
        raise UsageError(f"images of {size} px hold fewer than 2 x 2 patches of {patch} px", least)
    along, rest = divmod(size, patch)
    if rest:
        raise UsageError(
            f"images of {size} px are no whole number of patches of {patch} px",
            f"the nearest are size={size - rest} and size={size - rest + patch}",
        )
    return along


@dataclass
class ModelView:
    """A model as methods see it. `model` is the library's own object, edited in place.

    `image`, `text` and `decoder` are None where the model has none or where its library is not known to effbench;
    `connector` is what a captioner has between its image tower and its decoder. `trained` names the parameters that
    training changed, as the state_dict does; None where that is not known, or nothing was trained. `left` is what the
    training model's state_dict had of edits that testing lacks.
    """

    model: nn.Module
    image: Tower | None
    text: Tower | None
    decoder: Decoder | None = None
    connector: nn.Module | None = None
    trained: frozenset[str] | None = None
    left: dict[str, Tensor] = field(default_factory=dict)


def image_tower(model: ModelView, method: str) -> Tower:
    """The image tower that a method is about to edit.

    Raises:
        UsageError: the model has none; names the method.
    """
    if model.image is None:
        raise UsageError(f"{method} needs an image tower of transformer blocks", "use a ViT backbone")
    return model.image


def view(model: nn.Module) -> ModelView:
    """Wrap the towers of a model in place and return its view; wrapping twice is harmless.

    Args:
        model: a timm VisionTransformer, an OpenCLIP model or tower, or effbench's DualEncoder. A model whose class says
            `has_towers = False` is a task's own without transformer blocks: methods see it as it is.

    Raises:
        UsageError: the model has no tower that effbench can wrap; the message names its type.
    """
    from effbench.models.openclip_tower import wrap_image as wrap_openclip_image
    from effbench.models.openclip_tower import wrap_text
    from effbench.models.timm_tower import wrap as wrap_timm

    if not getattr(model, "has_towers", True):
        return ModelView(model, None, None)
    image_module, text_module = _towers(model)
    image = None
    if image_module is not None:
        image = wrap_timm(image_module) or wrap_openclip_image(image_module)
        if image is not None and getattr(getattr(model, "image_encoder", None), "with_class_token", False):
            image.loop.hands_out_sizes = True  # TimmFeatures takes a mean over patch tokens
    text = wrap_text(text_module) if text_module is not None else None
    if image is None and text is None and not hasattr(model, "language"):
        raise UsageError(
            f"{type(model).__module__}.{type(model).__name__} is no transformer tower that effbench can edit",
            "supported: timm VisionTransformer, OpenCLIP models with ViT towers",
        )
    language = getattr(model, "language", None)  # effbench.models.captioner.Captioner
    if language is None:
        return ModelView(model, image, text)
    return ModelView(model, image, text, decoder_of(language), model.connector)


def _towers(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The modules that hold the image and the text blocks, by what the model's library calls them."""
    if hasattr(model, "image_encoder"):  # effbench.models: DualEncoder, Captioner
        image, text = model.image_encoder, getattr(model, "text_encoder", None)
    elif hasattr(model, "visual"):  # open_clip.CLIP (text parts on the model itself) and CustomTextCLIP
        image, text = model.visual, getattr(model, "text", model)
    elif hasattr(model, "token_embedding"):
        image, text = None, model
    else:
        image, text = model, None
    return getattr(image, "trunk", image), text


def check_block(loop: BlockLoop, block: nn.Module, width: int, name: str, convert: Callable[[nn.Module], None]) -> None:
    """Convert a block to the shared attention and probe it against what the library computed before.

    Raises:
        UsageError: the largest difference is above 1e-5 (float32; 3e-2 in half precision).
    """
    reference = next(block.parameters())
    x = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(0))
    x = x.to(reference.device, reference.dtype)
    training = block.training
    block.eval()
    with torch.no_grad():
        expected = block(x)
        convert(block)
        block.eval()  # the shared attention too, whose dropout would be on
        block.register_module("token_edit", None)
        block.register_module("token_bypass", None)
        y = x + loop.attention_branch(block, TokenState(x))[0]
        difference = (y + loop.mlp_branch(block, y) - expected).abs().max().item()
    block.train(training)
    if not difference <= (1e-5 if reference.dtype == torch.float32 else 3e-2):
        raise UsageError(
            f"{name} on effbench's attention differs from the library's own by {difference:.1e}",
            "this version of the library is not supported; report the model's name and version",
        )
