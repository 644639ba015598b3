"""Speed-up against lossy-ness: every arm with its intervals, and the front, numbered and listed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from effbench.errors import InvalidError
from effbench.report import figures
from effbench.report import plot_style as style
from effbench.report.plot_style import Drawn
from effbench.report.plot_text import LINE, SIZE, length, rows_of, text, wrapped
from effbench.report.standings import Standing
from effbench.report.strengths import family

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from effbench.records import Interval

FAMILIES = 12  # methods with a colour of their own
OTHERS = "other methods"
#: symbols of controls, and of those that a plugin names; noop is the noise floor instead
CONTROLS = {"identity": "+", "random": "x", "grid": "1", "norm": "2", "resize": "s", "part": "."}
OWN = "3"
BEND = 0.05  # lossy-ness up to which an axis that is bent is nearly straight
BENT = 0.3  # lossy-ness from which on it is bent: else one bad arm flattens all good ones
TICKS = (-100, -50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000)


class Place(NamedTuple):
    """An arm in the plot: speed-up, lossy-ness as a fraction, and how far their intervals reach."""

    row: Standing
    x: float
    y: float
    across: tuple[float, float] | None
    along: tuple[float, float] | None


def pareto(rows: Sequence[Standing], width: str = "one") -> Drawn:
    """Test speed-up against lossy-ness of the primary metric, with 95 % intervals.

    Filled symbols are methods that were shown to beat blind controls at their budget, or were not compared; hollow ones
    are below the line. Those on the front are numbered and listed with their probability of being there.

    Raises:
        InvalidError: no method has both figures, or the weights are random.
    """
    with style.styled():
        return _draw(rows, style.WIDTHS[width])


def places(rows: Sequence[Standing]) -> tuple[list[Place], tuple[str, ...]]:
    """Where the methods and controls stand, and a sentence about those that are not drawn."""
    found, missing, huge = [], [], []
    for row in rows:
        arm = row.arm
        loss = _loss(row)
        if arm.kind == "baseline" or arm.control == "noop":
            continue
        if arm.status != "ok" or loss is None or arm.test_speedup is None:
            missing.append(arm)
        elif style.believed(loss.value, style.LOSSIEST) and style.believed(arm.test_speedup.value, style.FASTEST, 0):
            speed = arm.test_speedup
            across, along = style.sides(speed, style.FASTEST), style.sides(loss, style.LOSSIEST)
            found.append(Place(row, speed.value, loss.value, across, along))
        else:
            huge.append(arm)
    notes = style.left_out(huge, "figures too large to be true")
    notes += style.left_out(missing, "without a speed-up or a lossy-ness")
    odd = [place for place in found if style.odd(place.row.arm.test_speedup) or style.odd(_loss(place.row))]
    return found, notes + style.without_interval([place.row.arm for place in odd])


def _loss(row: Standing) -> Interval | None:
    value = figures.quality(row.arm, row.record).get(row.record.primary_metric)
    return value and value.lossiness


def _draw(rows: Sequence[Standing], width: float) -> Drawn:
    style.begin(rows, "Pareto plot")
    record = rows[0].record
    if said := figures.untaught(record.envelope):
        raise InvalidError(f"no Pareto plot: {said[0].lower()}{said[1:]}", "use a backbone with trained weights")
    found, notes = places(rows)
    if not any(place.row.arm.kind == "method" for place in found):
        methods = [row.arm for row in rows if row.arm.kind == "method" and row.arm.status == "ok"]
        said = {arm.no_quality or getattr(arm.metrics.get(record.primary_metric), "note", "") for arm in methods} - {""}
        why = f" ({'; '.join(text(each, 80) for each in sorted(said)[:2])})" if said else ""
        raise InvalidError(
            f"no Pareto plot: no method has both a speed-up and a lossy-ness of {text(record.primary_metric)}{why}",
            "measure one with --timing-pairs 30, or plot another run",
        )
    looks = _looks(found)
    front = sorted((place for place in found if place.row.front), key=lambda place: (place.x, place.y))
    base = next((row for row in rows if row.arm.kind == "baseline"), None)
    noop = record.control("noop")
    floor = noop.test_speedup if noop and noop.test_speedup else None
    reach = floor and style.believed(floor.value, style.FASTEST, 0) and style.sides(floor, style.FASTEST)
    entries = _legend(found, looks, bool(reach))

    wide = width > style.WIDTHS["one"]
    side = 214.0 if wide else width  # of legend and key
    plot = (width - side - 12 if wide else width) - 42, 196.0 if wide else 150.0
    legend = rows_of([words for words, _ in entries], side, 15)
    key = _key(front, base, side)
    unsure = sum(place.row.arm.kind == "method" and place.row.probability is None for place in found)
    below = "Bars and band: 95 % intervals. Hollow: not shown to beat a blind control."
    below += f" Vertical axis: asinh(lossy-ness / {100 * BEND:g} %)." if _bent(found) else ""
    if unsure:
        below += f" {unsure} method{'s' if unsure > 1 else ''} without intervals: not placed on the front."
    lines = style.foot(rows, width, below)
    listed = len(legend) * LINE + 6 + sum(len(words) * LINE for words, _ in key) + LINE + 4
    body = max(plot[1] + 30, listed) if wide else plot[1] + 30 + listed
    figure = style.canvas(width, 4 + body + len(lines) * LINE)
    panel = style.axes(figure, 34, 4, *plot)
    _points(panel, found, looks, front, base)
    if floor and reach:
        panel.axvspan(floor.value - reach[0], floor.value + reach[1], color="#ececec", linewidth=0, zorder=0)
    _frame(panel, found, record.primary_metric)
    _numbers(figure, panel, found, front)

    left, top = (width - side, 8.0) if wide else (0.0, plot[1] + 34)
    for i, line in enumerate(legend):
        for at, k in line:
            words, look = entries[k]
            style.swatch(figure, left + at, top + i * LINE, **look)
            style.put(figure, left + at + 15, top + i * LINE, words)
    _list(figure, left, top + len(legend) * LINE + 6, side, key)
    style.put_lines(figure, 8 + body, lines)
    return Drawn(figure, notes)


def _looks(found: Sequence[Place]) -> dict[str, dict]:
    """Colour and symbol of each family of methods, in their order."""
    names = list(dict.fromkeys(family(place.row.arm.spec) for place in found if place.row.arm.kind == "method"))
    looks = {}
    for i, name in enumerate(names):
        if i < FAMILIES or len(names) == FAMILIES + 1:
            looks[name] = dict(color=style.COLOURS[i % 6], marker=style.MARKERS[i % 11], markersize=4.2)
        else:
            looks[name] = dict(color=style.GREY, marker="d", markersize=4.2)
    return looks


def _legend(found: Sequence[Place], looks: dict[str, dict], floor: bool) -> list[tuple[str, dict]]:
    """Words and looks, in their order."""
    greys = list(looks)[FAMILIES:] if len(looks) > FAMILIES + 1 else []
    entries = [(wrapped(text(name), 195, 1)[0], look) for name, look in looks.items() if name not in greys]
    if greys:
        entries.append((f"{len(greys)} {OTHERS}", looks[greys[0]]))
    controls = {place.row.arm.control for place in found if place.row.arm.kind == "control"}
    for control in sorted(controls, key=lambda each: (figures.place(each), each))[:FAMILIES]:
        title = figures.CONTROLS.get(control) or text(control) or "unnamed"
        entries.append((wrapped(f"control: {title}", 195, 1)[0], _control(control)))
    entries.append(("baseline", dict(color=style.BLACK, marker="*", markersize=6, markeredgewidth=0)))
    if any(place.row.front for place in found):
        entries.append(("front", dict(color=style.BLACK, linestyle="-", linewidth=0.8)))
    if floor:
        entries.append(("noise floor (noop)", dict(color="#dcdcdc", linestyle="-", linewidth=6, solid_capstyle="butt")))
    return entries


def _control(control: str) -> dict:
    marker = CONTROLS.get(control, OWN)
    return dict(color=style.GREY, marker=marker, markersize=3.6, markerfacecolor="none", markeredgewidth=0.8)


def _points(
    panel: Axes, found: Sequence[Place], looks: dict[str, dict], front: Sequence[Place], base: Standing | None
) -> None:
    for place in found:
        arm = place.row.arm
        method = arm.kind == "method"
        look = dict(looks[family(arm.spec)] if method else _control(arm.control))
        if method:
            look |= dict(markeredgewidth=0.8, markerfacecolor="white" if place.row.below else look["color"])
        reach = [None if each is None else [[each[0]], [each[1]]] for each in (place.across, place.along)]
        fade = 0.75 if place.row.front else 0.3 if method else 0.22
        colour = look["color"]
        panel.errorbar(
            place.x, place.y, reach[1], reach[0], fmt="none", ecolor=colour, elinewidth=0.6, alpha=fade, zorder=2
        )
        panel.plot(place.x, place.y, linestyle="none", zorder=4 if method else 3, label=style.label(arm), **look)
    if base:
        panel.plot(1, 0, "*", color=style.BLACK, markersize=6, markeredgewidth=0, zorder=5, label="baseline")
    # the baseline itself is on the front unless something is both faster and no lossier
    steps = [(1.0, 0.0)] if base and base.front else []
    steps = sorted([*steps, *((place.x, place.y) for place in front)])
    if len(steps) > 1:
        panel.step(*zip(*steps, strict=True), where="pre", color=style.BLACK, linewidth=0.8, zorder=1.5, label="front")


def _bent(found: Sequence[Place]) -> bool:
    return max(place.y for place in found) > BENT


def _frame(panel: Axes, found: Sequence[Place], metric: str) -> None:
    """Limits, scale and ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    def per_cent(y: float, _: object) -> str:
        return f"{100 * y:g}".replace("-", "\u2212")

    def far(place: Place) -> list[float]:
        below, above = place.along or (0.0, 0.0)
        # an interval that reaches much further than all points is cut by the frame
        return [max(place.y - below, place.y - most), min(place.y + above, place.y + most)]

    most = max(0.05, *(abs(place.y) for place in found))
    ys = [0.0, *(y for place in found for y in far(place))]
    xs = [1.0, *(place.x for place in found)]
    wide = max(xs) - min(xs) or 0.2
    xs += [max(place.x - place.across[0], min(xs) - wide / 4) for place in found if place.across]
    xs += [min(place.x + place.across[1], max(xs) + wide / 4) for place in found if place.across]
    low, high = min(ys), max(ys)
    if _bent(found):
        panel.set_yscale("asinh", linear_width=BEND)
        to, back = (lambda y: math.asinh(y / BEND)), (lambda y: BEND * math.sinh(y))
        edge = 0.05 * (to(high) - to(low))
        low, high = back(to(low) - edge), back(to(high) + edge)
        panel.yaxis.set_major_locator(FixedLocator([each / 100 for each in TICKS if low <= each / 100 <= high]))
        panel.yaxis.set_major_formatter(FuncFormatter(per_cent))
        panel.yaxis.set_minor_locator(FixedLocator([]))
    else:
        edge = 0.05 * (high - low) or 0.01
        low, high = low - edge, high + edge
        panel.yaxis.set_major_locator(style.ticks(6))
        panel.yaxis.set_major_formatter(FuncFormatter(per_cent))
    edge = 0.04 * (max(xs) - min(xs))
    panel.set(xlim=(min(xs) - edge, max(xs) + edge), ylim=(low, high), xlabel="speed-up (×), higher is better")
    tall = panel.get_window_extent().height + 8
    label = f"lossy-ness of {text(metric)} (%), lower is better"
    if length(label, SIZE) > tall:
        label = wrapped(f"lossy-ness (%) of {text(metric)}", tall, 1, SIZE)[0]
    panel.set_ylabel(label)
    panel.xaxis.set_major_locator(style.ticks(7))
    panel.grid()


