"""Lockstep: the arms of an experiment take the same batches in the same order, in turns that alternate.

A batch is fetched once, outside every arm's time; then each arm takes its step with its own random state swapped in,
timed on its own with the device synchronised on both sides. An exception marks that arm FAILED; the others go on.
Each phase (see `passes` and `training`) can be left at any step and taken up again from what it saved there,
with bit-equal results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effbench import randomness
from effbench.arms import ArmPlan
from effbench.errors import EffbenchError
from effbench.measure.clock import Clock
from effbench.records import Protocol
from effbench.task import Task

Batch = dict[str, Tensor]
Partial = dict[str, Any]
Save = Callable[[Callable[[], Partial]], None]
"""Called after every step with a function that gives the state of the phase; saves when the step group is over."""


@dataclass
class Arm:
    """An arm while it runs.

    Args:
        plan: what it is.
        model: its model.
        random: its random state (see `randomness`).
        frozen, trained: see `effbench.method.TrainingPlan`.
        error: why it FAILED; empty while it runs.
        features: by split, outputs of the frozen tower (images, width), where they are computed once.
    """

    plan: ArmPlan
    model: nn.Module
    random: dict[str, Any]
    frozen: list[nn.Module] = field(default_factory=list)
    trained: list[nn.Module] = field(default_factory=list)
    error: str = ""
    features: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.plan.name


@dataclass
class Setting:
    """What all phases share.

    Args:
        rows: samples, appended to (see `effbench.samples`).
        live: shows progress (see `effbench.live`).
        seconds: wall seconds of the loops ("loop") and, of them, "data", "compute" and "other" (dev, checkpoints).
    """

    task: Task
    prepared: Any
    protocol: Protocol
    clock: Clock
    live: Any
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict(data=0.0, compute=0.0, loop=0.0, other=0.0))

    def to_device(self, batch: Batch) -> Batch:
        if self.protocol.device == "cpu":
            return batch
        return {key: value.to(self.protocol.device) for key, value in batch.items()}


def turn(arms: Sequence[Arm], index: int, work: Callable[[Arm], Any], clock: Clock) -> dict[str, tuple[Any, float]]:
    """One step of every arm that has not failed: A B C on even turns, C B A on odd ones.

    Returns:
        by arm, the result of `work(arm)` and its seconds.

    Raises:
        EffbenchError: the baseline failed, so that nothing can be compared.
    """
    results = {}
    for arm in arms[:: 1 if index % 2 == 0 else -1]:
        if arm.error:
            continue
        try:
            with randomness.swapped(arm):
                results[arm.name] = clock.timed(lambda arm=arm: work(arm))
        except Exception as error:
            arm.error = describe(error)
            if arm.plan.kind == "baseline":
                hint = getattr(error, "hint", "") or "run again with --debug to see where"
                raise EffbenchError(f"the baseline failed: {arm.error}", hint) from error
    return results


def describe(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, EffbenchError) else f"{type(error).__name__}: {text}"


def steps(
    arms: Sequence[Arm],
    phase: str,
    seed: int,
    span: range,
    fetch: Callable[[int], Batch],
    work: Callable[[Arm, Batch, int], Any],
    setting: Setting,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run the steps of a phase, yielding each step's index and results by arm; times go to `setting.rows`."""
    clock, seconds = setting.clock, setting.seconds
    for index in span:
        begin = clock.now()
        batch = setting.to_device(fetch(index))
        fetched = clock.now()
        results = turn(arms, index, functools.partial(_with_batch, work, batch, index), clock)
        for name, (result, spent) in results.items():
            row = dict(
                kind="step", arm=name, seed=seed, phase=phase, index=index, seconds=spent, data_wait=fetched - begin
            )
            setting.rows.append(row | (result if isinstance(result, dict) else {}))
        seconds["data"] += fetched - begin
        seconds["compute"] += sum(spent for _, spent in results.values())
        yield index, {name: result for name, (result, _) in results.items()}
        seconds["loop"] += clock.now() - begin  # with whatever the caller did between two steps


def _with_batch(work: Callable[[Arm, Batch, int], Any], batch: Batch, index: int, arm: Arm) -> Any:
    return work(arm, batch, index)


def blocks(split: str, n: int, size: int) -> list[tuple[str, np.ndarray]]:
    """A split cut into consecutive index arrays of at most `size`."""
    return [(split, np.arange(start, min(start + size, n))) for start in range(0, n, size)]


def inputs(arm: Arm, split: str, batch: Batch) -> Batch:
    """The batch as an arm takes it: its features in place of the pixels, where it has them."""
    if not arm.features:
        return batch
    return batch | dict(features=arm.features[split][batch["index"].cpu()].to(batch["index"].device))


def joined(parts: list[Batch]) -> Batch:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]} if parts else {}


def kept_state(arms: list[Arm]) -> Partial:
    return dict(random={arm.name: arm.random for arm in arms}, errors={arm.name: arm.error for arm in arms})


def restore(arms: list[Arm], partial: Partial) -> None:
    for arm in arms:
        arm.random, arm.error = partial["random"][arm.name], partial["errors"][arm.name]


def columns(
    arms: list[Arm], setting: Setting, kept: Partial | None = None, metric: str = ""
) -> dict[str, dict[str, Any]]:
    """What the live table shows of each arm."""
    latest = {row["arm"]: row for row in setting.rows[-len(arms) :]}
    table: dict[str, dict[str, Any]] = {}
    for arm in arms:
        row = latest.get(arm.name, {})
        shown = {"s/step": row.get("seconds"), "loss": row.get("loss")}
        if kept and kept[arm.name]["dev"]:
            shown[f"dev {metric}"] = kept[arm.name]["dev"][-1]
        table[arm.name] = {key: value for key, value in shown.items() if value is not None}
        if arm.error:
            table[arm.name] = dict(status="FAILED")
    return table
