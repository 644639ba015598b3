"""Patch pooling: squares of the patch grid become one token each, and a coarser full grid goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effbench.errors import UsageError
from effbench.method import Method, param
from effbench.models.attention import Projections
from effbench.models.token_state import Reduce, TokenEdit, TokenState
from effbench.models.tower import ModelView, image_tower
from effbench_methods.algorithms.selection import BLIND, blind, gather


@dataclass(frozen=True)
class PatchPool(Method):
    """Pool each side x side patches to one token after the attention of a block; class and register tokens stay.

    mean averages them. grid keeps the middle patch of each square; norm the longest tokens and random any, both as many
    as there are squares but wherever they lie: the controls.
    """

    source = "average pooling to a coarser grid: MM1, arXiv 2403.09611, there between tower and language model"
    goes_before = ("sparse_attention",)
    neutral = {"side": 1}

    side: int = param(2, "patches along the side of a square", low=1)
    at: int = param(3, "block (0-based) after whose attention the patches are pooled", low=0)
    how: str = param("mean", "what stands for a square", choices=("mean", *BLIND))

    @property
    def claims(self) -> tuple[str, ...]:
        drawn = ("random",) if self.how == "random" else ()
        return ("tokens", *drawn) if self.side > 1 else ()

    def edit_model(self, model: ModelView) -> None:
        tower = image_tower(model, "patch_pool")
        height, width = tower.grid
        common = math.gcd(height, width)
        if common % self.side:
            divisors = [f"side={n}" for n in range(2, common + 1) if common % n == 0]
            raise UsageError(
                f"patch_pool: side={self.side} does not divide the grid of {height} x {width} patches",
                f"what does: {', '.join(divisors)}" if divisors else "only side=1 does; put resize before it",
            )
        for edit in (block.token_edit for block in tower.blocks[: self.at]):
            if edit is not None and not edit.keeps_grid:
                raise UsageError(
                    f"patch_pool at block {self.at} needs the grid that {edit.name} breaks up before it",
                    "pool in an earlier block with at=, or compare them as two arms",
                )
        tower.after_attention(self.at, Pool(self))

    def controls(self) -> dict[str, Method]:
        return {how: replace(self, how=how) for how in BLIND if how != self.how} if self.side > 1 else {}


class Pool(TokenEdit):
    """One stage of pooling."""

    name = "patch_pool"
    needs_grid = True

    def __init__(self, method: PatchPool) -> None:
        super().__init__()
        self.method = method
        self.keeps_grid = method.how in ("mean", "grid")

    def forward(self, state: TokenState, projections: Projections) -> Reduce | None:
        side, how, x = self.method.side, self.method.how, state.tokens
        n = x.shape[1] - state.prefix
        if state.grid is None or math.prod(state.grid) != n:
            raise UsageError(
                f"patch_pool needs a full grid, and {n} patch tokens are none", "put it before other methods"
            )
        if side == 1:
            return None
        if self.keeps_grid:
            return Squares(state.grid, side, state.prefix, how)
        return gather(blind(how, x[:, state.prefix :], n // side**2), state.prefix)


@dataclass
class Squares:
    """A reduction of each side x side patches to one token: their mean (sizes add up), or the one in the middle.

    `grid` is the one that comes in as an argument, and the coarser one that is left as an attribute.
    """

    grid: tuple[int, int]
    side: int
    prefix: int
    how: str

    def __post_init__(self) -> None:
        self.grid = (self.grid[0] // self.side, self.grid[1] // self.side)

    def __call__(self, field: Tensor, kind: str) -> Tensor:
        head, patches = field[:, : self.prefix], field[:, self.prefix :]
        squares = patches.unflatten(1, (self.grid[0], self.side, self.grid[1], self.side))
        middle = squares[:, :, self.side // 2, :, self.side // 2]
        if self.how == "grid":
            pooled = middle
        elif kind == "tokens":
            pooled = squares.mean(dim=(2, 4))
        elif kind == "size":
            pooled = squares.sum(dim=(2, 4))
        else:
            pooled = torch.full_like(middle, -1)
        return torch.cat([head, pooled.flatten(1, 2)], dim=1)
