"""One run as tables in the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from effbench import parity, store
from effbench.records import Arm, Record, Versus
from effbench.report import answers, equal_budget, figures, standings, training_costs, verdicts
from effbench.report.markdown import clean

VERDICT_STYLES = {"FASTER": "green", "SLOWER": "red", "AMBIGUOUS": "yellow", "TOO FEW SAMPLES": "yellow"}
VERDICT_STYLES |= {"BETTER": "green", "WORSE": "red"}
KIND_STYLES = {"baseline": "bold", "control": "dim", "method": ""}
MAX_METRICS = 6  # in 100 columns; in WIDE ones all of a retrieval task
WIDE = 130


def print_record(record: Record, console: Console) -> None:
    """Print a run: what was measured, the arms' cost and quality, and what limits the figures (fits 100 columns)."""
    console.width = max(console.width, 100)  # a narrower table would lose columns; a narrow terminal wraps the lines
    every = sorted(record.arms, key=lambda arm: (figures.KINDS.index(arm.kind), figures.place(arm.control)))
    hidden = sum(map(figures.apart, every))
    arms = [arm for arm in every if hidden <= figures.FEW or not figures.apart(arm)]
    envelope, protocol = record.envelope, record.envelope.protocol
    data = clean(envelope.data) + (" (synthetic)" if envelope.synthetic else "")
    console.print(Text.assemble((f"{clean(envelope.task)} on {data}", "bold"), f" · {clean(envelope.backbone)}"))
    console.print(
        Text(
            f"run {record.id} · {store.created(record):%Y-%m-%d %H:%M} · train {protocol.train} · "
            f"{len(protocol.seeds)} seed(s) · {record.wall_time:.0f} s · {clean(envelope.device_model)}",
            style="dim",
        )
    )
    if record.status == "ok":
        console.print(_verdict(record))
    else:
        console.print(Text(f"INVALID: {clean(record.why_invalid, None)}", style="bold red"))
    if figures.untaught(envelope):
        console.print(Text(figures.untaught(envelope), style="bold yellow"))
    console.print(_cost(arms))
    if any(arm.step_time for arm in arms):
        console.print(_time(arms, figures.timed_batch(record)))
    if any(arm.decoding for arm in arms):
        console.print(_writing(arms, record))
    if not figures.untaught(envelope):
        shown = 8 if console.width >= WIDE else MAX_METRICS
        console.print(_quality(arms, record, shown))
        hidden_metrics = len(figures.metric_names(record, arms)) - shown
        if hidden_metrics > 0:
            more = "1 more metric is" if hidden_metrics == 1 else f"{hidden_metrics} more metrics are"
            console.print(Text(f"{more} on the page", style="dim"))
    console.print(answers.lines(record.baseline()))
    if training_costs.any_own(arms):
        console.print(_training(arms, record))
    controls = equal_budget.controls_of(arms)
    if controls and not figures.untaught(envelope):
        console.print(_against(arms, record, controls))
    if len(arms) < len(every):
        console.print(Text(f"{hidden} more controls are on the page", style="dim"))
    for arm in arms:
        if arm.interaction:
            console.print(Text(clean(_stack(arm, record), None)))
        if arm.per_image:
            console.print(Text(f"{clean(arm.name)}: GFLOPs of single images {figures.per_image(arm)}"))
    floor, kernel = (record.control(name) for name in ("noop", "identity"))
    console.print(
        Text(
            f"noise floor (noop) {figures.ratio(floor and floor.test_speedup)} · "
            f"kernel effect (identity) {figures.ratio(kernel and kernel.test_speedup)}"
        )
    )
    if any(arm.test_speedup for arm in arms):
        machine = clean(figures.calibration(record.calibration), None)
        console.print(Text(f"this machine: {machine}\n{figures.precision(record)}"))
    for arm in arms:
        if arm.method_speedup and kernel and kernel.test_speedup and arm.kind == "method":
            theirs = record.baseline().kernels
            differs = "; ".join(parity.differs(theirs, arm.kernels)) if theirs and arm.kernels else ""
            if not differs:
                continue
            console.print(
                Text(
                    f"{clean(arm.name)}: {figures.ratio(arm.test_speedup)} = kernel effect "
                    f"{kernel.test_speedup.value:.2f}x x method effect {figures.ratio(arm.method_speedup)} "
                    f"({clean(differs, None)})"
                )
            )
    if record.energy:
        console.print(Text(figures.energy(clean(record.energy, None)), style="dim"))
    for arm in every:
        if arm.status != "ok":
            console.print(Text(f"{clean(arm.name)} {arm.status}: {clean(arm.error, None)}", style="red"))
    notes = [*record.notes, *(f"{arm.name}: {note}" for arm in every for note in arm.notes)]
    notes += [
        f"{arm.name}: {value.note}"
        for arm in arms
        if (value := figures.quality(arm, record).get(record.primary_metric))
        and value.note
        and (value.lossiness or arm.kind == "baseline")
    ]
    own = [arm for arm in arms if arm.kind == "method" and arm.economics and arm.economics.note]
    notes += [f"{arm.name}: {arm.economics.note}" for arm in own]
    for note in dict.fromkeys(notes):
        console.print(Text(f"- {clean(note, None)}", style="dim"))


