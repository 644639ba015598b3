"""The tower view: what a method sees of a model. It knows no library; `timm_tower` and `openclip_tower` do.

A tower is a stack of transformer blocks. Wrapping it puts effbench's loop in place of the library's: the loop runs
each block's own parts and carries the state of the tokens through, so that tokens may be dropped or merged between
attention and MLP, where no library hook reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effbench.errors import InvalidError, UsageError
from effbench.models.attention import Projections

Reduce = Callable[[Tensor, str], Tensor]
"""Maps a field (batch, tokens, ...) to fewer tokens; the second argument is the kind of the field:
"tokens" (features), "size" (how many original tokens each stands for) or "label" (indices, positions)."""


@dataclass
class TokenState:
    """The tokens between two parts of a block. Fields that are None are not tracked.

    Args:
        tokens: (batch, tokens, width).
        prefix: number of leading tokens (class, registers) that must not be touched.
        mask: attention mask, additive or boolean, (tokens, tokens) or (batch, heads or 1, tokens, tokens).
        is_causal: each token sees itself and those before it.
        sizes: (batch, tokens), original tokens that each stands for.
        source: (batch, tokens), index of the original token; -1 for a token made of several.
        positions: (batch, tokens, axes).
        grid: (height, width) in patches while no token has left, else None.
    """

    tokens: Tensor
    prefix: int = 0
    mask: Tensor | None = None
    is_causal: bool = False
    sizes: Tensor | None = None
    source: Tensor | None = None
    positions: Tensor | None = None
    grid: tuple[int, int] | None = None

    def reduced(self, reduce: Reduce) -> TokenState:
        """The state after a reduction, applied to every tracked field."""
        batch, tokens = self.tokens.shape[:2]
        mask = self.mask
        if mask is not None:
            mask = mask.expand(batch, *mask.shape[1:]) if mask.ndim > 2 else mask.expand(batch, tokens, tokens)
            for axis in (-2, -1):
                mask = reduce(mask.movedim(axis, 1), "label").movedim(1, axis)
            mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
        return replace(
            self,
            tokens=reduce(self.tokens, "tokens"),
            mask=mask,
            sizes=None if self.sizes is None else reduce(self.sizes, "size"),
            source=None if self.source is None else reduce(self.source, "label"),
            positions=None if self.positions is None else reduce(self.positions, "label"),
            grid=None,
        )


class TokenEdit(nn.Module):
    """What a method places between attention and MLP of one block. Its matrix products count as overhead.

    `forward(state, projections)` returns a `Reduce` or None (nothing to do).
    """

    is_overhead: ClassVar[bool] = True

    def forward(self, state: TokenState, projections: Projections) -> Reduce | None:
        raise NotImplementedError


class BlockLoop:
    """The loop over blocks, mixed into a library's block container by its adapter.

    The adapter says how a block's two branches are computed.
    """

    prefix: int = 0
    grid: tuple[int, int] | None = None

    @staticmethod
    def attention_branch(block: nn.Module, state: TokenState) -> tuple[Tensor, Projections]:
        raise NotImplementedError

    @staticmethod
    def mlp_branch(block: nn.Module, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def loop(self, blocks: Any, x: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Run the blocks on x (batch, tokens, width); the result may have fewer tokens."""
        state = TokenState(x, self.prefix, mask, is_causal, grid=self.grid)
        for block in blocks:
            branch, projections = self.attention_branch(block, state)
            state.tokens = state.tokens + branch
            if block.token_edit is not None:
                reduce = block.token_edit(state, projections)
                if reduce is not None:
                    state = state.reduced(reduce)
            del branch, projections  # not held through the MLP, where memory peaks
            state.tokens = state.tokens + self.mlp_branch(block, state.tokens)
        return state.tokens


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
        width, heads: of the tokens and of the attention.
        prefix: number of prefix tokens (class, registers).
        has_class_token: token 0 is a class token that the tower pools from or attends with.
        grid: (height, width) in patches, None for text.
    """

    def __init__(self, name: str, loop: BlockLoop, blocks: Any, width: int, heads: int, has_class_token: bool) -> None:
        self.name = name
        self.loop = loop
        self.blocks = blocks
        self.width = width
        self.heads = heads
        self.has_class_token = has_class_token

    @property
    def prefix(self) -> int:
        return self.loop.prefix

    @property
    def grid(self) -> tuple[int, int] | None:
        return self.loop.grid

    def __len__(self) -> int:
        return len(self.blocks)

    def after_attention(self, block: int, edit: TokenEdit) -> None:
        """Place an edit between attention and MLP of a block.

        Args:
            block: 0-based index.

        Raises:
            UsageError: no such block, or the block already reduces its tokens.
        """
        if not 0 <= block < len(self.blocks):
            raise UsageError(
                f"block {block} does not exist: {self.name} has blocks 0 to {len(self.blocks) - 1}",
                "choose other blocks with at=, e.g. at=" + "/".join(str(len(self.blocks) * q // 4) for q in (1, 2, 3)),
            )
        target = self.blocks[block]
        if target.token_edit is not None:
            raise UsageError(
                f"block {block} already has a method that reduces its tokens ({type(target.token_edit).__name__})",
                "choose different blocks for the two methods with at=",
            )
        reference = next(target.parameters())
        target.token_edit = edit.to(reference.device, reference.dtype).train(target.training)
        target.register_forward_pre_hook(_refuse_direct_call)


@dataclass
class ModelView:
    """A model as methods see it. `model` is the library's own object, edited in place.

    `image` and `text` are None where the model has no such tower or where its library is not known to effbench.
    """

    model: nn.Module
    image: Tower | None
    text: Tower | None


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
    text = wrap_text(text_module) if text_module is not None else None
    if image is None and text is None:
        raise UsageError(
            f"{type(model).__module__}.{type(model).__name__} has no transformer tower that effbench can edit",
            "supported: timm VisionTransformer, OpenCLIP models with ViT towers",
        )
    return ModelView(model, image, text)


def _towers(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The modules that hold the image and the text blocks, by what the model's library calls them."""
    if hasattr(model, "image_encoder"):  # effbench.models.dual_encoder.DualEncoder
        image, text = model.image_encoder, model.text_encoder
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
        block.register_module("token_edit", None)
        y = x + loop.attention_branch(block, TokenState(x))[0]
        difference = (y + loop.mlp_branch(block, y) - expected).abs().max().item()
    block.train(training)
    if not difference <= (1e-5 if reference.dtype == torch.float32 else 3e-2):
        raise UsageError(
            f"{name} on effbench's attention differs from the library's own by {difference:.1e}",
            "this version of the library is not supported; report the model's name and version",
        )
