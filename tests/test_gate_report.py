"""The reports of a gate: what each format demands, and that no text from a record leaves its place."""

import re
import xml.etree.ElementTree as ET

import pytest
from test_leaderboard import EVIL

from effbench.errors import InvalidError
from effbench.findings import Finding, Outcome, refusal
from effbench.report.gate_report import ANNOTATIONS, SUMMARY_BYTES, annotations, junit, markdown, publish

HOSTILE = EVIL + "\x00\ud800\uffff]]>--><x a='&amp;'>%0A::error::, a:b\r\n::set-output name=x::y @everyone $x$"


def outcome(*findings, verdict="CHANGED", code=1, notes=()):
    return Outcome("effbench gate", verdict, "2 of 4 figures", findings, notes, code)


MIXED = outcome(
    Finding("baseline", "tokens", "PASS", "as before"),
    Finding("token_prune", "test FLOPs", "CHANGED", "+5 %", "100", "105"),
    Finding("token_prune", "census", "NOTE", "not compared"),
    Finding("merge", "arm", "INVALID", "failed"),
    notes=("a note",),
)


def test_junit_counts_and_kinds():
    suites = ET.fromstring(junit(MIXED))
    (suite,) = suites
    assert suites.tag == "testsuites" and suite.tag == "testsuite"
    numbers = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert numbers == dict(tests="4", failures="1", errors="1", skipped="1")
    cases = {
        (case.get("classname"), case.get("name")): [child.tag for child in case] for case in suite.iter("testcase")
    }
    assert cases == {
        ("baseline", "tokens"): [],
        ("token_prune", "test FLOPs"): ["failure"],
        ("token_prune", "census"): ["skipped"],
        ("merge", "arm"): ["error"],
    }
    failure = suite.find(".//failure")
    assert failure.get("message") == "+5 %" and "reference: 100\nthis run: 105" in failure.text
    assert "a note" in suite.find("system-out").text


def test_the_summary_shows_the_worst_first_and_no_figure_that_passed():
    text = markdown(MIXED)
    assert text.startswith("### effbench gate: CHANGED\n")
    assert text.index("INVALID") < text.index("+5 %") < text.index("not compared")
    assert (
        "as before" not in text
        and "Of 4 figures looked at: 1 INVALID, 1 CHANGED, 1 NOTE, 1 PASS" in text
        and "- a note" in text
    )
    assert "|" not in markdown(outcome(Finding("a", "b", "PASS"), verdict="SAME", code=0))


def test_annotations_are_errors_and_notices():
    lines = annotations(MIXED)
    assert lines == [
        "::error title=INVALID%3A merge%3A arm::failed",
        "::error title=CHANGED%3A token_prune%3A test FLOPs::100 -> 105, +5 %25",
        "::notice title=token_prune%3A census::not compared",
        "::notice title=effbench gate::a note",
    ]
    assert annotations(outcome(Finding("a", "b", "PASS"), verdict="SAME", code=0)) == []


def test_a_refusal_never_looks_like_a_success():
    refused = refusal("effbench gate", InvalidError("no such record", "make one"))
    assert refused.exit_code == 2 and refused.verdict == "INVALID"
    suite = ET.fromstring(junit(refused))[0]
    assert (suite.get("tests"), suite.get("errors")) == ("1", "1")
    assert annotations(refused)[0] == "::error title=effbench gate%3A INVALID::no such record"
    assert "no such record" in markdown(refused) and "next: make one" in markdown(refused)


def test_hostile_text_stays_where_it_is():
    finding = [Finding(HOSTILE, HOSTILE, verdict, HOSTILE, HOSTILE, HOSTILE) for verdict in ("CHANGED", "NOTE")]
    evil = Outcome(HOSTILE, "CHANGED", HOSTILE, tuple(finding), (HOSTILE,), 1)
    text, xml, commands = markdown(evil), junit(evil), annotations(evil)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7}
    assert not re.search(r"<(?!br)[a-z/!]", text) and "@everyone" not in text and not re.search(r"(?<!\\)\]\(", text)
    assert len(ET.fromstring(xml)[0].findall("testcase")) == 2 and "<script" not in xml
    xml.encode()
    for line in commands:
        _, properties, said = re.fullmatch(r"::(error|notice) title=([^:,]*)::(.*)", line).groups()
        assert "%" not in re.sub("%(25|3A|2C)", "", properties) and "%" not in re.sub("%25", "", said)
    for made in (text, xml, *commands):
        assert not set(made) & set("\x00\x1b\u202e\ud800\uffff\r")
    assert all("\n" not in line for line in commands)


def test_the_limits_of_github_are_kept():
    many = outcome(
        *(Finding(f"arm {i}", "x" * 300, "CHANGED", "<" * 2000) for i in range(900)), notes=("n" * 2000,) * 900
    )
    text = markdown(many)
    assert len(text.encode()) < 2**20 and re.search(r"\n\d+ more rows do not fit here", text)
    assert len(text.encode()) > SUMMARY_BYTES / 2  # as much as there is room for
    lines = annotations(many)
    assert [line.startswith("::error") for line in lines].count(True) == ANNOTATIONS == 10
    assert lines[9] == "::error title=effbench gate::and 891 more: see the job summary"
    assert ET.fromstring(junit(many))[0].get("failures") == "900"


def test_a_summary_that_is_named_is_not_added_to_githubs(tmp_path, monkeypatch, capsys):
    step, own = tmp_path / "step.md", tmp_path / "new" / "own.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    publish(MIXED, own, None, annotate=False)
    assert own.read_text() == markdown(MIXED) and not step.exists()
    publish(MIXED, None, None, annotate=True)
    publish(MIXED, None, None, annotate=False)
    assert step.read_text().count("### effbench gate") == 2
    assert capsys.readouterr().out.splitlines() == annotations(MIXED)


@pytest.mark.parametrize("verdict", ["SAME", "CHANGED", "INVALID"])
def test_every_verdict_is_named(verdict):
    assert f": {verdict}\n" in markdown(outcome(verdict=verdict, code=["SAME", "CHANGED", "INVALID"].index(verdict)))
