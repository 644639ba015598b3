"""One envelope in the leaderboard: the verdict, the table, how it was measured; what is secondary is folded up."""

from __future__ import annotations

from typing import Any

from effbench import store
from effbench.records import Envelope, Protocol, Record
from effbench.report import answers, equal_budget, figures, tables, verdicts
from effbench.report.main_table import main_table, notes
from effbench.report.markdown import code, command, escape
from effbench.report.standings import Group, Section, Standing

RUNS = 3  # runs, notes of a run, and sources that are told of at once
FIELDS = 3  # in which an envelope differs from others that are named at once
LISTED = 20  # runs, or INVALID ones, that are told of at all; `effbench list runs` has all


def envelope_section(section: Section, differing: list[str]) -> str:
    """Markdown of one envelope.

    Args:
        differing: the envelope's fields, by dotted name, in which others of its task differ from it.
    """
    rows, envelope = section.rows, section.envelope
    parts = [_heading(section)]
    if rows:
        answer, *more = map(_sentence, verdicts.sentences(rows))
        parts.append("\n".join([f"**{answer}**", *(f"- {each}" for each in more)]).replace("\n-", "\n\n-", 1))
    parts.append(_warning(envelope))
    if rows:
        table, folded = main_table(rows)
        parts += [table, *(_folded(*each) for each in folded), _footnotes(rows), _conditions(section)]
        parts.append(_apart(section, differing))
        parts += [_folded(title, text) for title, text in _details(section)]
        parts.append(_measured(section))
    else:
        parts.append(_conditions(section))
    if section.invalid:
        listed = [f"- `{name}`: {escape(why) or 'no reason given'}" for name, why in section.invalid[-LISTED:]]
        if section.invalid_runs > len(listed):
            listed.append(f"- and {section.invalid_runs - len(listed)} older ones")
        parts.append("**Invalid runs, not ranked**\n\n" + "\n".join(listed))
    return "\n\n".join(part for part in parts if part) + "\n"


def _sentence(text: str) -> str:
    return escape(text, 1500)


def _details(section: Section) -> list[tuple[str, str]]:
    """What is shown on demand: title and table."""
    rows, newest = section.rows, section.records[-1]
    blind = "" if figures.untaught(section.envelope) else equal_budget.section(rows)
    found = [
        ("Cost: every figure", tables.cost(rows)),
        ("Quality: every metric", tables.quality(rows, newest)),
        ("Against controls at the same budget", blind),
        ("Stacks", tables.stacks(rows, newest.primary_metric)),
        (_writing(newest), tables.writing(rows)),
        ("What the arms write", answers.written(rows)),
        ("Where the speed-up comes from", tables.origin(rows)),
        ("What training costs, and when it pays back", tables.economics(rows)),
        ("Latency and throughput", tables.batches(rows)),
        ("Where a test step's time goes", tables.step(rows)),
        ("Where training time goes, in seconds", tables.training(rows)),
        ("Memory in MiB", tables.memory(rows)),
        ("What each arm really was", tables.anatomy(rows)),
    ]
    return found


def _writing(record: Record) -> str:
    """The title over how text is written."""
    found = [each.tokens for arm in record.arms for each in arm.decoding]
    options = record.envelope.protocol.captioning
    beams = f" by a search of {options.beams} beams" if options and options.beams > 1 else ""
    return f"Writing {_plural(max(found, default=0), 'token')}{beams}"


