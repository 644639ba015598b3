"""Which methods beat blind controls at the same budget: the figures, a table, and the answer in a sentence above it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from effbench.records import Arm, MetricValue, Record, Versus
from effbench.report import figures
from effbench.report.markdown import escape, table
from effbench.report.standings import Standing, excess
from effbench.report.tables import name

BUDGETS = {"random": "same budget", "grid": "same budget", "norm": "same budget", "resize": "same FLOPs"}
ANSWERED = {"random": "at an equal budget", "resize": "at equal FLOPs"}


def controls_of(arms: Iterable[Arm]) -> list[str]:
    """The controls that any of the arms was compared with, in the order in which they are shown."""
    found = {each.control for arm in arms for each in arm.versus}
    return sorted(found, key=lambda control: (figures.place(control), control))


def against(arm: Arm, record: Record, control: str, text: Callable[[Versus], str]) -> str:
    """`text` of an arm's comparison with a control; n/a at an equal budget where it takes none away."""
    found = [text(each) for each in arm.versus if each.control == control]
    if found:
        return "; ".join(found)
    whole = BUDGETS.get(control) == "same budget" and arm.tokens and arm.tokens == record.baseline().tokens
    return "n/a" if whole else figures.NONE


def advantage(found: Versus, value: MetricValue) -> str:
    """`+3.1 [+1.0, +5.2]`, in the metric's unit; positive is better."""
    digits = figures.digits(value)
    return f"{found.advantage.value:+.{digits}f}{figures.bounds(found.advantage, digits=digits, sign='+')}"


def verdict(found: Versus) -> str:
    """The verdict on an advantage, with the reason where it could be no other."""
    low, high = found.advantage.low, found.advantage.high
    if low is None or high is None:
        return f"{found.verdict} (too few images)"
    few = found.verdict == "NO DIFFERENCE SHOWN" and (low > 0 or high < 0)
    return f"{found.verdict} (too few seeds)" if few else found.verdict


def section(rows: list[Standing]) -> str:
    """The answer and the table of the methods that were measured; nothing where none was compared."""
    rows = [row for row in rows if row.arm.kind == "method" and row.record.primary_metric in row.arm.metrics]
    controls = controls_of(row.arm for row in rows)
    if not controls:
        return ""
    answers = [_answer(rows, control) for control in ANSWERED if control in controls]
    return "\n\n".join(["\n".join(answers), _table(rows, controls)])


def _answer(rows: list[Standing], control: str) -> str:
    """`- Beat random at an equal budget (1 of 4): a. No difference shown: b, c. Worse: d.`"""
    groups: dict[str, list[str]] = {"BETTER": [], "NO DIFFERENCE SHOWN": [], "WORSE": [], "unequal": []}
    for row in rows:
        found = [each for each in row.arm.versus if each.control == control]
        verdicts = {each.verdict for each in found}
        if any(excess(each, row.arm, row.record) is not None for each in found):
            verdicts = {"unequal"}
        if verdicts:
            group = verdicts.pop() if len(verdicts) == 1 else "NO DIFFERENCE SHOWN"
            groups[group].append(escape(figures.label(row.arm)))
    beat, unsure, worse, unequal = groups.values()
    told = [(f"Beat {control} {ANSWERED[control]} ({len(beat)} of {len(beat + unsure + worse)})", beat or ["none"])]
    told += [("No difference shown", unsure), ("Worse", worse), (f"No {control} {ANSWERED[control]}", unequal)]
    return "- " + " ".join(f"**{title}:** {', '.join(names)}." for title, names in told if names)


def _table(rows: list[Standing], controls: list[str]) -> str:
    first = rows[0].record
    header = ["arm", escape(figures.heading(first, first.primary_metric))]
    for control in controls:
        budget = BUDGETS.get(control)
        header += [escape(f"{control} ({budget})" if budget else control), f"advantage over {escape(control)}"]
    return table(header, [_cells(row, controls) for row in rows])


def _cells(row: Standing, controls: list[str]) -> list[str]:
    arm, record = row.arm, row.record
    own = arm.metrics[record.primary_metric]

    def value(found: Versus) -> str:
        text = figures.metric(own.model_copy(update=dict(value=found.value)))
        if BUDGETS.get(found.control) != "same FLOPs":
            return text
        where = escape(" to ".join(found.arms), 400)
        off = excess(found, arm, record)
        return f"{text} ({where}{'' if off is None else f', {off:.2f}x its FLOPs'})"

    def judged(found: Versus) -> str:
        said = verdict(found) if found.verdict == "NO DIFFERENCE SHOWN" else f"**{found.verdict}**"
        return f"{escape(advantage(found, own))} {said}"

    cells = [name(row), figures.metric(own)]
    for control in controls:
        cells += [against(arm, record, control, text) for text in (value, judged)]
    return cells
