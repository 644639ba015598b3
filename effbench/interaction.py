"""A stack of methods against its parts: whether what each brings alone multiplies when they stand together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from effbench import quality, speeds, stats
from effbench.records import Interaction, Interval
from effbench.task import Items, Metric


def interaction(
    rows: pd.DataFrame,
    stack: str,
    parts: Sequence[str],
    batch: int,
    metric: Metric,
    items: Mapping[str, list[Items]],
    losses: Mapping[str, Interval | None],
) -> Interaction | None:
    """Speed-up and quality of a stack over the product of its parts'; None where one failed or was not timed.

    In each turn i of the timing pass the ratio is (b/s) / prod(b/p), of the seconds of baseline, stack and parts; its
    median and interval are those of any speed-up (`stats.speedup`). 1 means that the parts multiply. Methods that
    shorten different parts of a step come out above 1: what one leaves over is a larger share of the time.

    For quality it is (1 - lossy-ness of the stack) / prod(1 - lossy-ness of a part), with the paired bootstrap's
    interval; None where one of the lossy-nesses is not defined, or a part has a quality of 0.

    Args:
        rows: the samples of the run, as `speeds.complete` gives them.
        stack, parts: names of arms; each part holds one method of the stack.
        batch: images per timed step.
        metric: the primary one. items: its per-item scores by arm, the baseline's too; arms that failed are missing.
        losses: its lossy-ness by arm.
    """
    if not all(name in items for name in (stack, *parts)):
        return None
    steps = [speeds.timed(rows, name, batch)["seconds"] for name in ("baseline", stack, *parts)]
    seconds = pd.concat(steps, axis=1, join="inner").to_numpy().T
    if not seconds.size or seconds.min() <= 0:
        return None
    baseline, own, *alone = seconds
    expected = baseline * np.prod([part / baseline for part in alone], axis=0)
    ratio = stats.speedup(expected, own)
    return Interaction(
        parts=tuple(parts),
        speedup=Interval(value=ratio.value, low=ratio.low, high=ratio.high, n=ratio.n),
        quality=_quality(stack, parts, metric, items, losses),
    )


def _quality(
    stack: str,
    parts: Sequence[str],
    metric: Metric,
    items: Mapping[str, list[Items]],
    losses: Mapping[str, Interval | None],
) -> Interval | None:
    if any(losses.get(name) is None for name in (stack, *parts)):
        return None
    sides = quality.Sides(metric, [items[name] for name in ("baseline", stack, *parts)])
    with np.errstate(divide="ignore", invalid="ignore"):
        value, draws = (
            sides.ratio(of, 1, 0) / np.prod([sides.ratio(of, 2 + i, 0) for i in range(len(parts))], axis=0)
            for of in (sides.values, sides.draws)
        )
    return sides.figure(value, draws) if np.isfinite(value) and np.isfinite(draws).all() else None
