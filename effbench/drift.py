"""`effbench gate --drift`: whether a cell's speed-up moved over the stored history, too slowly for any single night.

A cell is an arm of an envelope; its history is the log speed-up of each of its records, oldest first. Change points
are found by PELT with an L2 cost (Killick et al., "Optimal detection of changepoints with a linear computational cost",
JASA 2012, arXiv 1101.1438; library: ruptures), with a penalty that is BIC's: 3 variance log(runs) for each change, the
variance being that of a run. Records only, no torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

import numpy as np
from scipy.stats import t

from effbench.errors import InvalidError
from effbench.findings import Finding, Outcome
from effbench.records import Arm, Record, Speedup
from effbench.report.markdown import clean
from effbench.stats import MARGIN
from effbench.store import created

TITLE = "effbench gate --drift"
LEAST = 8  # runs of a cell that are judged
SEGMENT = 3  # runs on either side of a change
CHANCE = 0.01  # of a change that is none, over all places where a history could change
LEAST_SD = 1e-3  # of a run, relative: no speed-up is known better
HOLE = 3.0  # times the usual distance of two runs
SPEEDUPS = {"test_speedup": "test speed-up", "train_speedup": "train speed-up"}
MOST_NAMED = 20  # of records that were left out


@dataclass(frozen=True)
class Point:
    """One run of a cell: when, of which commit, and its log speed-up with the standard deviation that it claims."""

    when: datetime
    run: str
    commit: str
    value: float
    sd: float = 0.0

    @property
    def said(self) -> str:
        commit = f"commit {clean(self.commit)[:10]}" if self.commit else "an unknown commit"
        return f"{self.when:%Y-%m-%d} ({commit})"


@dataclass(frozen=True)
class Level:
    """Mean speed-up of neighbouring runs, with its 95 % interval."""

    value: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{self.value:.3f}x [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Change:
    """The speed-up moved between two runs, or (`gradual`) over all runs from one to the other.

    Attributes:
        ratio: level after / level before; below 1 is slower.
        low, high: its 95 % interval.
        sure: less likely than CHANCE, at any of the places where a history of this length could change.
        last, first: the last run before and the first one after.
    """

    ratio: float
    low: float
    high: float
    sure: bool
    before: Level
    after: Level
    last: Point
    first: Point
    gradual: bool = False

    @property
    def said(self) -> str:
        how = "SLOWER" if self.ratio < 1 else "FASTER"
        percent = ", ".join(f"{100 * (each - 1):+.1f}" for each in (self.low, self.high))
        step = "little by little between" if self.gradual else "between"
        return (
            f"{how}: speed-up {100 * (self.ratio - 1):+.1f} % [{percent}] {step} {self.last.said} and "
            f"{self.first.said}: {self.before.runs} runs before, {self.after.runs} after"
        )


def changes(points: Sequence[Point], floor: float = 0.0) -> list[Change]:
    """Where the speed-up of a cell moved by more than max(3 %, `floor`), oldest first.

    Where no single step is that large, but the first and the last level are that far apart: one gradual change.

    Args:
        points: oldest first, at least LEAST of them.
        floor: relative change that identical arms show.
    """
    import ruptures

    values = np.array([point.value for point in points])
    penalty = 3 * _sd(points) ** 2 * math.log(len(values))
    ends = ruptures.Pelt(model="l2", min_size=SEGMENT, jump=1).fit_predict(values, penalty)
    borders = [0, *ends]
    dof = max(1, len(values) - len(ends))
    segments = list(zip(borders, borders[1:], strict=False))
    residuals = np.concatenate([values[start:end] - values[start:end].mean() for start, end in segments])
    sd = max(math.sqrt(float(np.sum(residuals**2)) / dof), _claimed(points))
    found = [
        change
        for one, other in zip(segments, segments[1:], strict=False)
        if _large(change := _change(points, values, one, other, sd, dof), floor)
    ]
    if not found and len(segments) > 2:
        whole = _change(points, values, segments[0], segments[-1], sd, dof, gradual=True)
        found = [whole] if _large(whole, floor) else []
    return found


def _sd(points: Sequence[Point]) -> float:
    """Standard deviation of a run, from the differences of neighbours, of which few hold a change."""
    differences = np.abs(np.diff([point.value for point in points]))
    between = 1.4826 * float(np.median(differences)) / math.sqrt(2)
    return max(between, _claimed(points))


def _claimed(points: Sequence[Point]) -> float:
    """Standard deviation that a run has at the least, going by the intervals of all."""
    return max(float(np.median([point.sd for point in points])), LEAST_SD)


def _change(
    points: Sequence[Point],
    values: np.ndarray,
    one: tuple[int, int],
    other: tuple[int, int],
    sd: float,
    dof: int,
    gradual: bool = False,
) -> Change:
    before, after = (_level(values[start:end], sd, dof) for start, end in (one, other))
    effect = math.log(after.value / before.value)
    error = sd * math.sqrt(1 / before.runs + 1 / after.runs)
    reach = float(t.ppf(0.975, dof)) * error
    low, high = math.exp(effect - reach), math.exp(effect + reach)
    sure = 2 * float(t.sf(abs(effect) / error, dof)) * len(values) < CHANCE
    return Change(math.exp(effect), low, high, sure, before, after, points[one[1] - 1], points[other[0]], gradual)


def _level(values: np.ndarray, sd: float, dof: int) -> Level:
    middle, reach = float(values.mean()), float(t.ppf(0.975, dof)) * sd / math.sqrt(len(values))
    return Level(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach), len(values))


def _large(change: Change, floor: float) -> bool:
    return change.sure and abs(math.log(change.ratio)) > math.log1p(max(MARGIN, floor))


def look_back(records: Iterable[Record], problems: Sequence[str] = (), since: date | None = None) -> Outcome:
    """What the stored history says, cell by cell.

    Args:
        records: in any order.
        problems: why other records could not be read.
        since: changes of an earlier day are known and only noted.

    Raises:
        InvalidError: there is no record.
    """
    records = sorted(records, key=lambda record: (created(record), record.id))
    if not records:
        raise InvalidError("there is no run to look back on", "make runs with effbench run, or name the folder: --out")
    notes = [f"{len(problems)} records cannot be read and are left out"] if problems else []
    notes += [clean(problem, 300) for problem in problems[:MOST_NAMED]]
    invalid = [record for record in records if record.status != "ok"]
    if invalid:
        named = ", ".join(record.id for record in invalid[:MOST_NAMED])
        notes.append(f"{len(invalid)} INVALID runs are left out: {named}{' ...' * (len(invalid) > MOST_NAMED)}")
    envelopes: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.status == "ok":
            envelopes[record.envelope.digest].append(record)
    findings: list[Finding] = []
    for digest, members in envelopes.items():
        findings += _envelope(digest, members, notes, since)
    return _verdict(findings, len(records) - len(invalid), notes)


def _envelope(digest: str, records: Sequence[Record], notes: list[str], since: date | None) -> Iterator[Finding]:
    envelope = records[0].envelope
    title = f"{clean(envelope.task)} / {clean(envelope.backbone)} / {digest[:6]}"
    notes += [f"{title}: {hole}" for hole in _holes([created(record) for record in records])]
    floor = _floor(records)
    cells: dict[tuple[str, ...], list[tuple[Record, Arm]]] = defaultdict(list)
    for record in records:
        for arm in record.arms:
            cells[arm.kind, arm.control, arm.spec, arm.phase].append((record, arm))
    short: list[int] = []  # runs of each history that is too short to be judged
    for (kind, control, _, _), runs in cells.items():
        name = f"{title} / {clean(runs[-1][1].name)}"
        absent = len(records) - sum(arm.status == "ok" for _, arm in runs)
        if absent and len(records) >= LEAST:
            yield Finding(name, "history", "NOTE", f"missing or FAILED in {absent} of {len(records)} runs")
        yield from _exact(name, runs, since)
        if kind == "baseline" or control == "noop":
            continue
        for field, figure in SPEEDUPS.items():
            yield from _speed(name, field, figure, runs, floor, since, short)
    if short:
        few = " to ".join(map(str, sorted({min(short), max(short)})))
        said = f"{few} run{'s' * (max(short) > 1)} of each, and {LEAST} are needed to tell a change"
        yield Finding(f"{title} / {len(short)} histories", "speed-ups", "NOTE", said)


def _speed(
    name: str,
    field: str,
    figure: str,
    runs: Sequence[tuple[Record, Arm]],
    floor: float,
    since: date | None,
    short: list[int],
) -> Iterator[Finding]:
    points, repeated, impossible = [], 0, 0
    seen = set()
    for record, arm in runs:
        speedup: Speedup | None = getattr(arm, field)
        if arm.status != "ok" or speedup is None:
            continue
        key = (created(record), speedup.value)
        if speedup.value <= 0:
            impossible += 1
        elif key in seen:
            repeated += 1
        else:
            points.append(_point(record, speedup))
        seen.add(key)
    if repeated:
        yield Finding(name, figure, "NOTE", f"{repeated} runs are copies of another one and count once")
    if impossible:
        yield Finding(name, figure, "NOTE", f"{impossible} runs hold an impossible speed-up and are left out")
    if not points:
        return
    if len(points) < LEAST:
        short.append(len(points))
        return
    found = changes(points, floor)
    for change in found:
        known = since is not None and change.first.when.date() < since
        said = change.said + (f"; before {since}, so it is known" if known else "")
        yield Finding(name, figure, "NOTE" if known else "CHANGED", said, str(change.before), str(change.after))
    if not found:
        low, high = (math.exp(end([point.value for point in points])) for end in (min, max))
        yield Finding(name, figure, "PASS", f"no change in {len(points)} runs, {low:.3f}x to {high:.3f}x")


def _point(record: Record, speedup: Speedup) -> Point:
    sd = 0.0
    if speedup.low is not None and speedup.high is not None and 0 < speedup.low <= speedup.high:
        sd = math.log(speedup.high / speedup.low) / (2 * 1.96)
    return Point(created(record), record.id, record.provenance.commit, math.log(speedup.value), sd)


def _exact(name: str, runs: Sequence[tuple[Record, Arm]], since: date | None) -> Iterator[Finding]:
    """Figures that come out the same each time: every run that differs from the one before is told."""
    for figure, read in (
        ("test FLOPs", lambda arm: arm.test_flops.dense if arm.test_flops else None),
        ("weight bytes", lambda arm: arm.weight_bytes or None),
    ):
        known = [(record, value) for record, arm in runs if arm.status == "ok" and (value := read(arm)) is not None]
        for (last, old), (first, new) in zip(known, known[1:], strict=False):
            if old != new:
                ends = [Point(created(each), each.id, each.provenance.commit, 0.0).said for each in (last, first)]
                passed = since is not None and created(first).date() < since
                said = f"{100 * (new / old - 1):+.3g} % " if old else ""
                said += f"between {ends[0]} and {ends[1]}"
                yield Finding(name, figure, "NOTE" if passed else "CHANGED", said, f"{old:,}", f"{new:,}")


def _floor(records: Sequence[Record]) -> float:
    """Relative speed-up that `noop` exceeds in one run of twenty."""
    found = [noop.test_speedup.value for record in records if (noop := record.control("noop")) and noop.test_speedup]
    found = [abs(math.log(value)) for value in found if value > 0]
    return math.expm1(min(float(np.percentile(found, 95)), 700.0)) if len(found) >= SEGMENT else 0.0


def _holes(times: Sequence[datetime]) -> list[str]:
    """Where far more time passed between two runs than usually does."""
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    if len(times) < LEAST:
        return []
    usual = sorted(gaps)[len(gaps) // 2]
    limit = max(HOLE * usual, timedelta(days=1))
    return [
        f"no run between {times[place]:%Y-%m-%d} and {times[place + 1]:%Y-%m-%d} ({gap.days} days; usually "
        f"{usual.total_seconds() / 86400:.1f}): a change in there cannot be placed better"
        for place, gap in enumerate(gaps)
        if gap > limit
    ]


def _verdict(findings: list[Finding], runs: int, notes: list[str]) -> Outcome:
    judged = [finding for finding in findings if finding.verdict in ("PASS", "CHANGED")]
    changed = [finding for finding in findings if finding.verdict == "CHANGED"]
    if changed:
        cells = len({finding.cell for finding in changed})
        count = f"{len(changed)} change{'s' * (len(changed) > 1)} in {cells} cell{'s' * (cells > 1)}"
        said = f"{count}; what is accepted is kept quiet with --since DAY"
        return Outcome(TITLE, "CHANGED", said, tuple(findings), tuple(notes), 1)
    if not judged:
        said = f"no cell has {LEAST} runs that can be compared, so nothing could be told"
        return Outcome(TITLE, "INVALID", said, tuple(findings), tuple(notes), InvalidError.exit_code)
    cells = len({finding.cell for finding in judged})
    return Outcome(
        TITLE, "SAME", f"no change in the history of {cells} cells, {runs} runs", tuple(findings), tuple(notes)
    )
