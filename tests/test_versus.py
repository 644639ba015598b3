import numpy as np
import pytest

from effbench.errors import InvalidError
from effbench.task import Items, Metric
from effbench.versus import against, bracket, versus

R10 = Metric("t2i_r10", "t2i_rank", lambda rank: 100.0 * (rank <= 10), True, chance=1.0, ceiling=100.0)
LOSS = Metric("loss", "loss", lambda x: x, False, chance=None, ceiling=0.0, unit="nats")


def ranks(hit, seed=0, images=200, per_group=5):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(images * per_group) < hit, 1.0, 50.0)
    return Items(values, np.repeat(np.arange(images), per_group))


@pytest.mark.parametrize("hit, verdict", [(0.4, "BETTER"), (0.6, "NO DIFFERENCE SHOWN"), (0.8, "WORSE")])
def test_the_verdict_is_that_of_the_interval(hit, verdict):
    arm, control = ranks(0.6), ranks(hit, seed=1)
    got = versus(R10, [arm], "random", {"blind": [control]})
    difference = R10.value(arm.values).mean() - R10.value(control.values).mean()
    assert got.advantage.value == pytest.approx(difference) and got.value == R10.value(control.values).mean()
    assert got.verdict == verdict and got.advantage.low < difference < got.advantage.high
    assert (got.control, got.arms, got.share, got.advantage.n) == ("random", ("blind",), 1.0, 200)


def test_the_same_images_are_drawn_for_both():
    arm = ranks(0.6)
    better = Items(np.where(np.arange(1000) % 5 == 0, 1.0, arm.values), arm.group)
    got = versus(R10, [better], "random", {"blind": [arm]})
    assert got.verdict == "BETTER" and got.advantage.high - got.advantage.low < 4  # unpaired: about 8.6
    same = versus(R10, [arm], "random", {"blind": [Items(arm.values.copy(), arm.group)]})
    assert (same.advantage.low, same.advantage.high, same.verdict) == (0, 0, "NO DIFFERENCE SHOWN")


def test_between_two_arms_the_control_is_interpolated_in_every_resample():
    arm, low, high = ranks(0.6), ranks(0.5, seed=1), ranks(0.7, seed=2)
    got = versus(R10, [arm], "resize", {"small": [low], "large": [high]}, share=0.25)
    assert got.value == pytest.approx(0.75 * R10.value(low.values).mean() + 0.25 * R10.value(high.values).mean())
    assert (got.arms, got.share) == (("small", "large"), 0.25)
    # of an arm that is the very same mixture nothing is left
    mixed = Items(0.75 * low.values + 0.25 * high.values, arm.group)
    nothing = versus(LOSS, [mixed], "resize", {"small": [low], "large": [high]}, share=0.25).advantage
    assert max(abs(nothing.low), abs(nothing.value), abs(nothing.high)) < 1e-9


def test_where_lower_is_better_a_positive_advantage_is_still_the_better_arm():
    got = versus(LOSS, [ranks(0.9)], "random", {"blind": [ranks(0.2)]})
    assert got.verdict == "BETTER" and got.advantage.value > 0


def test_few_seeds_of_trained_arms_and_few_images_allow_no_claim():
    arms, blind = [ranks(0.8, seed) for seed in range(3)], [ranks(0.3, seed) for seed in range(3)]
    claims = [versus(R10, arms[:k], "random", {"x": blind[:k]}, trained=True).verdict for k in (1, 2, 3)]
    assert claims == ["NO DIFFERENCE SHOWN", "NO DIFFERENCE SHOWN", "BETTER"]
    few = versus(R10, [ranks(1.0, images=5)], "random", {"x": [ranks(0.0, images=5)]})
    assert (few.advantage.value, few.advantage.low, few.verdict) == (100, None, "NO DIFFERENCE SHOWN")


def test_unpaired_sides_are_refused():
    with pytest.raises(InvalidError, match="same seeds"):
        versus(R10, [ranks(0.5)], "random", {"x": [ranks(0.5), ranks(0.5)]})
    with pytest.raises(InvalidError, match="different images"):
        versus(R10, [ranks(0.5)], "resize", {"x": [ranks(0.5)], "y": [ranks(0.5, images=10)]})


LADDER = [("large", 4.0), ("small", 1.0), ("middle", 2.0)]


@pytest.mark.parametrize(
    "work, names, share",
    [
        (1.5, ("small", "middle"), 0.5),
        (3.5, ("middle", "large"), 0.75),
        (2.0, ("middle",), 1),
        (0.5, ("small",), 1),
        (1.0, ("small",), 1),
        (9.0, ("large",), 1),
    ],
)
def test_bracket(work, names, share):
    assert bracket(work, LADDER) == (names, share)


def test_against_every_control_that_did_not_fail():
    items = {name: [ranks(0.5, seed)] for seed, name in enumerate(("arm", "a", "b", "small", "large"))}
    controls = {"random": ["a", "b", "failed"], "grid": ["failed"], "resize": ["small", "failed", "large"]}
    got = against(R10, "arm", controls, items, {"arm": 3, "small": 2, "large": 6, "failed": 4})
    assert [(each.control, each.arms) for each in got] == [
        ("random", ("a",)), ("random", ("b",)), ("resize", ("small", "large")),
    ]  # fmt: skip
    assert got[2].share == 0.25
