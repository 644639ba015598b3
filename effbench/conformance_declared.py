"""What a method says of itself, and whether it holds: documentation, the names that it gives, parameter ranges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, distribution
from inspect import getdoc
from typing import TYPE_CHECKING, Any

from effbench.errors import UsageError
from effbench.method import PHASES, Method
from effbench.outcomes import Fault, NotChecked
from effbench.registry import methods
from effbench.spec import canonical, parse, valid, write

if TYPE_CHECKING:
    from effbench.conformance import Case

CLAIMS = ("tokens", "per image", "per batch", "random", "neighbours")


def documentation(case: Case) -> str:
    """Its class has a summary, its algorithm a source, every parameter a line of help, its package a README."""
    cls = type(case.method)
    missing = []
    if not (cls.__dict__.get("__doc__") or "").strip() or (getdoc(cls) or "").startswith(f"{cls.__name__}("):
        missing.append("a docstring of the class, whose first line lists show")
    if not cls.source.strip():
        missing.append("`source`, where the algorithm is published")
    missing += [
        f"help of the parameter {name}"
        for name, field in cls.parameters().items()
        if not str(field.metadata.get("help", "")).strip()
    ]
    try:
        readme = distribution(case.entry.distribution).metadata.get("Description", "")
    except PackageNotFoundError:
        readme = None
    if readme is not None and not str(readme).strip():
        missing.append(f'a README of {case.entry.distribution} (readme = "README.md" in its pyproject.toml)')
    if missing:
        raise Fault(f"missing: {'; '.join(missing)}", "write it: people choose a method by what it says of itself")
    return f"summary, source, help of {len(cls.parameters()) - 1} parameters" + ", README" * (readme is not None)


def names_that_it_gives(case: Case) -> str:
    """Conflicts, order, phases and claims name what there is; its spec and its controls' can be written and read."""
    method = case.method
    known, wrong = set(methods.names()), []
    for what, given, allowed in (
        ("conflicts", method.conflicts, known),
        ("goes_before", method.goes_before, known),
        ("phases", method.phases, PHASES),
        ("default_phase", (method.default_phase,), method.phases),
        ("claims", method.claims, CLAIMS),
    ):
        if isinstance(given, str):
            raise Fault(f"{what} is the text {given!r}, not a tuple of names", f'write {what} = ("{given}",)')
        wrong += [f"{what} names {name!r}" for name in given if name not in allowed]
    if wrong:
        raise Fault("; ".join(wrong), f"methods: effbench list methods; claims: {', '.join(CLAIMS)}")
    controls = method.controls()
    for each in (method, *controls.values()):
        spec = canonical((each,))
        if parse(spec) != (each,):
            raise Fault(f"{spec} is read back as another method", "let every parameter be a field, made by param()")
    judged = f", judged by {', '.join(controls)}" if controls else ""
    return f"phase {method.phase} of {'/'.join(method.phases)}{judged}"


def parameter_ranges(case: Case) -> str:
    """What lies in each range is taken, at its ends and between; what lies beyond is refused, before any work."""
    cls, own_rules, tried = type(case.method), [], 0
    bare = [name for name, field in cls.parameters().items() if name != "phase" and not _limited(cls, name, field)]
    for name, field in cls.parameters().items():
        if name == "phase":
            continue
        for value, within in _edges(field):
            tried += 1
            said = _refusal(case.method, name, value)
            shown = f"{name}={write(value)}"
            if within and said and "is not valid" in said:
                raise Fault(f"{shown} lies in the declared range and is refused: {said}", "mend the range or the check")
            if not within and not said:
                raise Fault(
                    f"{shown} is taken, but {name} takes {valid(cls, name)}",
                    "if the class has a __post_init__, let it call super().__post_init__() first",
                )
            if within and said:
                own_rules.append(shown)
    rules = f"; refused by rules of its own beside the other parameters: {', '.join(own_rules)}" if own_rules else ""
    unbound = f"; no limits declared: {', '.join(bare)}" if bare else ""
    if not tried:
        raise NotChecked(f"no parameter declares limits{unbound}")
    return f"{tried} values in the ranges and beyond{rules}{unbound}"


def _limited(cls: type[Method], name: str, field: Any) -> bool:
    limits = any(field.metadata.get(key) is not None for key in ("low", "high", "above", "choices"))
    return limits or valid(cls, name).startswith("true or false")


def _edges(field: Any) -> Iterator[tuple[Any, bool]]:
    """Values at the ends of a parameter's range, between and beyond, and whether each lies within."""
    limits = {key: field.metadata.get(key) for key in ("low", "high", "above", "choices")}
    several = isinstance(field.default, tuple) or "tuple" in str(field.type)
    for key, value, within in (
        *(("choices", choice, True) for choice in limits["choices"] or ()),
        *(("choices", "no-such-choice", False) for _ in (limits["choices"] or ())[:1]),
        ("low", limits["low"], True),
        ("low", _beyond(limits["low"], -1), False),
        ("above", limits["above"], False),
        ("high", limits["high"], True),
        ("high", _beyond(limits["high"], 1), False),
        *(("high", value, True) for value in _between(limits, "float" not in str(field.type))),
    ):
        if limits[key] is not None:
            yield (value,) if several and not isinstance(value, tuple) else value, within


def _between(limits: dict[str, Any], whole: bool) -> list[float]:
    """A quarter, a half and three quarters of the way from one end to the other; or the whole numbers there."""
    low = limits["low"] if limits["low"] is not None else limits["above"]
    if low is None or limits["high"] is None:
        return []
    way = limits["high"] - low
    if whole:
        return sorted({low + way * part // 4 for part in (1, 2, 3)} - {low, limits["high"]})
    return [low + way * part / 4 for part in (1, 2, 3)]


def _beyond(limit: float | None, way: int) -> float | None:
    return None if limit is None else limit + way * max(1, abs(limit))


def _refusal(method: Method, name: str, value: Any) -> str:
    """What a method says to a value; empty where it takes it."""
    try:
        type(method)(**_values(method) | {name: value})
    except UsageError as refused:
        return str(refused)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise Fault(
                f"{name} cannot be given: {error}", "decorate the class with @dataclass(frozen=True)"
            ) from error
        raise
    return ""


def _values(method: Method) -> dict[str, Any]:
    values = {field.name: getattr(method, field.name) for field in fields(method) if field.init}
    return values if method.phase != method.natural_phase() else values | dict(phase="")
