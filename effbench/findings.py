"""What a gate says, whichever gate it is: a verdict, and a finding for each figure that it looked at. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effbench.errors import EffbenchError


@dataclass(frozen=True)
class Finding:
    """What was found of one figure of one cell (an arm, or an arm of a task); all texts may come from records."""

    cell: str
    figure: str
    verdict: Literal["PASS", "CHANGED", "INVALID", "NOTE"]
    said: str = ""
    old: str = ""
    new: str = ""


@dataclass(frozen=True)
class Outcome:
    """A gate's answer.

    Attributes:
        title: what was compared, e.g. "effbench gate".
        verdict: SAME, CHANGED or INVALID.
        said: the verdict's sentence.
        findings: of every figure that was looked at, those that passed among them.
        notes: what a reader should know besides.
        exit_code: 0 same, 1 changed, 2 cannot be compared, 3 asked for what cannot be.
    """

    title: str
    verdict: Literal["SAME", "CHANGED", "INVALID"]
    said: str
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    exit_code: int = 0

    def of(self, *verdicts: str) -> tuple[Finding, ...]:
        """The findings of these verdicts."""
        return tuple(finding for finding in self.findings if finding.verdict in verdicts)


def refusal(title: str, error: EffbenchError) -> Outcome:
    """The outcome of a comparison that could not be made; an error may name each reason in its `findings`."""
    notes = (f"next: {error.hint}",) if error.hint else ()
    return Outcome(title, "INVALID", str(error), getattr(error, "findings", ()), notes, error.exit_code)
