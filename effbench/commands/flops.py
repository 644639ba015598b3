"""`effbench flops`: what a backbone costs, with and without methods, counted twice."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effbench.terminal import console, plain

if TYPE_CHECKING:
    from rich.console import Console

    from effbench.measure.flop_towers import TowerFlops
    from effbench.measure.flops import FlopCount

GROUPS = 12  # rows of --layers; the rest is summed
KINDS = ("dense_flops", "useful_flops", "macs", "overhead_flops", "low_bit_ops", "low_bit_macs")
Towers = dict[str, "TowerFlops"]


def flops(
    backbone: Annotated[str, typer.Argument(metavar="BACKBONE", help="FAMILY:NAME; effbench list backbones.")],
    method: Annotated[
        list[str] | None,
        typer.Option(help="NAME[:param=value,...], joined by + for a stack: beside the baseline. Repeatable."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images, and texts.")] = 1,
    image_size: Annotated[int | None, typer.Option(min=8, help="Side in pixels; default: the backbone's.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward, not forward alone.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Also by block or layer.")] = False,
    weights: Annotated[str, typer.Option(help="A file; FLOPs seldom depend on it.")] = "random",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone: all counts, also by layer.")] = False,
) -> int:
    """Count the FLOPs of a backbone's towers, with and without methods.

    What is dispatched is counted, and beside it what the layers' formulas say. 1 MAC = 2 FLOPs. Dense: as dense kernels
    do it; useful: what attention masks leave; low-bit: products of integers, in bit operations; overhead: a method's
    own scoring. ">=" marks a lower bound: an operation without a formula ran, which is named. Elementwise work, norms,
    softmax and interpolation count 0. Masks are those given to fused attention.
    """
    from effbench.measure.flop_towers import Request, acts, count_towers
    from effbench.spec import canonical, parse

    stacks = {canonical(stack): stack for stack in map(parse, method or [])}
    request = Request(backbone, weights, image_size, batch, train)
    arms = {"baseline": count_towers(request)}
    arms |= {name: count_towers(request, stack) for name, stack in stacks.items()}
    step, other = ("training", "after training") if train else ("testing", "while training")
    notes = [
        f"{canonical((item,))} acts only {other} (phase={item.phase}), so {step} costs what it does without it; "
        "phase=both acts in both"
        for stack in stacks.values()
        for item in stack
        if not acts(item, train)
    ]
    if not _pairs(arms):
        notes.append("the image tower alone: in a run its task adds a text tower and the projection of both")
    if as_json:
        print(json.dumps(_as_json(backbone, request, arms, notes), indent=2))
        return 0
    out = console()
    out.width = max(out.width, 100)
    _print(out, backbone, arms, batch, train)
    if layers:
        for name, towers in arms.items():
            _print_layers(out, name, towers, batch)
    for note in notes:
        out.print(plain(f"- {note}"), style="dim", markup=False, highlight=False)
    return 0


def _print(out: Console, backbone: str, arms: dict[str, Towers], batch: int, train: bool) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from effbench.measure.flop_towers import total

    what = "forward + backward" if train else "forward"
    size = f"a batch of {batch}" if batch > 1 else "one image and one text" if _pairs(arms) else "one image"
    out.print(Text.assemble((plain(backbone), "bold"), f" · {what} · {size} · 1 MAC = 2 FLOPs"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    headings = [
        "GMACs",
        "GFLOPs\ndense",
        "GFLOPs\nuseful",
        "low-bit\nGbitops",
        "GFLOPs\noverhead",
        "GFLOPs\nby formula",
    ]
    headings += ["GFLOPs\nper image"] if batch > 1 else []
    for heading in [*headings, "params\nM", "saved"]:
        table.add_column(heading, justify="right", no_wrap=True)
    first = next(iter(arms.values()))
    lines: list[tuple[str, str]] = []
    for arm, towers in arms.items():
        if len(arms) > 1:
            table.add_row(Text(plain(arm), "bold"))
        rows = [
            (f"{name} tower", tower.count, tower.formulas.flops, tower.parameters) for name, tower in towers.items()
        ]
        if len(towers) > 1:
            sums = sum(row[2] for row in rows), sum(row[3] for row in rows)
            rows.append(("total", total(towers), *sums))
        before = [tower.count for tower in first.values()] + [total(first)]
        for (name, count, formulas, parameters), base in zip(rows, before, strict=False):
            least = "" if count.complete else ">= "
            cells = [f"{least}{_giga(count.macs)}", f"{least}{_giga(count.dense_flops)}"]
            cells += [f"{least}{_giga(count.useful_flops)}", _giga(count.low_bit_ops), _giga(count.overhead_flops)]
            cells += [_giga(formulas)] + ([f"{least}{_giga(count.work / batch)}"] if batch > 1 else [])
            saved = "" if towers is first else f"{1 - count.work / base.work:.1%}" if base.work else ""
            table.add_row(Text(("  " if len(arms) > 1 else "") + name), *cells, f"{parameters / 1e6:.4g}", saved)
        for name, tower in towers.items():
            where = f"{arm}, {name} tower" if len(arms) > 1 else f"{name} tower"
            if tower.disagreement:
                lines.append((f"{where}: {tower.disagreement}", "yellow"))
            if tower.formulas.without_formula and not tower.disagreement:
                lines.append((f"{where}: layers without a formula: {_few(tower.formulas.without_formula)}", "yellow"))
            if tower.count.unknown_ops:
                named = _few(tower.count.unknown_ops)
                lines.append((f"{where}: a lower bound, no formula for {named}", "yellow"))
    out.print(table)
    if not any(tower.disagreement for towers in arms.values() for tower in towers.values()):
        lines.append(("the dispatch count and the layers' formulas agree within 1 %", "dim"))
    for line, style in lines:
        out.print(Text(plain(f"- {line}"), style), soft_wrap=True)


def _print_layers(out: Console, arm: str, towers: Towers, batch: int) -> None:
    """Per tower the blocks and layers in the order in which they ran, equal neighbours in one row."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for name, tower in towers.items():
        rows = grouped(tower.count.by_layer)
        whole = sum(flops for _, flops, _ in rows) or 1
        shown = sorted(sorted(range(len(rows)), key=lambda i: -rows[i][1])[:GROUPS])
        table = Table(
            box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"{plain(arm)}: {name} tower", title_justify="left"
        )
        table.add_column("layers", overflow="fold")
        for heading in ("GFLOPs each", "GFLOPs", "share"):
            table.add_column(heading, justify="right")
        for i in shown:
            label, flops, times = rows[i]
            table.add_row(Text(plain(label)), _giga(flops / times), _giga(flops), f"{flops / whole:.1%}")
        rest = sum(rows[i][1] for i in range(len(rows)) if i not in shown)
        if rest:
            table.add_row(f"{len(rows) - len(shown)} more", "", _giga(rest), f"{rest / whole:.1%}")
        out.print(table)


