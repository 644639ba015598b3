"""What a task is: data, a model head, a loss and metrics. A task's author reads this file.

A task of the image-text alignment kind needs none of the methods below: it subclasses
`effbench.alignment.Alignment` and writes only `load`, in some twenty lines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from torch import nn

    from effbench.models.backbones import Backbone
    from effbench.records import Answer, Protocol

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Example:
    """One image with its captions. `image` is a file or a picklable function that draws it (mode RGB).

    `questions` are what the captions answer, one each; empty where nothing is asked. `synthetic` are captions of a
    second source, which methods may train on; empty where there is none.
    """

    image: Path | Callable[[], Image.Image]
    captions: tuple[str, ...]
    name: str = ""
    questions: tuple[str, ...] = ()
    synthetic: tuple[str, ...] = ()


@dataclass
class Data:
    """A data set as it was found.

    Args:
        name: what the leaderboard shows, e.g. `flickr8k` or `scenes`.
        splits: examples by split name ("train", "dev", "test").
        fingerprint: hash of the content, part of the envelope.
        origin: where it was found, for provenance.
        synthetic: drawn or generated; its results are never ranked with those of real data.
        notes: what was dropped or repaired, in one sentence each.
    """

    name: str
    splits: dict[str, list[Example]]
    fingerprint: str
    origin: str = ""
    synthetic: bool = False
    notes: list[str] = field(default_factory=list)
    #: examples that are set apart from the splits (see `Task.set_apart`)
    apart: dict[str, list[Example]] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        return {split: len(examples) for split, examples in self.splits.items()}


@dataclass(frozen=True)
class DataRequest:
    """What the user said about data. `path` is None where nothing was said: then the usual places are searched.

    Args:
        path: `--data PATH`.
        progress: called as `progress(description, done, total)`, may be called often.
    """

    path: Path | None = None
    progress: Callable[[str, int, int], None] = lambda description, done, total: None


@dataclass(frozen=True)
class Metric:
    """One number of merit, and what is needed to judge it.

    Args:
        name: the column's name, e.g. `t2i_r10`.
        items: the column of per-item scores that it is computed from, e.g. `t2i_rank`.
        value: maps an array of per-item scores to an array of per-item values, e.g. 100 * (rank <= 10).
        reduce: "mean" or "median" over the items.
        combine: of a metric that is no mean of items, e.g. exp(sum of losses / sum of words): `value` then gives
            (items, columns), and this maps their means (..., columns) to the metric (...).
        higher_is_better: its direction.
        chance: its expected value for a blind guesser; None where undefined.
        ceiling: the best value there is; None where unbounded.
        unit: "%" or a word.
        optional: a machine may lack what it needs: it is shown where its items are there, and is no part of the
            envelope, so that results of both kinds of machine are ranked together.
    """

    name: str
    items: str
    value: Callable[[np.ndarray], np.ndarray]
    higher_is_better: bool
    chance: float | None
    ceiling: float | None
    reduce: str = "mean"
    unit: str = "%"
    combine: Callable[[np.ndarray], np.ndarray] | None = None
    optional: bool = False


def unchanged(scores: np.ndarray) -> np.ndarray:
    """The `value` of a metric that takes its items' scores as they are."""
    return scores.astype(float)


@dataclass(frozen=True)
class Items:
    """Per-item scores and the group (test image) that each belongs to; a group is resampled as a whole.

    Args:
        values: (n,) scores, e.g. the rank of the right image for each caption; or (n, columns).
        group: (n,) int index of the test image.
    """

    values: np.ndarray
    group: np.ndarray


