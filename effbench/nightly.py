"""`effbench gate --times`: whether step times changed between two code versions. Read it from top to bottom. No torch.

Base and head run in processes of their own, from worktrees of their own, and take turns; a twin of base runs along in
every third cell and tells tonight's noise floor. What seems to have changed is measured again in fresh processes, and
only what recurs is reported, whether FASTER or SLOWER: an unexpected gain is often work that was lost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effbench import nightly_stats as stats
from effbench.errors import InvalidError
from effbench.findings import Finding, Outcome
from effbench.measure.environment import cores, device_model, load_per_core
from effbench.nightly_cells import Cell
from effbench.nightly_stats import Effect, Estimate
from effbench.nightly_turns import Measured, Worker, command, measure
from effbench.nightly_versions import Version, checked_out, environment

if TYPE_CHECKING:
    import pandas

TITLE = "effbench gate --times"
FIGURE = "step time"
FIRST_SHARE = 0.75  # of the budget, for the first look; the rest is for measuring again
TWIN_EVERY = 3  # cells
COLUMNS = ("look", "process", "cell", "twin", "turn", "role", "seconds")


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        reference: the base, as git names it.
        head: likewise; None for the working tree.
        turns: of each cell in each set of processes, at most.
        processes: sets of fresh processes.
        budget: seconds for all of it; cells get fewer turns where it does not suffice.
    """

    reference: str
    cells: Sequence[Cell]
    head: str | None = None
    turns: int = 80
    processes: int = 6
    budget: float = 900.0
    seed: int = 0
    device: str = "cpu"
    threads: int = field(default_factory=cores)
    repository: Path = Path(".")


@dataclass
class Look:
    """All cells in several sets of processes; the first look, or the second one at some of them."""

    number: int
    cells: Sequence[Cell]
    sets: list[list[Measured]]
    least: int = 1  # sets of processes

    def twin(self, place: int) -> bool:
        """Whether a twin of base took part in a cell."""
        return all("twin" in each[place].seconds for each in self.sets)

    def error(self, place: int) -> str:
        """Why a cell cannot be judged; empty where it can."""
        measured = [each[place] for each in self.sets]
        for each in measured:
            if each.error:
                return each.error
            if each.envelope != measured[0].envelope:
                return "another envelope in another process: does the task or the backbone draw at random?"
        if len(measured) < self.least:
            return (
                f"too few samples: {len(measured)} sets of processes, not {self.least}; allow more time with --budget"
            )
        fewest = min(len(each.seconds["base"]) for each in measured)
        if fewest < stats.LEAST_TURNS:
            return (
                f"too few samples: {fewest} turns in a process, not {stats.LEAST_TURNS}; allow more time with --budget"
            )
        return ""

    def effects(self, place: int, role: str = "head") -> list[Effect]:
        """Of a cell without error, one per set of processes."""
        return [stats.effect(each[place].seconds["base"], each[place].seconds[role]) for each in self.sets]

    def typical(self, place: int) -> float:
        """Seconds of a step of base: the median over the sets of processes of each one's median."""
        return float(np.median([np.median(each[place].seconds["base"]) for each in self.sets]))

    def samples(self) -> list[tuple[Any, ...]]:
        """Rows of `COLUMNS`."""
        return [
            (self.number, process, self.cells[place].name, "twin" in measured.seconds, turn, role, spent)
            for process, each in enumerate(self.sets)
            for place, measured in enumerate(each)
            for role, taken in measured.seconds.items()
            for turn, spent in enumerate(taken)
        ]


def run(plan: Plan, live: Any) -> tuple[Outcome, pandas.DataFrame]:
    """Measure, judge, measure again what seems to have changed.

    Args:
        live: shows progress (see `effbench.live`).

    Returns:
        the outcome, and every measured step with `COLUMNS`.

    Raises:
        UsageError: no such commit. InvalidError: a version cannot run at all.
    """
    import pandas as pd

    begun = time.monotonic()
    twins = [place % TWIN_EVERY == 0 for place in range(len(plan.cells))]
    with checked_out(plan.repository, plan.reference, plan.head) as (base, head):
        live.note(f"base: {base.said}; head: {head.said}")
        first = _look(1, plan, base, head, plan.cells, twins, begun + FIRST_SHARE * plan.budget, live)
        judged = judge(first)
        again = None
        if suspects := [place for place, flag in judged.flagged.items() if flag]:
            live.note(f"to be measured again: {'; '.join(plan.cells[place].name for place in suspects)}")
            cells = [plan.cells[place] for place in suspects]
            again = _look(2, plan, base, head, cells, [False] * len(cells), begun + plan.budget, live)
    outcome = conclude(first, judged, suspects, again, (base, head), plan, time.monotonic() - begun)
    samples = [row for look in (first, again) if look for row in look.samples()]
    return outcome, pd.DataFrame(samples, columns=COLUMNS)


