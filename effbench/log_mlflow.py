"""Records in MLflow: one run per record, one nested run per arm. Needs the extra effbench[mlflow], no server.

Where they go is what MLFLOW_TRACKING_URI says, as everywhere in MLflow. Where it says nothing: MLflow's own database
`mlflow.db` if SQLAlchemy is installed, else the folder `mlruns`, both in the current directory. The experiment is
MLFLOW_EXPERIMENT_NAME, or `effbench`. MLflow is imported only when something is logged: beside a measurement it would
take memory and time.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench import store
from effbench.errors import EffbenchError, UsageError
from effbench.records import Arm, Record
from effbench.report.markdown import clean, command, span

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "effbench"
RECORD_TAG = "effbench.record"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
LONGEST_KEY, LONGEST_PARAM, LONGEST_TAG = 250, 500, 5000  # what every kind of MLflow's stores takes
MOST = 90  # params or tags that are sent at once; MLflow takes 100


def check(log: str | None = "mlflow") -> None:
    """Refuse what could not be logged before any work is done, without importing MLflow.

    Args:
        log: as `--log` says; None for nowhere.

    Raises:
        UsageError: another place than MLflow, or it is not installed, or lacks what its tracking location needs.
    """
    if log is None:
        return
    if log != "mlflow":
        raise UsageError(f"--log {log}: no place to log to that is known", "use --log mlflow, or leave it out")
    if importlib.util.find_spec("mlflow") is None:
        raise UsageError("--log mlflow: MLflow is not installed", "pip install 'effbench[mlflow]', or leave it out")
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme in DATABASES and importlib.util.find_spec("sqlalchemy") is None:
        raise UsageError(
            f"--log mlflow: MLFLOW_TRACKING_URI names a database ({scheme}), for which MLflow needs SQLAlchemy",
            "pip install sqlalchemy alembic, or name a folder or a server",
        )


def log_or_warn(folder: Path, warn: Callable[[str], None], note: Callable[[str], None]) -> None:
    """Log a record that was just written; a failure is a warning, and never the record's loss.

    Args:
        folder: of the record, below records/ of a leaderboard.
    """
    try:
        note(f"MLflow: {log(folder)}")
    except Exception as error:  # whatever a tracking server comes up with: the record is safe on disk
        again = f"effbench export --log mlflow {folder.name} --out {folder.parent.parent}"
        said = str(error) if isinstance(error, EffbenchError) else f"{type(error).__name__}: {error}"
        warn(f"the record was written, but not logged to MLflow: {clean(said, 300)}; log it again: {again}")


def log(folder: Path) -> str:
    """Log a stored record unless it is logged already, and say where.

    Returns:
        One line: the MLflow run and its tracking location.

    Raises:
        UsageError: as `check`. InvalidError: the record cannot be read. Any error of MLflow's.
    """
    check()
    record = store.read(folder)
    client = _client()
    place = re.sub(r"//[^/@]*@", "//", client.tracking_uri)  # a URL may hold a password
    experiment = _experiment(client)
    known = _known(client, experiment, record.id)
    if known:
        return f"{record.id} is there already, run {known} at {place}"
    again = command(record.provenance.command)
    note = span(again, LONGEST_TAG // 2) if again else ""  # half of it: the backticks around it may be as long
    tags = _tags(record) | {"mlflow.source.type": "LOCAL", "mlflow.note.content": note}
    parent = _run(client, experiment, record, record.id, _params(record), _totals(record), tags)
    try:
        client.log_artifact(parent, str(folder / "record.json"))
        for arm in record.arms:
            tags = _tags(record) | {"effbench.arm": arm.name, "effbench.arm_status": arm.status}
            tags |= {"mlflow.parentRunId": parent, "effbench.error": arm.error}
            child = _run(client, experiment, record, arm.name, _params(record, arm), _metrics(record, arm), tags)
            client.set_terminated(child, "FINISHED" if arm.status == "ok" else "FAILED", _ended(record))
    except BaseException:
        client.set_terminated(parent, "FAILED")
        raise
    client.set_terminated(parent, "FINISHED", _ended(record))  # only now: what is not finished is logged again
    return f"{record.id} with {len(record.arms)} arms, run {parent} at {place}"


def _ended(record: Record) -> int:
    """When the experiment ended, in milliseconds of Unix time."""
    return max(0, round(1000 * store.created(record).timestamp()))


def _client() -> MlflowClient:
    """A client of the tracking location; nothing is sent to anybody else."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Since 3.13 MLflow refuses folders unless this is set. Who names one, or has no SQLAlchemy, means a folder.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow
    from mlflow import MlflowClient

    uri = mlflow.get_tracking_uri()
    if not mlflow.is_tracking_uri_set() and importlib.util.find_spec("sqlalchemy") is None:
        uri = Path("mlruns").absolute().as_uri()
    return MlflowClient(uri)


