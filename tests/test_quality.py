import math

import numpy as np
import pytest

from effbench import quality
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


def test_lossiness_is_the_definition_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    base, arm = ranks(rng, 0.6), ranks(rng, 0.45)
    got = quality.lossiness(R10, [base], [arm], trained=False)
    q, q_b = (100 * np.mean(x.values <= 10) for x in (arm, base))
    assert got.value == pytest.approx(q) and got.lossiness.value == pytest.approx(1 - q / q_b)
    assert got.low < got.value < got.high and 0 < got.lossiness.low < got.lossiness.value < got.lossiness.high
    assert got.note == "" and got.by_seed == (got.value,) and got.lossiness.n == 200


def test_pairing_makes_an_identical_arm_exactly_lossless():
    base = ranks(np.random.default_rng(0), 0.5)
    got = quality.lossiness(R10, [base], [Items(base.values.copy(), base.group)])
    assert (got.lossiness.low, got.lossiness.value, got.lossiness.high) == (0, 0, 0)


def test_captions_of_an_image_stay_together():
    hit = np.repeat(np.random.default_rng(0).random(100) < 0.5, 5)
    together = Items(np.where(hit, 1, 99), np.repeat(np.arange(100), 5))
    apart = Items(together.values, np.arange(500))
    width = []
    for scores in ([together], [apart]):
        got = quality.lossiness(R10, scores, scores)
        width.append(got.high - got.low)
    assert width[0] / width[1] == pytest.approx(math.sqrt(5), rel=0.15)


def test_bootstrap_matches_a_plain_loop_for_mean_and_median():
    rng = np.random.default_rng(3)
    x = Items(rng.integers(1, 60, 90).astype(float), np.sort(rng.integers(0, 30, 90)))
    groups = np.unique(x.group)
    for metric, reduce in ((R10, np.mean), (MEDIAN, np.median)):
        table = quality._Prepared(metric, x, groups)
        weights = next(quality._weights(np.random.default_rng(5), len(groups), 50))
        for row, got in zip(weights, table.reduce(weights), strict=True):
            drawn = np.concatenate(
                [np.repeat(x.values[x.group == g], int(w)) for g, w in zip(groups, row, strict=True)]
            )
            assert got == pytest.approx(reduce(metric.value(drawn)))


def test_better_than_baseline_is_negative_and_lower_is_better_turns_the_ratio_over():
    got = quality.lossiness(LOSS, [items([2.0] * 20)], [items([1.0] * 20)])
    assert got.lossiness.value == -1 and "lower is better" in got.note
    assert quality.lossiness(LOSS, [items([1.0] * 20)], [items([2.0] * 20)]).lossiness.value == 0.5


def test_no_lossiness_where_it_means_nothing():
    rng = np.random.default_rng(0)
    good = ranks(rng, 0.5)
    blind = items(rng.integers(1, 1001, 1000), per_group=5)
    assert quality.lossiness(R10, [blind], [good]).note == "n/a (baseline at chance)"
    assert quality.lossiness(R10, [blind], [good]).lossiness is None
    assert quality.lossiness(MEDIAN, [blind], [good]).note == "n/a (baseline at chance)"
    zero = quality.lossiness(LOSS, [items([0.0] * 9)], [items([1.0] * 9)])
    assert zero.lossiness is None and "not above 0" in zero.note
    itself = [good]
    assert quality.lossiness(R10, itself, itself).lossiness is None


def test_one_seed_of_a_trained_arm_says_so_and_seeds_widen_the_interval():
    rng = np.random.default_rng(0)
    base = [ranks(rng, 0.6) for _ in range(3)]
    arm = [ranks(rng, hit) for hit in (0.3, 0.5, 0.55)]
    single = quality.lossiness(R10, base[:1], arm[:1], trained=True)
    several = quality.lossiness(R10, base, arm, trained=True)
    assert single.note == "training variance not measured" and several.note == ""
    assert several.value == pytest.approx(np.mean(several.by_seed)) and len(several.by_seed) == 3
    assert several.high - several.low > 1.3 * (single.high - single.low)


def test_unpaired_or_broken_scores_are_refused():
    good = items([1.0] * 10)
    for other in ([good, good], [items([1.0] * 9)], [items([math.nan] * 10)], []):
        with pytest.raises(InvalidError):
            quality.lossiness(R10, [good], other)


