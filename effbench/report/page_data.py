"""What the web page shows of an envelope, as plain data for JSON: texts without control characters, finite numbers.

Figures are texts of `effbench.report.figures`, the same as in the Markdown; beside each stands the number that the
page sorts by or draws.
"""

from __future__ import annotations

import math
from typing import Any

from effbench.records import Arm, Envelope, Interval, Record, TimeSplit
from effbench.report import figures
from effbench.report.markdown import clean, command
from effbench.report.standings import Past, Section, Standing, key
from effbench.report.strengths import family, parsed
from effbench.store import created

NONE = figures.NONE
#: heading, whether it sorts as a number, and what it means; the arm's name stands before these
COLUMNS = [
    ("front", True, "★: on the Pareto front of speed-up and lossy-ness; the share of draws in which it is there"),
    ("test speed-up", True, "median of paired ratios baseline / arm, with its 95 % interval"),
    ("verdict", False, "FASTER, SLOWER, NO DIFFERENCE, AMBIGUOUS or TOO FEW SAMPLES"),
    ("lossy-ness", True, "1 - quality / baseline's quality, with its 95 % interval; negative is better"),
    ("quality", True, "the envelope's primary metric"),
    ("against controls", False, "blind controls at the same budget that the method does not beat"),
    ("GFLOPs", True, "per image-caption pair; 1 MAC = 2 FLOPs"),
    ("useful GFLOPs", True, "what masks leave, where that is less"),
    ("peak MiB", True, "all tensors that live together in a test step"),
    ("weights MiB", True, "weights in memory"),
    ("realised", True, "test speed-up / speed-up that the FLOPs promise"),
    ("train speed-up", True, "of arms that are trained on their own"),
    ("phase", False, "when the method is applied"),
    ("status", False, "ok, or why the arm has no figures"),
    ("runs", True, "valid records that hold this arm; the newest that did not fail is shown"),
]
#: what a step's time is made of, in the order of the bars
PARTS = ["image", "text", "connector", "prefill", "decode", "overhead", "head", "backward", "optimiser"]
PARTS += ["data_wait", "transfer"]
LAYERS = 500  # a record from elsewhere may claim any number
LISTED = 50


def envelope(section: Section, room: int) -> dict[str, Any]:
    """An envelope with its first `room` rows.

    Returns:
        digest, title, task (texts), synthetic, facts (name and value each), warnings, metric, invalid (id and reason
        each), measured (number of valid runs), runs (what rows come from) and rows.
    """
    found, shown = section.envelope, section.rows[:room]
    places = {record.id: place for place, record in enumerate(section.records)}
    used = {row.record.id: row.record for row in shown}
    record = section.records[-1] if section.records else None
    parts = [found.task, f"{found.data} (synthetic)" if found.synthetic else found.data, found.backbone]
    parts += [_trained(found), section.anchor]
    return dict(
        digest=section.anchor,
        title=" · ".join(clean(part, 80) for part in parts),
        task=clean(found.task, 80),
        synthetic=found.synthetic,
        facts=[[name, clean(value, 300)] for name, value in _facts(found).items() if value],
        warnings=_warnings(found),
        metric=clean(figures.heading(record, record.primary_metric), 80) if record else "",
        invalid=[[name, clean(why, 300) or "no reason given"] for name, why in section.invalid[-LISTED:]],
        invalid_runs=section.invalid_runs,
        measured=section.runs,
        runs={places[name]: _run(record) for name, record in used.items()},
        rows=[_row(row, places[row.record.id], section.history.get(key(row.arm), [])) for row in shown],
    )


def _row(row: Standing, place: int, history: list[Past]) -> dict[str, Any]:
    arm, metric = row.arm, figures.quality(row.arm, row.record).get(row.record.primary_metric)
    loss = metric and metric.lossiness
    flops, peak = arm.test_flops, figures.peak(arm.memory)
    useful = flops.useful if flops and flops.useful and flops.useful != flops.dense else None
    train = arm.train_speedup if arm.train_time else None
    front = NONE if row.probability is None else f"{'★ ' if row.front else ''}{100 * row.probability:.0f} %"
    cells = [
        (front, row.probability),
        (figures.ratio(arm.test_speedup), arm.test_speedup and arm.test_speedup.value),
        (figures.verdict(arm.test_speedup), None),
        (f"n/a ({arm.no_quality})" if arm.no_quality else figures.lossiness(metric), loss and loss.value),
        (figures.metric(metric, interval=True), metric and metric.value),
        (f"not above {', '.join(row.below)}" if row.below else NONE, None),
        (figures.gflops(flops), flops and flops.dense),
        (figures.billions(useful), useful),
        (figures.mebibytes(peak), peak),
        (figures.mebibytes(arm.weight_bytes), arm.weight_bytes or None),
        (figures.realised(arm), arm.realised),
        (figures.ratio(train) if train else figures.trained_by(arm), train and train.value),
        (NONE if arm.kind == "baseline" else arm.phase, None),
        (figures.status(arm), None),
        (str(row.count), row.count),
    ]
    return dict(
        name=clean(figures.label(arm)),
        family=clean(family(arm.spec) or arm.name, 100),
        stack=_stack(arm),
        kind=arm.kind,
        control=clean(arm.control, 40),
        source=clean(arm.source, 500),
        text=[clean(text, 160) or NONE for text, _ in cells],
        sort=[_number(value) for _, value in cells],
        verdict=arm.test_speedup.verdict if arm.test_speedup else "",
        speedup=_triple(arm.test_speedup),
        loss=_triple(loss),
        peak=_number(peak),
        front=row.front,
        below=bool(row.below),
        run=place,
        tokens=list(arm.tokens[:LAYERS]),
        masked=bool(arm.structure and arm.structure.masked_tokens),
        step=_split(arm.step_time, 1000 / arm.step_time.steps if arm.step_time and arm.step_time.steps else 0),
        train=_split(arm.train_time, 1),
        history=[_past(past) for past in history],
    )


