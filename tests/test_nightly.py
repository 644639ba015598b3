"""The wall-clock gate: its statistics, its protocol with small stand-in workers, and one real pair of versions."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from effbench import cli, nightly, nightly_cells, nightly_stats, nightly_turns
from effbench.errors import InvalidError, UsageError
from effbench.live import Live
from effbench.nightly_cells import Cell, default_cells
from effbench.nightly_stats import Spread, effect, estimate, flagged, noise_floor, recurs, spread
from effbench.nightly_versions import Version, checked_out

ROOT = Path(__file__).resolve().parents[1]
QUIET = Live(Console(quiet=True))


def a_pair(rng, ratio=1.0, turns=40, process_sd=0.01, turn_sd=0.05):
    base = 0.03 * np.exp(rng.normal(0, turn_sd, turns) / math.sqrt(2))
    shift = rng.normal(0, process_sd) + math.log(ratio)
    return effect(base, 0.03 * np.exp(rng.normal(0, turn_sd, turns) / math.sqrt(2) + shift))


def a_cell(rng, ratio=1.0, processes=5, **noise):
    return [a_pair(rng, ratio, **noise) for _ in range(processes)]


def test_the_effect_is_the_median_and_the_place_within_a_turn_cancels():
    base = np.array([1.0, 1.1] * 10)  # who goes first is 10 % slower, in turns
    head = np.array([1.1, 1.0] * 10)
    assert effect(base, head).middle == pytest.approx(0.0, abs=1e-12)
    assert effect(base, 1.05 * head).middle == pytest.approx(math.log(1.05))
    disturbed = head.copy()
    disturbed[:4] *= 9
    assert effect(base, disturbed).middle == pytest.approx(0.0, abs=1e-12)


def test_a_loud_process_counts_little():
    rng = np.random.default_rng(4)
    errors = dict(weighed=[], mean=[])
    for _ in range(200):
        cell = [a_pair(rng, process_sd=0.003, turn_sd=sd) for sd in (0.03, 0.04, 0.2, 0.2, 0.2)]
        found = estimate(cell, spread([cell] * 8))
        errors["weighed"].append(math.log(found.ratio))
        errors["mean"].append(np.mean(np.log(found.processes)))
    assert np.std(errors["weighed"]) < 0.6 * np.std(errors["mean"])


def test_an_estimate_of_exact_times_is_exact():
    slower = [effect([0.02] * 12, [0.021] * 12)] * 3
    found = estimate(slower, spread([slower]))
    assert found.ratio == pytest.approx(1.05) and found.processes == pytest.approx((1.05,) * 3)
    assert found.p < 1e-6 and found.sure and found.direction == "SLOWER"
    assert found.beyond(0.03) and not found.beyond(0.06)
    faster = estimate([effect([0.021] * 12, [0.02] * 12)] * 3, Spread(0.0, 2))
    assert faster.direction == "FASTER" and faster.beyond(0.03) and not faster.beyond(0.06)


def test_the_interval_holds_the_process_to_process_variance():
    rng = np.random.default_rng(1)
    inside = ignoring = 0
    for _ in range(60):
        night = [a_cell(rng, 1.04, process_sd=0.02, turn_sd=0.03) for _ in range(6)]
        common = spread(night)
        assert common.dof == 24
        inside += sum(found.low <= 1.04 <= found.high for found in (estimate(pairs, common) for pairs in night))
        ignoring += sum(f.low <= 1.04 <= f.high for f in (estimate(pairs, Spread(0.0, 24)) for pairs in night))
    assert 0.92 <= inside / 360 <= 0.985
    assert ignoring / 360 < 0.6  # turns alone would claim far too much


def test_the_noise_floor_grows_with_the_noise_and_sees_a_standing_difference():
    rng = np.random.default_rng(2)
    nights = [[a_cell(rng, process_sd=sd, turn_sd=0.01) for _ in range(4)] for sd in (0.002, 0.01, 0.04)]
    floors = [noise_floor(night, spread(night)) for night in nights]
    assert floors[0] < 0.005 < floors[1] < 0.02 < floors[2] < 0.09
    shifted = [a_cell(rng, 1.04, process_sd=0.002, turn_sd=0.01)]
    assert noise_floor(shifted, spread(shifted)) > 0.03


def made(ratio, p, low=None, high=None):
    return nightly_stats.Estimate(ratio, low or ratio - 0.01, high or ratio + 0.01, p, (ratio,) * 3)


def test_flags_need_size_certainty_and_benjamini_hochberg():
    sure = made(1.05, 1e-6)
    assert flagged([sure, made(0.94, 1e-6), made(1.02, 1e-9), made(1.0, 0.9)], 0.01) == [True, True, False, False]
    assert flagged([sure], 0.06) == [False]  # tonight is louder than the change
    alone = made(1.05, 0.02)
    assert flagged([alone], 0.0) == [True]
    assert not any(flagged([alone, *[made(1.0, 0.8)] * 11], 0.0))  # one of twelve at 2 % is what chance gives
    assert flagged([made(1.05, 0.001, 0.99, 1.11)], 0.0) == [False]
    assert flagged([], 0.0) == []


def test_a_change_recurs_in_the_same_direction_and_size():
    first = made(1.06, 1e-6)
    assert recurs(first, made(1.05, 1e-4), made(1.055, 1e-6), 0.01)
    assert not recurs(first, made(0.95, 1e-4), made(1.0, 0.5), 0.01)
    assert not recurs(first, made(1.005, 0.3), made(1.03, 0.01), 0.01)
    assert not recurs(first, made(1.02, 1e-4), made(1.029, 1e-4), 0.01)
    assert not recurs(first, made(1.05, 1e-4), made(1.055, 1e-6), 0.08)


def rates_script():
    spec = importlib.util.spec_from_file_location("gate_rates", ROOT / "benchmarks" / "gate_rates.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_simulated_nights_are_silent_on_no_change_and_catch_five_per_cent():
    script = rates_script()
    rng = np.random.default_rng(3)
    _, sets = script.drawn(rng, 12, 30, 40, process_sd=0.008, turn_sd=0.05)
    same = script.rates(rng, sets, 40, 5, 40, 0.0)
    assert same["alarms"] == 0 and same["invalid"] <= 1
    for slower, least in ((0.05, 19), (0.10, 20), (-0.05, 19)):
        assert script.rates(rng, sets, 20, 5, 40, slower)["caught"] >= least


# a worker that measures nothing: its times come from a file, so that every case can be told in numbers
STAND_IN = """
import json, os, random, sys, time
role = os.environ["ROLE"]
told = json.load(open(os.environ["STAND_IN"]))
looks = os.environ["STAND_IN"] + "." + role
with open(looks, "a+") as file:  # each process has noise of its own, the same in every run of the test
    file.write("x")
    rng = random.Random(f"{role} {file.tell()}")
