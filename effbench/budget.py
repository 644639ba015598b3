"""The `resize` control: the image sizes whose FLOPs bracket a method's, added by the harness itself."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from effbench import randomness
from effbench.arms import ArmPlan, settled, testing_model
from effbench.measure.flops import flops_of
from effbench.method import Method
from effbench.registry import methods
from effbench.spec import canonical

if TYPE_CHECKING:
    from effbench.calibration_set import CalibrationSet
    from effbench.models.backbones import Backbone
    from effbench.records import Protocol
    from effbench.task import Task

CONTROL = "resize"  # the method that is this control; where it is not installed there is none
LEAST_SAVED = 0.005  # share of the image tower's FLOPs; what saves less needs no smaller image beside it


class _EnoughError(Exception):
    """The image tower has got its input; what a step does after it (writing a text) is not looked at."""


def image_work(
    plan: ArmPlan,
    task: Task,
    prepared: Any,
    recipe: Any,
    backbone: Backbone,
    protocol: Protocol,
    rehearsal: CalibrationSet,
) -> tuple[int, Any]:
    """FLOPs of an arm's image tower for one image, its own scoring included, and the arm's model.

    0 where the task has no image tower.
    """
    randomness.seed_all(0)
    plan = settled(plan, task, recipe, backbone, protocol, rehearsal)
    model = testing_model(plan, task, recipe, backbone, protocol, {}, rehearsal)
    part = task.parts(model).get("image")
    if part is None:
        return 0, model
    batch = task.batch(prepared, "test", np.arange(1), np.random.default_rng(0), pixels=False)
    batch["image"] = torch.randn(1, 3, protocol.image_size, protocol.image_size)
    batch = {key: value.to(protocol.device) for key, value in batch.items()}
    inputs: list[Any] = []

    def entered(_: nn.Module, given: Any) -> None:
        inputs.append(given)
        raise _EnoughError

    handle = part.register_forward_pre_hook(entered)
    with torch.no_grad():
        with suppress(_EnoughError):
            flops_of(lambda: task.serve(model, batch))  # runs it uncompiled: this model is thrown away
        handle.remove()
        return flops_of(lambda: part(*inputs[0]), part).work, model


def resize_arms(
    plans: Sequence[ArmPlan], work: Callable[[ArmPlan], tuple[int, Any]]
) -> tuple[list[ArmPlan], dict[str, int]]:
    """For every method that saves FLOPs of the image tower, the two image sizes that bracket it.

    Args:
        work: `image_work` of an arm.

    Returns:
        the arms, one per size and phase; and the image tower's FLOPs by name of every arm looked at.
    """
    if CONTROL not in methods.names():
        return [], {}
    dense, model = work(plans[0])
    found = {plans[0].name: dense}
    ladder = _ladder(model) if dense else []
    arms: dict[str, ArmPlan] = {}

    def known(plan: ArmPlan) -> int:
        if plan.name not in found:
            found[plan.name], _ = work(plan)
        return found[plan.name]

    for plan in plans if ladder else ():
        if plan.kind != "method" or is_rung(plan):
            continue
        wanted = known(plan)
        if not saves(found, plan.name):
            continue
        rungs = [_arm(method, plan.phase) for method in ladder]
        above = bisect_right(rungs, wanted, key=known)  # FLOPs grow with the size
        for rung in rungs[max(above - 1, 0) : above + 1]:
            arm = arms.get(rung.name, rung)
            arms[rung.name] = replace(arm, controls_for=(*arm.controls_for, plan.name))
    return list(arms.values()), found


def saves(work: dict[str, int], name: str) -> bool:
    """Whether an arm spends so much less on images than the baseline that smaller ones are a control of it."""
    return name in work and work[name] <= (1 - LEAST_SAVED) * work["baseline"]


def is_rung(plan: ArmPlan) -> bool:
    """Whether an arm is the control, asked for or not: a smaller image and nothing else."""
    return len(plan.methods) == 1 and methods.name_of(type(plan.methods[0])) == CONTROL


def _ladder(model: Any) -> list[Method]:
    """The control at every smaller size, ascending; empty where the tower takes no other size."""
    from effbench.models.tower import view

    tower = view(model).image
    return methods.get(CONTROL).ladder(tower) if tower is not None and tower.resize else []


def _arm(method: Method, phase: str) -> ArmPlan:
    stack = (replace(method, phase=phase),)
    return ArmPlan(canonical(stack), stack, "control", CONTROL)