def _folded(title: str, text: str) -> str:
    """A table that a page shows on demand; nothing where it is empty."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>" if text else ""


def title(envelope: Envelope) -> str:
    """What an envelope is, on one line of Markdown."""
    data = f"{escape(envelope.data)} (synthetic)" if envelope.synthetic else escape(envelope.data)
    weights = "**random weights**" if envelope.weights == "random" else f"weights {escape(envelope.weights)}"
    return (
        f"{escape(envelope.task)} on data **{data}** · {escape(envelope.backbone)} · {weights} · "
        f"train {envelope.protocol.train}"
    )


def _heading(section: Section) -> str:
    return f'<a id="{section.anchor}"></a>\n\n## {title(section.envelope)} · `{section.anchor}`'


def _conditions(section: Section) -> str:
    envelope, protocol = section.envelope, section.envelope.protocol
    trained = f"{_plural(protocol.epochs, 'epoch')}, batch {protocol.batch_size}, " if protocol.train != "none" else ""
    images = envelope.images.get(envelope.split, 0)
    captions = envelope.captions.get(envelope.split, 0)
    batch = figures.timed_batch(section.records[-1]) if section.records else protocol.timing_batch
    timed = f"timed in pairs of {_plural(batch, 'image')}"
    if batch < protocol.timing_batch:
        timed += f" ({protocol.timing_batch} were asked for: the split has no more)"
    return (
        f"{trained}{protocol.image_size} px, {_model(protocol)}, {_plural(len(protocol.seeds), 'seed')}, "
        f"{protocol.precision}, {_plural(protocol.threads, 'thread')} on {escape(protocol.device)} "
        f"({escape(envelope.device_model)}); {timed if protocol.timing_pairs else 'nothing was timed'}; "
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


def _warning(envelope: Envelope) -> str:
    lines = []
    if envelope.synthetic:
        lines.append(
            f"> **These are results on {escape(envelope.data)}, images drawn by a program. They are never ranked with "
            "results on real data, and say nothing about quality there.**"
        )
    if figures.untaught(envelope):
        lines.append(f"> **{figures.untaught(envelope)}**")
    return "\n>\n".join(lines)


def _apart(section: Section, differing: list[str]) -> str:
    """In what the envelope differs from others of its task."""
    if differing:
        values = fields(section)
        named = [f"{escape(field)} ({escape(_value(values.get(field)), 60)})" for field in differing]
        text = f"Not comparable with the other tables of this task, which differ in (here): {', '.join(named)}."
        short = f"Not comparable with the other tables of this task: {len(differing)} fields differ"
        return f"> {text}" if len(differing) <= FIELDS else _folded(short, text)
    return ""


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    text = "absent" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def fields(found: Section | Group) -> dict[str, Any]:
    """All that must be equal before two results are ranked together, by dotted name."""
    return flat(found.envelope.model_dump()) | dict(primary_metric=found.metric)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The envelope's fields by dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for field in value for key, leaf in flat(value[field], f"{name}.{field}".strip(".")).items()}


def _footnotes(rows: list[Standing]) -> str:
    """The sources that the table names by number."""
    sources = notes(rows).sources
    listed = [f"\\[{n}\\] {escape(text)}" for text, n in sources.items()]
    if len(listed) > RUNS:
        return _folded(f"{len(listed)} sources", "\n".join(f"- {each}" for each in listed))
    return f"Sources: {'; '.join(listed)}" if listed else ""


def _measured(section: Section) -> str:
    """The records that the rows come from: noise floor, kernel effect, machine, command, notes."""
    runs, records = notes(section.rows).runs, {record.id: record for record in section.records}
    shown = f", {len(runs)} of them shown" if len(runs) < section.runs else ""
    parts = [f"**Measured in** {_plural(section.runs, 'run')}{shown}"]
    told = [_run(records[name], f"run {n}: " if len(runs) > 1 else "") for name, n in runs.items()]
    parts += told[:RUNS]
    parts.append(_folded(f"{len(told) - RUNS} more runs", "\n\n".join(told[RUNS:LISTED])) if told[RUNS:] else "")
    return "\n\n".join(part for part in parts if part)


def _run(record: Record, label: str) -> str:
    """One run: its noise floor and what else judges it, the command that repeats it, the machine, its notes."""
    floor, kernel = (_control(record, name) for name in ("noop", "identity"))
    load = record.provenance.load
    facts = [
        f"noise floor (noop) {floor}",
        figures.precision(record),
        escape(figures.calibration(record.calibration), 500) if any(arm.test_speedup for arm in record.arms) else "",
        f"kernel effect (identity) {kernel}",
        f"load {load:.2f} per core" if load is not None else "",
        escape(figures.energy(record.energy)),
        f"{record.wall_time:.0f} s",
        f"peak {figures.mebibytes(record.peak_memory)} MiB" if record.peak_memory else "",
        f"lockstep overhead {100 * record.lockstep_overhead:.1f} %",
        f"effbench {escape(record.provenance.effbench)}" if record.provenance.effbench else "",
        f"commit {escape(record.provenance.commit[:12])}" if record.provenance.commit else "",
    ]
    when = f"{label}`{record.id}` ({store.created(record):%Y-%m-%d}): "
    parts = [when + "; ".join(fact for fact in facts if fact)]
    if again := command(record.provenance.command):
        parts.append(code(again))
    machine = "; ".join(f"{name}: {fact}" for name, fact in record.provenance.machine.items())
    versions = ", ".join(f"{name} {version}" for name, version in record.provenance.versions.items())
    about = ". ".join(part for part in (machine, versions) if part)
    if about:
        parts.append(f"<details><summary>Machine and libraries</summary>\n\n{escape(about, 3000)}\n\n</details>")
    every = [*record.notes, *(f"{arm.name}: {note}" for arm in record.arms for note in arm.notes)]
    listed = "\n".join(f"- {escape(note, 300)}" for note in dict.fromkeys(every))
    parts.append(_folded(_plural(len(every), "note"), listed) if len(every) > RUNS else listed)
    return "\n\n".join(part for part in parts if part)


def _control(record: Record, name: str) -> str:
    arm = record.control(name)
    return figures.ratio(arm.test_speedup) if arm else figures.NONE
