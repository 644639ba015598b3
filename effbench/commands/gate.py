"""`effbench gate`: what is asked on the command line, handed to the gate that was asked for, and its answer shown."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effbench.commands import given
from effbench.quantities import duration
from effbench.terminal import console, plain, say

if TYPE_CHECKING:
    from rich.table import Table

    from effbench.findings import Outcome
    from effbench.gate import Comparison


TIMES, DRIFT = "With --times", "With --drift"


#: options that one kind of gate alone takes
OF_TIMES = ("head", "cells", "pairs", "processes", "budget", "seed", "threads", "device", "samples")
OF_DRIFT = ("since",)
OF_RECORDS = ("run",)


def gate(
    reference: Annotated[
        str | None,
        typer.Option(metavar="RECORD", help="A record's folder or file, or a run's id; with --times a git commit."),
    ] = None,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Id or its beginning, latest, or a record's folder or file.")
    ] = "latest",
    out: Annotated[Path, typer.Option(help="Folder of the leaderboard and its records.")] = Path("leaderboard"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    summary: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the answer as Markdown; default: GitHub's job summary, if any."),
    ] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the answer as JUnit XML.")] = None,
    annotations: Annotated[
        bool | None,
        typer.Option(
            "--annotations/--no-annotations",
            help="Print GitHub's workflow commands; default: on GitHub.",
            show_default=False,
        ),
    ] = None,
    times: Annotated[
        bool,
        typer.Option("--times", help="Compare the step times of two code versions.", rich_help_panel=TIMES),
    ] = False,
    head: Annotated[
        str | None,
        typer.Option(metavar="COMMIT", help="Default: the working tree as it is.", rich_help_panel=TIMES),
    ] = None,
    cells: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to time, as YAML.", rich_help_panel=TIMES)
    ] = None,
    pairs: Annotated[int, typer.Option(min=12, help="Turns of a cell, at most.", rich_help_panel=TIMES)] = 80,
    processes: Annotated[int, typer.Option(min=3, help="Sets of fresh processes.", rich_help_panel=TIMES)] = 6,
    budget: Annotated[
        float,
        typer.Option(parser=duration, metavar="TIME", show_default="15m", help="For all.", rich_help_panel=TIMES),
    ] = 900.0,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and inputs.", rich_help_panel=TIMES)] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: all cores.", rich_help_panel=TIMES)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.", rich_help_panel=TIMES)] = "cpu",
    samples: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep every step's time, as Parquet.", rich_help_panel=TIMES)
    ] = None,
    drift: Annotated[
        bool, typer.Option("--drift", help="Look for changes in the stored history.", rich_help_panel=DRIFT)
    ] = False,
    since: Annotated[
        str | None,
        typer.Option(metavar="DAY", help="Earlier changes are known, e.g. 2026-01-31.", rich_help_panel=DRIFT),
    ] = None,
    context: typer.Context = None,
) -> int:
    """Check that what a run computes, keeps and gets right is as in a reference.

    Times are looked at with --times, which compares two code versions turn by turn, and with --drift, which looks
    back on the stored runs.

    Exactly: FLOPs, tokens, weights and operations; on the reference's platform also outputs and quality, elsewhere
    within a tolerance that is said.

    Exits with 0 if it is, 1 if a figure changed (for better or worse), 2 if the two cannot be compared, 3 if what was
    asked for cannot be. A run that is INVALID for its times is compared all the same.
    """
    from effbench.commands.gate_nightly import by_drift, by_times
    from effbench.errors import EffbenchError, Stopped, UsageError
    from effbench.findings import refusal
    from effbench.measure.environment import cores
    from effbench.report import gate_report

    if as_json and annotations:
        raise UsageError("--json and --annotations both write to stdout", "leave one out")
    if times and drift:
        raise UsageError("--times and --drift are two gates", "call them one after the other")
    if context is not None:  # called by the command line
        _check_options(context, times, drift)
    if not reference and not drift:
        hint, gone = "--reference main" if times else "--reference tests/reference/scenes", reference is None
        raise UsageError(
            f"a gate compares with something: --reference is {'missing' if gone else 'empty'}",
            f"e.g. {hint}",
        )
    annotate = annotations if annotations is not None else gate_report.on_github() and not as_json
    try:
        with gate_report.commands_stopped(annotate):
            if times:
                asked = dict(reference=reference, head=head, turns=pairs, processes=processes, budget=budget, seed=seed)
                asked |= dict(threads=threads or cores(), device=device)
                outcome = by_times(cells, samples, as_json, **asked)
            elif drift:
                outcome = by_drift(out, since, as_json)
            else:
                outcome = _against_a_record(reference, run, out, as_json)
    except EffbenchError as error:
        outcome = refusal("effbench gate", error)
        if as_json:
            found = dict(findings=[vars(finding) for finding in outcome.findings], notes=outcome.notes)
            print(json.dumps(dict(verdict="INVALID", said=str(error), changes=[]) | found, indent=1))
        gate_report.publish(outcome, summary, junit, annotate)
        if not annotate or isinstance(error, Stopped):
            raise
        with gate_report.commands_stopped(True):  # on stdout: GitHub keeps the order within one stream only
            say(f"error: {error}\nnext:  {error.hint}")
        return error.exit_code
    gate_report.publish(outcome, summary, junit, annotate)
    return outcome.exit_code


def _check_options(context: typer.Context, times: bool, drift: bool) -> None:
    """Refuse an option that the gate that was asked for does not take, and would leave out in silence."""
    from effbench.errors import UsageError

    kind = "--times" if times else "--drift" if drift else "a gate on records"
    others = [*(() if times else OF_TIMES), *(() if drift else OF_DRIFT), *(OF_RECORDS if times or drift else ())]
    asked = given(context)
    for name in others + ["reference"] * drift:
        if name in asked:
            option = "RUN" if name == "run" else f"--{name}"
            hint = "add --times" if name in OF_TIMES and not drift else "add --drift" if name in OF_DRIFT else ""
            raise UsageError(f"{option} means nothing to {kind}", hint or "leave it out")


def _against_a_record(reference: str, run: str, out: Path, as_json: bool) -> Outcome:
    """Compare two records, and print what came out."""
    from effbench import store
    from effbench.gate import compare

    paths = [_record(out, name) for name in (reference, run)]
    found = compare(*map(store.read, paths))
    outcome = found.outcome(*([_renewal(*paths)] if found.changes else []))
    if as_json:
        changes = [{**vars(change), "percent": change.percent} for change in found.changes]
        not_compared = [vars(finding) for finding in outcome.of("NOTE")]
        answer = dict(verdict=outcome.verdict, said=outcome.said, changes=changes, notes=found.notes)
        print(json.dumps(answer | dict(not_compared=not_compared), indent=1, default=sorted))
        return outcome
    if found.changes:
        console().print(_table(found))
    for note in found.notes:
        say(f"- {note}")
    for line in _not_compared(outcome):
        say(f"- {line}")
    say(found.verdict)
    if found.changes:
        say(f"next:  {_renewal(*paths)}")
    return outcome


def _record(out: Path, name: str) -> Path:
    """The file of a record: `name` is a path, or a run in `out`."""
    from effbench import store
    from effbench.errors import UsageError

    path = Path(name)
    if path.is_dir():
        return path / "record.json"
    if path.is_file() or path.suffix == ".json" or len(path.parts) > 1:
        return path
    try:
        return store.find(out, name) / "record.json"
    except UsageError as error:
        raise UsageError(f"there is no folder or file {name}, and {error}", error.hint) from None


def _renewal(reference: Path, run: Path) -> str:
    """How to make the run the reference; a record in a leaderboard's folder is never changed."""
    if reference.parent.parent.name == "records":
        how = f"name this run as the reference from now on: {shlex.join(['--reference', str(run)])}"
    else:
        how = f"renew the reference: {shlex.join(['cp', str(run), str(reference)])}"
    return f"if this is meant, {how}"


def _not_compared(outcome: Outcome) -> list[str]:
    """What was looked at and could not be compared, one line for each reason."""
    from effbench.report.markdown import clean

    groups: dict[str, list[str]] = {}
    for finding in outcome.of("NOTE"):
        groups.setdefault(finding.said, []).append(finding.cell if finding.figure == "arm" else finding.figure)
    return [f"{said}: {clean(', '.join(dict.fromkeys(names)), 1000)}" for said, names in groups.items()]


def _table(found: Comparison) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from effbench.gate import reason, shown_beside

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("arm", "figure"):
        table.add_column(column, overflow="fold")
    for column in ("reference", "run", "change"):
        table.add_column(column, justify="right", overflow="fold")
    for change in found.changes:
        cells = (change.arm, change.figure, *shown_beside(change.old, change.new))
        style = "green" if change.lower else "red"
        table.add_row(*(Text(plain(cell)) for cell in cells), Text(plain(reason(change)), style=style))
    return table