def _experiment(client: MlflowClient) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    found = client.get_experiment_by_name(name)
    if found is None:
        return client.create_experiment(name)
    if found.lifecycle_stage != "active":
        raise EffbenchError(f"the MLflow experiment {name} was deleted", "restore it, or set MLFLOW_EXPERIMENT_NAME")
    return found.experiment_id


def _known(client: MlflowClient, experiment: str, record: str) -> str:
    """The finished run of a record; empty where there is none. An id holds no character that a filter reads."""
    asked = f"tags.`{RECORD_TAG}` = '{record}' and attributes.status = 'FINISHED'"
    runs = client.search_runs([experiment], asked, max_results=1000)
    return next((run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags), "")


def _run(
    client: MlflowClient,
    experiment: str,
    record: Record,
    name: str,
    params: dict[str, Any],
    metrics: dict[str, float],
    tags: dict[str, str],
) -> str:
    """A run with all that is known of it; what is too long for MLflow is cut."""
    from mlflow.entities import Metric, Param, RunTag

    ended = _ended(record)
    started = max(0, ended - round(1000 * record.wall_time))
    run = client.create_run(experiment, start_time=started, run_name=clean(name, LONGEST_KEY) or "arm").info.run_id
    sent = [Param(key, clean(str(value), LONGEST_PARAM)) for key, value in _keyed(params).items()]
    labels = [RunTag(key, clean(str(value), LONGEST_TAG)) for key, value in tags.items() if value]
    client.log_batch(run, metrics=[Metric(key, value, ended, 0) for key, value in _keyed(metrics).items()])
    for start in range(0, max(len(sent), len(labels)), MOST):
        client.log_batch(run, params=sent[start : start + MOST], tags=labels[start : start + MOST])
    return run


def _keyed(values: dict[str, Any]) -> dict[str, Any]:
    """By keys that every store takes: letters, digits, _ - . and spaces, no path, each of them once."""
    found: dict[str, Any] = {}
    taken = set()
    for name, value in values.items():
        first = key = re.sub(r"[^A-Za-z0-9_.\- ]", "_", name)[: LONGEST_KEY - 8].strip(". ") or "_"
        number = 1
        while key.lower() in taken:  # on some disks a and A are one file
            number += 1
            key = f"{first}-{number}"
        taken.add(key.lower())
        found[key] = value
    return found


def _params(record: Record, arm: Arm | None = None) -> dict[str, Any]:
    envelope = record.envelope
    found: dict[str, Any] = dict(task=envelope.task, data=envelope.data, backbone=envelope.backbone)
    if arm is not None:
        own = dict(arm=arm.name, spec=arm.spec or arm.name, kind=arm.kind, control=arm.control or "none")
        return own | found | dict(phase=arm.phase)
    from effbench.report.envelope_section import flat

    protocol = flat(envelope.protocol.model_dump(), "protocol")
    return found | dict(weights=envelope.weights, split=envelope.split, device_model=envelope.device_model) | protocol


def _tags(record: Record) -> dict[str, str]:
    """What the runs of a record are found by."""
    return {
        RECORD_TAG: record.id,
        "effbench.envelope": record.envelope.digest,
        "effbench.commit": record.provenance.commit,
        "effbench.version": record.provenance.effbench,
        "effbench.status": record.status,
        "effbench.why_invalid": record.why_invalid,
        "effbench.synthetic": "yes" if record.envelope.synthetic else "no",
    }


def _totals(record: Record) -> dict[str, float]:
    return _finite(
        dict(
            wall_seconds=record.wall_time,
            peak_memory_bytes=record.peak_memory,
            load_per_core=record.provenance.load,
            arms=len(record.arms),
            failed_arms=sum(arm.status == "FAILED" for arm in record.arms),
        )
    )


def _metrics(record: Record, arm: Arm) -> dict[str, float]:
    """Every number that was measured of an arm, by its name in `effbench.load`."""
    return _finite(store.row(record, arm))


def _finite(values: dict[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in values.items() if type(value) in (int, float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
