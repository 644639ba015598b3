"""Slow drift: change points in made histories, holes, and every kind of bad input."""

import math
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pytest
from test_leaderboard import EVIL, make_arm, make_record

from effbench import cli, store
from effbench.drift import LEAST, Point, changes, look_back
from effbench.errors import InvalidError
from effbench.records import Flops, Provenance, Speedup

START = datetime(2026, 1, 1, tzinfo=UTC)


def points(ratios, noise=0.0, seed=0, days=None):
    rng = np.random.default_rng(seed)
    days = days or range(len(ratios))
    return [
        Point(START + timedelta(days=day), f"run{i}", f"c{i:09d}", math.log(ratio) + rng.normal(0, noise) * (noise > 0))
        for i, (day, ratio) in enumerate(zip(days, ratios, strict=True))
    ]


def test_a_step_is_found_where_and_as_large_as_it_is():
    (found,) = changes(points([1.4] * 12 + [1.3] * 10, 0.008, seed=2))
    assert (found.last.run, found.first.run) == ("run11", "run12")
    assert found.low < 1.3 / 1.4 < found.high < 1 and found.ratio == pytest.approx(1.3 / 1.4, abs=0.01)
    assert found.before.value == pytest.approx(1.4, rel=0.01) and found.after.runs == 10
    assert found.said.startswith("SLOWER: speed-up -") and "2026-01-12 (commit c000000011)" in found.said


def test_both_ways_and_several_steps():
    found = changes(points([1.0] * 8 + [1.2] * 8 + [1.1] * 8, 0.006))
    assert [(each.first.run, each.ratio > 1) for each in found] == [("run8", True), ("run16", False)]


def test_what_is_within_the_noise_is_silent():
    alarms = sum(bool(changes(points([1.3] * 20, 0.02, seed))) for seed in range(100))
    assert alarms <= 2
    assert changes(points([1.3] * 15 + [1.31] * 15, 0.002)) == []  # sure, and too small to matter
    assert changes(points([1.3] * 15 + [1.37] * 15, 0.002), floor=0.08) == []  # identical arms differ by more
    assert changes(points([1.3] * 30)) == []
    outlier = [1.3] * 12 + [1.1] + [1.3] * 12
    assert changes(points(outlier, 0.005)) == []  # one bad night is no drift


def test_steps_too_small_for_a_night_add_up():
    slow = [1.4 * 0.997**i for i in range(30)]  # 0.3 % a run, 8 % in all
    found = changes(points(slow, 0.002))
    assert found and sum(math.log(each.ratio) for each in found) < -0.03
    steps = changes(points([1.4] * 8 + [1.375] * 8 + [1.35] * 8, 0.001))
    assert [each.gradual for each in steps] == [True] and "little by little" in steps[0].said
    assert steps[0].ratio == pytest.approx(1.35 / 1.4, abs=0.005)


def history(ratios, days=None, spec="token_prune:keep=0.5", noise=0.006, **changes_):
    rng = np.random.default_rng(5)
    records = []
    for i, ratio in enumerate(ratios):
        arm = make_arm(spec=spec, ratio=ratio * math.exp(rng.normal(0, noise)))
        record = make_record(f"run-{i:03d}", day=1 + (days[i] if days else i), arms=(arm,))
        commit = Provenance(commit=f"{i:040x}")
        records.append(record.model_copy(update=dict(provenance=commit) | changes_))
    return records


def said(outcome, *verdicts):
    return " ".join(finding.said for finding in outcome.of(*verdicts))


def test_a_history_that_moved_names_when_how_much_and_the_commits():
    outcome = look_back(history([1.5] * 10 + [1.3] * 8)[::-1])  # in any order
    assert (outcome.verdict, outcome.exit_code) == ("CHANGED", 1)
    (found,) = outcome.of("CHANGED")
    assert found.figure == "test speed-up" and "token_prune" in found.cell
    assert "between 2025-01-10 (commit 0000000000) and 2025-01-11 (commit 0000000000)" in found.said
    assert found.old.startswith("1.5") and found.new.startswith("1.") and "[" in found.new
    assert "10 runs before, 8 after" in found.said


def test_a_known_change_is_noted_once_it_is_accepted():
    records = history([1.5] * 10 + [1.3] * 8)
    assert look_back(records, since=date(2025, 1, 11)).exit_code == 1
    outcome = look_back(records, since=date(2025, 1, 12))
    assert outcome.verdict != "CHANGED" and "so it is known" in said(outcome, "NOTE")


def test_a_steady_history_is_the_same_and_holes_are_named():
    days = [*range(8), *range(30, 38)]
    outcome = look_back(history([1.4] * 16, days))
    assert (outcome.verdict, outcome.exit_code) == ("SAME", 0), outcome
    assert any("no run between 2025-01-08 and 2025-01-31 (23 days" in note for note in outcome.notes)
    moved = look_back(history([1.4] * 8 + [1.2] * 8, days))
    assert "between 2025-01-08" in said(moved, "CHANGED") and "and 2025-01-31" in said(moved, "CHANGED")


