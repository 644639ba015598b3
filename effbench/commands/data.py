"""`effbench data`: get data sets and check them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effbench.errors import InvalidError, UsageError
from effbench.terminal import progress_bar, say


def get(
    name: Annotated[str, typer.Argument(help="A task with data to download.")],
    to: Annotated[Path | None, typer.Option(help="Folder; default: the user's cache.")] = None,
    url: Annotated[str | None, typer.Option(help="Download from there instead.")] = None,
) -> None:
    """Download a task's data; a download that was stopped goes on where it stopped."""
    from effbench.registry import tasks

    task = tasks.get(name)
    if not hasattr(task, "download"):
        raise UsageError(f"there is nothing to download for {name}", "effbench list tasks")
    with progress_bar() as progress:
        folder = task.download(to, progress=progress, url=url)
    say(f"{name} is in {folder}")
    if to is not None:
        say(f"use it with --data {folder}")


def check(
    name: Annotated[str, typer.Argument(help="A task.")],
    data: Annotated[str | None, typer.Option(help="PATH of a copy; default: the usual places.")] = None,
) -> int:
    """Verify counts and splits, and that every image decodes."""
    from effbench import datasets

    with progress_bar() as progress:
        found = datasets.resolve(name, data or "real", progress)
        report = datasets.check(found.data, progress, getattr(found.task, "expected", None))
    for line in report.lines():
        say(line)
    return InvalidError.exit_code if report.problems else 0
