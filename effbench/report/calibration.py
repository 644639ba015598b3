"""A calibration as a table: each figure with its interval, what it should be, and whether it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.stats import binomtest

from effbench.calibrate import LOADED_UNTIL, Setting, Trial
from effbench.report.markdown import clean

STYLES = {"ok": "green", "short": "bold red"}


@dataclass(frozen=True)
class Row:
    """One line: texts, and `verdict`, which is "ok", "short", "n < ..." or empty where nothing is demanded."""

    figure: str
    measured: str
    interval: str = ""
    bar: str = ""
    verdict: str = ""


def rate(figure: str, hits: int, n: int, low: float, high: float, bar: str, least: int) -> Row:
    """A share of n trials, with its exact (Clopper-Pearson) 95 % interval, that should lie between low and high.

    It is "short" where it lies outside, and also with fewer than `least` trials if its whole interval does.
    """
    bounds = binomtest(hits, n).proportion_ci(0.95, "exact")
    outside = not low <= hits / n <= high
    if bounds.low > high or bounds.high < low or (outside and n >= least):
        verdict = "short"
    else:
        verdict = "ok" if n >= least else f"n < {least}"
    interval = f"{100 * bounds.low:.1f} to {100 * bounds.high:.1f} %"
    return Row(figure, f"{100 * hits / n:.1f} % ({hits} of {n})", interval, bar, verdict)


def rows(setting: Setting, trials: list[Trial]) -> list[Row]:
    """The lines of the table; kinds of trials that were not made have none."""
    same, slower, loaded = ([t for t in trials if t.kind == kind] for kind in ("same", "slower", "loaded"))
    found = []
    if same:
        n = len(same)
        false = sum(t.verdict in ("FASTER", "SLOWER") for t in same)
        held = sum(t.speedup.low <= 1 <= t.speedup.high for t in same)
        undecided = sum(t.verdict == "AMBIGUOUS" for t in same)
        off = [100 * abs(t.speedup.value - 1) for t in same]
        found = [
            rate("false FASTER or SLOWER", false, n, 0, 0.01, "at most 1 %", 300),
            rate("intervals that hold 1", held, n, 0.93, 0.98, "93 to 98 %", 300),
            Row("AMBIGUOUS", f"{100 * undecided / n:.1f} % ({undecided} of {n})"),
            Row("noise floor: 95 % of speed-ups within", f"{np.percentile(off, 95):.2f} % of 1"),
            Row("half-width of the interval", _spread([100 * t.speedup.half_width for t in same], "%")),
            Row("price of the second place in a pair", f"{100 * np.median([_place(t) for t in same]):+.2f} %"),
        ]
    if slower:
        own = [100 * t.extra for t in slower]
        hits = sum(t.verdict == "SLOWER" for t in slower)
        title = f"{100 * setting.slower:g} % slower arm called SLOWER"
        found += [
            rate(title, hits, len(slower), 0.95, 1, "at least 95 %", 40),
            Row("  its extra work, timed alone", _spread(own, "% of a step"), "", *_near(own, 100 * setting.slower)),
            Row("  its speed-up", _spread([t.speedup.value for t in slower], "x", 3)),
            Row(
                "  seconds that took", _spread([t.seconds for t in slower], "s", 1), bar=f"at most {setting.budget:g} s"
            ),
        ]
    if loaded:
        found_widths = [t.speedup.half_width for t in loaded]
        widths = [math.inf if width is None else width for width in found_widths]
        hits = sum(width <= LOADED_UNTIL for width in widths)
        text = f"half-width {100 * LOADED_UNTIL:g} % within {setting.budget:g} s beside a busy process"
        found += [
            rate(text, hits, len(loaded), 1, 1, "always", 5),
            Row("  half-width", _spread([100 * width for width in widths], "%")),
            Row("  seconds that took", _spread([t.seconds for t in loaded], "s", 1)),
        ]
    return found


def print_calibration(setting: Setting, trials: list[Trial], console: Console) -> None:
    """Print the table of a calibration, the machine above it and how to read it below."""
    threads = f"{setting.threads} thread{'s' if setting.threads > 1 else ''}"
    console.print(Text(f"{clean(setting.device_model)}, {threads}", "bold"))
    images = f"{setting.batch} image{'s' if setting.batch > 1 else ''} a step"
    console.print(Text(f"{clean(setting.backbone)}, {images}, {setting.pairs} pairs a trial", "dim"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    table.add_column("figure", overflow="fold")
    for name in ("measured", "95 % interval", "should be", ""):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows(setting, trials):
        verdict = Text(row.verdict, STYLES.get(row.verdict, "yellow"))
        table.add_row(row.figure, row.measured, row.interval, row.bar, verdict)
    console.print(table)


def _spread(values: list[float], unit: str, digits: int = 2) -> str:
    low, middle, high = np.percentile(values, [0, 50, 100])
    return f"{middle:.{digits}f} {unit} ({low:.{digits}f} to {high:.{digits}f})"


def _near(own: list[float], wanted: float) -> tuple[str, str]:
    """What the extra work should be: within a fifth of what was asked for, or the row above is about another arm."""
    low, high = 0.8 * wanted, 1.2 * wanted
    return f"{low:g} to {high:g} %", "ok" if low <= np.median(own) <= high else "short"


def _place(trial: Trial) -> float:
    """How much longer, as a share, the second step of a pair takes than the first.

    The pairs kept begin with turn 3 (three are warm-up), and in odd turns the baseline comes second.
    """
    ratios = np.log(trial.baseline) - np.log(trial.arm)
    return float(np.expm1((np.median(ratios[::2]) - np.median(ratios[1::2])) / 2))
