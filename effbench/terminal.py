"""What is printed: one console, error lines, a progress bar. Text from files and plugins goes through `plain`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 160  # columns where no terminal sets a width: nothing is cut in a pipe


def console(stderr: bool = False, least: int = 0) -> Console:
    """A rich console on stdout or stderr; it honours NO_COLOR and COLUMNS.

    Args:
        least: columns, for tables that would be unreadable in fewer: a narrow terminal wraps their lines.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    told = stream is None or stream.isatty() or "COLUMNS" in os.environ
    found = Console(stderr=stderr, width=None if told else WIDE)
    if found.width < least:
        found.width = least
    return found


def plain(text: object) -> str:
    """The text without control characters, which could rewrite a terminal; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in str(text))


def say(line: str) -> None:
    """A line on stdout, as it is."""
    console().print(plain(line), markup=False, highlight=False, soft_wrap=True)


def say_error(message: str, hint: str = "") -> None:
    """`error: message` and `next: hint` on stderr."""
    from rich.text import Text

    lines = Text.assemble(("error: ", "bold red"), plain(message))
    if hint:
        lines.append_text(Text.assemble("\n", ("next:  ", "bold"), plain(hint)))
    console(stderr=True).print(lines, soft_wrap=True, highlight=False)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """The function `progress(description, done, total)` that long work calls: on stderr, a bar or plain lines."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    out = console(stderr=True)
    if not out.is_terminal:
        yield _plain_progress()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=out, transient=True) as bar:
        bars: dict[str, int] = {}

        def progress(description: str, done: int, total: int) -> None:
            if description not in bars:
                bars[description] = bar.add_task(plain(description), total=total)
            bar.update(bars[description], completed=done, total=total)

        yield progress


def _plain_progress() -> Callable[[str, int, int], None]:
    """One line at each quarter of the way."""
    said: dict[str, int] = {}

    def progress(description: str, done: int, total: int) -> None:
        quarter = 4 * done // total if total else 0
        if said.get(description) != quarter:
            said[description] = quarter
            print(f"{plain(description)}: {25 * quarter} %", file=sys.stderr, flush=True)

    return progress
