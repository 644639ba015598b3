"""Tokens that a method leaves, block by block: a panel for each method."""

from __future__ import annotations

from collections.abc import Sequence

from effbench.errors import InvalidError
from effbench.records import Arm
from effbench.report import plot_style as style
from effbench.report.plot_style import Drawn
from effbench.report.plot_text import SIZE, spread, text, wrapped
from effbench.report.standings import Standing
from effbench.report.strengths import family, settings

LINES = 8  # lines of a panel
LONGEST = 400  # blocks of a tower


def tokens(rows: Sequence[Standing], width: str = "one") -> Drawn:
    """Tokens that enter each block's MLP of the image tower, a panel for each method that removes some.

    Raises:
        InvalidError: no arm removes tokens there.
    """
    with style.styled():
        return _draw(rows, style.WIDTHS[width])


def _draw(rows: Sequence[Standing], width: float) -> Drawn:
    style.begin(rows, "tokens by layer")
    base = next((row.arm.tokens for row in rows if row.arm.kind == "baseline"), ())
    counted = [row.arm for row in rows if row.arm.tokens and row.arm.kind == "method" and row.arm.status == "ok"]
    counted += [row.arm for row in rows if row.arm.tokens and row.arm.control == "resize"]
    huge = [arm for arm in counted if max(arm.tokens) > style.LARGEST or len(arm.tokens) > LONGEST]
    notes = style.left_out(huge, f"more than {style.LARGEST:,.0f} tokens or {LONGEST} blocks")
    groups: dict[str, dict[tuple[int, ...], list[Arm]]] = {}
    for arm in counted:
        # a shorter tower with all its tokens removes none
        if arm not in huge and set(arm.tokens) != set(base):
            groups.setdefault(family(arm.spec), {}).setdefault(arm.tokens, []).append(arm)
    if not groups:
        hint = "measure a method that does, e.g. token_prune" if not huge else ""
        raise InvalidError("no tokens by layer to plot: no arm removes tokens in the image tower", hint)
    base = base if base and max(base) <= style.LARGEST and len(base) <= LONGEST else ()
    for name in list(groups)[style.CELLS :]:
        notes += style.left_out((arms[0] for arms in groups.pop(name).values()), f"more than {style.CELLS} panels")
    for lines in groups.values():
        for counts in sorted(lines, key=sum, reverse=True)[LINES:]:
            notes += style.left_out(lines.pop(counts), f"more than {LINES} lines in a panel")

    depth = max([len(base), *(len(counts) for lines in groups.values() for counts in lines)])
    most = max([*base, *(max(counts) for lines in groups.values() for counts in lines)])
    words = {
        name: {counts: wrapped(_same(arms), 90) for counts, arms in lines.items()} for name, lines in groups.items()
    }
    steps = {name: 8.0 if max(map(len, said.values())) < 2 else 15.0 for name, said in words.items()}
    heights = [30 + max(46.0, len(lines) * steps[name] + 6) for name, lines in groups.items()]
    legend = [("baseline", dict(color=style.GREY, linestyle=(0, (1, 1))))] if base else []
    figure, corners = style.cells(width, heights, legend, style.foot(rows, width))
    for (left, top, high, lowest), (name, lines) in zip(corners, groups.items(), strict=True):
        style.put(figure, left, top + 5, wrapped(text(name), 230, 1)[0], weight="bold", fontsize=SIZE)
        frame = high - 30
        panel = style.axes(figure, left + 28, top + 12, 100, frame)
        if base:
            panel.plot(range(len(base)), base, color=style.GREY, linestyle=(0, (1, 1)), zorder=1)
        ordered = sorted(lines, key=lambda counts: (-counts[-1], -sum(counts)))
        look = {}
        for i, counts in enumerate(ordered):
            colour, marker = style.COLOURS[i % len(style.COLOURS)], style.MARKERS[i % len(style.MARKERS)]
            every = (i % 3, max(1, len(counts) // 4))
            look[counts] = dict(color=colour, marker=marker, markersize=3.2, markeredgewidth=0)
            panel.plot(range(len(counts)), counts, markevery=every, label=" ".join(words[name][counts]), **look[counts])
        panel.set(
            xlim=(-0.3, max(depth - 1, 1) + 0.3),
            ylim=(0, 1.06 * most or 1),
            xlabel="block" if lowest else "",
            ylabel="tokens",
        )
        panel.grid(axis="y")
        panel.xaxis.set_major_locator(style.ticks(5, True))
        panel.yaxis.set_major_locator(style.ticks(4, True))
        wanted = [top + 12 + frame * (1 - counts[-1] / (1.06 * most or 1)) for counts in ordered]
        places = spread(wanted, steps[name], top + 14, top + 12 + frame + 6)
        for at, counts in zip(places, ordered, strict=True):
            style.swatch(figure, left + 132, at, **look[counts])
            for i, said in enumerate(words[name][counts]):
                style.put(figure, left + 146, at + 7 * i - 3.5 * (len(words[name][counts]) - 1), said)
    return Drawn(figure, notes)


def _same(arms: Sequence[Arm]) -> str:
    """What the specs of arms with the same token counts have in common."""
    shortest = min((settings(arm.spec) for arm in arms), key=lambda words: (len(words), words))
    masked = ", masked" if any(arm.structure and arm.structure.masked_tokens for arm in arms) else ""
    return text(shortest or "defaults") + masked + (f" ({len(arms)} arms)" if len(arms) > 1 else "")
