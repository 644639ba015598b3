"""How often `effbench gate --times` raises a false alarm, and how often it catches a slow-down, from A/A samples.

The samples are of this machine: a night in which base and head are the same commit, with many sets of processes.

    effbench gate --times --reference HEAD --head HEAD --processes 16 --budget 70m --samples aa.parquet
    python benchmarks/gate_rates.py aa.parquet --processes 6 --turns 80

A simulated night draws whole sets of processes (all cells of a set together, for what disturbs a machine disturbs all
of them), and within each cell blocks of turns (moving-block bootstrap, Kuensch, Ann. Statist. 17, 1989), for the first
look and for measuring again. What follows is the gate's own code. A slow-down is planted by stretching the head's times
of one cell, in both looks. Without a file the samples are drawn: process effects and turn noise, both normal.

The bar for false alarms is read as: at most one reported change in 300 nights, each of as many cells as the samples
have, on an unchanged tree. Flags that do not recur are no alarms; nights that are INVALID are counted apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import beta

from effbench import nightly_stats as stats
from effbench.nightly import Look, judge, judge_again
from effbench.nightly_cells import Cell
from effbench.nightly_turns import Measured

BLOCK = 10  # turns that are drawn together
Set = list[dict[str, np.ndarray]]
"""Of one set of processes, by cell: seconds by role, (turns,) each."""


def read(path: Path) -> tuple[list[str], list[Set]]:
    """Cells, and the sets of processes of the first look."""
    frame = pd.read_parquet(path)
    frame = frame[frame["look"] == 1].sort_values("turn", kind="stable")
    cells = list(dict.fromkeys(frame["cell"]))
    sets = []
    for _, one in frame.groupby("process"):
        by_cell = {cell: rows for cell, rows in one.groupby("cell")}
        if set(by_cell) == set(cells):
            sets.append(
                [{role: r["seconds"].to_numpy() for role, r in by_cell[cell].groupby("role")} for cell in cells]
            )
    return cells, sets


def drawn(
    rng: np.random.Generator, cells: int, sets: int, turns: int, process_sd: float, turn_sd: float
) -> tuple[list[str], list[Set]]:
    """Samples that no machine made: each process shifts all its times, each step has noise of its own."""

    def one() -> Set:
        found = []
        for cell in range(cells):
            roles = ("base", "head", "twin") if cell % 3 == 0 else ("base", "head")
            shift = {role: rng.normal(0, process_sd / np.sqrt(2)) for role in roles}
            found.append(
                {role: 0.03 * np.exp(shift[role] + rng.normal(0, turn_sd / np.sqrt(2), turns)) for role in roles}
            )
        return found

    return [f"cell {cell}" for cell in range(cells)], [one() for _ in range(sets)]


def look(
    rng: np.random.Generator, sets: Sequence[Set], places: Sequence[int], turns: int, slower: dict[int, float]
) -> Look:
    """One look at some of the cells, from resampled turns of given sets.

    Args:
        slower: by place, how much longer the head's steps take, as a share.
    """
    found = []
    for one in sets:
        measured = []
        for place in places:
            size = len(one[place]["base"]) // 2 * 2
            starts = 2 * rng.integers(0, max(1, (size - BLOCK) // 2 + 1), -(-turns // BLOCK))
            index = (starts[:, None] + np.arange(BLOCK)).ravel()[:turns] % size
            seconds = {role: taken[index] for role, taken in one[place].items()}
            seconds["head"] = seconds["head"] * (1 + slower.get(place, 0.0))
            measured.append(Measured(seconds=seconds))
        found.append(measured)
    cells = [Cell(method=f"cell {place}") for place in places]
    return Look(1, cells, found)


def night(
    rng: np.random.Generator, sets: Sequence[Set], processes: int, turns: int, slower: dict[int, float]
) -> tuple[list[int], list[int], str, float]:
    """Places that were flagged, those that were reported, why the night is INVALID, and its noise floor."""
    apart = len(sets) >= 2 * processes  # else a set may stand in both looks
    chosen = rng.choice(len(sets), 2 * processes, replace=not apart)
    every = range(len(sets[0]))
    first = look(rng, [sets[i] for i in chosen[:processes]], every, turns, slower)
    judged = judge(first)
    suspects = [place for place, flag in judged.flagged.items() if flag]
    reported = []
    if suspects:
        again = look(rng, [sets[i] for i in chosen[processes:]], suspects, turns, slower)
        for place, found in judge_again(first, judged, suspects, again).items():
            if not isinstance(found, str) and stats.recurs(judged.estimates[place], *found, judged.floor):
                reported.append(place)
    return suspects, reported, judged.invalid, judged.floor


def rates(
    rng: np.random.Generator, sets: Sequence[Set], nights: int, processes: int, turns: int, slower: float
) -> dict[str, float]:
    """Over many nights: shares of them.

    Returns:
        flagged, alarms: nights with a cell flagged or reported that was not slowed down; caught: nights in which the
        slowed cell was reported as SLOWER, of those that are not INVALID; invalid; floor: median.
    """
    count = dict(flagged=0, alarms=0, caught=0, invalid=0)
    floors = []
    for index in range(nights):
        planted = {index % len(sets[0]): slower} if slower else {}
        suspects, reported, invalid, floor = night(rng, sets, processes, turns, planted)
        count["flagged"] += bool(set(suspects) - set(planted))
        count["alarms"] += bool(set(reported) - set(planted))
        count["caught"] += bool(planted and set(reported) & set(planted))
        count["invalid"] += bool(invalid)
        floors.append(floor)
    judged = nights - count["invalid"]
    return count | dict(nights=nights, judged=judged, floor=float(np.median(floors)))


def bound(hits: int, of: int, upper: bool) -> float:
    """One-sided 95 % bound of a share (Clopper and Pearson)."""
    if upper:
        return 1.0 if hits == of else float(beta.ppf(0.95, hits + 1, of - hits))
    return 0.0 if hits == 0 else float(beta.ppf(0.05, hits, of - hits + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", nargs="?", type=Path, help="of effbench gate --times --samples")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--turns", type=int, default=80)
    parser.add_argument("--nights", type=int, default=3000)
    parser.add_argument("--planted", type=int, default=1000, help="nights with a planted slow-down")
    parser.add_argument("--process-sd", type=float, default=0.01, help="of drawn samples")
    parser.add_argument("--turn-sd", type=float, default=0.05, help="of drawn samples")
    parser.add_argument("--sets", type=int, default=200, help="of drawn samples")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = np.random.default_rng(asked.seed)
    if asked.samples:
        cells, sets = read(asked.samples)
    else:
        cells, sets = drawn(rng, 12, asked.sets, asked.turns, asked.process_sd, asked.turn_sd)
    if len(sets) < asked.processes or not cells:
        parser.error(f"{len(sets)} sets of processes hold all cells; at least {asked.processes} are needed")
    print(f"{len(cells)} cells, {len(sets)} sets of processes; a night takes {asked.processes} of them twice")
    if len(sets) < 2 * asked.processes:
        print(f"fewer than {2 * asked.processes} sets: the two looks of a night may share one, which favours alarms")
    for place, cell in enumerate(cells):
        effects = [stats.effect(one[place]["base"], one[place]["head"]) for one in sets]
        middles = [100 * each.middle for each in effects]
        within = 100 * np.sqrt(np.mean([each.variance for each in effects]))
        print(f"  {cell}: mean {np.mean(middles):+.2f} %, sd {np.std(middles, ddof=1):.2f} %, of turns {within:.2f} %")
    for slower, nights in ((0.0, asked.nights), (0.05, asked.planted), (0.10, asked.planted), (-0.05, asked.planted)):
        found = rates(rng, sets, nights, asked.processes, asked.turns, slower)
        alarms, judged, caught = found["alarms"], max(found["judged"], 1), found["caught"]
        parts = []
        if slower:  # a night that is INVALID catches nothing
            least = 100 * bound(caught, nights, upper=False)
            parts.append(f"{100 * slower:+.0f} % caught in {100 * caught / nights:.1f} % of nights (>= {least:.1f} %)")
        most = 300 * bound(alarms, judged, upper=True)
        parts.append(f"false alarms: {alarms} in {judged} nights, {300 * alarms / judged:.2f} per 300 (<= {most:.2f})")
        parts.append(f"flagged at first, not slowed: {found['flagged']} nights; INVALID: {found['invalid']} nights")
        parts.append(f"noise floor {100 * found['floor']:.2f} %")
        line = f"{nights} nights: " + "; ".join(parts)
        print(line, flush=True)


if __name__ == "__main__":
    main()
