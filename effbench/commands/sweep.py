"""`effbench sweep FILE`: many experiments from one file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from effbench.terminal import say, say_error


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file: tasks, backbones, methods, seeds, options.")],
    out: Annotated[Path, typer.Option(help="Folder of the leaderboard and its records.")] = Path("leaderboard"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the experiments, their arms, time and memory.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run all of them again, from the beginning.")] = False,
    log: Annotated[
        Literal["mlflow"] | None, typer.Option(help="Log each new record to MLflow too (MLFLOW_TRACKING_URI).")
    ] = None,
) -> int:
    """Run every task x backbone of a file with all its methods; one leaderboard.

    Keys of the file: tasks, backbones, methods (a parameter's list of values is
    a product), seeds, controls, arms_per_run, and options, those of effbench run.

    The same command goes on where it was stopped and repeats what failed; what
    has a record already is left. A method that does not fit a backbone is left
    out, and named.
    """
    from effbench.commands.run import exit_code
    from effbench.sweep import run

    outcomes = run(file, out, dry_run=dry_run, fresh=fresh, log=log)
    for number, outcome in enumerate(outcomes, 1):
        state = outcome.record.id if outcome.record else "no record"
        say(f"{number}. {outcome.planned}: {state}{'' if outcome.ran else ' (not run now)'}")
        for spec, reason in outcome.planned.left_out.items():
            say(f"   without {spec}: {reason}")
    if not dry_run and any(outcome.record for outcome in outcomes):
        say(f"leaderboard: {out / 'README.md'}, as a page to sort and filter: {out / 'index.html'}")
    again = f"effbench sweep {shlex.quote(str(file))} --out {shlex.quote(str(out))}"
    for outcome in outcomes:
        kept = outcome.record is not None and outcome.record.status == "ok"  # it takes --fresh to run those again
        for why in outcome.failures:
            say_error(f"{outcome.planned}: {why}", f"to repeat it: {again}{' --fresh' if kept else ''}")
    return max((exit_code(outcome.record) if outcome.record else 1 for outcome in outcomes), default=0)
