"""What training costs and what it brings: time and FLOPs to a quality, and the queries after which they are paid back.

Pure functions of records and raw samples; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from effbench.records import Arm, Economics, Flops, Protocol, Speedup

if TYPE_CHECKING:
    import pandas

    from effbench.task import Metric

TARGET = 0.95  # share of the baseline's best quality on dev; the last per cent would be a matter of luck


def economics(
    arm: Arm, baseline: Arm, rows: pandas.DataFrame, protocol: Protocol, images: dict[str, int], metric: Metric
) -> Economics | None:
    """What an arm's own training cost; None where it trained nothing of its own.

    Seconds are those of the arm's own work: its choices before training, one whole feature pass where it makes one
    (each seed would need its own), its training steps. Waiting for data is none of it, looks at dev are none of it.

    Args:
        arm, baseline: with `dev`, `train_flops`, `by_batch` and `test_speedup` as far as there are any.
        rows: steps of the experiment (see `effbench.samples`).
        images: by split.
        metric: the primary one, on the dev split.
    """
    if not arm.dev or not baseline.dev:
        return None
    pairs = min(protocol.batch_size, images["train"])
    per_epoch = images["train"] // pairs
    at = look_steps(protocol.epochs, per_epoch, protocol.dev_checks)
    whole = protocol.epochs * per_epoch
    goal = target([best(dev, metric) for dev in baseline.dev.values()], metric)
    steps = {seed: None if goal is None else steps_to(goal, dev, at, metric) for seed, dev in arm.dev.items()}
    reached = {seed: count for seed, count in steps.items() if count is not None}
    seen = images["train"] + images["dev"]

    def flops(counts: Sequence[int]) -> float | None:
        step = arm.train_flops
        return step and fmean(training_flops(step, pairs, count, protocol.epochs, seen) for count in counts)

    tuning = fmean(seconds(rows, arm.name, int(seed), whole) for seed in arm.dev)
    saved = saved_per_query(arm, baseline, min(protocol.timing_batch, images["test"]))
    why = "" if arm.kind == "baseline" else no_break_even(saved, arm.test_speedup)
    notes = ["no target: the baseline's quality on dev is no better than chance"] * (goal is None) + [
        f"no break-even: {why}"
    ] * bool(why)
    every = len(reached) == len(steps)
    return Economics(
        metric=metric.name,
        share=TARGET,
        target=goal,
        best_dev=fmean(best(dev, metric) for dev in arm.dev.values()),
        seeds=len(steps),
        reached=len(reached),
        seconds_to_target=fmean(seconds(rows, arm.name, int(s), n) for s, n in reached.items()) if every else None,
        flops_to_target=flops([*reached.values()]) if every else None,
        tuning_seconds=tuning,
        tuning_flops=flops([whole]),
        saved_per_query=saved,
        break_even=tuning / saved if saved and arm.kind != "baseline" and not why else None,
        note="; ".join(notes),
    )


def look_steps(epochs: int, per_epoch: int, checks: int) -> tuple[int, ...]:
    """Training steps done at each look at the dev split, as `training.train` takes them: `checks` per epoch."""
    within = [done for done in range(1, per_epoch + 1) if done * checks // per_epoch > (done - 1) * checks // per_epoch]
    return tuple(epoch * per_epoch + done for epoch in range(epochs) for done in within)


def best(dev: Sequence[float], metric: Metric) -> float:
    """The best of the values that were seen."""
    return max(dev) if metric.higher_is_better else min(dev)


def target(bests: Sequence[float], metric: Metric) -> float | None:
    """The quality to reach: TARGET of the mean of the baseline's best values, turned round where lower is better.

    None where it would not be better than chance, or where the values are not positive: a share of them means nothing.
    """
    mean = fmean(bests)
    goal = mean * TARGET if metric.higher_is_better else mean / TARGET
    if goal <= 0 or (metric.chance is not None and at_least(metric.chance, goal, metric)):
        return None
    return goal


def at_least(value: float, goal: float, metric: Metric) -> bool:
    """Whether a value is as good as the goal or better."""
    return value >= goal if metric.higher_is_better else value <= goal


def steps_to(goal: float, dev: Sequence[float], at: Sequence[int], metric: Metric) -> int | None:
    """Steps up to the first look at which the goal is reached; None where it never is.

    Args:
        dev: the metric at each look. at: steps done at each look.
    """
    return next((done for value, done in zip(dev, at, strict=True) if at_least(value, goal, metric)), None)


def seconds(rows: pandas.DataFrame, arm: str, seed: int, steps: int) -> float:
    """Seconds that an arm trained under a seed for some steps: its choices, the whole feature pass, the steps."""
    own = rows[rows["arm"] == arm]
    mine = own["seed"] == seed
    settling = (own["phase"] == "settle") & mine
    training = (own["phase"] == "train") & mine & (own["index"] < steps)
    return float(own.loc[settling | training | (own["phase"] == "features"), "seconds"].sum())


def training_flops(step: Flops, pairs: int, steps: int, epochs: int, images: int) -> float:
    """FLOPs of some training steps, forward and backward, and of the whole feature pass that comes before them.

    `step` spreads that pass over the epochs; it is taken out of it and counted once, over the images that it passes.
    What a method computes to make a choice before training is not counted, nor are looks at dev. A step whose work
    follows a schedule counts as `step` has it all along.

    Args:
        step: of one step, per pair. pairs: per step. steps: how many. epochs: of the whole training.
        images: of the feature pass.
    """
    return step.once * images + (step.work - step.once / epochs) * pairs * steps


def saved_per_query(arm: Arm, baseline: Arm, batch: int) -> float | None:
    """Seconds that a test step saves per image-caption pair; None for the baseline, and where nothing was timed."""
    taken = [next((t.seconds for t in each.by_batch if t.batch == batch), None) for each in (baseline, arm)]
    if None in taken or arm.kind == "baseline":
        return None
    return (taken[0] - taken[1]) / batch


def no_break_even(saved: float | None, speedup: Speedup | None) -> str:
    """Why no number of queries pays the training back; empty where one does."""
    if saved is None or speedup is None:
        return "not timed"
    if speedup.verdict != "FASTER":
        return f"the test speed-up is {speedup.verdict}"
    return "" if saved > 0 else "a test step saves nothing on average"
