"""What training costs and when it pays back: the same figures in the leaderboard and in the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from effbench.records import Arm, Economics, Record
from effbench.report import figures

NONE = figures.NONE
SCALES = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))


def any_own(arms: Iterable[Arm]) -> bool:
    """Whether a method trains weights of its own: otherwise there is nothing to compare."""
    return any(arm.economics and arm.kind == "method" for arm in arms)


def metric(found: Economics | None, record: Record) -> str:
    """Name of the metric that is looked at on dev."""
    return (found and found.metric) or record.primary_metric


def quality(found: Economics | None, value: float | None, record: Record) -> str:
    """A value of the primary metric on dev, where it says something."""
    if found is None or value is None or figures.untaught(record.envelope):
        return NONE
    name = metric(found, record)
    known = next((arm.metrics[name] for arm in record.arms if name in arm.metrics), None)
    return figures.metric(known.model_copy(update=dict(value=value))) if known else figures.number(value)


def seconds(found: Economics | None) -> str:
    """Seconds to the target; or how many seeds came to it, where not all did."""
    if found is None or found.target is None:
        return NONE
    if found.seconds_to_target is not None:
        return figures.number(found.seconds_to_target)
    return f"{found.reached} of {found.seeds} seeds" if found.reached else "not reached"


def speedup(arm: Arm, record: Record) -> str:
    """The baseline's time to the target / the arm's: a ratio of two single figures, without an interval."""
    base, own = record.baseline().economics, arm.economics
    if arm.kind == "baseline" or base is None or own is None or not base.seconds_to_target or not own.seconds_to_target:
        return NONE
    return f"{base.seconds_to_target / own.seconds_to_target:.2f}x"


def teraflops(arm: Arm, value: float | None) -> str:
    """TFLOPs; `≥` marks a lower bound."""
    if value is None:
        return NONE
    bound = "" if arm.train_flops is None or arm.train_flops.complete else "≥ "
    return f"{bound}{figures.number(value / 1e12)}"


def saved(found: Economics | None) -> str:
    """Milliseconds that a query saves, with its sign."""
    if found is None or found.saved_per_query is None:
        return NONE
    text = figures.number(1000 * found.saved_per_query)
    return text if text.startswith("-") else f"+{text}"


def queries(found: Economics | None) -> str:
    """Queries after which the training is paid back: `48,300`, `1.24 million`."""
    if found is None or found.break_even is None:
        return NONE
    value = float(f"{found.break_even:.3g}")
    for scale, word in SCALES:
        if scale <= value < 1000 * scale:
            return f"{value / scale:.3g} {word}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.3g}"


def share(arms: Iterable[Arm]) -> str:
    """The share of the baseline's best quality that is to be reached, e.g. `95 %`."""
    return " or ".join(dict.fromkeys(f"{100 * arm.economics.share:g} %" for arm in arms if arm.economics))
