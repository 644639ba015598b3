"""Results as one table for a notebook or a spreadsheet: a Parquet or CSV file, one row per arm, or the raw samples.

The columns are those of `effbench.load`, with types that do not depend on what was measured: a column of counts stays
one of whole numbers where some are missing (pandas reads it as Int64), and two exports can be put together. The
Parquet schema carries `effbench.version`, `effbench.schema` (of the records) and `effbench.table` (arms or samples).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench import store
from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.records import SCHEMA_VERSION, Record
from effbench.samples import TYPES as SAMPLES
from effbench.samples import read_samples
from effbench.spreadsheet import FORMULA, plain_cell
from effbench.whole_file import whole_file

if TYPE_CHECKING:
    import fsspec
    import pyarrow

ENDINGS = (".parquet", ".csv")
TEXTS = "run task data backbone envelope run_status arm spec kind control phase status error"
COUNTS = (
    "test_flops test_overhead_flops train_flops test_useful_flops test_analytic_flops test_low_bit_ops parameters "
    "weight_bytes disk_bytes peak_bytes tensor_peak_bytes train_peak_bytes tokens_first tokens_last"
)


def kind_of(column: str) -> str:
    """The Arrow type of a column of `effbench.load`: that of a metric is known by its ending."""
    if column == "created":
        return "timestamp[us, UTC]"
    if column in TEXTS.split() or column.endswith(("_verdict", "_note")):
        return "string"
    return "int64" if column in COUNTS.split() else "double"


def export(
    to: str, records: Iterable[tuple[Record, Path]], samples: bool = False, force: bool = False
) -> tuple[int, list[str]]:
    """Write the arms of records, or their raw samples, to a file; whole or not at all.

    Args:
        to: a path or a URL that fsspec knows, ending in .parquet or .csv; missing folders are made.
        records: each with its folder, oldest first.
        force: replace a file that is there.

    Returns:
        The number of rows, and one sentence for each record whose samples cannot be read and are left out.

    Raises:
        UsageError: another ending, a folder, a file that is there, or a URL of which nothing is known here.
        InvalidError: there is nothing to write. EffbenchError: it could not be written.
    """
    fs, path = target(to, force)
    problems: list[str] = []
    tables = _samples(records, problems) if samples else _arms(records)
    try:
        first = next(tables, None)
        if first is None:
            raise InvalidError(
                f"there is nothing to export: {problems[0] if problems else 'no record'}", "effbench list runs"
            )
        rows = _written(_chain(first, tables), first.schema, path, fs)
    except OSError as error:
        raise EffbenchError(f"{to} was not written: {error.strerror or error}", "choose another --to") from error
    return rows, problems


def target(to: str, force: bool = False) -> tuple[fsspec.AbstractFileSystem | None, str]:
    """The file system (None: this machine's) and the path of a file that may be written.

    Raises:
        UsageError: as `export` does.
    """
    if not to.lower().endswith(ENDINGS):
        raise UsageError(f"--to {to}: no file of a kind that is known", "end it in .parquet or .csv")
    fs, path = None, to.removeprefix("file://") if to.startswith("file://") else to
    if "://" in path:
        from fsspec.core import url_to_fs

        try:
            fs, path = url_to_fs(to)
            there, folder = fs.exists(path), fs.isdir(path)
        except (ImportError, ValueError) as error:  # a library that is not installed, an unknown protocol
            raise UsageError(f"--to {to}: {error}", "install what it names, or give a path") from error
        except Exception as error:  # the libraries behind fsspec have errors of their own
            raise EffbenchError(f"--to {to} cannot be reached: {type(error).__name__}: {error}") from error
    else:
        there, folder = os.path.lexists(path), os.path.isdir(path)
    if folder:
        raise UsageError(f"--to {to} is a folder", "name a file in it")
    if there and not force:
        raise UsageError(f"--to {to} is there already", "choose another name, or replace it with --force")
    return fs, path


def _arms(records: Iterable[tuple[Record, Path]]) -> Iterator[pyarrow.Table]:
    """One table with a row per arm."""
    import pyarrow as pa

    rows = [store.row(record, arm) for record, _ in records for arm in record.arms]
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    fields = [(name, _type(kind_of(name))) for name in names]
    columns = [_column([row.get(name) for row in rows], kind) for name, kind in fields]
    yield pa.table(columns, schema=_schema(fields, "arms"))


def _column(values: list[Any], kind: pyarrow.DataType) -> pyarrow.Array:
    """Values as a column; one that does not fit becomes missing (a record may name its metrics as it likes)."""
    import pyarrow as pa

    kinds = str if pa.types.is_string(kind) else int if pa.types.is_integer(kind) else (int, float)
    if not pa.types.is_timestamp(kind):
        values = [value if isinstance(value, kinds) else None for value in values]
    return pa.array(values, kind)


def _samples(records: Iterable[tuple[Record, Path]], problems: list[str]) -> Iterator[pyarrow.Table]:
    """A table per record; what cannot be read goes into `problems`."""
    import pyarrow as pa

    schema = _schema([("run", _type("string")), *((name, _type(kind)) for name, kind in SAMPLES.items())], "samples")
    for record, folder in records:
        try:
            frame = read_samples(folder / "samples.parquet")
        except InvalidError as error:
            problems.append(str(error))
            continue
        frame.insert(0, "run", record.id)
        yield pa.Table.from_pandas(frame, schema=schema, preserve_index=False).replace_schema_metadata(schema.metadata)


def _type(kind: str) -> pyarrow.DataType:
    import pyarrow as pa

    return pa.timestamp("us", "UTC") if kind.startswith("timestamp") else pa.type_for_alias(kind)


def _schema(fields: list[tuple[str, pyarrow.DataType]], table: str) -> pyarrow.Schema:
    """The columns, with what pandas needs to give whole numbers back, and where the table comes from."""
    import pandas as pd
    import pyarrow as pa

    schema = pa.schema(fields)
    empty = schema.empty_table().to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    ours = {"effbench.version": _version(), "effbench.schema": str(SCHEMA_VERSION), "effbench.table": table}
    return schema.with_metadata(pa.Schema.from_pandas(empty, preserve_index=False).metadata | ours)


def _version() -> str:
    try:
        return version("effbench")
    except PackageNotFoundError:
        return ""


def _chain(first: pyarrow.Table, others: Iterator[pyarrow.Table]) -> Iterator[pyarrow.Table]:
    yield first
    yield from others


def _written(
    tables: Iterator[pyarrow.Table], schema: pyarrow.Schema, path: str, fs: fsspec.AbstractFileSystem | None
) -> int:
    """Write a local file, or a temporary one that is then put where the URL says; the number of rows."""
    if fs is None:
        with whole_file(Path(path).absolute()) as file:
            return _fill(tables, schema, path, file)
    with tempfile.TemporaryDirectory(prefix="effbench-") as folder:
        rows = _fill(tables, schema, path, Path(folder) / "table")
        try:
            fs.makedirs(fs._parent(path), exist_ok=True)
            fs.put_file(str(Path(folder) / "table"), path)
        except OSError:
            raise
        except Exception as error:
            raise EffbenchError(f"{path} was not written: {type(error).__name__}: {error}") from error
    return rows


def _fill(tables: Iterator[pyarrow.Table], schema: pyarrow.Schema, path: str, file: Path) -> int:
    """Write the tables in the format that the path's ending names; the number of rows."""
    rows = 0
    with _writer(path)(str(file), schema) as writer:
        for table in tables:
            writer.write_table(table if path.lower().endswith(".parquet") else _harmless(table))
            rows += len(table)
    return rows


def _writer(path: str) -> Callable[[str, pyarrow.Schema], Any]:
    if path.lower().endswith(".parquet"):
        import pyarrow.parquet as pq

        return lambda file, schema: pq.ParquetWriter(file, schema, compression="zstd")
    import pyarrow.csv as csv

    return lambda file, schema: csv.CSVWriter(file, _harmless(schema.empty_table()).schema)


def _harmless(table: pyarrow.Table) -> pyarrow.Table:
    """For CSV: text that a spreadsheet would take for a formula gets a ' before it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    formulas = f"^[{re.escape(''.join(FORMULA))}]"
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            formula = pc.match_substring_regex(table[field.name], formulas)
            marked = pc.if_else(formula, pc.binary_join_element_wise("'", table[place], ""), table[place])
            table = table.set_column(place, field, marked)
    return table.rename_columns([*map(plain_cell, table.column_names)])
