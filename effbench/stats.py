"""Figures with an honest interval: paired speed-ups with a verdict, and lossy-ness by paired bootstrap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.stats import binom

from effbench.errors import InvalidError
from effbench.records import Interval, MetricValue, Speedup
from effbench.task import Items, Metric

#: group weights that the bootstrap holds at once (32 MiB of float64)
CHUNK = 4_000_000


def speedup(
    baseline_s: Sequence[float], arm_s: Sequence[float], margin: float = 0.03, level: float = 0.95, least: int = 6
) -> Speedup:
    """Median of the paired ratios baseline time / arm time, with an interval from their order statistics.

    The interval is [r(k), r(n+1-k)] with the largest k whose binomial coverage of the median is at least `level`:
    conservative, and free of any assumption on the ratios' distribution. The verdict is

    - FASTER: the interval lies wholly above 1 and the median above 1 + margin;
    - SLOWER: the interval lies wholly below 1 and the median below 1 / (1 + margin);
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
    rank = int(binom.ppf((1 - level) / 2, n, 0.5))
    while rank > 0 and 2 * binom.cdf(rank - 1, n, 0.5) > 1 - level:
        rank -= 1
    if rank == 0 or n < least:
        return Speedup(value=value, n=n, verdict="TOO FEW SAMPLES")
    low, high = float(ratios[rank - 1]), float(ratios[n - rank])
    if low > 1 and value > 1 + margin:
        verdict = "FASTER"
    elif high < 1 and value < 1 / (1 + margin):
        verdict = "SLOWER"
    elif low >= 1 / (1 + margin) and high <= 1 + margin:
        verdict = "NO DIFFERENCE"
    else:
        verdict = "AMBIGUOUS"
    return Speedup(value=value, low=low, high=high, n=n, verdict=verdict)


def lossiness(
    metric: Metric,
    baseline: list[Items],
    arm: list[Items],
    seed: int = 0,
    resamples: int = 2000,
    trained: bool = False,
    level: float = 0.95,
) -> MetricValue:
    """A metric of one arm and its lossy-ness against the baseline, with paired bootstrap intervals.

    Lossy-ness is 1 - q/q_b; where lower is better the ratio is turned over, 1 - q_b/q. It is negative where the arm
    is better, and never clipped. Test images (groups) are resampled whole, and the same ones for both arms and all
    seeds; with two or more seeds these are resampled too. It is None, with a note, where the baseline's interval does
    not exclude chance or the ratio has no positive denominator. With few seeds the percentile interval is too narrow
    in the seeds' direction (by about sqrt((K-1)/K) for K of them).

    Args:
        metric: what is computed, and its direction and chance level.
        baseline, arm: per-item scores, one entry per seed, seed i of both trained from the same random state. Pass
            the same list twice for the baseline itself: its lossy-ness is None.
        seed: of the bootstrap. One seed gives every metric and arm the same resampled images.
        resamples: bootstrap resamples.
        trained: whether the arm was trained apart from the baseline (or is the baseline), so that one seed leaves the
            training variance unmeasured.
        level: coverage of the intervals.

    Raises:
        InvalidError: the arms were not tested on the same images and seeds, or a score is not finite.
    """
    groups = _check(metric, baseline, arm)
    is_baseline = arm is baseline
    sides = [arm] if is_baseline else [arm, baseline]
    tables = [[_Prepared(metric, items, groups) for items in side] for side in sides]

    one = np.ones((1, len(groups)))
    by_seed = np.array([[table.reduce(one)[0] for table in side] for side in tables])
    values = by_seed.mean(axis=1)
    draws = _bootstrap(tables, len(groups), seed, resamples)
    tail = 100 * (1 - level) / 2
    bounds = np.percentile(draws, [tail, 100 - tail], axis=1)

    loss, notes = None, []
    if not is_baseline:
        loss, notes = _relative(metric, values, draws, bounds[:, 1], tail, len(groups))
    if trained and len(arm) == 1:
        notes.append("training variance not measured")
    return MetricValue(
        value=values[0],
        low=bounds[0, 0],
        high=bounds[1, 0],
        higher_is_better=metric.higher_is_better,
        unit=metric.unit,
        chance=metric.chance,
        lossiness=loss,
        note="; ".join(notes),
        by_seed=tuple(by_seed[0]),
    )


