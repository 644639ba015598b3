"""Sweeps: what a file may say, which experiments it makes, and that none is run twice or takes the others with it."""

import errno
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny import flickr8k

from effbench import start, store, sweep
from effbench.cli import main
from effbench.errors import EffbenchError, UsageError
from effbench.live import Live
from effbench.spec import canonical, parse
from effbench.sweep_file import Options, read, specs

ROOT = Path(__file__).parents[1]
OPTIONS = "{image_size: 32, batch_size: 8, timing_pairs: 2, timing_batch: 2, threads: 1, memory_runs: 0, train: none}"
FILE = """
tasks: [{{name: flickr8k, data: {data}}}]
backbones:
  - {{name: timm:test_vit, weights: random}}
  - {{name: timm:test_vit3, weights: random, methods: ["token_prune:at=1,score=norm"]}}
methods:
  - token_prune: {{keep: [0.5, 0.7], at: 1/2}}
  - token_prune: {{at: 40}}
controls: [random]
options: {options}
"""
GOOD = "tasks: [scenes]\nbackbones: [shipped:scenes_vit]\nmethods: [token_prune]\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    path = folder / "two.yaml"
    path.write_text(FILE.format(data=flickr8k(folder), options=OPTIONS))
    return path


def run(file, out, **options):
    return sweep.run(file, out, live=Live(Console(quiet=True)), **options)


