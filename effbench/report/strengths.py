"""Arms of one method that differ in one number (keep, r, size, drop, ...): the curves of strength against cost."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from effbench import registry
from effbench.report.standings import Standing

NUMBER = re.compile(r"-?[0-9]{1,12}(\.[0-9]{1,20})?(e-?[0-9]{1,2})?")
MOST = 16  # methods in a stack, and parameters of a method, beyond which a spec is nobody's
Stack = tuple[tuple[str, dict[str, str]], ...]


class Strength(NamedTuple):
    """One arm of a curve.

    Args:
        value: of the parameter.
        arm: the arm's standing.
        control: the blind control with the same budget, from the same run; None where there is none.
    """

    value: float
    arm: Standing
    control: Standing | None


@dataclass(frozen=True)
class Curve:
    """Arms that differ in one parameter alone.

    Args:
        family: names of the stack's methods, e.g. "token_prune" or "token_merge+quantize".
        parameter: the one in which they differ; of a stack with its method, e.g. "token_merge:r".
        fixed: what else the spec says, e.g. "score=norm"; empty where all else is default.
        points: at least two, by value.
    """

    family: str
    parameter: str
    fixed: str
    points: tuple[Strength, ...]


def parsed(spec: str) -> Stack | None:
    """Methods and their written parameters, as text; None of a spec that is not in its canonical form.

    `effbench.spec.parse` would import the methods, which may need torch or not be installed here.
    """
    stack = []
    for part in spec.split("+"):
        name, colon, rest = part.partition(":")
        pairs = [each.partition("=") for each in rest.split(",")] if colon else []
        if not name.isidentifier() or not all(key.isidentifier() and value for key, _, value in pairs):
            return None
        stack.append((name, {key: value for key, _, value in pairs}))
    return tuple(stack) if len(stack) <= MOST and all(len(written) <= MOST for _, written in stack) else None


def family(spec: str) -> str:
    """The methods of a stack without their parameters: `token_merge+quantize`."""
    stack = parsed(spec)
    return "+".join(name for name, _ in stack) if stack else spec


def settings(spec: str) -> str:
    """The parameters that a spec writes: `keep=0.5`; of a stack with their methods."""
    return _settings(parsed(spec) or ())


def curves(rows: Iterable[Standing]) -> list[Curve]:
    """All curves of at least two strengths among the methods of an envelope, by method, then the longest first.

    A parameter that a spec does not write has its method's default, if that is installed here and can be read.
    """
    rows = list(rows)
    methods = [
        (row, stack)
        for row in rows
        if row.arm.kind == "method" and row.arm.status == "ok" and (stack := parsed(row.arm.spec))
    ]
    written = {(name, key) for _, stack in methods for name, given in stack for key in given}
    groups: dict[tuple[str, str, str, str], dict[float, Strength]] = defaultdict(dict)
    for row, stack in methods:
        for place, (name, given) in enumerate(stack):
            for key in sorted(each for method, each in written if method == name):
                value = number(given[key]) if key in given else defaults(name).get(key)
                if value is None:
                    continue
                others = {other: text for other, text in given.items() if other != key}
                rest = (*stack[:place], (name, others), *stack[place + 1 :])
                title = key if len(stack) == 1 else f"{name}:{key}"
                group = groups[family(row.arm.spec), title, _settings(rest), row.arm.phase]
                group.setdefault(value, Strength(value, row, control(row, stack, place)))
    found = [
        Curve(name, key, fixed, tuple(group[value] for value in sorted(group)))
        for (name, key, fixed, _), group in groups.items()
        if len(group) > 1
    ]
    return sorted(found, key=lambda curve: (curve.family, curve.parameter, -len(curve.points), curve.fixed))


def control(row: Standing, stack: Stack, place: int) -> Standing | None:
    """The random control of an arm in its own record: of several the one that stands in for the method at `place`."""
    record = row.record
    found = [arm for arm in record.arms if arm.control == "random" and row.arm.name in arm.controls_for]

    def elsewhere(spec: str) -> int:
        other = parsed(spec)
        if other is None or len(other) != len(stack):
            return len(stack)
        return sum(theirs != own for i, (theirs, own) in enumerate(zip(other, stack, strict=True)) if i != place)

    found = sorted((arm for arm in found if arm.status == "ok"), key=lambda arm: elsewhere(arm.spec))
    return Standing(found[0], record, 1) if found else None


def number(text: str) -> float | None:
    """The number that a value is, also of a tuple of one; None where it is none."""
    return float(text) if NUMBER.fullmatch(text) else None


@cache
def defaults(method: str) -> dict[str, float]:
    """A method's parameters that are numbers by default, read from its source: nothing is imported or run."""
    entries = [entry for entry in registry.methods.entries() if entry.name == method]
    if len(entries) != 1 or entries[0].file is None or entries[0].file.suffix != ".py":
        return {}
    try:
        body = ast.parse(entries[0].file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return {}
    constants: dict[str, ast.expr] = {}
    for node in body:
        for target in node.targets if isinstance(node, ast.Assign) else ():
            both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            pairs = zip(target.elts, node.value.elts, strict=False) if both else [(target, node.value)]
            constants |= {name.id: value for name, value in pairs if isinstance(name, ast.Name)}
    found = {}
    classes = [node for node in body if isinstance(node, ast.ClassDef) and entries[0].attribute in ("", node.name)]
    for node in (each for cls in classes for each in cls.body):
        call = node.value if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "param" and call.args:
            first = call.args[0]
            value = _literal(constants.get(first.id, first) if isinstance(first, ast.Name) else first)
            if value is not None:
                found[node.target.id] = value
    return found


def _literal(node: ast.expr) -> float | None:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _settings(stack: Stack) -> str:
    parts = [(name, ",".join(f"{key}={value}" for key, value in given.items())) for name, given in stack]
    if len(parts) == 1:
        return parts[0][1]
    return " + ".join(f"{name}:{given}" for name, given in parts if given)
