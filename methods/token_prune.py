"""Token pruning: drop the least useful patch tokens between attention and MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from effbench.errors import UsageError
from effbench.method import Method, TrainingPlan, param
from effbench.models.attention import Projections, class_attention
from effbench.models.tower import ModelView, Reduce, TokenEdit, TokenState
from effbench_methods.algorithms.selection import farthest, fuse_rest, gather, stride, top

SCORES = ("class_attention", "learned", "norm", "grid", "diversity", "random")


@dataclass(frozen=True)
class TokenPrune(Method):
    """Drop the least useful patch tokens after the attention of some blocks; class and register tokens stay.

    At each stage ceil(keep x patch tokens) stay. class_attention is EViT's score, the class token's attention
    averaged over heads; learned is a small scorer whose kept tokens carry a straight-through sigmoid gate, so that it
    trains; norm is the length of the token; grid a uniform stride; diversity the farthest points by cosine (DivPrune);
    random is the control.
    """

    source = "EViT, arXiv 2202.07800; diversity: DivPrune, arXiv 2503.02175"

    keep: float = param(0.7, "share of the patch tokens that stay at each stage", above=0, high=1)
    at: tuple[int, ...] = param((3, 6, 9), "blocks (0-based) after whose attention tokens are dropped", low=0)
    score: str = param("class_attention", "how tokens are ranked", choices=SCORES)
    fuse: bool = param(False, "append the score-weighted sum of the dropped tokens as one token")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score == "learned" and self.phase == "test":
            raise UsageError("token_prune: score=learned must be trained, so phase=test cannot be", "use phase=both")
        if self.fuse and self.score in ("grid", "diversity"):
            raise UsageError(
                f"token_prune: score={self.score} gives no weights to fuse the dropped tokens by",
                "use fuse=false, or score=class_attention",
            )

    @property
    def claims(self) -> tuple[str, ...]:
        return ("tokens",) if self.keep < 1 else ()

    def natural_phase(self) -> str:
        return "both" if self.score == "learned" else "test"

    def edit_model(self, model: ModelView) -> None:
        tower = model.image
        if tower is None:
            raise UsageError("token_prune needs an image tower of transformer blocks", "use a ViT backbone")
        if self.score == "class_attention" and not tower.has_class_token:
            raise UsageError(
                f"token_prune: score=class_attention needs a class token, which this {tower.name} lacks",
                "use score=norm or score=diversity",
            )
        for block in sorted(set(self.at)):
            tower.after_attention(block, Prune(self, tower.width))

    def edit_training(self, plan: TrainingPlan) -> None:
        if self.score == "learned":
            plan.trained += [plan.model.image.blocks[block].token_edit for block in set(self.at)]

    def controls(self) -> dict[str, Method]:
        return {"random": replace(self, score="random")}


class Prune(TokenEdit):
    """One stage of pruning; `learned` holds the scorer, Linear(width, width/4) - GELU - Linear(1) (course report)."""

    def __init__(self, method: TokenPrune, width: int) -> None:
        super().__init__()
        self.method = method
        self.scorer = None
        if method.score == "learned":
            self.scorer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width // 4), nn.GELU())
            self.scorer.append(nn.Linear(width // 4, 1))

    def forward(self, state: TokenState, projections: Projections) -> Reduce | None:
        prefix, x = state.prefix, state.tokens
        n = x.shape[1] - prefix
        k = math.ceil(self.method.keep * n - 1e-9)  # 0.1 x 30 is 3, whatever floating point says
        if k >= n:
            return None
        patches = x[:, prefix:]
        match self.method.score:
            case "grid":
                return gather(stride(n, k, x), prefix)
            case "diversity":
                return gather(farthest(patches, k), prefix)
            case "class_attention":
                weights = class_attention(projections)[:, prefix:]
            case "norm":
                weights = patches.norm(dim=-1)
            case "random":
                weights = torch.rand(x.shape[0], n, device=x.device)
            case "learned":
                weights = self.scorer(patches).squeeze(-1).sigmoid()
        index = top(weights, k)
        keep = gather(index, prefix)
        if self.method.score == "learned" and self.training:
            keep = gated(keep, weights, prefix)
        return fuse_rest(keep, index, weights, prefix) if self.method.fuse else keep


def gated(keep: Reduce, gate: Tensor, prefix: int) -> Reduce:
    """Kept tokens times a straight-through gate: 1 going forward, the sigmoid's slope going back.

    Top-k passes no gradient to what ranks the tokens; this does, and leaves the pretrained tower's input unscaled.
    """
    straight = nn.functional.pad(1 + gate - gate.detach(), (prefix, 0), value=1.0).unsqueeze(-1)

    def reduce(field: Tensor, kind: str) -> Tensor:
        return keep(field * straight if kind == "tokens" else field, kind)

    return reduce
