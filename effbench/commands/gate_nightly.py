"""`effbench gate --times` and `--drift`: run what was asked for, and print what it says."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.errors import InvalidError, Stopped, UsageError
from effbench.terminal import console, plain, say

if TYPE_CHECKING:
    from rich.table import Table

    from effbench.findings import Outcome

STYLES = {"CHANGED": "bold red", "INVALID": "bold yellow", "NOTE": "yellow"}


def by_times(cells: Path | None, samples: Path | None, as_json: bool, **asked: Any) -> Outcome:
    """Compare the step times of two code versions; with `samples`, keep every measured step in a Parquet file."""
    from effbench import nightly
    from effbench.live import Live
    from effbench.nightly_cells import default_cells, read

    if samples is not None and not samples.absolute().parent.is_dir():
        raise UsageError(f"--samples {samples}: there is no such folder", "make it first")
    plan = nightly.Plan(cells=read(cells) if cells else default_cells(), **asked)
    try:
        with Live() as live:
            outcome, frame = nightly.run(plan, live)
    except KeyboardInterrupt:
        raise Stopped("stopped; a night is judged as a whole, and nothing of this one is kept") from None
    if samples is not None:
        try:
            frame.to_parquet(samples, index=False)
        except OSError as error:
            raise UsageError(f"--samples {samples} cannot be written: {error.strerror}", "name another file") from error
    _show(outcome, as_json)
    return outcome


def by_drift(out: Path, since: str | None, as_json: bool) -> Outcome:
    """Look for changes in the stored history."""
    from effbench import store
    from effbench.drift import look_back

    try:
        day = date.fromisoformat(since) if since else None
    except ValueError:
        raise UsageError(f"--since {since!r} is not a day", "write it as 2026-01-31") from None
    if not (out / "records").is_dir():
        raise InvalidError(f"there are no runs in {out}", "make one with effbench run, or name the folder with --out")
    outcome = look_back(*store.read_all(out), day)
    _show(outcome, as_json)
    return outcome


def _show(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        answer = dict(verdict=outcome.verdict, said=outcome.said, findings=[vars(each) for each in outcome.findings])
        print(json.dumps(answer | dict(notes=outcome.notes), indent=1))
        return
    if outcome.findings:
        console(least=100).print(_table(outcome))
    for note in outcome.notes:
        say(f"- {note}")
    say(f"{outcome.verdict}: {outcome.said}")


def _table(outcome: Outcome) -> Table:
    """All findings, in the order of the cells."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("cell", overflow="fold", ratio=3)
    table.add_column("figure", overflow="fold")
    for column in ("before", "after"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("", no_wrap=True)
    table.add_column("what", overflow="fold", ratio=4)
    for each in outcome.findings:
        cells = [Text(plain(text)) for text in (each.cell, each.figure, each.old, each.new)]
        table.add_row(*cells, Text(each.verdict, style=STYLES.get(each.verdict, "")), Text(plain(each.said)))
    return table
