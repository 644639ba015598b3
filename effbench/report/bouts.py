"""Who beats whom in one envelope: every pair of its arms, in quality, and in quality at an equal latency.

All is taken from recorded figures with 95 % intervals; figures without one are not compared.

**Quality.** An arm beats another where the interval of the difference of their lossy-nesses excludes 0. It is a tie
where the interval holds 0, and where it lies within the equivalence margin (1 %). Records hold each arm's lossy-ness
against the baseline, not the difference of two arms: its interval is put together from their two (MOVER: G. Y. Zou and
A. Donner, Statistics in Medicine 27, 2008) as if they were independent. They share test images, which makes the true
interval narrower: so a tie is said too often, a win not. Where a record holds the paired comparison itself (an arm
against its blind control, `versus`), that is taken. Raw scores are not read: a leaderboard reads thousands of records.

**Quality at an equal latency.** An arm beats another if, at every latency that one may ask for, it offers at least the
quality that the other does, and at some of them more: it is shown to be better on one axis (quality, speed-up) and not
worse on the other. Faster but lossier is a trade-off that no latency settles, and is not compared. Most methods make
such a trade-off against the dense baseline. But the dense model gets as fast as any of them on a smaller image: so an
arm meets the baseline at its own latency, in the lossy-ness that the `resize` sizes of its envelope have there,
interpolated in time between the two around it and taken at the worst and best over the interval of the arm's speed-up.
An arm faster than the smallest size meets that size, and one slower than the baseline the baseline, by the rule for two
arms. The sizes are that reference, and are not rated themselves.

Left out: noop and identity (the baseline itself, under other names), arms that failed or whose quality means nothing,
random weights that no training changes, a baseline at chance, and arms that were trained apart with fewer than three
seeds, whose lossy-ness lacks the noise of training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effbench.records import LEAST_SEEDS, Arm, Interval, Record, in_interval
from effbench.report import figures
from effbench.report.standings import Section, Standing

if TYPE_CHECKING:
    import numpy as np

MARGIN = 0.01  # of lossy-ness, where the record states none
FASTER = 0.03  # relative difference below which two times count as the same
MOST = 1e6  # a figure beyond this was edited by hand
ARMS = 400  # of an envelope that are compared, methods first
NONE = 9  # an outcome: not compared
BASELINE = ""  # its spec


@dataclass(frozen=True)
class Bout:
    """The outcomes in one envelope.

    Args:
        cluster: task, data and backbone: envelopes that share them share test images, and are no independent evidence.
        synthetic, device: what is never rated together: drawn and real data, kinds of devices.
        arms: specs, the baseline ("") first.
        controls: what those are that were run as a control only: spec to kind of control.
        quality, latency: `(arms, arms)`: 1 where the row's arm beats the column's, 0 a tie, -1, or NONE.
        reference: specs that are the reference at an equal latency.
        left_out: arms beyond the ARMS that are compared.
    """

    cluster: tuple[str, str, str]
    synthetic: bool
    device: str
    arms: tuple[str, ...]
    controls: dict[str, str]
    quality: np.ndarray
    latency: np.ndarray
    reference: frozenset[str]
    left_out: int = 0


def bout(section: Section) -> Bout | None:
    """All pairs of an envelope; None where none of its arms can be compared with the baseline."""
    import numpy as np

    envelope = section.envelope
    if figures.untaught(envelope):
        return None
    rows = {BASELINE: next((row for row in section.rows if row.arm.kind == "baseline"), None)}
    if rows[BASELINE] is None:
        return None
    for row in section.rows:  # methods come before controls
        if row.arm.spec and usable(row.arm, row.record):
            rows.setdefault(row.arm.spec, row)
    if len(rows) < 2:
        return None
    left_out = len(rows) - ARMS
    rows = dict(list(rows.items())[:ARMS])
    arms = tuple(rows)
    loss = np.array([(0.0, 0.0, 0.0), *(_three(_lossiness(rows[spec])) for spec in arms[1:])])
    speed = np.array([(0.0, 0.0, 0.0), *(_log(rows[spec].arm.test_speedup) for spec in arms[1:])])
    quality = -_judge(loss, loss, MARGIN)
    _take_paired(quality, rows)
    reference = _sizes(rows)
    return Bout(
        cluster=(envelope.task, envelope.data, envelope.backbone),
        synthetic=envelope.synthetic,
        device=envelope.protocol.device.partition(":")[0],
        arms=arms,
        controls={spec: row.arm.control or "control" for spec, row in rows.items() if row.arm.kind == "control"},
        quality=np.where(np.eye(len(arms), dtype=bool), NONE, quality).astype(np.int8),
        latency=_at_equal_latency(quality, loss, speed, [spec in reference for spec in arms]),
        reference=reference,
        left_out=max(0, left_out),
    )


def _sizes(rows: dict[str, Standing]) -> frozenset[str]:
    """The smaller images: resize controls, and methods that stand in for one."""
    found = {spec for spec, row in rows.items() if row.arm.control == "resize"}
    for row in rows.values():
        specs = {each.name: each.spec for each in row.record.arms}
        found |= {specs.get(name, "") for each in row.arm.versus if each.control == "resize" for name in each.arms}
    return frozenset(found & set(rows) - {BASELINE})


def usable(arm: Arm, record: Record) -> bool:
    """Whether an arm's lossy-ness can be compared: it means something, and its interval holds all its noise."""
    metric = arm.metrics.get(record.primary_metric)
    if arm.status != "ok" or arm.no_quality or metric is None or _three(metric.lossiness) is None:
        return False
    return not trained_apart(arm) or len(record.envelope.protocol.seeds) >= LEAST_SEEDS