shift = rng.gauss(0, told.get("sd", 0.003))
names, nth = {}, {}
for line in sys.stdin:
    asked = json.loads(line)
    answer = {}
    if asked["do"] == "build":
        names[asked["number"]] = name = asked["cell"]["method"]
        case = told.get(name, {})
        answer = {"envelope": {"task": "scenes", "device": "cpu", **case.get("envelope", {}).get(role, {})}}
        if case.get("error", {}).get("build") == role:
            answer = {"error": "unknown method 'gone'"}
        with open(f"{looks}.{name}", "a+") as file:  # how many processes of this role have built it
            file.write("x")
            nth[name] = file.tell()
    elif asked["do"] == "step":
        case = told.get(names[asked["number"]], {})
        factors = case.get(role, 1.0)
        if isinstance(factors, list):  # one for each time that the cell was built: set by set of processes
            factors = factors[min(nth[names[asked["number"]]], len(factors)) - 1]
        if case.get("error", {}).get("step") == role:
            answer = {"error": "RuntimeError: boom"}
        elif case.get("error", {}).get("dies") == role:
            sys.exit("last words")
        elif case.get("error", {}).get("hangs") == role:
            time.sleep(60)
        else:
            answer = {"seconds": case.get("seconds", 0.03 * factors * 2.718 ** (shift + rng.gauss(0, 0.01)))}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def night(tmp_path, monkeypatch):
    """Run a night with stand-in workers: night(cell=what happens there) gives its outcome and samples."""
    script, told = tmp_path / "stand_in.py", tmp_path / "told.json"
    script.write_text(STAND_IN)
    monkeypatch.setenv("STAND_IN", str(told))

    class Versions:
        def __init__(self, *asked):
            pass

        def __enter__(self):
            return [Version(role, f"{role}-commit", tmp_path / role, tmp_path, ()) for role in ("base", "head")]

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(nightly, "checked_out", Versions)
    monkeypatch.setattr(nightly, "command", lambda version: [sys.executable, "-I", str(script), str(version.home)])
    with_role = lambda role, line, names: nightly_turns.Worker(role, line, names | {"ROLE": role})  # noqa: E731
    monkeypatch.setattr(nightly, "Worker", with_role)
    monkeypatch.setattr(nightly, "measure", partial(nightly_turns.measure, gap=0.0))

    def run(names=("a", "b", "c", "d"), turns=24, processes=3, sd=0.003, budget=900.0, **cases):
        told.write_text(json.dumps(dict(cases, sd=sd)))
        cells = [Cell(method=name, batch=1) for name in names]
        plan = nightly.Plan("main", cells, turns=turns, processes=processes, budget=budget)
        return nightly.run(plan, QUIET)

    return run