def _look(
    number: int,
    plan: Plan,
    base: Version,
    head: Version,
    cells: Sequence[Cell],
    twins: Sequence[bool],
    until: float,
    live: Any,
) -> Look:
    title = "first look" if number == 1 else "measured again"
    title += f", {plan.processes} sets of processes"
    live.stage(title, len(cells) * plan.processes, "cells")
    found: list[list[Measured]] = []
    roles = (("base", base), ("head", head), *([("twin", base)] if any(twins) else []))
    for process in range(plan.processes):
        left = (until - time.monotonic()) / (plan.processes - process)
        if found and left <= 0:
            break
        workers: list[Worker] = []
        try:
            for role, version in roles:
                workers.append(Worker(role, command(version), environment(version)))
        except BaseException:
            for worker in workers:
                worker.end()
            raise
        setting = dict(seed=plan.seed, device=plan.device, threads=plan.threads)
        timed = partial(_advance, live, process * len(cells))
        found.append(measure(workers, cells, twins, plan.turns, left, process, setting, timed))
    return Look(number, cells, found, min(plan.processes, stats.LEAST_PROCESSES))


def _advance(live: Any, ahead: int, cells: int) -> None:
    live.advance(ahead + cells)


@dataclass(frozen=True)
class Judged:
    """The first look, judged.

    Attributes:
        errors, estimates, flagged: by the cell's place; a cell has an error or an estimate.
        twins: base against base.
        floor: tonight's noise floor; None where no twin could be measured.
        invalid: why the whole night tells nothing; empty where it does.
    """

    errors: dict[int, str]
    estimates: dict[int, Estimate]
    flagged: dict[int, bool]
    twins: dict[int, Estimate]
    floor: float | None
    invalid: str


def judge(look: Look) -> Judged:
    """Estimate every cell of a look; flag those that seem to have changed."""
    errors = {place: error for place in range(len(look.cells)) if (error := look.error(place))}
    good = [place for place in range(len(look.cells)) if place not in errors]
    twins = {place: look.effects(place, "twin") for place in good if look.twin(place)}
    effects = {place: look.effects(place) for place in good}
    common = stats.spread([*effects.values(), *twins.values()])
    estimates = {place: stats.estimate(found, common) for place, found in effects.items()}
    same = {place: stats.estimate(found, common) for place, found in twins.items()}
    if not twins:
        invalid = "no cell could be measured with a twin of base, so that tonight's noise is not known"
        return Judged(errors, estimates, dict.fromkeys(estimates, False), same, None, invalid)
    floor = stats.noise_floor(list(twins.values()), common)
    invalid = ""
    if floor > stats.LOUD:
        invalid = (
            f"tonight's noise floor is {100 * floor:.1f} %: a change of {100 * stats.LOUD:.0f} % would not be seen; "
            "run it when the machine is quiet"
        )
    for (place, each), outside in zip(same.items(), stats.flagged(list(same.values()), 0.0), strict=True):
        if outside:
            invalid = (
                f"base against base is outside its band in {look.cells[place].name}: {_change(each)}; "
                "something disturbed one of the processes"
            )
    flags = dict(zip(estimates, stats.flagged(list(estimates.values()), floor), strict=True))
    flags = {place: flag and not invalid for place, flag in flags.items()}
    return Judged(errors, estimates, flags, same, floor, invalid)


def judge_again(
    first: Look, judged: Judged, suspects: Sequence[int], again: Look
) -> dict[int, str | tuple[Estimate, Estimate]]:
    """By the suspect's place in the first look: fresh processes alone, and all together; or why there is neither."""
    good = {place: again.effects(place) for place in range(len(suspects)) if not again.error(place)}
    common = stats.spread([*(first.effects(place) for place in judged.estimates), *good.values()])
    found: dict[int, str | tuple[Estimate, Estimate]] = {}
    for place, suspect in enumerate(suspects):
        if place in good:
            everything = [*first.effects(suspect), *good[place]]
            found[suspect] = (stats.estimate(good[place], common), stats.estimate(everything, common))
        else:
            found[suspect] = again.error(place)
    return found


