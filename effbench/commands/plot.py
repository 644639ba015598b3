"""`effbench plot`: what is asked on the command line, handed to `effbench.report.plots`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from effbench.terminal import say
from effbench.whole_file import whole_file

if TYPE_CHECKING:
    from effbench.report.plot_style import Drawn
    from effbench.report.standings import Section


def plot(
    what: Annotated[
        Literal["pareto", "time", "tokens", "keep-rate", "all"],
        typer.Argument(help="The front, where a step's time goes, tokens by layer, or strength against quality."),
    ] = "all",
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="Id or its beginning, latest, or a record's folder.", show_default="the newest envelope"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the leaderboard and its records.")] = Path("leaderboard"),
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the files.", show_default="OUT/plots")
    ] = None,
    kind: Annotated[
        Literal["svg", "png", "both"], typer.Option("--format", help="SVG, PNG of 300 dots per inch, or both.")
    ] = "both",
    width: Annotated[
        Literal["one", "two"], typer.Option(help="Columns of a page: 3.3 inches or 6.8 inches wide.")
    ] = "one",
) -> None:
    """Draw plots for papers and Markdown from records: SVG and PNG, one column or two columns wide.

    Without RUN they are of the newest envelope: all of its runs, as the leaderboard ranks them.
    """
    from effbench.errors import InvalidError
    from effbench.report.plots import PLOTS, draw

    section = _section(out, run)
    folder = to or out / "plots"
    suffix = "" if width == "one" else "-wide"
    written = False
    for each in PLOTS if what == "all" else [what]:
        try:
            found, problems = draw(each, section.rows, width)
        except InvalidError as error:
            if what != "all":
                raise
            found, problems = {}, [str(error)]
        for name, drawn in found.items():
            _write(folder, f"{name}{suffix}", drawn, kind, section)
            written = True
        for problem in problems:
            say(problem)
    if not written:
        raise InvalidError("nothing could be plotted, for the reasons above", "list the runs: effbench list runs")


def _section(out: Path, run: str | None) -> Section:
    """What is plotted: one record, or all of the newest envelope."""
    from effbench import store
    from effbench.errors import InvalidError
    from effbench.report.standings import sections

    problems: list[str] = []
    if run is not None:
        records = [store.read(store.find(out, run))]
    else:
        if not (out / "records").is_dir():
            raise InvalidError(f"there are no runs in {out}", "make one with effbench run, or name the folder: --out")
        records, problems = store.read_all(out)
    for problem in problems[:5]:
        say(f"left out: {problem}")
    if len(problems) > 5:
        say(f"left out: {len(problems) - 5} more records that cannot be read")
    found = [section for section in sections(records) if section.rows]
    if found:
        return max(found, key=lambda section: section.newest)
    if run is not None:
        why = records[0].why_invalid
        raise InvalidError(f"run {records[0].id} is INVALID{f': {why}' if why else ''}; its figures are not plotted")
    hint = "make one: effbench run --method METHOD --task TASK"
    raise InvalidError(f"no run in {out} is valid" if records else f"no run in {out} can be read", hint)


def _write(folder: Path, name: str, drawn: Drawn, kind: str, section: Section) -> None:
    """Write a figure's files, each whole or not at all, and say so."""
    from effbench.errors import EffbenchError
    from effbench.report import plot_style

    title = f"effbench {name}, envelope {section.envelope.digest}"
    makers = {"svg": plot_style.as_svg, "png": plot_style.as_png}
    for ending in makers if kind == "both" else [kind]:
        path = folder / f"{name}.{ending}"
        content = makers[ending](drawn.figure, title)
        try:
            with whole_file(path) as file:
                file.write_bytes(content)
        except OSError as error:
            raise EffbenchError(f"{path} was not written: {error.strerror}", "choose another folder: --to") from error
        say(str(path))
    for note in drawn.notes:
        say(f"  {note}")
