"""What an arm is, as it stands at run time: FLOPs, tokens, kernels, dtypes, memory. Nothing here is timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from effbench import randomness, records
from effbench.arms import CONTROLS
from effbench.errors import EffbenchError
from effbench.measure.analytic import analytic_of, disagreement
from effbench.measure.census import census
from effbench.measure.fingerprint import fingerprint
from effbench.measure.flops import FlopCount, flops_of
from effbench.measure.kernels import kernels
from effbench.measure.memory import disk_bytes, probe
from effbench.measure.structure import parameters, structure
from effbench.memory_probe import Shapes, make_step, make_training_step
from effbench.models.tower import view
from effbench.training import training_mode

if TYPE_CHECKING:
    from effbench.arms import ArmPlan
    from effbench.experiment import Experiment
    from effbench.lockstep import Arm, Batch


IMAGES = 16  # whose FLOPs are counted one by one, where they depend on the image
FROZEN = 8  # test images whose outputs a model is recognised by


def examine(experiment: Experiment, arm: Arm, training: Arm | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts of an arm, as fields of `records.Arm`, and a signature of each of its parts.

    Args:
        training: the arm as it trains; None where it uses the baseline's weights.

    Returns:
        the fields; and by part ("image", "text", "head") what tells whether a method changed it.
    """
    task = experiment.task
    claims = {claim for method in arm.plan.methods for claim in method.claims}
    pairs = min(experiment.protocol.timing_batch, experiment.sizes["test"]) if "per batch" in claims else 1
    batch = _test_batch(experiment, np.arange(pairs))

    def step() -> None:
        task.serve(arm.model, batch)

    seen: list[records.Kernels] = []
    with torch.inference_mode():
        operations = census(lambda: seen.append(kernels(step)))
    with torch.no_grad():
        count = flops_of(step, arm.model)
        formulas = analytic_of(step, arm.model)
    there = structure(arm.model, training.model if training is not None else None)
    facts: dict[str, Any] = dict(
        test_flops=_flops([(count, 1)], pairs).model_copy(
            update=dict(analytic=None if formulas.without_formula else round(formulas.flops / pairs))
        ),
        tokens=tokens_per_layer(task.parts(arm.model).get("image", arm.model), step),
        parameters=parameters(arm.model),
        weight_bytes=sum(there.dtypes.values()),
        disk_bytes=disk_bytes(arm.model),
        kernels=seen[0],
        structure=there,
        census=operations,
        fingerprint=_fingerprint(experiment, arm.model, training),
        decoding=_decoding(experiment, arm.model, batch, count, pairs),
    )
    if training is not None:
        facts["trained_parameters"] = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
        facts["train_flops"] = _training_flops(experiment, training)
    if "per image" in claims:
        facts |= _image_by_image(experiment, arm)
    edited = view(arm.model) if arm.plan.methods else None
    said = [note for method in arm.plan.methods for note in method.notes(edited)]
    facts["no_quality"] = "; ".join(filter(None, (method.no_quality(edited) for method in arm.plan.methods)))
    facts["notes"] = tuple(note for note in [disagreement(count, formulas), *said] if note)
    return facts, _signatures(arm.model, task.parts(arm.model), count)


def _fingerprint(experiment: Experiment, model: nn.Module, training: Arm | None) -> records.Fingerprint:
    """Of what the model makes of the same few test images each time, all their texts with them.

    And of what its frozen tower makes of them, on which no training has an influence.
    """
    task, images = experiment.task, experiment.sizes["test"]
    rows = np.sort(np.random.default_rng(0).permutation(images)[:FROZEN])
    batch = experiment.setting.to_device(task.batch(experiment.prepared, "test", rows, None))
    frozen = experiment.protocol.train == "locked" and (training is None or experiment.caches_features(training))
    outer = randomness.get_state()
    randomness.seed_all(0)  # a method may choose blindly
    try:
        with torch.inference_mode():
            outputs = dict(task.look(model, batch))
            if frozen and (features := task.frozen_features(model, batch["image"])) is not None:
                outputs[records.FROZEN_TOWER] = features
            return fingerprint(outputs, len(rows))
    finally:
        randomness.set_state(outer)


