"""Sweeps: each task x backbone of a file becomes one experiment, and all that have no record yet are run."""

from __future__ import annotations

import errno
import hashlib
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench import log_mlflow, store
from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.sweep_file import BackboneEntry, Sweep, TaskEntry, read
from effbench.terminal import say
from effbench.whole_file import whole_file

if TYPE_CHECKING:
    from effbench.live import Live
    from effbench.method import Method
    from effbench.records import Record


@dataclass
class Planned:
    """One experiment of a sweep.

    Args:
        task, backbone: of the file. options: keywords of `effbench.start.run`.
        specs: the arms. left_out: those that the backbone cannot take, and why.
        key: digest of all this and of the data and weights that were found.
    """

    task: TaskEntry
    backbone: BackboneEntry
    options: dict[str, Any]
    specs: list[str]
    left_out: dict[str, str]
    key: str

    def __str__(self) -> str:
        return f"{self.task.name}, {self.backbone.name}, {len(self.specs)} method{'s'[len(self.specs) == 1 :]}"


@dataclass
class Outcome:
    """What became of an experiment; `record` is None where there is none, and then `error` says why."""

    planned: Planned
    record: Record | None = None
    error: str = ""
    ran: bool = True

    @property
    def failures(self) -> list[str]:
        if self.record is None:
            return [self.error]
        failed = [f"{arm.name} FAILED: {arm.error}" for arm in self.record.arms if arm.status == "FAILED"]
        return [f"INVALID: {self.record.why_invalid}", *failed] if self.record.status == "INVALID" else failed


def plan(path: Path, sweep: Sweep, live: Live) -> list[Planned]:
    """The experiments of a sweep: data and weights are found, and every stack is tried on the backbones.

    Raises:
        UsageError, InvalidError: what is asked for cannot be; names the file and the key.
    """
    shared = _stacks(f"{path}: methods", sweep.methods)
    found = []
    for task, (i, backbone) in product(sweep.tasks, enumerate(sweep.backbones)):
        stacks = _stacks(f"{path}: backbones[{i}].methods", backbone.methods) or shared
        try:
            found += _experiments(sweep, task, backbone, stacks, live)
        except (UsageError, InvalidError) as error:
            raise type(error)(f"{path}: {task.name} on {backbone.name}: {error}", error.hint) from error
    return found


def _stacks(where: str, entries: list[list[str]]) -> list[tuple[Method, ...]]:
    from effbench.spec import parse

    stacks = []
    for i, specs in enumerate(entries):
        try:
            stacks += map(parse, specs)
        except UsageError as error:
            raise UsageError(f"{where}[{i}]: {error}", error.hint) from error
    return stacks


def _experiments(
    sweep: Sweep, task: TaskEntry, backbone: BackboneEntry, stacks: list[tuple[Method, ...]], live: Live
) -> list[Planned]:
    """The experiments of one task on one backbone."""
    from effbench.calibration_set import rehearsal
    from effbench.datasets import resolve
    from effbench.models.choose import choose
    from effbench.records import Protocol
    from effbench.spec import canonical
    from effbench.start import captioning_options

    options = sweep.options.model_dump(exclude_unset=True) | backbone.options.model_dump(exclude_unset=True)
    found = resolve(task.name, task.data, live.progress)
    tower, _ = choose(
        backbone.name,
        backbone.weights,
        backbone.pretrained,
        embedded=found.data.synthetic,
        image_size=options.get("image_size"),
    )
    held = {name: value for name, value in options.items() if name in Protocol.model_fields and name != "device"}
    held = found.recommended | held
    held["captioning"] = captioning_options(found, options.get("captioning"), backbone.name)
    protocol = Protocol(**held | dict(image_size=tower.image_size))
    found.task.set_apart(found.data, protocol)
    prepared = found.task.prepare(found.data, tower, protocol, live.progress)
    recipe = found.task.recipe(prepared)
    available = found.data.sizes()["train"]
    if protocol.data_share < 1:
        available = round(available * protocol.data_share)
    rehearsed = rehearsal(found.task, prepared, protocol, available)
    reasons = {}
    for tried, stack in enumerate(stacks, 1):
        reasons[canonical(stack)] = _misfit(stack, found.task, recipe, tower, protocol, rehearsed)
        live.progress(f"trying the methods on {tower}", tried, len(stacks))
    fitting = [spec for spec, reason in reasons.items() if not reason]
    left_out = {spec: reason for spec, reason in reasons.items() if reason}
    options |= dict(seeds=sweep.seeds) | ({} if sweep.controls is None else dict(controls=sweep.controls))
    most = sweep.arms_per_run or len(stacks)
    planned = []
    for start in range(0, len(fitting) or 1, most):
        arms = fitting[start : start + most]
        facts = [task.name, found.data.name, found.data.fingerprint, str(tower), found.task.weights(prepared, tower)]
        facts += [arms, options]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        planned.append(Planned(task, backbone, options, arms, {} if start else left_out, key))
    return planned


