"""Specs: `token_prune:keep=0.5,at=3/6/9+quantize` is a stack of two methods with checked parameters.

stack  = method {"+" method}                          they apply in this order
method = name [":" parameter {"," parameter}]
parameter = [name "="] value                          only the first may leave out its name: it sets
                                                      the method's first parameter (`precision:bf16`)
value  = text; "/" separates the elements of a tuple; "none" is None
"""

from __future__ import annotations

import inspect
import math
import traceback
import types
from collections.abc import Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from effbench.errors import EffbenchError, UsageError
from effbench.method import Method
from effbench.registry import did_you_mean, methods

#: arms of every run, which no method is called
ALWAYS = ("baseline", "noop", "identity")


def parse(text: str) -> tuple[Method, ...]:
    """The stack of methods that a spec names.

    Raises:
        UsageError: unknown method or parameter, a value of the wrong type or out of range, a conflict in the stack.
        EffbenchError: the method's plugin cannot be used.
    """
    parts = [part.strip() for part in text.split("+")]
    if not all(parts):
        raise UsageError(f"a method is missing in {text!r}", "write NAME[:param=value,...], joined by + for a stack")
    stack = tuple(map(_parse_method, parts))
    check_stack(stack)
    return stack


def canonical(stack: Sequence[Method]) -> str:
    """The spec that parses back to these methods: parameters in field order, defaults left out."""
    return "+".join(_write_method(method) for method in stack)


def check_stack(stack: Sequence[Method]) -> None:
    """Refuse a method that stands twice, methods that conflict, and methods in the wrong order.

    Raises:
        UsageError: names both methods.
    """
    names = [methods.name_of(type(method)) for method in stack]
    for i, name in enumerate(names):
        for j, other in enumerate(names[:i]):
            if name == other:
                raise UsageError(f"{name} stands twice in the stack {'+'.join(names)}", "name each method once")
            if other in stack[i].conflicts or name in stack[j].conflicts:
                raise UsageError(
                    f"{other} and {name} conflict: they cannot stand in one stack",
                    f"compare them as two arms: --method {other} --method {name}",
                )
            if other in stack[i].goes_before:
                raise UsageError(f"{name} must stand before {other} in a stack", f"write {name}+{other}")


def check_parameters(method: Method) -> None:
    """Check every parameter of a method against its type, range and choices; called by `Method.__post_init__`.

    An int for a float becomes a float, a list becomes a tuple.

    Raises:
        UsageError: names the method, the parameter, the value and what would be valid.
    """
    for field, kind in _typed_parameters(type(method)).values():
        value = getattr(method, field.name)
        value = tuple(value) if isinstance(value, list) else value
        text = write(value)
        try:
            checked = _read(text, kind)
        except ValueError:
            raise _not_valid(type(method), field.name, text) from None
        # what a spec cannot say is not a value: then a record would not name its arm
        if checked != value or set(text) & set(",+") or text != text.strip() or not _in_range(checked, field):
            raise _not_valid(type(method), field.name, text)
        object.__setattr__(method, field.name, checked)
    if method.phase not in method.phases:
        raise _not_valid(type(method), "phase", method.phase)


def valid(method: type[Method], parameter: str) -> str:
    """In words, what a parameter takes: `a number, > 0, <= 1`."""
    field, kind = _typed_parameters(method)[parameter]
    limits = field.metadata
    choices = method.phases if parameter == "phase" else limits.get("choices")
    words = [_kind(kind) if choices is None else _one_of(choices)]
    signs = (("above", ">"), ("low", ">="), ("high", "<="))
    words += [f"{sign} {limits[key]}" for key, sign in signs if limits.get(key) is not None]
    return ", ".join(words)


def default(method: type[Method], parameter: str) -> Any:
    """The value that a parameter has where the spec does not name it."""
    return method.default_phase if parameter == "phase" else method.parameters()[parameter].default


