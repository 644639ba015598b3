"""Which arms nobody beats on both speed-up and lossy-ness, and how sure that is: pure functions of intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from effbench.records import Arm, in_interval

if TYPE_CHECKING:
    import numpy as np

DRAWS = 2000  # a probability of 1/2 is then known to 2.2 points (95 %)
SIDES = 2 * 1.959964  # standard deviations between the ends of a normal 95 % interval


class Point(NamedTuple):
    """An arm's place: logarithm of its test speed-up, lossy-ness as a fraction, and their standard deviations."""

    speed: float
    loss: float
    speed_sd: float = 0.0
    loss_sd: float = 0.0


#: the baseline is what both figures are relative to
BASELINE = Point(0.0, 0.0)


def point(arm: Arm, metric: str) -> Point | None:
    """Where an arm stands; None where it is not placed.

    Placed are the baseline, and methods that did not fail whose speed-up and lossy-ness of `metric` both have an
    interval. Controls are not: they are there to judge methods by, and nobody deploys a random choice. Of a figure
    without an interval (TOO FEW SAMPLES) nothing is claimed, so it neither gains a place nor takes one away.
    """
    if arm.kind == "baseline":
        return BASELINE
    found = arm.metrics.get(metric)
    if arm.kind != "method" or arm.status != "ok" or arm.no_quality or found is None:
        return None
    if not in_interval(arm.test_speedup) or not in_interval(found.lossiness) or arm.test_speedup.low <= 0:
        return None
    speed, loss = arm.test_speedup, found.lossiness
    low, value, high = (math.log(each) for each in (speed.low, speed.value, speed.high))
    # halves first: of hostile figures the difference alone may overflow
    return Point(value, loss.value, (high - low) / SIDES, loss.high / SIDES - loss.low / SIDES)


def front(points: Sequence[Point]) -> list[bool]:
    """For each point whether none is at least as fast and at most as lossy, and one of the two strictly.

    Taken at the figures themselves, whatever their intervals.
    """
    import numpy as np

    if not points:
        return []
    return _free(np.array([[each.speed for each in points]]), np.array([[each.loss for each in points]]))[0].tolist()


def probability(points: Sequence[Point], draws: int = DRAWS, seed: int = 0) -> list[float]:
    """For each point the share of draws in which it is on the front.

    In a draw every figure is normal around what was measured, independent of all others, with the standard deviation
    of its 95 % interval: speed-ups on the logarithm, which keeps them positive. That they are independent is a
    simplification: arms of one run share the baseline's noise, which moves them together. Deterministic.
    """
    import numpy as np

    if not points:
        return []
    table = np.array(points)
    random = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        speed, loss = (
            table[:, axis] + table[:, axis + 2] * random.standard_normal((draws, len(points))) for axis in (0, 1)
        )
    return _free(speed, loss).mean(axis=0).tolist()


def _free(speed: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Where no point of the same line is better.

    Args:
        speed, loss: `(draws, points)`.

    Returns:
        Truth values of that shape.
    """
    import numpy as np

    order = np.lexsort((loss, -speed))  # the fastest first, of equally fast ones the least lossy
    speed, loss = np.take_along_axis(speed, order, 1), np.take_along_axis(loss, order, 1)
    least = np.full_like(loss, np.inf)  # of all that stand before
    least[:, 1:] = np.minimum.accumulate(loss, axis=1)[:, :-1]
    # of points that are equal on both axes, which stand side by side, all share the fate of the first
    first = np.ones(speed.shape, bool)
    first[:, 1:] = (speed[:, 1:] != speed[:, :-1]) | (loss[:, 1:] != loss[:, :-1])
    place = np.maximum.accumulate(np.where(first, np.arange(speed.shape[1]), 0), axis=1)
    free = np.take_along_axis(loss < least, place, 1)
    back = np.empty_like(free)
    np.put_along_axis(back, order, free, 1)
    return back
