"""Gradients of the training loss on calibration data, with the model left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from effbench.calibration_set import CalibrationSet


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode; every part is in the mode that it was in afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def loss_gradients(
    model: nn.Module, weights: Sequence[nn.Parameter], calibration: CalibrationSet, images: int
) -> Iterator[None]:
    """While it lasts, `weights` hold the gradients of the training loss, summed over the batches.

    The model runs in evaluation mode, without dropout. Modes, gradients and what requires them are as before then.

    Raises:
        UsageError: there is no loss: a bare model has no task.
    """
    known = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        with evaluating(model):
            model.requires_grad_(False)
            for p in weights:
                p.requires_grad_(True).grad = torch.zeros_like(p)  # zero where the loss does not reach
            with torch.enable_grad():
                for loss in calibration.losses(model, images):
                    loss.backward()
            yield
    finally:
        for p, requires, grad in known:
            p.requires_grad_(requires).grad = grad
