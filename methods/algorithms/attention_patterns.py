"""Which patches attend to which: the patterns of sparse attention, from the shape of the grid alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 8  # patches a side of the tiles that a sliding window's queries are taken in: as few keys as a window shares


class Pattern(NamedTuple):
    """What patches see, and in which blocks their queries are best taken together.

    Args:
        seen: bool (patches, patches), True where the row's query sees the column's key.
        blocks: (blocks, size), every patch in one block; a block that is too short repeats its first patch.
    """

    seen: Tensor
    blocks: Tensor


def windows(grid: tuple[int, int], side: int, shifted: bool) -> Pattern:
    """Windows of side x side patches, dense inside; shifted by side // 2 down and right (Swin, arXiv 2103.14030).

    A shifted window that the border cuts is cut: the grid is rolled so that all windows stay whole, and the pairs
    that only the roll brought together are masked, as published. An axis that one window fills is not shifted.
    """
    rows, columns = _coordinates(grid)
    by_row, by_column = (side // 2 if shifted and length > side else 0 for length in grid)
    cut = _pairs_equal((rows + side - by_row) // side, (columns + side - by_column) // side)
    rolled = (rows - by_row) % grid[0] // side * grid[1] + (columns - by_column) % grid[1] // side
    return Pattern(cut, rolled.argsort(stable=True).view(-1, side * side))


def sliding(grid: tuple[int, int], side: int) -> Pattern:
    """Every patch sees the side x side patches around it, cut at the border: Longformer's sliding window (arXiv
    2004.05150) in two dimensions, as in Vision Longformer (arXiv 2103.15358)."""
    rows, columns = _coordinates(grid)
    reach = side // 2
    near = (rows[:, None] - rows).abs().le(reach) & (columns[:, None] - columns).abs().le(reach)
    height, width = (math.ceil(length / math.ceil(length / TILE)) for length in grid)
    tile = rows // height * grid[1] + columns // width
    return Pattern(near, _padded([torch.where(tile == one)[0] for one in tile.unique()]))


def block_sparse(patches: int, size: int, random: int = 0, seed: int = 0) -> Pattern:
    """Blocks of `size` patches in raster order see themselves, the blocks before and after, and `random` others.

    With random blocks it is BigBird's (arXiv 2007.14062); the ends have one neighbour, not a wrapped one.

    Args:
        seed: of the random blocks, which are drawn once, without repetition, for every block of queries.
    """
    block = torch.arange(patches) // size
    blocks = int(block[-1]) + 1
    index = torch.arange(blocks)
    near = (index[:, None] - index).abs() <= 1
    if random:
        draw = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(seed))
        near = near.scatter(1, draw.masked_fill(near, -1).topk(random, dim=1).indices, True)
    return Pattern(near[block][:, block], _padded(list(torch.arange(patches).split(size))))


class Layout(nn.Module):
    """A pattern made ready to compute with, prefix tokens included: they see all and are seen by all.

    The keys of a block of queries are those that any of its queries sees; `mask` hides the others of them. Nothing of
    it depends on the tokens, so it is made once; its buffers move with the model and are no part of its state.

    Args:
        pattern: over the patches of the grid.
        prefix: number of prefix tokens.
        grid: (height, width) in patches.

    Attributes:
        seen: bool (tokens, tokens).
        queries, keys: indices of tokens, block by block, (blocks x block size,) and (blocks x keys,).
        mask: bool (blocks, 1, block size, keys), None where a block's queries all see all of its keys.
        order: (patches,), where each patch lies in `queries`.
        blocks: their number.
        ready: what `attention_gather` makes of it once, for how tokens lie in memory.
    """

    def __init__(self, pattern: Pattern, prefix: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.ready: dict[Any, Any] = {}
        self.prefix, self.grid, self.blocks = prefix, grid, len(pattern.blocks)
        seen = F.pad(pattern.seen, (prefix, 0, prefix, 0), value=True)
        queries = pattern.blocks + prefix
        any_sees = seen[queries].any(dim=1)
        most = int(any_sees.sum(dim=1).max())
        keys = any_sees.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # in order; unseen ones pad
        mask = seen[queries[:, :, None], keys[:, None, :]].unsqueeze(1)
        order = torch.empty(len(seen), dtype=torch.long)
        order[queries.flatten()] = torch.arange(queries.numel())  # whichever repetition: they come out equal
        made = dict(seen=seen, queries=queries.flatten(), keys=keys.flatten(), order=order[prefix:])
        for name, tensor in (made | dict(mask=None if mask.all() else mask)).items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def pairs(self) -> int:
        """Query-key products per head and image that gathering computes for all at once."""
        return self.keys.numel() * (self.queries.numel() // self.blocks) + self.prefix * len(self.seen)


def divisors(grid: tuple[int, int]) -> list[int]:
    """The sides of windows, above 1, that divide a grid."""
    common = math.gcd(*grid)
    return [side for side in range(2, common + 1) if common % side == 0]


def _coordinates(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of every patch, (patches,) each, in raster order."""
    index = torch.arange(grid[0] * grid[1])
    return index // grid[1], index % grid[1]


def _pairs_equal(*labels: Tensor) -> Tensor:
    """bool (n, n): whether two patches agree in all labels (n,)."""
    return torch.stack([label[:, None] == label for label in labels]).all(dim=0)


def _padded(blocks: list[Tensor]) -> Tensor:
    """Blocks of indices as one (blocks, longest), the short ones filled with their first."""
    longest = max(map(len, blocks))
    return torch.stack([torch.cat([block, block[:1].expand(longest - len(block))]) for block in blocks])
