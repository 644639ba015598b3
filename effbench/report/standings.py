"""The standings of an envelope: which measurement stands for an arm, its place, the front, and who lost to a control.

Only arms of one envelope are ranked together. Of equal arms (same kind, control, stack and phase) the newest
measurement that did not fail is the one that is shown.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from effbench.records import Arm, Envelope, Interval, Record, Versus
from effbench.report import figures, pareto
from effbench.store import created

#: blind controls that a method has to beat at its own budget, else it stands below the line
BLIND = ("random", "resize")
EQUAL = 0.01  # FLOPs that differ by less are the same
HISTORY = 100  # measurements of an arm that are remembered
Key = tuple[str, str, str, str]  # kind, control, spec, phase: what makes two arms of an envelope the same


@dataclass(frozen=True)
class Standing:
    """An arm as it is shown.

    Args:
        arm, record: the newest measurement that did not fail, and the record that it comes from.
        count: valid records of the envelope that hold this arm.
        front: whether it is on the Pareto front of test speed-up and lossy-ness of the primary metric.
        probability: of being there, by the recorded intervals; None where it is not placed (`pareto.point`).
        below: of BLIND, the controls that the method was compared with at an equal budget and not shown to beat;
            `judged` says which of them it is worse than.
    """

    arm: Arm
    record: Record
    count: int
    front: bool = False
    probability: float | None = None
    below: tuple[str, ...] = ()


class Past(NamedTuple):
    """One measurement of an arm, for its history; None where a figure or its interval is missing."""

    run: str
    created: datetime
    status: str
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    verdict: str
    lossiness: float | None
    lossiness_low: float | None
    lossiness_high: float | None


class Brief(NamedTuple):
    """What has to be known of a record to place it, when it is not held in memory."""

    id: str
    created: datetime
    envelope: Envelope
    digest: str
    metric: str
    why_invalid: str | None  # None: valid
    arms: dict[Key, Past]


@dataclass(frozen=True)
class Section:
    """One envelope.

    Args:
        records: the valid records that rows come from, oldest first.
        invalid: the newest INVALID ones (`HISTORY` at most), oldest first, as (id, why).
        rows: baseline, methods by test speed-up (those below the line last), controls.
        runs, invalid_runs: how many records there are, shown or not.
        history: by arm (`key`) its newest `HISTORY` measurements, oldest first.
        digest, newest: of the envelope; when its newest record was made.
        metric: the primary one. anchor: names the section, see `arrange`.
    """

    envelope: Envelope
    records: list[Record]
    invalid: list[tuple[str, str]]
    rows: list[Standing]
    runs: int = 0
    invalid_runs: int = 0
    history: dict[Key, list[Past]] = field(default_factory=dict)
    digest: str = ""
    newest: datetime = datetime.min.replace(tzinfo=UTC)
    metric: str = ""
    anchor: str = ""


def sections(records: Iterable[Record]) -> list[Section]:
    """The envelopes of some records: real data before drawn ones, by task, newest first."""
    held = {record.id: record for record in records}
    return [section(group, held.__getitem__) for group in arrange(brief(record) for record in held.values())]


def key(arm: Arm) -> Key:
    """What makes two arms of an envelope the same."""
    return arm.kind, arm.control, arm.spec, arm.phase


def brief(record: Record, known: dict[str, tuple[str, Envelope]] | None = None) -> Brief:
    """What places a record.

    Args:
        known: envelopes that were met before with their digests, so that equal ones are one object and hashed once.
    """
    when = created(record)

    def past(arm: Arm) -> Past:
        metric = arm.metrics.get(record.primary_metric)
        speed, loss = arm.test_speedup, metric and metric.lossiness
        return Past(record.id, when, arm.status, *_bounds(speed), speed.verdict if speed else "", *_bounds(loss))

    why = None if record.status == "ok" else record.why_invalid
    arms = {key(arm): past(arm) for arm in record.arms}
    known, text = {} if known is None else known, record.envelope.model_dump_json()
    if text not in known:
        known[text] = record.envelope.digest, record.envelope
    digest, envelope = known[text]
    return Brief(record.id, when, envelope, digest, record.primary_metric, why, arms)


def _bounds(figure: Interval | None) -> tuple[float | None, float | None, float | None]:
    return (figure.value, figure.low, figure.high) if figure else (None, None, None)


@dataclass
class Group:
    """What is remembered of an envelope while records pass by; `section` makes its rows."""

    envelope: Envelope
    digest: str
    metric: str
    newest: tuple[datetime, str]
    anchor: str = ""
    runs: int = 0
    invalid_runs: int = 0
    invalid: list[tuple[datetime, str, str]] = field(default_factory=list)
    best: dict[Key, tuple[bool, datetime, str]] = field(default_factory=dict)
    count: dict[Key, int] = field(default_factory=lambda: defaultdict(int))
    history: dict[Key, list[Past]] = field(default_factory=lambda: defaultdict(list))


def arrange(briefs: Iterable[Brief]) -> list[Group]:
    """The envelopes of records that need not fit into memory, in the order of `sections`.

    Records of one envelope that are judged by different metrics are apart (a task's author may choose another one). The
    newest of such groups has the envelope's digest for its anchor, an older one a number after it.

    Args:
        briefs: of all records, in any order; they are not kept.
    """
    groups: dict[tuple[str, str], Group] = {}
    for each in briefs:
        when = each.created, each.id
        group = groups.get((each.digest, each.metric))
        if group is None:
            group = Group(each.envelope, each.digest, each.metric, when)
            groups[each.digest, each.metric] = group
        group.newest = max(group.newest, when)
        if each.why_invalid is not None:
            group.invalid_runs += 1
            _remember(group.invalid, (*when, each.why_invalid))
            continue
        group.runs += 1
        for name, past in each.arms.items():
            group.count[name] += 1
            group.best[name] = max(group.best.get(name, (False, *when)), (past.status == "ok", *when))
            _remember(group.history[name], past)
    order = sorted(groups.values(), key=lambda group: group.newest, reverse=True)
    met: Counter[str] = Counter()
    for group in order:
        met[group.digest] += 1
        group.anchor = f"{group.digest}-{met[group.digest]}" if met[group.digest] > 1 else group.digest
    return sorted(order, key=lambda group: (group.envelope.synthetic, group.envelope.task))


def _remember(past: list, new: tuple) -> None:
    """Append, and now and then drop all but the newest."""
    past.append(new)
    if len(past) >= 4 * HISTORY:
        past.sort(key=_when)
        del past[:-HISTORY]


def _when(each: tuple) -> tuple:
    return (each.created, each.run) if isinstance(each, Past) else each[:2]


def section(group: Group, read: Callable[[str], Record]) -> Section:
    """The rows of an envelope.

    Args:
        read: gives a record by id; asked only for those that rows come from.
    """
    ids = sorted({(created, name) for _, created, name in group.best.values()})
    records = {name: read(name) for _, name in ids}
    arms = {name: {key(arm): arm for arm in record.arms} for name, record in records.items()}
    rows = [Standing(arms[run][name], records[run], group.count[name]) for name, (_, _, run) in group.best.items()]
    invalid = sorted(group.invalid)[-HISTORY:]
    return Section(
        envelope=group.envelope,
        records=list(records.values()),
        invalid=[(name, why) for _, name, why in invalid],
        rows=ranked(rows),
        runs=group.runs,
        invalid_runs=group.invalid_runs,
        history={name: sorted(past, key=_when)[-HISTORY:] for name, past in group.history.items()},
        digest=group.digest,
        newest=group.newest[0],
        metric=group.metric,
        anchor=group.anchor,
    )


def ranked(rows: list[Standing]) -> list[Standing]:
    """Rows of one envelope in the order of the ranking, with the front and what stands below the line."""
    meaningless = any(figures.untaught(row.record.envelope) for row in rows)
    points = [None if meaningless else pareto.point(row.arm, row.record.primary_metric) for row in rows]
    placed = [each for each in points if each]
    on, sure = iter(pareto.front(placed)), iter(pareto.probability(placed))
    rows = [
        Standing(
            row.arm,
            row.record,
            row.count,
            front=bool(each) and next(on),
            probability=next(sure) if each else None,
            below=() if meaningless else _below(row),
        )
        for row, each in zip(rows, points, strict=True)
    ]

    def rank(row: Standing) -> tuple:
        arm, figure = row.arm, row.arm.test_speedup
        place = figures.place(arm.control) if arm.kind == "control" else 0
        speed = -figure.value if figure else 0.0
        return figures.KINDS.index(arm.kind), place, bool(row.below), arm.status != "ok", speed, arm.name

    return sorted(rows, key=rank)


def _below(row: Standing) -> tuple[str, ...]:
    if row.arm.kind != "method" or row.arm.status != "ok" or row.arm.no_quality:
        return ()
    return tuple(control for control in BLIND if judged(row.arm, row.record, control) not in (None, "BETTER"))


def judged(arm: Arm, record: Record, control: str) -> str | None:
    """BETTER, WORSE or NO DIFFERENCE SHOWN against a blind control at the same budget; None where none was compared.

    Of several comparisons with one control (several budgets) all have to agree. One with the arm itself, or whose
    control took other FLOPs than the arm, is none at the same budget.
    """
    verdicts = {
        each.verdict
        for each in arm.versus
        if each.control == control and each.arms != (arm.name,) and excess(each, arm, record) is None
    }
    if len(verdicts) > 1:
        return "NO DIFFERENCE SHOWN"
    return verdicts.pop() if verdicts else None


def excess(found: Versus, arm: Arm, record: Record) -> float | None:
    """FLOPs of the one arm of a control at the same FLOPs / the arm's; None where they are the same."""
    if found.control != "resize" or len(found.arms) != 1:
        return None
    flops = {each.name: each.test_flops.work for each in record.arms if each.test_flops}
    if not flops.get(arm.name):
        return None
    share = flops.get(found.arms[0], 0) / flops[arm.name]
    return share if abs(share - 1) > EQUAL else None
