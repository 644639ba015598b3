"""One experiment: plan -> lockstep -> record. Read it from top to bottom."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout

from effbench import randomness, results, store
from effbench.arms import ArmPlan, plan_arms, testing_model, training_model
from effbench.checkpoint import Checkpoint
from effbench.datasets import resolve
from effbench.errors import EffbenchError, UsageError
from effbench.live import Live
from effbench.lockstep import Arm, Partial, Setting
from effbench.measure.clock import Clock
from effbench.measure.environment import cores, device_model
from effbench.measure.memory import process_peak
from effbench.models.choose import choose
from effbench.passes import features, pairs, test, use_features
from effbench.pixels import RULE
from effbench.records import Envelope, Protocol, Record
from effbench.registry import tasks
from effbench.report.leaderboard import write_leaderboard
from effbench.samples import item_samples
from effbench.spec import canonical, parse
from effbench.terminal import console
from effbench.training import train


def run(
    methods: Sequence[str] = (),
    task: str = "flickr8k",
    *,
    backbone: str = "auto",
    weights: Path | str | None = None,
    pretrained: str | None = None,
    data: str | Path | None = None,
    train: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    head: str = "cosine",
    lr: float | None = None,
    weight_decay: float | None = None,
    seeds: int = 1,
    data_share: float = 1.0,
    threads: int | None = None,
    timing_batch: int = 16,
    timing_pairs: int = 30,
    out: Path | str = "leaderboard",
    dry_run: bool = False,
    fresh: bool = False,
    checkpoint_every: float = 60.0,
    live: Any = None,
) -> Record | None:
    """Compare methods on a task, write the record and the leaderboard.

    Args:
        methods: stacks, each an arm, e.g. ["token_prune:keep=0.5", "token_prune+quantize"]; baseline and controls
            come by themselves.
        task: a name of `effbench list tasks`.
        backbone: "FAMILY:NAME", or "auto" for the weights that are found.
        weights: file of weights, or "random" (time and FLOPs only). pretrained: a tag of the library instead.
        data: a path, "real" (refuse the embedded stand-in) or the stand-in's name; None for the usual places.
        train: "none", "locked" (image tower frozen) or "full".
        epochs, batch_size, image_size, lr, weight_decay: None for what the task or the backbone recommends.
        seeds: number of seeds, 0 to seeds - 1.
        data_share: share of the training images that is used.
        threads: of the CPU; None for all cores.
        timing_batch: images per timed step; timing_pairs: timed steps per arm.
        out: folder of the leaderboard.
        dry_run: show the arms, the time and the memory that it would take, and return None.
        fresh: ignore what an interrupted run of the same experiment left.
        checkpoint_every: seconds of a step group, the unit of resume.
        live: shows progress; None for the terminal.

    Returns:
        The record, or None after a dry run.

    Raises:
        UsageError: something asked for cannot be. InvalidError: data or weights are missing or damaged.
        EffbenchError: the baseline failed, or the disk is full; the same call goes on from the last step group.
    """
    started = time.monotonic()
    if added := {"baseline", "noop", "identity"} & set(methods):
        raise UsageError(f"{added.pop()} is an arm of every run", "leave it out")
    stacks = [parse(spec) for spec in methods]
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: at least one seed is needed", "leave it out for one seed")
    with live or Live() as live:
        for spec, times in Counter(map(canonical, stacks)).items():
            if times > 1:
                live.warn(f"{spec} is asked for {times} times and runs once")
        found = resolve(task, data, live.progress)
        if found.stood_in:
            live.banner(f"NO REAL {task.upper()} DATA: RUNNING ON {found.data.name.upper()}", [found.looked])
        source = found.task if found.data.name != found.task.stand_in else tasks.get(found.data.name)
        tower, banner = choose(backbone, weights, pretrained, embedded=found.data.synthetic, image_size=image_size)
        if banner:
            live.banner("NO PRETRAINED WEIGHTS: RUNNING ON THE SHIPPED TOWER", banner)
        if weights == "random":
            live.warn("random weights: time and FLOPs mean something, quality does not")
        asked = dict(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, train=train)
        given = {name: value for name, value in asked.items() if value is not None}
        protocol = _protocol(
            source.recommended | given,
            image_size=tower.image_size,
            head=head,
            seeds=tuple(range(seeds)),
            threads=threads or cores(),
            timing_batch=timing_batch,
            timing_pairs=timing_pairs,
            data_share=data_share,
        )
        with _threads(protocol.threads):
            experiment = Experiment(found.task, task, found.data, tower, stacks, protocol, live)
            experiment.check()
            sizes = " / ".join(f"{n:,} {split}" for split, n in experiment.sizes.items())
            live.note(f"data: {found.data.name}, {sizes} images; {found.data.origin}")
            live.note(
                f"backbone: {tower}, weights {tower.origin['weights'] or tower.origin['pretrained'] or 'shipped'}"
            )
            if dry_run:
                from effbench.dry_run import show

                show(experiment, console())
                return None
            record = experiment.run(Path(out), checkpoint_every, fresh, started, _command())
        write_leaderboard(Path(out))
        return record


class Experiment:
    """The parts of one experiment that its phases share.

    Args:
        task: the task. name: how it was asked for.
        stacks: the arms asked for, each a tuple of methods.
    """

    def __init__(
        self, task: Any, name: str, data: Any, backbone: Any, stacks: list[Any], protocol: Protocol, live: Any
    ) -> None:
        self.task, self.name, self.data, self.backbone, self.live = task, name, data, backbone, live
        if protocol.data_share < 1:
            share = max(protocol.batch_size, round(len(data.splits["train"]) * protocol.data_share))
            drawn = np.random.default_rng(0).permutation(len(data.splits["train"]))[:share]
            data.splits["train"] = [data.splits["train"][i] for i in sorted(drawn)]
        self.protocol = protocol
        self.sizes = data.sizes()
        self.plans = plan_arms(stacks)
        self.prepared = task.prepare(data, backbone, protocol, live.progress)
        self.recipe = task.recipe(self.prepared)
        self.setting = Setting(task, self.prepared, protocol, Clock(protocol.device), live)

    @property
    def trains(self) -> bool:
        return self.protocol.train != "none" and self.protocol.epochs > 0

    def training_plans(self) -> list[ArmPlan]:
        """The arms that train weights of their own; noop and identity do so only beside a method that does."""
        own = [plan for plan in self.plans if plan.phase != "test"]
        return [plan for plan in self.plans if plan.kind == "baseline" or plan in own or (own and not plan.methods)]

    def check(self) -> None:
        """Build every arm once: what does not fit is refused before any work, by name.

        Raises:
            UsageError, InvalidError: as the methods say.
        """
        for plan in self.plans:
            if plan.phase != "test" and not self.trains:
                raise UsageError(
                    f"{plan.name} acts while training, but nothing is trained", "use --train locked or full"
                )
            randomness.seed_all(0)
            if plan.kind == "baseline" or plan.during("train", "both"):
                training_model(plan, self.task, self.recipe, self.backbone, self.protocol)
            if plan.during("test"):
                testing_model(plan, self.task, self.recipe, self.backbone, self.protocol, {}, None)

    def envelope(self) -> Envelope:
        return Envelope(
            task=self.name,
            data=self.data.name,
            synthetic=self.data.synthetic,
            data_fingerprint=self.data.fingerprint,
            images=self.sizes,
            captions={split: sum(len(e.captions) for e in examples) for split, examples in self.data.splits.items()},
            metrics=tuple(metric.name for metric in self.task.metrics(self.prepared, "test")),
            backbone=str(self.backbone),
            weights=self.backbone.weights_id,
            transform=f"{RULE} {self.protocol.image_size}px mean {self.backbone.mean} std {self.backbone.std}",
            protocol=self.protocol,
            device_model=device_model(self.protocol.device),
        )

    def digest(self) -> str:
        """Names the experiment: the same question asked again has the same digest, whatever the number of threads."""
        facts = self.envelope().model_dump(mode="json")
        facts["protocol"].pop("threads")
        arms = [[plan.name, plan.kind] for plan in self.plans]
        return hashlib.sha256(json.dumps([facts, arms], sort_keys=True).encode()).hexdigest()[:12]

    def run(self, out: Path, every: float, fresh: bool, started: float, command: str) -> Record:
        """Train, test, time, measure, write; goes on where an interrupted run of the same experiment stopped."""
        folder = out / ".partial" / self.digest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EffbenchError(
                f"cannot write to {out}: {error.strerror}", "choose another folder with --out"
            ) from error
        lock = FileLock(folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise EffbenchError(
                f"this very experiment is running already in {out}", "wait for it, or choose another --out"
            ) from None
        try:
            journal = Journal(Checkpoint(folder / "checkpoint.pt", every), self, fresh)
            # images are decoded here, under their own progress, not inside the first timed stage
            self.task.batch(self.prepared, "train", np.arange(1), None)
            trained, items = {}, {}
            first = self.protocol.seeds[0]
            cached: Partial | None = None
            for seed in self.protocol.seeds:
                if self.trains:
                    if self.protocol.train == "locked" and cached is None:
                        cached = journal.phase("features", lambda p, save: self._features(p, save))
                    trained[seed] = journal.phase(
                        f"train {seed}", lambda p, save, seed=seed, cached=cached: self._train(seed, cached, p, save)
                    )
                arms = self._testing_arms(seed, trained.get(seed))
                items[seed] = journal.phase(
                    f"test {seed}",
                    lambda p, save, seed=seed, arms=arms: test(arms, seed, self.setting, self.sizes, p, save),
                )
            arms = arms if len(self.protocol.seeds) == 1 else self._testing_arms(first, trained.get(first))
            for arm in arms:
                arm.error = items[first]["errors"][arm.name]
            timed = journal.phase("timing", lambda p, save: pairs(arms, self.setting, self.sizes, p, save))
            errors = {}
            for part in [*trained.values(), *items.values(), timed]:
                errors |= {name: error for name, error in part["errors"].items() if error}
            record = results.record(self, arms, trained, items, errors, journal, command)
            record = record.model_copy(
                update=dict(wall_time=journal.before + time.monotonic() - started, peak_memory=process_peak() or 0)
            )
            store.write(record, self._samples(items), out)
        finally:
            lock.release()
        shutil.rmtree(folder, ignore_errors=True)
        return record

    def _features(self, partial: Partial | None, save: Any) -> Partial:
        return features(self._cached_arms(), self.setting, self.sizes, partial, save)

    def _cached_arms(self) -> list[Arm]:
        """The arms whose frozen tower's features can be computed once."""
        return [arm for arm in self.training_arms(self.protocol.seeds[0]) if self.caches_features(arm)]

    def caches_features(self, arm: Arm) -> bool:
        """Whether the tower is frozen and nothing inside it is trained, so that its features are computed once."""
        frozen = (p for module in arm.frozen for p in module.parameters())
        return self.protocol.train == "locked" and not any(p.requires_grad for p in frozen)

    def training_arms(self, seed: int) -> list[Arm]:
        """The arms that train weights of their own, freshly built under a seed."""
        arms = []
        for plan in self.training_plans():
            randomness.seed_all(seed)
            model, training = training_model(plan, self.task, self.recipe, self.backbone, self.protocol)
            arms.append(
                Arm(plan, model.to(self.protocol.device), randomness.get_state(), training.frozen, training.trained)
            )
        return arms

    def _train(self, seed: int, cached: Partial | None, partial: Partial | None, save: Any) -> Partial:
        arms = self.training_arms(seed)
        if cached is not None:
            use_features([arm for arm in arms if arm.name in cached["random"]], cached, self.sizes)
        return train(arms, seed, self.setting, self.sizes, partial, save)

    def _testing_arms(self, seed: int, trained: Partial | None) -> list[Arm]:
        """Every arm as it is tested; an arm that trains nothing has the baseline's weights of the same seed."""
        arms = []
        for plan in self.plans:
            error = trained["errors"].get(plan.name, "") if trained else ""
            owner = plan.name if trained and plan.name in trained["arms"] else "baseline"
            state = trained["arms"][owner]["state"] if trained else {}
            randomness.seed_all(seed)
            model = torch.nn.Identity()
            if not error:
                model = testing_model(
                    plan, self.task, self.recipe, self.backbone, self.protocol, state, self._calibration()
                )
            arms.append(Arm(plan, model.to(self.protocol.device), randomness.get_state(), error=error))
        return arms

    def _calibration(self) -> Any:
        """Training images, in batches, for methods that calibrate."""
        rows = np.random.default_rng(0).permutation(self.sizes["train"])[:128]
        size = self.protocol.timing_batch
        for start in range(0, len(rows), size):
            yield self.task.batch(self.prepared, "train", rows[start : start + size], None)["image"]

    def _samples(self, items: dict[int, Partial]) -> pd.DataFrame:
        frames = [pd.DataFrame(self.setting.rows)]
        for seed, part in items.items():
            for arm, scores in part["items"].items():
                frames += [item_samples(arm, seed, name, results.items_of(score)) for name, score in scores.items()]
        return pd.concat([frame for frame in frames if len(frame)], ignore_index=True)


