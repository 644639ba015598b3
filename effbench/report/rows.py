"""The leaderboard as plain rows for spreadsheets and programs: leaderboard.csv and leaderboard.json."""

from __future__ import annotations

from typing import Any

from effbench.report import figures
from effbench.report.markdown import clean, command
from effbench.report.standings import Section, Standing
from effbench.spreadsheet import plain_cell
from effbench.store import bounds, created

SCHEMA = 2  # of leaderboard.json; columns may be added under one number, none is renamed or changes its meaning


def row(section: Section, standing: Standing) -> dict[str, Any]:
    """One arm of one envelope; what was not measured, or says nothing, is None. Rank what shares envelope and metric.

    Ratios and fractions as they are, time in seconds, memory in bytes, FLOPs per image-caption pair (1 MAC = 2 FLOPs).
    """
    arm, record, envelope = standing.arm, standing.record, section.envelope
    value = figures.quality(arm, record).get(record.primary_metric)
    flops, noise = arm.test_flops, record.control("noop")
    found = dict(
        envelope=section.digest,
        task=envelope.task,
        data=envelope.data,
        synthetic=envelope.synthetic,
        split=envelope.split,
        backbone=envelope.backbone,
        weights=envelope.weights,
        train=envelope.protocol.train,
        device=envelope.device_model,
        threads=envelope.protocol.threads,
        run=record.id,
        created=created(record).isoformat(),
        runs=standing.count,
        arm=arm.name,
        spec=arm.spec,
        kind=arm.kind,
        control=arm.control,
        phase=arm.phase,
        source=arm.source,
        status=arm.status,
        error=arm.error,
        no_quality=arm.no_quality,
    )
    found |= bounds("test_speedup", arm.test_speedup) | {"test_verdict": arm.test_speedup and arm.test_speedup.verdict}
    trained = arm.train_speedup if arm.train_time else None
    found |= bounds("train_speedup", trained) | {"train_verdict": trained and trained.verdict}
    found |= dict(
        flops_dense=flops and flops.dense,
        flops_useful=flops and flops.useful,
        flops_overhead=flops and flops.overhead,
        flops_complete=flops and flops.complete,
        low_bit_ops=flops and flops.low_bit,
        promised=arm.promised,
        realised=arm.realised,
        weight_bytes=arm.weight_bytes or None,
        tensor_peak_bytes=arm.memory and arm.memory.tensor_peak,
        process_peak_bytes=arm.memory and arm.memory.run_peak,
        metric=record.primary_metric,
        unit=value and value.unit,
        higher_is_better=value and value.higher_is_better,
    )
    found |= bounds("quality", value) | bounds("lossiness", value and value.lossiness)
    found |= dict(
        lossiness_note=value and value.note,
        no_loss=value and value.equivalent,
        no_loss_margin=value and value.margin,
        front=standing.front,
        front_probability=standing.probability,
        below=" ".join(standing.below),
    )
    found |= bounds("noise_floor", noise and noise.test_speedup) | {"command": command(record.provenance.command)}
    return found


def cells(found: dict[str, Any]) -> list[Any]:
    """A row for a CSV file: text on one line without hidden characters, never a formula; nothing where it is None."""
    return [_cell(value) for value in found.values()]


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return "" if value is None else value
    return plain_cell(clean(value, None))
