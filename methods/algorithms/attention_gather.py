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
    first, blocks = layout.prefix, heads * layout.blocks
    tables, steps = zip(*(_rows(x) for x in p[:3]), strict=True)
    ready = _ready(layout, heads, steps)
    # one image's copies and scores, written over by the next
    parts = [p.v.new_empty(len(index), width) for index in ready.rows]
    q, k, v = (part.view(blocks, -1, width) for part in parts)
    scores, weights = (p.v.new_empty(blocks, q.shape[1], k.shape[1]) for _ in range(2))
    y = torch.empty_like(parts[0])
    by_block, weights_by_block, y_by_block = (
        x.view(heads, layout.blocks, q.shape[1], -1) for x in (scores, weights, y)
    )
    of_prefix, of_patches = by_block[:, :, :first], by_block[:, :, first:]
    weights_of_prefix = weights_by_block[:, :, :first].transpose(1, 2)
    out = p.v.new_empty(batch, tokens * heads, width)
    out_prefix = out[:, : first * heads].view(batch, first, heads, width).transpose(1, 2)
    out_patches = out[:, first * heads :]
    for i in range(batch):
        for table, index, part in zip(tables, ready.rows, parts, strict=True):
            torch.index_select(table[i], 0, index, out=part)
        scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=p.scale)
        if ready.hidden is not None:
            of_patches += ready.hidden
        torch.softmax(scores, dim=-1, out=weights)
        if first:
            joint = (of_prefix + ready.once).transpose(1, 2)
            weights_of_prefix.copy_(joint.flatten(2).softmax(dim=-1).view_as(joint))
        torch.bmm(weights, v, out=y.view_as(q))
        torch.index_select(y, 0, ready.order, out=out_patches[i])
        if first:
            torch.sum(y_by_block[:, :, :first], dim=1, out=out_prefix[i])
    return out.view(batch, tokens, heads, width).transpose(1, 2)


def _rows(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A tensor (batch, heads, tokens, width) as the rows that lie in its memory.

    Returns:
        a view (batch, rows, width), and how many rows on the next token, and the next head, are.
    """
    batch, heads, tokens, width = x.shape
    if x.stride(3) != 1 or x.stride(1) % width or x.stride(2) % width:
        x = x.contiguous()
    head, token = x.stride(1) // width, x.stride(2) // width
    rows = (heads - 1) * head + (tokens - 1) * token + 1
    return x.as_strided((batch, rows, width), (x.stride(0), width, 1)), (token, head)


class _Ready(NamedTuple):
    """What `_image_by_image` needs of a layout, made once for the way that q, k and v lie in memory.

    Args:
        rows: of q, k and v, in the order (head, block, token); every block's queries begin with the prefix's.
        order: for each patch and head, its row among the results.
        once: (blocks, 1, keys), -inf for a key that an earlier block has too.
        hidden: (blocks, block size, keys), -inf for the pairs that the mask hides; None without a mask.
    """

    rows: tuple[Tensor, Tensor, Tensor]
    order: Tensor
    once: Tensor
    hidden: Tensor | None


def _ready(layout: Layout, heads: int, steps: tuple[tuple[int, int], ...]) -> _Ready:
    if (heads, steps) not in layout.ready:
        with torch.inference_mode(False):
            layout.ready[heads, steps] = _made_ready(layout, heads, steps)
    return layout.ready[heads, steps]


def _made_ready(layout: Layout, heads: int, steps: tuple[tuple[int, int], ...]) -> _Ready:
    blocks, first, head = layout.blocks, layout.prefix, torch.arange(heads)[:, None]
    queries = layout.queries.view(blocks, -1)
    queries = torch.cat([torch.arange(first).expand(blocks, first), queries], dim=1)
    tokens = (queries.flatten(), layout.keys, layout.keys)
    rows = tuple((index * token + head * step).flatten() for index, (token, step) in zip(tokens, steps, strict=True))
    per_block = queries.shape[1]
    block, place = layout.order // (per_block - first), layout.order % (per_block - first) + first
    order = ((block + head * blocks) * per_block + place).t().flatten()
    key, where = layout.keys.sort(stable=True)
    again = torch.zeros(len(key), dtype=torch.bool).scatter(0, where, F.pad(key[1:] == key[:-1], (1, 0)))
    hidden = None if layout.mask is None else _minus_infinity(~layout.mask).squeeze(1)
    return _Ready(rows, order, _minus_infinity(again).view(blocks, 1, -1), hidden)


def _minus_infinity(where: Tensor) -> Tensor:
    return torch.zeros(where.shape).masked_fill(where, float("-inf"))
