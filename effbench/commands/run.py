"""`effbench run`: what is asked on the command line, handed to `effbench.start.run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from effbench.commands import given
from effbench.commands.preset import run_preset
from effbench.errors import InvalidError
from effbench.quantities import duration, share
from effbench.terminal import console, say

if TYPE_CHECKING:
    from effbench.records import Record

What, Training, Timing, Running = "What is compared", "Training", "Timing", "Running"
Writing = "Captioning"
#: what --quick asks for in place of the defaults
QUICK = dict(data_share=0.25, epochs=4, batch_size=64, timing_pairs=10, memory_runs=1)


def run(
    context: typer.Context,
    method: Annotated[
        list[str] | None,
        typer.Option(help="An arm: NAME[:param=value,...], joined by + for a stack. Repeatable.", rich_help_panel=What),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A whole comparison by name; effbench list presets", rich_help_panel=What)
    ] = None,
    task: Annotated[str, typer.Option(help="effbench list tasks", rich_help_panel=What)] = "flickr8k",
    backbone: Annotated[
        str, typer.Option(help="FAMILY:NAME; auto takes the weights that it finds.", rich_help_panel=What)
    ] = "auto",
    weights: Annotated[
        str | None, typer.Option(help="A file of weights, or random (time and FLOPs only).", rich_help_panel=What)
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Tag of weights that the library downloads.", rich_help_panel=What)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="PATH of a copy; real: no stand-in; scenes: the embedded images.", rich_help_panel=What),
    ] = None,
    train: Annotated[
        Literal["none", "locked", "full"] | None,
        typer.Option(help="locked: the image tower is frozen; default: the task's.", rich_help_panel=Training),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=0, help="Default: the task's recommendation.", rich_help_panel=Training)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Images per training step; default: the task's.", rich_help_panel=Training)
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=8, help="Side in pixels; default: the backbone's.", rich_help_panel=Training)
    ] = None,
    head: Annotated[
        Literal["cosine", "sigmoid", "bilinear"], typer.Option(help="Similarity and loss.", rich_help_panel=Training)
    ] = "cosine",
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate; default: the task's.", rich_help_panel=Training)
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(min=0, help="Default: the task's.", rich_help_panel=Training)
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Trainings per arm; a claim about quality needs 3.", rich_help_panel=Training)
    ] = 1,
    data_share: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the training split.", rich_help_panel=Training)
    ] = 1.0,
    dev_checks: Annotated[
        int,
        typer.Option(min=1, help="Looks at the dev split per epoch; the best one is kept.", rich_help_panel=Training),
    ] = 1,
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="Of training; bf16 by autocast.", rich_help_panel=Training)
    ] = "fp32",
    decoder: Annotated[
        str | None,
        typer.Option(
            help="tiny (a Llama made here, default), or hf:PATH of a causal language model.", rich_help_panel=Writing
        ),
    ] = None,
    decoder_layers: Annotated[
        int | None,
        typer.Option(min=1, help="Of the tiny decoder; default: the task's, else 6.", rich_help_panel=Writing),
    ] = None,
    decoder_width: Annotated[
        int | None,
        typer.Option(
            min=8, help="Of the tiny decoder, a multiple of 64; default: the task's, else 256.", rich_help_panel=Writing
        ),
    ] = None,
    decoder_init: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Spread of the tiny decoder's first weights; default: the task's, else 0.02.",
            rich_help_panel=Writing,
        ),
    ] = None,
    image_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="That the decoder gets, a square; 0: all patches; default: the task's, else 49.",
            rich_help_panel=Writing,
        ),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE/STAGE|none",
            help="What the arms start from: language (text alone), align (connector), tune; default: the first two.",
            rich_help_panel=Writing,
        ),
    ] = None,
    language_epochs: Annotated[
        int | None, typer.Option(min=1, help="Of the language stage; default 4.", rich_help_panel=Writing)
    ] = None,
    align_epochs: Annotated[
        int | None, typer.Option(min=1, help="Of the align stage; default 2.", rich_help_panel=Writing)
    ] = None,
    align: Annotated[
        Literal["connector", "all"] | None,
        typer.Option(
            help="What alignment trains: the connector (default), or the decoder too.", rich_help_panel=Writing
        ),
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option(min=1, help="Of the search for the best text; 1 (default): greedy.", rich_help_panel=Writing),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of an answer; default: the task's, else 24.", rich_help_panel=Writing),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens that a timed step writes; default: the task's, else 20.", rich_help_panel=Writing
        ),
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(
            metavar="N/N/...",
            help="Examples before a query, of a few-shot task: one quality pass for each; default: 0/2/4/8.",
            rich_help_panel=Writing,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: all cores.", rich_help_panel=Timing)
    ] = None,
    timing_batch: Annotated[int, typer.Option(min=1, help="Images per timed step.", rich_help_panel=Timing)] = 16,
    timing_pairs: Annotated[
        int, typer.Option(min=0, help="Timed pairs of baseline and arm.", rich_help_panel=Timing)
    ] = 30,
    until: Annotated[
        float | None,
        typer.Option(
            parser=share, metavar="SHARE", help="Time on until intervals are this narrow: 2%.", rich_help_panel=Timing
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            parser=duration, metavar="TIME", help="Time no longer than this, e.g. 60s.", rich_help_panel=Timing
        ),
    ] = None,
    batch_sweep: Annotated[
        str,
        typer.Option(
            metavar="N/N/...", help="Time these batch sizes too: from which on does it pay?", rich_help_panel=Timing
        ),
    ] = "",
    memory_runs: Annotated[
        int, typer.Option(min=0, help="Fresh processes per arm that measure memory; 0: none.", rich_help_panel=Timing)
    ] = 3,
    controls: Annotated[
        str,
        typer.Option(
            metavar="NAME/...",
            help="Judges: random, grid, norm (same tokens or blocks), resize (same FLOPs), part (of a stack); or none.",
            rich_help_panel=What,
        ),
    ] = "random/resize/part",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.", rich_help_panel=Running)] = "auto",
    engine: Annotated[
        Literal["plain", "deepspeed"], typer.Option(help="What updates the weights.", rich_help_panel=Training)
    ] = "plain",
    zero_stage: Annotated[
        int, typer.Option(min=0, max=3, help="What DeepSpeed's ZeRO shards.", rich_help_panel=Training)
    ] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of the leaderboard and its records.", rich_help_panel=Running)
    ] = Path("leaderboard"),
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A first look: "
            + ", ".join(f"--{k.replace('_', '-')} {v:g}" for k, v in QUICK.items())
            + ", where not set.",
            rich_help_panel=Running,
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, its time and memory.", rich_help_panel=Running)
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of resuming.", rich_help_panel=Running)
    ] = False,
    checkpoint_every: Annotated[
        float, typer.Option(min=0, help="Seconds of steps between checkpoints.", rich_help_panel=Running)
    ] = 60.0,
    log: Annotated[
        Literal["mlflow"] | None,
        typer.Option(help="Log the record to MLflow too (MLFLOW_TRACKING_URI).", rich_help_panel=Running),
    ] = None,
) -> int:
    """Compare methods with the baseline and its controls under one protocol, and write the leaderboard.

    Without --method the baseline runs alone with its controls. The same command resumes a run that was stopped.
    """
    if preset is not None:
        return run_preset(preset, context)
    from effbench.report.show import print_record
    from effbench.start import run as run_experiment

    asked = dict(
        backbone=backbone,
        weights=weights,
        pretrained=pretrained,
        data=data,
        train=train,
        epochs=epochs,
        batch_size=batch_size,
        image_size=image_size,
        head=head,
        lr=lr,
        weight_decay=weight_decay,
        seeds=seeds,
        data_share=data_share,
        dev_checks=dev_checks,
        precision=precision,
        captioning=dict(
            decoder=decoder,
            layers=decoder_layers,
            width=decoder_width,
            init=decoder_init,
            image_tokens=image_tokens,
            stages=None if stages is None else tuple(s for s in stages.split("/") if s not in ("", "none")),
            language_epochs=language_epochs,
            align_epochs=align_epochs,
            align=align,
            beams=beams,
            max_tokens=max_tokens,
            new_tokens=new_tokens,
            shots=None if shots is None else tuple(shots.replace(",", "/").split("/")),
        ),
        threads=threads,
        timing_batch=timing_batch,
        timing_pairs=timing_pairs,
        until=until,
        budget=budget,
        batch_sweep=batch_sweep,
        memory_runs=memory_runs,
        controls=controls,
        device=device,
        engine=engine,
        zero_stage=zero_stage,
        out=out,
        dry_run=dry_run,
        fresh=fresh,
        checkpoint_every=checkpoint_every,
        log=log,
    )
    if quick:
        told = given(context)
        asked |= {name: value for name, value in QUICK.items() if name not in told}
    record = run_experiment(method or [], task, **asked)
    if record is None:
        return 0
    print_record(record, console())
    say(f"\nleaderboard: {out / 'README.md'}, as a page to sort and filter: {out / 'index.html'}")
    return exit_code(record)


def exit_code(record: Record) -> int:
    """What a command that shows a record exits with: 2 for an invalid one, 1 where an arm failed, else 0."""
    if record.status == "INVALID":
        return InvalidError.exit_code
    return int(any(arm.status == "FAILED" for arm in record.arms))
