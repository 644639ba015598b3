"""The stages of token_prune: what stands between attention and MLP of a block that drops tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effbench.models.attention import Projections, class_attention
from effbench.models.token_state import Reduce, TokenEdit, TokenState, mean_by_size, picked
from effbench_methods.algorithms.adaptive_sampling import padded, sample, significance
from effbench_methods.algorithms.gumbel import keep_mask, masked_sizes
from effbench_methods.algorithms.selection import (
    change,
    farthest,
    fuse_rest,
    gather,
    mean_query_attention,
    rest,
    stride,
    top,
)

if TYPE_CHECKING:
    from effbench_methods.token_prune import TokenPrune


def budget(keep: float, n: int) -> int:
    """Tokens that stay of n, at least one."""
    return max(1, math.ceil(keep * n - 1e-9))  # 0.1 x 30 is 3, whatever floating point says


class Stage(TokenEdit):
    """A place where tokens are dropped.

    Attributes:
        present: the keep rate of the training steps now (see `TokenPrune.anneal`); in eval mode it is `method.keep`.
    """

    name = "token_prune"

    def __init__(self, method: TokenPrune) -> None:
        super().__init__()
        self.method = method
        self.present = method.keep

    @property
    def keep(self) -> float:
        return self.present if self.training else self.method.keep


class Prune(Stage):
    """Keeps a share of the tokens.

    `learned` has a scorer, Linear(width, width/4) - GELU - Linear(1) (course report).
    """

    def __init__(self, method: TokenPrune, width: int) -> None:
        super().__init__(method)
        self.scorer = None
        if method.score == "learned":
            self.scorer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width // 4), nn.GELU())
            self.scorer.append(nn.Linear(width // 4, 1))

    def forward(self, state: TokenState, projections: Projections) -> Reduce | None:
        method, prefix, x = self.method, state.prefix, state.tokens
        n = x.shape[1] - prefix
        k = budget(self.keep, n)
        gating = self.training and self.scorer is not None  # even where all tokens stay, so that the scorer trains
        if k >= n and not gating:
            return None
        patches = x[:, prefix:]
        match method.score:
            case "grid":
                index = stride(n, k, x)
            case "diversity":
                index = farthest(patches, k)
            case _:
                weights = self.weights(state, projections)
                index = top(weights, k)
        if method.exit:
            state.exit(picked(prefix + rest(index, n)))
        keep = gather(index, prefix)
        if gating:
            keep = gated(keep, weights, prefix)
        if not method.fuse or k >= n:
            return keep
        if method.score not in ("class_attention", "mean_query"):  # attention is a distribution already
            weights = weights / weights.sum(dim=1, keepdim=True)
        return fuse_rest(keep, index, weights, prefix)

    def weights(self, state: TokenState, projections: Projections) -> Tensor:
        """Not below 0, (batch, patches): the highest stay."""
        prefix, sizes = state.prefix, state.sizes if state.proportional else None
        patches = state.tokens[:, prefix:]
        match self.method.score:
            case "class_attention":
                return class_attention(projections, sizes)[:, prefix:]
            case "mean_query":
                return mean_query_attention(projections, prefix, sizes)[:, prefix:]
            case "norm":
                return patches.norm(dim=-1)
            case "settled":
                return change(state.entered[:, prefix:], patches)
            case "learned":
                return self.scorer(patches).squeeze(-1).sigmoid()
        return torch.rand(patches.shape[:2], device=patches.device)


class AdaptiveStage(Stage):
    """ATS: keeps the distinct tokens of at most `cap` samples, so each image its own number.

    Args:
        number: stages before this one.
        patches: patch tokens of the tower. The cap follows from these, never from the tokens at hand: those include the
            padding that other images of the batch need.
    """

    def __init__(self, method: TokenPrune, number: int, patches: int) -> None:
        super().__init__(method)
        self.number, self.patches = number, patches

    @property
    def cap(self) -> int:
        k = self.patches
        for _ in range(self.number + 1):
            k = budget(self.keep, k)
        return k

    def forward(self, state: TokenState, projections: Projections) -> Reduce:
        index, real = sample(significance(projections, state.prefix, state.sizes), self.cap)
        keep = gather(index, state.prefix)
        if real.all():
            return keep
        if state.sizes is None:
            state.sizes = torch.ones(state.tokens.shape[:2], device=index.device)
        return padded(keep, real, state.prefix)


class DynamicStage(Stage):
    """DynamicViT: a predictor of two logits, keep and drop, from a token's own features and the mean over all tokens.

    In training a Gumbel mask goes into the sizes of the tokens and none leaves; else the likeliest stay.

    Attributes:
        share: (batch,), tokens that the last training pass kept / tokens left before; taken by the loss.
    """

    def __init__(self, method: TokenPrune, width: int) -> None:
        super().__init__(method)
        self.features = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        layers = [nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU()]
        self.logits = nn.Sequential(*layers, nn.Linear(width // 4, 2))
        self.share: Tensor | None = None

    def forward(self, state: TokenState, projections: Projections) -> Reduce | None:
        prefix = state.prefix
        patches = state.tokens[:, prefix:]
        sizes = state.sizes
        local, everywhere = self.features(patches).chunk(2, dim=-1)
        mean = mean_by_size(everywhere, None if sizes is None else sizes[:, prefix:])
        logits = self.logits(torch.cat([local, mean.unsqueeze(1).expand_as(everywhere)], dim=-1))
        if not self.training:
            n = patches.shape[1]
            k = budget(self.keep, n)
            return None if k >= n else gather(top(logits[..., 0] - logits[..., 1], k), prefix)
        sizes = torch.ones(state.tokens.shape[:2], device=patches.device) if sizes is None else sizes
        before = sizes[:, prefix:]
        after = masked_sizes(before, keep_mask(logits))
        self.share = after.sum(dim=1) / before.sum(dim=1)
        state.sizes = torch.cat([sizes[:, :prefix], after], dim=1)
        return None

    def take_share(self) -> Tensor:
        share, self.share = self.share, None
        return share

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | dict(share=None)  # it belongs to a graph, which can be neither copied nor pickled


def gated(keep: Reduce, gate: Tensor, prefix: int) -> Reduce:
    """Kept tokens times a straight-through gate: 1 going forward, the sigmoid's slope going back.

    Top-k passes no gradient to what ranks the tokens; this does, and leaves the pretrained tower's input unscaled.
    """
    straight = nn.functional.pad(1 + gate - gate.detach(), (prefix, 0), value=1.0).unsqueeze(-1)

    def reduce(field: Tensor, kind: str) -> Tensor:
        return keep(field * straight if kind == "tokens" else field, kind)

    return reduce
