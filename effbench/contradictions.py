"""What no record holds that effbench wrote: figures that contradict each other, as an edit by hand leaves them."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

from effbench.records import Arm, Interval, MetricValue, Record, Speedup
from effbench.report.markdown import clean

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
    baseline = record.baseline().metrics
    for arm in record.arms:
        if said := _of_arm(arm, baseline):
            return clean(f"{arm.name}: {said}", None)
    return ""


def _of_arm(arm: Arm, baseline: dict[str, MetricValue]) -> str:
    if arm.test_speedup and arm.promised and arm.realised is not None:
        due = arm.test_speedup.value / arm.promised
        if not math.isclose(arm.realised, due, rel_tol=ROUNDING):
            return f"{arm.realised:.4g} of the promised speed-up realised, where its figures give {due:.4g}"
    if arm.test_speedup and (said := _of_speedup(arm.test_speedup)):
        return said
    for each in arm.by_batch:
        if each.speedup and (said := _of_speedup(each.speedup)):
            return f"at batch {each.batch} {said}"
    for each in arm.decoding:
        for found in (each.first_token_speedup, each.per_token_speedup):
            if found and (said := _of_speedup(found)):
                return f"at batch {each.batch}, by token, {said}"
    for name, metric in arm.metrics.items():
        if said := _of_metric(name, metric, baseline.get(name)):
            return said
    return ""


def _of_speedup(found: Speedup) -> str:
    if not 0 < found.value <= FASTEST:
        return f"a speed-up of {found.value:.4g}"
    if _outside(found):
        return f"the speed-up of {found.value:.4g} lies outside of its interval"
    if found.verdict in ("FASTER", "SLOWER"):
        low, high = found.low, found.high
        if low is None or high is None or (low <= 1 if found.verdict == "FASTER" else high >= 1):
            return f"the speed-up is called {found.verdict}, which its interval does not show"
    return ""


def _of_metric(name: str, found: MetricValue, baseline: MetricValue | None) -> str:
    value, best, loss = found.value, found.ceiling, found.lossiness
    if _outside(found):
        return f"{name} of {value:.4g} lies outside of its interval"
    if best is not None:
        beyond = value - best if found.higher_is_better else best - value
        if beyond > ROUNDING * max(1.0, abs(best)):
            return f"{name} of {value:.4g} is better than its best value, {best:.4g}"
    if loss is None:
        return ""
    if _outside(loss):
        return f"a lossy-ness of {name} of {loss.value:.4g} lies outside of its interval"
    if found.equivalent and found.margin is not None and abs(loss.value) > found.margin:
        return f"{name} is called as good as the baseline's at a lossy-ness of {loss.value:.4g}"
    if baseline is None:
        return f"a lossy-ness of {name}, which the baseline does not have"
    if found.higher_is_better or len(found.by_seed) == 1:  # of several seeds the ratios' mean, where lower is better
        whole, part = (baseline.value, value) if found.higher_is_better else (value, baseline.value)
        due = 1 - part / whole if whole else math.nan
        if not abs(due - loss.value) <= ROUNDING * max(1.0, abs(due)):
            return f"a lossy-ness of {name} of {loss.value:.4g}, where its values give {due:.4g}"
    return ""


def _outside(found: Interval | MetricValue) -> bool:
    return (found.low is not None and found.value < found.low) or (found.high is not None and found.value > found.high)
