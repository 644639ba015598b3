"""What a cache of keys and values saves when a small decoder writes, and whether its steps grow longer.

    python benchmarks/decoding.py

Random weights (time does not depend on them). In every turn each variant takes the same prefix, in an order that
alternates. The bars: with the cache at least 3x faster than without; step 30 costs at most 1.3x step 2.
"""

from __future__ import annotations

import argparse
import os

import torch
from rich.console import Console

from effbench import randomness
from effbench.arms import ArmPlan
from effbench.lockstep import Arm, turn
from effbench.measure.clock import Clock
from effbench.models.captioner import Language
from effbench.models.decoding import generate
from effbench.models.language import tiny
from effbench.stats import speedup
from effbench.timing import WARMUP

END = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="images in a step")
    parser.add_argument("--image-tokens", type=int, default=196)
    parser.add_argument("--words", type=int, default=30, help="tokens that are written")
    parser.add_argument("--pairs", type=int, default=9, help="times that each variant writes")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    language = tiny(arguments.vocabulary, arguments.layers, arguments.width).to(arguments.device).eval()
    prefix = torch.randn(arguments.batch, arguments.image_tokens, arguments.width, device=arguments.device)
    console = Console(width=120)
    load = os.getloadavg()[0]
    console.print(
        f"{arguments.layers} layers x {arguments.width}, batch {arguments.batch}, "
        f"{arguments.image_tokens} image tokens, {arguments.words} words, "
        f"{arguments.device}, {arguments.threads} threads, load {load:.1f}"
    )
    show(console, "with the cache, against without", *compare(language, prefix, arguments))
    show(console, f"step 2, against step {arguments.words}", *steps(language, prefix, arguments))


def compare(language: Language, prefix: torch.Tensor, arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of writing a text without the cache, and with it."""
    arms = [Arm(ArmPlan(name), language, randomness.seeded(0)) for name in ("uncached", "cached")]
    clock, seconds = Clock(arguments.device), {arm.name: [] for arm in arms}
    for index in range(WARMUP + arguments.pairs):
        results = turn(arms, index, lambda arm: write(language, prefix, arguments.words, arm.name == "cached"), clock)
        if not results["cached"][0].equal(results["uncached"][0]):
            raise SystemExit("the cache changes what is written")
        for name, (_, spent, _) in results.items() if index >= WARMUP else ():
            seconds[name].append(spent)
    return seconds["uncached"], seconds["cached"]


def steps(language: Language, prefix: torch.Tensor, arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of the last step, and of the second, within the same texts."""
    clock, marks = Clock(arguments.device), []
    last, second = [], []
    handles = [
        language.register_forward_pre_hook(lambda *_: marks.append(clock.mark())),
        language.register_forward_hook(lambda *_: marks.append(clock.mark())),
    ]
    for index in range(WARMUP + 3 * arguments.pairs):
        marks.clear()
        write(language, prefix, arguments.words, True)
        clock.now()  # waits for the device
        spent = [clock.between(*pair) for pair in zip(marks[::2], marks[1::2], strict=True)]
        if index >= WARMUP:
            last.append(spent[-1])
            second.append(spent[1])
    for handle in handles:
        handle.remove()
    return last, second


def write(language: Language, prefix: torch.Tensor, words: int, cached: bool) -> torch.Tensor:
    with torch.inference_mode():
        return generate(language, prefix, words, END, exactly=True, cached=cached)[0]


def show(console: Console, what: str, slower: list[float], faster: list[float]) -> None:
    """The ratio of both, with its interval."""
    found = speedup(slower, faster)
    interval = "" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]"
    console.print(f"{what}: {found.value:.2f}x{interval}")


if __name__ == "__main__":
    main()
