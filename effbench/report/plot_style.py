"""How plots look and are written: sizes in points, colours, text of records, and files that are the same every time.

All lengths are in points (1/72 inch) from the figure's upper left corner. Colours are those of Okabe and Ito, "Color
Universal Design" (2008), told apart in the common kinds of colour blindness; symbols and hatches say the same again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effbench.errors import InvalidError
from effbench.records import Arm, Envelope, Interval, MetricValue, in_interval
from effbench.report import figures
from effbench.report.plot_text import FONT, LINE, SIZE, SMALL, length, rows_of, text, wrapped
from effbench.report.standings import Standing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

WIDTHS = {"one": 237.6, "two": 489.6}  # 3.3 and 6.8 inches: a column and both of a page
GAP = 14.4  # between two cells of WIDTHS["one"] in a figure of WIDTHS["two"]
BLACK, GREY, LIGHT = "#000000", "#767676", "#d0d0d0"
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)  # of lines and symbols: yellow is too pale on white
MARKERS = "osD^vPXp<>h"  # 11 and 6 have no common divisor: 66 different pairs
DPI = 300
FASTEST = 1000.0  # a speed-up beyond which a figure of a record is not believed
LOSSIEST = 100.0  # the same of lossy-ness: 10,000 %
LARGEST = 1e6  # and of milliseconds, tokens and values of a metric
CELLS = 12  # panels of a figure
UNDER = 10.0  # the label of a horizontal axis
STYLE: dict[str, Any] = {
    "font.family": [FONT],
    "font.size": SIZE,
    "axes.labelsize": SIZE,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-7, 7),
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "axes.labelpad": 2,
    "lines.linewidth": 1.1,
    "hatch.linewidth": 0.5,
    "text.parse_math": False,  # a $ in a record is a dollar
    "text.usetex": False,
    "svg.hashsalt": "effbench",  # ids in the file depend on what is drawn alone
    "svg.fonttype": "path",
    "figure.dpi": 72,
}


@dataclass(frozen=True)
class Drawn:
    """A figure, and a sentence for everything that it leaves out."""

    figure: Figure
    notes: tuple[str, ...] = ()


@contextmanager
def styled() -> Iterator[None]:
    """matplotlib's settings while a plot is made or written: its own defaults, then STYLE."""
    from matplotlib import rc_context, rcParamsDefault

    kept = {key: value for key, value in rcParamsDefault.items() if not key.startswith("backend")}
    with rc_context({**kept, **STYLE}):
        yield


def canvas(width: float, height: float) -> Figure:
    """An empty figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width / 72, height / 72), dpi=72)
    FigureCanvasAgg(figure)
    return figure


def axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes whose frame lies there."""
    whole, high = figure.get_figwidth() * 72, figure.get_figheight() * 72
    return figure.add_axes((left / whole, 1 - (top + height) / high, width / whole, height / high))


def put(figure: Figure, left: float, top: float, words: str, **options: Any) -> None:
    """A line of text whose middle is at `top`; `words` are shown as they are."""
    whole, high = figure.get_figwidth() * 72, figure.get_figheight() * 72
    style = dict(fontsize=SMALL, va="center_baseline") | options
    figure.text(left / whole, 1 - top / high, words, **style)


def swatch(figure: Figure, left: float, top: float, **style: Any) -> None:
    """A short line, a symbol or both, as a legend shows them; 12 points wide."""
    from matplotlib.lines import Line2D

    whole, high = figure.get_figwidth() * 72, figure.get_figheight() * 72
    across = (left / whole, (left + 6) / whole, (left + 12) / whole)
    style = dict(linestyle="none") | style
    figure.add_artist(Line2D(across, [1 - top / high] * 3, markevery=[1], **style))


