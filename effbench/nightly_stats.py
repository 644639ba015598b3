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
EXACT = 1e-9  # standard deviation of an effect that was measured without any noise


@dataclass(frozen=True)
class Effect:
    """Of one process pair in one cell: the log ratio, and the variance that its turns alone give it."""

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
    """The effect in one process pair: the mean of the medians of the turns that base and that head began.

    What the place within a turn costs cancels so, and the turns keep their number.

    Args:
        base, head: seconds, (turns,) each, at least two. Turn i of both was measured side by side, and turns 2 k and
            2 k + 1 in opposite order.
    """
    ratios = np.log(np.asarray(head) / np.asarray(base))
    ways = [ratios[0::2], ratios[1::2]]
    middles = [float(np.median(way)) for way in ways]
    away = np.concatenate([np.abs(way - middle) for way, middle in zip(ways, middles, strict=True)])
    sd = 1.4826 * float(np.median(away))
    return Effect(sum(middles) / 2, sd**2 * math.pi / (2 * len(ratios)))


def spread(cells: Iterable[Sequence[Effect]]) -> Spread:
    """The process-to-process variance, pooled over cells: three process pairs alone would tell almost nothing.

    The moment estimator of DerSimonian and Laird (Controlled Clinical Trials 7, 1986), which gives a process pair that
    was measured in a loud minute little weight.

    Args:
        cells: effects of each, one per process pair; those of two identical versions may be among them.
    """
    beyond = scale = 0.0
    dof = 0
    for found in cells:
        if len(found) > 1:
            middles, weights = _weighed(found, 0.0)
            mean = np.average(middles, weights=weights)
            beyond += float(weights @ (middles - mean) ** 2) - (len(found) - 1)
            scale += float(weights.sum() - (weights**2).sum() / weights.sum())
            dof += len(found) - 1
    return Spread(max(0.0, beyond / scale) if dof else 0.0, dof)


def estimate(found: Sequence[Effect], common: Spread) -> Estimate:
    """Mean over process pairs of the effect of each, weighed by its precision: how loud the machine is changes within
    minutes, and a quiet pair tells as much as ten loud ones. The interval holds both levels of variance.

    Args:
        found: in one cell, one per process pair.
        common: of the night.
    """
    middles, weights = _weighed(found, common.variance)
    middle = float(np.average(middles, weights=weights))
    error = math.sqrt(1 / float(weights.sum()))
    dof = max(common.dof, 1)
    reach = float(t.ppf((1 + LEVEL) / 2, dof)) * error
    return Estimate(
        ratio=math.exp(middle),
        low=math.exp(max(middle - reach, -700.0)),
        high=math.exp(min(middle + reach, 700.0)),
        p=float(2 * t.sf(abs(middle) / error, dof)),
        processes=tuple(math.exp(each.middle) for each in found),
    )


def noise_floor(twins: Sequence[Sequence[Effect]], common: Spread) -> float:
    """Relative change that a cell of two identical versions exceeds one night in twenty.

    From all process pairs of base against base, taken around 0: a standing difference between two workers is noise.

    Args:
        twins: by cell, effects of base against base; at least one.
        common: of the night.
    """
    squares, errors = [], []
    for found in twins:
        middles, weights = _weighed(found, common.variance)
        squares += list(weights * middles**2)
        errors.append(1 / float(weights.sum()))
    width = math.sqrt(float(np.mean(squares)) * float(np.mean(errors)))
    return math.expm1(float(t.ppf((1 + LEVEL) / 2, len(squares))) * width)


def _weighed(found: Sequence[Effect], between: float) -> tuple[np.ndarray, np.ndarray]:
    """Effects of process pairs, and the inverse of the variance of each; what is exact counts as nearly so."""
    variances = between + np.array([each.variance for each in found])
    return np.array([each.middle for each in found]), 1 / np.maximum(variances, EXACT**2)


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