def conclude(
    first: Look,
    judged: Judged,
    suspects: Sequence[int],
    again: Look | None,
    versions: tuple[Version, Version],
    plan: Plan,
    seconds: float,
) -> Outcome:
    """What the night says, cell by cell."""
    floor = judged.floor or 0.0
    second = judge_again(first, judged, suspects, again) if again is not None else {}
    findings = []
    for place, cell in enumerate(first.cells):
        if place in judged.errors:
            findings.append(Finding(cell.name, FIGURE, "INVALID", judged.errors[place]))
            continue
        estimate, before = judged.estimates[place], 1000 * first.typical(place)
        if judged.invalid:
            said = f"not judged: {_change(estimate)}"
            findings.append(Finding(cell.name, FIGURE, "NOTE", said, *_times(before, estimate)))
        else:
            findings.append(_finding(cell.name, before, estimate, second.get(place), floor))
    for place, each in judged.twins.items():
        said = f"not judged: {_change(each)}" if judged.invalid else _change(each)
        verdict = "NOTE" if judged.invalid else "PASS"
        findings.append(Finding(first.cells[place].name, "base against base", verdict, said))
    notes = [
        f"base: {versions[0].said}, {versions[0].commit}",
        f"head: {versions[1].said}, {versions[1].commit}",
        f"{_device(first)}, {plan.threads} threads, load per core {_load()}; "
        f"{plan.processes} sets of processes, {_turns(first)} turns of a cell in each; {seconds / 60:.1f} minutes",
    ]
    if judged.floor is not None:
        notes.append(
            f"noise floor tonight: {100 * judged.floor:.2f} %; a change counts beyond "
            f"{100 * max(stats.MARGIN, judged.floor):.1f} %, either way, if it recurs in fresh processes"
        )
    invalid = judged.invalid
    if invalid and judged.floor is not None:
        threshold = max(stats.MARGIN, 2 * floor)
        beyond = [place for place, each in judged.estimates.items() if each.sure and each.beyond(threshold)]
        named = "; ".join(f"{first.cells[place].name} {_percent(judged.estimates[place])}" for place in beyond[:3])
        invalid += f"; even so {len(beyond)} of the cells stand out: {named}" if beyond else ""
    return _verdict(findings, invalid, len(first.cells), tuple(notes))


def _finding(
    cell: str, before: float, first: Estimate, again: str | tuple[Estimate, Estimate] | None, floor: float
) -> Finding:
    """What is said of a cell, of which a step of base takes `before` ms."""
    times = _times(before, first)
    if again is None:
        return Finding(cell, FIGURE, "PASS", _change(first), *times)
    if isinstance(again, str):
        said = f"{_change(first)}, and could not be measured again: {again}"
        return Finding(cell, FIGURE, "INVALID", said, *times)
    fresh, both = again
    if stats.recurs(first, fresh, both, floor):
        said = f"{both.direction}: {_change(both)}; at first {_percent(first)}, in fresh processes {_percent(fresh)}"
        return Finding(cell, FIGURE, "CHANGED", said, *_times(before, both))
    said = f"flagged at first with {_change(first)}, but did not recur in fresh processes: {_change(fresh)}"
    return Finding(cell, FIGURE, "NOTE", said, *times)


def _times(before: float, found: Estimate) -> tuple[str, str]:
    """Of a step in base, and in head as the paired turns have it."""
    return f"{before:.3f} ms", f"{found.ratio * before:.3f} ms"


def _verdict(findings: list[Finding], invalid: str, cells: int, notes: tuple[str, ...]) -> Outcome:
    wrong = [finding for finding in findings if finding.verdict == "INVALID"]
    changed = [finding for finding in findings if finding.verdict == "CHANGED"]
    parts = []
    if changed:
        slower = sum(finding.said.startswith("SLOWER") for finding in changed)
        parts.append(f"{slower} of {cells} cells are SLOWER and {len(changed) - slower} FASTER than in base")
    if invalid or wrong:
        said = []
        if wrong:
            worst = f"{wrong[0].cell}: {wrong[0].said}"
            said.append(f"{len(wrong)} of {cells} cells could not be judged, the first: {worst}")
        said += [invalid] if invalid else []
        return Outcome(TITLE, "INVALID", "; ".join([*said, *parts]), tuple(findings), notes, InvalidError.exit_code)
    if changed:
        return Outcome(TITLE, "CHANGED", parts[0], tuple(findings), notes, 1)
    return Outcome(TITLE, "SAME", f"no step time of {cells} cells changed", tuple(findings), notes)


def _change(found: Estimate) -> str:
    return f"{_percent(found)} [{100 * (found.low - 1):+.1f}, {100 * (found.high - 1):+.1f}]"


def _percent(found: Estimate) -> str:
    return f"{100 * (found.ratio - 1):+.1f} %"


def _turns(look: Look) -> str:
    counts = [len(each.seconds["base"]) for one in look.sets for each in one if not each.error]
    return "no" if not counts else str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _device(look: Look) -> str:
    """A GPU is told by the worker, since nothing here imports torch."""
    told = next((each.envelope.get("device", "") for one in look.sets for each in one if each.envelope), "")
    return device_model() if told in ("", "cpu") else str(told)


def _load() -> str:
    load = load_per_core()
    return "unknown" if load is None else f"{load:.2f}"
