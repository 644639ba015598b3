"""The workflows and the action: linted by their schemas, safe by inspection, and their steps run here as on GitHub."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from tiny import flickr8k

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTION = ROOT / "action.yml"
EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}")
SMALL = "--task flickr8k --backbone timm:test_vit --weights random --image-size 32 --train none --threads 1"
METHOD = "token_prune:keep=0.5,at=1/2"


def load(path):
    return yaml.safe_load(path.read_text())


def steps(path):
    found = load(path)
    return found["runs"]["steps"] if "runs" in found else [s for j in found["jobs"].values() for s in j["steps"]]


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("vendor.github-actions", [ACTION]),
        ("vendor.github-workflows", WORKFLOWS),
        ("custom.github-workflows-require-timeout", WORKFLOWS),
    ],
)
def test_a_linter_that_knows_the_format_accepts_them(schema, paths):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, paths)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_there_is_a_check_of_pull_requests_and_a_scheduled_one():
    on = {path.stem: load(path)[True] for path in WORKFLOWS}  # YAML reads the key `on` as true
    assert "pull_request" in on["check"] and on["nightly"]["schedule"][0]["cron"]
    for triggers in on.values():
        assert "pull_request_target" not in triggers  # it would give a stranger's code the repository's token


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_rights_are_few_and_nothing_runs_twice_or_for_ever(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"} and "group" in workflow["concurrency"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120 and "permissions" not in job
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", [*WORKFLOWS, ACTION], ids=lambda path: path.name)
def test_no_text_from_outside_becomes_script(path):
    for step in steps(path):
        assert "${{" not in step.get("run", ""), step
        assert re.fullmatch(r"actions/[a-z/-]+@v\d+", step.get("uses", "actions/none@v1"))


# The steps, as GitHub runs them


def resolve(text, values):
    """A text with its expressions replaced; an `if` without its braces is an expression as a whole."""
    return EXPRESSION.sub(lambda found: values[found[1].strip()], str(text))


def wanted(step, values):
    condition = EXPRESSION.sub(r"\1", str(step.get("if", "!cancelled()"))).strip()
    if condition == "!cancelled()":
        return True
    name, value = re.fullmatch(r"(\S+) != '(.*)'", condition).groups()
    return values[name] != value


def execute(path, folder, env, values=None, only=None):
    """Run the `run` steps of a file, or those named, until one fails, with GitHub's files; `uses` are left out.

    Returns:
        exit code, what was printed, the job summary, and the outputs by name.
    """
    values, source = {"vars.DRIFT_SINCE": "", "inputs.reference": ""} | (values or {}), load(path)
    files = {name: folder / name.lower() for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    for file in files.values():
        file.write_text("")
    outer = {key: value for key, value in os.environ.items() if not key.startswith("GITHUB_")}
    outer |= {key: resolve(value, values) for key, value in source.get("env", {}).items()}
    outer |= {key: str(file) for key, file in files.items()} | dict(GITHUB_ACTIONS="true", OMP_NUM_THREADS="1") | env
    outer["PATH"] = f"{Path(sys.executable).parent}:{outer['PATH']}"
    said = []
    for step in steps(path):
        if "uses" in step or not wanted(step, values) or (only and step["name"] not in only):
            continue
        own = {key: resolve(value, values) for key, value in step.get("env", {}).items()}
        options = ["--noprofile", "--norc", "-eo", "pipefail"] if step.get("shell") == "bash" else ["-e"]
        command = ["bash", *options, "-c", step["run"]]
        done = subprocess.run(command, cwd=folder, env=outer | own, capture_output=True, text=True)
        said.append(f"## {step['name']}\n{done.stdout}{done.stderr}")
        if done.returncode:
            break
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    return done.returncode, "\n".join(said), files["GITHUB_STEP_SUMMARY"].read_text(), outputs


def inputs(**given):
    """The action's inputs with its defaults, as expressions name them."""
    found = {name: str(each.get("default", "")) for name, each in load(ACTION)["inputs"].items()}
    return {f"inputs.{name}": value for name, value in (found | given).items()} | {"github.action_path": str(ROOT)}


