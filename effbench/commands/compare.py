"""`effbench compare A B`: finds the two runs, hands them to `effbench.compare`, prints what comes back."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effbench.terminal import console, plain, say

if TYPE_CHECKING:
    import pandas

    from effbench.compare import Comparison
    from effbench.records import Arm, Interval, MetricValue, Record

Runs = "A run (id or its beginning, latest, a record's folder or file), or a git commit or ref."
RULE = (
    "Compared are ratios that each run measured within itself, counted figures and quality; never seconds, since two "
    "processes have different moments. FASTER and SLOWER: B against A, where the 95 % intervals lie apart, and the "
    "medians by more than 3 %. Each interval is of one process: what changes from process to process is in neither."
)
NONE = "—"
SOME = 4  # arms that are named where a figure changed in the same way in all of them


@dataclass(frozen=True)
class Found:
    """What a name stands for: one record with its folder, or all records of a commit."""

    records: list[Record]
    folders: dict[str, Path]
    note: str = ""


@dataclass(frozen=True)
class Block:
    """A titled table; of text that is not escaped yet."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=Runs)],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; verdicts say what B is against A.")],
    out: Annotated[Path, typer.Option(help="Folder of the leaderboard and its records.")] = Path("leaderboard"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> int:
    """Show two runs or git commits side by side, what differs in their envelopes first.

    Of a commit its newest records are taken: of each envelope that both sides have one pair, else the two whose
    envelopes are nearest. Speed-ups and quality are judged only where the envelopes are the same. Exits with 0
    whatever differs, 2 if a record cannot be read, 3 if there is no such run or commit.
    """
    from effbench.compare import choose
    from effbench.compare import compare as compared
    from effbench.errors import UsageError

    if as_json and markdown:
        raise UsageError("--json and --markdown exclude each other", "give one of them")
    one, other = _found(out, a), _found(out, b)
    found = []
    for left, right in choose(one.records, other.records):
        samples = _samples(one.folders[left.id]), _samples(other.folders[right.id])
        found.append(compared(left, right, samples))
    notes = [note for note in (one.note, other.note) if note]
    if as_json:
        print(json.dumps(dict(comparisons=[_json(each) for each in found], notes=notes), indent=1))
        return 0
    for number, each in enumerate(found):
        lines = [*notes, *each.notes] if number == 0 else list(each.notes)
        (_print_markdown if markdown else _print)(each, lines)
    return 0


def _found(out: Path, name: str) -> Found:
    """The records that a name stands for; a run goes before a commit of the same name.

    Raises:
        UsageError: neither is there. InvalidError: a record that is named cannot be read.
    """
    from effbench import store

    path = Path(name)
    if path.is_file() or (path / "record.json").is_file():
        record = store.read(path)
        return Found([record], {record.id: path if path.is_dir() else path.parent})
    if name == "latest" or any(folder.name.startswith(name) for folder in (out / "records").glob("[!.]*") if name):
        folder = store.find(out, name)
        record = store.read(folder)
        return Found([record], {record.id: folder})
    return _of_commit(out, name)


def _of_commit(out: Path, name: str) -> Found:
    """All valid records that a commit made; those of a changed tree only where there are no others."""
    from effbench import store
    from effbench.errors import UsageError

    commit, why = _resolved(name)
    records, problems = store.read_all(out)
    known = {record.provenance.commit.removesuffix("-dirty") for record in records} - {""}
    if not commit and re.fullmatch(r"[0-9a-f]{7,40}", name):  # in another folder than the repository's
        begins = sorted(each for each in known if each.startswith(name))
        if len(begins) > 1:
            raise UsageError(f"records in {out} are of {len(begins)} commits that begin with {name}", "give more of it")
        commit = begins[0] if begins else ""
    if not commit:
        raise UsageError(
            f"there is no run {name!r} in {out}, and {why}", "list the runs: effbench list runs; commits: git log"
        )
    made = [each for each in records if each.provenance.commit in (commit, f"{commit}-dirty")]
    if not made:
        unread = f" (and {len(problems)} cannot be read)" if problems else ""
        some = ", ".join(sorted(each[:12] for each in known)[:5])
        raise UsageError(
            f"no record in {out} is of the commit {commit[:12]}{unread}",
            f"run effbench on that commit; there are records of {some}" if some else "make one with effbench run",
        )
    clean = [each for each in made if not each.provenance.commit.endswith("-dirty")]
    note = "" if clean else f"all records of {commit[:12]} were made with uncommitted changes"
    valid = [each for each in clean or made if each.status == "ok"] or clean or made
    return Found(valid, {each.id: out / "records" / each.id for each in valid}, note)


def _resolved(name: str) -> tuple[str, str]:
    """The commit that git knows by a name, and why it is none."""
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, ValueError, subprocess.SubprocessError):
        return "", "git is not there to ask for a commit"
    if found.returncode == 128:
        return "", "this folder is in no git repository"
    return found.stdout.strip() if found.returncode == 0 else "", "git knows no commit of that name here"


