"""Tiny random models that plugins are checked on: built, trained and tested as a run does it, on noise for images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effbench import randomness
from effbench.alignment import Alignment
from effbench.arms import ArmPlan, settled, testing_model, trained_state, training_model
from effbench.calibration_set import CalibrationSet
from effbench.captioning import Captioning
from effbench.method import Method, TrainingPlan
from effbench.models.backbones import Backbone, Timm
from effbench.records import Captioning as Options
from effbench.records import Protocol
from effbench.spec import canonical
from effbench.task import Data, Example, Task

SIZES = {"train": 12, "dev": 4, "test": 4}
COLOURS = ("red", "green", "blue")
SHAPES = ("circle", "square")


class TinyViT(Timm):
    """A ViT of 12 blocks on a grid of 14 x 14 patches with a class token, as DeiT has, but 48 wide."""

    family = "tiny"

    def _create(self, name: str, weights: Any, pretrained: str | None, size: int | None) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        self.image_size, self.mean, self.std = size or 224, (0.5,) * 3, (0.5,) * 3
        model = VisionTransformer(
            img_size=self.image_size, patch_size=16, embed_dim=48, depth=12, num_heads=3, num_classes=0
        )
        return loud(model)


class TinyAlignment(Alignment):
    """Noise beside captions; what `data` gives."""

    def load(self, request: Any) -> Data:
        return data()


class TinyCaptioning(Captioning):
    """Captions of noise."""

    def load(self, request: Any) -> Data:
        return data()


def loud(model: nn.Module) -> nn.Module:
    """Weights so large that every part of a model shows in what it computes."""
    for value in model.parameters():
        nn.init.normal_(value, std=value[0].numel() ** -0.5) if value.ndim > 1 else nn.init.normal_(value, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
    return model


def data(captions: int = 2) -> Data:
    """Captions of different lengths, so many per image; the images are never drawn (see `Bed.batch`)."""
    splits = {split: [_example(split, i, captions) for i in range(count)] for split, count in SIZES.items()}
    return Data("noise", splits, "noise 1", synthetic=True)


def _example(split: str, i: int, count: int) -> Example:
    colour, other, shape = COLOURS[i % 3], COLOURS[(i + 1) % 3], SHAPES[i % 2]
    captions = (f"a {colour} {shape}", f"a {colour} {shape} beside a {other} circle" + " and a blue square" * (i % 2))
    return Example(_no_image, captions[:count], f"{split}-{i}", synthetic=(f"a {shape} that is {colour}",))


def _no_image() -> Any:
    raise NotImplementedError("the images are noise")


class InHalf:
    """A task whose models are cast to bfloat16, but for a text tower, as users of `effbench.apply` may have theirs."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def build(self, recipe: Any, backbone: Backbone, protocol: Protocol) -> nn.Module:
        model = self.task.build(recipe, backbone, protocol)
        parts = self.task.parts(model)
        for part in [part for name, part in parts.items() if name != "text"] or [model]:
            part.bfloat16()
        return model


@dataclass
class Trained:
    """A model after a few steps of training.

    Args:
        model, plan: see `effbench.arms.training_model`.
        arm: with the choices made that its methods make before training.
        state: what training changed, under the library's keys.
        losses: of each step.
        gradients: by parameter, the largest absolute gradient in any step; a parameter without one is left out.
    """

    model: nn.Module
    plan: TrainingPlan
    arm: ArmPlan
    state: dict[str, Tensor]
    losses: list[float]
    gradients: dict[str, float]


