"""Random token dropping in training: each middle block processes its own random part of the tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from effbench.errors import UsageError
from effbench.method import Method, TrainingPlan, param
from effbench.models.token_state import TokenBypass, TokenState
from effbench.models.tower import ModelView, image_tower
from effbench_methods.algorithms.selection import behind, blind


@dataclass(frozen=True)
class RandomTokenDrop(Method):
    """Let each middle block of the image tower process a random part of the tokens while training (random-LTD).

    Every image and block draws its own patch tokens; the others pass the block by and are there again behind it. The
    first and the last block see all tokens, and class and register tokens go through every block. The part grows
    linearly from `keep` to all tokens. Testing is untouched.
    """

    source = "random-LTD, arXiv 2211.11586"
    default_phase = "train"
    phases = ("train",)
    neutral = {"keep": 1.0}

    keep: float = param(0.5, "share of the patch tokens that a middle block processes at first", above=0, high=1)
    until: float = param(0.7, "share of the training after which every block processes all tokens", above=0, high=1)

    def edit_model(self, model: ModelView) -> None:
        tower = image_tower(model, "random_token_drop")
        if len(tower) < 3:
            raise UsageError(
                f"random_token_drop acts between the first block and the last, and this tower has {len(tower)}",
                "use a backbone of 3 blocks or more",
            )
        for block in range(1, len(tower) - 1):
            tower.around(block, RandomPart(self.mean_share))

    def edit_training(self, plan: TrainingPlan) -> None:
        tower = plan.model.image
        if plan.freezes_all_of(tower.module):
            raise UsageError(
                "random_token_drop makes the training of the image tower cheaper, and nothing of it is trained",
                "use --train full",
            )
        for block in tower.blocks[1:-1]:  # by now every method of the stack has made its edits
            core = block.attn.core
            other = block.token_edit or (core if core is not None and core.needs_grid else None)
            if other is not None:
                raise UsageError(
                    f"random_token_drop and {other.name} conflict: both act on tokens of a middle block in training",
                    f"compare them as two arms: --method random_token_drop --method {other.name}",
                )
        parts = [tower.blocks[block].token_bypass for block in range(1, len(tower) - 1)]
        plan.each_step.append(partial(self.set_share, parts))

    @property
    def mean_share(self) -> float:
        """Mean over the training of the share of patch tokens that a middle block processes."""
        return 1 - self.until * (1 - self.keep) / 2

    def set_share(self, parts: list[RandomPart], done: float) -> None:
        """Set the share of the patch tokens that goes through, as `done`, the share of the training, has it."""
        for part in parts:
            part.share = min(1.0, self.keep + (1 - self.keep) * done / self.until)

    def notes(self, model: ModelView) -> list[str]:
        return [
            f"FLOPs and memory of a training step are those at {self.mean_share:.2f} of the patch tokens, the mean; "
            f"after {self.until:.2f} of the training a step costs what the baseline's does"
        ]


class RandomPart(TokenBypass):
    """Which tokens go through a block. `share` of the patch tokens; a step that nobody scheduled takes the mean."""

    name = "random_token_drop"

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, state: TokenState) -> Tensor | None:
        prefix, n = state.prefix, state.tokens.shape[1] - state.prefix
        k = math.ceil(self.share * n - 1e-9)
        if not self.training or k >= n:
            return None
        return behind(blind("random", state.tokens[:, prefix:], k), prefix)
