"""Text of plots: what records say made safe, measured, broken into lines and kept apart. Lengths are in points."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from effbench.report.markdown import clean

SIZE, SMALL = 7.0, 6.0  # of letters; smaller is hard to read in print
LINE = 8.4  # from one line of SMALL to the next
FONT = "DejaVu Sans"  # comes with matplotlib: the same picture on every machine


def text(words: str, limit: int = 200) -> str:
    """Text of a record on one line: hidden characters left out, those that the font lacks replaced."""
    known = _glyphs()
    return "".join(c if ord(c) in known else "\ufffd" for c in clean(words, limit))


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(FONT)).get_charmap())


@cache
def _measure() -> Any:
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    renderer = RendererAgg(8, 8, 72)
    return lambda words, size: renderer.get_text_width_height_descent(
        words, FontProperties(family=[FONT], size=size), False
    )[0]


def length(words: str, size: float = SMALL) -> float:
    """How long a text is."""
    return float(_measure()(words, size)) if words else 0.0


def wrapped(words: str, width: float, lines: int = 2, size: float = SMALL) -> list[str]:
    """Text in at most that many lines, broken after a space or a sign of a spec; `…` where it does not fit."""
    found: list[str] = []
    rest = words
    while rest and len(found) < lines:
        if length(rest, size) <= width:
            return [*found, rest]
        fits = max((n for n in range(1, len(rest)) if length(rest[:n], size) <= width), default=1)
        if len(found) == lines - 1:
            while fits > 1 and length(rest[:fits] + "…", size) > width:
                fits -= 1
            return [*found, rest[:fits] + "…"]
        breaks = [n for n in range(fits, fits // 3, -1) if rest[n - 1] in " ,:+;"]
        fits = breaks[0] if breaks else fits
        found.append(rest[:fits].rstrip())
        rest = rest[fits:].lstrip()
    return found


def rows_of(entries: Sequence[str], width: float, sign: float = 14, gap: float = 8) -> list[list[tuple[float, int]]]:
    """A legend's entries in rows as wide as the figure: for each its distance from the left, and its number."""
    rows: list[list[tuple[float, int]]] = [[]]
    at = 0.0
    for i, words in enumerate(entries):
        wide = sign + length(words)
        if rows[-1] and at + wide > width:
            rows.append([])
            at = 0.0
        rows[-1].append((at, i))
        at += wide + gap
    return rows if entries else []


def spread(wanted: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones that lie at least `least` apart and, where there is room, between low and high."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    at = [wanted[i] for i in order]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + least)
    if at:
        at[-1] = min(at[-1], max(high, low + least * (len(at) - 1)))
    for i in range(len(at) - 2, -1, -1):
        at[i] = min(at[i], at[i + 1] - least)
    if at and at[0] < low:
        at = [max(each, low + least * i) for i, each in enumerate(at)]
    found = [0.0] * len(at)
    for place, i in zip(at, order, strict=True):
        found[i] = place
    return found
