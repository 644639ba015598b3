"""From raw samples to figures of time: where a step's seconds go, and paired speed-ups. Nothing is measured here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from effbench import records, stats
from effbench.samples import PARTS
from effbench.timing import WARMUP

SPLIT_PARTS = {"decoder": ("prefill", "decode")}  # parts of a model that are timed as several
BLOCKS = 30  # training steps are paired in this many blocks, each a miniature of the whole


def split(rows: pd.DataFrame, first: float | None = None) -> records.TimeSplit | None:
    """Seconds of some steps of one arm, summed; None where there are none.

    Args:
        first: seconds of the first step, where it is not among the rows.
    """
    if not len(rows):
        return None
    steps = rows[rows["phase"] != "settle"]
    spent = {part: float(rows[f"{part}_seconds"].sum()) for part in PARTS}
    compute, wait, transfer = (float(rows[column].sum()) for column in ("seconds", "data_wait", "transfer"))
    return records.TimeSplit(
        total=compute + wait + transfer,
        data_wait=wait,
        transfer=transfer,
        compute=compute,
        settle=rows.loc[rows["phase"] == "settle", "seconds"].sum(),
        features=rows.loc[rows["phase"] == "features", "seconds"].sum(),
        first_step=steps["seconds"].iloc[0] if first is None else first,
        steps=len(steps),
        **spent,
    )


def timed(rows: pd.DataFrame, arm: str, batch: int) -> pd.DataFrame:
    """The timed steps of one arm at one batch size, warm-up left out, indexed by pair."""
    found = rows[(rows["arm"] == arm) & (rows["phase"] == f"timing {batch}") & (rows["index"] >= WARMUP)]
    return found.set_index("index")


def middle(rows: pd.DataFrame) -> pd.DataFrame:
    """The half of the steps that took neither longest nor shortest: a machine's hiccups are in the others."""
    order = rows["seconds"].argsort(kind="stable").to_numpy()
    cut = len(rows) // 4
    return rows.iloc[sorted(order[cut : len(rows) - cut])]


def speedup(baseline: pd.DataFrame, arm: pd.DataFrame, *columns: str, level: float = 0.95) -> records.Speedup | None:
    """Of the sum of some columns, paired by step; None where nothing was timed."""
    shared = baseline.index.intersection(arm.index)
    sums = [frame.loc[shared, list(columns)].sum(axis=1).to_numpy() for frame in (baseline, arm)]
    if not len(shared) or not (sums[0].min() > 0 and sums[1].min() > 0):
        return None
    return stats.speedup(*sums, level=level)


def training_speedup(rows: pd.DataFrame, arm: str, level: float = 0.95) -> records.Speedup:
    """Of the whole training, features of a frozen tower included.

    Steps are summed in blocks that each hold their part of the feature pass, of the steps of every seed, and of the
    time in which a method made its choices.
    """
    sums = []
    for name in ("baseline", arm):
        own = rows[(rows["arm"] == name) & rows["phase"].isin(["features", "train"])]
        chosen = rows.loc[(rows["arm"] == name) & (rows["phase"] == "settle"), "seconds"].sum()
        total = np.full(BLOCKS, chosen / BLOCKS)
        for _, part in own.groupby(["phase", "seed"]):
            place = part["index"].to_numpy() * BLOCKS // (part["index"].max() + 1)
            total += np.bincount(place, part["seconds"].to_numpy(), BLOCKS)
        sums.append(total)
    used = (sums[0] > 0) & (sums[1] > 0)
    return stats.speedup(sums[0][used], sums[1][used], level=level)


def by_batch(rows: pd.DataFrame, arm: str, batches: list[int]) -> tuple[records.Timing, ...]:
    """Timed steps of an arm at each batch size, in ascending order."""
    found = []
    for batch in sorted(batches):
        own = timed(rows, arm, batch)
        if len(own):
            ratio = speedup(timed(rows, "baseline", batch), own, "seconds") if arm != "baseline" else None
            low, high = own["seconds"].quantile([0.25, 0.75])
            seconds = middle(own)["seconds"].mean()
            found.append(records.Timing(batch=batch, seconds=seconds, low=low, high=high, speedup=ratio))
    return tuple(found)


def pays_from(timings: tuple[records.Timing, ...]) -> int | None:
    """The smallest batch from which on every one that was timed is FASTER."""
    paying = None
    for timing in reversed(timings):
        if timing.speedup is None or timing.speedup.verdict != "FASTER":
            break
        paying = timing.batch
    return paying


def energy(own: pd.DataFrame, source: str) -> records.Energy | None:
    """Joules of the timed steps; None where nothing could be read."""
    if "joules" not in own or own["joules"].isna().all():
        return None
    return records.Energy(joules_per_step=own["joules"].mean(), source=source)


def ceiling(baseline: pd.DataFrame, changed: set[str]) -> float | None:
    """Amdahl's: the speed-up if the parts that an arm changes took no time at all.

    Args:
        baseline: the baseline's timed steps. changed: names of parts, e.g. {"image"}.
    """
    total = baseline["seconds"].sum()
    columns = [f"{each}_seconds" for part in changed for each in SPLIT_PARTS.get(part, (part,))]
    left = total - baseline[columns].to_numpy().sum()
    return float(total / left) if left > 0 else None


def complete(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Samples as a table that has every column, so that an arm without a part has zeros or gaps in it."""
    frame = pd.DataFrame(rows)
    for part in PARTS:
        column = f"{part}_seconds"
        frame[column] = frame[column].fillna(0.0) if column in frame else 0.0
    if "transfer" not in frame:
        frame["transfer"] = 0.0
    return frame