def told(outcome, method):
    return next(f for f in outcome.findings if f"/ {method} /" in f.cell and f.figure == nightly.FIGURE)


def test_an_unchanged_night_is_silent_and_its_samples_are_kept(night):
    outcome, samples = night()
    assert (outcome.verdict, outcome.exit_code) == ("SAME", 0)
    assert {finding.verdict for finding in outcome.findings} == {"PASS"}
    assert list(samples.columns) == list(nightly.COLUMNS)
    counts = samples.groupby(["cell", "role"]).size().unstack()
    assert (counts[["base", "head"]] == 3 * 24).all(axis=None) and counts["twin"].notna().sum() == 2
    assert any("noise floor" in note for note in outcome.notes)


def test_both_directions_are_reported_and_only_what_recurs(night):
    outcome, samples = night(
        b=dict(head=1.10), c=dict(head=0.90), d=dict(head=[1.2, 1.2, 1.2, 1.0, 1.0, 1.0])
    )  # d: slow in the first look alone
    assert (outcome.verdict, outcome.exit_code) == ("CHANGED", 1)
    assert told(outcome, "a").verdict == "PASS"
    assert told(outcome, "b").verdict == "CHANGED" and told(outcome, "b").said.startswith("SLOWER: +")
    assert told(outcome, "c").verdict == "CHANGED" and told(outcome, "c").said.startswith("FASTER: -")
    assert told(outcome, "d").verdict == "NOTE" and "did not recur" in told(outcome, "d").said
    assert set(samples[samples["look"] == 2]["cell"].str.split(" / ").str[2]) == {"b", "c", "d"}


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (dict(b=dict(error=dict(build="head"))), "head cannot run it: unknown method"),
        (dict(b=dict(error=dict(step="base"))), "base: RuntimeError: boom"),
        (dict(b=dict(envelope=dict(head=dict(data_fingerprint="f1")))), "another envelope: data_fingerprint is None"),
        (dict(b=dict(seconds=-1.0)), "a step of -1.0 s is impossible"),
        (dict(b=dict(seconds="1")), "impossible"),
        (dict(budget=1e-6), "too few samples"),
        (dict(sd=0.2), "noise floor"),
    ],
)
def test_what_cannot_be_judged_is_invalid_and_named(night, case, said):
    outcome, _ = night(**case)
    assert (outcome.verdict, outcome.exit_code) == ("INVALID", 2)
    assert said in outcome.said
    assert not outcome.of("CHANGED")


def test_a_night_that_is_too_loud_passes_nothing_and_names_what_stands_out(night):
    outcome, _ = night(sd=0.1, b=dict(head=30.0))
    assert outcome.verdict == "INVALID" and {each.verdict for each in outcome.findings} == {"NOTE"}
    assert "even so 1 of the cells stand out: " in outcome.said and "/ b / batch 1 +" in outcome.said
    assert told(outcome, "b").said.startswith("not judged: +")


def test_a_twin_moves_on_from_a_cell_that_cannot_run(night):
    outcome, samples = night(a=dict(error=dict(build="head")))
    twins = samples[samples["role"] == "twin"]["cell"].str.split(" / ").str[2]
    assert set(twins) == {"b", "d"} and "1 of 4 cells could not be judged, the first: " in outcome.said


def test_the_times_that_are_shown_are_those_of_the_percentage(night):
    outcome, _ = night(b=dict(head=[1.5, 1.5, 1.5]))
    found = told(outcome, "b")
    before, after = (float(text.removesuffix(" ms")) for text in (found.old, found.new))
    assert 100 * (after / before - 1) == pytest.approx(float(found.said.split()[1]), abs=0.06)


