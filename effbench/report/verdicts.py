"""What an envelope's figures come to, in a few sentences of plain text: what to use, and what lost to blind controls.

The text holds names from records: whoever shows it escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from effbench.records import MetricValue
from effbench.report import figures
from effbench.report.standings import BLIND, Standing, judged

NAMED = 4  # methods that a sentence names
DEAR = 0.2  # lossy-ness from which on nothing is called worth its speed: a smaller model is the fairer comparison


def worth_using(row: Standing) -> bool:
    """Whether it is shown to be faster, on the front, not DEAR, and not below a blind control at the same budget."""
    speed = row.arm.test_speedup
    if speed is None or speed.verdict != "FASTER" or row.arm.kind != "method":
        return False
    return row.front and not row.below and _loss(row) < DEAR


def sentences(rows: Sequence[Standing]) -> list[str]:
    """The verdict on the rows of one envelope, the answer first.

    Args:
        rows: as `standings.ranked` gives them.
    """
    methods = [row for row in rows if row.arm.kind == "method"]
    if not methods:
        return ["No method was measured."]
    measured = [row for row in methods if row.arm.status == "ok" and row.arm.test_speedup]
    failed = [row for row in methods if row.arm.status != "ok"]
    said = [_answer(rows, methods, measured), *_lost(methods)]
    if failed:
        said.append(f"FAILED ({len(failed)}): {_names(failed)}.")
    return said


def _answer(rows: Sequence[Standing], methods: list[Standing], measured: list[Standing]) -> str:
    count = f"{len(methods)} method{'' if len(methods) == 1 else 's'}"
    if not measured:
        known = [(row, figures.quality(row.arm, row.record).get(row.record.primary_metric)) for row in methods]
        losses = [row for row, value in known if value and value.lossiness]
        best = min(losses, key=_loss, default=None)
        least = f"; the least lossy is {_name(best)}: {figures.lossiness(_value(best))}" if best else ""
        return f"No speed-up was measured ({count}){least}."
    faster = [row for row in measured if row.arm.test_speedup.verdict == "FASTER"]
    envelope = rows[0].record.envelope
    if figures.untaught(envelope):
        first = max(measured, key=lambda row: row.arm.test_speedup.value)
        best = f"the fastest is {_name(first)}: {figures.ratio(first.arm.test_speedup)}"
        return f"Shown to be FASTER: {len(faster)} of {count}; {best}. Nothing is said about quality."
    if good := sorted(filter(worth_using, faster), key=_loss):
        if len(good) > 3:  # the least lossy, the surest, the fastest
            surest = max(good[1:], key=lambda row: (row.probability, -_loss(row)))
            fastest = max(good, key=lambda row: row.arm.test_speedup.value)
            chosen = [row for row in good if row in (good[0], surest, fastest)]
        else:
            chosen = good
        more = f"; {len(good) - len(chosen)} more are marked ★" if len(good) > len(chosen) else ""
        single = len(good) == 1
        lead = "Worth using" if single else "Worth using, by the loss that you allow"
        return f"{lead}: {'; '.join(_offer(row) for row in chosen)}{more}."
    few = [row for row in measured if row.arm.test_speedup.verdict == "TOO FEW SAMPLES"]
    if len(few) == len(measured):
        return f"Nothing can be recommended: too few samples to say whether any of {count} is faster."
    if not faster:
        return f"Nothing to recommend: of {count} none is shown to be faster than the baseline."
    unplaced = [row for row in faster if row.probability is None]
    below = [row for row in faster if row.below]
    why = [f"{len(below)} not shown to beat a blind control at the same budget"] if below else []
    why += [f"{len(unplaced)} without a lossy-ness that has an interval"] if unplaced else []
    placed = [row for row in faster if not row.below and row.probability is not None]
    dear = [row for row in placed if row.front]
    why += [f"{len(dear)} that lose {100 * DEAR:.0f} % or more"] if dear else []
    why += [f"{len(placed) - len(dear)} beaten on both speed-up and lossy-ness"] if len(placed) > len(dear) else []
    return f"Nothing to recommend: of {count}, {len(faster)} shown to be FASTER, but of these {', '.join(why)}."


def _lost(methods: list[Standing]) -> list[str]:
    """Who did not beat a blind control, worse and undecided apart; nothing where none was compared."""
    compared = [row for row in methods if any(judged(row.arm, row.record, control) for control in BLIND) or row.below]
    below = [row for row in compared if row.below]
    if not below:
        return [f"All {len(compared)} that were compared beat blind controls at the same budget."] if compared else []
    worse = [row for row in below if worse_than(row)]
    unsure = [row for row in below if not worse_than(row)]
    parts = [f"worse than {_controls(worse, worse_than)}: {_names(worse)}"] if worse else []
    parts += [f"not shown to beat {_controls(unsure, lambda row: row.below)}: {_names(unsure)}"] if unsure else []
    return [f"Below the line ({len(below)} of {len(compared)} compared at the same budget): {'; '.join(parts)}."]


def worse_than(row: Standing) -> list[str]:
    """Of the blind controls that a method did not beat, those that beat it."""
    return [control for control in row.below if judged(row.arm, row.record, control) == "WORSE"]


def reason(row: Standing) -> str:
    """Why a method stands below the line: `worse than random; not shown to beat resize`."""
    worse = worse_than(row)
    unsure = [control for control in row.below if control not in worse]
    parts = [f"worse than {' and '.join(worse)}"] if worse else []
    return "; ".join(parts + ([f"not shown to beat {' or '.join(unsure)}"] if unsure else []))


def _controls(rows: list[Standing], of) -> str:
    found = {control for row in rows for control in of(row)}
    return " or ".join(control for control in BLIND if control in found)


def _offer(row: Standing) -> str:
    value = _value(row)
    claim = figures.no_loss(value)
    claim = f", no loss {claim}" if claim.startswith("within") else ""
    sure = f", on the front in {figures.percent(row.probability)} of draws" if row.probability is not None else ""
    note = f" ({value.note})" if value.note else ""
    loss = figures.lossiness(value).removesuffix(note)
    return f"{_name(row)} ({figures.ratio(row.arm.test_speedup)}, lossy-ness {loss}{claim}{sure})"


def _loss(row: Standing) -> float:
    return _value(row).lossiness.value


def _value(row: Standing) -> MetricValue:
    return row.arm.metrics[row.record.primary_metric]


def _name(row: Standing) -> str:
    return figures.label(row.arm)


def _names(rows: list[Standing]) -> str:
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return ", ".join(_name(row) for row in rows[:NAMED]) + more
