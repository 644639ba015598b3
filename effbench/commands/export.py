"""`effbench export`: what is asked on the command line, handed to `effbench.export` or `effbench.log_mlflow`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from effbench.terminal import console, plain, say, say_error

if TYPE_CHECKING:
    from effbench.records import Record


def export(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="Id or its beginning, latest, or a record's folder; default: all runs."),
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="FILE", help="A path or URL (memory://, s3://, ...) in .parquet or .csv.")
    ] = None,
    samples: Annotated[
        bool, typer.Option("--samples", help="The raw samples (steps and per-item scores), not a row per arm.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the leaderboard and its records.")] = Path("leaderboard"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    log: Annotated[Literal["mlflow"] | None, typer.Option(help="Log the runs to MLflow (MLFLOW_TRACKING_URI).")] = None,
) -> int:
    """Write results to one Parquet or CSV file for a notebook, or log them to MLflow.

    One row per arm with the columns of effbench.load, or the raw samples. Runs that cannot be read are named and left
    out. A run that MLflow has already is not logged again.
    """
    from effbench import store
    from effbench.errors import InvalidError, UsageError

    if to is None and log is None:
        raise UsageError("nothing to do: neither --to nor --log is given", "effbench export --to results.parquet")
    if to is None and (samples or force):
        raise UsageError(f"--{'samples' if samples else 'force'} is of --to", "name a file: --to results.parquet")
    if to is not None:
        from effbench.export import target

        target(to, force)  # before thousands of records are read
    if log is not None:
        from effbench.log_mlflow import check

        check()
    if run is not None:
        folder = store.find(out, run)
        found, problems = [(store.read(folder), folder)], []
    else:
        records, problems = store.read_all(out)
        found = [(record, out / "records" / record.id) for record in records]
    for problem in problems:
        _warn(f"left out: {problem}")
    if not found:
        raise InvalidError(f"there is no run in {out}", "make one with effbench run, or name the folder with --out")
    if to is not None:
        from effbench import export as writer

        rows, left_out = writer.export(to, found, samples, force)
        for problem in left_out:
            _warn(f"left out: {problem}")
        runs = len(found) - len(left_out)
        say(f"{to}: {rows:,} {'samples' if samples else 'arms'} of {runs:,} run{'s'[runs == 1 :]}")
    return _log(found) if log else 0


def _warn(text: str) -> None:
    """A line on stderr of something that is no error."""
    console(stderr=True).print(plain(f"warning: {text}"), markup=False, highlight=False, soft_wrap=True)


def _log(found: list[tuple[Record, Path]]) -> int:
    """Log each run; 1 where one could not be."""
    from effbench.errors import EffbenchError
    from effbench.log_mlflow import log
    from effbench.report.markdown import clean

    failed = 0
    for record, folder in found:
        try:
            say(f"MLflow: {log(folder)}")
        except EffbenchError:
            raise
        except Exception as error:  # MLflow's own kinds, and those of what lies behind it
            say_error(f"{record.id} was not logged: {type(error).__name__}: {clean(str(error), 300)}")
            failed += 1
    return int(failed > 0)
