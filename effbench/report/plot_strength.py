"""Strength of a method against its price: quality and speed-up by one parameter, beside a random choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from effbench.errors import InvalidError
from effbench.records import Arm, Interval, MetricValue
from effbench.report import figures
from effbench.report import plot_style as style
from effbench.report.plot_style import Drawn
from effbench.report.plot_text import SIZE, SMALL, text, wrapped
from effbench.report.standings import Standing
from effbench.report.strengths import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figures = list[tuple[float, Interval | MetricValue]]


def keep_rate(curves: Sequence[Curve], width: str = "one") -> Drawn:
    """Quality and speed-up against one parameter of one method: a pair of panels for each curve, with 95 % bands.

    Args:
        curves: of one family and parameter (`strengths.curves`).

    Raises:
        InvalidError: no curve has two strengths with a figure.
    """
    with style.styled():
        return _draw(curves, style.WIDTHS[width])


def _draw(curves: Sequence[Curve], width: float) -> Drawn:
    names = {(curve.family, curve.parameter) for curve in curves}
    if len(names) != 1:
        raise InvalidError("no strengths to plot: a figure is of one parameter of one method")
    ((method, parameter),) = names
    record = curves[0].points[0].arm.record
    primary, notes = record.primary_metric, ()

    def quality(row: Standing) -> MetricValue | None:
        return figures.quality(row.arm, row.record).get(primary)

    def speed(row: Standing) -> Interval | None:
        return row.arm.test_speedup

    huge: dict[str, Arm] = {}
    odd: dict[str, Arm] = {}

    def taken(curve: Curve, of: Callable[[Standing], Interval | MetricValue | None], most: float) -> list[Figures]:
        found: list[Figures] = [[], []]
        for each in curve.points:
            for side, row in zip(found, (each.arm, each.control), strict=True):
                figure = of(row) if row else None
                if row is None or figure is None:
                    continue
                if style.believed(figure.value, most):
                    side.append((each.value, figure))
                    odd.update({row.arm.name: row.arm} if style.odd(figure) else {})
                else:
                    huge[row.arm.name] = row.arm
        return found

    panels = [(curve, taken(curve, quality, style.LARGEST), taken(curve, speed, style.FASTEST)) for curve in curves]
    panels = [each for each in panels if max(len(each[1][0]), len(each[2][0])) > 1]
    notes += style.left_out(huge.values(), "figures too large to be true") + style.without_interval(odd.values())
    if not panels:
        raise InvalidError(f"no strengths to plot: of {text(method)} no two values of {parameter} have figures")
    notes += style.left_out(
        (each[0].points[0].arm.arm for each in panels[style.CELLS :]), f"more than {style.CELLS} curves"
    )
    panels = panels[: style.CELLS]
    kinds = [kind for kind in (1, 2) if any(len(each[kind][0]) > 1 for each in panels)]
    looks = (
        dict(color=style.BLUE, marker="o", markersize=3.5, linestyle="-"),
        dict(color=style.VERMILION, marker="X", markersize=3.8, linestyle=(0, (4, 1.5)), markeredgewidth=0),
    )
    legend: list[tuple[str, dict]] = [(wrapped(text(method), 200, 1)[0], looks[0])]
    if any(each[kind][1] for each in panels for kind in kinds):
        legend.append(("random choice, same budget", looks[1]))
    legend.append(("baseline", dict(color=style.BLACK, linestyle=(0, (1, 1)), linewidth=0.9)))
    frame = 48.0
    heights = [frame + 27] * len(panels)
    shown = [point.arm for each in panels for point in each[0].points]
    figure, corners = style.cells(width, heights, legend, style.foot(shown, width, "Bands: 95 % intervals."))
    own = figures.quality(record.baseline(), record).get(primary)
    flat = {1: own.value if own and style.believed(own.value, style.LARGEST) else None, 2: 1.0}
    heading = text(figures.heading(record, primary))
    titles = {1: wrapped(heading, frame + 10, 1)[0], 2: "speed-up (×) ↑"}
    limits = {kind: _limits([each[kind] for each in panels], flat[kind]) for kind in kinds}
    xs = [point.value for each in panels for point in each[0].points]
    edge = 0.08 * (max(xs) - min(xs))
    for (left, top, _, lowest), (curve, *both) in zip(corners, panels, strict=True):
        words = wrapped(text(curve.fixed) or "all else default", 228, 1)[0]
        style.put(figure, left, top + 5, words, weight="bold" if curve.fixed else "normal", fontsize=SIZE)
        each = (style.WIDTHS["one"] - 34 * len(kinds)) / len(kinds)
        for i, kind in enumerate(kinds):
            panel = style.axes(figure, left + 30 + i * (each + 36), top + 12, each, frame)
            if flat[kind] is not None:
                panel.axhline(flat[kind], **legend[-1][1])
            for side, look in zip(both[kind - 1], looks, strict=True):
                _band(panel, side, look)
            panel.set(xlim=(min(xs) - edge, max(xs) + edge), ylim=limits[kind])
            panel.set(xlabel=wrapped(text(parameter), each, 1, SIZE)[0] if lowest else "")
            panel.set_ylabel(titles[kind], fontsize=SMALL)
            panel.grid(axis="y")
            style.at_values(panel, [point.value for point in curve.points])
            panel.yaxis.set_major_locator(style.ticks(4))
    return Drawn(figure, notes)


def _band(panel: Axes, side: Figures, look: dict) -> None:
    """A line with its interval around it."""
    if not side:
        return
    xs, ys = [x for x, _ in side], [figure.value for _, figure in side]
    panel.plot(xs, ys, zorder=3, **look)
    around = [(x, figure.value, style.sides(figure, style.LARGEST)) for x, figure in side]
    sure = [(x, y - found[0], y + found[1]) for x, y, found in around if found]
    if sure:
        panel.fill_between(*zip(*sure, strict=True), color=look["color"], alpha=0.18, linewidth=0, zorder=2)
        panel.vlines(*zip(*sure, strict=True), color=look["color"], linewidth=0.6, zorder=2)


def _limits(panels: Iterable[Sequence[Figures]], flat: float | None) -> tuple[float, float]:
    """Of all panels the same, so that they compare."""
    found = [] if flat is None else [flat]
    for side in (side for both in panels for side in both):
        for _, figure in side:
            below, above = style.sides(figure, style.LARGEST) or (0.0, 0.0)
            found += [figure.value - below, figure.value + above]
    edge = 0.06 * (max(found) - min(found)) or 0.5
    return min(found) - edge, max(found) + edge
