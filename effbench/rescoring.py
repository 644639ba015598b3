"""Metrics had again from the raw per-item scores of records, without the task that defined them and without torch.

How a task makes a metric of scores is code, and no part of a record. So a few usual readings of a column of scores are
tried (mean, share in per cent, median, recall at k, loss per token, perplexity), and one is taken only if it gives
the recorded value of the metric in every arm and every seed. Of a metric that none of them gives nothing is claimed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from effbench.records import Record
from effbench.task import Items, Metric, unchanged

if TYPE_CHECKING:
    import pandas

MAX_K = 10_000  # of recall at k


class Scores:
    """The per-item scores of one record.

    Args:
        samples: its raw samples (columns of effbench.samples); untrusted.
    """

    def __init__(self, record: Record, samples: pandas.DataFrame) -> None:
        self.record = record
        found = samples[(samples["kind"] == "item") & samples["score"].notna() & samples["group"].notna()]
        found = found.sort_values("index", kind="stable")
        self._frames = dict(iter(found.groupby("score")))
        self._parts: dict[str, dict[tuple[str, int], pandas.DataFrame]] = {}
        self.columns = list(self._frames)

    def _part(self, column: str, arm: str, seed: int) -> pandas.DataFrame | None:
        """The rows of one column, arm and seed by item; None where there is none."""
        if column not in self._parts:
            self._parts[column] = dict(iter(self._frames[column].groupby(["arm", "seed"])))
        return self._parts[column].get((arm, seed))

    def items(self, arm: str, columns: tuple[str, ...]) -> list[Items] | None:
        """An arm's scores by seed, in the order of the items; None where they are not whole or not finite.

        Args:
            columns: one name gives values (n,), several (n, columns).
        """
        by_seed = []
        for seed in self.record.envelope.protocol.seeds:
            frames = [self._part(column, arm, seed) for column in columns]
            first = frames[0]
            if first is None or first["index"].duplicated().any():
                return None
            place = first[["index", "group"]].to_numpy()
            if not all(each is not None and np.array_equal(each[["index", "group"]], place) for each in frames):
                return None
            values = np.stack([frame["value"].to_numpy(float) for frame in frames], axis=1)
            if not np.isfinite(values).all():
                return None
            group = first["group"].to_numpy(np.int64)
            by_seed.append(Items(values[:, 0] if len(columns) == 1 else values, group))
        return by_seed

    def agrees(self, metric: Metric, columns: tuple[str, ...]) -> bool:
        """Whether a reading gives the recorded values of the metric, in every arm that has them, the baseline first."""
        if not set(columns) <= set(self.columns):
            return False
        arms = [arm for arm in self.record.arms if metric.name in arm.metrics]
        for arm in sorted(arms, key=lambda arm: arm.kind != "baseline"):
            items, recorded = self.items(arm.name, columns), arm.metrics[metric.name].by_seed
            if items is None or len(items) != len(recorded):
                return False
            for each, value in zip(items, recorded, strict=True):
                if not math.isclose(_value(metric, each), value, rel_tol=1e-9, abs_tol=1e-9):
                    return False
        return bool(arms)


def reading(name: str, of: list[Scores]) -> tuple[Metric, tuple[str, ...]] | None:
    """The metric of that name and the columns of scores that it is read from; None where no reading gives its values.

    Args:
        of: records that all must agree with it.
    """
    values = [arm.metrics[name] for scores in of for arm in scores.record.arms if name in arm.metrics]
    if not values or len({value.higher_is_better for value in values}) > 1:
        return None
    first = values[0]
    base = Metric(name, "", unchanged, first.higher_is_better, first.chance, first.ceiling, unit=first.unit)
    for metric, columns in _readings(base, of[0].columns):
        if all(scores.agrees(metric, columns) for scores in of):
            return metric, columns
    return None


def _readings(base: Metric, columns: list[str]) -> Iterator[tuple[Metric, tuple[str, ...]]]:
    """Every reading of every column; the metric's own name and columns that begin as it does come first."""
    ranked = re.search(r"([1-9]\d*)$", base.name)
    single: list[dict[str, object]] = [{}, dict(value=_percent), dict(reduce="median")]
    if ranked and int(ranked[1]) <= MAX_K:
        single.insert(0, dict(value=_recall(int(ranked[1]))))
    order = sorted(columns, key=lambda column: (column != base.name, column[:3] != base.name[:3]))
    for column in order:
        stem, _, place = column.rpartition(".")
        if not place.isdigit() or not stem:
            for change in single:
                yield replace(base, items=column, **change), (column,)
        elif place == "0" and f"{stem}.1" in columns:
            for combine in (_per_token, _perplexity):
                yield replace(base, items=stem, combine=combine), (column, f"{stem}.1")


def _value(metric: Metric, items: Items) -> float:
    values = metric.value(items.values)
    if metric.combine is not None:
        return float(metric.combine(values.mean(axis=0)))
    return float(np.median(values) if metric.reduce == "median" else values.mean())


def _percent(scores: np.ndarray) -> np.ndarray:
    return 100.0 * scores


def _recall(k: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda ranks: 100.0 * (ranks <= k)


def _per_token(means: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return means[..., 0] / means[..., 1]


def _perplexity(means: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.exp(_per_token(means))
