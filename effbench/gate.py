"""The gate: whether a run's deterministic figures are those of a reference record. Reads records, needs no torch.

FLOPs, tokens, bytes and numbers of weights come out the same on every machine and at every load, so they are compared
exactly: a figure that changed by one unit has a cause in the code. Times and quality are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from effbench.errors import InvalidError
from effbench.records import Arm, Envelope, Record
from effbench.report.figures import by_layer
from effbench.report.markdown import clean

ENVELOPE = ("task", "data", "data_fingerprint", "split", "backbone", "weights")
PROTOCOL = ("train", "head", "image_size", "precision", "data_share")
TRAINING = ("epochs", "batch_size", "engine", "zero_stage", "processes")
RENEW = "make a new reference if this is meant"


@dataclass(frozen=True)
class Change:
    """A figure of an arm that is not as in the reference; `old` and `new` are None where it is not recorded."""

    arm: str
    figure: str
    old: Any
    new: Any

    @property
    def percent(self) -> float | None:
        """new / old - 1 in per cent; None for what is no number."""
        numbers = type(self.old) is int and type(self.new) is int and self.old
        return 100 * (self.new / self.old - 1) if numbers else None

    @property
    def lower(self) -> bool:
        """Less of it is computed, stored or kept."""
        if isinstance(self.old, tuple) and isinstance(self.new, tuple):
            return sum(self.new) < sum(self.old)
        return type(self.old) is int and type(self.new) is int and self.new < self.old


@dataclass(frozen=True)
class Comparison:
    """What came out: every changed figure, how many were compared, and what a reader should know."""

    changes: tuple[Change, ...]
    arms: int
    figures: int
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


def compare(reference: Record, run: Record) -> Comparison:
    """Compare a run's deterministic figures with a reference's, arm by arm.

    Raises:
        InvalidError: the two cannot be compared: another task, data, backbone, weights or protocol (as far as these
            figures depend on it), an arm that is missing, or one that failed.
    """
    _same_question(reference.envelope, run.envelope)
    expected, found = _arms(reference, "the reference"), _arms(run, "the run")
    notes = []
    if reference.id == run.id:
        notes.append(f"both records have the id {reference.id}")
    if run.status != "ok":
        notes.append(f"the run is {run.status} ({clean(run.why_invalid)}); what is compared here does not depend on it")
    for arm in (arm for key, arm in found.items() if key not in expected):
        notes.append(f"{clean(arm.name)} is not in the reference: not compared")
    changes, unknown = [], {}
    compared = 0
    same_device = reference.envelope.protocol.device == run.envelope.protocol.device
    for key, old in expected.items():
        if key not in found:
            raise InvalidError(f"the run has no arm {clean(old.name)}, which the reference has", RENEW)
        for (figure, was), (_, now) in zip(_figures(old), _figures(found[key]), strict=True):
            if figure == "attention" and not same_device:
                continue
            if was is None:
                unknown |= {figure: None} if now is not None else {}
                continue
            compared += 1
            if was != now:
                changes.append(Change(clean(old.name), figure, was, now))
    if unknown:
        notes.append(f"not in the reference, so not compared: {', '.join(unknown)}")
    return Comparison(tuple(changes), len(expected), compared, tuple(notes))


def shown(value: Any) -> str:
    """A figure as text."""
    match value:
        case None:
            return "not recorded"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case tuple():
            return by_layer(value)
        case dict():
            return ", ".join(f"{clean(name)} {count:,}" for name, count in sorted(value.items()))
        case frozenset():
            return " + ".join(sorted(map(clean, value)))
    return clean(str(value))


def _same_question(reference: Envelope, run: Envelope) -> None:
    """Refuse another envelope, naming the first field that differs and that these figures depend on."""
    protocol = PROTOCOL + (TRAINING if reference.protocol.train != "none" else ())
    pairs = [(name, getattr(reference, name), getattr(run, name)) for name in ENVELOPE]
    pairs += [(name, getattr(reference.protocol, name), getattr(run.protocol, name)) for name in protocol]
    for name, was, now in pairs:
        if was != now:
            raise InvalidError(
                f"the reference answers another question: {name} is {clean(str(was))} there and {clean(str(now))} here",
                "run with the reference's settings, or make a new reference",
            )


def _arms(record: Record, name: str) -> dict[tuple[str, ...], Arm]:
    arms = {(arm.kind, arm.control, arm.spec, arm.phase): arm for arm in record.arms}
    if len(arms) < len(record.arms):
        raise InvalidError(f"{name} has the same arm twice", "restore or delete it")
    for arm in arms.values():
        if arm.status == "FAILED":
            hint = f"effbench show {record.id}" if name == "the run" else "make a new one"
            raise InvalidError(f"{clean(arm.name)} failed in {name}: {clean(arm.error)}", hint)
    return arms


def _figures(arm: Arm) -> Iterator[tuple[str, Any]]:
    """The deterministic figures of an arm, always in the same order; None is what was not recorded."""
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
