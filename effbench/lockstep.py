"""Lockstep: the arms of an experiment take the same batches in the same order, in turns that alternate.

A batch is fetched once, outside every arm's time; then each arm takes its step with its own random state swapped in,
timed on its own with the device synchronised on both sides. An exception marks that arm FAILED; the others go on.
Each phase (see `passes` and `training`) can be left at any step and taken up again from what it saved there,
with bit-equal results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effbench import randomness
from effbench.arms import ArmPlan
from effbench.errors import EffbenchError
from effbench.measure.clock import Clock
from effbench.measure.split import Split
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
        frozen, trained, each_step, losses: see `effbench.method.TrainingPlan`.
        error: why it FAILED; empty while it runs.
        features: by split, outputs of the frozen tower (images, width), where they are computed once.
        split: marks where a step's time goes (see `effbench.measure.split`); None where nobody asks.
    """

    plan: ArmPlan
    model: nn.Module
    random: dict[str, Any]
    frozen: list[nn.Module | nn.Parameter] = field(default_factory=list)
    trained: list[nn.Module | nn.Parameter] = field(default_factory=list)
    each_step: list[Callable[[float], None]] = field(default_factory=list)
    losses: list[Callable[[], Tensor]] = field(default_factory=list)
    error: str = ""
    features: dict[str, Tensor] = field(default_factory=dict)
    split: Split | None = None

    @property
    def name(self) -> str:
        return self.plan.name

    def trains_in_frozen(self) -> bool:
        """Whether something inside what is frozen is trained all the same."""
        return any(p.requires_grad for part in self.frozen for p in _parameters(part))


def _parameters(part: nn.Module | nn.Parameter) -> Iterator[nn.Parameter]:
    yield from part.parameters() if isinstance(part, nn.Module) else (part,)


@dataclass
class Setting:
    """What all phases share.

    Args:
        rows: samples, appended to (see `effbench.samples`).
        live: shows progress (see `effbench.live`).
        meter: reads the energy used (see `effbench.measure.energy`); None where it cannot be read.
        seconds: wall seconds of the loops ("loop") and, of them, "data" and "compute"; beside them "other" (dev,
            checkpoints).
    """

    task: Task
    prepared: Any
    protocol: Protocol
    clock: Clock
    live: Any
    meter: Any = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict(data=0.0, compute=0.0, loop=0.0, other=0.0))

    def joules(self) -> float:
        """The running total of the energy used; not a number from the moment it can no longer be read."""
        try:
            return self.meter.joules() if self.meter else math.nan
        except EffbenchError as error:
            self.live.warn(f"energy is no longer measured: {error}")
            self.meter = None
            return math.nan

    def to_device(self, batch: Batch) -> Batch:
        if self.protocol.device == "cpu":
            return batch
        return {key: value.to(self.protocol.device) for key, value in batch.items()}


def turn(
    arms: Sequence[Arm], index: int, work: Callable[[Arm], Any], clock: Clock, joules: Callable[[], float] | None = None
) -> dict[str, tuple[Any, float, dict[str, float]]]:
    """One step of every arm that has not failed: A B C on even turns, C B A on odd ones.

    Returns:
        by arm, the result of `work(arm)`, its seconds, and what they were spent on: seconds by part where the arm has
        a `split`, and "joules" where they are read.

    Raises:
        EffbenchError: the baseline failed, so that nothing can be compared.
    """
    results = {}
    for arm in arms[:: 1 if index % 2 == 0 else -1]:
        if arm.error:
            continue
        try:
            with randomness.swapped(arm), arm.split or nullcontext():
                used = joules() if joules else 0.0
                result, seconds = clock.timed(lambda arm=arm: work(arm))
                spent = dict(joules=joules() - used) if joules else {}
            if arm.split is not None:
                spent |= {f"{part}_seconds": value for part, value in arm.split.seconds(seconds).items()}
            results[arm.name] = (result, seconds, spent)
        except BatchChanged:
            raise
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
    for arm in arms:
        arm.split = None if arm.error else Split(setting.task.parts(arm.model), arm.model, clock)
    for index in span:
        begin = clock.now()
        batch = fetch(index)
        fetched = clock.now()
        batch = setting.to_device(batch)
        moved = clock.now()
        joules = setting.joules if setting.meter else None
        results = turn(arms, index, lambda arm: _unchanged(work, arm, batch, index), clock, joules)  # noqa: B023
        shared = dict(kind="step", seed=seed, phase=phase, index=index, data_wait=fetched - begin)
        for name, (result, spent, parts) in results.items():
            row = shared | dict(arm=name, seconds=spent, transfer=moved - fetched) | parts
            setting.rows.append(row | (result if isinstance(result, dict) else {}))
        seconds["data"] += moved - begin
        seconds["compute"] += sum(spent for _, spent, _ in results.values())
        seconds["loop"] += clock.now() - begin
        begin, before = clock.now(), seconds["other"]
        yield index, {name: result for name, (result, *_) in results.items()}
        seconds["loop"] += clock.now() - begin - (seconds["other"] - before)  # what the caller did between two steps


def _unchanged(work: Callable[[Arm, Batch, int], Any], arm: Arm, batch: Batch, index: int) -> Any:
    """The arm's step; the arms after it get the very same batch."""
    before = versions(batch)
    result = work(arm, dict(batch), index)
    if changed := written_into(batch, before):
        # nobody after this arm can be compared: not even the baseline, if it was its turn later
        raise BatchChanged(
            f"{arm.name} changed the batch that all arms share ({', '.join(changed)}, in place)",
            "let the method work on a copy: x = x.clone()",
        )
    return result


def versions(batch: Batch) -> dict[str, int]:
    """How often each tensor of a batch was written into so far."""
    return {key: value._version for key, value in batch.items()}


def written_into(batch: Batch, before: dict[str, int]) -> list[str]:
    """The entries of a batch that were written into since `before`, which `versions` gave."""
    return [key for key, value in batch.items() if value._version != before[key]]


class BatchChanged(EffbenchError):
    """An arm wrote into the batch; what the other arms compute from it means nothing."""


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