class Bed:
    """What a method is put on.

    Args:
        words: what it is, for people.
        task: builds the models; data: prepared for it.
        backbone: where the towers come from.
        captioning: of a task that writes.
    """

    def __init__(self, words: str, task: Task, data: Data, backbone: Backbone, captioning: Options | None) -> None:
        self.words = words
        self.task = task
        self.backbone = backbone
        self.protocol = Protocol(
            train="full",
            epochs=1,
            batch_size=4,
            image_size=backbone.image_size,
            threads=torch.get_num_threads(),
            captioning=captioning,
        )
        task.set_apart(data, self.protocol)
        self.sizes = data.sizes()
        self.prepared = task.prepare(data, backbone, self.protocol, lambda *_: None)
        self.recipe = task.recipe(self.prepared)
        side = backbone.image_size
        self.images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0))

    def batch(self, split: str, rows: Sequence[int], half: bool = False, drawn: bool = False) -> dict[str, Tensor]:
        """Some examples with noise for images; `drawn` is one caption of each, else all."""
        rng = np.random.default_rng(0) if drawn else None
        batch = self.task.batch(self.prepared, split, np.array(rows), rng, pixels=False)
        images = self.images[list(rows)]
        return batch | dict(image=images.bfloat16() if half else images)

    def outputs(
        self, model: nn.Module, rows: Sequence[int] = (0, 1, 2, 3), seed: int = 0, half: bool = False
    ) -> dict[str, Tensor]:
        """What the task predicts of some test examples."""
        with seeded(seed), torch.no_grad():
            return self.task.predict(model, self.batch("test", rows, half))

    def tested(
        self, arm: ArmPlan, state: dict[str, Tensor] | None = None, seed: int = 0, half: bool = False
    ) -> nn.Module:
        """An arm as a run tests it."""
        task = InHalf(self.task) if half else self.task
        with seeded(seed):
            return testing_model(
                arm, task, self.recipe, self.backbone, self.protocol, state or {}, self.calibration(half)
            )

    def trained(self, arm: ArmPlan, steps: int = 2, autocast: bool = False) -> Trained:
        """An arm after a few steps of training, as a run makes them."""
        build = (self.task, self.recipe, self.backbone, self.protocol)
        with seeded(0):
            arm = settled(arm, *build, self.calibration())
        with seeded(0):
            model, plan = training_model(arm, *build)
            model.train()
            for parts, mode in ((plan.frozen, False), (plan.trained, True)):
                for part in parts:
                    part.train(mode) if isinstance(part, nn.Module) else None
            optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
            losses, gradients = [], {}
            for step in range(steps):
                for call in plan.each_step:
                    call(step / steps)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = self.task.loss(model, self.batch("train", range(4), drawn=True))
                    loss = sum((term() for term in plan.losses), loss)
                loss.backward()
                losses.append(float(loss.detach()))
                for name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        largest = float(parameter.grad.abs().max()) if parameter.numel() else 0.0
                        gradients[name] = max(gradients.get(name, 0.0), largest, key=_badness)
                optimiser.step()
                optimiser.zero_grad()
        return Trained(model, plan, arm, trained_state(model), losses, gradients)

    def calibration(self, half: bool = False) -> CalibrationSet:
        """Four training examples, given out for any number."""
        batch = self.batch("train", range(4), half, drawn=True)
        task = self.task
        return CalibrationSet(lambda: iter([copy.copy(batch)]), 2**31, task.observe, task.loss, thrifty=True)


def _badness(gradient: float) -> float:
    return gradient if gradient == gradient else float("inf")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random state from a seed; the outer state comes back."""
    outer = randomness.get_state()
    randomness.seed_all(seed)
    try:
        yield
    finally:
        randomness.set_state(outer)


def alignment(backbone: Backbone | None = None, words: str = "") -> Bed:
    """Two towers that meet in one space."""
    words = words or "a tiny image tower (12 blocks, 14 x 14 patches) and text tower with random weights"
    return Bed(words, TinyAlignment(), data(), backbone or TinyViT("vit", "random"), None)


def captioner(backbone: Backbone | None = None, words: str = "") -> Bed:
    """An image tower, a connector and a decoder; or a whole model that brings its own."""
    words = words or "a tiny captioner (12 tower blocks, 6 decoder layers, 49 image tokens) with random weights"
    own = backbone is not None and backbone.writes
    given = dict(decoder="own", image_tokens=0) if own else dict(layers=6, width=128, init=0.1, image_tokens=49)
    options = Options(stages=(), max_tokens=6, new_tokens=4, **given)
    return Bed(words, TinyCaptioning(), data(), backbone or TinyViT("vit", "random"), options)


def of_task(task: Task, name: str, backbone: Backbone | None = None) -> Bed:
    """A registered task's own model, on noise in place of its data."""
    backbone = backbone or TinyViT("vit", "random")
    return Bed(f"the model of {name} on {backbone} with random weights", task, data(1), backbone, captioning_of(task))


def captioning_of(task: Task) -> Options | None:
    """How a task writes text when only a few words are asked for; None where it writes none."""
    if not task.writes:
        return None
    small = dict(layers=2, width=64, image_tokens=4, max_tokens=6, new_tokens=4)
    return Options(**task.recommended.get("captioning", {}) | small)


def plan_of(method: Method) -> ArmPlan:
    """The arm that a method alone is."""
    return ArmPlan(canonical((method,)), (method,))


IDENTITY = ArmPlan("identity", kind="control", control="identity")
