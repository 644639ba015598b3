"""A gate's outcome for machines that read it: a Markdown job summary, JUnit XML, GitHub's annotations.

Every text may come from a record or a plugin and is escaped for its format. JUnit is written as pytest writes it
(family xunit2); workflow commands are escaped as GitHub's toolkit does it (actions/toolkit, packages/core/command.ts).
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from effbench.errors import UsageError
from effbench.findings import Finding, Outcome
from effbench.report.markdown import clean, escape, table
from effbench.terminal import plain

LONG = 1000  # characters of a sentence
#: GitHub refuses a summary of more than 1 MiB, and shows 10 annotations of a kind per step
SUMMARY_BYTES = 500_000
ANNOTATIONS = 10
ORDER = ("INVALID", "CHANGED", "NOTE")


def markdown(outcome: Outcome) -> str:
    """The job summary: the verdict, then a table of all that did not pass, then the notes."""
    counts = [f"{len(outcome.of(verdict))} {verdict}" for verdict in (*ORDER, "PASS") if outcome.of(verdict)]
    parts = [f"### {escape(outcome.title)}: {outcome.verdict}", escape(outcome.said, LONG)]
    rows = []
    size, left = 0, 0
    for finding in _worst_first(outcome):
        row = [escape(text) for text in (finding.cell, finding.figure, finding.old, finding.new)]
        row = [*row[:2], finding.verdict, *row[2:], escape(finding.said, LONG)]
        size += len("".join(row).encode())
        if size > SUMMARY_BYTES:
            left += 1
        else:
            rows.append(row)
    if rows:
        parts.append(table(("cell", "figure", "verdict", "reference", "this run", "what"), rows))
    if left:
        parts.append(f"{left} more rows do not fit here; the JUnit file has them all.")
    notes, size = [], 0
    for note in outcome.notes:
        notes.append(f"- {escape(note, LONG)}")
        size += len(notes[-1].encode())
        if size > SUMMARY_BYTES // 2:
            notes.append("- further notes are left out")
            break
    if notes:
        parts.append("\n".join(notes))
    if counts:
        parts.append(f"Of {len(outcome.findings)} figures looked at: {', '.join(counts)}")
    return "\n\n".join(parts) + "\n"


def junit(outcome: Outcome) -> str:
    """One test case per finding: CHANGED is a failure, INVALID an error, NOTE skipped."""
    findings = list(outcome.findings)
    if outcome.exit_code and not outcome.of("CHANGED", "INVALID"):
        findings.append(Finding(outcome.title, "comparison", "INVALID", outcome.said))
    tags = {"CHANGED": "failure", "INVALID": "error", "NOTE": "skipped"}
    numbers = {tag: 0 for tag in ("errors", "failures", "skipped")}
    suites = ET.Element("testsuites", name="effbench")
    suite = ET.SubElement(suites, "testsuite", name=clean(outcome.title))
    for finding in findings:
        case = ET.SubElement(suite, "testcase", classname=clean(finding.cell), name=clean(finding.figure))
        if finding.verdict == "PASS":
            continue
        tag = tags[finding.verdict]
        numbers[tag if tag == "skipped" else tag + "s"] += 1
        problem = ET.SubElement(case, tag, message=clean(finding.said or finding.verdict, 500))
        problem.text = "\n".join(
            f"{name}: {clean(text, LONG)}"
            for name, text in (("reference", finding.old), ("this run", finding.new), ("what", finding.said))
            if text
        )
    for name, number in dict(tests=len(findings), **numbers).items():
        suite.set(name, str(number))
    if outcome.said:
        ET.SubElement(suite, "system-out").text = "\n".join(
            clean(line, LONG) for line in (outcome.said, *outcome.notes)
        )
    ET.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def annotations(outcome: Outcome) -> list[str]:
    """GitHub's workflow commands, one per line: an error for all that fails, a notice for each note; none if it passed.

    GitHub drops all but ten of a kind, so the tenth says how many there are.
    """
    errors = [
        (f"{finding.verdict}: {finding.cell}: {finding.figure}", _sentence(finding))
        for finding in _worst_first(outcome)
        if finding.verdict != "NOTE"
    ]
    if outcome.exit_code and not errors:
        errors = [(f"{outcome.title}: {outcome.verdict}", outcome.said)]
    notices = [(f"{finding.cell}: {finding.figure}", _sentence(finding)) for finding in outcome.of("NOTE")]
    notices += [(outcome.title, note) for note in outcome.notes]
    lines = []
    for kind, each in (("error", errors), ("notice", notices)):
        if len(each) > ANNOTATIONS:
            more = len(each) - ANNOTATIONS + 1
            each = [*each[: ANNOTATIONS - 1], (outcome.title, f"and {more} more: see the job summary")]
        lines += [f"::{kind} title={_property(title)}::{_data(said)}" for title, said in each]
    return lines


@contextmanager
def commands_stopped(on: bool) -> Iterator[None]:
    """What is printed within is no workflow command to GitHub, whatever a record's text looks like.

    Source: GitHub's `stop-commands`, with a token that no record can know.
    """
    token = token_hex(16)
    if on:
        print(f"::stop-commands::{token}", flush=True)
    try:
        yield
    finally:
        if on:
            print(f"::{token}::", flush=True)


def on_github() -> bool:
    """Whether GitHub Actions runs this process."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def publish(outcome: Outcome, summary: Path | None, junit_file: Path | None, annotate: bool) -> None:
    """Write what was asked for; without `summary`, GitHub's own summary file is added to where there is one.

    Args:
        annotate: print workflow commands on stdout; they must start a line, so nothing may be half printed there.

    Raises:
        UsageError: a file cannot be written.
    """
    step = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary is not None:
        _write(summary, markdown(outcome), "w", "--summary")
    elif step:
        _write(Path(step), markdown(outcome) + "\n", "a", "GITHUB_STEP_SUMMARY")
    if junit_file is not None:
        _write(junit_file, junit(outcome), "w", "--junit")
    if annotate:
        for line in annotations(outcome):
            print(plain(line), flush=True)


def _write(path: Path, text: str, mode: str, option: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be written: {error.strerror}", "name another file") from error


def _worst_first(outcome: Outcome) -> list[Finding]:
    return [finding for verdict in ORDER for finding in outcome.of(verdict)]


def _sentence(finding: Finding) -> str:
    change = f"{finding.old or '-'} -> {finding.new or '-'}" if finding.old or finding.new else ""
    return ", ".join(text for text in (change, finding.said) if text)


def _data(text: str) -> str:
    """The message of a workflow command."""
    return clean(text, LONG).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """A property of a workflow command: a colon or a comma would end it."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")
