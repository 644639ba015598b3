"""The passes that train nothing: features of a frozen tower, quality on the test split, timed pairs."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effbench import randomness
from effbench.lockstep import (
    Arm,
    Batch,
    Partial,
    Save,
    Setting,
    blocks,
    columns,
    inputs,
    joined,
    kept_state,
    restore,
    steps,
)
from effbench.measure.clock import Clock
from effbench.task import Items

WARMUP = 3  # turns of the timing pass that do not count


def features(arms: list[Arm], setting: Setting, sizes: dict[str, int], partial: Partial | None, save: Save) -> Partial:
    """The pass through the frozen tower, once per arm: fills `arm.features` for the training and dev images."""
    task, prepared = setting.task, setting.prepared
    plan = [b for split in ("train", "dev") for b in blocks(split, sizes[split], setting.protocol.eval_batch)]
    done: dict[str, list[Tensor]] = {arm.name: [] for arm in arms}
    if partial:
        done = {name: [stored] for name, stored in partial["features"].items()}
        restore(arms, partial)
    start = partial["index"] + 1 if partial else 0

    def fetch(index: int) -> Batch:
        return task.batch(prepared, *plan[index], None)

    def work(arm: Arm, batch: Batch, _: int) -> None:
        with torch.no_grad():
            done[arm.name].append(task.frozen_features(arm.model, batch["image"]).cpu())

    def state(index: int) -> Partial:
        return dict(
            index=index, features={name: torch.cat(parts) for name, parts in done.items() if parts}, **kept_state(arms)
        )

    for arm in arms:
        arm.model.eval()
    setting.live.stage("feature pass of the frozen tower", len(plan), start=start)
    for index, _ in steps(arms, "features", 0, range(start, len(plan)), fetch, work, setting):
        setting.live.advance(index + 1, columns(arms, setting))
        save(functools.partial(state, index))
    return state(len(plan) - 1)


def use_features(arms: list[Arm], result: Partial, sizes: dict[str, int]) -> None:
    """Hand the result of `features` to the arms."""
    restore(arms, result)
    for arm in arms:
        if not arm.error:
            train, dev = result["features"][arm.name].split([sizes["train"], sizes["dev"]])
            arm.features = dict(train=train, dev=dev)


def evaluate(arm: Arm, split: str, setting: Setting, sizes: dict[str, int]) -> dict[str, Items]:
    """Per-item scores of an arm on a split, untimed; from its features where it has them."""
    task, prepared = setting.task, setting.prepared
    arm.model.eval()
    parts = []
    with torch.no_grad():
        for _, rows in blocks(split, sizes[split], setting.protocol.eval_batch):
            batch = task.batch(prepared, split, rows, None, pixels=not arm.features) | dict(
                index=torch.from_numpy(rows)
            )
            parts.append(task.predict(arm.model, inputs(arm, split, setting.to_device(batch))))
    return task.score(prepared, split, joined(parts))


def test(
    arms: list[Arm], seed: int, setting: Setting, sizes: dict[str, int], partial: Partial | None, save: Save
) -> Partial:
    """The quality pass: every arm predicts the whole test split.

    Returns:
        by arm under "items": by score, "values" and "group" tensors (see `effbench.task.Items`).
    """
    task, prepared = setting.task, setting.prepared
    plan = blocks("test", sizes["test"], setting.protocol.eval_batch)
    done: dict[str, list[Batch]] = {arm.name: [] for arm in arms}
    if partial:
        done = {name: [stored] if stored else [] for name, stored in partial["outputs"].items()}
        restore(arms, partial)

    def fetch(index: int) -> Batch:
        return task.batch(prepared, *plan[index], None)

    def work(arm: Arm, batch: Batch, _: int) -> None:
        with torch.inference_mode():
            done[arm.name].append({key: value.cpu() for key, value in task.predict(arm.model, batch).items()})

    def state(index: int) -> Partial:
        return dict(index=index, outputs={name: joined(parts) for name, parts in done.items()}, **kept_state(arms))

    start = partial["index"] + 1 if partial else 0
    setting.live.stage(f"quality on the test split, seed {seed}", len(plan), start=start)
    for index, _ in steps(arms, "quality", seed, range(start, len(plan)), fetch, work, setting):
        setting.live.advance(index + 1, columns(arms, setting))
        save(functools.partial(state, index))
    items = {}
    for arm in arms:
        if not arm.error:
            scores = task.score(prepared, "test", joined(done[arm.name]))
            items[arm.name] = {
                name: dict(values=torch.as_tensor(s.values), group=torch.as_tensor(s.group))
                for name, s in scores.items()
            }
    return dict(items=items, **kept_state(arms))


def pairs(arms: list[Arm], setting: Setting, sizes: dict[str, int], partial: Partial | None, save: Save) -> Partial:
    """The timing pass: small batches of test images with one caption each; the first WARMUP turns do not count."""
    task, prepared, protocol = setting.task, setting.prepared, setting.protocol
    total = protocol.timing_pairs + WARMUP if protocol.timing_pairs else 0
    size = min(protocol.timing_batch, sizes["test"])
    for arm in arms:  # whatever was drawn before, in this process or in one that was killed
        arm.random = randomness.seeded(protocol.seeds[0])
    if partial:
        restore(arms, partial)
    stopwatches = {arm.name: Stopwatch(task.parts(arm.model), setting.clock) for arm in arms if not arm.error}

    def fetch(index: int) -> Batch:
        rng = np.random.default_rng([protocol.seeds[0], index])
        return task.batch(prepared, "test", rng.choice(sizes["test"], size, replace=False), rng)

    def work(arm: Arm, batch: Batch, _: int) -> dict[str, float]:
        with torch.inference_mode(), stopwatches[arm.name] as seconds:
            task.predict(arm.model, batch)
        return {"image_seconds": seconds["image"]} if "image" in seconds else {}

    start = partial["index"] + 1 if partial else 0
    setting.live.stage(f"timing, {size} images a step", total, start=start)
    for index, _ in steps(arms, "timing", protocol.seeds[0], range(start, total), fetch, work, setting):
        setting.live.advance(index + 1, columns(arms, setting))
        save(lambda index=index: dict(index=index, **kept_state(arms)))
    return kept_state(arms)


class Stopwatch:
    """Seconds that parts of a model take within a step; hooks are in place only inside the context."""

    def __init__(self, parts: dict[str, nn.Module], clock: Clock) -> None:
        self.parts = parts
        self.clock = clock

    def __enter__(self) -> dict[str, float]:
        self.seconds: dict[str, float] = {}
        started: dict[str, float] = {}
        self.handles = []
        for name, module in self.parts.items():

            def begin(*_: Any, name: str = name) -> None:
                started[name] = self.clock.now()

            def end(*_: Any, name: str = name) -> None:
                self.seconds[name] = self.seconds.get(name, 0.0) + self.clock.now() - started[name]

            self.handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        return self.seconds

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
