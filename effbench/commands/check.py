"""`effbench check`: what is asked on the command line, handed to `effbench.plugin_check`."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effbench.terminal import console, plain, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from effbench.plugin_check import Report


def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A method, with NAME:param=value,... or not, or a task.")],
    spec: Annotated[str | None, typer.Option(metavar="NAME:param=value,...", help="A method's parameters.")] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="FAMILY:NAME", help="In place of the tiny towers; random weights.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task whose own model a method is put on.")] = None,
    data: Annotated[Path | None, typer.Option(help="A copy of a task's data; default: the usual places.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Check that a method or a task, built-in or a plugin, does what it promises.

    A method runs on tiny models with random weights and noise for images, a task on its own data. It shows that a
    plugin works, not that it is any good: that is for effbench run. Exits with 0 if nothing failed, 1 if something did.
    """
    from effbench.errors import UsageError
    from effbench.plugin_check import check_method, check_task, silent
    from effbench.registry import did_you_mean, methods, tasks

    plugin = name.partition(":")[0].strip()
    kinds = [kind for kind, registry in (("method", methods), ("task", tasks)) if plugin in registry.names()]
    if not kinds:
        close = did_you_mean(plugin, methods.names() + tasks.names())
        raise UsageError(f"there is no method or task {plugin!r}{close}", "effbench list")
    if spec is not None and ("method" not in kinds or ":" in name or spec.partition(":")[0].strip() != plugin):
        raise UsageError(f"--spec {spec} is no spec of the method {name}", f"write --spec '{plugin}:param=value,...'")
    reports = []
    with progress_bar() if sys.stderr.isatty() else nullcontext(silent) as progress:
        if "method" in kinds:
            reports.append(check_method(spec or name, backbone, task, progress))
        if "task" in kinds:
            reports.append(check_task(plugin, backbone, data, progress))
    if as_json:
        print(json.dumps([_as_json(report) for report in reports], indent=1))
    else:
        for report in reports:
            _print(report, console())
    return 1 if any(report.failed for report in reports) else 0


def _as_json(report: Report) -> dict[str, object]:
    facts = {key: getattr(report, key) for key in ("kind", "name", "distribution", "spec", "on")}
    checks = [
        dict(check=o.check, result=o.result, said=o.said, todo=o.todo, seconds=round(o.seconds, 3))
        for o in report.outcomes
    ]
    return facts | dict(verdict="FAIL" if report.failed else "PASS", checks=checks)


def _print(report: Report, out: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out.print(Text.assemble((plain(report.spec), "bold"), f", a {report.kind} from {plain(report.distribution)}"))
    out.print(Text(f"on {plain(report.on)}", "dim"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    table.add_column("check")
    table.add_column("result", no_wrap=True)
    table.add_column("what was seen", overflow="fold")
    for outcome in report.outcomes:
        style = {"PASS": "green", "FAIL": "bold red", "SKIPPED": "dim"}[outcome.result]
        table.add_row(outcome.check, Text(outcome.result, style), Text(plain(outcome.said)))
    out.print(table)
    for outcome in report.failed:
        out.print(
            Text.assemble(
                (f"{outcome.check}: ", "bold red"), plain(outcome.said), ("\nnext:  ", "bold"), plain(outcome.todo)
            )
        )
        if "--debug" in sys.argv and outcome.trace:
            out.print(Text(plain(outcome.trace)))
    counts = {word: sum(o.result == word for o in report.outcomes) for word in ("PASS", "FAIL", "SKIPPED")}
    skipped = f", {counts['SKIPPED']} skipped" if counts["SKIPPED"] else ""
    partly = report.kind == "task" and counts["SKIPPED"]
    conforms = "conforms as far as it could be checked here" if partly else "conforms"
    verdict = "does not conform" if report.failed else conforms
    words = f"{plain(report.name)} {verdict}: {counts['PASS']} passed, {counts['FAIL']} failed{skipped}"
    out.print(Text(words, "bold green" if not report.failed else "bold red"))