def _numbers(figure: Figure, panel: Axes, found: Sequence[Place], front: Sequence[Place]) -> None:
    """The numbers of the front, each near its symbol, where no symbol and no other number is."""
    at = {id(place): panel.transData.transform((place.x, place.y)) for place in found}
    taken = [(*at[id(place)], 3.2) for place in found] + [(*panel.transData.transform((1, 0)), 4.0)]
    frame = panel.get_window_extent()
    numbers: list[tuple[float, float, float]] = []
    for i, place in enumerate(front, 1):
        x, y = at[id(place)]
        own = 4.4 if i < 10 else 6.4
        best = None
        for far in (9.0, 12.0, 16.0, 21.0, 27.0, 34.0, 44.0, 56.0, 70.0, 90.0):
            # to the lower right first: nothing that is better can be there
            for turn in (-45, -20, -70, 0, -90, 25, -115, 60, -140, 100, 140, 180):
                spot = x + far * math.cos(math.radians(turn)), y + far * math.sin(math.radians(turn))
                inside = frame.x0 + 5 < spot[0] < frame.x1 - 5 and frame.y0 + 5 < spot[1] < frame.y1 - 5
                hits = sum(max(0.0, size + own - math.dist(spot, other)) for *other, size in taken)
                covered = any(math.dist(spot, other) < size + own for *other, size in numbers)
                price = hits * 20 + far + (0 if inside else 500) + 400 * covered
                if best is None or price < best[0]:
                    best = price, spot
        spot = best[1]
        numbers.append((*spot, own))
        panel.annotate(
            str(i),
            (place.x, place.y),
            ((spot[0] - x), (spot[1] - y)),
            textcoords="offset points",
            fontsize=SIZE,
            weight="bold",
            ha="center",
            va="center_baseline",
            zorder=6,
            arrowprops=dict(arrowstyle="-", linewidth=0.5, shrinkA=1, shrinkB=2.5, relpos=(0.5, 0.5)),
            bbox=dict(boxstyle="round,pad=0.1", facecolor="white", edgecolor="none", alpha=0.75),
        )


