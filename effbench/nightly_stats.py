"""Whether the step time of a cell changed between two code versions: plain functions of measured seconds. No torch.

A cell is measured in several process pairs, since how a process happens to be laid out in memory shifts all its times
for as long as it lives (Mytkowicz et al., "Producing Wrong Data Without Doing Anything Obviously Wrong!", ASPLOS 2009).
Two levels (Kalibera and Jones, "Rigorous Benchmarking in Reasonable Time", ISMM 2013): turns within a process pair,
and process pairs. An effect is log(head seconds / base seconds): above 0 is slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control, t

MARGIN = 0.03  # relative difference below which two times count as the same
FALSE_DISCOVERIES = 0.05  # of all cells that are flagged, the share that may be flagged by chance
LEVEL = 0.95  # of the intervals that are shown
LOUD = 0.05  # noise floor from which on a night can tell nothing: a slow-down of 5 % would go unseen
LEAST_TURNS = 12  # of a process pair
LEAST_PROCESSES = 3
#: variance of the median of n independent normal values, in units of theirs; beyond the table pi / (2 n)
MEDIAN_VARIANCE = {1: 1.0, 2: 0.5, 3: 0.4487, 4: 0.2982, 5: 0.2868, 6: 0.2147, 7: 0.2104, 8: 0.1682, 9: 0.1661}


@dataclass(frozen=True)
class Effect:
    """Of one process pair in one cell: the median log ratio, and the variance that its turns alone give that median."""

    middle: float
    variance: float


@dataclass(frozen=True)
class Spread:
    """How much effects of the same cell differ between process pairs beyond what their turns explain.

    Attributes:
        variance: of log ratios, shared by all cells of the night.
        dof: degrees of freedom that it was estimated with.
    """

    variance: float
    dof: int


@dataclass(frozen=True)
class Estimate:
    """Head against base in one cell.

    Attributes:
        ratio: head seconds / base seconds; 1.05 is 5 % slower.
        low, high: its 95 % interval.
        p: two-sided, of "no change at all".
        processes: ratio in each process pair.
    """

    ratio: float
    low: float
    high: float
    p: float
    processes: tuple[float, ...]

    @property
    def effect(self) -> float:
        return math.log(self.ratio)

    @property
    def direction(self) -> str:
        return "SLOWER" if self.ratio > 1 else "FASTER"

    def beyond(self, share: float) -> bool:
        """Whether the change is larger than a share, either way: 1.03 and 1 / 1.03 are equally far."""
        return abs(self.effect) > math.log1p(share)

    @property
    def sure(self) -> bool:
        """Whether the interval excludes 1."""
        return not self.low <= 1 <= self.high


def effect(base: Sequence[float], head: Sequence[float]) -> Effect:
    """The effect in one process pair.

    Two turns of opposite order are averaged first: what the place within a turn costs cancels.

    Args:
        base, head: seconds, (turns,) each, at least two. Turn i of both was measured side by side, and turns 2 k and
            2 k + 1 in opposite order.
    """
    ratios = np.log(np.asarray(head) / np.asarray(base))
    twos = ratios[: len(ratios) // 2 * 2].reshape(-1, 2).mean(axis=1)
    middle = float(np.median(twos))
    sd = 1.4826 * float(np.median(np.abs(twos - middle)))
    return Effect(middle, sd**2 * math.pi / (2 * len(twos)))


def spread(cells: Iterable[Sequence[Effect]]) -> Spread:
    """The process-to-process variance, pooled over cells: three process pairs alone would tell almost nothing.

    Args:
        cells: effects of each, one per process pair; those of two identical versions may be among them.
    """
    beyond, dof = 0.0, 0
    for found in cells:
        if len(found) > 1:
            between = float(np.var([each.middle for each in found], ddof=1))
            within = float(np.mean([each.variance for each in found]))
            beyond += (len(found) - 1) * (between - within)
            dof += len(found) - 1
    return Spread(max(0.0, beyond / dof) if dof else 0.0, dof)


def estimate(found: Sequence[Effect], common: Spread) -> Estimate:
    """Median over process pairs of the median log ratio of each, with an interval that holds both levels of variance.

    Args:
        found: in one cell, one per process pair.
        common: of the night.
    """
    middle = float(np.median([each.middle for each in found]))
    variance = common.variance + float(np.mean([each.variance for each in found]))
    error = math.sqrt(max(variance * _median_variance(len(found)), 1e-18))
    dof = max(common.dof, 1)
    reach = float(t.ppf((1 + LEVEL) / 2, dof)) * error
    return Estimate(
        ratio=math.exp(middle),
        low=math.exp(max(middle - reach, -700.0)),
        high=math.exp(min(middle + reach, 700.0)),
        p=float(2 * t.sf(abs(middle) / error, dof)),
        processes=tuple(math.exp(each.middle) for each in found),
    )


def noise_floor(twins: Sequence[Sequence[Effect]]) -> float:
    """Relative change that a cell of two identical versions exceeds one night in twenty.

    From all process pairs of base against base, taken around 0: a standing difference between two workers is noise.

    Args:
        twins: by cell, effects of base against base; at least one.
    """
    found = [each.middle for effects in twins for each in effects]
    width = math.sqrt(float(np.mean(np.square(found))) * _median_variance(min(map(len, twins))))
    return math.expm1(float(t.ppf((1 + LEVEL) / 2, len(found))) * width)


def flagged(estimates: Sequence[Estimate], floor: float) -> list[bool]:
    """Which cells seem to have changed, either way: to be measured again.

    The effect must be beyond max(3 %, noise floor), the interval must exclude 1, and the cell must stand after
    Benjamini and Hochberg's procedure over all cells (J. R. Stat. Soc. B 57, 1995).
    """
    adjusted = false_discovery_control([each.p for each in estimates]) if estimates else []
    threshold = max(MARGIN, floor)
    return [
        bool(each.beyond(threshold) and each.sure and p < FALSE_DISCOVERIES)
        for each, p in zip(estimates, adjusted, strict=True)
    ]


def recurs(first: Estimate, again: Estimate, both: Estimate, floor: float) -> bool:
    """Whether a flagged cell has changed: fresh processes alone are sure of the same direction, and all together of
    the size.

    Args:
        both: from the process pairs of both measurements.
    """
    return again.sure and again.direction == first.direction and both.beyond(max(MARGIN, floor))


def _median_variance(number: int) -> float:
    return MEDIAN_VARIANCE.get(number, math.pi / (2 * number))
