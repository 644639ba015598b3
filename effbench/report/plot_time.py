"""Where the time of a test step goes: a stacked bar for each arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from effbench.errors import InvalidError
from effbench.report import figures
from effbench.report import plot_style as style
from effbench.report.plot_style import Drawn
from effbench.report.plot_text import LINE, SMALL, length, rows_of, wrapped
from effbench.report.standings import Standing, key
from effbench.store import created

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from effbench.records import Arm

BARS = 24  # arms of a figure
#: what a step is spent on, in its order: title, colour and hatch
PARTS = {
    "image": ("image tower", style.BLUE, ""),
    "text": ("text tower", style.SKY, "////"),
    "connector": ("connector", style.YELLOW, "...."),
    "prefill": ("prefill", style.ORANGE, "\\\\\\\\"),
    "decode": ("decode", style.VERMILION, "xxx"),
    "overhead": ("method overhead", style.PURPLE, "++++"),
    "head": ("head", style.GREEN, "----"),
    "backward": ("backward", style.GREY, "||||"),
    "optimiser": ("optimiser", style.BLACK, "oooo"),
    "transfer": ("transfer", style.LIGHT, "////"),
    "data_wait": ("data wait", "#ececec", "...."),
}


def time_split(rows: Sequence[Standing], width: str = "one") -> Drawn:
    """Milliseconds of a timed test step of each arm, by part; all bars are of one run.

    Raises:
        InvalidError: no arm has timed steps.
    """
    with style.styled():
        return _draw(rows, style.WIDTHS[width])


def _draw(rows: Sequence[Standing], width: float) -> Drawn:
    style.begin(rows, "time split")
    timed = [row for row in rows if _timed(row.arm)]
    if not timed:
        raise InvalidError(
            "no time split to plot: no arm of these runs has timed steps", "measure one with --timing-pairs 30"
        )
    newest = max((row.record for row in timed), key=lambda record: (created(record), record.id))
    others = [row.arm for row in timed if row.record.id != newest.id and row.arm.kind != "baseline"]
    notes = style.left_out(others, f"since milliseconds of two runs do not compare, and these bars are of {newest.id}")
    place = {key(row.arm): i for i, row in enumerate(rows)}
    arms = sorted((arm for arm in newest.arms if _timed(arm)), key=lambda arm: place[key(arm)])
    split = {arm.name: _milliseconds(arm) for arm in arms}
    huge = [arm for arm in arms if not style.believed(sum(split[arm.name].values()), style.LARGEST)]
    notes += style.left_out(huge, f"a step of more than {style.LARGEST / 1000:,.0f} s")
    unreal = {arm.name for arm in huge}
    arms = [arm for arm in arms if arm.name not in unreal]
    if not arms:
        raise InvalidError("no time split to plot: the times of these runs are too large to be true")
    front = {key(row.arm) for row in rows if row.front}
    # where not all can be shown: the baseline and the front, then the best of the others, in their order
    first = sorted(arms, key=lambda arm: arm.kind != "baseline" and key(arm) not in front)
    chosen = {arm.name for arm in first[:BARS]}
    notes += style.left_out(first[BARS:], f"more than {BARS} bars")
    arms = [arm for arm in arms if arm.name in chosen]
    parts = [part for part in PARTS if any(split[arm.name][part] > 0 for arm in arms)]

    room = min(0.46 * width, max(length(style.label(arm)) for arm in arms) + 2)
    titles = [wrapped(style.label(arm), room) for arm in arms]
    legend = rows_of([PARTS[part][0] for part in parts], width, 13)
    lines = style.foot(rows, width, f"Means of the middle half of the timed steps, run {newest.id}.")
    top, height, middles = len(legend) * LINE + 4, 0.0, []
    for title in titles:
        high = 11.5 if len(title) == 1 else 17.0
        middles.append(height + high / 2)
        height += high
    figure = style.canvas(width, top + height + 26 + len(lines) * LINE)
    for i, line in enumerate(legend):
        for left, k in line:
            title, colour, hatch = PARTS[parts[k]]
            _box(figure, left, i * LINE + 4, colour, hatch)
            style.put(figure, left + 13, i * LINE + 4, title)
    totals = [sum(split[arm.name].values()) for arm in arms]
    numbers = [figures.number(total) for total in totals]
    right = max(length(each) for each in numbers) + 4
    panel = style.axes(figure, room + 4, top, width - room - 4 - right, height)
    starts = [0.0] * len(arms)
    for part in parts:
        took = [split[arm.name][part] for arm in arms]
        title, colour, hatch = PARTS[part]
        panel.barh(middles, took, 7.0, starts, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3, label=title)
        starts = [start + each for start, each in zip(starts, took, strict=True)]
    for arm, title, middle, total, words in zip(arms, titles, middles, totals, numbers, strict=True):
        panel.annotate(words, (total, middle), (2, 0), textcoords="offset points", fontsize=SMALL, va="center_baseline")
        for i, line in enumerate(title):
            at = top + middle + (i - (len(title) - 1) / 2) * 6.8
            style.put(figure, room, at, line, ha="right", weight="bold" if arm.kind == "baseline" else "normal")
    panel.set(xlim=(0, max(totals) or 1.0), ylim=(height, 0), yticks=[], xlabel="ms per test step")
    panel.spines["left"].set_visible(False)
    panel.xaxis.set_major_locator(style.ticks(4 if width < 300 else 8))
    style.put_lines(figure, top + height + 29, lines)
    return Drawn(figure, notes)


def _timed(arm: Arm) -> bool:
    return arm.status == "ok" and arm.step_time is not None and arm.step_time.steps > 0


def _milliseconds(arm: Arm) -> dict[str, float]:
    time = arm.step_time
    return {part: 1000 * getattr(time, part) / time.steps for part in PARTS} if time else {}


def _box(figure: Figure, left: float, top: float, colour: str, hatch: str) -> None:
    """A filled box of a legend."""
    from matplotlib.patches import Rectangle

    whole, high = figure.get_figwidth() * 72, figure.get_figheight() * 72
    corner = (left / whole, 1 - (top + 3) / high)
    look = dict(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0.3)
    figure.add_artist(Rectangle(corner, 10 / whole, 6 / high, transform=figure.transFigure, **look))
