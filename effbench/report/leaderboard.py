"""The leaderboard of a folder of records: README.md, leaderboard.csv, leaderboard.json and index.html beside them.

Records are read one by one and forgotten, but for those that a row comes from: of each envelope the newest successful
measurement of each arm. A page that a phone can show has the newest envelopes; the CSV and JSON files have all.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effbench import store
from effbench.errors import EffbenchError
from effbench.records import Record
from effbench.report import ratings, rows
from effbench.report.envelope_section import envelope_section, fields, title
from effbench.report.legend import INTRODUCTION, LEGEND
from effbench.report.markdown import escape
from effbench.report.reading import groups as groups_of
from effbench.report.standings import Group, Section, arrange, brief, section
from effbench.whole_file import whole_file

SECTIONS = 20  # envelopes that the page shows
BYTES = 400_000  # of Markdown; GitHub shows no more than 512,000 of a file
INDEX = 100  # envelopes that the list at the top names
PROBLEMS = 20  # records that cannot be read, by name


def write_leaderboard(root: Path, problems: list[str] | None = None) -> Path:
    """Write the leaderboard from all records in `root/records`, each file atomically; the path of its README.md.

    Args:
        problems: gets a sentence for each record that is left out, which README.md and index.html name too.

    Raises:
        EffbenchError: the folder cannot be written.
    """
    from effbench.report import html

    root = Path(root)
    problems = [] if problems is None else problems
    groups = groups_of(root, problems)
    problems[:] = [each.replace(f"{root}/", "") for each in problems]  # files to publish name no path of a machine
    page, tables = Page(groups, problems), Tables()

    def read(name: str) -> Record:
        return store.member(root, name)

    def each() -> Iterator[Section]:
        for group in groups:
            found = section(group, read)
            page.add(found)
            tables.add(found)
            yield found

    whole = html.document(each(), groups, problems)
    write_text(root / "leaderboard.csv", tables.csv())
    write_text(root / "leaderboard.json", tables.json())
    write_text(root / "index.html", whole)
    write_text(root / "README.md", page.text())
    return root / "README.md"


def write_text(path: Path, text: str) -> None:
    """Write a file of the leaderboard, all or nothing.

    Raises:
        EffbenchError: it cannot be written.
    """
    try:
        with whole_file(path) as file:
            file.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        hint = "make sure that it is a folder with space left, or choose another --out; then run: effbench leaderboard"
        raise EffbenchError(f"the leaderboard {path} was not written: {error.strerror}", hint) from error


def render(records: list[Record], problems: list[str]) -> str:
    """The Markdown of records that are held in memory: for tests; `write_leaderboard` holds none.

    Args:
        problems: one sentence for each record that could not be read.
    """
    held = {record.id: record for record in records}
    groups = arrange(map(brief, records))
    page = Page(groups, problems)
    for group in groups:
        page.add(section(group, held.__getitem__))
    return page.text()


class Page:
    """README.md, put together while sections pass by.

    Args:
        groups: all envelopes, in the order in which they come.
        problems: one sentence for each record that could not be read.
    """

    def __init__(self, groups: list[Group], problems: list[str]) -> None:
        self.groups, self.problems = groups, problems
        newest = sorted(groups, key=lambda group: group.newest, reverse=True)[:SECTIONS]
        self.newest = [group.anchor for group in newest]
        self.differing = _differing(newest)
        self.parts: dict[str, str] = {}
        self.rated = ratings.Collected()

    def add(self, found: Section) -> None:
        self.rated.add(found)
        if found.anchor in self.newest:
            self.parts[found.anchor] = envelope_section(found, self.differing[found.envelope.task])

    def text(self) -> str:
        shown = self._shown()
        parts = [INTRODUCTION]
        if not self.groups:
            parts.append("No run yet. Make one: `effbench run --method METHOD --task TASK`\n")
        if len(self.groups) > 1:
            parts.append(self._index(shown))
        parts += shown.values()
        if rated := self.rated.markdown():
            parts.append(rated)
        if self.problems:
            listed = [f"- {escape(each, 500)}" for each in self.problems[:PROBLEMS]]
            if len(self.problems) > PROBLEMS:
                listed.append(f"- and {len(self.problems) - PROBLEMS:,} more; all: `effbench list runs`")
            heading = f"## Records that could not be read ({len(self.problems):,}); they count nowhere"
            parts.append(heading + "\n\n" + "\n".join(listed) + "\n")
        parts.append(LEGEND)
        return "\n".join(parts).rstrip("\n") + "\n"

    def _shown(self) -> dict[str, str]:
        """The sections, the newest as far as they fit, in the order of the page; the newest one if none fits."""
        room, chosen = BYTES, set()
        for anchor in self.newest:
            size = len(self.parts[anchor].encode())
            if size <= room:
                room -= size
                chosen.add(anchor)
        chosen = chosen or set(self.newest[:1])
        return {anchor: text for anchor, text in self.parts.items() if anchor in chosen}

    def _index(self, shown: dict[str, str]) -> str:
        """A line per envelope; those that have no section here are said to be in the other files."""
        lines, left = [], 0
        for group in self.groups:
            runs = f"{group.runs:,} run{'' if group.runs == 1 else 's'}, newest {group.newest[0]:%Y-%m-%d}"
            if group.anchor in shown:
                lines.append(f"- [`{group.anchor}`](#{group.anchor}) {title(group.envelope)}: {runs}")
            elif len(lines) < INDEX:
                lines.append(f"- `{group.anchor}` {title(group.envelope)}: {runs}; not shown here")
            else:
                left += 1
        if left:
            lines.append(f"- and {left:,} older ones")
        if left or len(shown) < len(self.groups):
            lines.append("\nAll rows of all envelopes: [leaderboard.csv](leaderboard.csv)")
        return f"## {len(self.groups):,} envelopes\n\n" + "\n".join(lines) + "\n"


class Tables:
    """leaderboard.csv and leaderboard.json, put together while sections pass by."""

    def __init__(self) -> None:
        self.file, self.lines = io.StringIO(newline=""), []
        self.writer = csv.writer(self.file, lineterminator="\r\n")

    def add(self, found: Section) -> None:
        for standing in found.rows:
            row = rows.row(found, standing)
            if not self.lines:
                self.writer.writerow(row)
            self.writer.writerow(rows.cells(row))
            self.lines.append(json.dumps(row, allow_nan=False))

    def csv(self) -> str:
        return self.file.getvalue()

    def json(self) -> str:
        inside = ",\n".join(self.lines)
        return f'{{"schema": {rows.SCHEMA}, "rows": [\n{inside}\n]}}\n'


def _differing(groups: list[Group]) -> dict[str, list[str]]:
    """By task: the fields in which its envelopes differ."""
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for group in groups:
        by_task[group.envelope.task].append(fields(group))
    return {
        task: [
            field
            for field in dict.fromkeys(field for each in some for field in each)
            if len({repr(each.get(field)) for each in some}) > 1
        ]
        for task, some in by_task.items()
    }
