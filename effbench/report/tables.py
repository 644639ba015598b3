"""The tables of one envelope in the leaderboard, each as Markdown; an empty string where there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable

from effbench import parity
from effbench.records import Decoding, Record
from effbench.report import figures, training_costs
from effbench.report.markdown import escape, table
from effbench.report.standings import Standing

MAX_METRICS = 9
NONE = figures.NONE


def name(row: Standing) -> str:
    text = escape(figures.label(row.arm))
    text = f"**{text}**" if row.arm.kind == "baseline" else text
    return text + (f" ({row.count} runs)" if row.count > 1 else "")


def _table(rows: list[Standing], header: list[str], cells: Callable[[Standing], list[str]]) -> str:
    """A table with a row per arm; columns that are empty throughout are left out, and a table without any too."""
    return _lines(rows, header, [cells(row) for row in rows])


def _lines(rows: list[Standing], header: list[str], body: list[list[str]]) -> str:
    """A table of lines that each begin with an arm."""
    used = [i for i in range(len(header)) if any(row[i] != NONE for row in body)]
    if not used:
        return ""
    lines = [[name(row), *(cell[i] for i in used)] for row, cell in zip(rows, body, strict=True)]
    names = ["arm", *(header[i] for i in used)]
    if len({row.record.id for row in rows}) > 1:  # of two runs only ratios compare, not seconds
        names.append("run")
        lines = [[*line, escape(row.record.id[:15])] for line, row in zip(lines, rows, strict=True)]
    return table(names, lines)


def cost(rows: list[Standing]) -> str:
    header = ["phase", "test speed-up", "verdict", "FLOPs promise", "realised", "train speed-up", "GFLOPs", "tokens"]
    header += ["GFLOPs of single images", "params M", "weights MiB", "peak MiB", "status"]

    def cells(row: Standing) -> list[str]:
        arm = row.arm
        return [
            NONE if arm.kind == "baseline" else arm.phase,
            figures.ratio(arm.test_speedup),
            escape(figures.verdict(arm.test_speedup)),
            figures.promise(arm),
            figures.realised(arm, interval=True),
            figures.ratio(arm.train_speedup) if arm.train_time else escape(figures.trained_by(arm)),
            figures.gflops(arm.test_flops),
            figures.tokens(arm),
            figures.per_image(arm),
            figures.number(arm.parameters / 1e6) if arm.parameters else NONE,
            figures.mebibytes(arm.weight_bytes),
            figures.mebibytes(figures.peak(arm.memory)),
            escape(figures.status(arm)),
        ]

    return _table(rows, header, cells)


def quality(rows: list[Standing], record: Record) -> str:
    primary = record.primary_metric
    names = figures.metric_names(record, (row.arm for row in rows))[:MAX_METRICS]
    shared = list(dict.fromkeys(each for row in rows for each in row.arm.agreement))
    header = [f"lossy-ness of {escape(primary)}", "no loss?"]
    header += [escape(figures.heading(record, each)) for each in names]
    header += [escape(each.replace("_", " ") if figures.is_cosine(each) else f"agrees in {each}") for each in shared]

    def cells(row: Standing) -> list[str]:
        found = figures.quality(row.arm, row.record)
        values = [figures.metric(found.get(each), interval=figures.sure(each, primary)) for each in names]
        agreement = [figures.agreement(row.arm, each) for each in shared]
        claim = figures.no_loss(found.get(primary))
        loss = f"n/a ({row.arm.no_quality})" if row.arm.no_quality else figures.lossiness(found.get(primary))
        return [escape(loss), claim, *values, *agreement]

    return _table(rows, header, cells)


def stacks(rows: list[Standing], primary: str) -> str:
    """Stacks against their parts."""
    header = ["parts alone", "speed-up of the stack", "product of its parts", "interaction"]
    header += [f"lossy-ness of {escape(primary)}", "interaction of lossy-ness"]

    def cells(row: Standing) -> list[str]:
        arm, found = row.arm, row.arm.interaction
        parts = [f"{part} {speed:.2f}x" for part, speed in figures.alone(arm, row.record).items()]
        value = figures.quality(arm, row.record).get(primary)
        return [
            escape(", ".join(parts), 400) or NONE,
            figures.ratio(arm.test_speedup),
            figures.product(arm, row.record),
            figures.factor(found and found.speedup),
            escape(figures.lossiness(value)),
            figures.factor(found.quality if found and value else None),
        ]

    return _table([row for row in rows if row.arm.interaction], header, cells)


def origin(rows: list[Standing]) -> str:
    """Where a speed-up comes from, and what stands in its way."""
    header = ["compute", "end to end", "image tower", "text tower", "Amdahl ceiling", "kernels"]
    header += ["kernel effect", "method effect"]

    def cells(row: Standing) -> list[str]:
        arm, identity = row.arm, row.record.control("identity")
        theirs = row.record.baseline().kernels
        differs = parity.differs(theirs, arm.kernels) if theirs and arm.kernels else ()
        kernel = identity.test_speedup if identity and arm.method_speedup else None
        return [
            figures.ratio(arm.test_speedup),
            figures.ratio(arm.end_to_end_speedup),
            figures.ratio(arm.image_speedup),
            figures.ratio(arm.text_speedup),
            figures.ceiling(arm),
            escape("; ".join(differs)) or (NONE if arm.kind == "baseline" or arm.kernels is None else "the baseline's"),
            figures.ratio(kernel),
            figures.ratio(arm.method_speedup),
        ]

    return _table(rows, header, cells)


def batches(rows: list[Standing]) -> str:
    """Latency, throughput, and the batch size from which on a method pays."""
    sizes = sorted({timing.batch for row in rows for timing in row.arm.by_batch})
    most = max((figures.timed_batch(row.record) for row in rows), default=0)
    header = ["latency ms", f"images/s at batch {most}", *(f"speed-up at {size}" for size in sizes), "pays from batch"]

    def cells(row: Standing) -> list[str]:
        found = {timing.batch: timing for timing in row.arm.by_batch}
        return [
            figures.milliseconds(found.get(1)),
            figures.throughput(found.get(most)),
            *(figures.ratio(found[size].speedup if size in found else None) for size in sizes),
            figures.pays(row.arm),
        ]

    return _table(rows, header, cells)


def writing(rows: list[Standing]) -> str:
    """First token and further ones: time, cache and FLOPs; a line per batch size and arm."""
    header = ["texts", "tokens before the text", "first token ms", "first token speed-up", "ms per further token"]
    header += ["further tokens speed-up", "further tokens/s", "KV cache MiB", "GFLOPs to first token", "of it prefill"]
    header += ["GFLOPs of further tokens"]

    def cells(found: Decoding) -> list[str]:
        return [
            str(found.batch),
            NONE if found.prefix is None else str(found.prefix),
            figures.thousandths(found.first_token),
            figures.ratio(found.first_token_speedup),
            figures.thousandths(found.per_token),
            figures.ratio(found.per_token_speedup),
            figures.number(found.tokens_per_second) if found.tokens_per_second else NONE,
            figures.mebibytes(found.cache_bytes),
            *(figures.billions(n) for n in (found.first_token_flops, found.prefill_flops, found.decode_flops)),
        ]

    found = sorted(((each, row) for row in rows for each in row.arm.decoding), key=lambda pair: pair[0].batch)
    return _lines([row for _, row in found], header, [cells(each) for each, _ in found])


def step(rows: list[Standing]) -> str:
    """Milliseconds of a timed test step, by what they were spent on; means of the middle half of the steps."""
    parts = ["compute", "image", "text", "connector", "prefill", "decode", "overhead", "head", "data_wait", "transfer"]
    header = ["step ms", "image tower ms", "text tower ms", "connector ms", "prefill ms", "decode ms"]
    header += ["method overhead ms", "head ms", "data wait ms", "transfer ms", "first step ms", "joules per step"]

    def cells(row: Standing) -> list[str]:
        time, energy = row.arm.step_time, row.arm.energy
        first = figures.number(1000 * time.first_step) if time else NONE
        return [
            *(figures.per_step(time, part) for part in parts),
            first,
            figures.number(energy.joules_per_step) if energy else NONE,
        ]

    return _table(rows, header, cells)


def training(rows: list[Standing]) -> str:
    """Seconds of the whole training, by what they were spent on."""
    parts = ["data_wait", "transfer", "settle", "features"]
    parts += ["image", "text", "connector", "prefill", "decode", "overhead", "head", "backward", "optimiser"]
    header = ["total s", "data wait", "transfer", "of it choosing layers", "of it feature pass"]
    header += ["image tower", "text tower", "connector", "language model", "decode"]  # which a training never does
    header += ["method overhead", "head", "backward", "optimiser"]
    header += ["first step", "steps", "GFLOPs per pair", "trained params M"]

    def cells(row: Standing) -> list[str]:
        time, arm = row.arm.train_time, row.arm
        spent = [getattr(time, part) if time else 0.0 for part in parts]
        return [
            figures.number(time.total) if time else NONE,
            *(figures.number(value) if value else NONE for value in spent),
            figures.number(time.first_step) if time else NONE,
            str(time.steps) if time else NONE,
            figures.gflops(arm.train_flops),
            figures.number(arm.trained_parameters / 1e6) if arm.trained_parameters else NONE,
        ]

    return _table([row for row in rows if row.arm.train_time], header, cells)


def economics(rows: list[Standing]) -> str:
    """Time and FLOPs to a quality, and when they pay back; nothing where no method trains of its own."""
    if not training_costs.any_own(row.arm for row in rows):
        return ""
    first = rows[0].record
    primary = escape(figures.heading(first, training_costs.metric(first.baseline().economics, first)))
    share = training_costs.share(row.arm for row in rows)
    header = [f"best dev {primary}", f"target ({share} of the baseline's best)", "s to target", "speed-up to target"]
    header += ["TFLOPs to target", "tuning s", "tuning TFLOPs", "saved per query ms", "break-even queries", "note"]

    def cells(row: Standing) -> list[str]:
        arm, record, found = row.arm, row.record, row.arm.economics
        return [
            training_costs.quality(found, found and found.best_dev, record),
            training_costs.quality(found, found and found.target, record),
            training_costs.seconds(found),
            training_costs.speedup(arm, record),
            training_costs.teraflops(arm, found and found.flops_to_target),
            figures.number(found.tuning_seconds) if found else NONE,
            training_costs.teraflops(arm, found and found.tuning_flops),
            training_costs.saved(found),
            training_costs.queries(found),
            escape(found.note) or NONE if found else NONE,
        ]

    return _table([row for row in rows if row.arm.economics], header, cells)


def memory(rows: list[Standing]) -> str:
    """MiB of a test and of a training step, each in fresh processes."""
    header = ["test: weights", "activations", "tensors' peak", "process: load peak", "run peak", "reserved", "cache"]
    header += ["train: gradients", "optimiser", "activations", "tensors' peak", "process: run peak"]

    def cells(row: Standing) -> list[str]:
        test, train = row.arm.memory, row.arm.train_memory
        fields = ["weights", "activations", "tensor_peak", "load_peak", "run_peak", "reserved", "cache"]
        found = [figures.mebibytes(getattr(test, field)) if test else NONE for field in fields]
        fields = ["gradients", "optimiser", "activations", "tensor_peak", "run_peak"]
        return found + [figures.mebibytes(getattr(train, field)) if train else NONE for field in fields]

    return _table(rows, header, cells)


def anatomy(rows: list[Standing]) -> str:
    """What each arm really was at run time."""
    header = ["attention", "products in", "runs", "dtypes of weights MiB", "disk MiB", "quantised", "trained layers"]
    header += ["tokens", "useful GFLOPs", "low-bit Gops", "analytic GFLOPs"]

    def cells(row: Standing) -> list[str]:
        arm, kernels, structure, flops = row.arm, row.arm.kernels, row.arm.structure, row.arm.test_flops
        how, what, count = [NONE] * 3, [NONE] * 5, [NONE] * 3
        if kernels:
            modes = [mode for mode in ("autocast", "compiled", "channels_last") if getattr(kernels, mode)]
            how = [
                escape(", ".join(f"{path} x{n}" for path, n in kernels.attention.items())) or NONE,
                escape(", ".join(kernels.precision)) or NONE,
                ", ".join([f"threads {kernels.threads}", *modes]),
            ]
        if structure:
            what = [
                escape(", ".join(f"{dtype} {figures.mebibytes(n)}" for dtype, n in structure.dtypes.items())) or NONE,
                figures.mebibytes(arm.disk_bytes),
                figures.quantised(structure.quantised_share) if structure.quantised_share else NONE,
                escape(", ".join(structure.trained_layers)) or NONE,
                "masked, not removed" if structure.masked_tokens else figures.by_layer(arm.tokens),
            ]
        if flops:
            count = [
                figures.number(flops.useful / 1e9) if flops.useful and flops.useful != flops.dense else NONE,
                figures.number(flops.low_bit / 1e9) if flops.low_bit else NONE,
                figures.number(flops.analytic / 1e9) if flops.analytic is not None else NONE,
            ]
        return [*how, *what, *count]

    return _table(rows, header, cells)