def _samples(folder: Path) -> pandas.DataFrame | None:
    from effbench.errors import InvalidError
    from effbench.samples import read_samples

    try:
        return read_samples(folder / "samples.parquet")
    except InvalidError:
        return None


def _blocks(found: Comparison) -> list[Block]:
    """The tables, in the order in which they are read."""
    fields = "1 field differs" if len(found.envelope) == 1 else f"{len(found.envelope)} fields differ"
    differing = f"Envelope: {fields}, so speed-ups and quality are not judged"
    blocks = [
        Block(differing, ("field", "A", "B"), [(each.name, _value(each.a), _value(each.b)) for each in found.envelope]),
        Block("Provenance", ("field", "A", "B"), [(d.name, _value(d.a), _value(d.b)) for d in found.provenance]),
        Block("Speed-up against each run's own baseline", *_speed(found)),
        Block("Quality", *_quality(found)),
        Block("Counted figures that differ", *_counts(found)),
        Block(
            "Arms that only one has",
            ("arm", "in"),
            [(_label(arm), side) for side, arms in (("A", found.only_a), ("B", found.only_b)) for arm in arms],
        ),
    ]
    return [_used(block) for block in blocks if block.rows]


def _used(block: Block) -> Block:
    """Without the columns in which nothing stands."""
    used = [place for place in range(len(block.header)) if any(row[place] != NONE for row in block.rows)]
    header, *rows = (tuple(row[place] for place in used) for row in (block.header, *block.rows))
    return Block(block.title, header, rows)


