"""Figures as plain text, the same in the leaderboard and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable

from effbench.records import (
    Arm,
    Calibration,
    Envelope,
    Flops,
    Interval,
    Memory,
    MetricValue,
    Record,
    Speedup,
    TimeSplit,
    Timing,
)

NONE = "—"
KINDS = ("baseline", "method", "control")  # the order in which arms are shown
#: what a control is, in the order in which controls are shown
CONTROLS = {
    "noop": "",
    "identity": "",
    "random": "random choice",
    "grid": "tokens on a grid",
    "norm": "tokens by norm",
    "resize": "image size",
    "part": "a stack's part alone",
}
FEW = 4  # controls beyond noop and identity that are shown among the methods; more would bury these
LEAST_PROMISE = 0.01  # a promise nearer to 1 than this is none
FIRM = 300  # A/A trials from which on their rates are firm
UNSTEADY = 0.2  # distance of the quartiles, as a share of the figure, from which on it is called so


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
    """`1.42x [1.38, 1.47]`; near 1, where the third digit decides on the verdict, `0.987x [0.969, 1.004]`."""
    if figure is None:
        return NONE
    digits = 3 if 0.9 < figure.value < 1.1 else 2
    return f"{figure.value:.{digits}f}x{bounds(figure, digits=digits)}"


def factor(figure: Interval | None) -> str:
    """`1.02 [0.99, 1.05]`."""
    return NONE if figure is None else f"{figure.value:.2f}{bounds(figure)}"


def promise(arm: Arm) -> str:
    """The speed-up that the FLOPs promise."""
    return f"{arm.promised:.2f}x" if arm.promised else NONE


def ceiling(arm: Arm) -> str:
    """Amdahl's ceiling, where there is one."""
    return f"{arm.ceiling:.2f}x" if arm.ceiling and arm.ceiling > 1 else NONE


def throughput(timing: Timing | None) -> str:
    """Images per second."""
    return number(timing.batch / timing.seconds) if timing and timing.seconds else NONE


def per_step(time: TimeSplit | None, part: str) -> str:
    """Milliseconds that a part of a step took, where it took any."""
    value = getattr(time, part) if time and time.steps else 0.0
    return number(1000 * value / time.steps) if value else NONE


def realised(arm: Arm, interval: bool = False) -> str:
    """Measured speed-up as a share of what the FLOPs promise; nothing where they promise next to nothing."""
    if not arm.promised or arm.realised is None or abs(arm.promised - 1) < LEAST_PROMISE:
        return NONE
    scale = 100 / arm.promised
    return f"{100 * arm.realised:.0f} %{bounds(arm.test_speedup, scale, 0) if interval and arm.test_speedup else ''}"


def pays(arm: Arm) -> str:
    """The batch from which on an arm is faster, and the smaller ones of which that is not known."""
    if not arm.by_batch or arm.kind == "baseline":
        return NONE
    below = [t for t in arm.by_batch if t.speedup and (arm.pays_from is None or t.batch < arm.pays_from)]
    unknown = [str(t.batch) for t in below if t.speedup.verdict in ("AMBIGUOUS", "TOO FEW SAMPLES")]
    if unknown and not arm.pays_from:
        return f"undecided ({', '.join(unknown)})"
    return f"{arm.pays_from or 'none of these'}{f' (undecided: {chr(44).join(unknown)})' if unknown else ''}"


def milliseconds(timing: Timing | None) -> str:
    """`9.64`, with the quartiles of the steps where they are far apart."""
    if timing is None:
        return NONE
    text = number(1000 * timing.seconds)
    if timing.low is None or timing.high is None or timing.high - timing.low <= UNSTEADY * timing.seconds:
        return text
    return f"{text} (unsteady: {number(1000 * timing.low)} to {number(1000 * timing.high)})"


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


def trained_by(arm: Arm) -> str:
    """The arm whose trained weights it has, where that is not the baseline."""
    return f"as {arm.trained_by}" if arm.trained_by not in ("", "baseline") else NONE


def agreement(arm: Arm, name: str) -> str:
    """Agreement with the baseline: a share as per cent, a cosine as a number.

    Cosines only of arms with the baseline's own weights: other weights give other embeddings, as good or not.
    """
    figure = arm.agreement.get(name)
    if not is_cosine(name) or figure is None:
        return share(figure)
    if arm.phase != "test" or arm.train_time is not None:
        return NONE
    return f"{figure.value:.4f}{bounds(figure, digits=4)}"


def is_cosine(name: str) -> bool:
    return name.endswith("_cosine")


def quantised(share: float) -> str:
    """`99.6 %`; 100 % only where it is all."""
    return f"{min(100 * share, 99.9):.1f} %" if share < 1 else "100 %"


def no_loss(value: MetricValue | None) -> str:
    """Whether no loss may be claimed: `within 1 %`, or `not shown`."""
    if value is None or value.equivalent is None or value.margin is None:
        return NONE
    return f"within {100 * value.margin:g} %" if value.equivalent else "not shown"


def peak(memory: Memory | None) -> int | None:
    """Peak of all tensors together; of the process where those were not counted."""
    return memory and (memory.run_peak if memory.tensor_peak is None else memory.tensor_peak)


