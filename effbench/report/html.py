"""The leaderboard as one HTML file that needs no server and no network.

`effbench.report.leaderboard` writes it beside README.md. Names and values of records are untrusted. They stand in a
block of JSON that no browser executes, and the page's scripts show them as text only. The page's policy
(Content-Security-Policy) allows no script but the two whose hashes it names, and no connection at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from effbench.records import Record
from effbench.report import page_data
from effbench.report.markdown import clean
from effbench.report.standings import Group, Section, arrange, brief, section

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("elements.js", "table.js", "plots.js", "figures.js", "methods.js", "page.js")
ROWS = 5000  # rows that a page holds; leaderboard.csv has all
ENVELOPES = 500
PROBLEMS = 200


def render(records: list[Record], problems: list[str]) -> str:
    """The page of records that are held in memory: for tests and benchmarks; `write_leaderboard` holds none.

    Args:
        problems: one sentence for each record that could not be read.
    """
    held = {record.id: record for record in records}
    groups = arrange(map(brief, records))
    return document((section(group, held.__getitem__) for group in groups), groups, problems)


def document(found: Iterable[Section], groups: Sequence[Group], problems: list[str]) -> str:
    """The page of the sections that `found` makes of `groups`, in that order; they are not kept.

    Args:
        problems: one sentence for each record that could not be read.
    """
    rows = _rows(groups)
    data = dict(
        columns=page_data.COLUMNS,
        parts=page_data.PARTS,
        envelopes=[page_data.envelope(each, rows[each.anchor]) for each in found if each.anchor in rows],
        left_out=sum(len(group.best) for group in groups) - sum(rows.values()),
        problems=[clean(each, 500) for each in problems[:PROBLEMS]],
        problems_left_out=max(0, len(problems) - PROBLEMS),
    )
    page = "\n".join(_asset(name) for name in SCRIPTS)
    library = _inside_script(_plotly())
    policy = (
        f"default-src 'none'; script-src '{_digest(page)}' '{_digest(library)}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    parts = {"policy": policy, "style": _asset("page.css"), "data": _json(data), "page": page, "plotly": library}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def _rows(groups: Sequence[Group]) -> dict[str, int]:
    """How many rows of which envelope, by its anchor, the page holds: of the newest as many as there are."""
    room, rows = ROWS, {}
    for group in sorted(groups, key=lambda group: group.newest, reverse=True):
        count = min(room, len(group.best))
        if len(rows) < ENVELOPES and (count or not group.best):
            rows[group.anchor] = count
            room -= count
    return rows


def _asset(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _plotly() -> str:
    """plotly.js with its licence, as the Python package brings it."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _inside_script(code: str) -> str:
    """JavaScript that cannot end the element it stands in, with the line ends that a browser hashes."""
    code = code.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"<(?=/script|!--)", r"\\x3c", code, flags=re.IGNORECASE)


def _digest(code: str) -> str:
    """The hash by which a policy allows an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


def _json(data: object) -> str:
    """JSON in ASCII without a character that means something to HTML."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
