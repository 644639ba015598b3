"""Training data for methods that look at activations or gradients before they change a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from effbench.errors import UsageError

if TYPE_CHECKING:
    from effbench.records import Protocol
    from effbench.task import Task

BATCH = 16  # images of one calibration batch


class CalibrationSet:
    """Batches of training data, and what the task does with them. Never test data.

    Args:
        batches: gives the batches anew each time it is called; each is what `run` and `loss` take.
        available: how many images there are.
        run: computes what testing needs of a batch.
        loss: the training loss of a batch, a scalar; None where there is none.
        thrifty: what is computed from it is thrown away, so that a method may do less, e.g. one step instead of twenty.
    """

    def __init__(
        self,
        batches: Callable[[], Iterator[Any]],
        available: int,
        run: Callable[[nn.Module, Any], object],
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        thrifty: bool = False,
    ) -> None:
        self._batches, self.available, self._run, self._loss = batches, available, run, loss
        self.thrifty = thrifty

    def need(self, images: int, who: str) -> None:
        """Refuse a method that wants more images than there are.

        Args:
            who: names the method and the parameter, e.g. "quantize: images=128".

        Raises:
            UsageError: says how many there are.
        """
        if images > self.available and not self.available:
            hint = "effbench.apply(model, spec, calibration=images), a tensor (images, 3, height, width)"
            raise UsageError(f"{who} needs training images to calibrate with, and there are none", hint)
        if images > self.available:
            raise UsageError(
                f"{who} needs {images} training images to calibrate with, and there are {self.available}",
                f"use images={self.available} or fewer, or more data (--data, --data-share)",
            )

    def run(self, model: nn.Module, images: int) -> None:
        """Let the model compute what testing needs of the first `images` images; hooks see what happens inside."""
        with torch.no_grad():
            for batch in self._first(images):
                self._run(model, batch)

    def losses(self, model: nn.Module, images: int) -> Iterator[Tensor]:
        """The training loss of each batch of the first `images` images, to be differentiated.

        Raises:
            UsageError: there is none: a bare model has no task.
        """
        if self._loss is None:
            raise UsageError(
                "gradients need a task's loss, and a model on its own has none",
                "use a criterion without gradients, or effbench run, which has a task",
            )
        for batch in self._first(images):
            yield self._loss(model, batch)

    def _first(self, images: int) -> Iterator[Any]:
        return islice(self._batches(), -(-images // BATCH))


def of_task(
    task: Task, prepared: Any, training_images: int, to_device: Callable[[dict], dict], size: int = BATCH
) -> CalibrationSet:
    """Image-caption pairs of a task's training split, drawn once for all methods and seeds."""
    rows = np.random.default_rng(0).permutation(training_images)

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield to_device(task.batch(prepared, "train", part, np.random.default_rng([0, start])))

    return CalibrationSet(batches, len(rows), task.observe, task.loss)


def rehearsal(task: Task, prepared: Any, protocol: Protocol, available: int) -> CalibrationSet:
    """Two random images, for a model that is only checked or counted: no photo is decoded for it.

    Args:
        available: training images that there will be.
    """
    batch = task.batch(prepared, "train", np.arange(2), np.random.default_rng(0), pixels=False)
    batch["image"] = torch.randn(
        2, 3, protocol.image_size, protocol.image_size, generator=torch.Generator().manual_seed(0)
    )
    batch = {key: value.to(protocol.device) for key, value in batch.items()}
    return CalibrationSet(lambda: iter([dict(batch)]), available, task.observe, task.loss, thrifty=True)


def of_inputs(inputs: Tensor | Sequence[Any] | None) -> CalibrationSet:
    """What a user's own model is calibrated with: images (images, 3, height, width), or tuples of its arguments."""
    given = [] if inputs is None else list(inputs.split(BATCH)) if isinstance(inputs, Tensor) else list(inputs)
    calls = [each if isinstance(each, tuple) else (each,) for each in given]
    for call in calls:
        if not call or not all(isinstance(part, Tensor) and part.ndim for part in call):
            raise UsageError(f"calibration: {call!r:.80} is no tensor", _TAKES)
        if not all(part.isfinite().all() for part in call):
            raise UsageError("calibration: the images hold values that are not finite", _TAKES)

    def run(model: nn.Module, call: tuple[Tensor, ...]) -> Tensor:
        try:
            return model(*call)
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            shapes = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in call)
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"calibration: the model does not take {shapes}: {reason}", _TAKES) from error

    return CalibrationSet(lambda: iter(calls), sum(len(call[0]) for call in calls), run)


_TAKES = "give images as the model takes them, (images, 3, height, width), or a list of tuples of its arguments"
