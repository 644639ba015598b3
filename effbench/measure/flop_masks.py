"""What masks leave of attention: the share of query-key pairs that is attended to, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

SDPA = torch.ops.aten.scaled_dot_product_attention.default
AUTOGRAD_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMPS", "AutogradXPU", "AutogradMeta")

#: what is added to a hidden score lies so far below its row's largest that the softmax leaves nothing of it; libraries
#: write -inf, -1e9 or the smallest number of the dtype
HIDDEN = 1e4

Attend = Callable[..., Tensor]


@contextmanager
def attention_calls(masked: Callable[[Fraction], AbstractContextManager[None]]) -> Iterator[Attend]:
    """Run every scaled_dot_product_attention of the process inside `masked(share of its pairs that are kept)`.

    This is asked before torch chooses a kernel: the path of plain matrix products (on "meta", with dropout, in float64)
    forgets the mask. A mask may lie on the CPU while the queries are on "meta", where tensors have no values.

    Yields:
        what stands in for the operation; it is for dispatch modes under inference_mode, which skips autograd's keys.
    """

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        kept = kept_share(query.shape[-2], key.shape[-2], attn_mask, is_causal)
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.device)
        with masked(kept):
            return SDPA.decompose(query, key, value, attn_mask, dropout_p, is_causal, **options)

    with torch.library._scoped_library("aten", "IMPL") as library:
        for key in AUTOGRAD_KEYS:
            library.impl("scaled_dot_product_attention", attend, key)
        yield attend


def kept_share(queries: int, keys: int, mask: Tensor | None, is_causal: bool) -> Fraction:
    """Share of the query-key pairs that a mask keeps; 1 where it has no values to look at (on "meta").

    Args:
        mask: True where attended to, or what is added to the scores; broadcastable to (..., queries, keys).
        is_causal: query i sees keys 0 to i (torch's alignment, top left).
    """
    if is_causal and queries and keys:
        whole = min(queries, keys)  # rows that the diagonal crosses; the rows below see every key
        return Fraction(whole * (whole + 1) // 2 + (queries - whole) * keys, queries * keys)
    if mask is None or mask.is_meta or not mask.numel():
        return Fraction(1)
    seen = mask if mask.dtype == torch.bool else mask > mask.amax(-1, keepdim=True) - HIDDEN
    return Fraction(int(seen.sum()), mask.numel())


def flex_share(args: tuple[Any, ...]) -> Fraction:
    """Share of the pairs that a FlexAttention operation computes: entries of full blocks and the mask's in the others.

    Args:
        args: of the higher-order operation, forward or backward: query, key, ..., the block mask as a tuple, ...
    """
    query, key = args[:2]
    mask = next(arg for arg in args if isinstance(arg, tuple) and arg and callable(arg[-1]))
    mask_mod, (q_block, k_block) = mask[-1], mask[-3:-1]
    partial, full = (_blocks(*pair) for pair in _block_lists(mask))
    batch, heads, queries, keys = *query.shape[:2], query.shape[-2], key.shape[-2]
    q, k = (torch.arange(n, device=query.device) for n in (queries, keys))
    row, column = (q // q_block)[:, None], k // k_block
    kept = 0
    for b in range(batch):
        for h in range(heads):
            seen = _of(partial, b, h)[row, column]
            if bool(seen.any()):
                seen = seen & mask_mod(torch.full_like(q[:1], b), torch.full_like(q[:1], h), q[:, None], k)
            if full is not None:
                seen = seen | _of(full, b, h)[row, column]
            kept += int(seen.sum())
    return Fraction(kept, max(1, batch * heads * queries * keys))


def _block_lists(mask: tuple[Any, ...]) -> list[tuple[Tensor | None, Tensor | None]]:
    """(number, indices) of the key blocks of each row of query blocks, of partial and of full blocks."""
    first = next(i for i, part in enumerate(mask) if isinstance(part, Tensor))
    return [mask[first : first + 2], mask[first + 2 : first + 4]]


def _blocks(number: Tensor | None, indices: Tensor | None) -> Tensor | None:
    """Dense form of such lists: bool (batch or 1, heads or 1, query blocks, key blocks)."""
    if number is None or indices is None:
        return None
    listed = torch.arange(indices.shape[-1], device=indices.device) < number[..., None]
    dense = torch.zeros(*indices.shape[:-1], indices.shape[-1] + 1, dtype=torch.bool, device=indices.device)
    places = torch.where(listed, indices, indices.shape[-1]).long()  # what is not listed goes to a spare column
    return dense.scatter_(-1, places, True)[..., :-1]


def _of(blocks: Tensor, b: int, h: int) -> Tensor:
    return blocks[b % blocks.shape[0], h % blocks.shape[1]]
