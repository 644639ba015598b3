"""What training costs and when it pays back: exact numbers from rows made by hand."""

from dataclasses import replace

import pandas as pd
import pytest

from effbench import economics as eco
from effbench import records, speeds
from effbench.records import Arm, Flops, Protocol, Speedup, Timing
from effbench.task import Metric

RECALL = Metric("r10", "rank", lambda values: values, True, chance=1.0, ceiling=100.0)
LOSS = replace(RECALL, name="loss", higher_is_better=False, chance=None, ceiling=None)
#: 40 images in batches of 10 (4 steps per epoch), 2 epochs, 2 looks per epoch: after steps 2, 4, 6 and 8
PROTOCOL = Protocol(epochs=2, batch_size=10, dev_checks=2, seeds=(0, 1), timing_batch=4)
IMAGES = dict(train=40, dev=8, test=20)
FASTER = Speedup(value=2.0, low=1.9, high=2.1, n=30, verdict="FASTER")


def row(arm, phase, index, seconds, seed=0):
    return dict(kind="step", arm=arm, phase=phase, index=index, seconds=seconds, seed=seed)


def steps(arm, seed, seconds):
    return [row(arm, "train", index, seconds, seed) for index in range(8)]


ROWS = pd.DataFrame(
    [
        *(row("baseline", "features", i, 3.0) for i in range(2)),
        *(row("prune", "features", i, 1.0) for i in range(2)),
        row("prune", "settle", 0, 5.0, seed=0),
        row("prune", "settle", 0, 7.0, seed=1),
        *(each for seed in (0, 1) for each in steps("baseline", seed, 1.0)),
        *steps("prune", 0, 0.5),
        *steps("prune", 1, 0.25),
        *(row("prune", "timing 4", i, 100.0) for i in range(8)),
    ]
)


def baseline(**changes):
    fields = dict(
        name="baseline",
        spec="",
        kind="baseline",
        dev={"0": (50.0, 77.0, 80.0, 79.0), "1": (60.0, 70.0, 75.0, 80.0)},
        train_flops=Flops(dense=1300, once=200),
        by_batch=(Timing(batch=1, seconds=9.0), Timing(batch=4, seconds=0.4)),
    )
    return Arm(**fields | changes)


def prune(**changes):
    fields = dict(
        name="prune",
        spec="prune",
        kind="method",
        dev={"0": (40.0, 60.0, 76.0, 70.0), "1": (76.0, 60.0, 60.0, 60.0)},
        train_flops=Flops(dense=600, overhead=50, once=100),
        by_batch=(Timing(batch=1, seconds=9.0), Timing(batch=4, seconds=0.2)),
        test_speedup=FASTER,
    )
    return Arm(**fields | changes)


def costs(arm, base=None, metric=RECALL):
    return eco.economics(arm, base or baseline(), ROWS, PROTOCOL, IMAGES, metric)


def test_time_and_flops_to_the_target_by_hand():
    found = costs(prune())
    assert found.target == pytest.approx(0.95 * 80) == 76.0 and found.share == 0.95
    assert (found.best_dev, found.seeds, found.reached) == (76.0, 2, 2)
    # seed 0: choices 5, features 2, six steps of 0.5; seed 1: 7, 2, two steps of 0.25
    assert found.seconds_to_target == pytest.approx(((5 + 2 + 6 * 0.5) + (7 + 2 + 2 * 0.25)) / 2)
    assert found.tuning_seconds == pytest.approx(((5 + 2 + 8 * 0.5) + (7 + 2 + 8 * 0.25)) / 2) == 11.0
    # 650 per pair hold 100 / 2 epochs of the pass, which is paid once, over 40 + 8 images, however few the steps
    assert found.flops_to_target == pytest.approx((2 * 100 * 48 + 600 * 10 * (6 + 2)) / 2)
    assert found.tuning_flops == pytest.approx(100 * 48 + 600 * 10 * 8)
    assert found.saved_per_query == pytest.approx((0.4 - 0.2) / 4)  # at the timing batch, not at batch 1
    assert found.break_even == pytest.approx(11.0 / 0.05) and found.note == ""


def test_the_baseline_has_costs_and_nothing_to_pay_back():
    found = costs(baseline())
    assert found.seconds_to_target == pytest.approx(((6 + 4 * 1.0) + (6 + 8 * 1.0)) / 2)  # 77 at look 2, 80 at look 4
    assert found.tuning_seconds == pytest.approx(14.0) and found.reached == 2
    assert found.saved_per_query is None and found.break_even is None and found.note == ""


