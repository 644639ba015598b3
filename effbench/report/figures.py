"""Figures as plain text, the same in the leaderboard and in the terminal."""

from __future__ import annotations

import math

from effbench.records import Arm, Calibration, Flops, Interval, Memory, MetricValue, Record, Speedup, TimeSplit

NONE = "—"


def number(value: float, digits: int = 3) -> str:
    """At least `digits` significant digits, without exponent up to a million."""
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def bounds(figure: Interval | MetricValue, scale: float = 1, digits: int = 2, sign: str = "") -> str:
    """` [low, high]`, or nothing where there is no interval."""
    if figure.low is None or figure.high is None:
        return ""
    return f" [{scale * figure.low:{sign}.{digits}f}, {scale * figure.high:{sign}.{digits}f}]"


def ratio(figure: Speedup | None) -> str:
    """`1.42x [1.38, 1.47]`."""
    return NONE if figure is None else f"{figure.value:.2f}x{bounds(figure)}"


def verdict(figure: Speedup | None) -> str:
    """The verdict; with the number of pairs where they were too few."""
    if figure is None:
        return NONE
    return f"{figure.verdict} (n = {figure.n})" if figure.verdict == "TOO FEW SAMPLES" else figure.verdict


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.0f} %"


def share(figure: Interval | None) -> str:
    """A fraction as per cent with its interval."""
    return NONE if figure is None else f"{100 * figure.value:.1f} %{bounds(figure, 100, 1)}"


def no_loss(value: MetricValue | None) -> str:
    """Whether no loss may be claimed: `within 1 %`, or `not shown`."""
    if value is None or value.equivalent is None or value.margin is None:
        return NONE
    return f"within {100 * value.margin:g} %" if value.equivalent else "not shown"


def peak(memory: Memory | None) -> int | None:
    """Peak of all tensors together; of the process where those were not counted."""
    return memory and (memory.run_peak if memory.tensor_peak is None else memory.tensor_peak)


def by_layer(tokens: tuple[int, ...]) -> str:
    """Tokens by layer with repeats counted: `197 x3, 138 x3`."""
    runs: list[list[int]] = []
    for n in tokens:
        if runs and runs[-1][0] == n:
            runs[-1][1] += 1
        else:
            runs.append([n, 1])
    return ", ".join(f"{n} x{times}" for n, times in runs) or NONE


def calibration(found: Calibration | None) -> str:
    """What A/A trials of the machine say about its figures."""
    if found is None:
        return "not calibrated (effbench calibrate)"
    false = sum(found.verdicts.get(each, 0) for each in ("FASTER", "SLOWER"))
    return (
        f"calibrated {found.created:%Y-%m-%d}: of {found.trials} A/A trials 95 % were within "
        f"{100 * found.noise_floor:.1f} %, {100 * found.coverage:.1f} % of intervals held 1, {false} false verdicts"
    )


def energy(source: str) -> str:
    """How energy was measured, or why it was not."""
    return source if not source or "not measurable" in source else f"energy from {source}"


def gflops(flops: Flops | None) -> str:
    """GFLOPs; `≥` marks a lower bound, `+` the method's own scoring, `≠` that the formulas differ by over 1 %."""
    if flops is None:
        return NONE
    own = f" +{number(flops.overhead / 1e9, 2)}" if flops.overhead else ""
    counted = flops.dense + 2 * flops.low_bit_macs
    other = "" if flops.analytic is None or abs(flops.analytic - counted) <= 0.01 * counted else " ≠"
    return f"{'' if flops.complete else '≥ '}{number(flops.dense / 1e9)}{own}{other}"


def mebibytes(count: int | None) -> str:
    return number(count / 2**20) if count else NONE


def tokens(arm: Arm) -> str:
    """Tokens that enter the first and the last block's MLP."""
    if not arm.tokens:
        return NONE
    first, last = arm.tokens[0], arm.tokens[-1]
    return str(first) if first == last else f"{first} → {last}"


def metric(value: MetricValue | None, interval: bool = False) -> str:
    """A metric's value, with its interval where that is asked for."""
    if value is None:
        return NONE
    digits = 1 if value.unit in ("%", "rank") or abs(value.value) >= 10 else 3
    return f"{value.value:.{digits}f}{bounds(value, digits=digits) if interval else ''}"


def lossiness(value: MetricValue | None) -> str:
    """Lossy-ness in per cent with its interval; its note where there is one."""
    if value is None:
        return NONE
    if value.lossiness is None:
        return value.note if value.note.startswith("n/a") else NONE
    loss = value.lossiness
    return f"{100 * loss.value:+.1f} %{bounds(loss, 100, 1, '+')}" + (f" ({value.note})" if value.note else "")


def heading(record: Record, name: str) -> str:
    """A metric's column heading: name, unit, direction."""
    value = next((arm.metrics[name] for arm in record.arms if name in arm.metrics), None)
    if value is None:
        return name
    return f"{name} {value.unit} {'↑' if value.higher_is_better else '↓'}".replace("  ", " ")


def label(arm: Arm) -> str:
    """The arm's name, with its stack where the name does not say it."""
    text = f"{arm.name}: {arm.spec}" if arm.spec and not arm.spec.startswith(arm.name) else arm.spec or arm.name
    return f"control · {text}" if arm.kind == "control" else text


def seconds(time: TimeSplit | None) -> str:
    """Data wait and compute together, e.g. `96.2 s`."""
    return NONE if time is None else f"{number(time.total)} s"


def waiting(time: TimeSplit | None) -> str:
    """Data wait as a share of the time."""
    return NONE if time is None or not time.total else f"{100 * time.data_wait / time.total:.1f} %"


def status(arm: Arm) -> str:
    return arm.status + (f": {arm.error}" if arm.error else "")
