import re

import numpy as np
import pytest
from scipy import optimize
from test_leaderboard import BASELINE, EVIL, make_arm, make_record

from effbench import bradley_terry
from effbench.bradley_terry import strengths
from effbench.records import Interval, Speedup, Versus
from effbench.report import ratings
from effbench.report.bouts import NONE, bout
from effbench.report.ratings import Collected
from effbench.report.standings import sections

TRUE = np.array([0.0, 1.0, -1.0, 0.5, 2.0])


def simulated(clusters, theta=TRUE, delta=-0.3, seed=1):
    """Comparisons of all pairs, once per cluster: (first, second, outcome, cluster)."""
    rng = np.random.default_rng(seed)
    i, j = (np.tile(end, clusters) for end in np.triu_indices(len(theta), 1))
    half = (theta[i] - theta[j]) / 2
    odds = np.exp([half, np.full(len(half), delta), -half])
    drawn = (rng.random(len(half)) > odds.cumsum(axis=0) / odds.sum(axis=0)).sum(axis=0)
    return np.array([i, j, 1 - drawn, np.repeat(np.arange(clusters), len(i) // clusters)])


def repeated(*counts):
    """Comparisons (first, second, outcome) as often as said, all in one cluster."""
    return np.concatenate([np.tile([[*which, 0]], (count, 1)) for which, count in counts]).T


def test_known_strengths_are_found_again():
    found = strengths(*simulated(300))
    assert np.abs(found.value - TRUE).max() < 0.2 and abs(found.delta + 0.3) < 0.1
    assert ((found.low <= TRUE) & (TRUE <= found.high)).all() and found.connected.all()
    assert (found.high - found.low)[1:].max() < 0.7


def test_two_arms_have_the_closed_form_of_davidson():
    found = strengths(*repeated(((1, 0, 1), 600), ((1, 0, 0), 300), ((1, 0, -1), 100)), np.full(1000, 1000.0))
    assert found.value[1] == pytest.approx(np.log(600 / 100), abs=1e-4)
    assert found.delta == pytest.approx(np.log(300 / np.sqrt(600 * 100)), abs=1e-4)


def test_the_fit_is_the_maximum_that_another_optimiser_finds():
    first, second, outcome, cluster = data = simulated(3, seed=5)

    def loss(x):
        theta = np.r_[0.0, x[:-1]]
        half = (theta[first] - theta[second]) / 2
        logits = np.array([-half, np.full(len(half), x[-1]), half])
        terms = logits[outcome + 1, np.arange(len(half))] - np.log(np.exp(logits).sum(axis=0))
        return -terms.sum() + (((theta - theta.mean()) ** 2).sum() + x[-1] ** 2) / (2 * bradley_terry.PRIOR**2)

    best = optimize.minimize(loss, np.zeros(5), method="BFGS", options=dict(gtol=1e-8)).x
    found = strengths(*data)
    assert np.allclose(found.value[1:], best[:-1], atol=1e-4) and found.delta == pytest.approx(best[-1], abs=1e-4)


def test_many_draws_at_once_come_to_what_each_alone_comes_to():
    rng = np.random.default_rng(0)
    ends = np.triu_indices(5, 1)
    counts = rng.integers(0, 2, (40, 30)) * rng.choice([1.0, 1e-3, 1e4], (40, 30))  # hard ones: far apart, nearly empty
    together = bradley_terry._refit(counts, ends, 5, np.full(5, 8.0))
    alone = np.array([np.r_[0.0, bradley_terry._fit(each[None], ends, 5)[:-1]] for each in counts])
    there = ~np.isnan(together)
    assert np.abs(together - alone)[there].max() < 1e-3 and there.mean() > 0.9


def test_neither_the_order_of_comparisons_nor_of_arms_matters():
    first, second, outcome, cluster = data = simulated(12)
    found = strengths(*data)
    order = np.random.default_rng(2).permutation(len(first))
    turned = np.where(np.arange(len(first)) % 2, 1, -1)
    ends = np.where(turned > 0, first, second), np.where(turned > 0, second, first)
    again = strengths(*(each[order] for each in (*ends, outcome * turned, cluster)))
    for name in ("value", "low", "high"):
        assert np.allclose(getattr(found, name), getattr(again, name), atol=1e-6)
    renamed = np.array([0, 3, 1, 4, 2])
    moved = strengths(renamed[first], renamed[second], outcome, cluster)
    assert np.allclose(moved.value[renamed], found.value, atol=1e-5)
    assert np.allclose(moved.low[renamed], found.low, atol=1e-3)


def test_the_same_evidence_again_narrows_the_interval_and_moves_no_rating():
    data = simulated(40)
    more = np.concatenate([data, data + np.array([[0], [0], [0], [40]])], axis=1)
    once, twice = strengths(*data), strengths(*more)
    assert np.allclose(once.value, twice.value, atol=0.05)  # the prior weighs half as much
    assert np.all((twice.high - twice.low)[1:] < 0.85 * (once.high - once.low)[1:])


def test_the_anchor_is_zero_and_equals_stay_there():
    found = strengths(*simulated(20, theta=np.array([0.0, 0.0])))
    assert found.value[0] == found.low[0] == found.high[0] == 0 and found.low[1] < 0 < found.high[1]
    ties = strengths([1] * 9, [0] * 9, [0] * 9, np.arange(9))
    assert abs(ties.value[1]) < 1e-5 and ties.delta > 1 and ties.low[1] < -0.5 < 0.5 < ties.high[1]


def test_the_choice_of_the_anchor_moves_all_strengths_alike():
    losers = [(winner, loser, 1) for winner in (0, 1) for loser in range(2, 10)] + [(0, 1, 0)]
    first, second, outcome = np.array(losers * 4).T
    found = strengths(first, second, outcome, np.repeat(np.arange(4), len(losers)))
    assert abs(found.value[1]) < 1e-5  # it did as the anchor did: few comparisons do not pull them apart
    swapped = np.array([5, 1, 2, 3, 4, 0, 6, 7, 8, 9])  # arm 5, which lost, is the anchor
    other = strengths(swapped[first], swapped[second], outcome, np.repeat(np.arange(4), len(losers)))
    assert np.allclose(other.value[swapped] - found.value, -found.value[5], atol=1e-4)


def test_an_arm_that_never_lost_is_finite_and_has_no_upper_end():
    found = [strengths([1] * n, [0] * n, [1] * n, np.arange(n)) for n in (2, 10)]
    assert 0.5 < found[0].value[1] < found[1].value[1] < 5
    assert all(each.high[1] == np.inf and np.isfinite(each.low[1]) for each in found)
    lost = strengths([1] * 3, [0] * 3, [-1] * 3, np.arange(3))
    assert lost.low[1] == -np.inf and np.isfinite(lost.high[1])


def test_arms_that_were_never_compared_with_the_anchor_have_no_strength():
    first, second, outcome, cluster = simulated(5, theta=TRUE[:3])
    apart = [np.r_[each, [extra] * 5] for each, extra in zip((first, second, outcome), (3, 4, 1), strict=True)]
    found = strengths(*apart, np.r_[cluster, np.arange(5)], arms=6)
    assert found.connected.tolist() == [True] * 3 + [False] * 3
    assert (
        np.isnan(found.value[3:]).all() and np.isnan(found.low[3:]).all() and found.clusters.tolist()[3:] == [5, 5, 0]
    )
    # the tied-up comparison still counts for how likely a tie is, so the others move a little
    assert np.allclose(found.value[:3], strengths(first, second, outcome, cluster).value, atol=0.2)
    through = strengths([1, 2], [0, 1], [1, 1], [0, 1])
    assert through.connected.all() and through.value[2] > through.value[1] > 0


def test_one_cluster_gives_no_interval_and_none_no_strength():
    found = strengths(*repeated(((1, 0, 1), 5), ((1, 0, -1), 3)))
    assert found.value[1] > 0 and np.isnan(found.low[1]) and np.isnan(found.high[1])
    empty = strengths([], [], [], [], arms=2)
    assert empty.value[0] == 0 and np.isnan(empty.value[1]) and empty.connected.tolist() == [True, False]


@pytest.mark.parametrize(("first", "outcome"), [([0, 1], [1, 1]), ([1, 1], [1, 2]), ([1], [1, 0])])
def test_what_is_no_comparison_is_refused(first, outcome):
    with pytest.raises(ValueError, match="comparison"):
        strengths(first, [0, 0], outcome, [0, 0])


def arm(spec, loss=0.0, speed=1.0, wide=0.004, spread=0.02, **changes):
    """An arm with a lossy-ness and a speed-up; `wide` and `spread` are half the widths of their intervals."""
    made = make_arm(spec, spec, **changes)
    found = dict(lossiness=Interval(value=loss, low=loss - wide, high=loss + wide, n=1000), equivalent=False)
    value = BASELINE * (1 - loss)
    own = made.metrics["t2i_r10"].model_copy(update=found | dict(value=value, low=value - 1, high=value + 1))
    speed = Speedup(value=speed, low=speed - spread, high=speed + spread, n=30, verdict="AMBIGUOUS")
    return made.model_copy(update=dict(metrics=made.metrics | {"t2i_r10": own}, test_speedup=speed))


def control(spec, kind, *args, **changes):
    return arm(spec, *args, kind="control", control=kind, **changes)


def record(name, *arms, backbone="b", epochs=12, **changes):
    made = make_record(name, arms=arms, epochs=epochs)
    protocol = made.envelope.protocol.model_copy(update=changes.pop("protocol", {}))
    envelope = made.envelope.model_copy(update=dict(backbone=backbone, protocol=protocol) | changes)
    return made.model_copy(update=dict(envelope=envelope))


def outcome(axis, one, other, *arms, **changes):
    """How one arm fares against another in a record of these arms."""
    found = bout(sections([record("r", *arms, **changes)])[0])
    return getattr(found, axis)[found.arms.index(one), found.arms.index(other)]


def rated(*records):
    collected = Collected()
    for section in sections(records):
        collected.add(section)
    return collected


@pytest.mark.parametrize(
    ("loss", "wide", "expected"),
    [(0.05, 0.02, -1), (-0.05, 0.02, 1), (0.05, 0.06, 0), (0.005, 0.004, 0), (0.0, 0.0, 0), (1e300, 0.0, None)],
)
def test_quality_against_the_baseline(loss, wide, expected):
    if expected is None:  # edited by hand: compared with nothing
        assert bout(sections([record("r", arm("a", loss, wide=wide))])[0]) is None
    else:
        assert outcome("quality", "a", "", arm("a", loss, wide=wide)) == expected
        assert outcome("quality", "", "a", arm("a", loss, wide=wide)) == -expected


def test_two_arms_are_told_apart_by_the_interval_of_their_difference():
    a, b = arm("a", 0.02, wide=0.01), arm("b", 0.033, wide=0.01)
    assert outcome("quality", "a", "b", a, b) == 0  # 0.013 +- 0.0141, though b alone excludes a's value
    assert outcome("quality", "a", "b", a, arm("b", 0.04, wide=0.01)) == 1


def test_a_recorded_paired_comparison_goes_before_the_two_intervals():
    def against(verdict, advantage):
        found = Versus(control="random", arms=("b",), value=40.0, advantage=advantage, verdict=verdict)
        return arm("a", 0.02, wide=0.05, versus=(found,))

    blind = control("b", "random", 0.03, wide=0.05)
    better = against("BETTER", Interval(value=2.0, low=1.0, high=3.0))
    assert outcome("quality", "a", "b", better, blind) == 1 and outcome("quality", "b", "a", better, blind) == -1
    little = against("BETTER", Interval(value=0.2, low=0.1, high=0.3))  # of 48: within 1 %
    assert outcome("quality", "a", "b", little, blind) == 0


def test_at_equal_latency_a_trade_off_is_not_compared():
    slow, fast = arm("slow", 0.01, 1.2), arm("fast", 0.05, 2.0)
    assert outcome("latency", "fast", "slow", slow, fast) == NONE
    assert outcome("latency", "fast", "slow", slow, arm("fast", 0.01, 2.0)) == 1
    assert outcome("latency", "fast", "slow", arm("slow", 0.05, 1.2), arm("fast", 0.01, 2.0)) == 1
    assert outcome("latency", "fast", "slow", arm("slow", 0.05, 1.2), arm("fast", 0.01, 1.21)) == 1
    assert outcome("latency", "fast", "slow", arm("slow", 0.01, 1.2), arm("fast", 0.01, 1.21)) == 0
    assert outcome("latency", "fast", "", arm("fast", 0.05, 2.0)) == NONE
    assert outcome("latency", "fast", "", arm("fast", 0.0, 2.0)) == 1
    assert outcome("latency", "late", "", arm("late", 0.0, 0.5)) == -1
    few = arm("few").model_copy(update=dict(test_speedup=Speedup(value=2.0, n=3, verdict="TOO FEW SAMPLES")))
    assert outcome("latency", "few", "", few) == NONE and outcome("quality", "few", "", few) == 0


def test_the_baseline_at_equal_latency_is_the_one_on_a_smaller_image():
    sizes = control("resize:size=112", "resize", 0.20, 2.0), control("resize:size=64", "resize", 0.60, 4.0)
    at = 1 / 0.75  # half way in time between the baseline and 2x: there the dense model loses 10 %
    for loss, expected in ((0.05, 1), (0.10, 0), (0.15, -1)):
        assert outcome("latency", "a", "", arm("a", loss, at, spread=0.01), *sizes) == expected
    noisy = arm("a", 0.08, at, spread=0.2)  # its own speed-up is not known well enough
    assert outcome("latency", "a", "", noisy, *sizes) == 0
    assert outcome("latency", "a", "", arm("a", 0.5, 8.0), *sizes) == 1
    assert outcome("latency", "a", "", arm("a", 0.7, 8.0), *sizes) == NONE
    assert outcome("latency", "a", "", arm("a", -0.1, 0.5), *sizes) == NONE
    found = bout(sections([record("r", arm("a"), *sizes)])[0])
    assert found.reference == {"resize:size=112", "resize:size=64"}
    assert (found.latency[2:] == NONE).all() and (found.quality[2:, 0] == -1).all()
    beaten = control("resize:size=200", "resize", 0.4, 1.2)  # slower and worse than another size: no reference
    assert outcome("latency", "a", "", arm("a", 0.12, at, spread=0.01), *sizes, beaten) == -1


def test_what_says_nothing_about_quality_is_not_compared():
    nothing = dict(
        failed=arm("a", status="FAILED"),
        meaningless=arm("a", no_quality="its weights are random"),
        trained_once=arm("a", phase="both"),
    )
    for found in nothing.values():
        assert bout(sections([record("r", found)])[0]) is None
    assert outcome("quality", "a", "", arm("a", phase="both"), protocol=dict(seeds=(0, 1, 2))) == 0
    assert bout(sections([record("r", arm("a"), weights="random")])[0]) is None
    assert bout(sections([record("r")])[0]).arms == ("", "token_prune:keep=0.5")  # neither noop nor identity


def several(*arms, count=4):
    return [record(f"r{k}", *arms, backbone=f"b{k}") for k in range(count)]


def test_ratings_of_records():
    good, bad = arm("good", -0.1, 1.5), arm("bad", 0.3, 0.8)
    blind = control("blind", "random", 0.3, 0.8)
    (found,) = rated(*several(good, bad, blind)).ratings()
    by_spec = {each.spec: each for each in found.rated}
    assert [each.spec for each in found.rated] == ["good", "", "bad", "blind"]
    assert by_spec["good"].quality.value > 0 == by_spec[""].quality.value > by_spec["bad"].quality.value
    assert (by_spec["good"].quality.won, by_spec["good"].quality.tied, by_spec["bad"].quality.lost) == (12, 0, 8)
    assert by_spec["bad"].quality.tied == 4 and by_spec["good"].quality.high == float("inf")
    assert by_spec["blind"].control == "random" and by_spec["bad"].control == ""
    assert found.envelopes == 4 == by_spec["good"].quality.clusters and not found.single


def test_settings_run_again_are_no_other_task():
    arms = arm("a", -0.1), arm("b", 0.2), arm("c", 0.0, wide=0.03)
    once = rated(*several(*arms)).ratings()[0].rated
    again = [record(f"x{k}", *arms, backbone="b0", epochs=k + 1) for k in range(3)]
    for each, other in zip(once, rated(*several(*arms), *again).ratings()[0].rated, strict=True):
        assert each.spec == other.spec and each.quality.value == pytest.approx(other.quality.value, abs=0.1)
        assert other.quality.clusters == 4


def test_only_arms_of_two_clusters_are_rated_and_drawn_data_stand_apart():
    both, one = arm("both", 0.1), arm("one", 0.2)
    drawn = [
        record(f"s{k}", both, backbone=f"b{k}", data="scenes", synthetic=True, data_fingerprint="5") for k in range(2)
    ]
    real, synthetic = rated(*several(both, one, count=1), *several(both, count=2)[1:], *drawn).ratings()
    assert [each.spec for each in real.rated] == ["", "both"] and real.single == 1
    assert not real.synthetic and synthetic.synthetic and synthetic.envelopes == 2
    text = rated(*several(both, one, count=1), *drawn).markdown()
    assert text.count("| arm") == 1 and "real data, cpu**: 1 envelope, 1 combination" in text
    assert "No rating: no arm was compared in two of them. 2 arms of one combination only" in text
    assert rated(*several(both, count=1), record("again", both, epochs=3, backbone="b0")).markdown() == ""


def test_an_arm_without_a_rating_says_why():
    sizes = control("resize:size=112", "resize", 0.2, 2.0)
    timed, untimed = arm("a", 0.1, 1.2), arm("a", 0.1).model_copy(update=dict(test_speedup=None))
    found = rated(record("r0", timed, sizes, backbone="b0"), record("r1", untimed, sizes, backbone="b1")).ratings()
    by_spec = {each.spec: each for each in found[0].rated}
    assert by_spec["a"].quality.value is not None and by_spec["a"].latency.value is None
    assert "one combination" in by_spec["a"].latency.why
    assert by_spec["resize:size=112"].latency.why == "is the reference"


def test_hostile_names_stay_text_in_the_table():
    text = rated(*several(arm(EVIL, 0.1), control(EVIL + "2", EVIL, 0.2))).markdown()
    assert "<script" not in text and "\x1b" not in text and "\u202e" not in text and "https://" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert text.count("\n## ") + text.startswith("## ") == 1


def test_points_as_text():
    inf = float("inf")
    some = [ratings.Rating(12.4, -30.2, inf), ratings.Rating(-0.3, None, None), ratings.Rating(None, None, None)]
    assert [ratings.points(each) for each in some] == ["+12 [-30, ∞]", "0", "—"]
    assert ratings.points(ratings.Rating(-5.0, -inf, 3.0)) == "-5 [-∞, +3]"
