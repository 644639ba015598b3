"""The trials of `effbench calibrate`: two arms whose true speed-up is known, timed with the machinery of a run."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count

import numpy as np
import torch
from torch import Tensor, nn

from effbench import randomness
from effbench.arms import ArmPlan
from effbench.calibrate import LOADED_UNTIL, Kind, Log, Setting, Trial
from effbench.errors import EffbenchError
from effbench.live import Live
from effbench.lockstep import Arm, turn
from effbench.measure.clock import Clock
from effbench.measure.flops import flops_of
from effbench.measure.placement import place_anew
from effbench.measure.split import Split
from effbench.models.choose import choose
from effbench.records import Protocol
from effbench.timing import WARMUP, Stopping

WIDTH, HIDDEN = 256, 1024  # of the extra work
ROUNDS = 4
LEAST_PAIRS = 6  # an interval needs them, whatever the budget says
ALONE = 20  # steps that the extra work is measured beside
TITLES = dict(same="identical arms", slower="a slower arm", loaded="identical arms beside a busy process")
#: spins until it is stopped, or its parent is gone
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"


def measure(log: Log, wanted: dict[Kind, int], device: str, live: Live) -> None:
    """Measure trials, in the order of `wanted`, until `log` has as many of each kind; each is kept as it ends.

    Raises:
        UsageError: there is no such backbone. EffbenchError: a trial failed, or cannot be kept.
    """
    setting = log.setting
    torch.set_num_threads(setting.threads)
    clock = Clock(device)
    tower, side = image_tower(setting.backbone)
    for kind, number in wanted.items():
        if log.count(kind) >= number:
            continue
        extra = None
        if kind == "slower":
            live.note(f"looking for work that takes {100 * setting.slower:g} % of a step")
            pair = Pair(tower, setting.batch, side, clock)
            extra, images = sized(pair, setting.slower), pair.images()
            whole = flops_of(lambda: _step(tower.to(device), images), tower).dense_flops  # noqa: B023
            live.note(f"extra work: {extra.flops:,} FLOPs, beside the step's {whole:,}")
        live.stage(TITLES[kind], number, "trials", start=log.count(kind))
        with busy_process() if kind == "loaded" else nullcontext():
            while log.count(kind) < number:
                pair = Pair(tower, setting.batch, side, clock, extra)
                own = alone(pair, extra) if extra is not None else 0.0
                log.add(pair.trial(kind, _stopping(kind, setting), own))
                live.advance(log.count(kind), {"verdicts": Counter(t.verdict for t in log.of(kind))})


def _stopping(kind: Kind, setting: Setting) -> Stopping:
    """Identical arms take a fixed number of pairs, as a run does by default; no rule looks at the verdict."""
    if kind == "same":
        return Stopping(setting.pairs)
    return Stopping(setting.pairs, setting.until if kind == "slower" else LOADED_UNTIL, setting.budget)


class Pair:
    """Two arms on the same random images; the tower of each is a fresh copy, as in a run.

    Fresh, and placed as a run's are, since where two copies of the same weights come to lie in memory alone shifts
    their times by some 0.3 %: arms that were made once would carry one such shift through all trials.

    Args:
        tower: the image tower that both copy.
        extra: work that the second arm does on top; None for identical arms.
        side: of the images, in pixels.
    """

    def __init__(self, tower: nn.Module, batch: int, side: int, clock: Clock, extra: Extra | None = None) -> None:
        self.clock = clock
        self.shape = (batch, 3, side, side)
        self.random = torch.Generator().manual_seed(0)
        self.arms = []
        for name, kind in (("baseline", "baseline"), ("second", "control")):
            model = WithExtra(copy.deepcopy(tower), extra if kind == "control" else None).to(clock.device)
            arm = Arm(ArmPlan(name, kind=kind), model, randomness.seeded(0))
            arm.split = Split({"image": model.tower}, model, clock)
            self.arms.append(arm)
        place_anew([arm.model for arm in self.arms], np.random.default_rng())

    def images(self) -> Tensor:
        return torch.randn(self.shape, generator=self.random).to(self.clock.device)

    def trial(self, kind: Kind, stopping: Stopping, extra: float = 0.0) -> Trial:
        """Pairs of steps until `stopping` says so, after a run's warm-up.

        Raises:
            EffbenchError: an arm failed.
        """
        times: tuple[list[float], list[float]] = ([], [])
        begun = self.clock.now()
        for index in count():
            images = self.images()
            results = turn(self.arms, index, lambda arm: _step(arm.model, images), self.clock)  # noqa: B023
            if self.arms[1].error:
                raise EffbenchError(f"a trial failed: {self.arms[1].error}")
            if index >= WARMUP:
                for arm, taken in zip(self.arms, times, strict=True):
                    taken.append(results[arm.name][1])
            spent = self.clock.now() - begun
            if len(times[0]) >= LEAST_PAIRS and stopping.over(len(times[0]), spent, times):
                return Trial(kind=kind, baseline=times[0], arm=times[1], seconds=spent, extra=extra)


class Extra(nn.Module):
    """Tensor work of known size: an MLP over `rows` vectors, 4 x rows x WIDTH x HIDDEN FLOPs."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
        self.register_buffer("vectors", torch.randn(rows, WIDTH))

    @property
    def flops(self) -> int:
        return 4 * len(self.vectors) * WIDTH * HIDDEN

    def forward(self) -> Tensor:
        return self.mlp(self.vectors)


class WithExtra(nn.Module):
    """A tower, and after it the extra work of the slower arm."""

    def __init__(self, tower: nn.Module, extra: Extra | None) -> None:
        super().__init__()
        self.tower, self.extra = tower, extra

    def forward(self, images: Tensor) -> Tensor:
        features = self.tower(images)
        if self.extra is not None:
            self.extra()
        return features


def image_tower(backbone: str, image_size: int | None = None) -> tuple[nn.Module, int]:
    """The image tower of a backbone with random weights, and the side of its images.

    Raises:
        UsageError: there is no such backbone.
    """
    found, _ = choose(backbone, "random", image_size=image_size, single_use=True)
    model = found.dual_encoder(Protocol(image_size=found.image_size), (100, 8))
    return model.image_encoder.eval(), found.image_size


def alone(pair: Pair, extra: Extra, steps: int = ALONE) -> float:
    """What the extra work costs, as a share of a step: the lower quartiles of both, timed on their own in turns.

    Load on the machine lengthens some of either; the lower quartile tells what the work itself takes.
    """
    model = pair.arms[0].model
    whole, own = [], []
    for index in range(WARMUP + steps):
        images = pair.images()
        _, step = pair.clock.timed(lambda: _step(model, images))  # noqa: B023
        _, work = pair.clock.timed(lambda: _step(extra))
        if index >= WARMUP:
            whole.append(step)
            own.append(work)
    return float(np.percentile(own, 25) / np.percentile(whole, 25))


def sized(pair: Pair, share: float, rounds: int = ROUNDS) -> Extra:
    """Extra work that costs `share` of a step, found by measuring it."""
    extra = Extra(100).to(pair.clock.device)
    for _ in range(rounds):
        rows = len(extra.vectors) * share / alone(pair, extra)
        extra = Extra(max(1, round(rows))).to(pair.clock.device)
    return extra


@contextmanager
def busy_process() -> Iterator[None]:
    """A process beside this one that loads one core."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _step(model: nn.Module, *inputs: Tensor) -> None:
    with torch.inference_mode():
        model(*inputs)
