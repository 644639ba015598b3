"""How much faster a captioner's decoder is tuned when the padding of its samples is not computed.

    python benchmarks/sample_pack.py --data FOLDER        or EFFBENCH_DATA=FOLDER python benchmarks/sample_pack.py

Random weights and image features (time does not depend on them), captions of Flickr8k, one per image, or without a copy
lengths drawn from a normal distribution of its mean and spread (12.0 and 3.8 tokens, at least 3). Training steps
(forward, backward, AdamW) in lockstep: in every turn padding and each variant take the same batch, in an order that
alternates, and each trains a model of its own. Image features are given, as those of a frozen tower are.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from effbench import randomness
from effbench.arms import ArmPlan
from effbench.datasets import resolve
from effbench.engine import Plain
from effbench.errors import DataNotFound
from effbench.lockstep import Arm, turn
from effbench.measure.clock import Clock
from effbench.measure.placement import place_anew
from effbench.method import TrainingPlan
from effbench.models.captioner import IGNORE, Captioner
from effbench.models.connectors import PooledLinear
from effbench.models.language import tiny
from effbench.models.tower import ModelView
from effbench.models.vocabulary import Vocabulary
from effbench.records import Captioning, Protocol, Speedup
from effbench.spec import parse
from effbench.stats import speedup
from effbench.timing import WARMUP

VARIANTS = ("sample_pack", "sample_pack:bucket")
VOCABULARY = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a copy of Flickr8k; else EFFBENCH_DATA")
    parser.add_argument("--image-tokens", type=int, nargs="+", default=[9, 16, 49], help="of each sample")
    parser.add_argument("--batch", type=int, default=64, help="samples in a step")
    parser.add_argument("--steps", type=int, default=15, help="of each arm")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="specs beside padding")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lengths, origin = caption_lengths(arguments.data)
    console = Console(width=120)
    console.print(f"lengths of {origin}, {lengths.mean():.1f} tokens in the mean, at most {lengths.max()}")
    for image_tokens in arguments.image_tokens:
        console.print(compare(lengths, image_tokens, arguments))
        console.print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {arguments.threads} threads")


def caption_lengths(where: str | None) -> tuple[np.ndarray, str]:
    """Tokens of captions, their end included, and whose they are."""
    try:
        examples = resolve("flickr8k", where or "real").data.splits["train"]
    except DataNotFound:
        drawn = np.random.default_rng(0).normal(12.0, 3.8, 30_000).round().astype(int)
        return np.maximum(3, drawn), "a normal distribution"
    captions = [caption for example in examples for caption in example.captions]
    words = Vocabulary(captions)
    return np.array([len(words.encode(caption)) + 1 for caption in captions]), "Flickr8k's training captions"


def captioner(arguments: argparse.Namespace) -> Captioner:
    torch.manual_seed(0)
    language = tiny(VOCABULARY, arguments.layers, arguments.width)
    end = VOCABULARY - 1
    connector = PooledLinear(192, arguments.width, None)
    return Captioner(torch.nn.Identity(), connector, language, (), (end,), end, Captioning())


def compare(lengths: np.ndarray, image_tokens: int, arguments: argparse.Namespace) -> Table:
    """One table: how each variant's tokens per second compare with padding, and with the best that is possible."""
    protocol = Protocol(precision=arguments.precision, device=arguments.device)
    arms, engines = [], {}
    for spec in ("padding", *arguments.variants):
        model = captioner(arguments).to(arguments.device).train()
        plan = TrainingPlan(ModelView(model, None, None), [], [])
        for method in parse(spec) if arms else ():
            method.edit_training(plan)
        arms.append(Arm(ArmPlan(spec, kind="method" if arms else "baseline"), model, randomness.seeded(0)))
        engines[spec] = Plain(model, protocol)
    place_anew([arm.model for arm in arms], np.random.default_rng(0))

    def step(arm: Arm) -> float:
        with protocol.autocast():
            loss = arm.model.loss(arm.model.prefix(features), tokens, target)
        engines[arm.name].backward(loss)
        engines[arm.name].step()
        return loss.item()

    clock, rng = Clock(arguments.device), np.random.default_rng(0)
    seconds, losses = {arm.name: [] for arm in arms}, {arm.name: [] for arm in arms}
    used, padded = [], []  # tokens, and places when padded, of each timed step
    for index in range(WARMUP + arguments.steps):
        of_text = rng.choice(lengths, arguments.batch, replace=False)
        if index >= WARMUP:
            used.append(int((image_tokens + of_text).sum()))  # with the start, without the last, which nothing follows
            padded.append(arguments.batch * (image_tokens + int(of_text.max())))
        ids = rng.integers(0, VOCABULARY, (arguments.batch, of_text.max()))
        kept = np.arange(of_text.max()) < of_text[:, None]
        tokens, target = (torch.from_numpy(np.where(kept, ids, other)).to(arguments.device) for other in (0, IGNORE))
        features = torch.from_numpy(rng.standard_normal((arguments.batch, image_tokens, 192), dtype=np.float32))
        features = features.to(arguments.device)
        for name, (loss, spent, _) in turn(arms, index, step, clock).items():
            losses[name].append(loss)
            if index >= WARMUP:
                seconds[name].append(spent)
    return table(arms, seconds, losses, np.array(used), np.array(padded), image_tokens, arguments)


def table(arms, seconds, losses, used, padded, image_tokens: int, arguments: argparse.Namespace) -> Table:
    share = used.sum() / padded.sum()
    shown = Table(
        title=f"{image_tokens} image tokens, {arguments.batch} samples a step, {arguments.steps} steps, "
        f"{arguments.layers} layers of width {arguments.width}, {arguments.precision}, {arguments.device}; "
        f"padding {100 * (1 - share):.1f} % of the places, so that {1 / share:.2f}x is ideal"
    )
    for column in ("arm", "step", "tokens/s", "speed-up [95 %]", "of the ideal [95 %]", "places used", "loss apart"):
        shown.add_column(column)
    base = arms[0].name
    for arm in arms:
        if arm.error:
            raise SystemExit(f"{arm.name} failed: {arm.error}")
        found, median = speedup(seconds[base], seconds[arm.name]), float(np.median(seconds[arm.name]))
        # places per second of padding against tokens per second: 1 where no time goes to anything but tokens
        ideal = speedup(seconds[base] / padded, seconds[arm.name] / used)
        apart = max(abs(a - b) for a, b in zip(losses[arm.name], losses[base], strict=True))
        counts = None if arm is arms[0] else arm.model.layout.counts.tolist()  # of the warm-up too
        shown.add_row(
            arm.name,
            f"{1000 * median:.0f} ms",
            f"{used.mean() / median:.0f}",
            _with_interval(found),
            _with_interval(ideal),
            f"{100 * (share if counts is None else counts[3] / counts[5]):.1f} %",
            f"{apart:.0e}",
        )
    return shown


def _with_interval(found: Speedup) -> str:
    return f"{found.value:.2f}" + ("" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]")


if __name__ == "__main__":
    main()
