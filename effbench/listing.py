"""Tables of plugins and runs, as `effbench list` shows them. Plugins are not imported to be listed."""

from __future__ import annotations

from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from effbench import registry
from effbench.report.markdown import clean
from effbench.terminal import plain

if TYPE_CHECKING:
    from rich.console import Console

    from effbench.records import Record
    from effbench.unfinished import Unfinished

REGISTRIES = {
    "methods": registry.methods,
    "tasks": registry.tasks,
    "backbones": registry.backbones,
    "presets": registry.presets,
}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, header_style="dim", overflow="fold")
    return table


def plugins(kind: str, console: Console) -> None:
    """Name, summary and origin of all plugins of a kind, and what is wrong with one where that is known."""
    table = _table(f"{kind}", "name", "summary", "from")
    table.columns[0].no_wrap = True
    entries = REGISTRIES[kind].entries()
    names = [entry.name for entry in entries]
    for entry in entries:
        problem = "brought by several distributions" if names.count(entry.name) > 1 else entry.problem
        said = Text(f"cannot be used: {plain(problem)}", "red") if problem else Text(plain(entry.summary))
        table.add_row(Text(plain(entry.name), "cyan"), said, Text(plain(entry.distribution), "dim"))
    console.print(table)
    if kind == "methods":
        console.print("\nparameters of one: effbench list methods NAME", style="dim", highlight=False)
    console.print()


def detail(kind: str, name: str, console: Console) -> None:
    """What one plugin says about itself; for a method its source, phases, conflicts and parameters.

    Raises:
        UsageError: no such plugin.
        EffbenchError: it cannot be imported.
    """
    plugin = REGISTRIES[kind].get(name.replace("-", "_") if kind == "presets" else name)
    console.print(Text(name, "bold cyan"))
    for paragraph in (getdoc(plugin) or "").split("\n\n"):
        console.print(Text(plain(" ".join(paragraph.split()))))
    if kind != "methods":
        return
    from effbench.spec import default, valid, write

    for label, value in (
        ("source", plugin.source),
        ("phases", " or ".join(plugin.phases)),
        ("conflicts with", ", ".join(plugin.conflicts)),
    ):
        if value:
            console.print(Text.assemble((f"{label}: ", "dim"), plain(value)))
    table = _table("\nparameters", "name", "default", "takes", "meaning")
    for parameter, field in plugin.parameters().items():
        table.add_row(
            Text(parameter, "cyan"),
            Text(plain(write(default(plugin, parameter)))),
            Text(plain(valid(plugin, parameter))),
            Text(plain(field.metadata.get("help", ""))),
        )
    console.print(table)
    first = next(iter(plugin.parameters()))
    console.print(
        f"\neffbench run --method {name}:{first}={write(default(plugin, first))}", style="dim", highlight=False
    )


def runs(root: Path, console: Console) -> None:
    """All records under a leaderboard's folder, oldest first, what cannot be read, and what has not ended."""
    from effbench import unfinished
    from effbench.store import created, each

    problems: list[str] = []
    lines = sorted(each(root, problems, lambda record: (created(record), *_cells(record))))
    partial = unfinished.runs(root)
    if not lines and not problems and not partial:
        console.print(Text(f"no run in {root}; make one: effbench run --method token_prune --task flickr8k"))
        return
    table = _table(f"runs in {root}", "id", "when", "task", "data", "backbone", "arms", "status")
    table.columns[0].no_wrap = True
    for _, *cells, status in lines:
        table.add_row(*(Text(clean(cell, None)) for cell in cells), Text(status, "green" if status == "ok" else "red"))
    if lines:
        console.print(table)
    for problem in problems:
        console.print(Text(f"left out: {plain(problem)}", "red"))
    if partial:
        _unfinished(partial, console)


def _cells(record: Record) -> tuple[str, ...]:
    """A record's line."""
    arms = ", ".join(arm.name for arm in record.arms if arm.kind == "method") or "baseline alone"
    failed = any(arm.status == "FAILED" for arm in record.arms)
    status = record.status if record.status != "ok" else "arm FAILED" if failed else "ok"
    when, envelope = f"{record.created:%Y-%m-%d %H:%M}", record.envelope
    return record.id, when, envelope.task, envelope.data, envelope.backbone, arms, status


def _unfinished(runs: list[Unfinished], console: Console) -> None:
    """Runs without a record, with the command that goes on with each."""
    console.print(Text("\nwithout a record yet", "bold"))
    for run in runs:
        about = run.about
        arms = ", ".join(about.arms) if about else ""
        what = "of what is not known"
        if about:
            what = f"{about.task} on {about.data}, {about.backbone}: {arms or 'baseline alone'}"
        kept = f"last saved {run.saved:%Y-%m-%d %H:%M}" if run.saved else "nothing saved yet"
        style = {"running": "green"}.get(run.state, "yellow")
        console.print(Text.assemble((plain(run.digest), "cyan"), "  ", (run.state, style), f", {kept}  {plain(what)}"))
        if run.state != "running" and about and about.command:
            console.print(Text(f"  to go on: {plain(about.command)}", "dim"), soft_wrap=True)
