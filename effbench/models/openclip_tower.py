"""Adapter: the tower view of OpenCLIP's image and text transformers. Source: open_clip.transformer (MIT)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, Transformer
from torch import Tensor, nn

from effbench.errors import UsageError
from effbench.models.attention import Attention, Projections
from effbench.models.openclip_text import open_to_layouts
from effbench.models.token_state import BlockLoop, TokenState, attend
from effbench.models.tower import Tower, check_block, patches_along, scale_images

# OpenCLIP's names of the parameters that the shared attention holds under its own
_KEYS = {
    "qkv.weight": "in_proj_weight",
    "qkv.bias": "in_proj_bias",
    "proj.weight": "out_proj.weight",
    "proj.bias": "out_proj.bias",
}


def _save_under_library_keys(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for ours, theirs in _KEYS.items():
        if prefix + ours in state:
            state[prefix + theirs] = state.pop(prefix + ours)


def _load_from_library_keys(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for ours, theirs in _KEYS.items():
        if prefix + theirs in state:
            state[prefix + ours] = state.pop(prefix + theirs)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A plain nn.Linear around existing parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight, linear.bias = weight, bias
    return linear


def _shared_attention(attention: nn.MultiheadAttention) -> Attention:
    shared = Attention(
        _linear(attention.in_proj_weight, attention.in_proj_bias),
        _linear(attention.out_proj.weight, attention.out_proj.bias),
        attention.num_heads,
        attention.head_dim**-0.5,
        attn_drop=attention.dropout,
    )
    shared.register_state_dict_post_hook(_save_under_library_keys)
    shared.register_load_state_dict_pre_hook(_load_from_library_keys)
    return shared


class OpenClipBlock(ResidualAttentionBlock):
    """OpenCLIP's block on the shared attention."""

    def attention(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        return self.attn(q_x, attn_mask)


class OpenClipTransformer(BlockLoop, Transformer):
    """OpenCLIP's Transformer with effbench's loop; it also takes texts shorter than the context length."""

    @staticmethod
    def attention_branch(block: nn.Module, state: TokenState) -> tuple[Tensor, Projections]:
        y, projections = attend(block.attn, block.ln_1(state.tokens), state)
        return block.ls_1(y), projections

    @staticmethod
    def mlp_branch(block: nn.Module, tokens: Tensor) -> Tensor:
        return block.ls_2(block.mlp(block.ln_2(tokens)))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None:
            tokens = x.shape[1]
            attn_mask = attn_mask[..., :tokens, :tokens]
            attn_mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(x.dtype)
            if attn_mask.ndim == 3:  # (batch x heads, tokens, tokens)
                attn_mask = attn_mask.unflatten(0, (x.shape[0], -1))
        return self.loop(self.resblocks, x, attn_mask, is_causal)


def _to_shared_attention(block: nn.Module) -> None:
    block.attn = _shared_attention(block.attn)
    block.__class__ = OpenClipBlock


def _wrap(transformer: nn.Module, name: str) -> None:
    if isinstance(transformer, OpenClipTransformer):
        return
    if type(transformer) is not Transformer or not transformer.batch_first:
        raise UsageError(
            f"the {name} is a {type(transformer).__name__}, which effbench cannot edit",
            "choose an OpenCLIP model with ViT towers, e.g. openclip:ViT-B-32",
        )
    for index, block in enumerate(transformer.resblocks):
        if type(block) is not ResidualAttentionBlock:
            raise UsageError(
                f"block {index} of the {name} is a {type(block).__name__}, which effbench cannot edit",
                "choose a model with plain residual attention blocks, e.g. openclip:ViT-B-32",
            )
    transformer.__class__ = OpenClipTransformer  # keeps every attribute and key that the library reads
    for index, block in enumerate(transformer.resblocks):
        check_block(transformer, block, transformer.width, f"block {index} of the {name}", _to_shared_attention)
    transformer.train(transformer.training)


def wrap_image(visual: nn.Module) -> Tower | None:
    """Wrap an OpenCLIP VisionTransformer in place; None if the module is of another kind."""
    if not hasattr(visual, "transformer") or not hasattr(visual, "class_embedding"):
        return None
    _wrap(visual.transformer, "OpenCLIP image tower")
    loop = visual.transformer
    loop.prefix, loop.grid = 1, tuple(visual.grid_size)
    return Tower(
        "OpenCLIP image tower",
        loop,
        loop.resblocks,
        loop.width,
        has_class_token=True,
        module=visual,
        patch=visual.patch_size[0],
        ignores_sizes=visual.attn_pool is not None or visual.pool_type != "tok",
        resize=partial(_resize, visual),
        stem=visual.conv1,
    )


def _resize(visual: nn.Module, size: int) -> None:
    """Images of another side: positions are interpolated as the library does when it loads weights."""
    side = patches_along(size, visual.patch_size[0])
    scale_images(visual.conv1, size, native=visual.image_size[0])
    grid = (side, side)
    if grid == tuple(visual.grid_size):
        return
    positions = visual.positional_embedding
    head, patches = positions.detach()[:1], positions.detach()[1:]
    patches = patches.float().reshape(1, *visual.grid_size, -1).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, grid, mode="bicubic", antialias=True, align_corners=False)
    patches = patches.flatten(2)[0].T.to(positions.dtype)
    visual.positional_embedding = nn.Parameter(torch.cat([head, patches]), positions.requires_grad)
    visual.image_size, visual.grid_size = (size, size), grid
    visual.transformer.grid = grid


def wrap_text(text: nn.Module) -> Tower | None:
    """Wrap an OpenCLIP text tower in place; None if the module is of another kind (e.g. Hugging Face's)."""
    transformer = getattr(text, "transformer", None)
    if not isinstance(transformer, Transformer):
        return None
    _wrap(transformer, "OpenCLIP text tower")
    open_to_layouts(text)
    return Tower("OpenCLIP text tower", transformer, transformer.resblocks, transformer.width, False, text)
