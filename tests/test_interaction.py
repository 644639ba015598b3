import numpy as np
import pandas as pd
import pytest

from effbench.interaction import interaction
from effbench.quality import lossiness
from effbench.task import Items, Metric
from effbench.timing import WARMUP

R10 = Metric("t2i_r10", "t2i_rank", lambda rank: 100.0 * (rank <= 10), True, chance=1.0, ceiling=100.0)
PARTS = ("a", "b")


def timed(steps):
    """Rows of a timing pass of 30 pairs at batch 16, from seconds by arm; the warm-up takes a hundred times as long."""
    return pd.DataFrame(
        dict(arm=arm, phase="timing 16", index=i, seconds=own * (100 if i < WARMUP else 1))
        for arm, seconds in steps.items()
        for i, own in enumerate(np.broadcast_to(seconds, 33))
    )


def scored(hits, images=300):
    """Per-item scores of arms that get a share of the images right."""
    draw, group = np.random.default_rng(0).random((len(hits), images)), np.arange(images)
    pairs = zip(draw, hits.items(), strict=True)
    return {arm: [Items(np.where(own < hit, 1.0, 99.0), group)] for own, (arm, hit) in pairs}


ITEMS = scored({"baseline": 0.8, "a+b": 0.5, "a": 0.7, "b": 0.7})
LOSSES = {arm: lossiness(R10, ITEMS["baseline"], own).lossiness for arm, own in ITEMS.items() if arm != "baseline"}


def found(steps, items=ITEMS, losses=LOSSES, parts=PARTS):
    return interaction(timed(steps), "a+b", parts, 16, R10, items, losses)


def test_parts_that_multiply_interact_by_one_whatever_the_machine_does():
    drift = np.linspace(1, 3, 33)
    got = found({"baseline": 6 * drift, "a": 3 * drift, "b": 2 * drift, "a+b": drift})
    assert got.parts == PARTS and got.speedup.n == 30
    assert got.speedup.value == got.speedup.low == got.speedup.high == pytest.approx(1)


def test_parts_of_different_towers_come_out_above_one():
    # 8 s of images and 2 s of text; a halves the first, b the second
    got = found({"baseline": 10, "a": 6, "b": 9, "a+b": 5})
    assert got.speedup.value == pytest.approx((10 / 5) / ((10 / 6) * (10 / 9)))


def test_the_interval_is_that_of_the_paired_ratios():
    noise = np.random.default_rng(0).lognormal(0, 0.1, (4, 33))
    steps = dict(zip(("baseline", "a", "b", "a+b"), noise * [[4], [2], [2], [1.5]], strict=True))
    ratios = np.sort((steps["a"] * steps["b"] / (steps["baseline"] * steps["a+b"]))[WARMUP:])
    got = found(steps).speedup
    assert (got.value, got.low, got.high) == pytest.approx((np.median(ratios), ratios[9], ratios[20]))


def test_quality_is_the_ratio_of_what_is_kept():
    got = found({"baseline": 4, "a": 2, "b": 2, "a+b": 1}).quality
    kept = {arm: 1 - loss.value for arm, loss in LOSSES.items()}
    assert got.value == pytest.approx(kept["a+b"] / (kept["a"] * kept["b"]))
    assert got.low < got.value < got.high and got.n == 300


@pytest.mark.parametrize(
    "change",
    [
        dict(losses=LOSSES | {"b": None}),
        dict(items=ITEMS | {"b": [Items(np.full(300, 99.0), np.arange(300))]}),  # a part that gets nothing right
    ],
)
def test_no_quality_where_a_lossiness_is_not_defined(change):
    got = found({"baseline": 4, "a": 2, "b": 2, "a+b": 1}, **change)
    assert got.quality is None and got.speedup.value == 1


def test_nothing_where_a_part_failed_or_was_not_timed():
    steps = {"baseline": 4, "a": 2, "b": 2, "a+b": 1}
    assert found(steps, items={arm: own for arm, own in ITEMS.items() if arm != "b"}) is None
    assert found({arm: own for arm, own in steps.items() if arm != "b"}) is None
    assert found(steps, parts=("a", "unheard of")) is None
