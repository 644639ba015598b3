"""Raw samples of an experiment: one long table, `samples.parquet` beside `record.json`.

A row is one timed step of one arm (`kind` "step") or one per-item score ("item"); what does not apply is null.

    kind           "step" or "item"
    arm            name of the arm
    seed           seed of the arm
    phase          "settle" (a method's choices before training), "features", "train", "quality", or "timing 16" with
                   the batch size
    index          steps: number of the step within arm, seed and phase, from 0; equal indices of two arms are a pair.
                   items: number of the item
    seconds        step: wall seconds of the arm's step, device synchronised on both sides
    image_seconds  step: the image tower's share of it, the method's overhead taken off; so for text_seconds,
                   connector_seconds, prefill_seconds (a language model on a whole sequence), decode_seconds (the
                   second token that is written and all after it, choosing them included), overhead_seconds (the
                   method's own scoring), head_seconds (the rest of the forward pass, loss), backward_seconds and
                   optimiser_seconds
    data_wait      step: seconds waited for the batch (shared by all arms)
    transfer       step: seconds of its way from the host to the device (shared by all arms)
    joules         step: energy used, where the machine can read it
    loss           step: training loss
    score          item: name of the per-item score, e.g. "t2i_rank"; with the column's number where there are several
    group          item: test image that the item belongs to
    value          item: the score

A loop appends plain dicts with the columns it knows (`rows.append(dict(kind="step", arm="noop", seed=0,
phase="train", index=7, seconds=0.21, loss=3.2))`) and hands over `pandas.DataFrame(rows)`; `item_samples` makes the
rows of a whole array of scores. The file is untrusted input: bounded, validated, never unpickled.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from effbench.errors import InvalidError

if TYPE_CHECKING:
    import pandas
    import pyarrow

    from effbench.task import Items

MAX_ROWS = 100_000_000
#: what a step's seconds are made of
PARTS = ("image", "text", "connector", "prefill", "decode", "overhead", "head", "backward", "optimiser")
TYPES = {
    "kind": "string",
    "arm": "string",
    "seed": "int64",
    "phase": "string",
    "index": "int64",
    "seconds": "double",
    **{f"{part}_seconds": "double" for part in PARTS},
    "data_wait": "double",
    "transfer": "double",
    "joules": "double",
    "loss": "double",
    "score": "string",
    "group": "int64",
    "value": "double",
}
#: columns that samples of schema 1 lack
LATER = {*(f"{part}_seconds" for part in PARTS if part != "image"), "transfer", "joules"}


def item_samples(arm: str, seed: int, score: str, items: Items) -> pandas.DataFrame:
    """The sample rows of one per-item score of one arm and seed, in the order of the items."""
    import numpy as np
    import pandas as pd

    columns = dict(kind="item", arm=arm, seed=seed, phase="quality", index=np.arange(len(items.values)))
    values = np.asarray(items.values, float)
    if values.ndim == 1:
        return pd.DataFrame(columns | dict(score=score, group=items.group, value=values))
    parts = enumerate(values.T)
    return pd.concat([item_samples(arm, seed, f"{score}.{n}", replace(items, values=part)) for n, part in parts])


def write_samples(samples: pandas.DataFrame, path: Path) -> None:
    """Write samples; columns in any order, those that are missing become null.

    Raises:
        InvalidError: an unknown column, or values that do not fit a column's type.
        OSError: the disk is full or not writable.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    unknown = sorted(set(samples.columns) - set(TYPES))
    if unknown:
        raise InvalidError(f"samples have no column {', '.join(unknown)}; there are {', '.join(TYPES)}")
    samples = samples.reindex(columns=pd.Index(list(TYPES)))
    try:
        table = pa.Table.from_pandas(samples, schema=_schema(), preserve_index=False).replace_schema_metadata(None)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InvalidError(f"samples do not fit their columns: {error}") from error
    with path.open("wb") as file:
        pq.write_table(table, file, compression="zstd")


def read_samples(path: Path) -> pandas.DataFrame:
    """The samples of a file, with the columns above.

    Raises:
        InvalidError: the file is missing, damaged, too long, or holds something else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows > MAX_ROWS:
                raise InvalidError(f"{path} has {file.metadata.num_rows} rows: not samples of a record")
            found = file.read(columns=[name for name in TYPES if name not in LATER or name in file.schema_arrow.names])
            for name in LATER - set(found.column_names):
                found = found.append_column(name, pa.nulls(len(found), TYPES[name]))
            return found.select(list(TYPES)).cast(_schema()).to_pandas()
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidError(f"{path} does not hold samples: {reason}", "restore or delete the record") from error


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    return pa.schema([(column, pa.type_for_alias(kind)) for column, kind in TYPES.items()])