@pytest.fixture(scope="module")
def swept(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, run(file, out)


@pytest.fixture
def asked(monkeypatch):
    """Calls of `start.run` are not run: what they asked for, and what they answer or raise instead."""
    calls, answers = [], []

    def answer(methods, task, **options):
        calls.append((methods, task, options))
        given = answers.pop(0) if answers else None
        if isinstance(given, BaseException):
            raise given
        return given

    monkeypatch.setattr(start, "run", answer)
    return calls, answers


def test_each_task_and_backbone_is_an_experiment(swept):
    out, outcomes = swept
    assert [outcome.failures for outcome in outcomes] == [[], []]
    first, second = (outcome.record for outcome in outcomes)
    assert [arm.name for arm in first.arms if arm.kind == "method"] == [
        "token_prune:keep=0.5,at=1/2",
        "token_prune:at=1/2",
    ]
    assert [arm.name for arm in second.arms if arm.kind == "method"] == ["token_prune:at=1,score=norm"]
    assert {arm.control for arm in first.arms if arm.kind == "control"} == {"noop", "identity", "random"}
    page = (out / "README.md").read_text()
    assert page.count("random weights") >= 2 and "timm:test_vit3" in page and len(store.read_all(out)[0]) == 2


def test_a_method_that_a_backbone_cannot_take_is_left_out_and_named(swept):
    _, (first, second) = swept
    assert second.planned.left_out == {}
    (reason,) = first.planned.left_out.values()
    assert list(first.planned.left_out) == ["token_prune:at=40"] and "block 40 does not exist" in reason


def test_a_finished_sweep_runs_nothing_again(swept, file, asked):
    out, before = swept
    after = run(file, out)
    assert asked[0] == [] and [each.record for each in after] == [each.record for each in before]
    assert not any(each.ran for each in after)
    run(file, out, fresh=True)
    assert len(asked[0]) == 2 and all(options["fresh"] for *_, options in asked[0])


def test_another_question_is_run(swept, file, tmp_path, asked):
    out, _ = swept
    other = tmp_path / "other.yaml"
    other.write_text(file.read_text().replace("timing_pairs: 2", "timing_pairs: 3"))
    run(other, out)
    assert len(asked[0]) == 2
    flickr8k(tmp_path, train=26)
    other.write_text(FILE.format(data=tmp_path, options=OPTIONS))
    run(other, out)
    assert len(asked[0]) == 4


def test_a_stopped_sweep_goes_on_with_the_next_experiment(swept, file, tmp_path, asked):
    out, outcomes = swept
    calls, answers = asked
    store_of(out, tmp_path)
    answers += [outcomes[0].record, KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        run(file, tmp_path)
    answers.append(outcomes[1].record)
    again = run(file, tmp_path)
    assert [options["backbone"] for *_, options in calls] == ["timm:test_vit", "timm:test_vit3", "timm:test_vit3"]
    assert [each.ran for each in again] == [False, True]


def store_of(out, other):
    """Put the records of one folder into another, as the calls that are not run would."""
    (other / "records").symlink_to(out / "records")


@pytest.mark.parametrize("loss", ["record", "note", "invalid"])
def test_an_experiment_without_a_valid_record_is_run(swept, file, tmp_path, asked, monkeypatch, loss):
    out, outcomes = swept
    store_of(out, tmp_path)
    asked[1].extend(outcome.record for outcome in outcomes)
    run(file, tmp_path)
    if loss == "record":
        (tmp_path / "records").unlink()
    elif loss == "note":
        for note in (tmp_path / ".sweeps").iterdir():
            note.write_text("../../elsewhere\0")
    else:
        bad = outcomes[0].record.model_copy(update=dict(status="INVALID", why_invalid="noise"))
        monkeypatch.setattr(store, "read", lambda path: bad)
    run(file, tmp_path)
    assert len(asked[0]) == 4


def test_an_experiment_that_fails_does_not_end_the_sweep(swept, file, tmp_path, asked, capsys):
    out, outcomes = swept
    store_of(out, tmp_path)
    arms = tuple(arm.model_copy(update=dict(status="FAILED", error="boom")) for arm in outcomes[1].record.arms[-1:])
    broken = outcomes[1].record.model_copy(update=dict(arms=outcomes[1].record.arms[:-1] + arms))
    asked[1].extend([EffbenchError("the baseline failed"), broken])
    assert main(["sweep", str(file), "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "1. flickr8k, timm:test_vit, 2 methods: no record" in shown.out and broken.id in shown.out
    assert "without token_prune:at=40: block 40 does not exist" in shown.out
    assert "error: flickr8k, timm:test_vit, 2 methods: the baseline failed" in shown.err and "FAILED: boom" in shown.err
    assert f"next:  to repeat it: effbench sweep {file} --out {tmp_path}\n" in shown.err
    assert "experiment 2 of 2: flickr8k, timm:test_vit3, 1 method\n" in shown.err


def test_a_sweep_exits_as_the_worst_of_its_runs_would(swept, file, tmp_path, asked):
    out, outcomes = swept
    store_of(out, tmp_path)
    bad = outcomes[1].record.model_copy(update=dict(status="INVALID", why_invalid="noise"))
    asked[1].extend([EffbenchError("the baseline failed"), bad])
    assert main(["sweep", str(file), "--out", str(tmp_path), "--fresh"]) == 2


def test_a_full_disk_ends_the_sweep(file, tmp_path, asked):
    full = EffbenchError("the disk is full")
    full.__cause__ = OSError(errno.ENOSPC, "No space left")
    asked[1].append(full)
    with pytest.raises(EffbenchError, match="disk is full"):
        run(file, tmp_path)
    assert len(asked[0]) == 1


def test_dry_run_lists_everything_and_writes_nothing(file, tmp_path, capsys):
    assert main(["sweep", str(file), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "experiment 1 of 2: flickr8k, timm:test_vit, 2 methods" in shown and "MiB of memory" in shown
    assert "token_prune:at=40 is left out" in shown and "token_prune:at=1,score=norm" in shown
    assert not (tmp_path / "out").exists()


def test_methods_are_split_over_runs(file, tmp_path, asked):
    split = tmp_path / "split.yaml"
    split.write_text(file.read_text() + "arms_per_run: 1\nseeds: 2\n")
    run(split, tmp_path)
    assert [methods for methods, *_ in asked[0]] == [
        ["token_prune:keep=0.5,at=1/2"],
        ["token_prune:at=1/2"],
        ["token_prune:at=1,score=norm"],
    ]
    assert all(options["seeds"] == 2 and options["controls"] == ["random"] for *_, options in asked[0])


def test_lists_are_products_and_names_a_stack():
    assert specs("a:x=1+b") == ["a:x=1+b"]
    assert specs({"a": None}) == ["a"]
    assert specs({"a": {"x": [1, 0.5], "y": [True, None]}}) == [
        "a:x=1,y=true",
        "a:x=1,y=none",
        "a:x=0.5,y=true",
        "a:x=0.5,y=none",
    ]
    assert specs({"a": {"at": ["3/6/9", 2]}, "b": {}}) == ["a:at=3/6/9+b", "a:at=2+b"]


def test_options_are_those_of_a_run():
    names = set(inspect.signature(start.run).parameters)
    beside = {"methods", "task", "backbone", "weights", "pretrained", "data", "seeds", "controls"}
    assert set(Options.model_fields) == names - beside - {"out", "dry_run", "fresh", "live", "log"}


@pytest.mark.parametrize(
    ("text", "code", "said", "hint"),
    [
        (GOOD + "sead: 2", 3, "sead: unknown key; did you mean seeds?", "keys: tasks, backbones"),
        (GOOD + "options: {epoch: 2}", 3, "options.epoch: unknown key; did you mean epochs?", "timing_pairs"),
        (GOOD + "options: {train: some}", 3, "options.train 'some': input should be 'none', 'locked' or 'full'", ""),
        (GOOD + "options: {epochs: null}", 3, "options.epochs None: input should be a valid integer", ""),
        (GOOD + "options: {until: 2}", 3, "options.until 2: 2 is not a share", ""),
        (GOOD + "options: {budget: 3x}", 3, "options.budget '3x': 3x is not a length of time", ""),
        (GOOD + "seeds: 0", 3, "seeds 0: input should be greater than or equal to 1", ""),
        (GOOD + "seeds: true", 3, "seeds True: input should be a valid integer", ""),
        (GOOD + "controls: [blind]", 3, "controls[0] 'blind': input should be 'random'", ""),
        (GOOD + "tasks: [flickr8k]", 3, "tasks stands twice", ""),
        (GOOD.replace("[token_prune]", "[]"), 3, "methods []: at least one is needed", ""),
        (GOOD.replace("[token_prune]", "[token_prun]"), 3, "methods[0]: unknown method 'token_prun'; did you", "list"),
        (GOOD.replace("[token_prune]", "[{token_prune: {keep: [0.5, 2]}}]"), 3, "methods[0]: token_prune: keep=2", ""),
        (GOOD.replace("[token_prune]", "[{token_prune: {kep: 1}}]"), 3, "no parameter 'kep'; did you mean keep", ""),
        (GOOD.replace("[token_prune]", "[{token_prune: {at: [[3, 6]]}}]"), 3, "one tuple is written 3/6/9", ""),
        (GOOD.replace("[token_prune]", "[{token_prune: {keep: []}}]"), 3, "token_prune.keep is a number", ""),
        (GOOD.replace("[token_prune]", "[{token_prune: '1,at=2'}]"), 3, "the parameters of token_prune are a", ""),
        (GOOD.replace("[token_prune]", "[3]"), 3, "methods[0] 3: a method is a spec", ""),
        (GOOD.replace("[scenes]", "[scene]"), 3, "tasks[0]: unknown task 'scene'; did you mean scenes", "flickr8k"),
        (GOOD.replace("[scenes]", "scenes"), 3, "tasks 'scenes': a list is needed", ""),
        (GOOD.replace("shipped:", "shiped:"), 3, "backbones[0]: unknown family of backbones 'shiped'", "openclip"),
        (GOOD.replace("scenes_vit", "x"), 3, "scenes on shipped:x: effbench ships no tower named 'x'", "scenes_vit"),
        (GOOD.replace("[shipped:scenes_vit]", "[{weights: random}]"), 3, "backbones[0].name: this key is needed", ""),
        (GOOD.replace("[shipped:scenes_vit]", "[timm:test_vit]"), 2, "no weights were named", "random"),
        (GOOD.replace("[scenes]", "[{name: flickr8k, data: nowhere}]"), 2, "looked at nowhere", ""),
        ("tasks: [scenes", 3, "line 1 cannot be read as YAML: expected ',' or ']'", ""),
        ("\0", 3, "cannot be read as YAML", ""),
        ("", 3, "holds no sweep, which is a mapping of tasks, backbones, methods", ""),
        (None, 3, "cannot be read: No such file", "sweeps/tokens.yaml"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_any_work(tmp_path, monkeypatch, capsys, text, code, said, hint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EFFBENCH_WEIGHTS", raising=False)
    if text is not None:
        Path("bad.yaml").write_text(text)
    assert main(["sweep", "bad.yaml", "--out", "out"]) == code
    *_, error, following = capsys.readouterr().err.rstrip().splitlines()
    assert error.startswith("error: bad.yaml") and said in error
    assert following.startswith("next:  ") and hint in following and not Path("out").exists()


def test_a_file_is_read_without_torch(tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    code = "import sys; from effbench.sweep_file import read; read(sys.argv[1]); import effbench.commands.sweep; "
    code += "import effbench.sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "good.yaml"]).returncode == 0


@pytest.mark.parametrize("name", ["tokens", "encoders"])
def test_the_shipped_sweeps_name_methods_that_are_there(name):
    shipped = read(ROOT / "sweeps" / f"{name}.yaml")
    lists = [shipped.methods, *(backbone.methods for backbone in shipped.backbones)]
    for stacks in ([spec for entry in entries for spec in entry] for entries in lists):
        parsed = [canonical(parse(spec)) for spec in stacks]
        assert len(set(parsed)) == len(parsed)


def test_a_sweep_is_one_process(file, tmp_path, monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UsageError, match="one process"):
        run(file, tmp_path)
