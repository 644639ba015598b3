"""What no record holds that effbench wrote: figures that contradict each other, as an edit by hand leaves them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from effbench.records import Arm, Interval, MetricValue, Record, Speedup

FASTEST = 1000.0  # times; no method is
SKEW = timedelta(days=1)  # by which another machine's clock may be ahead
ROUNDING = 1e-6


def contradiction(record: Record) -> str:
    """The first contradiction of a record, in words; empty where there is none.

    It is looked for where a ranking or a verdict comes from: speed-ups, metrics, lossy-ness, and when it was made.
    """
    created = record.created if record.created.tzinfo else record.created.replace(tzinfo=UTC)
    if created > datetime.now(UTC) + SKEW:
        return f"it was made on {created:%Y-%m-%d}, a day that is to come"
    baseline = record.baseline()
    return next((f"{arm.name}: {said}" for arm in record.arms for said in _of_arm(arm, baseline)), "")


def _of_arm(arm: Arm, baseline: Arm) -> Iterator[str]:
    if arm.test_speedup and arm.promised and arm.realised is not None:
        due = arm.test_speedup.value / arm.promised
        if not math.isclose(arm.realised, due, rel_tol=ROUNDING):
            yield f"{arm.realised:.4g} of the promised speed-up realised, where its figures give {due:.4g}"
    if arm.test_speedup:
        yield from _of_speedup("speed-up", arm.test_speedup)
    for each in arm.by_batch:
        if each.speedup:
            yield from _of_speedup(f"speed-up at batch {each.batch}", each.speedup)
    for each in arm.decoding:
        for name in ("first_token_speedup", "per_token_speedup"):
            if found := getattr(each, name):
                yield from _of_speedup(f"{name} at batch {each.batch}", found)
    for name, metric in arm.metrics.items():
        yield from _of_metric(name, metric, baseline.metrics.get(name))


def _of_speedup(name: str, found: Speedup) -> Iterator[str]:
    if not 0 < found.value <= FASTEST:
        yield f"a {name} of {found.value:.4g}"
    yield from _outside(name, found)
    sure = found.low is not None and found.high is not None
    if (
        found.verdict == "FASTER"
        and not (sure and found.low > 1)
        or found.verdict == "SLOWER"
        and not (sure and found.high < 1)
    ):
        yield f"the {name} is called {found.verdict}, which its interval does not show"


def _of_metric(name: str, found: MetricValue, baseline: MetricValue | None) -> Iterator[str]:
    yield from _outside(name, found)
    if found.ceiling is not None:
        beyond = found.value - found.ceiling if found.higher_is_better else found.ceiling - found.value
        if beyond > ROUNDING * max(1.0, abs(found.ceiling)):
            yield f"{name} of {found.value:.4g} is better than its best value, {found.ceiling:.4g}"
    loss = found.lossiness
    if loss is None:
        return
    yield from _outside(f"lossy-ness of {name}", loss)
    if found.equivalent and found.margin is not None and abs(loss.value) > found.margin:
        yield f"{name} is called as good as the baseline's at a lossy-ness of {loss.value:.4g}"
    if baseline is None:
        yield f"a lossy-ness of {name}, which the baseline does not have"
    elif found.higher_is_better or len(found.by_seed) == 1:  # of several seeds the ratios' mean, where lower is better
        best, own = (baseline, found) if found.higher_is_better else (found, baseline)
        due = 1 - own.value / best.value if best.value else math.nan
        if not abs(due - loss.value) <= ROUNDING * max(1.0, abs(due)):
            yield f"a lossy-ness of {name} of {loss.value:.4g}, where its values give {due:.4g}"


def _outside(name: str, found: Interval | MetricValue) -> Iterator[str]:
    low = -math.inf if found.low is None else found.low
    high = math.inf if found.high is None else found.high
    if not low <= found.value <= high:
        yield f"the {name} of {found.value:.4g} lies outside of its interval, {low:.4g} to {high:.4g}"
