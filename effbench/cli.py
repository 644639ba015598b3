"""The command line, a thin layer. Exit codes: 0 ok, 1 failure, 2 invalid or no data, 3 usage, 130 interrupted."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.exceptions import TyperException

from effbench.commands.calibrate import calibrate
from effbench.commands.check import check as check_plugin
from effbench.commands.compare import compare
from effbench.commands.data import check, get
from effbench.commands.export import export
from effbench.commands.flops import flops
from effbench.commands.gate import gate
from effbench.commands.plot import plot
from effbench.commands.recommend import recommend
from effbench.commands.run import exit_code, run
from effbench.commands.sweep import sweep
from effbench.errors import EffbenchError, InvalidError, Stopped, UsageError
from effbench.terminal import console, say, say_error

CLOSED_PIPE = 141  # 128 + SIGPIPE, as of other programs
KEPT = "finished work is kept, and the same command goes on from there"


def _app(help: str) -> typer.Typer:
    return typer.Typer(
        help=help,
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _examples(*lines: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"  {line}" for line in lines)


app = _app("Does this efficiency method really make my model cheaper, and what does it cost in quality?")
data = _app("Get and check data sets.")
new = _app("Start a plugin of your own.")
app.add_typer(data, name="data")
app.add_typer(new, name="new")

Out = Annotated[Path, typer.Option("--out", help="Folder of the leaderboard and its records.", show_default=True)]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"effbench {version('effbench')}")
        raise typer.Exit()


@app.callback(epilog=_examples("effbench run --method token_prune --task flickr8k", "effbench leaderboard"))
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; allowed anywhere.")] = False,
) -> None:
    pass


app.command(
    epilog=_examples(
        "effbench run --method token_prune --task flickr8k",
        "effbench run --method token_prune:keep=0.5,at=3/6/9 --method token_prune:score=norm --seeds 3",
        "effbench run --method token_prune --until 2% --budget 60s --batch-sweep 4/64",
        "effbench run --method token_prune --backbone timm:deit_tiny_patch16_224 --weights deit.safetensors",
        "effbench run --method token_prune --task scenes --dry-run",
        "effbench run --preset course-report",
    )
)(run)
app.command(
    epilog=_examples(
        "effbench sweep sweeps/tokens.yaml --dry-run",
        "effbench sweep sweeps/encoders.yaml --out results",
        "effbench sweep sweeps/tokens.yaml --fresh",
    )
)(sweep)
app.command(
    epilog=_examples(
        "effbench flops timm:deit_tiny_patch16_224",
        "effbench flops openclip:ViT-B-32 --batch 8 --layers",
        "effbench flops timm:vit_base_patch16_224 --method token_prune:keep=0.5 --json",
        "effbench flops timm:deit_small_patch16_224 --train",
    )
)(flops)
app.command(
    epilog=_examples("effbench calibrate", "effbench calibrate --trials 300 --slower-trials 40 --loaded-trials 5")
)(calibrate)
app.command(
    epilog=_examples(
        "effbench gate --reference tests/reference/scenes",
        "effbench gate --reference 20260102-scenes latest --out results",
        "effbench gate --times --reference main",
        "effbench gate --drift --since 2026-01-31",
    )
)(gate)
app.command(
    epilog=_examples(
        "effbench plot", "effbench plot pareto --width two --format svg", "effbench plot keep-rate latest --to figures"
    )
)(plot)
app.command(
    "check",
    epilog=_examples(
        "effbench check token_prune",
        "effbench check token_prune --spec 'token_prune:keep=0.5,score=norm'",
        "effbench check token_prune --backbone timm:test_vit",
        "effbench check scenes --json",
    ),
)(check_plugin)
app.command(
    epilog=_examples(
        "effbench compare 20260102-scenes latest",
        "effbench compare main HEAD --out results",
        "effbench compare v0.1 tests/reference/scenes --markdown",
    )
)(compare)
app.command(
    epilog=_examples(
        "effbench export --to results.parquet",
        "effbench export latest --samples --to steps.parquet",
        "effbench export --out results --to results.csv --force",
        "effbench export latest --log mlflow",
    )
)(export)
app.command(
    epilog=_examples(
        "effbench recommend --max-lossiness 1% --device cpu",
        "effbench recommend --max-lossiness 2% --task flickr8k --backbone timm:deit_tiny_patch16_224",
        "effbench recommend --max-lossiness 0.5% --out results --json",
    )
)(recommend)
data.command(epilog=_examples("effbench data get flickr8k", "effbench data get flickr8k --to /data/flickr8k"))(get)
data.command(epilog=_examples("effbench data check flickr8k", "effbench data check flickr8k --data PATH"))(check)


@app.command(epilog=_examples("effbench leaderboard", "effbench leaderboard --out results"))
def leaderboard(out: Out = Path("leaderboard")) -> None:
    """Write the leaderboard anew from the records."""
    from effbench.report.leaderboard import write_leaderboard

    if not (out / "records").is_dir():
        raise InvalidError(f"there are no runs in {out}", "make one with effbench run, or name the folder with --out")
    problems: list[str] = []
    page = write_leaderboard(out, problems)
    if problems:
        say(f"left out: {len(problems)} that cannot be read, all named in {page}; the first: {problems[0]}")
    say(f"leaderboard: {page}, as a page to sort and filter: {out / 'index.html'}")


@app.command(epilog=_examples("effbench show latest", "effbench show 20260102-flickr8k --out results"))
def show(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Id or its beginning, latest, or a record's folder.")],
    out: Out = Path("leaderboard"),
) -> int:
    """Show one run."""
    from effbench import store
    from effbench.report.show import print_record

    record = store.read(store.find(out, name))
    print_record(record, console())
    return exit_code(record)


@app.command(
    "list",
    epilog=_examples(
        "effbench list", "effbench list methods", "effbench list methods token_prune", "effbench list runs"
    ),
)
def list_(
    kind: Annotated[
        Literal["methods", "tasks", "backbones", "presets", "runs"] | None,
        typer.Argument(help="Default: all but runs."),
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One of them, in detail: a method's parameters.")] = None,
    out: Out = Path("leaderboard"),
) -> None:
    """List methods, tasks, backbones and presets, built-in or from plugins, or the runs."""
    from effbench import listing

    if kind == "runs":
        listing.runs(out, console(least=100))
    elif name is not None:
        listing.detail(kind, name, console())
    else:
        for each in [kind] if kind else ["methods", "tasks", "backbones", "presets"]:
            listing.plugins(each, console())


@app.command(epilog=_examples("effbench doctor"))
def doctor() -> int:
    """Show what is installed, the devices, and the data and weights that were found."""
    from effbench.doctor import examine

    return examine(console())


PluginName = Annotated[str, typer.Argument(help="Its name: lower case, digits and _.")]
To = Annotated[Path, typer.Option(help="Folder to make the package in.")]
Install = Annotated[
    bool, typer.Option("--install/--no-install", help="Let pip install it here, so that effbench finds it (editable).")
]


@new.command(
    "method", epilog=_examples("effbench new method half_depth", "effbench new method half_depth --to plugins")
)
def new_method(name: PluginName, to: To = Path("."), install: Install = True) -> None:
    """Write a package with a method that works, its test and its README, and install it."""
    from effbench.scaffold import write_method

    _made("method", name, write_method(name, to), install, f"effbench run --method {name} --task scenes --quick")


@new.command("task", epilog=_examples("effbench new task my_photos", "effbench new task my_photos --no-install"))
def new_task(name: PluginName, to: To = Path("."), install: Install = True) -> None:
    """Write a package with a retrieval task on a folder of images and captions, its test and its README; install it."""
    from effbench.scaffold import write_task

    _made("task", name, write_task(name, to), install, f"effbench run --task {name} --method token_prune")


def _made(kind: str, name: str, folder: Path, installs: bool, run: str) -> None:
    """Say what was written, install it, and say what comes next."""
    from effbench.scaffold import install

    say(f"wrote {folder}: the {kind} is effbench_{name}/{name}.py in it")
    if installs:
        say(f"installed {folder.name} into {install(folder)}, editable; pip uninstall {folder.name} removes it")
    else:
        say(f"not installed: pip install -e {folder}")
    say(f"next:  effbench check {name}\n       {run}")


def share_cores() -> None:
    """Let OpenMP's threads give up waiting soon, unless the user set how they wait; only before torch is imported.

    By default they spin: with one of two cores loaded by another process a step of ViT-tiny took 190 ms, 95 ms with a
    count of 10000 and 54 ms, always the same, with this one; on idle cores 20 ms with each of them.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; every error is one line and the next step on stderr.

    Args:
        arguments: what follows `effbench` on the command line; None for the process's own.
    """
    share_cores()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a letter gets a ?
    with suppress(ValueError):  # not in the main thread: then somebody else deals with signals
        signal.signal(signal.SIGTERM, _stop)
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="effbench", standalone_mode=False)
    except BaseException as error:
        if debug and not isinstance(error, SystemExit):
            traceback.print_exc()
        return _explain(error)
    return _explain(KeyboardInterrupt()) if code == Stopped.exit_code else code or 0


def _stop(*_: object) -> None:
    """A scheduler's SIGTERM ends a run as Ctrl-C does: what is finished is kept, and it says so."""
    raise KeyboardInterrupt


def _explain(error: BaseException) -> int:
    """Say what went wrong and what to do next; the exit code."""
    match error:
        case EffbenchError():
            say_error(str(error), error.hint)
            return error.exit_code
        case TyperException():
            context = getattr(error, "ctx", None)
            if message := error.format_message():  # without a command typer has shown the help
                command = context.command_path if context else "effbench"
                say_error(message.replace("Value error, ", ""), f"{command} --help")
            return UsageError.exit_code
        case SystemExit(__context__=BrokenPipeError()):  # what reads it has closed the pipe, as head does
            return CLOSED_PIPE
        case KeyboardInterrupt() | typer.Abort():
            say_error(f"stopped; {KEPT}")
            return Stopped.exit_code
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            say_error(f"the disk is full{where}", f"make room; {KEPT}")
            return 1
        case Exception():
            say_error(f"{type(error).__name__}: {error}", "run again with --debug to see where")
            return 1
    raise error
