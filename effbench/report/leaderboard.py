"""The leaderboard: README.md of a folder of records, one ranking per envelope.

Within an envelope the baseline comes first, then the methods by test speed-up, then the controls. Where several
records of an envelope hold the same arm, its newest successful measurement is shown.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from effbench import store
from effbench.errors import EffbenchError
from effbench.records import Arm, Envelope, Protocol, Record
from effbench.report import answers, equal_budget, figures, tables
from effbench.report.legend import INTRODUCTION
from effbench.report.markdown import code, escape
from effbench.report.tables import Row

LONG = 12  # rows or lines beyond which what is secondary is folded away


def write_leaderboard(root: Path) -> Path:
    """Write `root/README.md` from all records in `root/records`, atomically, and return its path.

    Raises:
        EffbenchError: the folder cannot be written.
    """
    root = Path(root)
    text = render(*store.read_all(root))
    path = root / "README.md"
    temporary = ""
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".README-", dir=root)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        hint = "make sure that it is a folder with space left, or choose another --out; then run: effbench leaderboard"
        raise EffbenchError(f"the leaderboard {path} was not written: {error.strerror}", hint) from error
    return path


def render(records: list[Record], problems: list[str]) -> str:
    """The leaderboard as Markdown.

    Args:
        records: oldest first, as `store.read_all` gives them.
        problems: one sentence for each record that could not be read.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.envelope.digest].append(record)
    differing = _differing([group[0].envelope for group in groups.values()])
    order = sorted(groups, key=lambda digest: store.created(groups[digest][-1]), reverse=True)
    order.sort(key=lambda digest: (groups[digest][0].envelope.synthetic, groups[digest][0].envelope.task))
    parts = [INTRODUCTION]
    if not records:
        parts.append("No run yet. Make one: `effbench run --method METHOD --task TASK`\n")
    parts += [_section(digest, groups[digest], differing[groups[digest][0].envelope.task]) for digest in order]
    if problems:
        parts.append("## Records that could not be read\n\n" + "\n".join(f"- {escape(each, 500)}" for each in problems))
    return "\n".join(parts).rstrip("\n") + "\n"


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The envelope's fields by dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for field in value for key, leaf in flat(value[field], f"{name}.{field}".strip(".")).items()}


def _differing(envelopes: list[Envelope]) -> dict[str, list[str]]:
    """By task: the fields in which its envelopes differ."""
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for envelope in envelopes:
        by_task[envelope.task].append(flat(envelope.model_dump()))
    return {
        task: [
            field
            for field in dict.fromkeys(field for each in some for field in each)
            if len({repr(each.get(field)) for each in some}) > 1
        ]
        for task, some in by_task.items()
    }


def _section(digest: str, records: list[Record], differing: list[str]) -> str:
    """One envelope: heading, ranking, and what is needed to judge and repeat it."""
    newest, envelope = records[-1], records[-1].envelope
    valid = [record for record in records if record.status == "ok"]
    rows = _rows(valid)
    parts = [_heading(envelope, digest), _conditions(envelope), _warning(envelope, differing)]
    if rows:
        shown, others = _apart(rows)
        parts += ["**Cost**", tables.cost(shown), "**Quality**", tables.quality(shown, newest)]
        if others:
            both = f"{tables.cost(others)}\n\n{tables.quality(others, newest)}"
            parts.append(_folded(f"Cost and quality of {len(others)} more controls", both))
        if not figures.untaught(envelope):
            parts.append(equal_budget.section(rows))
        parts.append(_titled("Stacks", tables.stacks(rows, newest.primary_metric)))
        origin = _folded if len(shown) > LONG else _titled
        parts.append(origin(_writing(newest), tables.writing(shown)))
        parts.append(_folded("What the arms write", answers.written(rows)))
        parts.append(origin("Where the speed-up comes from", tables.origin(shown)))
        parts.append(origin("What training costs, and when it pays back", tables.economics(shown)))
        parts += [_folded(title, make(rows)) for title, make in FOLDED.items()]
        parts.append(_measured(rows, len(valid)))
    invalid = [record for record in records if record.status != "ok"]
    if invalid:
        listed = (f"- `{each.id}`: {escape(each.why_invalid) or 'no reason given'}" for each in invalid)
        parts.append("**Invalid runs, not ranked**\n\n" + "\n".join(listed))
    return "\n\n".join(part for part in parts if part) + "\n"


def _writing(record: Record) -> str:
    """The title over how text is written."""
    found = [each.tokens for arm in record.arms for each in arm.decoding]
    options = record.envelope.protocol.captioning
    beams = f" by a search of {options.beams} beams" if options and options.beams > 1 else ""
    return f"Writing {_plural(max(found, default=0), 'token')}{beams}"


FOLDED = {
    "Latency and throughput": tables.batches,
    "Where a test step's time goes": tables.step,
    "Where training time goes, in seconds": tables.training,
    "Memory in MiB": tables.memory,
    "What each arm really was": tables.anatomy,
}


