"""Adapter: the tower view of timm's VisionTransformer. Source: timm.models.vision_transformer (Apache-2.0)."""

from __future__ import annotations

from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from effbench.errors import UsageError
from effbench.models.attention import Attention, Projections
from effbench.models.tower import BlockLoop, TokenState, Tower, check_block


class TimmBlocks(BlockLoop, nn.Sequential):
    """Stands in for `VisionTransformer.blocks`; same children, same keys."""

    @staticmethod
    def attention_branch(block: nn.Module, state: TokenState) -> tuple[Tensor, Projections]:
        y, projections = block.attn(block.norm1(state.tokens), state.mask, state.is_causal, state.sizes, True)
        return block.drop_path1(block.ls1(y)), projections

    @staticmethod
    def mlp_branch(block: nn.Module, tokens: Tensor) -> Tensor:
        return block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(self, x)


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
    heads = model.blocks[0].attn.num_heads
    return Tower(name, model.blocks, model.blocks, model.embed_dim, heads, model.cls_token is not None)