def shown(images: int, count: int = 5) -> list[int]:
    """Which of a split's images stand for the others, spread evenly: 0, 200, 400, 600, 800 of 1,000."""
    return sorted({i * images // count for i in range(count if images else 0)})


class Task(ABC):
    """Data, model head, loss and metrics. All tensors that `batch` returns are on the CPU."""

    #: name of the embedded task whose data stand in where no real copy is found; None where there is none
    stand_in: ClassVar[str | None] = None
    #: name of the data that the task brings with it, as `--data` takes it; empty where data are read
    embedded: ClassVar[str] = ""
    #: it writes text: `Protocol.captioning` says how, with `recommended["captioning"]`
    writes: ClassVar[bool] = False
    #: name of the metric that checkpoints are chosen by and the leaderboard judges by; empty for the first
    primary: ClassVar[str] = ""
    #: protocol values where the user says nothing: epochs, batch_size, lr, weight_decay, train
    recommended: ClassVar[dict[str, Any]] = {}

    @abstractmethod
    def load(self, request: DataRequest) -> Data:
        """Find and read the data (not the pixels).

        Raises:
            DataNotFound: there is no copy; the message lists the places looked at and the hint how to get one.
            InvalidError: the copy is damaged.
        """

    def set_apart(self, data: Data, protocol: Protocol) -> None:  # noqa: B027
        """Take examples out of the splits, into `data.apart`, before the share of the training data is drawn."""

    @abstractmethod
    def prepare(self, data: Data, backbone: Backbone, protocol: Protocol, progress: Callable[..., None]) -> Any:
        """Make ready whatever `batch` reads (pixel cache, vocabulary); the result is passed to the methods below."""

    def groundwork(self, prepared: Any, backbone: Backbone, protocol: Protocol, live: Any) -> None:  # noqa: B027
        """Long work that all arms share and none is charged: the weights that they start from.

        Done once, when all arms have been checked and before anything is measured; `recipe` is asked anew after it.

        Args:
            live: shows progress (see `effbench.live.Live`).
        """

    def ahead(self, prepared: Any, backbone: Backbone, protocol: Protocol) -> str:
        """What `groundwork` would make since it is not there yet, in words; empty for nothing. It makes nothing."""
        return ""

    def recipe(self, prepared: Any) -> Any:
        """The small picklable facts that `build` needs of the data, e.g. the size of the vocabulary."""
        return None

    @abstractmethod
    def build(self, recipe: Any, backbone: Backbone, protocol: Protocol) -> nn.Module:
        """A fresh model of one arm. It is called under the arm's seed."""

    @abstractmethod
    def batch(
        self, prepared: Any, split: str, index: np.ndarray, rng: np.random.Generator | None, pixels: bool = True
    ) -> dict[str, torch.Tensor]:
        """The examples `index` of a split as tensors.

        Args:
            rng: draws what is drawn (one caption per image); None for all captions, in order.
            pixels: False leaves "image" out (an arm that holds precomputed features does not need it).
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The training loss of a batch, a scalar."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What testing needs of a batch, each tensor with items in dim 0. Results of batches are concatenated."""

    def serve(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> object:
        """What a timed test step computes: a model's use, of the same size for every arm.

        Of a task that writes: ids (batch, tokens), and the bytes of the cache when the last token is written.
        """
        return self.predict(model, batch)

    def first_token(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> object | None:
        """`serve` up to the first token that is written; None where none is."""
        return None

    def look(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What a look at the dev split needs of a batch, as `predict` gives it."""
        return self.predict(model, batch)

    def observe(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> object:
        """One pass over training data for methods that look at activations."""
        return self.predict(model, batch)

    @abstractmethod
    def score(self, prepared: Any, split: str, outputs: dict[str, torch.Tensor]) -> dict[str, Items]:
        """Per-item scores of a whole split from the concatenated predictions."""

    def agreement(
        self, prepared: Any, split: str, baseline: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]
    ) -> dict[str, Items]:
        """How far an arm answers as the baseline does, per item: 1 where both rank the same answer first, else 0.

        Cosines of embeddings, in [-1, 1], have a name that ends in "_cosine".

        Args:
            baseline, outputs: concatenated predictions of both on a whole split.
        """
        return {}

    def examples(self, prepared: Any, split: str, outputs: dict[str, torch.Tensor]) -> list[Answer]:
        """A few of the answers that an arm wrote, for people to read: on the images that `shown` picks.

        Args:
            outputs: concatenated predictions on the whole split.
        """
        return []

    def notes(self, prepared: Any) -> list[str]:
        """What readers should know of the scores that were computed so far, e.g. that one was left out, and why."""
        return []

    @abstractmethod
    def metrics(self, prepared: Any, split: str) -> list[Metric]:
        """The metrics of a split, in the order in which they are shown."""

    def primary_metric(self, prepared: Any, split: str) -> Metric:
        """The metric named by `primary`."""
        found = self.metrics(prepared, split)
        return next((metric for metric in found if metric.name == self.primary), found[0])

    def frozen_features(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor | None:
        """Output of the part that `--train locked` freezes, (batch, features), or None where nothing can be cached.

        `batch["features"]` then stands in for `batch["image"]` in `loss` and `predict`.
        """
        return None

    def weights(self, prepared: Any, backbone: Any) -> str:
        """What tells the weights that all arms start from: the backbone's, and those of what a task reads beside it."""
        return backbone.weights_id

    def locked(self, model: nn.Module) -> list[nn.Module]:
        """The modules that `--train locked` freezes."""
        return []

    def shared(
        self, model: nn.Module, batch: dict[str, torch.Tensor]
    ) -> dict[str, tuple[list[nn.Module], Callable[[], torch.Tensor | None]]]:
        """What `predict` needs of a part of the model alone, which arms that have the same part share.

        Returns:
            by the key under which `predict` finds it in the batch: the part's modules, and what computes it (None
            where there is nothing to share).
        """
        return {"features": (self.locked(model), lambda: self.frozen_features(model, batch["image"]))}

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        """Modules whose share of a test step is timed apart, by name: "image" (the image tower) and others."""
        return {}
