"""What is wrong with the course report's comparison, measured on its own models and data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from effbench import randomness
from effbench.alignment import Prepared
from effbench.arms import ArmPlan, training_model
from effbench.measure.flops import FlopCount, flops_of
from effbench.models.backbones import Backbone
from effbench.records import Protocol
from effbench.spec import parse
from effbench.task import Task
from effbench_tasks.course import convention
from effbench_tasks.course.model import PATCH, patches

BATCHES = 20  # of training data, for gradients


@dataclass(frozen=True)
class Evidence:
    """Of one arm.

    Args:
        own: FLOPs of a batch as the report counted them. right: as effbench counts them.
        gradient: largest |gradient| of the outputs, over all parameters and the first BATCHES batches.
        of_loss: the same of the loss. of_loss_double: in double precision. Where the outputs have none, what is left
            is rounding, which shrinks with the precision as no gradient does.
        changed: share of the outputs that change at all when every weight moves by one per mille.
    """

    own: int
    right: FlopCount
    gradient: float
    of_loss: float
    of_loss_double: float
    changed: float


def examine(spec: str, task: Task, prepared: Prepared, backbone: Backbone, protocol: Protocol) -> Evidence:
    """Evidence on one arm, "" for the baseline, as it is before the first step of training."""
    plan = ArmPlan(spec, parse(spec) if spec else ())
    recipe = task.recipe(prepared)
    size = protocol.batch_size
    blank = torch.zeros(size, 3, protocol.image_size, protocol.image_size)
    captions = torch.zeros(size, recipe[1], dtype=torch.long)
    count = min(BATCHES, len(prepared.pixels["train"]) // size)
    batches = [
        task.batch(prepared, "train", np.arange(size) + start * size, np.random.default_rng(start))
        for start in range(count)
    ]
    randomness.seed_all(protocol.seeds[0])
    model, _ = training_model(plan, task, recipe, backbone, protocol)
    double = copy.deepcopy(model).double()
    return Evidence(
        own=convention.flops(lambda: model(blank, captions)),
        right=flops_of(lambda: model(blank, captions), model),
        gradient=largest_gradient(model, lambda batch: model(batch["image"], batch["tokens"]).sum(), batches),
        of_loss=largest_gradient(model, lambda batch: task.loss(model, batch), batches),
        of_loss_double=largest_gradient(double, lambda batch: task.loss(double, batch), batches),
        changed=share_changed(model, batches),
    )


def largest_gradient(
    model: nn.Module, scalar: Callable[[dict[str, Tensor]], Tensor], batches: list[dict[str, Tensor]]
) -> float:
    """Largest absolute gradient that any parameter gets from the scalar of any of the batches."""
    dtype = next(model.parameters()).dtype
    largest = 0.0
    for batch in batches:
        model.zero_grad()
        scalar(batch | dict(image=batch["image"].to(dtype))).backward()
        largest = max([largest, *(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)])
    return largest


def share_changed(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Share of the outputs that differ in any bit after every weight is multiplied by 1.001 or 0.999, at random.

    The model is changed.
    """

    def outputs() -> Tensor:
        with torch.no_grad():
            return torch.cat([model(batch["image"], batch["tokens"]) for batch in batches])

    before = outputs()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.001 * (2 * torch.randint(0, 2, p.shape, generator=generator) - 1))
    return (outputs() != before).float().mean().item()


def real_patches(size: int) -> tuple[int, int]:
    """How many of the report's tokens hold the pixels of one patch, and of how many, for images of `size` pixels."""
    where = torch.arange(3 * size * size, dtype=torch.float64).view(1, 3, size, size)  # each pixel's own number
    tokens = patches(where)[0]
    cut = nn.functional.unfold(where, PATCH, stride=PATCH)[0].T
    same = (tokens.sort(dim=1).values[:, None] == cut.sort(dim=1).values[None]).all(dim=2).any(dim=1)
    return int(same.sum()), len(tokens)
