"""The one table of an envelope that everybody reads: few columns, short cells, in the order of the ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from effbench.records import Arm, Flops
from effbench.report import figures, verdicts
from effbench.report.markdown import escape, table
from effbench.report.standings import BLIND, Standing
from effbench.report.tables import name
from effbench.store import created

NONE = figures.NONE
METHODS = 12  # methods that are shown at once, beyond those on the front
FEW = 6  # methods below the line that are
BREAK = "<br>"


@dataclass(frozen=True)
class Notes:
    """What cells refer to by number: sources, and runs where there are several."""

    sources: Mapping[str, int]
    runs: Mapping[str, int]


def notes(rows: list[Standing]) -> Notes:
    """The sources in the order of the rows, and the runs newest first."""
    sources = dict.fromkeys(part for row in rows for part in sources_of(row.arm))
    runs = dict.fromkeys(row.record.id for row in sorted(rows, key=_age, reverse=True))
    return Notes(*({each: n for n, each in enumerate(some, 1)} for some in (sources, runs)))


def sources_of(arm: Arm) -> list[str]:
    return [part for part in arm.source.split("; ") if part]


def _age(row: Standing) -> tuple:
    return created(row.record), row.record.id


def main_table(rows: list[Standing]) -> tuple[str, list[tuple[str, str]]]:
    """The table, and what is folded under it: (title, table) of the rows that would make it too long for a phone."""
    told = notes(rows)
    above = [row for row in rows if row.arm.kind == "method" and not row.below]
    below = [row for row in rows if row.below]
    blind = [row for row in rows if figures.apart(row.arm)]
    plain = [row for row in rows if row.arm.kind == "control" and not figures.apart(row.arm)]
    room = max(0, METHODS - sum(row.front for row in above))
    beyond = set(map(id, [row for row in above if not row.front][room:]))
    first = [row for row in above if id(row) not in beyond]
    rest = [row for row in above if id(row) in beyond]
    blocks = [("", [row for row in rows if row.arm.kind == "baseline"] + first)]
    folded = []
    if rest:
        folded.append((f"{len(rest)} more methods, none of them on the front", _table(rows, rest, told)))
    line = f"below the line: not shown to beat {' or '.join(BLIND)} at the same budget"
    kept = below if len(below) <= FEW else [row for row in below if row.front][:FEW]
    hidden = [row for row in below if id(row) not in {id(each) for each in kept}]
    if kept:
        blocks.append((line, kept))
    if hidden:
        folded.append((f"{len(hidden)} {'more ' if kept else ''}methods {line}", _table(rows, hidden, told)))
    if len(blind) > figures.FEW:
        folded.append((f"{len(blind)} more controls", _table(rows, blind, told)))
        blind = []
    blocks.append(("controls", plain + blind))
    return _blocks(rows, blocks, told), folded


def _table(rows: list[Standing], some: list[Standing], told: Notes) -> str:
    return _blocks(rows, [("", some)], told)


def _blocks(rows: list[Standing], blocks: list[tuple[str, list[Standing]]], told: Notes) -> str:
    """A table of the blocks, each under its title; columns that no row of the envelope fills are left out."""
    first = rows[0].record
    header = ["front", "test speed-up", f"lossy-ness of {escape(first.primary_metric)}"]
    header += [escape(figures.heading(first, first.primary_metric)), "GFLOPs", "MiB", "train speed-up"]
    cells = {id(row): _cells(row) for row in rows}
    used = [i for i in range(len(header)) if any(line[i] != NONE for line in cells.values())]
    lines = []
    for title, some in blocks:
        if title and some:
            lines.append([f"*{title}:*", *([""] * len(used))])
        lines += [[_arm(row, told), *(cells[id(row)][i] for i in used)] for row in some]
    return table(["arm", *(header[i] for i in used)], lines)


def _arm(row: Standing, told: Notes) -> str:
    """Name, then phase, source and run, then why it is below the line."""
    arm = row.arm
    about = [] if arm.kind == "baseline" else [arm.phase]
    about += [f"\\[{', '.join(str(told.sources[each]) for each in sources_of(arm))}\\]"] if arm.source else []
    about += [f"run {told.runs[row.record.id]}"] if len(told.runs) > 1 else []
    lines = [name(row), " · ".join(about), verdicts.reason(row)]
    return BREAK.join(line for line in lines if line)


def _cells(row: Standing) -> list[str]:
    arm = row.arm
    value = figures.quality(arm, row.record).get(row.record.primary_metric)
    loss = f"n/a ({arm.no_quality})" if arm.no_quality else figures.lossiness(value)
    train = NONE if arm.train_time else escape(figures.trained_by(arm))
    if arm.train_time and arm.train_speedup:
        train = _broken(f"{figures.ratio(arm.train_speedup)} {figures.verdict(arm.train_speedup)}")
    return [_front(row), _speed(arm), _broken(escape(loss)), _broken(figures.metric(value, interval=True)),
            _gflops(arm.test_flops), _memory(arm), train]  # fmt: skip


def _front(row: Standing) -> str:
    """`★ 95 %`: on the front, and the probability of it; without the star the probability alone."""
    if row.probability is None:
        return NONE
    return f"{'★ ' if row.front else ''}{figures.percent(row.probability)}"


def _speed(arm: Arm) -> str:
    if arm.status != "ok":
        return escape(figures.status(arm))
    if arm.test_speedup is None:
        return NONE
    figure, _, interval = figures.ratio(arm.test_speedup).partition(" ")
    lines = [f"**{figure}** {escape(figures.verdict(arm.test_speedup))}", interval]
    realised = figures.realised(arm, interval=True)
    lines.append(f"realised {realised}" if realised != NONE else "")
    return BREAK.join(line for line in lines if line)


def _gflops(flops: Flops | None) -> str:
    useful = figures.billions(flops.useful) if flops and flops.useful else NONE
    differs = flops is not None and useful not in (NONE, figures.billions(flops.dense))
    return figures.gflops(flops) + (f"{BREAK}useful {useful}" if differs else "")


def _memory(arm: Arm) -> str:
    parts = [("peak", figures.mebibytes(figures.peak(arm.memory))), ("weights", figures.mebibytes(arm.weight_bytes))]
    return BREAK.join(f"{what} {count}" for what, count in parts if count != NONE) or NONE


def _broken(text: str) -> str:
    """A figure above its interval and above its note."""
    return text.replace(" \\[", f"{BREAK}\\[").replace(" [", f"{BREAK}[").replace("] ", f"]{BREAK}")