def test_base_against_base_outside_its_band_is_invalid(night, monkeypatch):
    monkeypatch.setattr(nightly_stats, "LOUD", 9.0)
    outcome, _ = night(a=dict(twin=1.1))
    assert outcome.verdict == "INVALID" and "outside its band" in outcome.said


def test_a_change_beside_a_missing_cell_is_told_and_the_night_is_invalid(night):
    outcome, _ = night(b=dict(head=1.2), c=dict(error=dict(build="head")))
    assert outcome.exit_code == 2 and told(outcome, "b").verdict == "CHANGED"
    assert "1 of 4 cells are SLOWER" in outcome.said


def test_a_worker_that_dies_ends_the_night_with_its_last_words(night):
    with pytest.raises(InvalidError, match="the worker of head ended: last words"):
        night(b=dict(error=dict(dies="head")))


def test_a_step_that_takes_too_long_ends_the_night(night, monkeypatch):
    monkeypatch.setattr(nightly_turns, "STEP_S", 0.5)
    with pytest.raises(InvalidError, match="the worker of head said nothing"):  # it would answer the next question
        night(b=dict(error=dict(hangs="head")))


def test_a_worker_that_hangs_or_floods_is_given_up(monkeypatch):
    def worker(code):
        return nightly_turns.Worker("head", [sys.executable, "-c", code], {})

    for code, said in (
        ("import time; time.sleep(60)", "said nothing"),
        ("print('x' * 3_000_000)", "more than"),
        ("print('[]')", "no answer"),
        ("print('hello')", "no answer"),
    ):
        one = worker(code)
        with pytest.raises(InvalidError, match=said):
            one.answer(0.3 if "sleep" in code else 20)
        one.end()
        assert one.process.poll() is not None