def _apart(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that a reader sees at once, and the controls that are folded away since they are many."""
    sides: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        sides[figures.apart(row.arm)].append(row)
    return (rows, []) if len(sides[1]) <= figures.FEW else sides


def _titled(title: str, text: str) -> str:
    """A table that a page shows at once; nothing where it is empty."""
    return f"**{title}**\n\n{text}" if text else ""


def _folded(title: str, text: str) -> str:
    """A table that a page shows on demand; nothing where it is empty."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>" if text else ""


def _heading(envelope: Envelope, digest: str) -> str:
    data = f"{escape(envelope.data)} (synthetic)" if envelope.synthetic else escape(envelope.data)
    weights = envelope.weights[:12] if len(envelope.weights) == 64 else envelope.weights
    weights = "**random weights**" if weights == "random" else f"weights {escape(weights)}"
    return (
        f"## {escape(envelope.task)} on data **{data}** · {escape(envelope.backbone)} · {weights} · "
        f"train {envelope.protocol.train} · `{digest}`"
    )


def _conditions(envelope: Envelope) -> str:
    protocol = envelope.protocol
    trained = f"{_plural(protocol.epochs, 'epoch')}, batch {protocol.batch_size}, " if protocol.train != "none" else ""
    images = envelope.images.get(envelope.split, 0)
    captions = envelope.captions.get(envelope.split, 0)
    return (
        f"{trained}{protocol.image_size} px, {_model(protocol)}, {_plural(len(protocol.seeds), 'seed')}, "
        f"{protocol.precision}, {_plural(protocol.threads, 'thread')} on {escape(protocol.device)} "
        f"({escape(envelope.device_model)}); timed in pairs of {protocol.timing_batch} images; "
        f"{escape(envelope.split)} split: {images:,} images, {captions:,} captions."
    )


def _model(protocol: Protocol) -> str:
    """What stands on the towers: a head, or a language model and how much it is given and writes."""
    options = protocol.captioning
    if options is None:
        return f"{protocol.head} head"
    size = f" ({options.layers} layers, width {options.width})" if options.decoder == "tiny" else ""
    base = f"stages before: {', '.join(options.stages) or 'none'}"
    search = "greedy" if options.beams == 1 else f"{options.beams} beams"
    return f"decoder {escape(options.decoder)}{size}, {options.image_tokens or 'all'} image tokens, {base}, {search}"


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _warning(envelope: Envelope, differing: list[str]) -> str:
    lines = []
    if envelope.synthetic:
        lines.append(
            f"> **These are results on {escape(envelope.data)}, images drawn by a program. They are never ranked with "
            "results on real data, and say nothing about quality there.**"
        )
    if figures.untaught(envelope):
        lines.append(f"> **{figures.untaught(envelope)}**")
    if differing:
        values = flat(envelope.model_dump())
        named = [f"{escape(field)} ({escape(_value(values.get(field)), 60)})" for field in differing]
        lines.append(
            "> Not comparable with the other tables of this task, which differ in (here): " + ", ".join(named) + "."
        )
    return "\n>\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    text = "absent" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _rows(records: list[Record]) -> list[Row]:
    """The arms of an envelope in the order of the ranking; of equal arms the newest that did not fail."""
    best: dict[tuple, tuple[Arm, Record]] = {}
    count: dict[tuple, int] = defaultdict(int)
    for record in records:
        for arm in record.arms:
            key = (arm.kind, arm.control, arm.spec, arm.phase)
            count[key] += 1
            if key not in best or arm.status == "ok" or best[key][0].status != "ok":
                best[key] = (arm, record)
    rows = [Row(arm, record, count[key]) for key, (arm, record) in best.items()]

    def rank(row: Row) -> tuple:
        arm, figure = row.arm, row.arm.test_speedup
        place = figures.place(arm.control) if arm.kind == "control" else 0
        return figures.KINDS.index(arm.kind), place, arm.status != "ok", -figure.value if figure else 0.0, arm.name

    return sorted(rows, key=rank)


def _measured(rows: list[Row], total: int) -> str:
    """The records that the rows come from: noise floor, kernel effect, machine, command, notes."""
    shown = {row.record.id: row.record for row in rows}
    parts = [
        f"**Measured in** {_plural(total, 'run')}" + (f", {len(shown)} of them shown" if len(shown) < total else "")
    ]
    sources = dict.fromkeys(part for row in rows for part in row.arm.source.split("; ") if part)
    if sources:
        parts.append("Sources: " + "; ".join(escape(text) for text in sources))
    for record in shown.values():
        floor, kernel = (_control(record, name) for name in ("noop", "identity"))
        load = record.provenance.load
        facts = [
            f"noise floor (noop) {floor}",
            figures.precision(record),
            figures.calibration(record.calibration) if any(arm.test_speedup for arm in record.arms) else "",
            f"kernel effect (identity) {kernel}",
            f"load {load:.2f} per core" if load is not None else "",
            escape(figures.energy(record.energy)),
            f"{record.wall_time:.0f} s",
            f"peak {figures.mebibytes(record.peak_memory)} MiB" if record.peak_memory else "",
            f"lockstep overhead {100 * record.lockstep_overhead:.1f} %",
            f"effbench {escape(record.provenance.effbench)}" if record.provenance.effbench else "",
            f"commit {escape(record.provenance.commit[:12])}" if record.provenance.commit else "",
        ]
        parts.append(f"`{record.id}` ({store.created(record):%Y-%m-%d}): " + "; ".join(fact for fact in facts if fact))
        machine = "; ".join(f"{name}: {fact}" for name, fact in record.provenance.machine.items())
        versions = ", ".join(f"{name} {version}" for name, version in record.provenance.versions.items())
        about = ". ".join(part for part in (machine, versions) if part)
        if about:
            parts.append(f"<details><summary>Machine and libraries</summary>\n\n{escape(about, 3000)}\n\n</details>")
        if record.provenance.command:
            parts.append(code(record.provenance.command))
        notes = [*record.notes, *(f"{arm.name}: {note}" for arm in record.arms for note in arm.notes)]
        listed = "\n".join(f"- {escape(note, 300)}" for note in dict.fromkeys(notes))
        parts.append(_folded(f"{len(notes)} notes", listed) if len(notes) > LONG else listed)
    return "\n\n".join(part for part in parts if part)


def _control(record: Record, name: str) -> str:
    arm = record.control(name)
    return figures.ratio(arm.test_speedup) if arm else figures.NONE
