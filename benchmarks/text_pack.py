"""How much faster an OpenCLIP text tower is on real captions when it does not compute their padding.

    python benchmarks/text_pack.py --data FOLDER          or EFFBENCH_DATA=FOLDER python benchmarks/text_pack.py

Random weights (time does not depend on them), the test captions of Flickr8k, steps in lockstep: in every turn the
library's own tower and each variant take the same batch, in an order that alternates.
"""

from __future__ import annotations

import argparse
import copy
import os
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import effbench
from effbench import randomness
from effbench.arms import ArmPlan
from effbench.datasets import resolve
from effbench.lockstep import Arm, turn
from effbench.measure.clock import Clock
from effbench.measure.placement import place_anew
from effbench.models.choose import choose
from effbench.models.tower import view
from effbench.stats import speedup
from effbench.timing import WARMUP

VARIANTS = ("text_pack:trim", "text_pack:bucket", "text_pack:pack")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a copy of Flickr8k; else EFFBENCH_DATA")
    parser.add_argument("--backbone", default="ViT-B-32", help="OpenCLIP's name of the model")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 80], help="captions in a step")
    parser.add_argument("--pairs", type=int, default=15, help="steps of each arm")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="specs beside the library's own tower")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    backbone, _ = choose(f"openclip:{arguments.backbone}", "random", single_use=True)
    lines = captions(arguments.data)
    tokens, native = backbone.tokenizer(lines)(lines), backbone.reference.text
    for batch in arguments.batches:
        console = Console(width=120)
        console.print(compare(native, tokens, batch, arguments))
        console.print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {arguments.threads} threads")


def captions(where: str | None) -> list[str]:
    """The test captions, an image's five next to each other."""
    return [line for example in resolve("flickr8k", where or "real").data.splits["test"] for line in example.captions]


def compare(native: torch.nn.Module, tokens: torch.Tensor, batch: int, arguments: argparse.Namespace) -> Table:
    """One table: each variant's speed-up over the library's tower with its interval, efficiency, largest difference."""
    device = arguments.device
    arms = [Arm(ArmPlan("native", kind="baseline"), copy.deepcopy(native).to(device), randomness.seeded(0))]
    arms.append(Arm(ArmPlan("identity", kind="control"), view(copy.deepcopy(native).to(device)).model, arms[0].random))
    for spec in arguments.variants:
        model = effbench.apply(copy.deepcopy(native).to(device), spec)
        arms.append(Arm(ArmPlan(spec), model, randomness.seeded(0)))
    place_anew([arm.model for arm in arms], np.random.default_rng(0))
    clock, seconds = Clock(device), {arm.name: [] for arm in arms}
    apart, rows = dict.fromkeys(seconds, 0.0), dict.fromkeys(seconds, 0)
    places = copy.copy(rows)
    for arm in arms:
        count = partial(_count, places, arm.name)
        arm.model.transformer.resblocks[0].mlp.register_forward_pre_hook(count)
    used = 0
    for index in range(WARMUP + arguments.pairs):
        ids = tokens[torch.arange(index * batch, (index + 1) * batch) % len(tokens)].to(device)
        results = turn(arms, index, lambda arm: _step(arm.model, ids), clock)  # noqa: B023
        used += int((ids.argmax(dim=-1) + 1).sum())
        for name, (features, spent, _) in results.items():
            apart[name] = max(apart[name], (features - results["native"][0]).abs().max().item())
            if index >= WARMUP:
                seconds[name].append(spent)
    table = Table(title=f"{arguments.backbone} text tower, {batch} captions a step, {arguments.pairs} steps, {device}")
    for column in ("arm", "step", "speed-up [95 % interval]", "verdict", "tokens that are captions", "difference"):
        table.add_column(column)
    for arm in arms:
        if arm.error:
            raise SystemExit(f"{arm.name} failed: {arm.error}")
        found = speedup(seconds["native"], seconds[arm.name])
        interval = "" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]"
        table.add_row(
            arm.name,
            f"{1000 * np.median(seconds[arm.name]):.1f} ms",
            f"{found.value:.2f}x{interval}",
            found.verdict,
            f"{100 * used / places[arm.name]:.0f} %",
            f"{apart[arm.name]:.1e}",
        )
    return table


def _count(places: dict[str, int], name: str, _module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
    """Adds up the places that enter the MLP of the first block."""
    places[name] += inputs[0].shape[0] * inputs[0].shape[1]


def _step(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids)


if __name__ == "__main__":
    main()
