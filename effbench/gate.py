"""The gate: whether a run's deterministic figures are those of a reference record. Reads records, needs no torch.

FLOPs, tokens, bytes and numbers of weights come out the same on every machine and at every load, so they are compared
exactly: a figure that changed by one unit has a cause in the code. What a model computes and how good it is are
compared exactly too where they can be, and within a stated tolerance elsewhere (`effbench.gate_quality`). Times are
not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from effbench.errors import InvalidError
from effbench.findings import Finding, Outcome
from effbench.gate_quality import computed, computing, quality
from effbench.records import Arm, Envelope, Record, kind_of_device
from effbench.report.figures import by_layer
from effbench.report.markdown import clean

TITLE = "effbench gate"
#: of the protocol, what these figures do not depend on: the machine, and how long it is timed
MACHINE = {"device", "threads", "timing_batch", "timing_pairs"}
TRAINING = {"epochs", "batch_size", "lr", "weight_decay", "dev_checks", "warmup", "schedule"}
TRAINING |= {"engine", "zero_stage", "processes"}
RENEW = "make a new reference if this is meant"


@dataclass(frozen=True)
class Change:
    """A figure of an arm that is not as in the reference; `old` and `new` are None where it is not recorded."""

    arm: str
    figure: str
    old: Any
    new: Any
    said: str = ""

    @property
    def percent(self) -> float | None:
        """new / old - 1 in per cent; None for what is no number."""
        numbers = all(type(value) in (int, float) for value in (self.old, self.new)) and self.old
        return 100 * (self.new / self.old - 1) if numbers else None

    @property
    def lower(self) -> bool:
        """Less of it is computed, stored or kept."""
        if isinstance(self.old, tuple) and isinstance(self.new, tuple):
            return sum(self.new) < sum(self.old)
        return type(self.old) is int and type(self.new) is int and self.new < self.old


@dataclass(frozen=True)
class Comparison:
    """What came out: every changed figure, how many were compared, all findings, and what a reader should know."""

    changes: tuple[Change, ...]
    arms: int
    figures: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return int(bool(self.changes))

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.changes:
            return f"SAME: {self.figures} figures of {self.arms} arms are those of the reference"
        lower = sum(change.lower for change in self.changes)
        how = f"{lower} of them lower: an improvement still needs a new reference" if lower else "none of them lower"
        return f"CHANGED: {len(self.changes)} of {self.figures} figures are not those of the reference, {how}"

    def outcome(self, *more: str) -> Outcome:
        """As the reports take it, with further notes."""
        verdict, _, said = self.verdict.partition(": ")
        return Outcome(TITLE, verdict, said, self.findings, (*self.notes, *more), self.exit_code)


class Incomparable(InvalidError):
    """The two records cannot be compared; `findings` names every reason."""

    def __init__(self, findings: list[Finding], hint: str) -> None:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        super().__init__(findings[0].said + more, hint)
        self.findings = tuple(findings)


def compare(reference: Record, run: Record) -> Comparison:
    """Compare a run's deterministic figures with a reference's, arm by arm.

    Raises:
        InvalidError: the two cannot be compared: another task, data, backbone, weights or protocol (as far as these
            figures depend on it), an arm that is missing, or one that failed.
    """
    _same_question(reference.envelope, run.envelope)
    expected, found = _arms(reference, "the reference"), _arms(run, "the run")
    gone = [old for key, old in expected.items() if key not in found]
    if gone:
        said = [f"the run has no arm {clean(old.name)}, which the reference has" for old in gone]
        raise Incomparable([_invalid(old.name, "arm", text) for old, text in zip(gone, said, strict=True)], RENEW)
    notes, changes, passed = [], [], []
    unknown: dict[tuple[str, str], list[str]] = {}
    if reference.id == run.id:
        notes.append(f"both records have the id {reference.id}")
    if run.status != "ok":
        notes.append(f"the run is {run.status} ({clean(run.why_invalid)}); what is compared here does not depend on it")
    for arm in (arm for key, arm in found.items() if key not in expected):
        unknown.setdefault(("arm", "not in the reference, so not compared"), []).append(arm.name)
    for key, old in expected.items():
        new, name = found[key], clean(old.name)
        for figure, was, now, said, verdict in _compared(reference, run, old, new):
            if verdict == "NOTE":
                unknown.setdefault((figure, said), []).append(old.name)
            elif verdict == "CHANGED":
                changes.append(Change(name, figure, was, now, said))
            else:
                passed.append(Finding(name, figure, "PASS", said))
    findings = [
        Finding(change.arm, change.figure, "CHANGED", reason(change), *shown_beside(change.old, change.new))
        for change in changes
    ]
    findings += [Finding(", ".join(arms), figure, "NOTE", said) for (figure, said), arms in unknown.items()]
    return Comparison(tuple(changes), len(expected), len(changes) + len(passed), (*findings, *passed), tuple(notes))


def reason(change: Change) -> str:
    """By how much a figure changed, or what it means."""
    amount = "" if change.percent is None else f"{change.percent:+.3g} %"
    return "; ".join(filter(None, (amount, change.said)))


def shown(value: Any) -> str:
    """A figure as text."""
    match value:
        case None:
            return "not recorded"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.7g}"
        case tuple():
            return by_layer(value)
        case dict():
            return ", ".join(f"{clean(name)} {count:,}" for name, count in sorted(value.items())) or "none"
        case frozenset():
            return " + ".join(sorted(map(clean, value))) or "none"
    return clean(str(value))


def shown_beside(old: Any, new: Any) -> tuple[str, str]:
    """Two values of one figure as text; of two tables only the entries that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        differ = [key for key in {**old, **new} if old.get(key, 0) != new.get(key, 0)]
        old, new = ({key: each.get(key, 0) for key in differ} for each in (old, new))
    return shown(old), shown(new)


