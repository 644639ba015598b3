import math

import numpy as np
import pytest
from scipy.stats import binom

from effbench import stats
from effbench.errors import InvalidError
from effbench.task import Items, Metric

R10 = Metric("t2i_r10", "t2i_rank", lambda rank: 100.0 * (rank <= 10), True, chance=1.0, ceiling=100.0)
MEDIAN = Metric(
    "t2i_medr", "t2i_rank", lambda rank: rank, False, chance=500.0, ceiling=1.0, reduce="median", unit="rank"
)
LOSS = Metric("loss", "loss", lambda x: x, False, chance=None, ceiling=0.0, unit="nats")


def items(values, per_group=1):
    return Items(np.asarray(values, float), np.repeat(np.arange(len(values) // per_group), per_group))


def ranks(rng, hit, images=200, per_group=5):
    good = rng.random(images * per_group) < hit
    return items(np.where(good, rng.integers(1, 11, len(good)), rng.integers(11, 1000, len(good))), per_group)


@pytest.mark.parametrize(
    "ratio, verdict",
    [(1.5, "FASTER"), (0.7, "SLOWER"), (1.0, "NO DIFFERENCE"), (1.02, "NO DIFFERENCE")],
)
def test_verdict_of_a_clear_ratio(ratio, verdict):
    noise = 1 + 0.004 * np.sin(np.arange(30))
    got = stats.speedup(noise * ratio, np.ones(30))
    assert got.verdict == verdict and got.low <= got.value <= got.high and got.n == 30


def test_a_wide_interval_is_ambiguous_even_when_the_median_is_large():
    assert stats.speedup([1.2, 0.7] * 10 + [1.2] * 4, np.ones(24)).verdict == "AMBIGUOUS"


def test_a_tiny_but_certain_gain_is_not_faster():
    got = stats.speedup(np.full(30, 1.01), np.ones(30))
    assert got.low > 1 and got.verdict == "NO DIFFERENCE"


def test_speedup_and_slowdown_are_symmetric():
    a, b = np.random.default_rng(0).lognormal(0, 0.1, (2, 31))
    forward, back = stats.speedup(1.5 * a, b), stats.speedup(b, 1.5 * a)
    assert forward.low == pytest.approx(1 / back.high) and (forward.verdict, back.verdict) == ("FASTER", "SLOWER")


def test_five_pairs_are_too_few_and_six_take_the_extremes():
    few = stats.speedup([2.0] * 5, [1.0] * 5)
    assert few.verdict == "TOO FEW SAMPLES" and few.low is None and few.value == 2
    six = stats.speedup([1, 2, 3, 4, 5, 6], [1.0] * 6)
    assert (six.low, six.high) == (1, 6)


@pytest.mark.parametrize("n", [6, 7, 20, 30, 101])
def test_interval_is_the_narrowest_that_covers(n):
    got = stats.speedup(np.arange(1, n + 1), np.ones(n))
    k = int(got.low)
    assert got.high == n + 1 - k
    assert 1 - 2 * binom.cdf(k - 1, n, 0.5) >= 0.95 > 1 - 2 * binom.cdf(k, n, 0.5)


def test_interval_covers_the_true_median():
    rng = np.random.default_rng(1)
    hits = [
        (s := stats.speedup(rng.lognormal(0.2, 0.1, 30), np.ones(30))).low <= math.exp(0.2) <= s.high
        for _ in range(400)
    ]
    assert np.mean(hits) >= 0.93


@pytest.mark.parametrize("times", [[], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]])
def test_impossible_times_are_refused(times):
    with pytest.raises(InvalidError):
        stats.speedup(times, np.ones(len(times)))
    with pytest.raises(InvalidError):
        stats.speedup([1.0], [1.0, 2.0])


def test_lossiness_is_the_definition_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    base, arm = ranks(rng, 0.6), ranks(rng, 0.45)
    got = stats.lossiness(R10, [base], [arm], trained=False)
    q, q_b = (100 * np.mean(x.values <= 10) for x in (arm, base))
    assert got.value == pytest.approx(q) and got.lossiness.value == pytest.approx(1 - q / q_b)
    assert got.low < got.value < got.high and 0 < got.lossiness.low < got.lossiness.value < got.lossiness.high
    assert got.note == "" and got.by_seed == (got.value,) and got.lossiness.n == 200


def test_pairing_makes_an_identical_arm_exactly_lossless():
    base = ranks(np.random.default_rng(0), 0.5)
    got = stats.lossiness(R10, [base], [Items(base.values.copy(), base.group)])
    assert (got.lossiness.low, got.lossiness.value, got.lossiness.high) == (0, 0, 0)


def test_captions_of_an_image_stay_together():
    hit = np.repeat(np.random.default_rng(0).random(100) < 0.5, 5)
    together = Items(np.where(hit, 1, 99), np.repeat(np.arange(100), 5))
    apart = Items(together.values, np.arange(500))
    width = []
    for scores in ([together], [apart]):
        got = stats.lossiness(R10, scores, scores)
        width.append(got.high - got.low)
    assert width[0] / width[1] == pytest.approx(math.sqrt(5), rel=0.15)


def test_bootstrap_matches_a_plain_loop_for_mean_and_median():
    rng = np.random.default_rng(3)
    x = Items(rng.integers(1, 60, 90).astype(float), np.sort(rng.integers(0, 30, 90)))
    groups = np.unique(x.group)
    for metric, reduce in ((R10, np.mean), (MEDIAN, np.median)):
        table = stats._Prepared(metric, x, groups)
        weights = next(stats._weights(np.random.default_rng(5), len(groups), 50))
        for row, got in zip(weights, table.reduce(weights), strict=True):
            drawn = np.concatenate(
                [np.repeat(x.values[x.group == g], int(w)) for g, w in zip(groups, row, strict=True)]
            )
            assert got == pytest.approx(reduce(metric.value(drawn)))


def test_better_than_baseline_is_negative_and_lower_is_better_turns_the_ratio_over():
    got = stats.lossiness(LOSS, [items([2.0] * 20)], [items([1.0] * 20)])
    assert got.lossiness.value == -1 and "lower is better" in got.note
    assert stats.lossiness(LOSS, [items([1.0] * 20)], [items([2.0] * 20)]).lossiness.value == 0.5


def test_no_lossiness_where_it_means_nothing():
    rng = np.random.default_rng(0)
    good = ranks(rng, 0.5)
    blind = items(rng.integers(1, 1001, 1000), per_group=5)
    assert stats.lossiness(R10, [blind], [good]).note == "n/a (baseline at chance)"
    assert stats.lossiness(R10, [blind], [good]).lossiness is None
    assert stats.lossiness(MEDIAN, [blind], [good]).note == "n/a (baseline at chance)"
    zero = stats.lossiness(LOSS, [items([0.0] * 9)], [items([1.0] * 9)])
    assert zero.lossiness is None and "not above 0" in zero.note
    itself = [good]
    assert stats.lossiness(R10, itself, itself).lossiness is None


def test_one_seed_of_a_trained_arm_says_so_and_seeds_widen_the_interval():
    rng = np.random.default_rng(0)
    base = [ranks(rng, 0.6) for _ in range(3)]
    arm = [ranks(rng, hit) for hit in (0.3, 0.5, 0.55)]
    single = stats.lossiness(R10, base[:1], arm[:1], trained=True)
    several = stats.lossiness(R10, base, arm, trained=True)
    assert single.note == "training variance not measured" and several.note == ""
    assert several.value == pytest.approx(np.mean(several.by_seed)) and len(several.by_seed) == 3
    assert several.high - several.low > 1.3 * (single.high - single.low)


def test_unpaired_or_broken_scores_are_refused():
    good = items([1.0] * 10)
    for other in ([good, good], [items([1.0] * 9)], [items([math.nan] * 10)], []):
        with pytest.raises(InvalidError):
            stats.lossiness(R10, [good], other)