class Journal:
    """Which phases of an experiment are done, and where the one under way stands."""

    def __init__(self, checkpoint: Checkpoint, experiment: Experiment, fresh: bool) -> None:
        self.checkpoint = checkpoint
        self.setting = experiment.setting
        self.threads = experiment.protocol.threads
        self.started = time.monotonic()
        state = None if fresh else checkpoint.load()
        if state and state["threads"] != self.threads:
            raise UsageError(
                f"an interrupted run of this experiment used {state['threads']} threads, this one has {self.threads}",
                f"resume it with --threads {state['threads']}, or start again with --fresh",
            )
        self.done: dict[str, Partial] = state["done"] if state else {}
        self.partial: dict[str, Partial] = state["partial"] if state else {}
        self.before: float = state["wall_time"] if state else 0.0
        self.resumed: int = state["resumed"] + 1 if state else 0
        if state:
            self.setting.rows[:] = state["rows"]
            self.setting.seconds.update(state["seconds"])
            experiment.live.note(f"resuming an interrupted run after {', '.join(self.done) or 'its first steps'}")

    def phase(self, name: str, work: Any) -> Partial:
        """The result of a phase; it is run unless it was finished before."""
        if name not in self.done:

            def save(state: Any) -> None:
                if self.checkpoint.due():
                    begin = time.monotonic()
                    self._write({name: state()})
                    self.setting.seconds["other"] += time.monotonic() - begin

            self.done[name] = work(self.partial.get(name), save)
            self._write({})
        return self.done[name]

    def _write(self, partial: dict[str, Partial]) -> None:
        wall_time = self.before + time.monotonic() - self.started
        state = dict(done=self.done, partial=partial, rows=self.setting.rows, seconds=self.setting.seconds)
        self.checkpoint.save(state | dict(threads=self.threads, wall_time=wall_time, resumed=self.resumed))


def run_id(created: datetime, task: str, digest: str) -> str:
    """Name of a record: when, what, and of which experiment."""
    return f"{created:%Y%m%d-%H%M%S}-{task}-{digest[:8]}"


def _protocol(values: dict[str, Any], **more: Any) -> Protocol:
    from pydantic import ValidationError

    try:
        return Protocol(**values, **more)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UsageError(f"--{option} {first['input']}: {first['msg'].lower()}", "see effbench run --help") from None


class _threads:
    """Torch's number of threads, for as long as the experiment runs."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.number)

    def __exit__(self, *_: Any) -> None:
        torch.set_num_threads(self.before)


def _command() -> str:
    import shlex

    name = Path(sys.argv[0]).name
    return shlex.join([name, *sys.argv[1:]]) if name == "effbench" else ""
