"""`effbench gate`: what is asked on the command line, handed to `effbench.gate.compare`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effbench.terminal import console, plain, say

if TYPE_CHECKING:
    from rich.table import Table

    from effbench.gate import Comparison


def gate(
    reference: Annotated[str, typer.Option(metavar="RECORD", help="A record's folder or file, or a run's id.")],
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Id or its beginning, latest, or a record's folder or file.")
    ] = "latest",
    out: Annotated[Path, typer.Option(help="Folder of the leaderboard and its records.")] = Path("leaderboard"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Check that FLOPs, tokens and weights are exactly those of a reference; times and quality are not looked at.

    Exits with 0 if they are, 1 if one changed (for better or worse), 2 if the two cannot be compared. A run that is
    INVALID for its times is compared all the same.
    """
    from effbench import store
    from effbench.errors import InvalidError
    from effbench.gate import compare

    paths = [_record(out, name) for name in (reference, run)]
    try:
        found = compare(*map(store.read, paths))
    except InvalidError as error:
        if as_json:
            print(json.dumps(dict(verdict="INVALID", said=str(error), changes=[], notes=[]), indent=1))
        raise
    if as_json:
        changes = [{**vars(change), "percent": change.percent} for change in found.changes]
        verdict, _, said = found.verdict.partition(": ")
        answer = dict(verdict=verdict, said=said, changes=changes, notes=found.notes)
        print(json.dumps(answer, indent=1, default=sorted))
        return found.exit_code
    if found.changes:
        console().print(_table(found))
    for note in found.notes:
        say(f"- {note}")
    say(found.verdict)
    if found.changes:
        say(f"next:  if this is meant, {_renewal(*paths)}")
    return found.exit_code


def _record(out: Path, name: str) -> Path:
    """The file of a record: `name` is a path, or a run in `out`."""
    from effbench import store

    path = Path(name)
    if path.is_dir():
        return path / "record.json"
    if path.is_file() or path.suffix == ".json" or len(path.parts) > 1:
        return path
    return store.find(out, name) / "record.json"


def _renewal(reference: Path, run: Path) -> str:
    """How to make the run the reference; a record in a leaderboard's folder is never changed."""
    if reference.parent.parent.name == "records":
        return f"name this run as the reference from now on: {shlex.join(['--reference', str(run)])}"
    return f"renew the reference: {shlex.join(['cp', str(run), str(reference)])}"


def _table(found: Comparison) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from effbench.gate import shown

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("arm", "figure"):
        table.add_column(column, overflow="fold")
    for column in ("reference", "run", "change"):
        table.add_column(column, justify="right", overflow="fold")
    for change in found.changes:
        amount = "" if change.percent is None else f"{change.percent:+.3g} %"
        style = "green" if change.lower else "red"
        cells = (change.arm, change.figure, shown(change.old), shown(change.new))
        table.add_row(*(Text(plain(cell)) for cell in cells), Text(amount, style=style))
    return table