def grouped(by_layer: dict[str, int]) -> list[tuple[str, int, int]]:
    """(label, FLOPs, blocks in it): layers by their block, and neighbouring blocks of equal cost together."""
    blocks: dict[str, int] = {}
    for name, flops in by_layer.items():
        numbered = re.match(r".*?\.\d+(?=\.|$)", name)
        group = numbered[0] if numbered else name.partition(".")[0]
        blocks[group] = blocks.get(group, 0) + flops
    rows: list[list[Any]] = []
    for name, flops in blocks.items():
        stem, _, number = name.rpartition(".")
        last = rows[-1] if rows else None
        if last and number.isdigit() and last[0] == stem and last[2] == int(number) - 1 and last[3] == flops:
            last[2] += 1
        else:
            rows.append([stem, int(number), int(number), flops] if number.isdigit() else [name, None, None, flops])
    found = []
    for stem, start, end, flops in rows:
        times = 1 if start is None else end - start + 1
        label = stem if start is None else f"{stem}.{start}" + (f"-{end}" if times > 1 else "")
        found.append((label or "outside of layers", flops * times, times))
    return found


def _as_json(backbone: str, request: Any, arms: dict[str, Towers], notes: list[str]) -> dict[str, Any]:
    from effbench.measure.flop_towers import total

    def facts(count: FlopCount) -> dict[str, Any]:
        found: dict[str, Any] = {kind: getattr(count, kind) for kind in KINDS}
        return found | dict(
            work_per_image=count.work / request.batch, complete=count.complete, unknown_ops=list(count.unknown_ops)
        )

    described = []
    for name, towers in arms.items():
        parts = {
            tower: facts(found.count)
            | dict(
                analytic_flops=found.formulas.flops,
                disagreement=found.disagreement,
                without_formula=list(found.formulas.without_formula),
                parameters=found.parameters,
                by_layer=found.count.by_layer,
            )
            for tower, found in towers.items()
        }
        sums = dict(
            analytic_flops=sum(found.formulas.flops for found in towers.values()),
            parameters=sum(found.parameters for found in towers.values()),
        )
        described.append(dict(name=name, towers=parts, total=facts(total(towers)) | sums))
    return dict(
        backbone=backbone,
        batch=request.batch,
        train=request.train,
        units="per batch; 1 MAC = 2 FLOPs; low_bit_ops = integer MACs x weight bits x activation bits",
        arms=described,
        notes=notes,
    )


def _giga(number: float) -> str:
    return f"{number / 1e9:,.4f}" if number else "0"


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _pairs(arms: dict[str, Towers]) -> bool:
    return any("text" in towers for towers in arms.values())
