"""Token merging: replace similar tokens by their mean between attention and MLP."""

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
from effbench_methods.algorithms.matching import bipartite, by_energy, merge, prune
from effbench_methods.algorithms.selection import BLIND, blind, gather


@dataclass(frozen=True)
class TokenMerge(Method):
    """Merge r patch tokens in every block between attention and MLP; class and register tokens stay as they are.

    Tokens are compared by the keys of the block, averaged over heads. tome: alternating tokens are matched and the r
    most similar pairs merged into their size-weighted mean. pitome: of the 2r most redundant tokens one half is merged
    into the other. tofu: tome's matching; the first blocks drop the matched token, the later ones merge with a mean
    that preserves norms. Attention that follows weights keys by the number of tokens they stand for. In a block with
    few tokens left r is at most half of its patch tokens.

    random, grid and norm drop r tokens per block instead, blindly: controls of the same token budget.
    """

    source = "ToMe, arXiv 2210.09461; PiToMe, arXiv 2405.16148; ToFu, arXiv 2312.01026"
    neutral = {"r": (0,)}

    r: tuple[int, ...] = param((13,), "tokens merged per block; one number, or one for each block (16/16/8/...)", low=0)
    schedule: str = param(
        "constant", "decreasing: from 2r in the first block to 0 in the last", choices=("constant", "decreasing")
    )
    ratio: float | None = param(None, "share of its patch tokens that each block keeps, in place of r", low=0.5, high=1)
    variant: str = param("tome", "how tokens are matched and merged", choices=("tome", "pitome", "tofu", *BLIND))
    prune: int | None = param(
        None, "first blocks that drop the matched token instead; none: half of them for tofu, else 0", low=0
    )
    proportional: bool = param(True, "later attention weights keys by the size of the tokens")

    def __post_init__(self) -> None:
        if isinstance(self.r, int):
            object.__setattr__(self, "r", (self.r,))
        super().__post_init__()
        if not self.r:
            raise UsageError("token_merge: r= names no number", "e.g. r=13, or one number for each block")
        if self.ratio is not None and self.r != (13,):
            raise UsageError("token_merge: ratio stands in place of r", "give one of them")
        if self.schedule == "decreasing" and (len(self.r) > 1 or self.ratio is not None):
            raise UsageError(
                "token_merge: schedule=decreasing is a schedule of one number r", "give a single r and no ratio"
            )
        if self.prune is not None and self.variant in BLIND:
            raise UsageError(f"token_merge: variant={self.variant} drops tokens in every block", "leave prune out")

    @property
    def claims(self) -> tuple[str, ...]:
        takes = any(self.r) if self.ratio is None else self.ratio < 1
        drawn = ("random",) if self.variant == "random" else ()
        return ("tokens", *drawn) if takes else ()

    def edit_model(self, model: ModelView) -> None:
        tower = image_tower(model, "token_merge")
        layers, most = len(tower), tower.patch_tokens // 2
        if self.ratio is None and max(self.r) > most:
            raise UsageError(
                f"token_merge: r={max(self.r)} is more than half of the {tower.patch_tokens} patch tokens",
                f"r takes 0 to {most} here",
            )
        if self.ratio is None and len(self.r) not in (1, layers):
            raise UsageError(
                f"token_merge: {len(self.r)} values of r for the {layers} blocks of {tower.name}",
                f"give one number or {layers} of them, separated by /",
            )
        dropping = self.prune if self.prune is not None else layers // 2 if self.variant == "tofu" else 0
        if dropping > layers:
            raise UsageError(f"token_merge: prune={dropping} of {layers} blocks", f"prune takes 0 to {layers} here")
        for block, r in enumerate(per_block(self, layers)):
            if r:
                tower.after_attention(block, Merge(self, r, block < dropping, margin=0.9 * (1 - block / layers)))

    def controls(self) -> dict[str, Method]:
        budget = replace(self, prune=None, proportional=True)
        return {name: replace(budget, variant=name) for name in BLIND}


def per_block(method: TokenMerge, layers: int) -> list[float]:
    """What each block takes away: tokens from 1 on, below 1 a share of its patch tokens."""
    if method.ratio is not None:
        return [1 - method.ratio] * layers
    if method.schedule == "decreasing":  # ToMe's linear schedule, rounded down as published
        return [int(2 * method.r[0] * (1 - block / max(1, layers - 1))) for block in range(layers)]
    return list(method.r) * (layers // len(method.r))


class Merge(TokenEdit):
    """Takes `amount` tokens, or that share of them, away in one block."""

    name = "token_merge"

    def __init__(self, method: TokenMerge, amount: float, drops: bool, margin: float) -> None:
        super().__init__()
        self.method, self.amount, self.drops, self.margin = method, amount, drops, margin

    def forward(self, state: TokenState, projections: Projections) -> Reduce | None:
        x, prefix = state.tokens, state.prefix
        n = x.shape[1] - prefix
        r = min(math.floor(self.amount if self.amount >= 1 else self.amount * n + 1e-9), n // 2)
        if not r:
            return None
        if self.method.variant in BLIND:
            return gather(blind(self.method.variant, x[:, prefix:], n - r), prefix)
        if state.sizes is None:
            state.sizes = torch.ones(x.shape[:2], device=x.device)
        state.proportional = self.method.proportional
        metric = mean_key(projections)
        if self.method.variant == "pitome":
            matching = by_energy(metric, r, prefix, self.margin)
        else:
            matching = bipartite(metric, r, prefix)
        if self.drops:
            return prune(matching, state.sizes)
        return merge(matching, state.sizes, preserve_norm=self.method.variant == "tofu")


def mean_key(projections: Projections) -> Tensor:
    """Keys (batch, tokens, head width) summed over heads: their mean, but for a factor that no cosine sees."""
    total, *rest = projections.k.unbind(1)
    for head in rest:  # several times faster than a sum over a strided axis
        total = total + head
    return total