def _test_batch(experiment: Experiment, rows: np.ndarray) -> Batch:
    """Test images with one caption each, on the device."""
    batch = experiment.task.batch(experiment.prepared, "test", rows, np.random.default_rng(0))
    return experiment.setting.to_device(batch)


def _decoding(
    experiment: Experiment, model: nn.Module, batch: Batch, whole: FlopCount, pairs: int
) -> tuple[records.Decoding, ...]:
    """What an arm writes in a timed step and what of it costs what, by batch size; empty where it writes nothing.

    Args:
        batch: of `pairs` texts; whole: what writing them costs.
    """
    task, written = experiment.task, []
    with torch.no_grad():
        first = flops_of(lambda: written.append(task.first_token(model, batch)), model)
    if written[0] is None:
        return ()
    decoder = task.parts(model).get("decoder", model)
    name = next(name for name, module in model.named_modules() if module is decoder)
    prefill = sum(flops for layer, flops in first.by_layer.items() if f"{layer}.".startswith(f"{name}."))
    costs = dict(first_token_flops=first.work, prefill_flops=prefill, decode_flops=whole.work - first.work)
    costs = {key: round(flops / pairs) for key, flops in costs.items()}
    found = []
    for size in sorted(experiment.batches or [1]):
        lengths: list[int] = []
        handle = decoder.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))  # noqa: B023
        try:
            with torch.inference_mode():
                ids, cache = task.serve(model, _test_batch(experiment, np.arange(size)))
        finally:
            handle.remove()
        found.append(records.Decoding(batch=size, tokens=ids.shape[1], prefix=lengths[0], cache_bytes=cache, **costs))
    return tuple(found)


def _image_by_image(experiment: Experiment, arm: Arm) -> dict[str, Any]:
    """FLOPs of an arm whose token counts depend on the image: one by one, and padded in a batch as it is timed."""
    task = experiment.task

    def count(rows: np.ndarray) -> FlopCount:
        batch = _test_batch(experiment, rows)
        with torch.no_grad():
            return flops_of(lambda: task.serve(arm.model, batch), arm.model)

    size = min(experiment.protocol.timing_batch, experiment.sizes["test"])
    each = [count(np.array([row])) for row in range(min(IMAGES, experiment.sizes["test"]))]
    work = [_flops([(one, 1)], 1).work for one in each]
    low, high = np.percentile(work, [5, 95])
    return dict(
        test_flops=_flops([(one, len(each)) for one in each], 1),
        per_image=records.PerImage(
            images=len(each),
            flops=records.Interval(value=float(np.mean(work)), low=low, high=high, n=len(each)),
            batch=size,
            padded=_flops([(count(np.arange(size)), 1)], size).work,
        ),
    )


def _training_flops(experiment: Experiment, arm: Arm) -> records.Flops:
    """Of one training step per pair; a feature pass that is done once is spread over the epochs.

    Of a whole batch where texts are padded to the longest of it, or packed; else of two pairs.
    """
    task = experiment.task
    pairs = min(experiment.protocol.batch_size, experiment.sizes["train"]) if task.writes else 2
    batch = training_batch(experiment, arm, pairs)
    cached = "features" in batch
    training_mode([arm])
    parts, once = [], 0
    if cached:
        image = batch.pop("image")
        with torch.no_grad():
            features = flops_of(lambda: task.frozen_features(arm.model, image), arm.model)
        parts, once = [(features, experiment.protocol.epochs)], round(features.work / pairs)
    parts.append((flops_of(lambda: task.loss(arm.model, batch).backward(), arm.model), 1))
    return _flops(parts, pairs).model_copy(update=dict(once=once))


def training_batch(experiment: Experiment, arm: Arm, pairs: int) -> Batch:
    """A training batch of an arm; with "features" beside "image" where those of its frozen tower are computed once."""
    rows = np.arange(min(pairs, experiment.sizes["train"]))
    batch = experiment.task.batch(experiment.prepared, "train", rows, np.random.default_rng(0))
    batch = experiment.setting.to_device(batch)
    if experiment.caches_features(arm):
        with torch.no_grad():
            batch["features"] = experiment.task.frozen_features(arm.model, batch["image"])
    return batch