def test_default_cells_and_files(tmp_path):
    cells = default_cells()
    assert len(cells) == len({cell.name for cell in cells}) == 12
    file = tmp_path / "cells.yaml"
    file.write_text("batch: 4\ncells:\n  - {method: token_merge}\n  - {task: scenes, method: quantize, batch: 2}\n")
    assert [(cell.method, cell.batch) for cell in nightly_cells.read(file)] == [("token_merge", 4), ("quantize", 2)]
    for text, said in (
        ("cells: []", "cells"),
        ("cells: [{methods: x}]", "methods"),
        ("cells: [{method: x}, {method: x}]", "stands twice"),
        ("a: [", "no YAML"),
        ("!!python/object/apply:os.system ['true']", "no YAML"),
        ("7", "the file"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=said):
            nightly_cells.read(file)
    with pytest.raises(UsageError, match="cannot be read"):
        nightly_cells.read(tmp_path / "none.yaml")


def git(folder, *arguments):
    names = ("-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path):
    """A plugin's repository with one commit, and changes on top: one file edited, one new, one deleted, one ignored."""
    home = tmp_path / "mine"
    (home / "mine").mkdir(parents=True)
    (home / "pyproject.toml").write_text(
        '[project]\nname = "mine-plugin"\nversion = "1"\n[project.entry-points."effbench.methods"]\nold = "mine"\n'
    )
    for name in ("__init__", "old", "gone"):
        (home / "mine" / f"{name}.py").write_text("x = 1\n")
    (home / "data").mkdir()
    (home / "data" / "one").write_text("x")
    (home / ".gitignore").write_text("*.log\n")
    git(home, "init", "-q")
    git(home, "add", "-A")
    git(home, "commit", "-qm", "one")
    (home / "mine" / "old.py").write_text("x = 2\n")
    (home / "mine" / "new file.py").write_text("x = 3\n")
    (home / "mine" / "gone.py").unlink()
    (home / "mine" / "gone.py").mkdir()  # a folder in its place, and a file in that of a folder
    (home / "mine" / "gone.py" / "part.py").write_text("x = 4\n")
    shutil.rmtree(home / "data")
    (home / "data").write_text("x")
    (home / "big.log").write_text("x")
    return home


def test_versions_are_worktrees_and_the_checkout_is_left_alone(repository):
    before = (git(repository, "status", "--porcelain"), git(repository, "worktree", "list"))
    with checked_out(repository, "HEAD", None) as (base, head):
        assert (base.home / "mine" / "old.py").read_text() == "x = 1\n" and (base.home / "mine" / "gone.py").is_file()
        assert (head.home / "mine" / "old.py").read_text() == "x = 2\n"
        assert (head.home / "mine" / "new file.py").exists() and (head.home / "data").read_text() == "x"
        assert (head.home / "mine" / "gone.py" / "part.py").read_text() == "x = 4\n"
        assert not (head.home / "big.log").exists()
        assert head.commit == base.commit + "-dirty" and "and changes" in head.said
        assert base.packages == ("mine",)
        code = (
            "import mine, importlib.metadata as m; print(mine.__file__); "
            "print([p.name for p in m.entry_points(group='effbench.methods') if p.dist.name == 'mine-plugin'])"
        )
        from effbench.nightly_versions import environment

        said = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=environment(base),
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        assert Path(said[0]).resolve().is_relative_to(base.home.resolve()) and said[1] == "['old']"
        folder = base.home.parent
    assert not folder.exists()
    assert (git(repository, "status", "--porcelain"), git(repository, "worktree", "list")) == before


def test_worktrees_are_gone_after_ctrl_c_too(repository):
    with pytest.raises(KeyboardInterrupt), checked_out(repository, "HEAD", "HEAD") as (base, _):
        folder = base.home.parent
        raise KeyboardInterrupt
    assert not folder.exists() and len(git(repository, "worktree", "list").splitlines()) == 1


def test_what_git_does_not_know_is_named(repository, tmp_path):
    for reference in ("no-such-branch", "--help", ""):
        with pytest.raises(UsageError, match="git knows no commit"), checked_out(repository, reference, None):
            pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="inside a git repository"), checked_out(tmp_path / "empty", "HEAD", None):
        pass


def test_the_worker_refuses_code_from_elsewhere(tmp_path):
    """Without the version's packages on the path, effbench would come from where it is installed."""
    worker = nightly_turns.Worker("base", nightly_turns.command(Version("", "", tmp_path, tmp_path, ("effbench",))), {})
    worker.ask(do="start", threads=1)
    assert "not from the version under test" in worker.answer(60)["error"]
    worker.end()


def test_a_planted_slow_down_is_found_between_two_real_versions(tmp_path, monkeypatch):
    """The whole way, on a copy of this tree: worktrees, workers, twin, second look. The step takes 0.2 s longer."""
    home = tmp_path / "copy"
    for name in ("effbench", "methods", "tasks"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", home)
    git(home, "init", "-q")
    git(home, "add", "-A")
    git(home, "commit", "-qm", "base")
    file = home / "methods" / "token_prune.py"
    assert file.read_text().count("def edit_model(self, model") == 1
    file.write_text(
        file.read_text()
        + "\n_edit = TokenPrune.edit_model\n\n\ndef _slower(self, model):\n    _edit(self, model)\n    import time\n"
        + "    model.model.image_encoder.register_forward_hook(lambda *_: time.sleep(0.2))\n\n\n"
        + "TokenPrune.edit_model = _slower\n"
    )
    # one set of processes tells no noise, and a test machine may be loud: the statistics are tested above
    monkeypatch.setattr(nightly_stats, "noise_floor", lambda twins, common: 0.04)
    monkeypatch.setattr(nightly_stats, "spread", lambda cells: Spread(0.01, 20))
    monkeypatch.setattr(nightly_stats, "MARGIN", 0.5)
    cell = Cell(backbone="timm:test_vit", weights="random", method="token_prune:keep=0.5,at=2", batch=1)
    plan = nightly.Plan("HEAD", [cell], turns=12, processes=1, threads=1, repository=home)
    outcome, samples = nightly.run(plan, QUIET)
    assert (outcome.verdict, outcome.exit_code) == ("CHANGED", 1), outcome
    assert outcome.of("CHANGED")[0].said.startswith("SLOWER: +")
    assert samples.groupby("role")["seconds"].median()["head"] > 0.2
    assert set(samples["look"]) == {1, 2}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gate --times", "--reference is missing"),
        ("gate --times --drift --reference main", "two gates"),
        ("gate --times --reference main --pairs 3", "pairs"),
        ("gate --times --reference main --processes 2", "processes"),
        ("gate --times --reference main --budget never", "never"),
        ("gate --times --reference main --cells none.yaml", "none.yaml"),
        ("gate --times --reference no-such-commit-at-all", "commit"),
        ("gate --times --reference main --samples no/such/folder/x.parquet", "no such folder"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(line, said, capsys):
    assert cli.main(line.split()) == 3
    assert said in capsys.readouterr().err
