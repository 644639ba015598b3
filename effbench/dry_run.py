"""What a run would take: each arm is built and steps a few times on random images; nothing is decoded or written."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from effbench import randomness
from effbench.arms import owner, settled, testing_model
from effbench.economics import look_steps
from effbench.engine import optimiser
from effbench.lockstep import Arm, Batch
from effbench.measure.memory import process_peak, weight_bytes
from effbench.passes import kinds
from effbench.report.figures import mebibytes
from effbench.settling import chooses
from effbench.timing import WARMUP
from effbench.training import training_mode

if TYPE_CHECKING:
    from effbench.experiment import Experiment

MIB = 2**20


def show(experiment: Experiment, console: Console) -> None:
    """Print the arms, with the time and memory that they would take."""
    header, rows, lines = estimate(experiment)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    table.add_column(header[0], overflow="fold")
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def estimate(experiment: Experiment) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, one row per arm, and lines with the totals."""
    task, protocol, sizes = experiment.task, experiment.protocol, experiment.sizes
    few = min(protocol.timing_batch, sizes["test"])
    rows, total = [], 0.0
    towers: list[tuple[Any, torch.Tensor]] = []
    trains = {arm.name: arm for arm in experiment.training_arms(protocol.seeds[0])} if experiment.trains else {}
    experiment.live.stage("steps of each arm, for the estimate", len(experiment.plans), "arms")
    for number, plan in enumerate(experiment.plans):
        experiment.live.advance(number)
        randomness.seed_all(0)
        build = (task, experiment.recipe, experiment.backbone, protocol)
        settled_plan = settled(plan, *build, experiment.rehearsal)
        model = testing_model(settled_plan, *build, {}, experiment.rehearsal)
        rng = np.random.default_rng(0)
        with torch.inference_mode():
            timing = 0.0
            for size in experiment.batches:
                batch = _random_batch(experiment, "test", size, rng)
                step = _seconds(lambda model=model, batch=batch: task.serve(model, batch))
                timing += step * (protocol.timing_pairs + WARMUP)
            whole = _random_batch(experiment, "test", few, None)
            testing = _testing(experiment, model, whole, towers)
        testing *= len(protocol.seeds) * sizes["test"] / few
        training = _training(experiment, trains[plan.name]) if plan.name in trains else 0.0
        total += testing + timing + training
        weights = owner(plan, experiment.plans, trains)
        own = "itself" if plan.name in trains else weights if trains else "nobody"
        rows.append(
            [
                plan.name,
                plan.kind,
                own,
                _time(training),
                _time(testing),
                _time(timing),
                f"{mebibytes(weight_bytes(model))} MiB",
            ]
        )
    experiment.live.advance(len(experiment.plans))
    per_epoch = sizes["train"] // min(protocol.batch_size, sizes["train"])
    looks = len(look_steps(protocol.epochs, per_epoch, protocol.dev_checks)) if trains else 0
    header = ["arm", "kind", "trained by", "train", "test", "timing", "weights"]
    lines = [
        f"roughly {_time(total)} once the images are decoded, and {process_peak() / MIB:.0f} MiB of memory "
        "for the process that holds all arms",
        f"{experiment.data.name}: {sizes['train']} / {sizes['dev']} / {sizes['test']} images; {experiment.backbone}; "
        f"epochs {protocol.epochs}, batch {protocol.batch_size}, train {protocol.train}, seeds {len(protocol.seeds)}, "
        f"looks at dev per seed {looks}",
    ]
    choosing = [plan.name for plan in experiment.training_plans() if plan.name in trains and chooses(plan)]
    if choosing:
        lines.append(f"not in it: the look at training data by which a method chooses layers ({', '.join(choosing)})")
    if ahead := task.ahead(experiment.prepared, experiment.backbone, protocol):
        lines.append(f"not in it: {ahead}")
    lines += [
        "nothing was run; leave --dry-run out to run it",
    ]
    return header, rows, lines


def _testing(
    experiment: Experiment, model: torch.nn.Module, batch: Batch, towers: list[tuple[Any, torch.Tensor]]
) -> float:
    """Seconds of predicting a batch; a tower that an arm before has too counts nothing (see `effbench.passes.test`).

    Args:
        towers: of the arms so far, what they are made of and what they give; is added to.
    """
    task = experiment.task
    found = task.frozen_features(model, batch["image"])
    if found is None:
        return _seconds(lambda: task.predict(model, batch))
    seconds, made = 0.0, kinds(task.locked(model))
    if not any(made == other and torch.equal(found, given) for other, given in towers):
        towers.append((made, found))
        seconds = _seconds(lambda: task.frozen_features(model, batch["image"]))
    return seconds + _seconds(lambda: task.predict(model, batch | dict(features=found)))


def _training(experiment: Experiment, arm: Arm) -> float:
    """Seconds of training and of the feature pass, from a step of each, and of looks at dev."""
    task, protocol, sizes = experiment.task, experiment.protocol, experiment.sizes
    size = min(protocol.batch_size, sizes["train"])
    cached = experiment.caches_features(arm)
    probe = size if cached else min(size, protocol.timing_batch)
    rng = np.random.default_rng(0)
    few = min(probe, protocol.timing_batch)
    batch = _random_batch(experiment, "train", few if cached else probe, rng)
    per_image = 0.0
    if cached:
        with torch.no_grad(), protocol.autocast():
            features = task.frozen_features(arm.model, batch["image"])
            per_image = _seconds(lambda: task.frozen_features(arm.model, batch["image"])) / few
        tokens = task.batch(experiment.prepared, "train", np.arange(probe), rng, pixels=False)
        batch = experiment.setting.to_device(tokens) | dict(features=_repeated(features, probe))
    training_mode([arm])
    adam = optimiser(arm.model, protocol)

    def step() -> None:
        with protocol.autocast():
            loss = task.loss(arm.model, batch)
        loss.backward()
        adam.step()
        adam.zero_grad()

    per_epoch = sizes["train"] // size
    spent = _seconds(step) * size / probe * protocol.epochs * per_epoch
    few = min(protocol.timing_batch, sizes["dev"])
    look = _random_batch(experiment, "dev", few, None)
    if cached:
        del look["image"]
        look["features"] = _repeated(features, few)
    arm.model.eval()
    with torch.no_grad(), protocol.autocast():
        looking = _seconds(lambda: task.look(arm.model, look)) * sizes["dev"] / few
    spent += looking * len(look_steps(protocol.epochs, per_epoch, protocol.dev_checks))
    return spent * len(protocol.seeds) + (per_image * (sizes["train"] + sizes["dev"]) if cached else 0.0)


def _repeated(features: torch.Tensor, count: int) -> torch.Tensor:
    """`count` rows of features, over and over."""
    return features[torch.arange(count, device=features.device) % len(features)]


def _random_batch(experiment: Experiment, split: str, size: int, rng: np.random.Generator | None) -> Batch:
    size_px = experiment.protocol.image_size
    batch = experiment.task.batch(experiment.prepared, split, np.arange(size), rng, pixels=False)
    return experiment.setting.to_device(batch | dict(image=torch.rand(size, 3, size_px, size_px)))


def _seconds(step: Any) -> float:
    """The quicker of two calls, after one that warms up."""
    step()
    spent = []
    for _ in range(2):
        begin = time.perf_counter()
        step()
        spent.append(time.perf_counter() - begin)
    return min(spent)


def _time(seconds: float) -> str:
    if seconds < 0.05:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"
