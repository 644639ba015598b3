"""Seeing one row of a library attention, or its keys, at the cost of that row: the fused path is untouched."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "effbench"  # the library's fused attention under a name of its own, which a layer may be watched through


class ClassOrLast(nn.Module):
    """Sees attention: `of` says what, the layer's attention shows it, `taken` gives it. It is overhead."""

    is_overhead: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.wanted, self.query = "", 0
        self.row: Tensor | None = None
        self.keys: Tensor | None = None

    def of(self, wanted: str, query: int) -> ClassOrLast:
        """Look at "row", "keys" or "both"; the row is that of the token `query`, from the end where it is negative."""
        self.wanted, self.query = wanted, query
        return self

    def taken(self) -> tuple[Tensor | None, Tensor | None]:
        """The row (batch, tokens) and the keys (batch, tokens, heads, head width) that were shown; each only once."""
        row, keys = self.row, self.keys
        self.row = self.keys = None
        return row, keys

    def forward(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> None:
        """Look.

        Args:
            query: (batch, heads, tokens, head width); key: (batch, key heads, tokens, head width).
            mask: (batch or 1, 1, tokens, tokens), additive or True where attended.
        """
        if self.wanted in ("keys", "both"):
            self.keys = key.transpose(1, 2)
        if self.wanted not in ("row", "both"):
            return
        tokens = query.shape[2]
        which = self.query % tokens
        one = query[:, :, which].unflatten(1, (key.shape[1], -1))  # queries that share a key head side by side
        row = (one * scale) @ key.transpose(2, 3)  # (batch, key heads, queries of each, tokens)
        if mask is not None:
            seen = mask[:, :, which, None, : row.shape[-1]]
            row = row.masked_fill(~seen, float("-inf")) if seen.dtype is not row.dtype else row + seen
        elif is_causal and which + 1 < tokens:
            row[..., which + 1 :] = float("-inf")
        self.row = row.softmax(dim=-1).flatten(1, 2).mean(dim=1)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    watched_by: ClassOrLast | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The library's fused attention; a layer that is called with `watched_by` shows it queries and keys."""
    if watched_by is not None:
        scale = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        watched_by(query, key, attention_mask, scale, getattr(module, "is_causal", False))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def watch(layer: nn.Module, by: ClassOrLast) -> None:
    """Let a layer's attention be seen in every call, where its model uses the attention called `ATTENTION`."""
    layer.register_forward_pre_hook(functools.partial(_watched, by), with_kwargs=True)
    layer.looked_at = True


def _watched(by: ClassOrLast, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, kwargs | dict(watched_by=by)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
