"""Paired speed-ups with an honest interval and a verdict."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from scipy.stats import binom

from effbench.errors import InvalidError
from effbench.records import Speedup

MARGIN = 0.03  # relative difference below which two times count as the same
SURE = (
    0.99  # FASTER and SLOWER are said only where an interval of this level excludes 1: at most one false in a hundred
)


def speedup(
    baseline_s: Sequence[float], arm_s: Sequence[float], margin: float = MARGIN, level: float = 0.95, least: int = 6
) -> Speedup:
    """Median of the paired ratios baseline time / arm time, with an interval from their order statistics.

    The interval is [r(k), r(n+1-k)] with the largest k whose binomial coverage of the median is at least `level`:
    conservative, and free of any assumption on the ratios' distribution. Drift slower than a pair cancels in the
    ratio; what the place within a pair costs alternates in sign, and makes the interval wider, not wrong. Stopping
    once it is narrow enough leaves its coverage as it is (`tests/test_stats.py` simulates all of this, and
    `effbench calibrate` measures it). The verdict is

    - FASTER: the interval of level 0.99 lies wholly above 1 and the median above 1 + margin;
    - SLOWER: the interval of level 0.99 lies wholly below 1 and the median below 1 / (1 + margin);
    - NO DIFFERENCE: the interval lies wholly inside [1 / (1 + margin), 1 + margin];
    - AMBIGUOUS: anything else;
    - TOO FEW SAMPLES: fewer than `least` pairs, or than the interval needs; `low` and `high` are then None.

    Args:
        baseline_s, arm_s: seconds, (n,) each; element i of both was measured in pair i.
        margin: relative difference below which two times count as the same.
        level: coverage of the interval.
        least: fewest pairs that are judged.

    Raises:
        InvalidError: no pair, unequal lengths, or a time that is not finite and positive.
    """
    baseline, arm = np.asarray(baseline_s, float).ravel(), np.asarray(arm_s, float).ravel()
    if len(baseline) != len(arm) or not len(arm):
        raise InvalidError(f"a speed-up needs pairs of times, not {len(baseline)} baseline and {len(arm)} arm times")
    times = np.concatenate([baseline, arm])
    if not (np.isfinite(times).all() and (times > 0).all()):
        wrong = times[~(np.isfinite(times) & (times > 0))][0]
        raise InvalidError(f"a measured time of {wrong} s is impossible", "check the machine's clock and run again")

    ratios = np.sort(baseline / arm)
    n, value = len(ratios), float(np.median(ratios))
    rank = _rank(n, level)
    if rank == 0 or n < least:
        return Speedup(value=value, n=n, verdict="TOO FEW SAMPLES")
    low, high = float(ratios[rank - 1]), float(ratios[n - rank])
    sure = _rank(n, max(SURE, level))  # 0 where there are too few pairs to be so sure
    if sure and ratios[sure - 1] > 1 and value > 1 + margin:
        verdict = "FASTER"
    elif sure and ratios[n - sure] < 1 and value < 1 / (1 + margin):
        verdict = "SLOWER"
    elif low >= 1 / (1 + margin) and high <= 1 + margin:
        verdict = "NO DIFFERENCE"
    else:
        verdict = "AMBIGUOUS"
    return Speedup(value=value, low=low, high=high, n=n, verdict=verdict)


@functools.cache
def _rank(n: int, level: float) -> int:
    """The largest k for which [r(k), r(n+1-k)] covers the median of n values with at least `level`; 0 for none."""
    rank = int(binom.ppf((1 - level) / 2, n, 0.5))
    while rank > 0 and 2 * binom.cdf(rank - 1, n, 0.5) > 1 - level:
        rank -= 1
    return rank
