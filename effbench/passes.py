"""The passes that train nothing and time nothing apart: features of a frozen tower, quality on the test split."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

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
from effbench.task import Items


def features(arms: list[Arm], setting: Setting, sizes: dict[str, int], partial: Partial | None, save: Save) -> Partial:
    """The pass through the frozen tower, once per arm: fills `arm.features` for the training and dev images.

    An arm whose tower is that of an arm before it takes the first step alone; the others are the other's, seconds and
    all.
    """
    task, prepared = setting.task, setting.prepared
    plan = [b for split in ("train", "dev") for b in blocks(split, sizes[split], setting.protocol.eval_batch)]
    done: dict[str, list[Tensor]] = {arm.name: [] for arm in arms}
    twins: dict[str, str] = {}
    if partial:
        done = {name: [stored] for name, stored in partial["features"].items()}
        twins = partial["twins"]
        restore(arms, partial)
    start = partial["index"] + 1 if partial else 0

    def fetch(index: int) -> Batch:
        return task.batch(prepared, *plan[index], None)

    def work(arm: Arm, batch: Batch, _: int) -> None:
        with torch.no_grad(), setting.protocol.autocast():
            done[arm.name].append(task.frozen_features(arm.model, batch["image"]).cpu())

    def state(index: int) -> Partial:
        found = {name: torch.cat(parts) for name, parts in done.items() if parts and name not in twins}
        return dict(index=index, features=found, twins=twins, **kept_state(arms))

    for arm in arms:
        arm.model.eval()
    setting.live.stage("feature pass of the frozen tower", len(plan), start=start)
    for span in (range(start, 1), range(max(start, 1), len(plan))):
        own = [arm for arm in arms if arm.name not in twins]
        for index, _ in steps(own, "features", 0, span, fetch, work, setting):
            if index == 0:
                first = {name: parts[0] for name, parts in done.items() if parts}
                twins = _twins(arms, first, {arm.name: kinds(task.locked(arm.model)) for arm in arms})
            setting.live.advance(index + 1, columns(own, setting))
            save(functools.partial(state, index))
    result = state(len(plan) - 1)
    result["features"] |= {
        name: result["features"][owner] for name, owner in twins.items() if owner in result["features"]
    }
    own = [row for row in setting.rows if row["phase"] == "features" and row["index"]]
    setting.rows += [row | dict(arm=name) for name, owner in twins.items() for row in own if row["arm"] == owner]
    return result


def _twins(arms: list[Arm], first: dict[str, Tensor | None], made: dict[str, list]) -> dict[str, str]:
    """The arms of which a part is the very one of an arm before them, and that arm; never noop or identity, which tell
    the noise and the kernels.

    Args:
        first: what the part gives for the first batch, by arm.
        made: the part's `kinds`, by arm.
    """
    found: dict[str, str] = {}
    owners: list[str] = []
    for arm in arms:
        if arm.error or arm.plan.control in ("noop", "identity") or first.get(arm.name) is None:
            continue
        name = arm.name
        same = (o for o in owners if made[o] == made[name] and torch.equal(first[o], first[name]))
        if owner := next(same, None):
            found[name] = owner
        else:
            owners.append(name)
    return found


def kinds(part: list[torch.nn.Module]) -> list[tuple[str, int, int, int]]:
    """What a part of a model is made of: class and number of hooks of each module.

    A module that something outside of the part looks at (its attribute `looked_at`) is like no other arm's: that arm's
    part has to run.
    """
    return [
        (
            type(m).__qualname__,
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            id(m) if getattr(m, "looked_at", False) else 0,
        )
        for each in part
        for m in each.modules()
    ]


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
    with torch.no_grad(), setting.protocol.autocast():
        for _, rows in blocks(split, sizes[split], setting.protocol.eval_batch):
            batch = task.batch(prepared, split, rows, None, pixels=not arm.features) | dict(
                index=torch.from_numpy(rows)
            )
            parts.append(task.look(arm.model, inputs(arm, split, setting.to_device(batch))))
    return task.score(prepared, split, joined(parts))


def test(
    arms: list[Arm], seed: int, setting: Setting, sizes: dict[str, int], partial: Partial | None, save: Save
) -> Partial:
    """The quality pass: every arm predicts the whole test split. Arms with one image tower share what it gives, and so
    with whatever else the task says that they may (`Task.shared`).

    Returns:
        by arm under "items" and, but for the baseline, "agreement": by score, "values" and "group" tensors (see
        `effbench.task.Items`); "answers" of the first seed; "notes" on the scores.
    """
    task, prepared = setting.task, setting.prepared
    plan = blocks("test", sizes["test"], setting.protocol.eval_batch)
    done: dict[str, list[Batch]] = {arm.name: [] for arm in arms}
    twins: dict[str, dict[str, str]] = {}  # by what is shared
    found: dict[str, dict[str, Tensor | None]] = {}  # of the batch at hand: by what is shared, by whose part gave it
    made: dict[str, dict[str, list]] = {}
    if partial:
        done = {name: [stored] if stored else [] for name, stored in partial["outputs"].items()}
        twins = partial["twins"]
        restore(arms, partial)

    def fetch(index: int) -> Batch:
        return task.batch(prepared, *plan[index], None)

    def work(arm: Arm, batch: Batch, _: int) -> None:
        with torch.inference_mode():
            given = {}
            for key, (part, compute) in task.shared(arm.model, batch).items():
                there = found.setdefault(key, {})
                owner = twins.get(key, {}).get(arm.name, arm.name)
                if owner not in there:
                    there[owner] = compute()
                    if not twins:
                        made.setdefault(key, {})[arm.name] = kinds(part)
                if there[owner] is not None:
                    given[key] = there[owner]
            batch |= given
            done[arm.name].append({key: value.cpu() for key, value in task.predict(arm.model, batch).items()})

    def state(index: int) -> Partial:
        outputs = {name: joined(parts) for name, parts in done.items()}
        return dict(index=index, outputs=outputs, twins=twins, **kept_state(arms))

    start = partial["index"] + 1 if partial else 0
    setting.live.stage(f"quality on the test split, seed {seed}", len(plan), start=start)
    for index, _ in steps(arms, "quality", seed, range(start, len(plan)), fetch, work, setting):
        if index == 0:
            twins = {key: _twins(arms, first, made[key]) for key, first in found.items()}
        found.clear()
        setting.live.advance(index + 1, columns(arms, setting))
        save(functools.partial(state, index))
    outputs = {arm.name: joined(done[arm.name]) for arm in arms if not arm.error}
    if task.writes:
        setting.live.stage(f"scores of what was written, seed {seed}", len(outputs), "arms")
    items = {}
    for name, found in outputs.items():
        items[name] = _stored(task.score(prepared, "test", found))
        if task.writes:
            setting.live.advance(len(items))
    first = seed == setting.protocol.seeds[0]
    answers = {
        name: [answer.model_dump() for answer in task.examples(prepared, "test", found)]
        for name, found in outputs.items()
        if first
    }
    agreement = {
        name: _stored(task.agreement(prepared, "test", outputs["baseline"], found))
        for name, found in outputs.items()
        if name != "baseline"
    }
    notes = task.notes(prepared)
    return dict(items=items, agreement=agreement, answers=answers, notes=notes, **kept_state(arms))


def _stored(scores: dict[str, Items]) -> dict[str, dict[str, Tensor]]:
    return {
        name: dict(values=torch.as_tensor(score.values), group=torch.as_tensor(score.group))
        for name, score in scores.items()
    }