def _misfit(stack: tuple[Method, ...], task: Any, recipe: Any, tower: Any, protocol: Any, rehearsal: Any) -> str:
    """Why a backbone cannot take a stack; empty where it can."""
    from effbench.arms import ArmPlan, try_out

    arm = ArmPlan("", stack)
    if arm.phase != "test" and (protocol.train == "none" or not protocol.epochs):
        return "it acts while training, but nothing is trained (options.train: locked or full)"
    try:
        try_out(arm, task, recipe, tower, protocol, rehearsal)
    except UsageError as error:
        return f"{error} ({error.hint})" if error.hint else str(error)
    return ""


def run(
    path: Path | str,
    out: Path | str = "leaderboard",
    *,
    dry_run: bool = False,
    fresh: bool = False,
    log: str | None = None,
    live: Live | None = None,
) -> list[Outcome]:
    """Run the experiments of a sweep that have no record yet, one after the other, and write one leaderboard.

    Args:
        path: the YAML file. out: folder of the leaderboard.
        dry_run: list the experiments, their arms, time and memory, and run none.
        fresh: run them all again.
        log: "mlflow" logs each new record there too (`effbench.log_mlflow`).
        live: shows progress; None for the terminal.

    Returns:
        one outcome per experiment, in the file's order; a dry run gives those alone that need not or cannot run. One
        that fails does not end the sweep.

    Raises:
        UsageError, InvalidError: the file asks for what cannot be, before any work. KeyboardInterrupt: stopped; the
            same call goes on.
    """
    log_mlflow.check(log)
    sweep, out = read(Path(path)), Path(out)
    from effbench import distributed
    from effbench.live import Live
    from effbench.report.leaderboard import write_leaderboard

    if distributed.launched() > 1:
        raise UsageError("a sweep runs in one process", "start it without torchrun, or single runs with it")
    live = live or Live()
    planned = plan(Path(path), sweep, live)
    if not any(each.specs for each in planned):
        spec, reason = next(iter(planned[0].left_out.items()))
        raise UsageError(f"{path}: no method fits any backbone; {spec}: {reason}", "change the file's methods")
    outcomes: list[Outcome] = []
    for number, each in enumerate(planned, 1):
        title = f"experiment {number} of {len(planned)}: {each}"
        known = None if fresh else _done(out, each)
        if dry_run:
            say("\n".join([title, *(f"  {spec}" for spec in each.specs)]))
        elif each.specs:
            live.note(title + (f", is there: {known.id}" if known else ""))
        for spec, reason in each.left_out.items():
            (say if dry_run else live.warn)(f"  {spec} is left out: {reason}")
        if known or not each.specs:
            outcomes.append(Outcome(each, known, "" if known else "no method fits this backbone", ran=False))
            continue
        try:
            record = _record(each, out=out, fresh=fresh, dry_run=dry_run, log=log, live=live)
        except KeyboardInterrupt:
            live.warn(f"stopped in experiment {number} of {len(planned)}")
            raise
        except Exception as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # no other experiment could be written either
            said = str(error) if isinstance(error, EffbenchError) else f"{type(error).__name__}: {error}"
            live.warn(f"experiment {number} failed: {said}")
            outcomes.append(Outcome(each, error=said))
            continue
        if record is not None:
            outcomes.append(Outcome(each, record))
    if not dry_run and any(outcome.record for outcome in outcomes):
        write_leaderboard(out)
    return outcomes


def _record(planned: Planned, *, out: Path, **how: Any) -> Record | None:
    """Run one experiment and note which record answers it; None after a dry run."""
    from effbench import start

    task, backbone = planned.task, planned.backbone
    found = dict(data=task.data, backbone=backbone.name, weights=backbone.weights, pretrained=backbone.pretrained)
    record = start.run(planned.specs, task.name, out=out, **found, **planned.options, **how)
    if record is not None:
        with whole_file(out / ".sweeps" / planned.key) as file:
            file.write_text(record.id, encoding="utf-8")
    return record


def _done(out: Path, planned: Planned) -> Record | None:
    """The valid record of an earlier run of the same experiment."""
    try:
        name = (out / ".sweeps" / planned.key).read_text(encoding="utf-8")
        record = store.read(out / "records" / Path(name).name)
    except (OSError, ValueError, InvalidError):
        return None
    return record if record.status == "ok" else None