def precision(record: Record) -> str:
    """How many pairs were timed, what was asked for and what was reached."""
    found = [arm.test_speedup for arm in record.arms if arm.test_speedup]
    if not found:
        return ""
    pairs = min(figure.n for figure in found)
    widths = [figure.half_width for figure in found if figure.half_width is not None]
    reached = f", intervals within +-{100 * max(widths):.1f} %" if widths else ""
    asked = record.provenance
    until = f", asked for +-{100 * asked.until:g} %" if asked.until else ""
    budget = f", a budget of {asked.budget:g} s" if asked.budget else ""
    return f"timed {pairs} pairs{reached}{until}{budget}"


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
    sure = found.verdicts.get("NO DIFFERENCE", 0)
    few = " (few)" if found.trials < FIRM else ""
    return (
        f"calibrated {found.created:%Y-%m-%d} with {found.trials} A/A trials{few} of "
        f"{found.pairs} pairs ({found.backbone}, batch {found.batch}): 95 % within {100 * found.noise_floor:.1f} %, "
        f"{100 * found.coverage:.1f} % of intervals hold 1; {false} false verdicts, {sure} NO DIFFERENCE"
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


def thousandths(seconds: float | None) -> str:
    """Milliseconds of seconds."""
    return NONE if seconds is None else number(1000 * seconds)


def billions(flops: int | None) -> str:
    """GFLOPs of a count."""
    return number(flops / 1e9) if flops else NONE


def mebibytes(count: int | None) -> str:
    return number(count / 2**20) if count else NONE


def tokens(arm: Arm) -> str:
    """Tokens that enter the first and the last block's MLP."""
    if not arm.tokens:
        return NONE
    if arm.structure and arm.structure.masked_tokens:
        return f"{arm.tokens[0]}, masked, not removed"
    first, last = arm.tokens[0], arm.tokens[-1]
    return str(first) if first == last else f"{first} → {last}"


def metric(value: MetricValue | None, interval: bool = False) -> str:
    """A metric's value, with its interval where that is asked for."""
    if value is None:
        return NONE
    return f"{value.value:.{digits(value)}f}{bounds(value, digits=digits(value)) if interval else ''}"


def sure(name: str, primary: str) -> bool:
    """Whether a metric is shown with its interval: what is judged by, and a change, which may be none."""
    return name == primary or name.endswith("_change")


def digits(value: MetricValue) -> int:
    """Decimals that a metric is shown with."""
    per_cent = value.unit in ("%", "rank") or (value.higher_is_better and (value.ceiling or 0) >= 100)
    return 1 if per_cent or abs(value.value) >= 10 else 3


def metric_names(record: Record, arms: Iterable[Arm]) -> list[str]:
    """The metrics of a record in the task's order, those that not every machine can compute too; the primary one first.

    Args:
        arms: those that are shown.
    """
    most = max((list(arm.metrics) for arm in arms), key=len, default=[])
    return list(dict.fromkeys([record.primary_metric, *most, *record.envelope.metrics]))


def per_image(arm: Arm) -> str:
    """GFLOPs of single images, and what padding makes of them: `1.90 [1.50, 2.30], padded at batch 16: 2.20`."""
    found = arm.per_image
    if found is None:
        return NONE
    flops = found.flops
    spread = "" if flops.low is None or flops.high is None else f" [{_giga(flops.low)}, {_giga(flops.high)}]"
    return f"{_giga(flops.value)}{spread}, padded at batch {found.batch}: {_giga(found.padded)}"


def _giga(count: float) -> str:
    return number(count / 1e9)


def alone(arm: Arm, record: Record) -> dict[str, float]:
    """The speed-ups of a stack's parts, each alone, as far as they are in its record."""
    speed = {each.name: each.test_speedup.value for each in record.arms if each.test_speedup}
    return {part: speed[part] for part in (arm.interaction.parts if arm.interaction else ()) if part in speed}


def product(arm: Arm, record: Record) -> str:
    """What the parts of a stack would come to if their speed-ups multiplied."""
    speed = alone(arm, record)
    return f"{math.prod(speed.values()):.2f}x" if arm.interaction and len(speed) == len(arm.interaction.parts) else NONE


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
    """The arm's name, with its stack where the name does not say it; of a control, what it is."""
    text = f"{arm.name}: {arm.spec}" if arm.spec and not arm.spec.startswith(arm.name) else arm.spec or arm.name
    if arm.kind != "control":
        return text
    role = CONTROLS.get(arm.control, arm.control)
    return f"control ({role}) · {text}" if role else f"control · {text}"


def apart(arm: Arm) -> bool:
    """Whether it is one of the controls of which a run may have dozens."""
    return arm.kind == "control" and arm.control not in ("noop", "identity")


def timed_batch(record: Record) -> int:
    """Images of a timed step: as many as were asked for, or the whole split where it has fewer."""
    asked = record.envelope.protocol.timing_batch
    timed = [timing.batch for arm in record.arms for timing in arm.by_batch if timing.batch <= asked]
    return max(timed, default=min(asked, record.envelope.images.get(record.envelope.split) or asked))


def untaught(envelope: Envelope) -> str:
    """A sentence where quality says nothing, since a tower has random weights that no training changes."""
    if envelope.weights != "random" or envelope.protocol.train == "full":
        return ""
    return "The weights are random: time, memory and FLOPs mean something, quality does not."


def quality(arm: Arm, record: Record) -> dict[str, MetricValue]:
    """The metrics of an arm by name; none where they say nothing."""
    return {} if arm.no_quality or untaught(record.envelope) else arm.metrics


def place(control: str) -> int:
    """Where a control stands among the others."""
    return list(CONTROLS).index(control) if control in CONTROLS else len(CONTROLS)


def status(arm: Arm) -> str:
    why = arm.error or (f"FLOPs and time only, {arm.no_quality}" if arm.no_quality else "")
    return arm.status + (f": {why}" if why else "")
