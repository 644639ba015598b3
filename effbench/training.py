"""Training in lockstep: readable top to bottom."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from effbench import randomness
from effbench.arms import trained_state
from effbench.errors import EffbenchError
from effbench.lockstep import Arm, Batch, Partial, Save, Setting, columns, inputs, kept_state, restore, steps
from effbench.passes import evaluate
from effbench.records import Protocol
from effbench.task import Metric


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the training images in an epoch; it depends on nothing but the seed and the epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def schedule(done: float, warmup: float) -> float:
    """One-cycle learning rate as a share of its peak: linear rise, cosine fall. `done` is in [0, 1]."""
    if done < warmup:
        return max(done / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def optimiser(model: nn.Module, protocol: Protocol) -> torch.optim.Optimizer:
    """AdamW on what is trained; vectors and scalars are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in trained if p.ndim > 1], weight_decay=protocol.weight_decay),
        dict(params=[p for p in trained if p.ndim <= 1], weight_decay=0.0),
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=protocol.lr, fused=True)


def train(
    arms: list[Arm], seed: int, setting: Setting, sizes: dict[str, int], partial: Partial | None, save: Save
) -> Partial:
    """Train all arms on the same batches; the epoch that is best on dev is kept.

    Returns:
        by arm under "arms": "state" (what training changed), "losses" and "dev" (primary metric), one per epoch.
    """
    task, prepared, protocol = setting.task, setting.prepared, setting.protocol
    size = min(protocol.batch_size, sizes["train"])
    per_epoch = sizes["train"] // size
    total = protocol.epochs * per_epoch
    metric = task.primary_metric(prepared, "dev")
    optimisers = {arm.name: optimiser(arm.model, protocol) for arm in arms}
    kept: dict[str, dict[str, Any]] = {arm.name: dict(sum=0.0, losses=[], dev=[], state={}) for arm in arms}
    if partial:
        restore(arms, partial)
        for arm in arms:
            stored = partial["arms"][arm.name]
            arm.model.load_state_dict(stored["now"], strict=False)
            optimisers[arm.name].load_state_dict(stored["optimiser"])
            kept[arm.name] = {key: stored[key] for key in ("sum", "losses", "dev", "state")}
    start = partial["index"] + 1 if partial else 0

    def fetch(index: int) -> Batch:
        epoch, place = divmod(index, per_epoch)
        rows = order(seed, epoch, sizes["train"])[place * size : (place + 1) * size]
        pixels = any(not arm.features for arm in arms)
        batch = task.batch(prepared, "train", rows, np.random.default_rng([seed, epoch, place]), pixels)
        return batch | dict(index=torch.from_numpy(rows))

    def work(arm: Arm, batch: Batch, index: int) -> dict[str, float]:
        optimizer = optimisers[arm.name]
        for group in optimizer.param_groups:
            group["lr"] = protocol.lr * schedule(index / total, protocol.warmup)
        loss = task.loss(arm.model, inputs(arm, "train", batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise EffbenchError(f"the training loss is {value} at step {index + 1} of {total}", "try a lower --lr")
        return dict(loss=value)

    def state(index: int) -> Partial:
        now = {
            arm.name: dict(kept[arm.name], now=trained_state(arm.model), optimiser=optimisers[arm.name].state_dict())
            for arm in arms
        }
        return dict(index=index, arms=now, **kept_state(arms))

    def end_of_epoch() -> None:
        for arm in arms:
            if arm.error:
                continue
            mine = kept[arm.name]
            mine["losses"].append(mine["sum"] / per_epoch)
            mine["sum"] = 0.0
            with randomness.swapped(arm):
                value = reduce(metric, evaluate(arm, "dev", setting, sizes)[metric.items].values)
            mine["dev"].append(value)
            best = max if metric.higher_is_better else min
            if mine["dev"].index(best(mine["dev"])) == len(mine["dev"]) - 1:
                mine["state"] = trained_state(arm.model)

    setting.live.stage(f"training, seed {seed}, epochs x steps = {protocol.epochs} x {per_epoch}", total, start=start)
    training_mode(arms)
    for index, results in steps(arms, "train", seed, range(start, total), fetch, work, setting):
        for name, result in results.items():
            kept[name]["sum"] += result["loss"]
        if (index + 1) % per_epoch == 0:
            begin = setting.clock.now()
            end_of_epoch()
            training_mode(arms)
            setting.seconds["other"] += setting.clock.now() - begin
        setting.live.advance(index + 1, columns(arms, setting, kept, metric.name))
        save(functools.partial(state, index))
    return dict(arms=kept, **kept_state(arms))


def training_mode(arms: list[Arm]) -> None:
    """Train mode, but for frozen modules: they stay in eval mode, but for what is trained inside them."""
    for arm in arms:
        arm.model.train()
        for modules, mode in ((arm.frozen, False), (arm.trained, True)):
            for module in modules:
                module.train(mode)


def reduce(metric: Metric, values: np.ndarray) -> float:
    """A metric's value from per-item scores."""
    return float({"mean": np.mean, "median": np.median}[metric.reduce](metric.value(values)))
