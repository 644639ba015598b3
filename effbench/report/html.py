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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from effbench.records import Record
from effbench.report import page_data
from effbench.report.markdown import clean
from effbench.report.standings import Section, sections

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("elements.js", "table.js", "plots.js", "figures.js", "methods.js", "page.js")
ROWS = 5000  # rows that a page holds; leaderboard.csv has all
ENVELOPES = 500
PROBLEMS = 200


def render(records: list[Record], problems: list[str]) -> str:
    """The page of some records.

    Args:
        problems: one sentence for each record that could not be read.
    """
    return document(envelopes(sections(records)), problems)


def envelopes(found: Iterable[Section]) -> Iterable[dict[str, Any]]:
    """`page_data.envelope` of each section, as many rows as a page holds; sections are not kept."""
    room = ROWS
    for section in found:
        data = page_data.envelope(section, room)
        room -= len(data["rows"])
        yield data


def document(found: Iterable[dict[str, Any]], problems: list[str]) -> str:
    """The page of what `envelopes` gives."""
    kept = list(found)
    hidden = [each for each in kept if each["left_out"] and not each["rows"]] + kept[ENVELOPES:]
    shown = [each for each in kept[:ENVELOPES] if each["rows"] or not each["left_out"]]
    data = dict(
        columns=page_data.COLUMNS,
        parts=page_data.PARTS,
        envelopes=shown,
        left_out=sum(each["left_out"] for each in kept) + sum(len(each["rows"]) for each in kept[ENVELOPES:]),
        envelopes_left_out=len(hidden),
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