def _speed(found: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    from effbench.report import figures

    rows = []
    for each in found.arms:
        for ratio in each.ratios:
            change = f"{100 * (ratio.change - 1):+.1f} %" if found.judged and ratio.change else NONE
            cells = figures.ratio(ratio.a), figures.ratio(ratio.b), change, ratio.verdict or "not judged"
            rows.append((_label(each.a), ratio.name, *cells))
    return ("arm", "phase", "A", "B", "B / A", "verdict"), rows


def _quality(found: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    from effbench.report import figures

    rows = []
    for each in found.arms:
        quality = each.quality
        if quality is None:
            continue
        known = quality.a or quality.b
        difference = "0" if quality.verdict == "SAME" else _signed(quality.difference, 1, figures.digits(known))
        losses = [_loss(value) for value in (quality.a, quality.b)]
        verdict = (quality.verdict or "not judged") + (f" ({quality.note})" if quality.note else "")
        values = [figures.metric(value, interval=True) for value in (quality.a, quality.b)]
        rows.append((_label(each.a), *values, difference, *losses, _signed(quality.lossiness, 100, 1, " %"), verdict))
    name = next((each.quality.metric for each in found.arms if each.quality), "")
    return (f"arm: {name}", "A", "B", "B - A", "lossy-ness A", "lossy-ness B", "lossy-ness B - A", "verdict"), rows


def _loss(value: MetricValue | None) -> str:
    from effbench.report import figures

    if value is None or value.lossiness is None:
        return NONE
    return f"{100 * value.lossiness.value:+.1f} %{figures.bounds(value.lossiness, 100, 1, '+')}"


def _signed(figure: Interval | None, scale: float, digits: int, unit: str = "") -> str:
    from effbench.report import figures

    if figure is None:
        return NONE
    return f"{scale * figure.value:+.{digits}f}{unit}{figures.bounds(figure, scale, digits, '+')}"


def _counts(found: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    arms: dict[tuple[str, ...], list[str]] = {}  # noop and identity mostly differ as the baseline does
    for each in found.arms:
        for count in each.counts:
            percent = NONE if count.percent is None else f"{count.percent:+.3g} %"
            arms.setdefault((count.name, _value(count.a), _value(count.b), percent), []).append(_label(each.a))
    rows = [
        (", ".join(names[:SOME]) + (f", {len(names) - SOME} more" if names[SOME:] else ""), *cells)
        for cells, names in arms.items()
    ]
    return ("arm", "figure", "A", "B", "change"), sorted(rows)


def _label(arm: Arm) -> str:
    from effbench.report import figures

    return figures.label(arm) + (f" ({arm.phase})" if arm.phase != "test" else "")


def _value(value: Any) -> str:
    from effbench.report import figures

    match value:
        case None:
            return "absent"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case tuple() if value and all(type(each) is int for each in value):
            return figures.by_layer(value)
        case tuple() | list():
            return ", ".join(map(str, value)) or "none"
    text = str(value)
    hashed = re.fullmatch(r"([0-9a-f]{12})[0-9a-f]{28,52}(-dirty)?", text)
    return hashed[1] + (hashed[2] or "") if hashed else text or "none"


def _heads(found: Comparison) -> list[str]:
    from effbench import store

    lines = []
    for side, record in (("A", found.a), ("B", found.b)):
        envelope = record.envelope
        commit = f", commit {_value(record.provenance.commit)}" if record.provenance.commit else ""
        when = f"{store.created(record):%Y-%m-%d %H:%M} UTC"
        lines.append(f"{side}  {record.id}: {envelope.task} on {envelope.backbone}, {when}{commit}")
    return lines


def _summary(found: Comparison) -> str:
    """One line of what was found."""
    counted, differ = sum(each.counted for each in found.arms), sum(len(each.counts) for each in found.arms)
    parts = [f"{len(found.arms)} arms in both"]
    speed = Counter(ratio.verdict for each in found.arms for ratio in each.ratios if ratio.verdict)
    quality = Counter(each.quality.verdict for each in found.arms if each.quality and each.quality.verdict)
    for name, verdicts in (("speed-ups", speed), ("quality", quality)):
        if verdicts:
            parts.append(f"{name}: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())))
    parts.append(f"{differ} of {counted} counted figures differ" if counted else "nothing is counted in both")
    return "; ".join(parts)


def _same(found: Comparison) -> list[str]:
    digest = found.a.envelope.digest
    return [] if found.envelope else [f"Envelope: the same ({digest}, {len(found.arms)} arms in both)"]


def _print(found: Comparison, notes: list[str]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from effbench.report.markdown import clean

    out = console(least=100)
    for line in (*_heads(found), *_same(found)):
        say(clean(line, None))
    for block in _blocks(found):
        out.print(Text(f"\n{clean(block.title)}", style="bold"))
        table = Table(box=box.SIMPLE_HEAD)
        for place, column in enumerate(block.header):
            table.add_column(Text(clean(column)), justify="left" if place == 0 else "right", overflow="fold")
        for row in block.rows:
            table.add_row(*(Text(plain(clean(cell)), style=STYLES.get(cell, "")) for cell in row))
        out.print(table)
    for note in notes:
        say(f"- {note}")
    say(_summary(found))
    say(RULE)


STYLES = {"FASTER": "green", "BETTER": "green", "SLOWER": "red", "WORSE": "red"}


def _print_markdown(found: Comparison, notes: list[str]) -> None:
    from effbench.report.markdown import escape, table

    parts = ["  \n".join(escape(line, None) for line in (*_heads(found), *_same(found)))]
    for block in _blocks(found):
        rows = [[escape(cell) for cell in row] for row in block.rows]
        parts += [f"**{escape(block.title)}**", table([escape(column) for column in block.header], rows)]
    parts += ["\n".join(f"- {escape(note, 500)}" for note in notes)] if notes else []
    print("\n\n".join([*parts, escape(_summary(found)), RULE]), end="\n\n")


def _json(found: Comparison) -> dict[str, Any]:
    from effbench import store

    def run(record: Record) -> dict[str, Any]:
        made = store.created(record).isoformat()
        return dict(id=record.id, created=made, status=record.status, commit=record.provenance.commit)

    def figure(value: Any) -> Any:
        return value and value.model_dump(exclude={"by_seed", "chance", "ceiling"})

    def arm(arm: Arm) -> dict[str, str]:
        return dict(arm=arm.name, spec=arm.spec, kind=arm.kind, control=arm.control, phase=arm.phase)

    arms = []
    for each in found.arms:
        quality = each.quality and dict(
            metric=each.quality.metric,
            a=figure(each.quality.a),
            b=figure(each.quality.b),
            difference=figure(each.quality.difference),
            lossiness_difference=figure(each.quality.lossiness),
            verdict=each.quality.verdict,
            note=each.quality.note,
        )
        ratios = [
            dict(name=r.name, a=figure(r.a), b=figure(r.b), change=r.change, verdict=r.verdict) for r in each.ratios
        ]
        counts = [asdict(count) | dict(percent=count.percent) for count in each.counts]
        arms.append(
            arm(each.a)
            | dict(status_a=each.a.status, status_b=each.b.status, speedups=ratios, quality=quality)
            | dict(counts=counts, counted=each.counted)
        )
    return dict(
        a=run(found.a),
        b=run(found.b),
        judged=found.judged,
        envelope=[asdict(each) for each in found.envelope],
        provenance=[asdict(each) for each in found.provenance],
        arms=arms,
        only_a=[arm(each) for each in found.only_a],
        only_b=[arm(each) for each in found.only_b],
        notes=list(found.notes),
        summary=_summary(found),
    )