def test_too_few_runs_are_a_note_and_tell_nothing():
    outcome = look_back(history([1.4] * (LEAST - 1)))
    assert (outcome.verdict, outcome.exit_code) == ("INVALID", 2)
    assert f"{LEAST} are needed" in said(outcome, "NOTE")
    with pytest.raises(InvalidError, match="no run"):
        look_back([])


def test_envelopes_are_never_mixed():
    one, other = history([1.5] * 8), history([1.2] * 8)
    moved = [r.model_copy(update=dict(id=f"o{r.id}", envelope=r.envelope.model_copy(update=dict(device_model="B"))))
             for r in other]  # fmt: skip
    outcome = look_back([*one, *moved])
    assert outcome.verdict == "SAME"
    assert len({finding.cell for finding in outcome.of("PASS")}) == 4  # method and identity, on each machine


def test_bad_runs_are_left_out_by_name_and_copies_count_once():
    records = history([1.4] * 12)
    bad = records[0].model_copy(update=dict(id="bad-run", status="INVALID"))
    outcome = look_back([*records, bad], ["x/record.json is truncated\x1b[31m"])
    assert "1 INVALID runs are left out: bad-run" in outcome.notes
    assert any("x/record.json is truncated" in note and "\x1b" not in note for note in outcome.notes)
    copies = [records[0].model_copy(update=dict(id=f"copy-{i}")) for i in range(9)]
    found = look_back([*records, *copies])
    assert "9 runs are copies of another one and count once" in said(found, "NOTE")
    assert found.verdict == "SAME"
    zero = (
        records[3]
        .arms[-1]
        .model_copy(update=dict(test_speedup=Speedup(value=0.0, low=0.0, high=0.0, n=30, verdict="SLOWER")))
    )
    broken = [r if i != 3 else r.model_copy(update=dict(arms=(*r.arms[:-1], zero))) for i, r in enumerate(records)]
    assert "impossible speed-up" in said(look_back(broken), "NOTE")
    huge = zero.model_copy(
        update=dict(test_speedup=Speedup(value=1e308, low=1e-308, high=1e308, n=3, verdict="FASTER"))
    )
    look_back([r if i != 3 else r.model_copy(update=dict(arms=(*r.arms[:-1], huge))) for i, r in enumerate(records)])


def test_an_arm_that_comes_and_goes_is_named():
    records = history([1.4] * 12)
    part = [r if i % 3 else r.model_copy(update=dict(arms=r.arms[:-1])) for i, r in enumerate(records)]
    assert "missing or FAILED in 4 of 12 runs" in said(look_back(part), "NOTE")


def test_exact_figures_are_told_at_the_run_where_they_change():
    records = history([1.4] * 10)
    arm = records[7].arms[-1].model_copy(update=dict(test_flops=Flops(dense=2_761_000_000)))
    records[7:] = [r.model_copy(update=dict(arms=(*r.arms[:-1], r.arms[-1].model_copy(
        update=dict(test_flops=arm.test_flops))))) for r in records[7:]]  # fmt: skip
    (found,) = look_back(records).of("CHANGED")
    assert (found.figure, found.old, found.new) == ("test FLOPs", "2,510,000,000", "2,761,000,000")
    assert "+10 % between 2025-01-07" in found.said


def test_hostile_names_cannot_write_to_the_terminal(tmp_path, capsys):
    for record in history([1.5] * 9 + [1.2] * 9):
        arms = (*record.arms[:-1], record.arms[-1].model_copy(update=dict(name=EVIL, spec=EVIL)))
        evil = record.model_copy(update=dict(arms=arms, provenance=Provenance(commit=EVIL)))
        folder = tmp_path / "records" / evil.id
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(evil.model_dump_json())
    (tmp_path / "records" / "torn").mkdir()
    (tmp_path / "records" / "torn" / "record.json").write_text('{"schema_version": 2,')
    assert cli.main(["gate", "--drift", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "\x1b[31m" not in shown and "\u202e" not in shown
    assert "CHANGED" in shown and "truncated or not JSON" in shown
    assert len(store.read_all(tmp_path)[0]) == 18


def test_what_cannot_be_asked_is_said(tmp_path, capsys):
    assert cli.main(["gate", "--drift", "--out", str(tmp_path / "none")]) == 2
    assert "there are no runs in" in capsys.readouterr().err
    (tmp_path / "records").mkdir()
    assert cli.main(["gate", "--drift", "--out", str(tmp_path), "--since", "yesterday"]) == 3
    assert "is not a day" in capsys.readouterr().err
    assert cli.main(["gate", "--drift", "--out", str(tmp_path)]) == 2