def _verdict(record: Record) -> Text:
    """What the run comes to, before any table."""
    rows = standings.ranked([standings.Standing(arm, record, 1) for arm in record.arms])
    answer, *more = (clean(text, None) for text in verdicts.sentences(rows))
    return Text.assemble((answer, "bold"), *(f"\n{text}" for text in more))


def _table(title: str, columns: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold", min_width=14)
    for column in columns:
        table.add_column(Text(column), justify="right", overflow="fold")
    return table


def _fill(table: Table, arms: list[Arm], cells: Callable[[Arm], list[str | Text]]) -> Table:
    """Add a row per arm, the controls in a block of their own."""
    for i, arm in enumerate(arms):
        if arm.kind == "control" and arms[i - 1].kind != "control":
            table.add_section()
            table.add_row(Text("controls:", style="dim"))
        text = arm.name if arm.kind == "control" else figures.label(arm)
        text += f" ({figures.CONTROLS['part']})" if arm.control == "part" else ""
        indent = "  " if arm.kind == "control" else ""
        table.add_row(Text(indent + clean(text), style=KIND_STYLES[arm.kind]), *cells(arm))
    return table


def _cost(arms: list[Arm]) -> Table:
    columns = ["test speed-up", "FLOPs\npromise", "realised", "image\ntower", "train", "GFLOPs", "tokens"]
    columns += ["weights\nMiB", "peak\nMiB"]

    def cells(arm: Arm) -> list[str | Text]:
        return [
            _speed(arm),
            figures.promise(arm),
            figures.realised(arm),
            f"{arm.image_speedup.value:.2f}x" if arm.image_speedup else figures.NONE,
            f"{arm.train_speedup.value:.2f}x" if arm.train_speedup and arm.train_time else figures.NONE,
            figures.gflops(arm.test_flops).replace(" +", "\n+"),
            figures.tokens(arm),
            figures.mebibytes(arm.weight_bytes),
            figures.mebibytes(figures.peak(arm.memory)),
        ]

    return _fill(_table("Cost", columns), arms, cells)


def _time(arms: list[Arm], batch: int) -> Table:
    """Milliseconds of a timed step by what they went to; latency and throughput; end to end and the ceiling."""
    named = dict(compute="step", image="image", text="text", connector="connect", prefill="prefill", decode="decode")
    named |= dict(overhead="method", head="head")
    spent = {part for part in named for arm in arms if arm.step_time and getattr(arm.step_time, part)}
    parts = [part for part in named if part in spent]
    columns = [f"{named[part]}\nms" for part in parts] + ["1 image\nms", "images/s"]
    columns += ["end to\nend", "Amdahl\nceiling", "pays from\nbatch"]

    def cells(arm: Arm) -> list[str | Text]:
        time, found = arm.step_time, {timing.batch: timing for timing in arm.by_batch}
        if time is None:
            return [figures.NONE] * len(columns)
        return [
            *(figures.per_step(time, part) for part in parts),
            figures.milliseconds(found.get(1)).replace(" (", "\n("),
            figures.throughput(found.get(batch)),
            f"{arm.end_to_end_speedup.value:.2f}x" if arm.end_to_end_speedup else figures.NONE,
            figures.ceiling(arm),
            figures.pays(arm).replace(" (", "\n("),
        ]

    title = f"Time of a test step of {batch} images (mean of the middle half of the steps)"
    return _fill(_table(title, columns), arms, cells)


def _writing(arms: list[Arm], record: Record) -> Table:
    """First token and further ones at the main batch size: time, cache and FLOPs."""
    most = max(each.batch for arm in arms for each in arm.decoding)
    batch = min(record.envelope.protocol.timing_batch, most)
    columns = ["first\ntoken ms", "speed-up", "further\nms each", "speed-up", "further\ntokens/s", "KV cache\nMiB"]
    columns += ["prefix\ntokens", "prefill\nGFLOPs", "further\nGFLOPs"]

    def cells(arm: Arm) -> list[str | Text]:
        found = next((each for each in arm.decoding if each.batch == batch), None)
        if found is None:
            return [figures.NONE] * len(columns)
        return [
            figures.thousandths(found.first_token),
            figures.ratio(found.first_token_speedup).replace(" [", "\n["),
            figures.thousandths(found.per_token),
            figures.ratio(found.per_token_speedup).replace(" [", "\n["),
            figures.number(found.tokens_per_second) if found.tokens_per_second else figures.NONE,
            figures.mebibytes(found.cache_bytes),
            figures.NONE if found.prefix is None else str(found.prefix),
            figures.billions(found.prefill_flops),
            figures.billions(found.decode_flops),
        ]

    tokens = max(each.tokens for arm in arms for each in arm.decoding)
    return _fill(_table(f"Writing {tokens} tokens of each of {batch} texts", columns), arms, cells)


def _speed(arm: Arm) -> Text:
    if arm.status != "ok":
        return Text(arm.status, style="red")
    if arm.test_speedup is None:
        return Text(figures.NONE)
    style = VERDICT_STYLES.get(arm.test_speedup.verdict, "")
    value, _, interval = figures.ratio(arm.test_speedup).partition(" ")
    text = Text.assemble(f"{value} ", (figures.verdict(arm.test_speedup), style))
    return text.append(f"\n{interval}") if interval else text


def _quality(arms: list[Arm], record: Record, most: int) -> Table:
    primary = record.primary_metric
    units = {name: value.unit for arm in arms for name, value in arm.metrics.items()}
    names = sorted(figures.metric_names(record, arms), key=lambda name: units.get(name) == "rank")[:most]  # ranks last
    headings = [clean(figures.heading(record, name)).replace(" ", "\n", 1) for name in names]

    def cells(arm: Arm) -> list[str | Text]:
        found = figures.quality(arm, record)
        values = [figures.metric(found.get(name), interval=figures.sure(name, primary)) for name in names]
        values.insert(0, figures.lossiness(found.get(primary)))
        return [Text(clean(value).replace(" [", "\n[")) for value in values]

    return _fill(_table("Quality", [f"lossy-ness\n{clean(primary)}", *headings]), arms, cells)


def _training(arms: list[Arm], record: Record) -> Table:
    """What training cost and when it pays back, of the baseline and the arms that train weights of their own."""
    own = [arm for arm in arms if arm.economics and (arm.kind != "control" or figures.apart(arm))]
    primary = clean(training_costs.metric(record.baseline().economics, record))
    columns = ["best\ndev", "s to\ntarget", "speed-up\nto target", "TFLOPs\nto target", "tuning\ns"]
    columns += ["tuning\nTFLOPs", "saved per\nquery ms", "break-even\nqueries"]

    def cells(arm: Arm) -> list[str | Text]:
        found = arm.economics
        return [
            training_costs.quality(found, found.best_dev, record),
            training_costs.seconds(found),
            training_costs.speedup(arm, record),
            training_costs.teraflops(arm, found.flops_to_target),
            figures.number(found.tuning_seconds),
            training_costs.teraflops(arm, found.tuning_flops),
            training_costs.saved(found),
            training_costs.queries(found),
        ]

    found = record.baseline().economics
    target = training_costs.quality(found, found and found.target, record)
    goal = "" if target == figures.NONE else f" {target}"
    title = f"Training (target: dev {primary}{goal}, {training_costs.share(own)} of the baseline's best)"
    return _fill(_table(title, columns), own, cells)


def _against(arms: list[Arm], record: Record, controls: list[str]) -> Table:
    """Methods beside blind controls of the same budget: the verdict and the advantage in the metric's unit."""
    methods = [arm for arm in arms if arm.kind == "method" and record.primary_metric in arm.metrics]
    columns = [clean(figures.heading(record, record.primary_metric)).replace(" ", "\n", 1)]
    columns += [f"{clean(control)}\n{equal_budget.BUDGETS.get(control, '')}" for control in controls]

    def cells(arm: Arm) -> list[str | Text]:
        own = arm.metrics[record.primary_metric]

        def judged(found: Versus) -> str:
            off = equal_budget.excess(found, arm, record)
            text = f"{equal_budget.verdict(found)}\n{equal_budget.advantage(found, own)}"
            return text if off is None else f"{text}\n{off:.2f}x its FLOPs"

        found = [equal_budget.against(arm, record, control, judged) for control in controls]
        return [figures.metric(own), *(Text(text, VERDICT_STYLES.get(text.partition("\n")[0], "")) for text in found)]

    return _fill(
        _table("Advantage over blind controls at the same budget (positive is better)", columns), methods, cells
    )


def _stack(arm: Arm, record: Record) -> str:
    text = f"{arm.name}: {figures.ratio(arm.test_speedup)}, the product of its parts {figures.product(arm, record)}"
    text += f", interaction {figures.factor(arm.interaction.speedup)}"
    quality = arm.interaction.quality if figures.quality(arm, record) else None
    return text + f"; of lossy-ness {figures.factor(quality)}"