def test_a_seed_that_never_gets_there():
    found = costs(prune(dev={"0": (40.0, 60.0, 76.0, 70.0), "1": (75.9, 75.0, 60.0, 60.0)}))
    assert (found.reached, found.seeds) == (1, 2)
    assert found.seconds_to_target is None and found.flops_to_target is None
    assert found.tuning_seconds == 11.0 and found.best_dev == pytest.approx((76.0 + 75.9) / 2)


def test_lower_is_better_is_turned_round():
    base = baseline(dev={"0": (4.0, 3.0, 2.0, 1.9), "1": (5.0, 4.0, 3.0, 1.9)})
    arm = prune(dev={"0": (4.0, 2.0, 2.5, 2.6), "1": (2.1, 2.1, 2.0, 1.8)})
    found = costs(arm, base, LOSS)
    assert found.target == pytest.approx(1.9 / 0.95) and found.best_dev == pytest.approx(1.9)
    assert found.seconds_to_target == pytest.approx(((5 + 2 + 4 * 0.5) + (7 + 2 + 6 * 0.25)) / 2)


@pytest.mark.parametrize(
    "dev, metric",
    [((1.0, 1.05, 1.0, 0.9), RECALL), ((0.0,) * 4, replace(RECALL, chance=None)), ((9.0, 9.8, 9.9, 9.9), LOSS)],
)
def test_no_target_where_the_baseline_learned_nothing(dev, metric):
    metric = metric if metric.higher_is_better else replace(metric, chance=9.4)
    found = costs(prune(), baseline(dev={"0": dev}), metric)
    assert (found.target, found.seconds_to_target, found.flops_to_target, found.reached) == (None, None, None, 0)
    assert "no better than chance" in found.note and found.break_even == pytest.approx(220)


@pytest.mark.parametrize("verdict", ["SLOWER", "NO DIFFERENCE", "AMBIGUOUS", "TOO FEW SAMPLES"])
def test_what_is_not_faster_never_pays_back(verdict):
    found = costs(prune(test_speedup=FASTER.model_copy(update=dict(verdict=verdict))))
    assert found.break_even is None and found.note == f"no break-even: the test speed-up is {verdict}"
    assert found.saved_per_query == pytest.approx(0.05)


def test_what_was_not_timed_and_what_costs_more():
    found = costs(prune(by_batch=(), test_speedup=None))
    assert (found.saved_per_query, found.break_even, found.note) == (None, None, "no break-even: not timed")
    found = costs(prune(by_batch=(Timing(batch=4, seconds=0.6),)))
    assert found.saved_per_query == pytest.approx(-0.05) and found.break_even is None and "saves nothing" in found.note


def test_an_arm_without_training_of_its_own_has_none():
    assert costs(prune(dev={})) is None


@pytest.mark.parametrize(
    "epochs, per_epoch, checks, found",
    [(2, 4, 1, (4, 8)), (2, 4, 2, (2, 4, 6, 8)), (1, 5, 2, (3, 5)), (1, 2, 3, (1, 2)), (0, 4, 1, ())],
)
def test_when_dev_is_looked_at(epochs, per_epoch, checks, found):
    assert eco.look_steps(epochs, per_epoch, checks) == found


def test_a_training_that_settles_says_so_and_counts_steps_alone():
    own = speeds.complete([r for r in ROWS.to_dict("records") if r["arm"] == "prune" and r["phase"] != "timing 4"])
    own["data_wait"] = 0.0
    found = speeds.split(own.sort_values("phase", key=lambda phase: phase != "settle"))
    assert found.settle == 12.0 and found.first_step == 1.0 and found.steps == 2 + 16
    assert found.compute == pytest.approx(12 + 2 + 8 * 0.75)


def test_a_record_keeps_them_and_bounds_what_it_reads():
    arm = prune(economics=costs(prune()))
    text = arm.model_dump_json()
    assert Arm.model_validate_json(text) == arm
    for wrong in ('"reached":-1', '"break_even":1e999', '"share":1.5', '"seconds_to_target":-2', '"more":1'):
        key = wrong.partition(":")[0]
        value = arm.economics.model_dump_json(exclude={key.strip('"')})
        with pytest.raises(ValueError):
            records.Economics.model_validate_json(value[:-1] + "," + wrong + "}")
