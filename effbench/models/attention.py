"""The one attention that all edited arms share: fused, and it gives methods what they need at no extra cost."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projections(NamedTuple):
    """Queries, keys and values of one attention, each (batch, heads, tokens, head width), and the softmax scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


class AttentionCore(nn.Module):
    """What a method puts in place of dense attention: everything between the projections of one block.

    Class attributes:
        name: the method's name, for messages.
        needs_grid: the patch tokens must be a full grid.
    """

    name: ClassVar[str] = "a method"
    needs_grid: ClassVar[bool] = False

    def forward(
        self, p: Projections, mask: Tensor | None, is_causal: bool, prefix: int, grid: tuple[int, int] | None
    ) -> Tensor:
        """Attend.

        Args:
            p: queries, keys and values, each (batch, heads, tokens, head width).
            mask: additive (sizes of tokens included) or boolean, as `Attention` takes it.
            prefix: number of leading tokens that are no patches.
            grid: (height, width) of the patch tokens, None where they are no full grid.

        Returns:
            (batch, heads, tokens, head width).
        """
        raise NotImplementedError

    def pairs(self, tokens: int) -> int:
        """Products of a query and a key that it computes, per head and image."""
        return tokens**2


class Attention(nn.Module):
    """Multi-head self-attention on the library's very Parameters, held by plain nn.Linear modules.

    Equal to the library's own to 1e-5 in float32. Queries, keys and values are handed out as views, so a method's
    scores leave the fused path untouched.

    Args:
        qkv: Linear(width, 3 x heads x head width).
        proj: Linear(heads x head width, width).
        num_heads: number of heads.
        scale: softmax scale; kept when head widths are pruned.
        q_norm, k_norm: normalisation of queries and keys, per head.
        norm: normalisation before `proj`; gate: Linear whose sigmoid multiplies it, or None.
        attn_drop: dropout on the attention weights; proj_drop: dropout on the output.

    Attributes:
        core: a method's own attention in place of the dense one, or None.
    """

    def __init__(
        self,
        qkv: nn.Linear,
        proj: nn.Linear,
        num_heads: int,
        scale: float,
        *,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        norm: nn.Module | None = None,
        gate: nn.Linear | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale
        self.attn_drop = attn_drop
        self.qkv = qkv
        self.q_norm = q_norm or nn.Identity()
        self.k_norm = k_norm or nn.Identity()
        self.norm = norm or nn.Identity()
        self.gate = gate
        self.proj = proj
        self.proj_drop = nn.Dropout(proj_drop)
        self.core: AttentionCore | None = None

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        sizes: Tensor | None = None,
        with_projections: bool = False,
        prefix: int = 0,
        grid: tuple[int, int] | None = None,
    ) -> Tensor | tuple[Tensor, Projections]:
        """Attend.

        Args:
            x: (batch, tokens, width).
            attn_mask: additive or boolean, broadcastable to (batch, heads, tokens, tokens).
            is_causal: each token sees itself and those before it.
            sizes: (batch, tokens), how many original tokens each stands for; keys are weighted by it
                (proportional attention, ToMe, arXiv 2210.09461).
            with_projections: also return the `Projections`.
            prefix, grid: of the tokens (see `effbench.models.token_state.TokenState`), for a `core`.
        """
        batch, tokens, _ = x.shape
        width = self.qkv.out_features // (3 * self.num_heads)
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if sizes is not None:
            bias = sizes.log()[:, None, None, :].to(q.dtype)
            attn_mask = bias if attn_mask is None else _additive(attn_mask, q.dtype) + bias
        if self.core is not None:
            y = self.core(Projections(q, k, v, self.scale), attn_mask, is_causal, prefix, grid)
        else:
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=attn_mask,
                dropout_p=self.attn_drop if self.training else 0.0,
                is_causal=is_causal,
                scale=self.scale,
            )
        y = self.norm(y.transpose(1, 2).flatten(2))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        y = self.proj_drop(self.proj(y))
        return (y, Projections(q, k, v, self.scale)) if with_projections else y


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def class_attention(p: Projections, sizes: Tensor | None = None) -> Tensor:
    """Attention of the class token (token 0) to all tokens, averaged over heads: one row of softmax(q k^T).

    Costs tokens x width MACs, not the tokens x tokens map.

    Args:
        sizes: (batch, tokens), where keys are weighted by them.

    Returns:
        (batch, tokens), each row sums to 1.
    """
    row = (p.q[:, :, :1] * p.scale) @ p.k.transpose(-2, -1)
    if sizes is not None:
        row = row + sizes.log()[:, None, None, :].to(row.dtype)
    return row.softmax(dim=-1).mean(dim=1).squeeze(1)