def test_no_loss_is_claimed_only_by_an_equivalence_test():
    rng = np.random.default_rng(0)
    base = ranks(rng, 0.6, images=1000)
    flipped = base.values.copy()
    flipped[rng.choice(len(flipped), 20, replace=False)] = 500
    close, far = Items(flipped, base.group), ranks(rng, 0.55, images=1000)
    assert quality.lossiness(R10, [base], [close]).equivalent is True
    assert quality.lossiness(R10, [base], [far]).equivalent is False
    few = quality.lossiness(R10, [items(base.values[:50], 5)], [items(flipped[:50], 5)], margin=0.001)
    assert few.lossiness.n == 10 and few.margin == 0.001
    # a small loss that is not significant is no proof of equality
    noisy = quality.lossiness(R10, [ranks(rng, 0.6, images=60)], [ranks(rng, 0.6, images=60)])
    assert noisy.lossiness.low < 0 < noisy.lossiness.high and noisy.equivalent is False


def test_one_or_two_trainings_allow_no_claim():
    base = [ranks(np.random.default_rng(seed), 0.6) for seed in range(3)]
    same = [Items(each.values.copy(), each.group) for each in base]
    claims = [quality.lossiness(R10, base[:k], same[:k], trained=True).equivalent for k in (1, 2, 3)]
    assert claims == [None, None, True]
    assert quality.lossiness(R10, base[:1], same[:1]).equivalent is True  # the very weights: no training noise


def test_too_few_images_give_no_interval_and_say_so():
    got = quality.lossiness(R10, [items([1.0] * 4)], [items([20.0] * 4)])
    assert (got.low, got.lossiness, got.equivalent) == (None, None, None) and got.note == (
        "n/a (too few images: 4, at least 6)"
    )


def test_a_metric_without_a_direction_or_beyond_its_ceiling_is_refused():
    one = [items([1.0] * 10)]
    with pytest.raises(InvalidError, match="no direction"):
        quality.lossiness(Metric("bleu", "x", lambda x: x, None, None, None), one, one)
    with pytest.raises(InvalidError, match="chance of nan"):
        quality.lossiness(Metric("bleu", "x", lambda x: x, True, math.nan, None), one, one)
    for direction, ceiling in ((True, 0.5), (False, 2.0)):
        with pytest.raises(InvalidError, match="better than its ceiling"):
            quality.lossiness(Metric("bleu", "x", lambda x: x, direction, None, ceiling), one, one)


def test_the_course_reports_minus_704_cannot_be_printed():
    loss = Metric("loss", "loss", lambda x: x, False, chance=math.log(2), ceiling=0.0, unit="nats")
    rng = np.random.default_rng(0)
    small, large = (items(value * rng.lognormal(0, 0.1, 1000)) for value in (0.0007, 0.505))
    assert 0.99 < quality.lossiness(loss, [small], [large]).lossiness.value < 1
    back = quality.lossiness(loss, [large], [small])
    assert back.lossiness is None and "too weak to compare with" in back.note


def test_whatever_goes_in_a_lossiness_is_refused_with_its_reason_or_within_its_bounds():
    rng = np.random.default_rng(7)
    kinds = {"value": 0, "n/a": 0}
    for _ in range(800):
        n, up = int(rng.integers(1, 60)), bool(rng.random() < 0.5)
        sides, order = [], rng.integers(-8, 9)
        for _ in range(2):
            spread, scale = rng.choice([0, 0.3, 3]), 10.0 ** (order + rng.choice([0, 0, 1, 4]))
            sides.append(scale * rng.lognormal(0, spread, n) * (rng.random(n) < rng.choice([0.01, 0.5, 1])))
            sides[-1] *= rng.choice([1, 1, 1, -1], n if rng.random() < 0.2 else 1)
        chance = None if rng.random() < 0.5 else float(rng.choice([0, 1, sides[0].mean()]))
        metric = Metric("m", "m", lambda x: x, up, chance, None, str(rng.choice(["mean", "median"])))
        got = quality.lossiness(metric, [items(sides[0])], [items(sides[1])], resamples=200)
        if got.lossiness is None:
            assert got.note.startswith("n/a (") and got.equivalent is None
        else:
            loss = got.lossiness
            assert 1 - quality.MOST <= loss.value <= 1 and 1 - quality.MOST <= loss.low <= loss.high <= 1
        kinds["n/a" if got.lossiness is None else "value"] += 1
    assert min(kinds.values()) > 40


def test_agreement_is_a_mean_over_images_and_seeds():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(200), 5)
    items_of = [Items((rng.random(1000) < p).astype(np.float32), group) for p in (0.8, 0.9)]
    got = quality.agreement(items_of)
    assert got.value == pytest.approx(np.mean([each.values for each in items_of]))
    assert got.low < got.value < got.high < 1 and got.n == 200
    whole = quality.agreement([Items(np.ones(50), np.arange(50))])
    assert (whole.low, whole.value, whole.high) == (1, 1, 1)
    for wrong in ([], [Items(np.array([1.2]), np.array([0]))], [Items(np.array([np.nan]), np.array([0]))]):
        with pytest.raises(InvalidError):
            quality.agreement(wrong)