def _stack(arm: Arm) -> list[list[Any]]:
    """The methods of a stack, each with what is set of it; a spec that cannot be read stands there as it is."""
    stack = parsed(arm.spec) or ((arm.name, {"": arm.spec} if arm.spec else {}),)
    return [[clean(name, 60), [[clean(a, 60), clean(b, 100)] for a, b in found.items()]] for name, found in stack]


def _run(record: Record) -> dict[str, Any]:
    """What is needed to judge and to repeat a run."""
    noop, provenance = record.control("noop"), record.provenance
    machine = [f"{name}: {fact}" for name, fact in provenance.machine.items()]
    about = [
        f"noise floor (noop) {figures.ratio(noop.test_speedup)}" if noop else "",
        figures.precision(record),
        f"load {provenance.load:.2f} per core" if provenance.load is not None else "",
        f"effbench {provenance.effbench}" if provenance.effbench else "",
        f"commit {provenance.commit[:12]}" if provenance.commit else "",
        *machine,
    ]
    baseline = record.baseline()
    steps = baseline.step_time.steps if baseline.step_time else 0
    return dict(
        id=record.id,
        date=f"{created(record):%Y-%m-%d %H:%M}",
        command=command(provenance.command),
        about=[clean(text, 300) for text in about if text],
        tokens=list(baseline.tokens[:LAYERS]),
        step=_split(baseline.step_time, 1000 / steps if steps else 0),
        train=_split(baseline.train_time, 1),
    )


def _split(time: TimeSplit | None, scale: float) -> list[float | None] | None:
    """Seconds by PARTS, scaled; None where nothing was measured."""
    return [_number(scale * getattr(time, part)) for part in PARTS] if time and scale else None


def _trained(found: Envelope) -> str:
    return {"none": "not trained", "locked": "tower locked", "full": "trained whole"}[found.protocol.train]


def _facts(found: Envelope) -> dict[str, str]:
    """The conditions that all rows share."""
    protocol, writing = found.protocol, found.protocol.captioning
    count = ", ".join(f"{n:,} {split}" for split, n in list(found.images.items())[:8])
    return {
        "task": found.task,
        "data": f"{found.data}, images: {count}; results on {found.split}",
        "backbone": f"{found.backbone}, weights {found.weights}",
        "training": f"{_trained(found)}, {protocol.epochs} epochs, batch {protocol.batch_size}, lr {protocol.lr:g}"
        if protocol.train != "none"
        else "none",
        "image size": f"{protocol.image_size} px",
        "model": f"decoder {writing.decoder}, {writing.image_tokens or 'all'} image tokens, {writing.beams} beams"
        if writing
        else f"{protocol.head} head",
        "precision, seeds": f"{protocol.precision}, {len(protocol.seeds)}",
        "timed": f"{protocol.timing_pairs} pairs of {protocol.timing_batch} images",
        "machine": f"{found.device_model}, {protocol.device}, {protocol.threads} threads",
    }


def _warnings(found: Envelope) -> list[str]:
    drawn = "Images drawn by a program: never ranked with real data, and nothing is said about quality there."
    return [text for text in (drawn if found.synthetic else "", figures.untaught(found)) if text]


def _past(past: Past) -> list[Any]:
    figure = (past.speedup, past.speedup_low, past.speedup_high)
    return [f"{past.created:%Y-%m-%d %H:%M}", past.run, *map(_number, figure)]


def _triple(figure: Interval | None) -> list[float | None]:
    return [None] * 3 if figure is None else [_number(figure.value), _number(figure.low), _number(figure.high)]


def _number(value: float | None) -> float | None:
    """Six significant digits, which is what a plot needs; None for what JSON cannot say."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
