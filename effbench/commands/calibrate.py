"""`effbench calibrate`: how far this machine's figures can be trusted, measured and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effbench.quantities import duration, share
from effbench.terminal import console, say

Trials, Arms, Running = "Trials", "What is timed", "Running"


def calibrate(
    trials: Annotated[
        int, typer.Option(min=20, help="Of identical arms; 300 for a firm answer.", rich_help_panel=Trials)
    ] = 60,
    slower_trials: Annotated[
        int, typer.Option(min=0, help="Of an arm that is slower; 40 for a firm answer.", rich_help_panel=Trials)
    ] = 10,
    loaded_trials: Annotated[
        int, typer.Option(min=0, help="Of identical arms beside a process that loads a core.", rich_help_panel=Trials)
    ] = 0,
    slower: Annotated[
        float,
        typer.Option(
            parser=share,
            metavar="SHARE",
            show_default="5%",
            help="Extra work of the slower arm, as a share of a step.",
            rich_help_panel=Trials,
        ),
    ] = 0.05,
    until: Annotated[
        float,
        typer.Option(
            parser=share,
            metavar="SHARE",
            show_default="1%",
            help="Half-width at which a trial of the slower arm ends.",
            rich_help_panel=Trials,
        ),
    ] = 0.01,
    budget: Annotated[
        float,
        typer.Option(
            parser=duration,
            metavar="TIME",
            show_default="60s",
            help="But no longer than this.",
            rich_help_panel=Trials,
        ),
    ] = 60.0,
    backbone: Annotated[
        str, typer.Option(help="FAMILY:NAME, with random weights.", rich_help_panel=Arms)
    ] = "timm:vit_tiny_patch16_224",
    batch: Annotated[int, typer.Option(min=1, help="Images a step.", rich_help_panel=Arms)] = 1,
    pairs: Annotated[int, typer.Option(min=6, help="Timed pairs a trial.", rich_help_panel=Arms)] = 30,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: all cores.", rich_help_panel=Running)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.", rich_help_panel=Running)] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder; default: the cache, where runs look for it.", rich_help_panel=Running),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of resuming.", rich_help_panel=Running)
    ] = False,
) -> None:
    """Measure how far this machine's figures can be trusted: time identical arms, and one that is truly slower.

    Takes about 3 minutes where nothing else runs; the firm answer about 15. The result is printed beside the
    speed-ups of every later run with as many threads. The same command resumes a calibration that was stopped.
    """
    from effbench import calibrate as calibration
    from effbench.live import Live
    from effbench.measure.environment import cores, device_model, provenance
    from effbench.report.calibration import print_calibration
    from effbench.start import device_named
    from effbench.trials import measure

    device = device_named(device)
    setting = calibration.Setting(
        device_model=device_model(device),
        threads=threads or cores(),
        backbone=backbone,
        batch=batch,
        pairs=pairs,
        slower=slower,
        until=until,
        budget=budget,
        effbench=provenance("").effbench,
    )
    wanted = dict(same=trials, slower=slower_trials, loaded=loaded_trials)
    log = calibration.Log(setting, out, fresh)
    if all(log.count(kind) >= number for kind, number in wanted.items()):
        log = calibration.Log(setting, out, fresh=True)  # that calibration was finished: another is asked for
    known, finished = calibration.load(setting.device_model, setting.threads, out), False
    try:
        with Live() as live:
            if log.trials:
                live.note(f"resuming after {len(log.trials)} trials")
            measure(log, wanted, device, live)
        finished = True
    finally:  # an interrupted calibration is worth what it has
        same = log.count("same")
        if log.trials:
            print_calibration(setting, log.trials, console())
            say(f"trials: {log.file}")
        better = fresh or known is None or known.trials <= same
        if not better:
            say(f"the calibration of {known.created:%Y-%m-%d} has {known.trials} A/A trials, not {same}, and is kept")
        elif finished or same >= calibration.LEAST:
            say(f"calibration: {calibration.store(calibration.summary(setting, log.trials), out)}")