def ticks(most: int, whole: bool = False) -> MaxNLocator:
    """At most that many steps between ticks, at round numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=whole, steps=[1, 2, 2.5, 5, 10])


def at_values(panel: Axes, values: Sequence[float]) -> None:
    """Ticks of the horizontal axis at these values, as far as their numbers find room."""
    place = panel.get_window_extent()
    low, high = panel.get_xlim()
    free, shown = -math.inf, []
    for value in sorted(set(values)):
        at = place.x0 + (value - low) / (high - low) * place.width
        half = length(f"{value:g}") / 2
        if at - half >= free:
            shown.append(value)
            free = at + half + 3
    panel.set_xticks(shown, [f"{value:g}".replace("-", "\u2212") for value in shown])


def conditions(envelope: Envelope) -> str:
    """What the figure is of: a line for its foot."""
    data = f"{text(envelope.data, 60)}{' (images drawn by a program)' if envelope.synthetic else ''}"
    protocol = envelope.protocol
    threads = f"{protocol.threads} thread{'' if protocol.threads == 1 else 's'}"
    task = text(envelope.task, 60)
    said = [task if task == data else f"{task} on {data}", text(envelope.backbone, 80)]
    return ", ".join([*said, f"{text(envelope.device_model, 80)} ({threads})", f"envelope {envelope.digest}"])


def label(arm: Arm) -> str:
    """How an arm is called in a figure."""
    return text(figures.label(arm).removeprefix("control · "))


def sides(figure: Interval | MetricValue, most: float) -> tuple[float, float] | None:
    """How far the interval reaches below and above; None where there is none, or the figure lies outside of it."""
    if not in_interval(figure):
        return None
    return figure.value - max(figure.low, -most), min(figure.high, most) - figure.value


def odd(figure: Interval | MetricValue | None) -> bool:
    """Whether a figure does not lie in its own interval, as only a file that was edited by hand has it."""
    return figure is not None and None not in (figure.low, figure.high) and not in_interval(figure)


def without_interval(arms: Iterable[Arm]) -> tuple[str, ...]:
    """A sentence about arms with a figure outside of its own interval."""
    names = ", ".join(label(arm) for arm in list(arms)[:5])
    return (f"drawn without an interval, since the figure does not lie in it: {names}",) if names else ()


def believed(value: float, most: float, least: float = -math.inf) -> bool:
    """Whether a figure can be drawn beside others."""
    return math.isfinite(value) and abs(value) <= most and value > least


def begin(rows: Sequence[Standing], what: str) -> None:
    """Refuse an envelope without any arm.

    Raises:
        InvalidError: there is none.
    """
    if not rows:
        raise InvalidError(f"no {what} to plot: no valid run", "list the runs: effbench list runs")


def left_out(rows: Iterable[Arm], why: str) -> tuple[str, ...]:
    """A sentence about arms that are not drawn."""
    names = [label(arm) for arm in rows]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (f"not drawn, {why}: {', '.join(names[:5])}{more}",) if names else ()


def foot(rows: Sequence[Standing], width: float, *more: str) -> list[str]:
    """The lines below a figure: what it is of, and what a reader has to know."""
    envelope = rows[0].record.envelope
    lines = wrapped(conditions(envelope), width, 3)
    for sentence in (*more, figures.untaught(envelope)):
        lines += wrapped(sentence, width, 3)
    return lines


def put_lines(figure: Figure, top: float, lines: Sequence[str]) -> None:
    """Grey lines below one another."""
    for i, line in enumerate(lines):
        put(figure, 0, top + i * LINE, line, color=GREY)


def cells(
    width: float, heights: Sequence[float], legend: Sequence[tuple[str, dict[str, Any]]], lines: Sequence[str]
) -> tuple[Figure, list[tuple[float, float, float, bool]]]:
    """A figure of cells as wide as a column, a legend above them and lines below.

    Returns:
        The figure, and of each cell its upper left corner, its height, which is that of its row, and whether it is the
        lowest of its column: those have UNDER points more, for the label of the horizontal axis.
    """
    across = 2 if width > WIDTHS["one"] else 1
    keys = rows_of([words for words, _ in legend], width, 15)
    top = len(keys) * LINE + 4
    corners = []
    for i in range(0, len(heights), across):
        row = range(i, min(i + across, len(heights)))
        lowest = [k + across >= len(heights) for k in row]
        high = max(heights[k] for k in row)
        corners += [((k - i) * (WIDTHS["one"] + GAP), top, high, last) for k, last in zip(row, lowest, strict=True)]
        top += high + UNDER * any(lowest)
    figure = canvas(width, top + 2 + len(lines) * LINE)
    for i, row in enumerate(keys):
        for left, k in row:
            words, look = legend[k]
            swatch(figure, left, i * LINE + 4, **look)
            put(figure, left + 15, i * LINE + 4, words)
    put_lines(figure, top + 5, lines)
    return figure, corners


def as_svg(figure: Figure, title: str) -> bytes:
    """The figure as SVG; text is outlines, and a comment beside them says it."""
    return _saved(figure, "svg", {"Date": None, "Creator": "effbench", "Title": text(title)})


def as_png(figure: Figure, title: str) -> bytes:
    """The figure as PNG of DPI dots per inch."""
    return _saved(figure, "png", {"Software": "effbench", "Title": text(title)})


def _saved(figure: Figure, kind: str, metadata: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    with styled():
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
    return file.getvalue()
