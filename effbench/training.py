"""Training in lockstep: readable top to bottom."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effbench import randomness
from effbench.arms import trained_state
from effbench.economics import look_steps
from effbench.engine import engine
from effbench.errors import EffbenchError
from effbench.lockstep import Arm, Batch, Partial, Save, Setting, columns, inputs, kept_state, restore, steps
from effbench.passes import evaluate
from effbench.task import Metric, Task


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the training images in an epoch; it depends on nothing but the seed and the epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def schedule(done: float, warmup: float) -> float:
    """One-cycle learning rate as a share of its peak: linear rise, cosine fall. `done` is in [0, 1]."""
    if done < warmup:
        return max(done / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def train(
    arms: list[Arm], seed: int, setting: Setting, sizes: dict[str, int], partial: Partial | None, save: Save
) -> Partial:
    """Train all arms on the same batches; the weights that are best on dev are kept.

    Returns:
        by arm under "arms": "state" (what training changed), "losses" (one per epoch) and "dev" (primary metric, as
        many per epoch as the protocol says).
    """
    task, prepared, protocol = setting.task, setting.prepared, setting.protocol
    size = min(protocol.batch_size, sizes["train"])
    per_epoch = sizes["train"] // size
    total = protocol.epochs * per_epoch
    looks = set(look_steps(protocol.epochs, per_epoch, protocol.dev_checks))
    metric = task.primary_metric(prepared, "dev")
    kept: dict[str, dict[str, Any]] = {arm.name: dict(sum=0.0, losses=[], dev=[], state={}) for arm in arms}
    if partial:
        restore(arms, partial)
        for arm in arms:  # before the engines take the weights over
            stored = partial["arms"][arm.name]
            arm.model.load_state_dict(stored["now"], strict=False)
            kept[arm.name] = {key: stored[key] for key in ("sum", "losses", "dev", "state")}
    engines = {arm.name: engine(arm.model, protocol) for arm in arms}
    if partial:
        for name, updates in engines.items():
            updates.load_state_dict(partial["arms"][name]["optimiser"])
    start = partial["index"] + 1 if partial else 0

    def fetch(index: int) -> Batch:
        epoch, place = divmod(index, per_epoch)
        rows = order(seed, epoch, sizes["train"])[place * size : (place + 1) * size]
        pixels = any(not arm.features for arm in arms)
        batch = task.batch(prepared, "train", rows, np.random.default_rng([seed, epoch, place]), pixels)
        return batch | dict(index=torch.from_numpy(rows))

    def work(arm: Arm, batch: Batch, index: int) -> dict[str, float]:
        updates = engines[arm.name]
        if protocol.schedule == "one-cycle":
            updates.set_lr(protocol.lr * schedule(index / total, protocol.warmup))
        for call in arm.each_step:
            call(index / total)
        with protocol.autocast():
            loss = updates.loss(functools.partial(_loss, task, arm), inputs(arm, "train", batch))
        arm.split.enter("backward")
        updates.backward(loss)
        arm.split.leave()
        arm.split.enter("optimiser")
        updates.step()
        arm.split.leave()
        value = updates.value(loss)
        if not math.isfinite(value):
            raise EffbenchError(f"the training loss is {value} at step {index + 1} of {total}", "try a lower --lr")
        return dict(loss=value)

    def state(index: int) -> Partial:
        now = {}
        for arm in arms:
            updates = engines[arm.name]
            with updates.whole():
                now[arm.name] = dict(kept[arm.name], now=trained_state(arm.model), optimiser=updates.state_dict())
        return dict(index=index, arms=now, **kept_state(arms))

    def check_on_dev() -> None:
        for arm in arms:
            if arm.error:
                continue
            mine = kept[arm.name]
            with engines[arm.name].whole(), randomness.swapped(arm):
                value = reduce(metric, evaluate(arm, "dev", setting, sizes)[metric.items].values)
            mine["dev"].append(value)
            best = max if metric.higher_is_better else min
            if mine["dev"].index(best(mine["dev"])) == len(mine["dev"]) - 1:
                with engines[arm.name].whole():  # anew: the forward passes of ZeRO-3 let go of the weights
                    mine["state"] = trained_state(arm.model)

    setting.live.stage(f"training, seed {seed}, epochs x steps = {protocol.epochs} x {per_epoch}", total, start=start)
    training_mode(arms)
    for index, results in steps(arms, "train", seed, range(start, total), fetch, work, setting):
        for name, result in results.items():
            kept[name]["sum"] += result["loss"]
        if (index + 1) % per_epoch == 0:
            for mine in (kept[arm.name] for arm in arms if not arm.error):
                mine["losses"].append(mine["sum"] / per_epoch)
                mine["sum"] = 0.0
        if index + 1 in looks:
            begin = setting.clock.now()
            check_on_dev()
            training_mode(arms)
            setting.seconds["other"] += setting.clock.now() - begin
        setting.live.advance(index + 1, columns(arms, setting, kept, metric.name))
        save(functools.partial(state, index))
    return dict(arms=kept, **kept_state(arms))


def _loss(task: Task, arm: Arm, model: nn.Module, batch: Batch) -> Tensor:
    """The task's loss and what the arm's methods add to it."""
    return sum((term() for term in arm.losses), task.loss(model, batch))


def training_mode(arms: list[Arm]) -> None:
    """Train mode, but for frozen modules: they stay in eval mode, but for what is trained inside them."""
    for arm in arms:
        arm.model.train()
        for parts, mode in ((arm.frozen, False), (arm.trained, True)):
            for part in parts:
                if isinstance(part, nn.Module):
                    part.train(mode)


def reduce(metric: Metric, values: np.ndarray) -> float:
    """A metric's value from per-item scores."""
    if metric.combine is not None:
        return float(metric.combine(metric.value(values).mean(axis=0)))
    return float({"mean": np.mean, "median": np.median}[metric.reduce](metric.value(values)))