def _compared(reference: Record, run: Record, old: Arm, new: Arm) -> Iterator[tuple[str, Any, Any, str, str]]:
    """Each figure of an arm: its name, both values, what is said, and PASS, CHANGED or NOTE."""
    same_device = kind_of_device(reference.envelope.protocol.device) == kind_of_device(run.envelope.protocol.device)
    same_libraries = computing(reference.provenance) == computing(run.provenance)
    for (figure, was), (_, now) in zip(_figures(old), _figures(new), strict=True):
        if was is None:
            if now is not None:
                yield figure, was, now, "the reference does not have it, so it is not compared", "NOTE"
        elif figure == "attention" and not same_device:
            yield figure, was, now, "measured on another kind of device, so not compared", "NOTE"
        elif figure == "operations" and not (same_device and same_libraries):
            what = "set of library versions" if same_device else "kind of device"
            yield figure, was, now, f"measured with another {what}, so not compared", "NOTE"
        else:
            yield figure, was, now, "", "PASS" if was == now else "CHANGED"
    yield from computed(reference, run, old, new)
    yield from quality(reference, run, old, new)


def _same_question(reference: Envelope, run: Envelope) -> None:
    """Refuse another envelope, naming every field that differs and that these figures depend on."""
    untrained = reference.protocol.train == "none" and reference.protocol.captioning is None
    ignored = MACHINE | (TRAINING if untrained else set())
    pairs = [
        (name, getattr(reference, name), getattr(run, name))
        for name in Envelope.model_fields
        if name not in ("protocol", "device_model")
    ]
    pairs += [
        (name, getattr(reference.protocol, name), getattr(run.protocol, name))
        for name in type(run.protocol).model_fields
        if name not in ignored
    ]
    differ = [
        _invalid(
            "envelope",
            name,
            f"the reference answers another question: {name} is {clean(str(was))} there and {clean(str(now))} here",
            clean(str(was)),
            clean(str(now)),
        )
        for name, was, now in pairs
        if was != now
    ]
    if differ:
        raise Incomparable(differ, "run with the reference's settings, or make a new reference")


def _arms(record: Record, name: str) -> dict[tuple[str, ...], Arm]:
    arms = {(arm.kind, arm.control, arm.spec, arm.phase): arm for arm in record.arms}
    if len(arms) < len(record.arms):
        raise InvalidError(f"{name} has the same arm twice", "restore or delete it")
    failed = [arm for arm in arms.values() if arm.status != "ok"]
    if failed:
        said = [f"{clean(arm.name)} {_how(arm)} in {name}: {clean(arm.error)}" for arm in failed]
        hint = f"effbench show {record.id}" if name == "the run" else "make a new one"
        raise Incomparable([_invalid(arm.name, "arm", text) for arm, text in zip(failed, said, strict=True)], hint)
    return arms


def _how(arm: Arm) -> str:
    return "failed" if arm.status == "FAILED" else f"is {arm.status}"


def _invalid(cell: str, figure: str, said: str, old: str = "", new: str = "") -> Finding:
    return Finding(clean(cell), figure, "INVALID", said, old, new)


def _figures(arm: Arm) -> Iterator[tuple[str, Any]]:
    """The figures that are compared exactly, always in the same order; None is what was not recorded."""
    for phase, flops in (("test", arm.test_flops), ("train", arm.train_flops)):
        for name, field in (
            ("FLOPs", "dense"),
            ("useful FLOPs", "useful"),
            ("low-bit operations", "low_bit"),
            ("overhead FLOPs", "overhead"),
            ("FLOPs complete", "complete"),
        ):
            yield f"{phase} {name}", getattr(flops, field) if flops is not None else None
    yield "tokens", arm.tokens or None
    yield "weight bytes", arm.weight_bytes
    yield "parameters", arm.parameters
    yield "trained parameters", arm.trained_parameters
    yield "bytes by dtype", arm.structure.dtypes if arm.structure else None
    yield "attention", frozenset(arm.kernels.attention) if arm.kernels else None
    yield "operations", arm.census or None
