"""One experiment: plan -> lockstep -> record. Read it from top to bottom."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout

from effbench import calibration_set, engine, randomness, results, store, unfinished
from effbench.arms import (
    CONTROLS,
    ArmPlan,
    owner,
    plan_arms,
    settled,
    testing_model,
    trainer,
    training_model,
    try_out,
    with_choices,
)
from effbench.budget import image_work, resize_arms
from effbench.checkpoint import Checkpoint
from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.journal import Journal
from effbench.lockstep import Arm, BatchChanged, Partial, Setting, kept_state
from effbench.measure.clock import Clock
from effbench.measure.energy import meter
from effbench.measure.environment import device_model, provenance
from effbench.measure.memory import prepare, process_peak
from effbench.passes import features, test, use_features
from effbench.pixels import RULE
from effbench.preflight import preflight
from effbench.records import Envelope, Protocol, Record
from effbench.samples import item_samples
from effbench.settling import settle
from effbench.timing import Stopping, pairs
from effbench.training import train


class Experiment:
    """The parts of one experiment that its phases share.

    Args:
        task: the task. name: how it was asked for.
        stacks: the arms asked for, each a tuple of methods.
        stopping: when the timing pass ends. sweep: further batch sizes that are timed.
        memory_runs: processes per arm and kind of step that memory is measured in.
        controls: the controls that are added, of `effbench.arms.CONTROLS`.
    """

    def __init__(
        self,
        task: Any,
        name: str,
        data: Any,
        backbone: Any,
        stacks: list[Any],
        protocol: Protocol,
        live: Any,
        stopping: Stopping,
        sweep: tuple[int, ...] = (),
        memory_runs: int = 3,
        controls: Sequence[str] = CONTROLS,
    ) -> None:
        self.stopping, self.sweep, self.memory_runs = stopping, sweep, memory_runs
        self.task, self.name, self.data, self.backbone, self.live = task, name, data, backbone, live
        task.set_apart(data, protocol)
        if protocol.data_share < 1:
            asked = round(len(data.splits["train"]) * protocol.data_share)
            share = min(max(protocol.batch_size, asked), len(data.splits["train"]))
            if share > asked:
                live.warn(
                    f"a data share of {protocol.data_share:g} is {asked} images, less than a batch: {share} are used"
                )
            drawn = np.random.default_rng(0).permutation(len(data.splits["train"]))[:share]
            data.splits["train"] = [data.splits["train"][i] for i in sorted(drawn)]
        self.protocol = protocol
        self.sizes = data.sizes()
        self.plans = plan_arms(stacks, controls)
        self.prepared = task.prepare(data, backbone, protocol, live.progress)
        self.recipe = task.recipe(self.prepared)
        #: what methods see in place of training data where a model is only checked or counted
        self.rehearsal = calibration_set.rehearsal(task, self.prepared, protocol, self.sizes["train"])
        #: by arm and seed, arms whose methods chose something by looking at training data
        self.settled: dict[tuple[str, int], ArmPlan] = {}
        #: FLOPs of the image tower for one image, by arm, where arms are compared by them
        self.image_work: dict[str, int] = {}
        if "resize" in controls and any(plan.kind == "method" for plan in self.plans):
            among = (self.task, self.prepared, self.recipe, self.backbone, self.protocol, self.rehearsal)
            smaller, self.image_work = resize_arms(self.plans, lambda plan: image_work(plan, *among))
            self.plans += [plan for plan in smaller if plan.name not in {known.name for known in self.plans}]
        energy, why = meter(protocol.device)
        self.energy_source = energy.source if energy else why
        self.setting = Setting(task, self.prepared, protocol, Clock(protocol.device), live, energy)

    @property
    def batches(self) -> list[int]:
        """The batch sizes that are timed, the main one first; one image is latency."""
        if not self.protocol.timing_pairs:
            return []
        most = self.sizes["test"]
        return list(dict.fromkeys(min(size, most) for size in (self.protocol.timing_batch, 1, *sorted(self.sweep))))

    @property
    def trains(self) -> bool:
        return self.protocol.train != "none" and self.protocol.epochs > 0

    def plan(self, name: str) -> ArmPlan:
        """The arm of that name, as it was asked for."""
        return next(plan for plan in self.plans if plan.name == name)

    def training_plans(self) -> list[ArmPlan]:
        """The arms that train weights of their own; noop and identity do so only beside a method that does."""
        own = [plan for plan in self.plans if plan.phase != "test" and trainer(plan, self.plans) is plan]
        return [plan for plan in self.plans if plan.kind == "baseline" or plan in own or (own and not plan.methods)]

    def check(self) -> None:
        """Build every arm once: what does not fit is refused before any work, by name.

        Raises:
            UsageError, InvalidError: as the methods say, or a metric lacks what its lossy-ness needs.
        """
        for metric in self.task.metrics(self.prepared, "test"):
            if not isinstance(metric.higher_is_better, bool):
                raise InvalidError(
                    f"metric {metric.name} of {self.name} does not say whether higher is better",
                    "declare higher_is_better=True or False in the task: without it lossy-ness has no sign",
                )
        engine.check(self.protocol, self.sizes["train"])
        for plan in self.plans:
            if plan.phase != "test" and not self.trains:
                hint = "use --train full, or --train locked for what trains beside a frozen tower"
                raise UsageError(
                    f"{plan.name} acts while training, but nothing is trained",
                    hint if self.protocol.epochs else "use --epochs 1 or more",
                )
            randomness.seed_all(0)
            try_out(plan, self.task, self.recipe, self.backbone, self.protocol, self.rehearsal)

    def envelope(self) -> Envelope:
        return Envelope(
            task=self.name,
            data=self.data.name,
            synthetic=self.data.synthetic,
            data_fingerprint=self.data.fingerprint,
            images=self.sizes,
            captions={split: sum(len(e.captions) for e in examples) for split, examples in self.data.splits.items()},
            metrics=tuple(m.name for m in self.task.metrics(self.prepared, "test") if not m.optional),
            backbone=str(self.backbone),
            weights=self.task.weights(self.prepared, self.backbone),
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
        source = provenance(command, self.protocol.device)  # now: the load that the run itself makes is none of it
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
            asked = tuple(plan.name for plan in self.plans if plan.kind == "method")
            about = dict(task=self.name, data=self.data.name, backbone=str(self.backbone), arms=asked, command=command)
            unfinished.note(folder, unfinished.About(**about))
            self._ground()
            journal = Journal(Checkpoint(folder / "checkpoint.pt", every), self, fresh)
            if self.memory_runs:
                prepare()
            # images are decoded here, under their own progress, not inside the first timed stage
            self.task.batch(self.prepared, "train", np.arange(1), None)
            trained, items = {}, {}
            first = self.protocol.seeds[0]
            cached: Partial | None = None
            for seed in self.protocol.seeds:
                if self.trains:
                    settle(self, seed, journal)
                    if self.protocol.train == "locked" and cached is None:
                        cached = journal.phase("features", lambda p, save: self._features(p, save))
                    trained[seed] = journal.phase(
                        f"train {seed}", lambda p, save, seed=seed, cached=cached: self._train(seed, cached, p, save)
                    )
                arms = self._testing_arms(seed, trained.get(seed))
                preflight(arms, self.setting)
                items[seed] = journal.phase(
                    f"test {seed}",
                    lambda p, save, seed=seed, arms=arms: test(arms, seed, self.setting, self.sizes, p, save),
                )
            arms = arms if len(self.protocol.seeds) == 1 else self._testing_arms(first, trained.get(first))
            for arm in arms:
                arm.error = items[first]["errors"][arm.name]
            timed = [
                journal.phase(f"timing {size}", lambda p, save, size=size: self._time(arms, size, p, save))
                for size in self.batches
            ]
            errors = {}
            for part in [*trained.values(), *items.values(), *timed[:1]]:
                errors |= {name: error for name, error in part["errors"].items() if error}
            record = results.record(self, arms, trained, items, errors, journal, source)
            record = record.model_copy(
                update=dict(wall_time=journal.before + time.monotonic() - started, peak_memory=process_peak() or 0)
            )
            store.write(record, self._samples(items), out)
        finally:
            lock.release()
        shutil.rmtree(folder, ignore_errors=True)
        return record

    def follow(self) -> None:
        """Train along with the first process, which tests, times and writes."""
        self._ground()
        cached = None
        for seed in self.protocol.seeds if self.trains else ():
            settle(self, seed)
            if self.protocol.train == "locked" and cached is None:
                cached = self._features(None, lambda state: None)
            self._train(seed, cached, None, lambda state: None)

    def _ground(self) -> None:
        """Make what all arms start from, where it is not there yet."""
        self.task.groundwork(self.prepared, self.backbone, self.protocol, self.live)
        self.recipe = self.task.recipe(self.prepared)

    def _features(self, partial: Partial | None, save: Any) -> Partial:
        return features(self._cached_arms(), self.setting, self.sizes, partial, save)

    def _cached_arms(self) -> list[Arm]:
        """The arms whose frozen tower's features can be computed once."""
        return [arm for arm in self.training_arms(self.protocol.seeds[0]) if self.caches_features(arm)]

    def caches_features(self, arm: Arm) -> bool:
        """Whether the tower is frozen and nothing inside it is trained, so that its features are computed once."""
        return self.protocol.train == "locked" and not arm.trains_in_frozen()

    def training_arms(self, seed: int) -> list[Arm]:
        """The arms that train weights of their own, freshly built under a seed."""
        arms = []
        for plan in self.training_plans():
            build = (self.task, self.recipe, self.backbone, self.protocol)
            plan = self.settled.get((plan.name, seed)) or settled(plan, *build, self.rehearsal)
            randomness.seed_all(seed)
            model, training = training_model(plan, *build)
            model, state = model.to(self.protocol.device), randomness.get_state()
            more = dict(each_step=training.each_step, losses=training.losses)
            arms.append(Arm(plan, model, state, training.frozen, training.trained, **more))
        return arms

    def _train(self, seed: int, cached: Partial | None, partial: Partial | None, save: Any) -> Partial:
        arms = self.training_arms(seed)
        if cached is not None:
            use_features([arm for arm in arms if arm.name in cached["random"]], cached, self.sizes)
        return train(arms, seed, self.setting, self.sizes, partial, save)

    def _time(self, arms: list[Arm], size: int, partial: Partial | None, save: Any) -> Partial:
        """Time one batch size. Beside the main one a failure (no memory for a large batch) fails no arm."""
        if size == self.batches[0]:
            return pairs(arms, size, self.stopping, self.setting, self.sizes, partial, save)
        before = {arm.name: arm.error for arm in arms}
        result = dict(kept_state(arms), index=-1, seconds=0.0)
        try:
            result = pairs(arms, size, Stopping(self.stopping.pairs), self.setting, self.sizes, partial, save)
        except BatchChanged:
            raise
        except EffbenchError as error:
            self.live.warn(f"batch {size} was not timed: {error}")
        for arm in arms:
            if arm.error != before[arm.name]:
                self.live.warn(f"{arm.name} was not timed at batch {size}: {arm.error}")
                arm.error = before[arm.name]
        return result

    def _testing_arms(self, seed: int, trained: Partial | None) -> list[Arm]:
        """Every arm as it is tested; an arm that trains nothing has the baseline's weights of the same seed."""
        arms = []
        for plan in self.plans:
            weights = trainer(plan, self.plans)
            whose = owner(plan, self.plans, trained["arms"] if trained else ())
            error = trained["errors"].get(whose, "") if trained and whose != "baseline" else ""
            state = trained["arms"][whose]["state"] if trained else {}
            randomness.seed_all(seed)
            model = torch.nn.Identity()
            plan = with_choices(plan, self.settled.get((weights.name, seed), weights))
            if not error:
                model = testing_model(
                    plan, self.task, self.recipe, self.backbone, self.protocol, state, self.calibration()
                )
            arms.append(Arm(plan, model, randomness.get_state(), error=error))
        return arms

    def calibration(self) -> calibration_set.CalibrationSet:
        """The training data that methods may look at."""
        return calibration_set.of_task(self.task, self.prepared, self.sizes["train"], self.setting.to_device)

    def _samples(self, items: dict[int, Partial]) -> pd.DataFrame:
        frames = [pd.DataFrame(self.setting.rows)]
        for seed, part in items.items():
            for arm, scores in part["items"].items():
                frames += [item_samples(arm, seed, name, results.items_of(score)) for name, score in scores.items()]
        return pd.concat([frame for frame in frames if len(frame)], ignore_index=True)


def run_id(created: datetime, task: str, digest: str) -> str:
    """Name of a record: when, what, and of which experiment."""
    return f"{created:%Y%m%d-%H%M%S}-{task}-{digest[:8]}"