def write(value: Any) -> str:
    """A parameter's value as a spec says it."""
    if isinstance(value, tuple):
        return "/".join(write(element) for element in value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return float.__repr__(value).replace("e+", "e")  # "+" separates methods
    return str(value)


def _not_valid(method: type[Method], parameter: str, text: str) -> UsageError:
    name = methods.name_of(method)
    return UsageError(
        f"{name}: {parameter}={text} is not valid; {parameter} takes {valid(method, parameter)}",
        f"effbench list methods {name}",
    )


def _typed_parameters(method: type[Method]) -> dict[str, tuple[Field, Any]]:
    try:
        hints = get_type_hints(method)
    except Exception as error:
        raise EffbenchError(
            f"{methods.name_of(method)}: the annotations of {method.__name__} cannot be read: {error}",
            "a parameter is an int, float, bool, str, Literal, a tuple[..., ...] of these, or one of these | None",
        ) from error
    return {name: (field, hints[name]) for name, field in method.parameters().items()}


def _parse_method(text: str) -> Method:
    name, colon, rest = text.partition(":")
    method = methods.get(name.strip())
    hint = f"effbench list methods {name}"
    if "__dataclass_fields__" not in vars(method) and vars(method).get("__annotations__"):
        raise EffbenchError(f"method {name} is wrong: {method.__name__} lacks @dataclass(frozen=True)", hint)
    parameters = _typed_parameters(method)
    values: dict[str, Any] = {}
    if colon and not rest.strip():
        raise UsageError(f"nothing follows the colon in {text!r}", hint)
    for i, part in enumerate(rest.split(",") if colon else []):
        key, equals, value = (x.strip() for x in part.partition("="))
        if not equals:
            if i or not key or key in parameters:
                raise UsageError(f"{name}: {part!r} is not parameter=value", hint)
            key, value = next(iter(parameters)), key
        if key not in parameters:
            raise UsageError(f"{name} has no parameter {key!r}{did_you_mean(key, list(parameters))}", hint)
        if key in values:
            raise UsageError(f"{name}: {key} is given twice", hint)
        try:
            values[key] = _read(value, parameters[key][1])
        except ValueError:
            raise _not_valid(method, key, value) from None
    try:
        return method(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {error}", hint) from error
    except EffbenchError:
        raise
    except Exception as error:  # of a plugin's __post_init__
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == inspect.getfile(method)]
        where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
        raise EffbenchError(
            f"method {name} cannot be made: {type(error).__name__}: {error}{where}", "mend it there, or its package"
        ) from error


def _write_method(method: Method) -> str:
    cls = type(method)
    values = {name: getattr(method, name) for name in cls.parameters()}
    defaults = {name: default(cls, name) for name in values} | dict(phase=method.natural_phase())
    given = [f"{name}={write(value)}" for name, value in values.items() if value != defaults[name]]
    return methods.name_of(cls) + (":" + ",".join(given) if given else "")


def _read(text: str, kind: Any) -> Any:
    """The value of type `kind` that a text says.

    Raises:
        ValueError: it says none.
    """
    options = _options(kind)
    if types.NoneType in options and text == "none":
        return None
    for option in options:
        try:
            return _read_one(text, option)
        except ValueError:
            continue
    raise ValueError(text)


def _read_one(text: str, kind: Any) -> Any:
    if kind in (int, str):
        return kind(text)
    if kind is float and math.isfinite(float(text)):
        return float(text)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if get_origin(kind) is Literal and text in (written := [write(choice) for choice in get_args(kind)]):
        return get_args(kind)[written.index(text)]
    if get_origin(kind) is tuple:
        return tuple(_read(part, get_args(kind)[0]) for part in text.split("/")) if text else ()
    raise ValueError(text)


def _options(kind: Any) -> tuple[Any, ...]:
    """The members of a union such as `int | None`."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _in_range(value: Any, field: Field) -> bool:
    """Within the declared bounds and choices; of a tuple every element, None always."""
    choices, low, high, above = (field.metadata.get(key) for key in ("choices", "low", "high", "above"))
    if choices is not None and value in choices:
        return True
    return all(
        (choices is None or element in choices)
        and (low is None or element >= low)
        and (high is None or element <= high)
        and (above is None or element > above)
        for element in (value if isinstance(value, tuple) else (value,))
        if element is not None
    )


def _kind(kind: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
    said = []
    for option in _options(kind):
        if get_origin(option) is tuple:
            said.append(f"values separated by /, each {_kind(get_args(option)[0])}")
        elif get_origin(option) is Literal:
            said.append(_one_of(get_args(option)))
        else:
            said.append(words.get(option, str(option)))
    return " or ".join(said)


def _one_of(choices: Sequence[Any]) -> str:
    *rest, last = (write(choice) for choice in choices)
    return f"{', '.join(rest)} or {last}" if rest else last
