"""The timing pass: pairs of small steps, until the figures are as sure as was asked for.

Each batch size is a phase of its own: the main one (throughput), a single image (latency), and those of a sweep.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from effbench import randomness, stats
from effbench.lockstep import Arm, Batch, Partial, Save, Setting, columns, kept_state, restore, steps
from effbench.measure.placement import place_anew

WARMUP = 3  # first turns at a batch size; they are recorded, and no figure but `first_step` uses them
CHECK_EVERY = 10  # pairs between two looks at the intervals


@dataclass(frozen=True)
class Stopping:
    """When a timing pass ends.

    Args:
        pairs: fewest pairs; the exact number where neither of the others is given.
        until: relative half-width that every interval must reach, e.g. 0.02. The number of pairs may then grow.
        budget: seconds after which the pass ends, whatever it has reached; None with `until` is 300.
    """

    pairs: int = 30
    until: float | None = None
    budget: float | None = None

    @property
    def open_end(self) -> bool:
        """Whether the number of pairs is not known beforehand."""
        return self.until is not None or self.budget is not None

    @property
    def limit(self) -> float:
        return self.budget if self.budget is not None else math.inf if self.until is None else 300.0

    def over(self, pairs: int, seconds: float, times: Sequence[Sequence[float]]) -> bool:
        """Whether to stop; asked after every pair.

        Args:
            pairs: those measured so far, warm-up not counted.
            seconds: since the pass began.
            times: step seconds of each arm, the baseline's first, (arms, pairs).
        """
        if seconds >= self.limit:
            return True
        if self.until is None:
            return self.budget is None and pairs >= self.pairs
        if pairs < self.pairs or (pairs - self.pairs) % CHECK_EVERY:
            return False
        widths = (stats.speedup(times[0], arm).half_width for arm in times[1:])
        return all(width is not None and width <= self.until for width in widths)


def pairs(
    arms: list[Arm],
    batch: int,
    stopping: Stopping,
    setting: Setting,
    sizes: dict[str, int],
    partial: Partial | None,
    save: Save,
) -> Partial:
    """Time every arm on the same batches of test images, one caption each; the first WARMUP turns come on top.

    Returns:
        what `lockstep.kept_state` holds, and under "seconds" how long the pass took.
    """
    task, prepared, protocol = setting.task, setting.prepared, setting.protocol
    size = min(batch, sizes["test"])
    phase = f"timing {batch}"
    for arm in arms:  # whatever was drawn before, in this process or in one that was killed
        arm.random = randomness.seeded(protocol.seeds[0])
    if partial:
        restore(arms, partial)
    place_anew([arm.model for arm in arms if not arm.error], np.random.default_rng())
    before = partial["seconds"] if partial else 0.0
    taken: dict[str, list[float]] = {arm.name: [] for arm in arms}

    def note(rows: list[dict[str, Any]], since: int) -> None:
        for row in rows:
            if row["phase"] == phase and row["index"] >= max(since, WARMUP):
                taken[row["arm"]].append(row["seconds"])

    note(setting.rows, 0)

    def fetch(index: int) -> Batch:
        rng = np.random.default_rng([protocol.seeds[0], index])
        return task.batch(prepared, "test", rng.choice(sizes["test"], size, replace=False), rng)

    def work(arm: Arm, batch: Batch, _: int) -> None:
        with torch.inference_mode():
            task.serve(arm.model, batch)

    def state(index: int, spent: float) -> Partial:
        return dict(index=index, seconds=spent, **kept_state(arms))

    start = partial["index"] + 1 if partial else 0
    title = f"timing, {size} image{'s' * (size > 1)} a step, {WARMUP} pairs to warm up"
    if stopping.open_end:
        setting.live.stage(title, round(stopping.limit), "s at most", start=round(before))
    else:
        setting.live.stage(title, stopping.pairs + WARMUP, "pairs", start=start)
    begun, spent = setting.clock.now(), before
    span = range(start, sys.maxsize if stopping.open_end else stopping.pairs + WARMUP)
    for index, _ in steps(arms, phase, protocol.seeds[0], span, fetch, work, setting):
        spent = before + setting.clock.now() - begun
        note(setting.rows[-len(arms) :], index)
        done = min(round(spent), round(stopping.limit)) if stopping.open_end else index + 1
        setting.live.advance(done, columns(arms, setting))
        save(lambda index=index, spent=spent: state(index, spent))
        times = [taken[arm.name] for arm in arms if not arm.error]
        if stopping.open_end and stopping.over(index + 1 - WARMUP, spent, times):
            break
    return state(-1, spent)
