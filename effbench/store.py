"""Records on disk: one directory `records/<id>` per experiment, written atomically and never changed.

    <root>/records/<id>/record.json       the schema of effbench.records
    <root>/records/<id>/samples.parquet   raw samples, the table of effbench.samples

Records that come from elsewhere are untrusted: bounded, validated, never executed or unpickled.
"""

from __future__ import annotations

import difflib
import errno
import gc
import hashlib
import os
import shutil
import stat
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from effbench.contradictions import contradiction
from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.records import SCHEMA_VERSION, Arm, Interval, MetricValue, Record
from effbench.report.markdown import clean
from effbench.samples import read_samples, write_samples

if TYPE_CHECKING:
    import pandas

MAX_RECORD_BYTES = 16 * 2**20
RESTORE = "restore it from a copy, or leave it out"
Found = TypeVar("Found")


def write(record: Record, samples: pandas.DataFrame, root: Path) -> Path:
    """Write a record and its samples to `root/records/<id>`, both or nothing, and return that directory.

    Args:
        samples: rows with the columns of effbench.samples.

    Raises:
        EffbenchError: the record exists already, the disk is full or not writable.
        InvalidError: the record or the samples do not fit their schema.
    """
    text = record.model_dump_json(indent=1)
    _parse(text.encode(), f"record {record.id}")
    folder = Path(root) / "records"
    final = folder / record.id
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if final.exists():
            raise EffbenchError(f"record {record.id} exists in {folder} and is never overwritten", "use another --out")
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
        temporary.chmod(0o755)
        (temporary / "record.json").write_text(text, encoding="utf-8")
        write_samples(samples, temporary / "samples.parquet")
        for path in (temporary / "record.json", temporary / "samples.parquet", temporary):
            _sync(path)
        temporary.rename(final)
        _sync(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            hint = f"free some space on the disk of {folder}, then run the same command again: it resumes"
            raise EffbenchError(f"the disk is full: record {record.id} was not written", hint) from error
        raise EffbenchError(
            f"record {record.id} was not written: {error}", f"check that {folder} is writable"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def read(path: Path) -> Record:
    """The record of a record directory or of a `record.json`.

    Raises:
        InvalidError: the file is missing, too large, truncated, of a newer schema or does not fit the schema; the
            message names the file and the first problem.
    """
    path = Path(path)
    return _read(str(path / "record.json" if path.is_dir() else path))


def _read(path: str, flags: int = 0) -> Record:
    """`read` of a file by name; with os.O_NOFOLLOW among the flags a link is refused."""
    try:
        # A plain open would hang on a named pipe that somebody put there.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise InvalidError(f"{path} is not a file")
            # from a buffer of the file's size: reading up to the limit would set aside the limit for each record
            content = os.read(handle, min(found.st_size, MAX_RECORD_BYTES) + 1)
            while 0 < len(content) <= MAX_RECORD_BYTES and (more := os.read(handle, MAX_RECORD_BYTES)):
                content += more
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InvalidError(f"{path} is a link, which is not followed", "put the record itself there") from error
        raise InvalidError(f"{path} cannot be read: {error.strerror}", "list the runs: effbench list runs") from error
    if len(content) > MAX_RECORD_BYTES:
        raise InvalidError(f"{path} is larger than {MAX_RECORD_BYTES // 2**20} MiB: not a record")
    record = _parse(content, path)
    if said := contradiction(record):
        raise InvalidError(f"{path} contradicts itself: {said}", RESTORE)
    return record


def read_all(root: Path) -> tuple[list[Record], list[str]]:
    """All records under `root/records`, oldest first, and one sentence for each that cannot be read."""
    problems: list[str] = []
    # The garbage collector would walk the growing list again and again: more than half of the time for many records.
    collecting = gc.isenabled()
    gc.disable()
    try:
        records = each(root, problems, lambda record: record)
    finally:
        if collecting:
            gc.enable()
    return sorted(records, key=lambda record: (created(record), record.id)), problems


def each(root: Path, problems: list[str], take: Callable[[Record], Found]) -> list[Found]:
    """What `take` keeps of each record under `root/records`, by name: they are read one by one.

    Links are not followed, and a measurement that lies there twice, under two ids, is given once.

    Args:
        problems: gets one sentence for each record that is left out.
    """
    found: dict[str, Found] = {}
    seen: dict[bytes, list[str]] = defaultdict(list)
    for name in names(root):
        try:
            record = member(root, name)
        except InvalidError as error:
            problems.append(clean(str(error), None))
        else:
            found[name] = take(record)
            seen[fingerprint(record)].append(name)
    left_out = doubled(root, seen)
    problems += left_out.values()
    return [value for name, value in found.items() if name not in left_out]


def doubled(root: Path, seen: dict[bytes, list[str]]) -> dict[str, str]:
    """The records that do not count since their measurement lies there twice, each with a sentence why.

    Of records that are equal but for the id the first counts. Where they differ one was edited, it may be any of them:
    none counts.

    Args:
        seen: names of records by `fingerprint`.
    """
    said = {}
    for same in (each for each in seen.values() if len(each) > 1):
        first, *others = same
        whole = member(root, first)
        if all(member(root, name).model_copy(update=dict(id=first)) == whole for name in others):
            left_out, why = others, f"is a copy: the same measurement as {first}, which alone is counted"
        else:
            listed = ", ".join(same[:3]) + (f" and {len(same) - 3} more" if len(same) > 3 else "")
            left_out, why = same, f"is one measurement under several ids that differ ({listed}): one of them was edited"
        said |= {name: f"{root}/records/{name} {why}" for name in left_out}
    return said


def member(root: Path, name: str) -> Record:
    """The record of that id under `root/records`.

    Raises:
        InvalidError: as `read`, or it is a link, or holds another id.
    """
    folder = f"{root}/records/{name}"
    if os.path.islink(folder):
        raise InvalidError(f"{folder} is a link, which is not followed", "put the record itself there")
    record = _read(f"{folder}/record.json", os.O_NOFOLLOW)
    if record.id != name:
        raise InvalidError(f"{folder} holds the record {record.id!r}: copied or renamed by hand")
    return record


def fingerprint(record: Record) -> bytes:
    """16 bytes that two records share only where one is a copy of the other, whatever its id.

    They come from what clocks measured, which no two runs have in common, but for the figures that a ranking uses: a
    copy is known (`doubled`) also where somebody changed its date or its speed-up.
    """
    facts: list[Any] = [record.wall_time, record.lockstep_overhead]
    for arm in record.arms:
        facts += [arm.name, arm.test_time and arm.test_time.total]
    return hashlib.blake2b(repr(facts).encode(errors="replace"), digest_size=16).digest()


def created(record: Record) -> datetime:
    """When the record was made; a time without a zone is read as UTC."""
    return record.created if record.created.tzinfo else record.created.replace(tzinfo=UTC)


def find(root: Path, name: str) -> Path:
    """The directory of a run: its id, a unique beginning of it, "latest", or a path to a record directory.

    Raises:
        UsageError: there is none, or more than one begins so.
    """
    if (Path(name) / "record.json").is_file():
        return Path(name)
    if Path(name).name == "record.json" and Path(name).is_file():
        return Path(name).parent
    folders = {folder.name: folder for folder in _folders(Path(root))}
    if not folders:
        raise UsageError(f"there is no run in {root}", "make one: effbench run --method METHOD --task TASK")
    if name == "latest":
        problems: list[str] = []
        newest = max(each(Path(root), problems, lambda record: (created(record), record.id)), default=None)
        if newest is None:
            raise InvalidError(f"no run in {root} can be read; the first problem: {problems[0]}")
        return folders[newest[1]]
    matches = [name] if name in folders else [each for each in folders if name and each.startswith(name)]
    if len(matches) == 1:
        return folders[matches[0]]
    if matches:
        raise UsageError(f"{len(matches)} runs begin with {name!r}: {', '.join(matches[:5])}", "give more of the id")
    near = difflib.get_close_matches(name, folders, n=1, cutoff=0.5)
    raise UsageError(
        f"there is no run {name!r} in {root}" + (f"; did you mean {near[0]!r}?" if near else ""),
        "list the runs: effbench list runs",
    )


def load(path: str | Path, samples: bool = False) -> pandas.DataFrame:
    """Results as a pandas frame: one row per arm, or the raw samples.

    Args:
        path: a record directory, or a folder that holds records (a leaderboard, the --out of a run).
        samples: return the samples (columns of effbench.samples, and `run`) instead.

    Returns:
        One row per arm, oldest run first. Columns: run, created, task, data, backbone, envelope (rank only rows that
        share it), run_status; arm, spec, kind, control, phase, status, error; test_speedup, image_speedup,
        train_speedup, end_to_end_speedup, method_speedup (ratios, each with _low, _high, _verdict); promised and
        realised (speed-up of the FLOPs, and the share of it that was measured); train_seconds, test_seconds, latency
        (seconds at batch 1); test_flops, test_overhead_flops, train_flops (per image-caption pair, 1 MAC = 2 FLOPs),
        test_useful_flops, test_analytic_flops, test_low_bit_ops; seconds_to_target, flops_to_target (training up to
        the target on dev), break_even (queries that pay for it); parameters, weight_bytes, disk_bytes, peak_bytes
        (process), tensor_peak_bytes, train_peak_bytes; tokens_first, tokens_last; and for each metric M of its task:
        M, M_low, M_high, M_lossiness, M_lossiness_low, M_lossiness_high (fractions), M_note. What was not measured
        is missing (NaN or None).

    Raises:
        InvalidError: `path` holds no record, or is itself a damaged record. Damaged ones among others are left out
            with a warning.
    """
    import pandas as pd

    path = Path(path)
    if (path / "record.json").exists():
        records, folders = [read(path)], [path]
    else:
        root = path if (path / "records").is_dir() else path.parent if path.name == "records" else path
        records, problems = read_all(root)
        folders = [root / "records" / record.id for record in records]
        for problem in problems:
            warnings.warn(problem, stacklevel=2)
        if not records:
            raise InvalidError(f"{path} holds no record", "give a record directory or a leaderboard folder")
    if not samples:
        frame = pd.DataFrame([row(record, arm) for record in records for arm in record.arms])
        empty = [column for column in frame if frame[column].isna().all()]
        return frame.astype(dict.fromkeys(empty, float))  # a column of None would be of objects
    frames = []
    for record, folder in zip(records, folders, strict=True):
        frame = read_samples(folder / "samples.parquet")
        frame.insert(0, "run", record.id)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _folders(root: Path) -> list[Path]:
    """The record directories under a root."""
    return [root / "records" / name for name in names(root)]


def names(root: Path) -> list[str]:
    """The names of the record directories under a root, in order; hidden ones are unfinished writes."""
    folder = Path(root) / "records"
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _parse(content: bytes, name: str) -> Record:
    try:
        record = Record.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(ascii(part).strip("'") for part in first["loc"])
        found = first.get("input")
        if where == "schema_version" and isinstance(found, int) and found > SCHEMA_VERSION:
            message = f"{name} was written by a newer effbench (schema {found}; this one reads {SCHEMA_VERSION})"
            raise InvalidError(message, "pip install --upgrade effbench") from None
        if first["type"] == "json_invalid":
            raise InvalidError(f"{name} is truncated or not JSON: {first['msg']}", RESTORE) from None
        count = error.error_count()
        more = f" (and {count - 1} more)" if count > 1 else ""
        problem = f"{where}: {first['msg']}" if where else first["msg"]
        raise InvalidError(f"{name} is not a record: {problem}{more}", RESTORE) from None
    if sum(arm.kind == "baseline" for arm in record.arms) != 1:
        raise InvalidError(f"{name} is not a record: it needs exactly one baseline arm", RESTORE)
    if len({arm.name for arm in record.arms}) != len(record.arms):
        raise InvalidError(f"{name} is not a record: two arms have the same name", RESTORE)
    return record


def row(record: Record, arm: Arm) -> dict[str, Any]:
    """One row of `load`, by column; None is what was not measured."""
    envelope = record.envelope
    row = dict(
        run=record.id,
        created=created(record),
        task=envelope.task,
        data=envelope.data,
        backbone=envelope.backbone,
        envelope=envelope.digest,
        run_status=record.status,
        arm=arm.name,
        spec=arm.spec,
        kind=arm.kind,
        control=arm.control,
        phase=arm.phase,
        status=arm.status,
        error=arm.error,
    )
    for name in ("test_speedup", "image_speedup", "train_speedup", "end_to_end_speedup", "method_speedup"):
        ratio = getattr(arm, name)
        row |= bounds(name, ratio) | {f"{name}_verdict": ratio and ratio.verdict}
    row |= dict(
        train_seconds=arm.train_time and arm.train_time.total,
        test_seconds=arm.test_time and arm.test_time.total,
        test_flops=arm.test_flops and arm.test_flops.dense,
        test_overhead_flops=arm.test_flops and arm.test_flops.overhead,
        train_flops=arm.train_flops and arm.train_flops.dense,
        seconds_to_target=arm.economics and arm.economics.seconds_to_target,
        flops_to_target=arm.economics and arm.economics.flops_to_target,
        break_even=arm.economics and arm.economics.break_even,
        test_useful_flops=arm.test_flops and arm.test_flops.useful,
        test_analytic_flops=arm.test_flops and arm.test_flops.analytic,
        test_low_bit_ops=arm.test_flops and arm.test_flops.low_bit,
        promised=arm.promised,
        realised=arm.realised,
        latency=next((timing.seconds for timing in arm.by_batch if timing.batch == 1), None),
        parameters=arm.parameters,
        weight_bytes=arm.weight_bytes,
        disk_bytes=arm.disk_bytes or None,
        peak_bytes=arm.memory and arm.memory.run_peak,
        tensor_peak_bytes=arm.memory and arm.memory.tensor_peak,
        train_peak_bytes=arm.train_memory and arm.train_memory.tensor_peak,
        tokens_first=arm.tokens[0] if arm.tokens else None,
        tokens_last=arm.tokens[-1] if arm.tokens else None,
    )
    for name, metric in arm.metrics.items():
        columns = bounds(name, metric) | bounds(f"{name}_lossiness", metric.lossiness) | {f"{name}_note": metric.note}
        row |= {column: value for column, value in columns.items() if column not in row}
    return row


def bounds(name: str, figure: Interval | MetricValue | None) -> dict[str, float | None]:
    """A figure and its interval as columns of a row."""
    return {
        name: figure and figure.value,
        f"{name}_low": figure and figure.low,
        f"{name}_high": figure and figure.high,
    }


def _sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
