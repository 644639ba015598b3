"""The command line: exit codes, messages, and that nothing is lost between it and the functions below it."""

import errno
import inspect
from types import SimpleNamespace

import pytest

import effbench
from effbench.cli import app, main
from effbench.commands.run import exit_code
from effbench.errors import InvalidError


@pytest.fixture
def cli(capsys):
    """Run a command: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main(list(arguments))
        return (code, *capsys.readouterr())

    return run


def commands(group=app, path=()):
    for command in group.registered_commands:
        yield *path, command.name or command.callback.__name__
    for sub in group.registered_groups:
        yield from commands(sub.typer_instance, (*path, sub.name))


@pytest.mark.parametrize("command", [(), *commands()], ids=" ".join)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_help_has_examples(cli, command, flag):
    code, out, _ = cli(*command, flag)
    assert code == 0 and "Examples" in out and "effbench " + " ".join(command) in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("run --method nonsense", 3, "unknown method 'nonsense'"),
        ("run --method token_prune:keep=2", 3, "keep takes a number, > 0, <= 1"),
        ("run --task nonsense", 3, "unknown task 'nonsense'"),
        ("run --epochs many", 3, "Invalid value for '--epochs'"),
        ("run --train sometimes", 3, "'sometimes' is not one of"),
        ("run --nonsense", 3, "No such option: --nonsense"),
        ("nonsense", 3, "No such command 'nonsense'"),
        ("list nonsense", 3, "'nonsense' is not one of 'methods'"),
        ("list methods token_prun", 3, "did you mean token_prune"),
        ("show nonsense --out nowhere", 3, "no run in nowhere"),
        ("data get nonsense", 3, "unknown task 'nonsense'"),
        ("data get scenes", 3, "nothing to download for scenes"),
        ("data check flickr8k --data nowhere", 2, "nowhere"),
        ("new method token_prune", 3, "there is a method token_prune already"),
        ("new method ../evil", 3, "cannot name a method"),
    ],
)
def test_bad_input_is_one_message_a_next_step_and_an_exit_code(cli, monkeypatch, tmp_path, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EFFBENCH_DATA", raising=False)
    got, _, err = cli(*arguments.split())
    assert got == code
    lines = err.rstrip().splitlines()
    assert lines[-2].startswith("error: ") and said in lines[-2]
    assert lines[-1].startswith("next:  ") and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_version_and_bare_command(cli):
    assert cli("--version")[:2] == (0, f"effbench {effbench.__version__}\n")
    code, out, err = cli()
    assert code == 3 and "Usage: effbench" in out + err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "error: stopped; finished work is kept, and the same command goes on from there"),
        (OSError(errno.ENOSPC, "No space left", "/x/y"), 1, "error: the disk is full (/x/y)"),
        (RuntimeError("odd \x1b[2J"), 1, "error: RuntimeError: odd \\x1b[2J\nnext:  run again with --debug"),
        (InvalidError("nothing there", "look elsewhere"), 2, "error: nothing there\nnext:  look elsewhere"),
    ],
)
def test_every_error_ends_in_one_message(cli, monkeypatch, error, code, said):
    def examine(console):
        raise error

    monkeypatch.setattr("effbench.doctor.examine", examine)
    got, _, err = cli("doctor")
    assert got == code and err.startswith(said) and "Traceback" not in err
    got, _, err = cli("doctor", "--debug")
    assert got == code and said.partition("\n")[0] in err
    assert ("Traceback" in err and "test_cli.py" in err) or code == 130


def test_run_hands_over_every_parameter(cli, monkeypatch):
    from effbench import start as experiment
    from effbench.commands.run import run as command
    from effbench.records import Captioning

    ours, theirs = inspect.signature(command).parameters, inspect.signature(experiment.run).parameters
    beside = {"method", "preset", "context", "quick"}
    writing = {option.replace("-", "_") for option in experiment.CAPTIONING_OPTIONS.values()}
    assert set(experiment.CAPTIONING_OPTIONS) == set(Captioning.model_fields)
    assert {"methods", "captioning", *ours} - beside - writing == set(theirs) - {"live"} and writing <= set(ours)
    for name in set(ours) - beside - writing - {"out"}:
        assert ours[name].default == theirs[name].default, name
    seen = {}
    monkeypatch.setattr(experiment, "run", lambda methods, task, **options: seen.update(options, m=methods, t=task))
    assert cli("run", "--method", "a+b", "--method", "c:x=1", "--task", "t", "--epochs", "0", "--dry-run")[0] == 0
    assert set(seen["captioning"]) == set(Captioning.model_fields)
    assert seen["m"] == ["a+b", "c:x=1"] and seen["t"] == "t" and seen["epochs"] == 0 and seen["dry_run"] is True


@pytest.mark.parametrize(
    ("status", "arms", "code"),
    [("ok", ["ok", "ok"], 0), ("ok", ["ok", "FAILED"], 1), ("INVALID", ["ok"], 2), ("INVALID", ["FAILED"], 2)],
)
def test_a_records_state_is_the_exit_code(status, arms, code):
    assert exit_code(SimpleNamespace(status=status, arms=[SimpleNamespace(status=arm) for arm in arms])) == code


def test_list_shows_a_broken_plugin_and_all_others(cli, distribution):
    files = {"b/__init__.py": "", "b/wrecked.py": "def (:\n", "b/sly.py": '"""Turns\\x1b[2J \\x1b]0;x\\x07red."""\n'}
    distribution("broken-dist", files, {"effbench.methods": {"all": "b"}})
    code, out, _ = cli("list", "methods")
    assert code == 0 and "token_prune" in out
    assert "wrecked" in out and "cannot be used: SyntaxError" in out and "broken-dist" in out
    assert "\x1b" not in out and "\x07" not in out
    code, _, err = cli("list", "methods", "wrecked")
    assert code == 1 and "method wrecked (from broken-dist) fails to import" in err


def test_a_methods_parameters_are_listed(cli):
    code, out, _ = cli("list", "methods", "token_prune")
    assert code == 0
    for word in ("keep", "a number, > 0, <= 1", "3/6/9", "class_attention", "arXiv"):
        assert word in out


def test_no_runs_is_no_error(cli, tmp_path):
    code, out, _ = cli("list", "runs", "--out", str(tmp_path))
    assert code == 0 and "effbench run" in out


def test_the_python_api_is_functions():
    import effbench.apply  # noqa: F401  (the module of the same name must not take the function's place)

    assert all(inspect.isfunction(getattr(effbench, name)) for name in effbench.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        effbench.nonsense  # noqa: B018


def test_quick_fills_in_what_is_not_set(monkeypatch):
    asked = {}
    monkeypatch.setattr("effbench.start.run", lambda methods, task, **options: asked.update(options))
    assert main(["run", "--task", "scenes", "--quick", "--epochs", "5", "--timing-pairs", "30"]) == 0
    quick = {name: asked[name] for name in ("epochs", "timing_pairs", "data_share", "batch_size", "memory_runs")}
    assert quick == dict(epochs=5, timing_pairs=30, data_share=0.25, batch_size=64, memory_runs=1)
    assert main(["run", "--task", "scenes"]) == 0
    assert (asked["data_share"], asked["batch_size"], asked["memory_runs"]) == (1.0, None, 3)
