"""Plots for papers and Markdown, by name: from the standings of one envelope to figures.

A figure is as wide as one column of a page (3.3 inches) or as both (6.8). What cannot be drawn is left out and said;
where nothing is left it is said why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby

from effbench.errors import InvalidError
from effbench.report.plot_pareto import pareto
from effbench.report.plot_strength import keep_rate
from effbench.report.plot_style import Drawn
from effbench.report.plot_time import time_split
from effbench.report.plot_tokens import tokens
from effbench.report.standings import Standing
from effbench.report.strengths import curves

PLOTS = ("pareto", "time", "tokens", "keep-rate")
SINGLE: dict[str, Callable[[Sequence[Standing], str], Drawn]] = {
    "pareto": pareto,
    "time": time_split,
    "tokens": tokens,
}


def draw(what: str, rows: Sequence[Standing], width: str = "one") -> tuple[dict[str, Drawn], list[str]]:
    """The figures of a plot by the names of their files, without an ending; `keep-rate` has one for each parameter.

    Args:
        what: one of PLOTS.
        rows: of one envelope.
        width: "one" or "two" columns.

    Returns:
        The figures, and a sentence for each that could not be drawn while others could.

    Raises:
        InvalidError: there is nothing to draw; it says why.
    """
    if what in SINGLE:
        return {what: SINGLE[what](rows, width)}, []
    found = curves(rows)
    if not found:
        raise InvalidError(
            "no keep-rate plot: it needs a method at two strengths or more, all else equal",
            "e.g. effbench run --method token_prune:keep=0.7 --method token_prune:keep=0.5 --task TASK",
        )
    drawn: dict[str, Drawn] = {}
    problems = []
    for (family, parameter), group in groupby(found, key=lambda curve: (curve.family, curve.parameter)):
        name = base = "-".join(["keep-rate", file_name(family), file_name(parameter)])
        number = 1
        while name in drawn:
            number += 1
            name = f"{base}-{number}"
        try:
            drawn[name] = keep_rate(list(group), width)
        except InvalidError as error:
            problems.append(str(error))
    if not drawn:
        raise InvalidError(problems[0], "list the runs: effbench list runs")
    return drawn, problems


def file_name(text: str) -> str:
    """A text as part of a file's name: letters, digits, _ and - alone."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")[:60] or "x"
