"""`effbench check`: finds the plugin, puts it on a tiny model that it fits, and runs the checks of its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.errors import UsageError
from effbench.outcomes import Outcome, judge
from effbench.registry import Entry, Registry, backbones, methods, tasks

if TYPE_CHECKING:
    from effbench.conformance_model import Bed

Progress = Callable[[str, int, int], None]


def silent(description: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Report:
    """What was found of one plugin.

    Args:
        kind: "method" or "task"; name: as registered; distribution: that brings it.
        spec: of a method, with its parameters.
        on: what it was checked on.
    """

    kind: str
    name: str
    distribution: str
    spec: str
    on: str
    outcomes: list[Outcome]

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.result == "FAIL"]


def check_method(
    spec: str, backbone: str | None = None, task: str | None = None, progress: Progress = silent
) -> Report:
    """Check a method on the first tiny model that it fits.

    Args:
        spec: NAME, or NAME:parameter=value,... of one method.
        backbone: FAMILY:NAME in place of the tiny towers, with random weights.
        task: whose own model it is put on; None for two towers, then a captioner.

    Raises:
        UsageError: no such method or parameter, or it fits none of the models.
    """
    from effbench.conformance import CHECKS, Case
    from effbench.spec import canonical, parse

    stack = parse(spec)
    if len(stack) != 1:
        raise UsageError(f"{spec} names {len(stack)} methods", "check one at a time")
    method = stack[0]
    name = methods.name_of(type(method))
    entry = _entry(methods, name)
    refused = []
    for make in _beds(backbone, task):
        bed = make()
        case = Case(entry, method, bed)
        try:
            case.model  # noqa: B018
        except UsageError as error:
            refused.append(f"{bed.words}: {error}")
            continue
        except (Exception, SystemExit):  # `applied` says what it is
            pass
        return Report("method", name, entry.distribution, canonical(stack), bed.words, _judged(CHECKS, case, progress))
    raise UsageError(
        f"{name} fits none of the tiny models, so nothing was checked. " + "; ".join(refused),
        "name what it fits with --backbone FAMILY:NAME or --task NAME",
    )


def _judged(checks: Any, case: Any, progress: Progress) -> list[Outcome]:
    from effbench.conformance import applied, documentation, names_that_it_gives, parameter_ranges

    source = case.entry.file
    (first,) = judge((applied,), case, source)
    if first.result == "PASS":
        return [first, *judge(checks, case, source, progress)]
    without_model = (documentation, names_that_it_gives, parameter_ranges)
    found = [first, *judge(without_model, case, source)]
    rest = [check.__name__.replace("_", " ") for check in checks if check not in without_model]
    return found + [Outcome(check, "SKIPPED", "it could not be applied") for check in rest]


def check_task(name: str, backbone: str | None = None, data: Path | None = None, progress: Progress = silent) -> Report:
    """Check a task on its own data; a few of its examples go through a tiny model.

    Args:
        backbone: FAMILY:NAME in place of a tiny ViT, with random weights.
        data: a copy of its data; None for the usual places.

    Raises:
        UsageError: no such task.
    """
    from effbench.conformance_task import CHECKS, Case

    entry = _entry(tasks, name)
    case = Case(entry, tasks.get(name)(), data, _backbone(backbone) if backbone else None, progress)
    found = judge(CHECKS, case, entry.file, progress)
    where = "a few examples on " + (backbone or "a tiny image tower with random weights")
    return Report("task", name, entry.distribution, name, where, found)


def _entry(registry: Registry, name: str) -> Entry:
    registry.get(name)
    return next(entry for entry in registry.entries() if entry.name == name)


def _beds(backbone: str | None, task: str | None) -> Iterator[Callable[[], Bed]]:
    """The models to try, made when they are asked for."""
    from effbench.conformance_model import alignment, captioner, of_task

    towers = _backbone(backbone) if backbone else None
    words = f"{backbone} with random weights" if backbone else ""
    if task:
        yield lambda: of_task(tasks.get(task)(), task, towers)
        return
    if towers is None or not towers.writes:
        yield lambda: alignment(towers, words)
    yield lambda: captioner(towers, words and f"a captioner on {words}")


def _backbone(spec: str) -> Any:
    from effbench.models.choose import choose

    family = spec.partition(":")[0]
    known = family in backbones.names() and (backbones.get(family).brings_weights or backbones.get(family).writes)
    return choose(spec, None if known else "random")[0]
