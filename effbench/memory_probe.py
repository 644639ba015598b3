"""What a fresh process builds to measure an arm's memory: the arm alone, on input of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from effbench.arms import ArmPlan, testing_model
from effbench.measure.memory import weight_bytes
from effbench.records import Protocol
from effbench.registry import backbones, tasks


def make_step(
    task: str,
    plan: ArmPlan,
    recipe: Any,
    origin: dict[str, Any],
    protocol: Protocol,
    shapes: dict[str, tuple[tuple[int, ...], str]],
) -> tuple[Callable[[], None], int]:
    """Build an arm as it is tested.

    Args:
        origin: arguments of the backbone, with its family.
        shapes: shape and dtype of each entry of a batch.

    Returns:
        a test step, and the bytes of the weights.
    """
    origin = dict(origin)
    backbone = backbones.get(origin.pop("family"))(**origin, single_use=True)
    head = tasks.get(task)()
    model = testing_model(plan, head, recipe, backbone, protocol, {}, None)
    batch = {
        key: torch.zeros(shape, dtype=getattr(torch, dtype)) if dtype.startswith("int") else torch.rand(shape)
        for key, (shape, dtype) in shapes.items()
    }

    def step() -> None:
        with torch.inference_mode():
            head.predict(model, batch)

    return step, weight_bytes(model)
