"""Adapter: the tower view of timm's VisionTransformer. Source: timm.models.vision_transformer (Apache-2.0)."""

from __future__ import annotations

from functools import partial

from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from effbench.errors import UsageError
from effbench.models.attention import Attention, Projections
from effbench.models.token_state import BlockLoop, TokenState, attend, mean_by_size
from effbench.models.tower import Tower, check_block, patches_along, scale_images


class TimmBlocks(BlockLoop, nn.Sequential):
    """Stands in for `VisionTransformer.blocks`; same children, same keys."""

    @staticmethod
    def attention_branch(block: nn.Module, state: TokenState) -> tuple[Tensor, Projections]:
        y, projections = attend(block.attn, block.norm1(state.tokens), state)
        return block.drop_path1(block.ls1(y)), projections

    @staticmethod
    def mlp_branch(block: nn.Module, tokens: Tensor) -> Tensor:
        return block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(self, x)


class PoolsBySize(VisionTransformer):
    """timm's VisionTransformer whose mean over the patch tokens counts each as often as its size says."""

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        sizes = self.blocks.take_sizes()
        if sizes is None or (pool_type or self.global_pool) != "avg":
            return super().pool(x, pool_type)
        first = 0 if self.pool_include_prefix else self.num_prefix_tokens
        return mean_by_size(x[:, first:], sizes[:, first:])


def _resize(model: VisionTransformer, size: int) -> None:
    """Images of another side: timm interpolates the positions."""
    embed = model.patch_embed
    patches_along(size, embed.feat_ratio())
    scale_images(embed, size, native=embed.img_size[0])
    model.set_input_size(img_size=(size, size))
    model.blocks.grid = tuple(embed.grid_size)


def _to_shared_attention(block: nn.Module) -> None:
    attention = block.attn
    block.attn = Attention(
        attention.qkv,
        attention.proj,
        attention.num_heads,
        attention.scale,
        q_norm=attention.q_norm,
        k_norm=attention.k_norm,
        norm=attention.norm,
        gate=getattr(attention, "gate", None),
        attn_drop=attention.attn_drop.p,
        proj_drop=attention.proj_drop.p,
    )


def wrap(model: nn.Module) -> Tower | None:
    """Wrap a timm VisionTransformer in place; None if the model is of another kind.

    Raises:
        UsageError: its blocks are of a type that effbench does not know, or do not come out equal (1e-5).
    """
    if not isinstance(model, VisionTransformer):
        return None
    name = f"timm {type(model).__name__}"
    if not isinstance(model.blocks, TimmBlocks):
        for index, block in enumerate(model.blocks):
            attention = type(getattr(block, "attn", None))
            if type(block) is not Block or attention is not TimmAttention:
                raise UsageError(
                    f"block {index} of this {name} is a {type(block).__name__} with {attention.__name__}, "
                    "which effbench cannot edit",
                    "choose a plain ViT, e.g. timm:deit_tiny_patch16_224",
                )
        loop = TimmBlocks(*model.blocks)
        for index, block in enumerate(loop):
            check_block(loop, block, model.embed_dim, f"block {index} of {name}", _to_shared_attention)
        loop.train(model.training)
        loop.prefix = model.num_prefix_tokens
        loop.grid = tuple(model.patch_embed.grid_size)
        model.blocks = loop
        if type(model) is VisionTransformer and model.global_pool == "avg" and model.attn_pool is None:
            model.__class__ = PoolsBySize  # keeps every attribute and key
            loop.hands_out_sizes = True
    return Tower(
        name,
        model.blocks,
        model.blocks,
        model.embed_dim,
        has_class_token=model.cls_token is not None,
        module=model,
        patch=model.patch_embed.feat_ratio() if hasattr(model.patch_embed, "feat_ratio") else 0,
        ignores_sizes=model.attn_pool is not None or not (model.global_pool == "token" or model.blocks.hands_out_sizes),
        stem=model.patch_embed,
        resize=partial(_resize, model) if hasattr(model.patch_embed, "set_input_size") else None,
    )
