"""Does reading a prompt get as much faster as its FLOPs say, when image tokens leave inside the decoder?

    python benchmarks/decoder_prune.py
    python benchmarks/decoder_prune.py --layers 12 --width 768 --image-tokens 576 --keep 0.25

A tiny decoder with random weights (time does not depend on them) reads the prompt of a batch of images and writes one
token. In every turn each arm takes the same prompt, in an order that alternates. The bar: the time within 10 % of what
the FLOPs promise, the method's own included.
"""

from __future__ import annotations

import argparse
import copy
import os

import torch
from rich.console import Console
from rich.table import Table

from effbench import randomness
from effbench.arms import ArmPlan
from effbench.lockstep import Arm, turn
from effbench.measure.clock import Clock
from effbench.measure.flops import flops_of
from effbench.models.captioner import Language
from effbench.models.decoder import decoder_of
from effbench.models.decoding import generate
from effbench.models.language import tiny
from effbench.models.tower import ModelView
from effbench.spec import parse
from effbench.stats import speedup
from effbench.timing import WARMUP

CHOICES = ("fastv", "pyramid", "dart", "divprune", "cdpruner", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--image-tokens", type=int, default=196)
    parser.add_argument("--text-tokens", type=int, default=16, help="of the prompt, behind the image")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--vocabulary", type=int, default=3000)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    plain = tiny(arguments.vocabulary, arguments.layers, arguments.width).to(arguments.device).eval()
    tokens = arguments.image_tokens + arguments.text_tokens
    prompt = torch.randn(arguments.batch, tokens, arguments.width, device=arguments.device)
    plain.places = torch.arange(tokens, device=arguments.device) < arguments.image_tokens
    languages = {"baseline": plain} | {by: pruned(plain, by, arguments.keep) for by in CHOICES}
    console = Console(width=120)
    console.print(
        f"{arguments.layers} layers x {arguments.width}, batch {arguments.batch}, {arguments.image_tokens} image and "
        f"{arguments.text_tokens} text tokens, keep={arguments.keep:g}, {arguments.device}, "
        f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    seconds, cache = compare(languages, prompt, arguments)
    table = Table("choice", "FLOPs, GFLOPs", "own share", "promised", "measured", "realised", "cache, MiB")
    base = None
    for name, language in languages.items():
        count = flops_of(lambda language=language: read(language, prompt), language)
        total = count.dense_flops + count.overhead_flops
        base = base or total
        found = speedup(seconds["baseline"], seconds[name]) if name != "baseline" else None
        measured = "" if found is None else f"{found.value:.2f}x [{found.low or 0:.2f}, {found.high or 0:.2f}]"
        realised = "" if found is None else f"{found.value / (base / total):.0%}"
        own = f"{count.overhead_flops / total:.2%}"
        table.add_row(
            name, f"{total / 1e9:.1f}", own, f"{base / total:.2f}x", measured, realised, f"{cache[name] / 2**20:.1f}"
        )
    console.print(table)


def pruned(plain: Language, by: str, keep: float) -> Language:
    language = copy.deepcopy(plain)
    (method,) = parse(f"decoder_prune:by={by},keep={keep}")
    method.edit_model(ModelView(language, None, None, decoder_of(language)))
    return language


def read(language: Language, prompt: torch.Tensor) -> int:
    """Bytes of the cache when the prompt has been read."""
    with torch.inference_mode():
        return generate(language, prompt, 1, 0, exactly=True)[1]


def compare(
    languages: dict[str, Language], prompt: torch.Tensor, arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each turn, and bytes of the cache, by arm."""
    arms = [Arm(ArmPlan(name), language, randomness.seeded(0)) for name, language in languages.items()]
    clock, seconds, cache = Clock(arguments.device), {name: [] for name in languages}, {}
    for index in range(WARMUP + arguments.pairs):
        for name, (held, spent, _) in turn(arms, index, lambda arm: read(arm.model, prompt), clock).items():
            cache[name] = held
            if index >= WARMUP:
                seconds[name].append(spent)
    return seconds, cache


if __name__ == "__main__":
    main()
