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
    from effbench.report.reading import groups
    from effbench.report.standings import section, sections

    if run is not None:
        record = store.read(store.find(out, run))
        for only in sections([record]):
            if only.rows:
                return only
        why = f": {record.why_invalid}" if record.why_invalid else ""
        raise InvalidError(f"run {record.id} is INVALID{why}; its figures are not plotted")
    if not (out / "records").is_dir():
        raise InvalidError(f"there are no runs in {out}", "make one with effbench run, or name the folder: --out")
    problems: list[str] = []
    found = groups(out, problems)
    for problem in problems[:5]:
        say(f"left out: {problem}")
    if len(problems) > 5:
        say(f"left out: {len(problems) - 5} more records that cannot be read")
    valid = [group for group in found if group.best]
    if valid:
        return section(max(valid, key=lambda group: group.newest), lambda name: store.member(out, name))
    hint = "make one: effbench run --method METHOD --task TASK"
    raise InvalidError(f"no run in {out} is valid" if found else f"no run in {out} can be read", hint)


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