def trained_apart(arm: Arm) -> bool:
    """Whether an arm has other trained weights than the baseline's."""
    return arm.phase != "test" or arm.train_time is not None or arm.trained_by not in ("", "baseline")


def _lossiness(row: Standing) -> Interval | None:
    return row.arm.metrics[row.record.primary_metric].lossiness


def _three(figure: Interval | None) -> tuple[float, float, float] | None:
    """Low end, value, high end; None where there is no interval, or where it was edited by hand."""
    if not in_interval(figure):
        return None
    found = figure.low, figure.value, figure.high
    return found if max(map(abs, found)) <= MOST else None


def _log(figure: Interval | None) -> tuple[float, float, float]:
    """Logarithms of a speed-up and its ends; NaN where there is no interval."""
    found = _three(figure)
    return tuple(map(math.log, found)) if found and found[0] > 0 else (math.nan,) * 3


def _judge(one: np.ndarray, other: np.ndarray, margin: float) -> np.ndarray:
    """Which of two figures is shown to be larger: 1 the first, -1 the second, 0 neither, NONE where one is missing.

    Args:
        one, other: low end, value, high end: `(n, 3)` and `(m, 3)`.
        margin: differences within it are none.

    Returns:
        `(n, m)`.
    """
    import numpy as np

    low, value, high = (one[:, None, k] for k in range(3))
    low_2, value_2, high_2 = (other[None, :, k] for k in range(3))
    difference = value - value_2
    bottom = difference - np.hypot(value - low, high_2 - value_2)
    top = difference + np.hypot(high - value, value_2 - low_2)
    same = (np.abs(bottom) < margin) & (np.abs(top) < margin)
    found = np.where(same, 0, np.where(bottom > 0, 1, np.where(top < 0, -1, 0)))
    return np.where(np.isnan(difference), NONE, found)


def _take_paired(quality: np.ndarray, rows: dict[str, Standing]) -> None:
    """Put in the comparisons that records hold, made on the same resampled images."""
    place = {spec: k for k, spec in enumerate(rows)}
    for spec, row in rows.items():
        metric = row.arm.metrics.get(row.record.primary_metric)
        names = {each.name: each for each in row.record.arms}
        for found in row.arm.versus:
            other = names.get(found.arms[0]) if len(found.arms) == 1 and found.share == 1 else None
            if other is None or other.spec == spec or rows.get(other.spec) is None:
                continue
            if rows[other.spec].record.id != row.record.id:
                continue
            baseline = row.record.baseline().metrics.get(row.record.primary_metric)
            ends = found.advantage.low, found.advantage.high
            little = baseline and None not in ends and max(map(abs, ends)) < MARGIN * abs(baseline.value)
            outcome = {"BETTER": 1, "WORSE": -1}.get(found.verdict, 0) if metric and not little else 0
            quality[place[spec], place[other.spec]], quality[place[other.spec], place[spec]] = outcome, -outcome


def _at_equal_latency(quality: np.ndarray, loss: np.ndarray, speed: np.ndarray, reference: list[bool]) -> np.ndarray:
    """Outcomes at an equal latency, `(arms, arms)`; see the module.

    Args:
        quality: outcomes, `(arms, arms)`. loss, speed: `(arms, 3)`, speed-ups as logarithms.
        reference: which arms are resize controls.
    """
    import numpy as np

    faster = _judge(speed, speed, math.log1p(FASTER))
    known = (quality != NONE) & (faster != NONE)
    latency = np.where(known & (quality * faster != -1), np.sign(quality + faster), NONE)
    dense = [0, *(k for k, yes in enumerate(reference) if yes and speed[k, 1] > 0)]
    dense = _front(dense, loss, speed)
    for arm in range(1, len(quality)):
        if not np.isnan(speed[arm, 1]):
            outcome = _against_dense(arm, dense, loss, speed, latency)
            latency[arm, 0], latency[0, arm] = outcome, -outcome if outcome != NONE else NONE
    out = np.eye(len(quality), dtype=bool) | np.array(reference) | np.array(reference)[:, None]
    return np.where(out, NONE, latency).astype(np.int8)


def _front(points: list[int], loss: np.ndarray, speed: np.ndarray) -> list[int]:
    """The baseline and the sizes that no faster size beats, by speed."""
    kept: list[int] = []
    for point in sorted(points[1:], key=lambda k: -speed[k, 1]):
        if not kept or loss[point, 1] < loss[kept[-1], 1]:
            kept.append(point)
    return [points[0], *reversed(kept)]


def _against_dense(arm: int, dense: list[int], loss: np.ndarray, speed: np.ndarray, latency: np.ndarray) -> int:
    """An arm against the dense model on an image so small that it is as fast: 1, 0, -1 or NONE."""
    import numpy as np

    seconds = np.exp(-speed[dense, 1])[::-1]  # of a step, relative to the baseline's; rising
    own = np.exp(-speed[arm])  # longest, value, shortest
    if own[1] < seconds[0]:
        return int(latency[arm, dense[-1]])
    if own[1] > seconds[-1]:
        return int(latency[arm, 0])
    low, value, high = (np.interp(own, seconds, loss[dense, k][::-1]) for k in range(3))
    there = np.array([[low.min(), value[1], high.max()]])
    return -int(_judge(loss[arm : arm + 1], there, MARGIN)[0, 0])
