"""Markdown from untrusted text: escaping, tables and code of GitHub's dialect; and commands that may be repeated."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterable, Sequence

SPECIAL = {c: "\\" + c for c in "\\`*[]|~#!"}
#: what GitHub's Markdown could take for HTML, a mention or mathematics
SPECIAL |= {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", "$": "&#36;"}
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def clean(text: str, limit: int | None = 200) -> str:
    """Text on one line without control, invisible and direction-changing characters, at most `limit` long."""
    if not text.isascii() or not text.isprintable():
        text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in HIDDEN)
    text = " ".join(text.split())
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def escape(text: str, limit: int | None = 200) -> str:
    """Text that Markdown shows literally, in a table cell as well as in a line of prose."""
    text = "".join(SPECIAL.get(c, c) for c in clean(text, limit))
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return re.sub(r"(?i)(https?|ftp)://", r"\1&#58;//", re.sub(r"(?i)\bwww\.", "www&#46;", text))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are escaped already; the first column is left-aligned, the others right-aligned."""
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(text: str) -> str:
    """A code block that shows `text` on one line and cannot be left by the backticks in it."""
    text = clean(text, None)
    fence = "`" * max(3, _longer_than_inside(text))
    return f"{fence}sh\n{text}\n{fence}"


def span(text: str, limit: int | None = 200) -> str:
    """Code within a line, which cannot be left by the backticks in it."""
    text = clean(text, limit)
    fence = "`" * _longer_than_inside(text)
    return f"{fence} {text} {fence}"


def _longer_than_inside(text: str) -> int:
    """How many backticks no run of backticks in the text reaches."""
    return 1 + max((len(run) for run in re.findall("`+", text)), default=0)


def command(text: str) -> str:
    """A record's command, quoted so that a shell runs nothing else; empty where it is none of effbench."""
    try:
        words = shlex.split(clean(text, None))
    except ValueError:
        return ""
    return shlex.join(words) if len(words) > 1 and words[0] == "effbench" else ""