def _flops(counts: list[tuple[FlopCount, int]], pairs: int) -> records.Flops:
    """Per pair, each count divided by the number of times that its result is used."""

    def total(field: str) -> int:
        return round(sum(getattr(count, field) / times for count, times in counts) / pairs)

    return records.Flops(
        dense=total("dense_flops"),
        useful=total("useful_flops"),
        low_bit=total("low_bit_ops"),
        low_bit_macs=total("low_bit_macs"),
        overhead=total("overhead_flops"),
        complete=all(count.complete for count, _ in counts),
        unknown=tuple(sorted({op for count, _ in counts for op in count.unknown_ops})),
    )


def _signatures(model: nn.Module, parts: dict[str, nn.Module], count: FlopCount) -> dict[str, Any]:
    """What a part computes and is made of: FLOPs, classes of its modules, dtypes of its weights."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, Any] = {}
    claimed: set[str] = set()
    for part, module in parts.items():
        prefix = names.get(module, "")
        layers = {layer for layer in count.by_layer if layer == prefix or layer.startswith(f"{prefix}.")}
        claimed |= layers
        found[part] = _signature(module, sum(count.by_layer[layer] for layer in layers))
    rest = sum(flops for layer, flops in count.by_layer.items() if layer not in claimed)
    found["head"] = rest
    return found


def _signature(module: nn.Module, flops: int) -> tuple[Any, ...]:
    tensors = [*module.parameters(), *module.buffers()]
    return flops, Counter(type(m).__qualname__ for m in module.modules()), Counter(t.dtype for t in tensors)


def eases(now: Any, before: Any) -> bool:
    """Whether a method makes a part cheaper or other than it was, by the signatures of both; more work is no ease."""
    flops, *made = now if isinstance(now, tuple) else (now,)
    base, *was = before if isinstance(before, tuple) else (before,)
    return flops < base or made != was


def tokens_per_layer(model: nn.Module, forward: Callable[[], object]) -> tuple[int, ...]:
    """Tokens that enter each block's MLP in one forward pass, as the tensors really were."""
    seen: list[int] = []
    blocks = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "mlp"]
    handles = [m.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2])) for m in blocks]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(seen)


def memory(experiment: Experiment, plan: ArmPlan, training: Arm | None) -> tuple[dict[str, Any], list[str]]:
    """Memory of a test step and, where the arm trains, of a training step; and why one was not measured.

    Not of arms that only judge others by their quality.
    """
    protocol, facts, notes = experiment.protocol, {}, []
    if not experiment.memory_runs or plan.control in CONTROLS:
        return facts, notes
    rows = np.arange(min(protocol.timing_batch, experiment.sizes["test"]))
    batch = experiment.task.batch(experiment.prepared, "test", rows, np.random.default_rng(0))
    steps = {"memory": (make_step, _shapes(batch))}
    if training is not None and protocol.engine == "plain":
        pairs = min(protocol.batch_size, experiment.sizes["train"])
        steps["train_memory"] = (make_training_step, _training_shapes(experiment, training, pairs))
    elif training is not None:
        notes.append(f"memory of a training step is not measured under {protocol.engine}")
    for field, (build, shapes) in steps.items():
        arguments = (experiment.name, plan, experiment.recipe, experiment.backbone.origin, protocol, shapes)
        try:
            facts[field], problem = probe(
                build, *arguments, device=protocol.device, threads=protocol.threads, runs=experiment.memory_runs
            )
        except EffbenchError as error:
            problem = str(error)
        if problem:
            notes.append(f"memory of a {'training' if field == 'train_memory' else 'test'} step: {problem}")
    return facts, notes


def _training_shapes(experiment: Experiment, arm: Arm, pairs: int) -> Shapes:
    """Of a training batch; images and features are computed for two pairs alone."""
    few = training_batch(experiment, arm, 2)
    if "features" in few:
        del few["image"]
    rng = np.random.default_rng(0)
    whole = experiment.task.batch(experiment.prepared, "train", np.arange(pairs), rng, pixels=False)
    return {key: ((pairs, *shape[1:]), dtype) for key, (shape, dtype) in _shapes(few, True).items()} | _shapes(whole)


def _shapes(batch: Batch, images: bool = False) -> Shapes:
    """Shapes and dtypes of a batch, and its integers; of `images` alone no integers."""
    found: Shapes = {}
    for key, value in batch.items():
        if value.is_floating_point():
            found[key] = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        elif not images:
            found[key] = value.cpu().numpy()
    return found
