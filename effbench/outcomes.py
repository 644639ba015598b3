"""What the checks of a plugin found, one outcome each. A check tells what it saw or raises `Fault` or `NotChecked`."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class Fault(Exception):
    """The plugin does not do what it should.

    Args:
        why: what was seen.
        todo: what its author can do.
    """

    def __init__(self, why: str, todo: str) -> None:
        super().__init__(why)
        self.todo = todo


class NotChecked(Exception):
    """The check does not apply; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What one check found.

    Args:
        check: its name.
        result: SKIPPED where it does not apply.
        said: what was seen, or why it failed or was skipped.
        todo: of a failure, what the plugin's author can do.
        seconds: that it took.
        trace: where an exception came from, for --debug.
    """

    check: str
    result: Literal["PASS", "FAIL", "SKIPPED"]
    said: str
    todo: str = ""
    seconds: float = 0.0
    trace: str = field(default="", repr=False)


def judge(
    checks: Sequence[Callable[[Any], str]],
    case: Any,
    source: Path | None,
    progress: Callable[[str, int, int], None] = lambda description, done, total: None,
) -> list[Outcome]:
    """Run checks one after the other. An exception of the plugin is a failure with its message.

    Args:
        checks: functions of the case; the name of each says what it checks.
        source: the plugin's file: a failure names the line in it.
        progress: called as `progress(description, done, total)`.
    """
    found = []
    for number, check in enumerate(checks):
        name = check.__name__.replace("_", " ")
        progress("checking", number, len(checks))
        begin = time.perf_counter()
        result, todo, trace = "PASS", "", ""
        try:
            said = check(case)
        except NotChecked as reason:
            result, said = "SKIPPED", str(reason)
        except Fault as fault:
            result, said, todo = "FAIL", str(fault), fault.todo
        except (Exception, SystemExit) as error:  # a plugin may raise anything
            result, trace = "FAIL", "".join(traceback.format_exception(error))
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{_line(error, source)}"
            todo = "mend it there; --debug shows how it came to it"
        found.append(Outcome(name, result, said, todo, time.perf_counter() - begin, trace))
    progress("checking", len(checks), len(checks))
    return found


def _line(error: BaseException, source: Path | None) -> str:
    """The last line of the plugin's own file that an exception went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if source is not None and Path(frame.filename) == source]
    return f" ({source.name}, line {own[-1].lineno})" if own else ""
