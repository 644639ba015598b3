"""From raw samples to a record: figures with their intervals. Nothing is measured here but FLOPs and memory."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from effbench import records, stats
from effbench.errors import EffbenchError
from effbench.measure.environment import provenance
from effbench.measure.flops import flops_of
from effbench.measure.memory import probe, weight_bytes
from effbench.memory_probe import make_step
from effbench.passes import WARMUP
from effbench.task import Items

if TYPE_CHECKING:
    from effbench.arms import ArmPlan
    from effbench.experiment import Experiment, Journal
    from effbench.lockstep import Arm, Partial

BLOCKS = 30  # training steps are paired in this many blocks, each a miniature of the whole


def record(
    experiment: Experiment,
    arms: list[Arm],
    trained: dict[int, Partial],
    items: dict[int, Partial],
    errors: dict[str, str],
    journal: Journal,
    command: str,
) -> records.Record:
    """The record of a finished experiment."""
    from effbench.experiment import run_id

    live, setting = experiment.live, experiment.setting
    rows = pd.DataFrame(setting.rows)
    live.stage("FLOPs, tokens and memory of each arm", len(arms), "arms")
    training = {arm.name: arm for arm in experiment.training_arms(setting.protocol.seeds[0])} if trained else {}
    found = []
    for place, arm in enumerate(arms):
        error = errors.get(arm.name, arm.error)
        found.append(_arm(experiment, arm, training.get(arm.name), trained, items, error, rows))
        live.advance(place + 1)
    created = datetime.now(UTC)
    seconds = setting.seconds
    outside = seconds["loop"] - seconds["data"] - seconds["compute"] - seconds["other"]
    why = _noise(found) or _not_deterministic(items)
    source = provenance(command)
    return records.Record(
        id=run_id(created, experiment.name, experiment.digest()),
        created=created,
        status="INVALID" if why else "ok",
        why_invalid=why,
        lockstep_overhead=outside / seconds["compute"] if seconds["compute"] else 0.0,
        primary_metric=experiment.task.primary_metric(experiment.prepared, "test").name,
        envelope=experiment.envelope(),
        provenance=source.model_copy(update=dict(resumed=journal.resumed, data_origin=experiment.data.origin)),
        arms=tuple(found),
        notes=tuple(experiment.data.notes),
    )


def _noise(arms: list[records.Arm]) -> str:
    """Why the run is INVALID: the second, untouched baseline differs from the first."""
    noop = next(arm for arm in arms if arm.control == "noop")
    for what, figure in (("test", noop.test_speedup), ("training", noop.train_speedup)):
        if figure is not None and figure.verdict in ("FASTER", "SLOWER"):
            return f"noop, an untouched second baseline, came out {figure.verdict} in {what}: {figure.value:.3f}x"
    return ""


def _not_deterministic(items: dict[int, Partial]) -> str:
    """Why the run is INVALID: on the same weights and batches noop came to other results than the baseline."""
    for seed, part in items.items():
        for name, score in part["items"]["baseline"].items():
            other = part["items"].get("noop", {}).get(name)
            if other is not None and not torch.equal(score["values"], other["values"]):
                return f"noop, an untouched second baseline, came to another {name} (seed {seed}): not deterministic"
    return ""


def _arm(
    experiment: Experiment,
    arm: Arm,
    training: Arm | None,
    trained: dict[int, Partial],
    items: dict[int, Partial],
    error: str,
    rows: pd.DataFrame,
) -> records.Arm:
    plan = arm.plan
    own = rows[rows["arm"] == plan.name]
    others = rows[rows["arm"] == "baseline"]
    trains = training is not None
    facts: dict[str, Any] = dict(
        name=plan.name,
        spec=plan.spec,
        kind=plan.kind,
        control=plan.control,
        controls_for=plan.controls_for,
        phase=plan.phase,
        source="; ".join(dict.fromkeys(method.source for method in plan.methods if method.source)),
    )
    if error:
        return records.Arm(**facts, status="FAILED", error=error)
    notes = []
    timing = own["phase"] == "timing"
    facts["test_time"] = _time(own[own["phase"] == "quality"])
    if trains:
        facts["train_time"] = _time(own[own["phase"].isin(["features", "train"])])
        facts["losses"] = {str(seed): tuple(part["arms"][plan.name]["losses"]) for seed, part in trained.items()}
    if plan.kind != "baseline":
        if timing.any():
            facts["test_speedup"] = _speedup(others, own, "seconds")
            if "image_seconds" in own and own.loc[timing, "image_seconds"].notna().all():
                facts["image_speedup"] = _speedup(others, own, "image_seconds")
        if trains:
            facts["train_speedup"] = stats.speedup(*_training_blocks(others, own))
    facts |= _structure(experiment, arm, training)
    facts["memory"], problem = _memory(experiment, plan)
    notes += [f"memory was not measured: {problem}"] if problem else []
    facts["metrics"] = _metrics(experiment, plan, items, trains)
    return records.Arm(**facts, notes=tuple(notes))


def _time(rows: pd.DataFrame) -> records.TimeSplit | None:
    """Seconds of a phase, summed over the seeds."""
    if not len(rows):
        return None
    compute, wait = rows["seconds"].sum(), rows["data_wait"].sum()
    return records.TimeSplit(
        total=compute + wait,
        data_wait=wait,
        compute=compute,
        features=rows.loc[rows["phase"] == "features", "seconds"].sum(),
        first_step=rows["seconds"].iloc[0],
        steps=len(rows),
    )


def _speedup(baseline: pd.DataFrame, arm: pd.DataFrame, column: str) -> records.Speedup:
    """From the timing pass without its warm-up, paired by step."""
    both = [rows[rows["phase"] == "timing"].set_index("index")[column] for rows in (baseline, arm)]
    shared = both[0].index.intersection(both[1].index)
    shared = shared[shared >= WARMUP]
    return stats.speedup(both[0].loc[shared].to_numpy(), both[1].loc[shared].to_numpy())


def _training_blocks(baseline: pd.DataFrame, arm: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Training seconds of both in blocks; a block holds its part of the feature pass and of the steps of every seed."""
    sums = []
    for rows in (baseline, arm):
        total = np.zeros(BLOCKS)
        for (_, _), part in rows[rows["phase"].isin(["features", "train"])].groupby(["phase", "seed"]):
            place = part["index"].to_numpy() * BLOCKS // (part["index"].max() + 1)
            total += np.bincount(place, part["seconds"].to_numpy(), BLOCKS)
        sums.append(total)
    used = (sums[0] > 0) & (sums[1] > 0)
    return sums[0][used], sums[1][used]


