"""Token pruning: drop the least useful patch tokens between attention and MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from effbench.errors import UsageError
from effbench.method import Method, TrainingPlan, param
from effbench.models.tower import image_tower
from effbench_methods._prune_stages import AdaptiveStage, DynamicStage, Prune, Stage
from effbench_methods.algorithms.gumbel import ratio_loss

if TYPE_CHECKING:
    from torch import Tensor

    from effbench.models.tower import ModelView, Tower

SCORES = (
    "class_attention",
    "mean_query",
    "ats",
    "learned",
    "dynamic",
    "settled",
    "norm",
    "grid",
    "diversity",
    "random",
)
TRAINED = ("learned", "dynamic")
# EViT trains 300 epochs from random weights: the keep rate is 1 for 10 of them and final after 100 (2202.07800)
ANNEAL_FROM, ANNEAL_TO = 1 / 30, 1 / 3
RATIO_WEIGHT = 2.0  # of DynamicViT's ratio loss (2106.02034)


@dataclass(frozen=True)
class TokenPrune(Method):
    """Drop the least useful patch tokens after the attention of some blocks; class and register tokens stay.

    At each stage ceil(keep x patch tokens) stay: of the original ones about keep, keep^2, keep^3.

    class_attention is EViT's score, the class token's attention averaged over heads; mean_query the same for towers
    without a class token, from the mean query of the patches. norm is the length of the token, grid a uniform stride,
    diversity the farthest points by cosine (DivPrune), random the control. learned is a small scorer whose kept tokens
    carry a straight-through sigmoid gate, so that it trains.

    ats samples tokens by class attention x norm of the value, at most ceil(keep x patch tokens); each image keeps its
    own number, and a batch is padded to its longest. A token drawn twice stays once, so that keep=1 drops some too. The
    number depends on the data, which breaks a compiled graph.

    dynamic is DynamicViT: predictors trained by Gumbel masks (no token leaves in training) and its ratio loss. They
    stand between attention and MLP, half a block later than published; a masked token does not attend to itself, which
    no kept token sees; the paper's distillation losses are left out.

    settled drops the tokens that the block's attention turned least. With exit=true they leave with the value they
    have and come back at the tower's end, for a mean over patch tokens to hold them: DToP adapted to retrieval. DToP
    segments images; its auxiliary heads finalise the tokens whose class is sure, and a retrieval tower has no class per
    token, so that here a token's own rest decides. Where only the class token is pooled, exit changes nothing.
    """

    source = (
        "EViT, arXiv 2202.07800; ats: 2111.15667; dynamic: DynamicViT, 2106.02034; diversity: DivPrune, 2503.02175; "
        "settled with exit: adapted from DToP, 2308.01045"
    )
    neutral = {"keep": 1.0}

    keep: float = param(0.7, "share of the patch tokens that stay at each stage", above=0, high=1)
    at: tuple[int, ...] = param((3, 6, 9), "blocks (0-based) after whose attention tokens are dropped", low=0)
    score: str = param("class_attention", "how tokens are ranked", choices=SCORES)
    fuse: bool = param(False, "append the score-weighted sum of the dropped tokens as one token")
    exit: bool = param(False, "dropped tokens come back, as they were, at the tower's end")
    anneal: bool = param(
        False, "in training, keep falls from 1 (EViT from random weights; its fine-tuning goes without)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.at:
            raise UsageError("token_prune: at= names no block", "name at least one, e.g. at=3/6/9")
        if self.score in TRAINED and self.phase == "test":
            raise UsageError(
                f"token_prune: score={self.score} must be trained, so phase=test cannot be", "use phase=both"
            )
        if self.fuse and self.score in ("grid", "diversity", "ats", "dynamic"):
            raise UsageError(
                f"token_prune: score={self.score} gives no weights to fuse the dropped tokens by",
                "use fuse=false, or score=class_attention",
            )
        if self.exit and self.fuse:
            raise UsageError(
                "token_prune: exit=true and fuse=true would both bring the dropped tokens back", "use one of them"
            )
        if self.exit and self.score in ("ats", "dynamic"):
            raise UsageError(
                f"token_prune: score={self.score} drops another number of tokens from each image, which cannot exit",
                "use exit=false, or score=settled",
            )
        if self.score == "ats":  # which would merge padding
            object.__setattr__(self, "conflicts", ("token_merge",))

    @property
    def claims(self) -> tuple[str, ...]:
        if self.score == "ats":
            return ("tokens", "per image")
        drawn = ("random",) if self.score == "random" else ()
        return ("tokens", *drawn) if self.keep < 1 else ()

    @property
    def stages(self) -> tuple[int, ...]:
        """The blocks, in the order in which tokens come by."""
        return tuple(sorted(set(self.at)))

    def natural_phase(self) -> str:
        return "both" if self.score in TRAINED else "test"

    def edit_model(self, model: ModelView) -> None:
        tower = image_tower(model, "token_prune")
        if self.score in ("class_attention", "ats") and not tower.has_class_token:
            raise UsageError(
                f"token_prune: score={self.score} needs a class token, which this {tower.name} lacks",
                "use score=mean_query, score=norm or score=diversity",
            )
        if self.score in ("ats", "dynamic") and tower.ignores_sizes:
            raise UsageError(
                f"token_prune: this {tower.name} pools its tokens by attention, which padding cannot be left out of",
                f"use another score than {self.score}, e.g. mean_query",
            )
        for number, block in enumerate(self.stages):
            tower.after_attention(block, self._stage(tower, number))

    def _stage(self, tower: Tower, number: int) -> Stage:
        match self.score:
            case "ats":
                return AdaptiveStage(self, number, tower.patch_tokens)
            case "dynamic":
                return DynamicStage(self, tower.width)
        return Prune(self, tower.width)

    def edit_training(self, plan: TrainingPlan) -> None:
        stages = [plan.model.image.blocks[block].token_edit for block in self.stages]
        if self.score in TRAINED:
            plan.trained += stages
        if self.score == "dynamic":
            plan.losses.append(partial(weighted_ratio_loss, stages, self.keep))
        elif self.anneal:
            plan.each_step.append(partial(set_keep, stages, self.keep))

    def controls(self) -> dict[str, Method]:
        """The same number of tokens, chosen blindly (of ats the most that it may keep) and treated alike."""
        if self.keep == 1:
            return {}
        annealed = self.anneal and self.phase != "test" and self.score != "dynamic"
        alike = dict(keep=self.keep, at=self.stages, fuse=self.fuse, exit=self.exit, anneal=annealed, phase=self.phase)
        names = ("random", "norm") if self.fuse else ("random", "grid", "norm")  # a grid gives no weights to fuse by
        return {name: TokenPrune(score=name, **alike) for name in names}


def annealed(keep: float, done: float) -> float:
    """The keep rate in training after a share `done` of the steps: 1, then a cosine down to `keep` (EViT)."""
    fallen = min(max((done - ANNEAL_FROM) / (ANNEAL_TO - ANNEAL_FROM), 0.0), 1.0)
    return keep + (1 - keep) * (1 + math.cos(math.pi * fallen)) / 2


def set_keep(stages: list[Stage], keep: float, done: float) -> None:
    """Before a training step."""
    for stage in stages:
        stage.present = annealed(keep, done)


def weighted_ratio_loss(stages: list[DynamicStage], keep: float) -> Tensor:
    """After the forward pass of a training step."""
    return RATIO_WEIGHT * ratio_loss([stage.take_share() for stage in stages], keep)
