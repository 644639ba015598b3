"""What a fresh process builds to measure an arm's memory: the arm alone, on input of the same shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from effbench.arms import ArmPlan, testing_model, training_model
from effbench.calibration_set import CalibrationSet
from effbench.engine import Plain
from effbench.lockstep import Arm
from effbench.measure.tensor_memory import Step
from effbench.models.backbones import Backbone
from effbench.records import Protocol
from effbench.registry import backbones, tasks
from effbench.training import training_mode

Shapes = dict[str, tuple[tuple[int, ...], str] | np.ndarray]
"""Of each entry of a batch shape and dtype (as "float32"); integers by value, for lengths decide what is computed."""


def make_step(
    task: str, plan: ArmPlan, recipe: Any, origin: dict[str, Any], protocol: Protocol, shapes: Shapes
) -> Step:
    """Build an arm as it is tested.

    Args:
        origin: arguments of the backbone, with its family.
        shapes: of a batch.
    """
    head = tasks.get(task)()
    batch = _batch(shapes, protocol)
    few = {key: value[:2] for key, value in batch.items()}
    calibration = CalibrationSet(lambda: iter([few]), 2**31, head.observe, head.loss, thrifty=True)
    model = testing_model(plan, head, recipe, _backbone(origin), protocol, {}, calibration)

    def run() -> None:
        with torch.inference_mode():
            head.serve(model, batch)

    return Step(run, model)


def make_training_step(
    task: str, plan: ArmPlan, recipe: Any, origin: dict[str, Any], protocol: Protocol, shapes: Shapes
) -> Step:
    """Build an arm as it is trained, with its optimiser; the step is that of `training.train`.

    Args:
        origin: arguments of the backbone, with its family.
        shapes: of a batch; where the frozen tower's features are computed once, with "features" in place of "image".
    """
    head = tasks.get(task)()
    model, training = training_model(plan, head, recipe, _backbone(origin), protocol)
    model.to(protocol.device)
    training_mode([Arm(plan, model, {}, training.frozen, training.trained)])
    updates = Plain(model, protocol)
    batch = _batch(shapes, protocol)

    def run() -> None:
        loss = head.loss(model, batch)  # the gradients of the step before are still there
        updates.backward(loss)
        updates.step()

    return Step(run, model, updates.optimiser)


def _backbone(origin: dict[str, Any]) -> Backbone:
    origin = dict(origin)
    return backbones.get(origin.pop("family"))(**origin, single_use=True)


def _batch(shapes: Shapes, protocol: Protocol) -> dict[str, Tensor]:
    def made(given: tuple[tuple[int, ...], str] | np.ndarray) -> Tensor:
        if isinstance(given, np.ndarray):
            return torch.tensor(given)
        shape, dtype = given
        return torch.rand(shape, dtype=getattr(torch, dtype))

    return {key: made(given).to(protocol.device) for key, given in shapes.items()}
