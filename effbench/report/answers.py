"""What arms wrote of a few test images, in the leaderboard and in the terminal. All of it is untrusted text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.text import Text

from effbench.records import Answer, Arm
from effbench.report import figures
from effbench.report.markdown import clean, escape
from effbench.report.standings import Standing

LONGEST = 300  # characters of a text that are shown
NOTHING = "(nothing)"


def written(rows: Sequence[Standing]) -> str:
    """By image: its references, then what the baseline and the methods did, arms that wrote the same together.

    Empty where no arm wrote anything.
    """
    images: dict[tuple[str, str], tuple[str, ...]] = {}
    texts: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for answer in row.arm.answers if row.arm.kind != "control" else ():
            image = answer.image, answer.question
            images.setdefault(image, answer.references)
            texts[image][answer.text].append(figures.label(row.arm))
    return "\n\n".join(_image(*image, references, texts[image]) for image, references in images.items())


def _image(name: str, question: str, references: tuple[str, ...], texts: dict[str, list[str]]) -> str:
    asked = f": {escape(question, LONGEST)}" if question else ""
    lines = [f"*{escape(name)}*{asked}", ""]
    lines += [f"- reference: {escape(text, LONGEST)}" for text in references]
    for text, arms in texts.items():
        names = ", ".join(f"**{escape(arm)}**" for arm in arms)
        lines.append(f"- {names}: {escape(text, LONGEST) or NOTHING}")
    return "\n".join(lines)


def lines(arm: Arm) -> Text:
    """What an arm wrote, each text above a reference; empty where it wrote nothing."""
    if not arm.answers:
        return Text(end="")
    parts = [_lines(answer) for answer in arm.answers]
    return Text.assemble((f"What the {clean(arm.name)} writes", "bold"), *parts, "\n")


def _lines(answer: Answer) -> Text:
    head = f"\n  {clean(answer.image)}" + (f": {clean(answer.question, LONGEST)}" if answer.question else "")
    found = Text.assemble((head, "dim"), f"\n    {clean(answer.text, LONGEST) or NOTHING}")
    for text in answer.references[:1]:
        found.append(f"\n    reference: {clean(text, LONGEST)}", "dim")
    return found