GIVEN = dict(task="flickr8k", out="their runs", preinstalled="true", **{"python-version": ""})
QUICK = f"{SMALL} --controls none\n --timing-pairs 0 --memory-runs 0".replace("--task flickr8k ", "")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with what the steps need of the repository, tiny data, and a reference that the action's run made."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "pyproject.toml", "setup.py", ".ci/run"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)  # newer than what is installed, as in a fresh checkout
    (folder / ".venv").symlink_to(sys.prefix)
    data, cache = flickr8k(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("cache")
    env = dict(EFFBENCH_DATA=str(data), EFFBENCH_CACHE=str(cache))
    code, said, _, outputs = execute(ACTION, folder, env, inputs(method=f"\n{METHOD}\n", arguments=QUICK, **GIVEN))
    assert code == 0 and set(outputs) == {"record"}, said
    return folder, env, outputs["record"]


def test_the_check_of_a_pull_request_runs(checkout):
    folder, env, reference = checkout
    (folder / "kept").mkdir()
    shutil.copy(folder / reference / "record.json", folder / "kept")
    short = dict(INSTALL="make --dry-run install", LINT="make --dry-run lint", TEST="make --dry-run test")
    run = dict(GATE_RUN=f"{SMALL} --controls none\n--method {METHOD}", GATE_REFERENCE="kept")
    code, said, summary, _ = execute(ROOT / ".github/workflows/check.yml", folder, env | short | run)
    assert code == 0, said
    assert "pip install" in said and "ruff check ." in said and "pytest -q" in said  # of the dry runs
    assert "SAME: " in said and "::error" not in said
    assert summary.startswith("### effbench gate: SAME")
    suite = ET.parse(folder / "runs/gate/gate.xml").find("testsuite")
    assert int(suite.get("tests")) > 40 and suite.get("failures") == suite.get("errors") == "0"
    assert list((folder / "runs/gate/records").glob("*/record.json"))  # what is kept


NIGHTLY = ROOT / ".github/workflows/nightly.yml"


@pytest.fixture
def repository(tmp_path):
    """A repository whose first commit is two days old, and an effbench that writes down what it is asked.

    Returns:
        the folder; a function that commits and gives the hash; one that runs a night's step with an exit code of
        `effbench gate` and gives the step's, and the base that was asked for.
    """
    tool = tmp_path / ".venv/bin/effbench"
    tool.parent.mkdir(parents=True)
    tool.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >asked\nexit "$(cat code)"\n')
    tool.chmod(0o755)

    def git(*arguments, **env):
        names = ("-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", *names, *arguments], cwd=tmp_path, env=os.environ | env, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode().strip()

    def commit(hours):
        when = f"@{int(time.time() - 3600 * hours)} +0000"
        git("commit", "-q", "--allow-empty", "-m", "x", GIT_COMMITTER_DATE=when, GIT_AUTHOR_DATE=when)
        return git("rev-parse", "HEAD")

    def step(exit_code, **values):
        (tmp_path / "code").write_text(str(exit_code))
        code, said, _, _ = execute(NIGHTLY, tmp_path, {}, values, only=["Step times"])
        asked = (tmp_path / "asked").read_text().split("\n")
        assert asked[:2] == ["gate", "--times"], said
        return code, asked[2].removeprefix("--reference=")

    git("init", "-q")
    return tmp_path, commit, step


def test_no_commit_falls_between_two_nights(repository):
    folder, commit, step = repository
    old, first = commit(48), commit(2)
    judged = folder / "runs/history/judged"
    assert step(2) == (2, old) and not judged.exists()  # INVALID: the next night looks at the same commits
    assert step(0) == (0, old) and judged.read_text().strip() == first
    second = commit(1)
    assert step(3) == (3, first) and judged.read_text().strip() == first
    assert step(1) == (1, first) and judged.read_text().strip() == second  # a change is told once
    assert step(0, **{"inputs.reference": "v1"}) == (0, "v1")
    judged.write_text("0" * 40)  # a commit that is gone
    assert step(0) == (0, old)


def test_a_night_adds_a_record_and_looks_back(checkout):
    folder, env, _ = checkout
    run = dict(RUN=f"{SMALL} --controls none --method {METHOD} --timing-pairs 3 --memory-runs 0")
    for records in (1, 2):
        code, said, summary, _ = execute(NIGHTLY, folder, env | run, only=["Tonight's record", "Drift"])
        assert code == 0, said
        assert len(list((folder / "runs/history/records").glob("*/record.json"))) == records
        assert "8 are needed to tell a change" in summary
    later = {"vars.DRIFT_SINCE": "no day"}
    code, said, _, _ = execute(NIGHTLY, folder, env, later, only=["Drift"])
    assert code == 3 and "--since" in said


def test_the_action_says_what_changed(checkout):
    folder, env, record = checkout
    planted = json.loads((folder / record / "record.json").read_text())
    planted["arms"][-1]["tokens"] = [5, 5]
    (folder / "planted.json").write_text(json.dumps(planted))
    for reference, verdict in ((record, 0), ("planted.json", 1), ("none.json", 2), ("$(touch pwned)", 3)):
        values = inputs(method=METHOD, reference=reference, **GIVEN)
        code, said, summary, outputs = execute(ACTION, folder, env, values, only=["Gate"])
        assert (code, outputs) == (verdict, {"exit-code": str(verdict)}), said
        assert summary.startswith(f"### effbench gate: {['SAME', 'CHANGED', 'INVALID', 'INVALID'][verdict]}")
        assert ("::error title=" in said) == (verdict > 0)
        suite = ET.parse(folder / "their runs" / "gate.xml").find("testsuite")
        assert [suite.get("failures"), suite.get("errors")] == [["0", "0"], ["1", "0"], ["0", "1"], ["0", "1"]][verdict]
    assert not list(folder.rglob("pwned"))


def test_hostile_inputs_of_the_action_are_words_and_nothing_more(checkout):
    folder, env, _ = checkout
    evil = '"; touch pwned; $(touch pwned) `touch pwned` --out=/ %0A::error::x'
    values = inputs(method=evil, task=evil, arguments="$(touch pwned) `touch pwned`", out=evil, preinstalled="true")
    code, said, _, outputs = execute(ACTION, folder, env, values)
    assert code == 3 and "error: " in said and outputs == {}, said
    assert not list(folder.rglob("pwned"))


def test_the_commands_of_the_workflows_exist():
    from typer.main import get_command

    from effbench.cli import app

    commands = get_command(app).commands
    for path in [*WORKFLOWS, ACTION]:
        for step in steps(path):
            for line in re.findall(r"^\s*(?:\S+/)?effbench (.*?)(?<!\\)$", step.get("run", ""), re.M | re.S):
                command = commands[line.split()[0]]
                known = {option for each in command.params for option in [*each.opts, *each.secondary_opts]}
                assert set(re.findall(r"(?<![\w-])--[a-z-]+", line)) <= known, line
