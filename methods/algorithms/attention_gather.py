"""Sparse attention by gathering: each block of queries with copies of the keys that it sees, dense on less."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effbench.models.attention import Projections
from effbench_methods.algorithms.attention_patterns import Layout


def gathered(p: Projections, layout: Layout, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Attention of each block of queries to the keys of that block.

    Args:
        layout: of these tokens, on their device.
        bias: added to the scores, (batch, 1, 1, tokens), or None.
        dropout: on the attention weights.

    Returns:
        (batch, heads, tokens, head width).
    """
    plain = p.q.device.type == "cpu" and p.q.dtype == p.v.dtype == torch.float32 and bias is None
    if plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _image_by_image(p, layout)
    return _all_at_once(p, layout, bias, dropout)


def _all_at_once(p: Projections, layout: Layout, bias: Tensor | None, dropout: float) -> Tensor:
    """One attention over the blocks of all images, and a small one for the prefix's queries."""
    batch, heads, tokens, width = p.q.shape
    first, blocks = layout.prefix, batch * layout.blocks
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=p.scale)
    queries, keys = _of_all(layout.queries, batch, tokens), _of_all(layout.keys, batch, tokens)

    def copied(x: Tensor, index: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, index)
        return rows.view(blocks, -1, heads, width).transpose(1, 2)

    mask = None if layout.mask is None else layout.mask.repeat(batch, 1, 1, 1)
    if bias is not None:
        weights = bias.expand(batch, -1, -1, -1).reshape(-1).index_select(0, keys).view(blocks, 1, 1, -1)
        mask = weights if mask is None else torch.where(mask, weights, float("-inf"))
    y = attend(copied(p.q, queries), copied(p.k, keys), copied(p.v, keys), attn_mask=mask)
    y = y.transpose(1, 2).reshape(-1, heads, width)
    y = y.index_select(0, _of_all(layout.order, batch, layout.queries.numel())).unflatten(0, (batch, -1))
    if first:
        y = torch.cat([attend(p.q[:, :, :first], p.k, p.v, attn_mask=bias).transpose(1, 2), y], dim=1)
    return y.transpose(1, 2)


def _of_all(index: Tensor, images: int, rows: int) -> Tensor:
    """Indices into the rows of one image as indices into those of all images."""
    return (index + torch.arange(0, images * rows, rows, device=index.device)[:, None]).flatten()


def _image_by_image(p: Projections, layout: Layout) -> Tensor:
    """The same on a CPU, where copies of a whole batch cost what they save: those of one image stay in the cache.

    Nor are k and v read a second time for the prefix's queries: they go along with every block, and their weights are
    normalised over all blocks.
    """
    batch, heads, tokens, width = p.q.shape
    first, blocks = layout.prefix, layout.blocks
    q, k, v = (_rows(x) for x in p[:3])
    ready = _ready(layout, heads, q.steps, k.steps, v.steps)
    out = p.v.new_empty(batch, tokens * heads, width)
    for q_, k_, v_, out_ in zip(q.table.unbind(), k.table.unbind(), v.table.unbind(), out.unbind(), strict=True):
        q_ = q_.index_select(0, ready.queries).view(heads * blocks, -1, width)
        k_ = k_.index_select(0, ready.keys).view(heads * blocks, -1, width)
        v_ = v_.index_select(0, ready.values).view(heads * blocks, -1, width)
        scores = torch.baddbmm(q_.new_empty(1, 1, 1), q_, k_.transpose(1, 2), beta=0, alpha=p.scale)
        by_block = scores.view(heads, blocks, *scores.shape[1:])
        if ready.hidden is not None:
            by_block[:, :, first:] += ready.hidden
        weights = scores.softmax(dim=-1)
        if first:
            of_prefix = (by_block[:, :, :first] + ready.once).transpose(1, 2)
            joint = of_prefix.flatten(2).softmax(dim=-1).view_as(of_prefix)
            weights.view_as(by_block)[:, :, :first] = joint.transpose(1, 2)
        y = torch.bmm(weights, v_)
        torch.index_select(y.view(-1, width), 0, ready.order, out=out_[first * heads :])
        parts = y.view(heads, blocks, -1, width)[:, :, :first]
        out_[: first * heads].view(first, heads, width).copy_(parts.sum(dim=1).transpose(0, 1))
    return out.view(batch, tokens, heads, width).transpose(1, 2)


class _Rows(NamedTuple):
    """A tensor (batch, heads, tokens, width) as the rows that lie in its memory.

    Args:
        table: (batch, rows, width), a view.
        steps: how many rows on the next token, and the next head, are.
    """

    table: Tensor
    steps: tuple[int, int]


def _rows(x: Tensor) -> _Rows:
    batch, heads, tokens, width = x.shape
    if x.stride(3) != 1 or x.stride(1) % width or x.stride(2) % width:
        x = x.contiguous()
    head, token = x.stride(1) // width, x.stride(2) // width
    rows = (heads - 1) * head + (tokens - 1) * token + 1
    return _Rows(x.as_strided((batch, rows, width), (x.stride(0), width, 1)), (token, head))


class _Ready(NamedTuple):
    """What `_image_by_image` needs of a layout, made once for the way that q, k and v lie in memory.

    Args:
        queries, keys, values: rows of each, in the order (head, block, token); every block's queries begin with the
            prefix's.
        order: for each patch and head, its row among the results.
        once: (blocks, 1, keys), -inf for a key that an earlier block has too.
        hidden: (blocks, block size, keys), -inf for the pairs that the mask hides; None without a mask.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    order: Tensor
    once: Tensor
    hidden: Tensor | None


def _ready(layout: Layout, heads: int, *steps: tuple[int, int]) -> _Ready:
    if (heads, steps) in layout.ready:
        return layout.ready[heads, steps]
    with torch.inference_mode(False):
        blocks, first = layout.blocks, layout.prefix
        head = torch.arange(heads)[:, None]
        queries, keys = layout.queries.view(blocks, -1), layout.keys.view(blocks, -1)
        queries = torch.cat([torch.arange(first).expand(blocks, first), queries], dim=1)
        parts = [
            (tokens.flatten() * token + head * step).flatten()
            for tokens, (token, step) in zip((queries, keys, keys), steps, strict=True)
        ]
        per_block = queries.shape[1]
        block, place = layout.order // (per_block - first), layout.order % (per_block - first) + first
        order = (block + head * blocks) * per_block + place
        key, where = layout.keys.sort(stable=True)
        again = F.pad(key[1:] == key[:-1], (1, 0))
        once = torch.zeros(key.shape).masked_fill(torch.zeros_like(again).scatter(0, where, again), float("-inf"))
        hidden = (
            None
            if layout.mask is None
            else torch.zeros(layout.mask.shape).masked_fill(~layout.mask, float("-inf")).squeeze(1)
        )
        layout.ready[heads, steps] = _Ready(*parts, order.t().flatten(), once.view(blocks, 1, -1), hidden)
    return layout.ready[heads, steps]