Line = tuple[list[str], tuple[str, ...]]


def _key(front: Sequence[Place], base: Standing | None, width: float) -> list[Line]:
    """The lines of the list: name in one or two lines, and the figures."""
    lines = []
    for i, place in enumerate(front, 1):
        sure = "" if place.row.probability is None else f"{place.row.probability:.2f}"
        words = wrapped(style.label(place.row.arm), width - 12 - 90)
        lines.append((words, (str(i), f"{place.x:.2f}×", f"{100 * place.y:+.1f} %".replace("-", "\u2212"), sure)))
    if base and base.front:
        sure = "" if base.probability is None else f"{base.probability:.2f}"
        lines.insert(0, (["baseline"], ("", "1×", "0 %", sure)))
    return lines


def _list(figure: Figure, left: float, top: float, width: float, key: Sequence[Line]) -> None:
    """The front as a table: number, arm, speed-up, lossy-ness and the probability of being on it."""
    if not key:
        style.put(figure, left, top, "no method has intervals that could place it on the front", color=style.GREY)
        return
    columns = (left + width - 66, left + width - 28, left + width)
    for at, words in zip(columns, ("speed-up", "lossy-ness", "P(front)"), strict=True):
        style.put(figure, at, top, words, ha="right", color=style.GREY)
    style.put(figure, left, top, "on the front", color=style.GREY)
    for words, (number, *values) in key:
        top += LINE
        style.put(figure, left + 8, top, number, ha="right", weight="bold")
        for at, value in zip(columns, values, strict=True):
            style.put(figure, at, top, value, ha="right")
        for i, line in enumerate(words):
            top += LINE if i else 0
            style.put(figure, left + 12, top, line)
