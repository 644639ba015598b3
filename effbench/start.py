"""From what is asked for to a record: finds data and weights, fixes the protocol, runs the experiment."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from effbench import distributed, log_mlflow
from effbench.arms import CONTROLS
from effbench.datasets import Resolved, resolve
from effbench.errors import UsageError
from effbench.experiment import Experiment
from effbench.live import Live
from effbench.measure.environment import cores
from effbench.measure.threads import threads as threads_of_torch
from effbench.models.choose import choose
from effbench.records import Captioning, Protocol, Record
from effbench.registry import backbones
from effbench.registry import methods as methods_known
from effbench.report.leaderboard import write_leaderboard
from effbench.spec import ALWAYS, canonical, parse
from effbench.terminal import console
from effbench.timing import Stopping


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
    dev_checks: int = 1,
    precision: str = "fp32",
    captioning: dict[str, Any] | None = None,
    threads: int | None = None,
    timing_batch: int = 16,
    timing_pairs: int = 30,
    until: float | None = None,
    budget: float | None = None,
    batch_sweep: str = "",
    memory_runs: int = 3,
    controls: str | Sequence[str] = "random/resize/part",
    device: str = "auto",
    engine: str = "plain",
    zero_stage: int = 0,
    out: Path | str = "leaderboard",
    dry_run: bool = False,
    fresh: bool = False,
    checkpoint_every: float = 60.0,
    log: str | None = None,
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
        dev_checks: looks at the dev split per epoch; the weights of the best one are kept.
        precision: of training: "fp32", or "bf16" for autocast.
        captioning: of a task that writes text, fields of `effbench.records.Captioning` that differ from what the task
            recommends, e.g. dict(decoder="tiny", layers=8).
        threads: of the CPU; None for all cores.
        timing_batch: images per timed step; timing_pairs: timed steps per arm.
        until: go on timing until every interval's half-width is this share of the speed-up, e.g. 0.02; budget: but no
            longer than these seconds (300 where only `until` is given). One image at a time (latency) and the batches
            of a sweep take `timing_pairs` steps each.
        batch_sweep: further batch sizes to time, e.g. "4/64", to see from which one on a method pays.
        memory_runs: fresh processes per arm and kind of step that memory is the median of; 0 measures none.
        controls: arms that are added to judge the methods by: "random", "grid" and "norm" (the same token budget,
            chosen blindly), "resize" (the same FLOPs from smaller images), "part" (each method of a stack alone);
            joined by /, or "none".
        device: "cpu", "cuda" or "cuda:1"; "auto" takes the GPU if there is one.
        engine: "plain", or "deepspeed" for training; zero_stage: what DeepSpeed's ZeRO shards.
        out: folder of the leaderboard.
        dry_run: show the arms, the time and the memory that it would take, and return None.
        fresh: ignore what an interrupted run of the same experiment left.
        checkpoint_every: seconds of a step group, the unit of resume.
        log: "mlflow" logs the record there too (`effbench.log_mlflow`).
        live: shows progress; None for the terminal.

    Returns:
        The record, or None after a dry run.

    Raises:
        UsageError: something asked for cannot be. InvalidError: data or weights are missing or damaged.
        EffbenchError: the baseline failed, or the disk is full; the same call goes on from the last step group.
    """
    started = time.monotonic()
    log_mlflow.check(log)
    if added := set(ALWAYS) & set(methods):
        raise UsageError(f"{added.pop()} is an arm of every run", "leave it out")
    if wrong := [spec for spec in methods if not isinstance(spec, str)]:
        hint = "register it (effbench new method NAME) and name it; effbench.apply takes methods as objects"
        raise UsageError(f"{wrong[0]!r} is not a spec such as 'token_prune:keep=0.5'", hint)
    stacks = [parse(spec) for spec in methods]
    sweep = _sizes(batch_sweep)
    judges = [name for name in controls.split("/") if name] if isinstance(controls, str) else list(controls)
    if unknown := set(judges) - {*CONTROLS, "none"}:
        raise UsageError(f"{min(unknown)} is no control", f"controls: {', '.join(CONTROLS)}, or none")
    if threads is not None and not 1 <= threads <= cores():
        most = cores()
        raise UsageError(f"--threads {threads}: this process may use {most} cores", f"use 1 to {most}, or leave it out")
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: at least one seed is needed", "leave it out for one seed")
    others = distributed.rank() > 0  # they train along in silence
    with live or Live(Console(quiet=True) if others else None) as live:
        for spec, times in Counter(map(canonical, stacks)).items():
            if times > 1:
                live.warn(f"{spec} is asked for {times} times and runs once")
        found = resolve(task, data, live.progress)
        if found.stood_in:
            live.banner(f"NO REAL {task.upper()} DATA: RUNNING ON {found.data.name.upper()}", [found.looked])
        options = captioning_options(found, captioning, backbone)
        tower, banner = choose(backbone, weights, pretrained, embedded=found.data.synthetic, image_size=image_size)
        if banner:
            live.banner("NO PRETRAINED WEIGHTS: RUNNING ON THE SHIPPED TOWER", banner)
        for note in tower.notes:
            live.warn(note)
        if weights == "random":
            live.warn("random weights: time and FLOPs mean something, quality does not")
        asked = dict(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, train=train)
        given = {name: value for name, value in asked.items() if value is not None}
        protocol = _protocol(
            found.recommended | given,
            captioning=options,
            precision=precision,
            image_size=tower.image_size,
            head=head,
            seeds=tuple(range(seeds)),
            threads=threads or max(1, cores() // distributed.launched()),
            timing_batch=timing_batch,
            timing_pairs=timing_pairs,
            data_share=data_share,
            dev_checks=dev_checks,
            device=device_named(device),
            engine=engine,
            zero_stage=zero_stage,
            processes=distributed.launched(),
        )
        stopping = Stopping(timing_pairs, until, budget)
        with threads_of_torch(protocol.threads):
            experiment = Experiment(
                found.task, task, found.data, tower, stacks, protocol, live, stopping, sweep, memory_runs, judges
            )
            experiment.check()
            sizes = " / ".join(f"{n:,} {split}" for split, n in experiment.sizes.items())
            live.note(f"data: {found.data.name}, {sizes} images; {found.data.origin}")
            live.note(
                f"backbone: {tower}, weights {tower.origin['weights'] or tower.origin['pretrained'] or 'shipped'}"
            )
            used = {type(method).__module__ for stack in stacks for method in stack}
            for entry in methods_known.entries():
                if entry.module in used and entry.distribution != "effbench":
                    live.note(f"{entry.name} is from {entry.distribution}; effbench check {entry.name} tests it")
            if dry_run:
                from effbench.dry_run import show

                show(experiment, console())
                return None
            if others:
                experiment.follow()
                return None
            if protocol.processes > 1:  # no state of all processes is kept: they would not resume at the same step
                live.note(f"{protocol.processes} processes train together; if stopped, they start again")
                checkpoint_every, fresh = math.inf, True
            record = experiment.run(Path(out), checkpoint_every, fresh, started, _command())
        write_leaderboard(Path(out))
        if log:
            log_mlflow.log_or_warn(Path(out) / "records" / record.id, live.warn, live.note)
        return record


def captioning_options(found: Resolved, asked: dict[str, Any] | None, backbone: str = "auto") -> Captioning | None:
    """How a task writes text; None where it writes none.

    Args:
        found: the task with its data. asked: fields of `Captioning`, None for what is recommended.
        backbone: as it is asked for; one that is a whole vision-language model writes by itself.

    Raises:
        UsageError: something is asked for that cannot be, or of a task that writes none.
    """
    from pydantic import ValidationError

    given = {name: value for name, value in (asked or {}).items() if value is not None}
    family, _, name = backbone.partition(":")
    own = bool(name) and backbones.get(family).writes
    if not found.task.writes:
        if given:
            option = min(CAPTIONING_OPTIONS.get(name, name) for name in given)
            raise UsageError(f"--{option} is for tasks that write text", "use --task flickr8k_caption, or leave it out")
        if own:
            raise UsageError(
                f"{backbone} writes text and has no pair of towers to align", "use --task flickr8k_caption"
            )
        return None
    values = found.source.recommended.get("captioning", {}) | given
    decoder = values.get("decoder", "tiny")
    if own:
        said = [option for option in ("decoder", "layers", "width", "init", "image_tokens") if option in given]
        said = [option for option in said if given[option] != "own"]
        if said:
            told = f"--{CAPTIONING_OPTIONS[said[0]]} {given[said[0]]}"
            raise UsageError(f"{told}: {backbone} brings its own decoder and connector", "leave it out")
        decoder = values["decoder"] = "own"
        values["image_tokens"] = 0  # as many as it makes
    elif decoder == "own":
        raise UsageError("--decoder own is the decoder of a whole model", "name one with --backbone hf:PATH_OR_NAME")
    if decoder != "tiny":
        if not own and not (decoder.startswith("hf:") and decoder != "hf:"):
            raise UsageError(
                f"--decoder {decoder} is not known", "use tiny, or hf:PATH of a causal language model of transformers"
            )
        for option in ("layers", "width", "init"):
            if option in given:
                told = f"--{CAPTIONING_OPTIONS[option]} {given[option]}"
                raise UsageError(f"{told} is of the tiny decoder, and {decoder} brings its own", "leave it out")
            values.pop(option, None)
        if "stages" not in given:
            values["stages"] = () if own else ("align",)  # it knows its language, and a whole model images too
    for stage in given.get("stages", ()):
        if stage not in STAGES:
            raise UsageError(f"--stages: there is no stage {stage}", f"write {'/'.join(STAGES)}, some of them, or none")
    stages = [stage for stage in STAGES if stage in values.get("stages", ())]
    if "stages" in given and list(given["stages"]) != stages:
        raise UsageError(f"--stages {'/'.join(given['stages'])}: they follow one another", f"write {'/'.join(stages)}")
    try:
        return Captioning(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if name not in Captioning.model_fields:
            raise UsageError(
                f"captioning: {name} is unknown", f"fields: {', '.join(Captioning.model_fields)}"
            ) from None
        option = CAPTIONING_OPTIONS.get(name, name)
        raise UsageError(f"--{option} {first['input']}: {first['msg'].lower()}", "see effbench run --help") from None


STAGES = ("language", "align", "tune")
#: the command line's names of the fields of `Captioning`
CAPTIONING_OPTIONS = dict(
    decoder="decoder",
    layers="decoder-layers",
    width="decoder-width",
    init="decoder-init",
    image_tokens="image-tokens",
    stages="stages",
    language_epochs="language-epochs",
    align_epochs="align-epochs",
    align="align",
    beams="beams",
    max_tokens="max-tokens",
    new_tokens="new-tokens",
    shots="shots",
)


def _protocol(values: dict[str, Any], **more: Any) -> Protocol:
    from pydantic import ValidationError

    try:
        return Protocol(**values, **more)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UsageError(f"--{option} {first['input']}: {first['msg'].lower()}", "see effbench run --help") from None


def _sizes(text: str) -> tuple[int, ...]:
    """`1/4/16` as numbers.

    Raises:
        UsageError: one is no batch size.
    """
    try:
        sizes = tuple(int(size) for size in text.replace(",", "/").split("/") if size)
    except ValueError:
        sizes = (0,)
    if any(size < 1 for size in sizes):
        raise UsageError(f"--batch-sweep {text}: not batch sizes", "write them like --batch-sweep 1/4/16/64")
    return sizes


def device_named(asked: str) -> str:
    """The device to run on.

    Raises:
        UsageError: there is no such device.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(asked).type
    except RuntimeError:
        kind = ""
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {asked}: torch sees no GPU here", "use --device cpu; effbench doctor shows more")
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {asked} is not known", "use cpu, cuda or cuda:1")
    return asked


def _command() -> str:
    import shlex

    path = Path(sys.argv[0])
    name = path.parent.name if path.name == "__main__.py" else path.name
    return shlex.join([name, *sys.argv[1:]]) if name == "effbench" else ""
