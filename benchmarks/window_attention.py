"""How much faster sparse attention's core is than dense attention: python benchmarks/window_attention.py

The core is everything between the projections and the output (q, k, v -> y), for ViT-B's heads (12 of 64), batch 16,
float32. Paths and dense attention take turns; the ratio is the median over pairs, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as effbench runs: threads that wait do not hold the core

import torch
import torch.nn.functional as F

from effbench.measure.clock import Clock
from effbench.measure.environment import load_per_core
from effbench.models.attention import Projections
from effbench.stats import speedup
from effbench.timing import WARMUP
from effbench_methods.algorithms.attention_gather import gathered
from effbench_methods.algorithms.attention_paths import masked
from effbench_methods.algorithms.attention_patterns import Layout, block_sparse, sliding, windows

BATCH, HEADS, WIDTH, PREFIX = 16, 12, 64, 1
CASES = {  # side of the grid: pattern by name
    14: {
        "window 7": windows((14, 14), 7, False),
        "window 7, shifted": windows((14, 14), 7, True),
        "sliding 5": sliding((14, 14), 5),
        "block 14": block_sparse(196, 14),
        "bigbird 28, 1 random": block_sparse(196, 28, 1),
    },
    24: {
        "window 6": windows((24, 24), 6, False),
        "window 6, shifted": windows((24, 24), 6, True),
        "window 8": windows((24, 24), 8, False),
        "sliding 5": sliding((24, 24), 5),
        "block 24": block_sparse(576, 24),
        "bigbird 28, 1 random": block_sparse(576, 28, 1),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30, help="timed pairs of each path and dense attention")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = load_per_core()
    print(f"{options.threads} threads, {options.device}, load per core {'unknown' if load is None else f'{load:.2f}'}")
    print(f"{'pattern':22}{'tokens':>7}  {'path':9}{'speed-up':>9}  interval")
    with torch.inference_mode():
        for side, patterns in CASES.items():
            tokens = side**2 + PREFIX
            x = torch.randn(BATCH, tokens, 3, HEADS, WIDTH, device=options.device)
            p = Projections(*x.permute(2, 0, 3, 1, 4).unbind(0), WIDTH**-0.5)
            for name, pattern in patterns.items():
                layout = Layout(pattern, PREFIX, (side, side)).to(options.device)
                paths = {"reshape": lambda: gathered(p, layout), "masked": lambda: masked(p, layout.seen)}  # noqa: B023
                for path, ratio in compare(p, paths, options.pairs, Clock(options.device)).items():
                    interval = f"[{ratio.low:.2f}, {ratio.high:.2f}]" if ratio.low is not None else "too few pairs"
                    print(f"{name:22}{tokens:7}  {path:9}{ratio.value:8.2f}x  {interval}", flush=True)


def compare(p: Projections, paths: dict, pairs: int, clock: Clock) -> dict:
    """Speed-up of each path over dense attention; the order of the turns alternates."""
    run = {"dense": lambda: F.scaled_dot_product_attention(p.q, p.k, p.v, scale=p.scale)} | paths
    times = {name: [] for name in run}
    for turn in range(WARMUP + pairs):
        for name in list(run)[:: -1 if turn % 2 else 1]:
            seconds = clock.timed(run[name])[1]
            if turn >= WARMUP:
                times[name].append(seconds)
    return {name: speedup(times["dense"], times[name]) for name in paths}


if __name__ == "__main__":
    main()