def _structure(experiment: Experiment, arm: Arm, training: Arm | None) -> dict[str, Any]:
    """FLOPs, tokens, parameters and bytes of an arm, as they are."""
    task, prepared = experiment.task, experiment.prepared
    rng = np.random.default_rng(0)
    one = task.batch(prepared, "test", np.arange(1), rng)
    tokens = tokens_per_layer(task.parts(arm.model).get("image", arm.model), lambda: task.predict(arm.model, one))
    with torch.no_grad():
        count = flops_of(lambda: task.predict(arm.model, one), arm.model)
    found: dict[str, Any] = dict(
        test_flops=_flops(count, 1),
        tokens=tokens,
        parameters=sum(p.numel() for p in arm.model.parameters()),
        weight_bytes=weight_bytes(arm.model),
    )
    if training is not None:
        found["trained_parameters"] = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
        found["train_flops"] = _training_flops(experiment, training)
    return found


def _training_flops(experiment: Experiment, arm: Arm) -> records.Flops:
    """Of one training step per pair; a feature pass that is done once is spread over the epochs."""
    from effbench.training import training_mode

    task, protocol = experiment.task, experiment.protocol
    pairs = 2
    batch = task.batch(experiment.prepared, "train", np.arange(pairs), np.random.default_rng(0))
    cached = experiment.caches_features(arm)
    dense = overhead = 0.0
    training_mode([arm])
    parts = []
    if cached:
        with torch.no_grad():
            batch["features"] = task.frozen_features(arm.model, batch["image"])
            parts.append(
                (flops_of(lambda: task.frozen_features(arm.model, batch["image"]), arm.model), protocol.epochs)
            )
        batch = {key: value for key, value in batch.items() if key != "image"}
    parts.append((flops_of(lambda: task.loss(arm.model, batch).backward(), arm.model), 1))
    for count, times in parts:
        dense += count.dense_flops / times
        overhead += count.overhead_flops / times
    return records.Flops(
        dense=round(dense / pairs),
        overhead=round(overhead / pairs),
        complete=all(count.complete for count, _ in parts),
        unknown=tuple(sorted({op for count, _ in parts for op in count.unknown_ops})),
    )


def _flops(count: Any, pairs: int) -> records.Flops:
    return records.Flops(
        dense=round(count.dense_flops / pairs),
        overhead=round(count.overhead_flops / pairs),
        complete=count.complete,
        unknown=tuple(count.unknown_ops),
    )


def tokens_per_layer(model: torch.nn.Module, forward: Any) -> tuple[int, ...]:
    """Tokens that enter each block's MLP in one forward pass, as the tensors really were."""
    seen: list[int] = []
    blocks = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "mlp"]
    handles = [m.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1])) for m in blocks]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(seen)


def _memory(experiment: Experiment, plan: ArmPlan) -> tuple[records.Memory | None, str]:
    """Memory of an arm on a test step, or why it was not measured."""
    protocol = experiment.protocol
    rows = np.arange(min(protocol.timing_batch, experiment.sizes["test"]))
    example = experiment.task.batch(experiment.prepared, "test", rows, np.random.default_rng(0))
    shapes = {key: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for key, value in example.items()}
    arguments = (experiment.name, plan, experiment.recipe, experiment.backbone.origin, protocol, shapes)
    try:
        return probe(make_step, *arguments, device=protocol.device, threads=protocol.threads)
    except EffbenchError as problem:
        return None, str(problem)


def items_of(score: dict[str, torch.Tensor]) -> Items:
    """Items from the tensors that a phase stores."""
    return Items(score["values"].numpy(), score["group"].numpy())


def _metrics(
    experiment: Experiment, plan: ArmPlan, items: dict[int, Partial], trains: bool
) -> dict[str, records.MetricValue]:
    found = {}
    for metric in experiment.task.metrics(experiment.prepared, "test"):
        baseline = [items_of(part["items"]["baseline"][metric.items]) for part in items.values()]
        own = baseline
        if plan.kind != "baseline":
            own = [items_of(part["items"][plan.name][metric.items]) for part in items.values()]
        found[metric.name] = stats.lossiness(metric, baseline, own, trained=trains)
    return found