def _relative(
    metric: Metric, values: np.ndarray, draws: np.ndarray, baseline_bounds: np.ndarray, tail: float, n: int
) -> tuple[Interval | None, list[str]]:
    """Lossy-ness from values (2,) and bootstrap draws (2, resamples) of arm and baseline; None with the reason."""
    low, high = baseline_bounds
    if metric.chance is not None and not (low > metric.chance if metric.higher_is_better else high < metric.chance):
        return None, ["n/a (baseline at chance)"]
    if values[1] <= 0:
        return None, ["n/a (baseline is not above 0)"]
    top, bottom = (0, 1) if metric.higher_is_better else (1, 0)
    if values[bottom] <= 0:
        return None, ["n/a (the arm's value is not above 0)"]
    notes = [] if metric.higher_is_better else ["lower is better: 1 - baseline / arm"]
    value = 1 - values[top] / values[bottom]
    if (draws[bottom] <= 0).any():
        return Interval(value=value, n=n), [*notes, "no interval: a resample has no positive denominator"]
    bounds = np.percentile(1 - draws[top] / draws[bottom], [tail, 100 - tail])
    return Interval(value=value, low=bounds[0], high=bounds[1], n=n), notes


def _check(metric: Metric, baseline: list[Items], arm: list[Items]) -> np.ndarray:
    """The test images (sorted groups) that all seeds of both arms share."""
    if not arm or len(arm) != len(baseline):
        raise InvalidError(f"{metric.name}: {len(baseline)} seeds of the baseline, {len(arm)} of the arm")
    groups = np.unique(arm[0].group)
    for items in (*arm, *baseline):
        if not np.isfinite(np.asarray(items.values, float)).all():
            raise InvalidError(f"{metric.name}: a score in {metric.items} is not finite", "look for NaN in training")
        if not np.array_equal(np.unique(items.group), groups):
            raise InvalidError(f"{metric.name}: the arms were tested on different images")
    if not len(groups):
        raise InvalidError(f"{metric.name}: no test item")
    return groups


class _Prepared:
    """Items of one arm and seed, laid out so that a metric under group weights is one matrix product."""

    def __init__(self, metric: Metric, items: Items, groups: np.ndarray) -> None:
        values = np.asarray(metric.value(np.asarray(items.values)), float)
        group = np.searchsorted(groups, items.group)
        self.size = np.bincount(group, minlength=len(groups)).astype(float)
        self.median = metric.reduce == "median"
        if not self.median:
            self.sums = np.bincount(group, values, len(groups))
            return
        # A resampled median lies near the sample's: values more than 8 standard errors away (counted in positions of
        # the sorted sample) share one column at either end, which leaves every percentile of the draws untouched.
        ordered, middle = np.sort(values), np.median(values)
        error = np.sqrt(((np.bincount(group, values <= middle, len(groups)) - self.size / 2) ** 2).sum())
        reach, half = int(8 * error) + 2, len(values) // 2
        low, high = ordered[max(0, half - reach)], ordered[min(len(values) - 1, half + reach)]
        self.values, column = np.unique(values.clip(low, high), return_inverse=True)
        self.counts = np.zeros((len(groups), len(self.values)))
        np.add.at(self.counts, (group, column), 1)

    def reduce(self, weights: np.ndarray) -> np.ndarray:
        """The metric under weights (resamples, groups): how often each group was drawn. Returns (resamples,)."""
        size = weights @ self.size
        if not self.median:
            return weights @ self.sums / size
        reached = (weights @ self.counts).cumsum(axis=1)
        lower = (reached < ((size + 1) // 2)[:, None]).sum(axis=1)
        upper = (reached < (size // 2 + 1)[:, None]).sum(axis=1)
        return (self.values[lower] + self.values[upper]) / 2


def _bootstrap(tables: list[list[_Prepared]], groups: int, seed: int, resamples: int) -> np.ndarray:
    """Bootstrap draws of the mean over seeds, (arms, resamples); the same images and seeds for all arms."""
    rng = np.random.default_rng(seed)
    seeds = len(tables[0])
    draws = []
    for weights in _weights(rng, groups, resamples):
        each = np.array([[table.reduce(weights) for table in side] for side in tables])
        share = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(weights)).T / seeds
        draws.append((each * share).sum(axis=1))
    return np.concatenate(draws, axis=1)


def _weights(rng: np.random.Generator, groups: int, resamples: int) -> Iterator[np.ndarray]:
    """Multinomial group weights (n, groups), float64, in chunks that together have `resamples` rows."""
    rows = max(1, CHUNK // groups)
    for start in range(0, resamples, rows):
        n = min(rows, resamples - start)
        drawn = rng.integers(0, groups, (n, groups)) + groups * np.arange(n)[:, None]
        yield np.bincount(drawn.ravel(), minlength=n * groups).reshape(n, groups).astype(float)
