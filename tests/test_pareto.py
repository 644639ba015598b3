"""The Pareto front of speed-up and lossy-ness, its probability, and which arms are placed at all."""

import math

import numpy as np
import pytest
from test_leaderboard import make_arm, make_record

from effbench.records import Interval, MetricValue, Speedup, Versus
from effbench.report import pareto, verdicts
from effbench.report.pareto import BASELINE, Point
from effbench.report.standings import Standing, ranked, sections


def speed(value, low=None, high=None, verdict="FASTER"):
    return Speedup(value=value, low=low or 0.98 * value, high=high or 1.02 * value, n=30, verdict=verdict)


def lossy(value, low=None, high=None, **more):
    loss = Interval(value=value, low=value - 0.01 if low is None else low, high=value + 0.01 if high is None else high)
    return {"t2i_r10": MetricValue(value=48.0, higher_is_better=True, lossiness=loss, **more)}


def method(name, ratio, loss, *versus, **changes):
    figures = dict(test_speedup=speed(ratio), metrics=lossy(loss), versus=versus)
    return make_arm(name, name, **figures | changes)


def against(control, verdict, *arms):
    between = ("small", "large") if control == "resize" else ("blind",)
    return Versus(control=control, arms=arms or between, value=40.0, advantage=Interval(value=0.0), verdict=verdict)


def rows_of(*arms, **changes):
    return {row.arm.name: row for row in sections([make_record(arms=arms, **changes)])[0].rows}


def test_known_fronts():
    assert pareto.front([]) == [] == pareto.probability([])
    assert pareto.front([BASELINE]) == [True] and pareto.probability([BASELINE]) == [1.0]
    #         baseline, faster at a loss, slower at more loss, faster without loss, its twin
    points = [BASELINE, Point(0.5, 0.1), Point(0.4, 0.2), Point(0.3, 0.0), Point(0.3, 0.0)]
    assert pareto.front(points) == [False, True, False, True, True]
    assert pareto.front([BASELINE, Point(0.0, 0.0), Point(0.0, -0.1)]) == [False, False, True]


def test_the_front_is_what_nobody_beats_on_both():
    random = np.random.default_rng(1)
    for _ in range(30):
        points = [Point(*each) for each in random.integers(0, 5, (12, 2)) / 10]

        def beaten(one, points=points):
            return any(other.speed >= one.speed and other.loss <= one.loss and other[:2] != one[:2] for other in points)

        assert pareto.front(points) == [not beaten(one) for one in points]


def test_the_probability_follows_from_the_intervals():
    # equally fast beyond doubt: which of the two is on the front is decided by the loss alone
    twins = [Point(0.5, 0.1, 0.0, 0.02), Point(0.5, 0.1, 0.0, 0.02)]
    assert pareto.probability(twins)[0] == pytest.approx(0.5, abs=0.03)
    apart = [Point(0.5, 0.10, 0.0, 0.02), Point(0.5, 0.12, 0.0, 0.02)]
    expected = 0.5 * (1 + math.erf(0.02 / (0.02 * math.sqrt(2)) / math.sqrt(2)))
    assert pareto.probability(apart) == pytest.approx([expected, 1 - expected], abs=0.03)
    sure = [BASELINE, Point(0.5, 0.1, 0.01, 0.01), Point(0.2, 0.5, 0.01, 0.01)]
    assert pareto.probability(sure) == [1.0, 1.0, 0.0]
    assert pareto.probability(apart) == pareto.probability(apart)


def test_the_standard_deviation_is_that_of_the_interval():
    arm = method("m", 2.0, 0.1, test_speedup=speed(2.0, 1.6, 2.5), metrics=lossy(0.1, 0.0, 0.2))
    found = pareto.point(arm, "t2i_r10")
    assert found.speed == math.log(2) and found.loss == 0.1
    assert found.speed_sd == pytest.approx(math.log(2.5 / 1.6) / 3.92, rel=1e-3)
    assert found.loss_sd == pytest.approx(0.2 / 3.92, rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        dict(kind="control", control="random"),
        dict(kind="control", control="part"),
        dict(status="FAILED", error="boom"),
        dict(test_speedup=None),
        dict(test_speedup=Speedup(value=1.5, n=3, verdict="TOO FEW SAMPLES")),
        dict(test_speedup=speed(1.5, 1.6, 1.7)),
        dict(test_speedup=speed(1.5, -1.0, 1.7)),
        dict(metrics={}),
        dict(metrics={"t2i_r10": MetricValue(value=1, higher_is_better=True, note="n/a (baseline at chance)")}),
        dict(metrics=lossy(0.1, 0.2, 0.3)),
        dict(no_quality="its head was replaced"),
    ],
    ids=str,
)
def test_who_has_no_place(changes):
    arm = method("m", 1.5, 0.1, **changes)
    assert pareto.point(arm, "t2i_r10") is None
    row = rows_of(arm)["m"]
    assert row.probability is None and row.front is False


