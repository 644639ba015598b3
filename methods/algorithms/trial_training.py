"""How much a short training on calibration data changes each block of a tower (arXiv 2412.12785)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from effbench_methods.algorithms.layer_importance import parameter_change
from effbench_methods.algorithms.loss_gradients import evaluating

if TYPE_CHECKING:
    from effbench.calibration_set import CalibrationSet
    from effbench.models.decoder import Decoder
    from effbench.models.tower import Tower

LEARNING_RATE = 1e-5


def change_in_training(
    tower: Tower | Decoder,
    model: nn.Module,
    weights: Collection[nn.Parameter],
    calibration: CalibrationSet,
    images: int,
    steps: int,
) -> Tensor:
    """(blocks,) how much training for some steps with AdamW changes each block; the weights are put back.

    The model runs in evaluation mode, without dropout.

    Args:
        weights: what is trained, of those that require gradients.

    Raises:
        UsageError: there is no loss: a bare model has no task.
    """
    trained = [p for p in weights if p.requires_grad]
    own = set(trained)
    resting = [p for p in model.parameters() if p.requires_grad and p not in own]
    kept = {p: p.detach().clone() for block in tower.blocks for p in block.parameters()}
    kept |= {p: p.detach().clone() for p in trained if p not in kept}
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    try:
        for p in resting:
            p.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            for loss in islice(_losses(model, calibration, images), steps):
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        after = [dict(block.named_parameters()) for block in tower.blocks]
        before = [{name: kept[p] for name, p in block.items()} for block in after]
        with torch.no_grad():
            return parameter_change(before, after)
    finally:
        optimiser.zero_grad()
        for p in resting:
            p.requires_grad_(True)
        with torch.no_grad():
            for p, was in kept.items():
                p.copy_(was)


def _losses(model: nn.Module, calibration: CalibrationSet, images: int) -> Iterator[Tensor]:
    """The loss of batch after batch, over and over."""
    return chain.from_iterable(calibration.losses(model, images) for _ in repeat(None))
