"""Quality against the baseline: lossy-ness and agreement, with intervals by paired bootstrap over test images."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from effbench.errors import InvalidError
from effbench.records import LEAST_SEEDS, Interval, MetricValue
from effbench.task import Items, Metric

#: group weights that the bootstrap holds at once (32 MiB of float64)
CHUNK = 4_000_000
MARGIN = 0.01  # lossy-ness below which two arms count as equal
LEAST_IMAGES = 6  # fewer give no interval
RESAMPLES = 2000  # of the bootstrap
#: A ratio beyond this is no lossy-ness: no method makes a working baseline ten times better, so the baseline is broken
MOST = 10.0


def lossiness(
    metric: Metric,
    baseline: list[Items],
    arm: list[Items],
    seed: int = 0,
    resamples: int = RESAMPLES,
    trained: bool = False,
    margin: float = MARGIN,
) -> MetricValue:
    """A metric of one arm and its lossy-ness against the baseline, with paired bootstrap intervals.

    Lossy-ness is 1 - q/q_b; where lower is better the ratio is turned over, 1 - q_b/q. It is negative where the arm
    is better, and never clipped. Test images (groups) are resampled whole, and the same ones for both arms and all
    seeds; with two or more seeds these are resampled too. With few seeds the percentile interval is too narrow in the
    seeds' direction (by about sqrt((K-1)/K) for K of them).

    It is None, with a note "n/a (reason)", where a ratio would mean nothing; what is printed lies in [1 - MOST, 1]:

    - there are fewer than LEAST_IMAGES images;
    - the baseline's interval does not exclude chance;
    - a value is below 0, or the one that is divided by is not clearly above it: not so in every resample;
    - the ratio, or the end of its interval, is above MOST.

    `equivalent` is the only ground for "no loss": two one-sided tests at 5 %, that is the 90 % interval lies inside
    (-margin, margin). It is None where nothing may be claimed: no interval, or an arm trained apart from the baseline
    with fewer than LEAST_SEEDS seeds.

    Args:
        metric: what is computed, and its direction, chance level and ceiling.
        baseline, arm: per-item scores, one entry per seed, seed i of both trained from the same random state. Pass
            the same list twice for the baseline itself: its lossy-ness is None.
        seed: of the bootstrap. One seed gives every metric and arm the same resampled images.
        resamples: bootstrap resamples.
        trained: whether the arm was trained apart from the baseline (or is the baseline), so that one seed leaves the
            training variance unmeasured.
        margin: of the equivalence test, as a fraction.

    Raises:
        InvalidError: the metric has no direction, or a value better than its ceiling; the arms were not tested on the
            same images and seeds, or a score is not finite.
    """
    _check_metric(metric)
    is_baseline = arm is baseline
    sides = Sides(metric, [arm] if is_baseline else [arm, baseline], seed, resamples)
    _check_ceiling(metric, sides.by_seed)
    own = sides.interval(0)

    loss, equivalent, notes = None, None, []
    if not is_baseline:
        reason = _no_ratio(metric, sides)
        if reason:
            notes.append(f"n/a ({reason})")
        else:
            ratios = 1 - sides.ratio(sides.draws)
            loss = sides.figure(1 - sides.ratio(sides.values), ratios)
            notes += [] if metric.higher_is_better else ["lower is better: 1 - baseline / arm"]
            if not trained or len(arm) >= LEAST_SEEDS:
                equivalent = bool((np.abs(np.percentile(ratios, [5, 95])) < margin).all())
    if trained and len(arm) == 1:
        notes.append("training variance not measured")
    return MetricValue(
        value=own.value,
        low=own.low,
        high=own.high,
        higher_is_better=metric.higher_is_better,
        unit=metric.unit,
        chance=metric.chance,
        ceiling=metric.ceiling,
        lossiness=loss,
        note="; ".join(notes),
        by_seed=tuple(sides.by_seed[0]),
        margin=None if equivalent is None else margin,
        equivalent=equivalent,
    )


def agreement(items: list[Items], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """How far an arm answers as the baseline does: the mean over items and seeds, with its 95 % bootstrap interval.

    Args:
        items: one entry per seed, of values in [-1, 1] (see `Task.agreement`); images and seeds are resampled as for
            `lossiness`.

    Raises:
        InvalidError: a value outside [-1, 1], no item, or seeds that were not tested on the same images.
    """
    for each in items:
        if (wrong := np.abs(each.values) > 1).any():
            raise InvalidError(f"an agreement of {np.asarray(each.values)[wrong][0]} is not within -1 and 1")
    return Sides(AGREEMENT, [items], seed, resamples).interval(0)


AGREEMENT = Metric("agreement", "agreement", lambda values: values, True, chance=None, ceiling=1.0)


def _no_ratio(metric: Metric, sides: Sides) -> str:
    """Why 1 - the ratio of arm and baseline would mean nothing; empty where it does mean something."""
    baseline = sides.interval(1)
    if baseline.low is None or baseline.high is None:
        return f"too few images: {baseline.n}, at least {LEAST_IMAGES}"
    if metric.chance is not None:
        beats = baseline.low > metric.chance if metric.higher_is_better else baseline.high < metric.chance
        if not beats:
            return "baseline at chance"
    if sides.values[1] <= 0:
        return "baseline is not above 0"
    top, bottom = (0, 1) if metric.higher_is_better else (1, 0)
    for side, works in ((top, sides.draws[top] >= 0), (bottom, sides.draws[bottom] > 0)):
        if not works.all() or sides.values[side] < 0:
            return f"the {('arm', 'baseline')[side]}'s value is not clearly above 0"
    ends = [sides.ratio(sides.values), *np.percentile(sides.ratio(sides.draws), [2.5, 97.5])]
    if max(ends) > MOST:
        return f"up to {max(ends):.0f} times better than the baseline, which is too weak to compare with"
    return ""


class Sides:
    """A metric of several arms under the same resamples of images (groups, whole) and seeds.

    Attributes:
        by_seed: the metric, (sides, seeds); values: its mean over seeds, (sides,); draws: (sides, resamples).
        groups: how many images there are.

    Raises:
        InvalidError: the sides were not tested on the same images and seeds, or a score is not finite.
    """

    def __init__(self, metric: Metric, sides: list[list[Items]], seed: int = 0, resamples: int = RESAMPLES) -> None:
        groups = _groups(metric, sides)
        tables = [[_Prepared(metric, items, groups) for items in side] for side in sides]
        one = np.ones((1, len(groups)))
        self.metric = metric
        self.groups = len(groups)
        self.by_seed = np.array([[table.reduce(one)[0] for table in side] for side in tables])
        self.values = self.by_seed.mean(axis=1)
        self.draws = _bootstrap(tables, len(groups), seed, resamples)

    def interval(self, side: int) -> Interval:
        """The metric of a side with its 95 % interval."""
        return self.figure(self.values[side], self.draws[side])

    def figure(self, value: float, draws: np.ndarray) -> Interval:
        """Something computed of `values` and of `draws`, with its 95 % interval; none where there are too few images.

        Args:
            draws: (resamples,).
        """
        if self.groups < LEAST_IMAGES:
            return Interval(value=float(value), n=self.groups)
        low, high = np.percentile(draws, [2.5, 97.5])
        return Interval(value=float(value), low=low, high=high, n=self.groups)

    def ratio(self, of: np.ndarray, arm: int = 0, baseline: int = 1) -> np.ndarray:
        """q/q_b of `values` or `draws`; turned over where lower is better."""
        return of[arm] / of[baseline] if self.metric.higher_is_better else of[baseline] / of[arm]


def _check_metric(metric: Metric) -> None:
    if metric.higher_is_better not in (True, False):
        raise InvalidError(
            f"the metric {metric.name} has no direction, so nothing can be called a loss",
            "declare higher_is_better=True or False in its Metric",
        )
    for name, value in (("chance", metric.chance), ("ceiling", metric.ceiling)):
        if value is not None and not math.isfinite(value):
            raise InvalidError(f"the metric {metric.name} has a {name} of {value}", f"declare {name}=None, or a number")


def _check_ceiling(metric: Metric, values: np.ndarray) -> None:
    if metric.ceiling is None:
        return
    beyond = (values - metric.ceiling) * (1 if metric.higher_is_better else -1)
    if beyond.max() > 1e-6 * max(1.0, abs(metric.ceiling)):
        raise InvalidError(
            f"{metric.name} came to {values.flat[beyond.argmax()]:g}, better than its ceiling of {metric.ceiling:g}",
            "mend the metric's value or its ceiling",
        )


def _groups(metric: Metric, sides: list[list[Items]]) -> np.ndarray:
    """The test images (sorted groups) that all seeds of all arms share."""
    items = [each for side in sides for each in side]
    if not items or len({len(side) for side in sides}) > 1:
        raise InvalidError(f"{metric.name}: all arms need the same seeds, at least one")
    groups = np.unique(items[0].group)
    for each in items:
        if len(each.values) != len(each.group):
            raise InvalidError(f"{metric.name}: {len(each.values)} scores for {len(each.group)} items")
        if not np.isfinite(np.asarray(each.values, float)).all():
            raise InvalidError(f"{metric.name}: a score in {metric.items} is not finite", "look for NaN in training")
        if not np.array_equal(np.unique(each.group), groups):
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
        self.combine = metric.combine
        if self.combine is not None:
            self.sums = np.zeros((len(groups), values.shape[1]))
            np.add.at(self.sums, group, values)
            return
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
        if self.combine is not None:
            return self.combine(weights @ self.sums / size[:, None])
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