def test_hostile_figures_make_no_nonsense():
    huge = dict(test_speedup=speed(1e308, 1e-308, 1e308), metrics=lossy(0.0, -1e308, 1e308))
    found = rows_of(method("huge", 1.5, 0.1, **huge), method("plain", 1.5, 0.1))
    assert all(0 <= row.probability <= 1 for row in found.values() if row.probability is not None)
    assert found["huge"].front and found["huge"].probability is not None


def test_random_weights_have_no_front_and_no_line():
    record = make_record(arms=(method("m", 1.5, 0.1, against("random", "WORSE")),))
    record = record.model_copy(update=dict(envelope=record.envelope.model_copy(update=dict(weights="random"))))
    rows = sections([record])[0].rows
    assert not any(row.front or row.below or row.probability is not None for row in rows)
    assert "Nothing is said about quality" in verdicts.sentences(rows)[0]


def test_only_one_envelope_is_ranked_together():
    fast, slow = make_record("a", 2, (method("fast", 2.0, 0.0),)), make_record("b", 3, (method("slow", 1.2, 0.0),))
    assert [row.front for row in sections([fast, slow])[0].rows if row.arm.kind == "method"] == [True, False]
    other = make_record("b", 3, (method("slow", 1.2, 0.0),), epochs=1)
    assert all(row.front for each in sections([fast, other]) for row in each.rows if row.arm.kind == "method")


@pytest.mark.parametrize(
    "found, below, why",
    [
        ((against("random", "BETTER"), against("resize", "BETTER")), (), ""),
        ((against("random", "WORSE"),), ("random",), "worse than random"),
        ((against("resize", "NO DIFFERENCE SHOWN"),), ("resize",), "not shown to beat resize"),
        (
            (against("random", "WORSE"), against("resize", "NO DIFFERENCE SHOWN")),
            ("random", "resize"),
            "worse than random; not shown to beat resize",
        ),
        ((against("random", "BETTER"), against("random", "WORSE")), ("random",), "not shown to beat random"),
        ((against("norm", "WORSE"), against("grid", "WORSE")), (), ""),  # they look at the tokens
        ((against("resize", "NO DIFFERENCE SHOWN", "m"),), (), ""),  # itself
        ((), (), ""),
    ],
)  # fmt: skip
def test_below_the_line_is_who_does_not_beat_a_blind_control(found, below, why):
    rows = rows_of(method("m", 1.9, 0.1, *found), method("other", 1.2, 0.0))
    assert rows["m"].below == below and verdicts.reason(rows["m"]) == why
    assert [name for name in rows if name in ("m", "other")] == (["other", "m"] if below else ["m", "other"])


def test_verdicts_say_what_to_use_and_why_not():
    beat, lost = against("random", "BETTER"), against("random", "WORSE")
    rows = list(rows_of(method("good", 1.5, 0.01, beat), method("bad", 2.0, 0.02, lost)).values())
    first, second = verdicts.sentences(rows)
    assert first.startswith("Worth using: good (1.50x [1.47, 1.53], lossy-ness +1.0 %") and "of draws)" in first
    assert second == "Below the line (1 of 2 compared at the same budget): worse than random: bad."
    only = [row for row in rows if row.arm.name != "good"]
    assert verdicts.sentences(only)[0] == (
        "Nothing to recommend: of 1 method, 1 shown to be FASTER, but of these 1 not shown to beat a blind control at "
        "the same budget."
    )
    slow = list(rows_of(method("slow", 0.9, 0.0, test_speedup=speed(0.9, verdict="SLOWER"))).values())
    assert "none is shown to be faster" in verdicts.sentences(slow)[0]
    few = Speedup(value=1.5, n=3, verdict="TOO FEW SAMPLES")
    assert "too few samples" in verdicts.sentences(list(rows_of(method("m", 1.5, 0.1, test_speedup=few)).values()))[0]
    assert verdicts.sentences(rows[:1]) == ["No method was measured."]


def test_a_long_verdict_stays_short():
    arms = [method(f"method_{i}", 1.2 + i / 100, i / 1000, against("random", "BETTER")) for i in range(50)]
    arms += [method(f"lost_{i}", 1.2, 0.5, against("random", "WORSE")) for i in range(50)]
    said = verdicts.sentences(list(rows_of(*arms).values()))
    assert "method_0 (" in said[0] and "method_49 (" in said[0] and " more are marked ★" in said[0]
    assert "lost_0" in said[1] and "and 46 more" in said[1] and sum(map(len, said)) < 900


def test_rows_keep_what_was_counted():
    record = make_record()
    rows = ranked([Standing(arm, record, 7) for arm in record.arms])
    assert {row.count for row in rows} == {7} and {row.record.id for row in rows} == {record.id}
