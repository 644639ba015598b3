"""The course report's token pruning: after every per-token product, so that it saves nothing; for its task alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from effbench.errors import UsageError
from effbench.method import Method, param


@dataclass(frozen=True)
class CoursePruning(Method):
    """A course report's pruning, slips included: it saves nothing and cannot train. For pruning, see token_prune.

    A head in place of the baseline's: a scorer ranks the tokens, the best are averaged, and a bilinear layer joins them
    with the caption's mean word vector into one number, which is L2-normalised: it is 1 or -1, whatever the weights.
    """

    source = "a course report, taken apart in docs/course-report.md"
    default_phase = "both"
    phases = ("both",)

    keep: float = param(0.5, "share of the tokens that are averaged", above=0, high=1)

    def edit_model(self, model) -> None:
        course = model.model
        if not hasattr(course, "course_head"):
            raise UsageError(
                f"course_pruning edits the course report's model alone, not {type(course).__name__}",
                "use token_prune:score=learned, or --task course_report",
            )
        weight = course.embed.weight
        course.course_head = TopTokens(course.width, course.words, self.keep).to(weight.device, weight.dtype)

    def controls(self) -> dict[str, Method]:
        return {"all_tokens": replace(self, keep=1.0)}


class Scorer(nn.Sequential):
    """Linear(width, 16) - GELU - Linear(16, 1); its products count as the method's overhead."""

    is_overhead = True

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, 1))


class TopTokens(nn.Module):
    """Tokens (batch, tokens, width) and captions (batch, context) -> (batch, 1), each 1 or -1."""

    def __init__(self, width: int, words: int, keep: float) -> None:
        super().__init__()
        self.keep = keep
        self.scorer = Scorer(width)
        self.words = nn.Embedding(words, 50)
        self.text = nn.Linear(50, width)
        self.bilinear = nn.Bilinear(width, width, 1)

    def forward(self, tokens: Tensor, captions: Tensor) -> Tensor:
        count = max(1, int(self.keep * tokens.shape[1]))
        index = self.scorer(tokens).topk(count, dim=1).indices  # no gradient reaches the scorer from here
        kept = tokens.gather(1, index.expand(-1, -1, tokens.shape[2]))
        text = self.text(self.words(captions).mean(dim=1))
        return F.normalize(self.bilinear(kept.mean(dim=1), text), dim=-1)
