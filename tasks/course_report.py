"""A course report's experiment on Flickr8k, slips included, to check its figures (docs/course-report.md)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from effbench.errors import UsageError
from effbench.task import Data, DataRequest, Example, Items, Metric, Task, unchanged
from effbench_tasks.course.backbone import CoursePatches
from effbench_tasks.course.model import CourseModel
from effbench_tasks.flickr8k import Flickr8k

SHARE = 0.4
BATCH = 16


class CourseReport(Task):
    """Predict the mean token id of a photo's caption: a comparison not to be repeated, kept to be taken apart."""

    recommended = {
        "train": "full",
        "epochs": 3,
        "batch_size": BATCH,
        "eval_batch": BATCH,
        "lr": 1e-3,
        "weight_decay": 0.0,  # AdamW without decay is Adam
        "schedule": "constant",
        "warmup": 0.0,
    }

    def __init__(self) -> None:
        self.photos = Flickr8k()

    def load(self, request: DataRequest) -> Data:
        """Flickr8k, 40 % of each split, drawn once; testing has one caption per image, as training has in an epoch."""
        data = self.photos.load(request)
        for split, examples in data.splits.items():
            count = min(len(examples), max(BATCH, round(SHARE * len(examples))))
            drawn = sorted(np.random.default_rng(0).permutation(len(examples))[:count])
            chosen = [examples[i] for i in drawn]
            if split != "train":
                chosen = [Example(e.image, e.captions[:1], e.name) for e in chosen]
            data.splits[split] = chosen
        return data

    def prepare(self, data, backbone, protocol, progress):
        return self.photos.prepare(data, backbone, protocol, progress)

    def recipe(self, prepared) -> tuple[int, int]:
        """Words and context of the vocabulary."""
        return prepared.vocabulary

    def build(self, recipe, backbone, protocol):
        if not isinstance(backbone, CoursePatches):
            raise UsageError(f"course_report brings its own model, not {backbone}", "--backbone course:patches")
        if protocol.train == "locked":
            raise UsageError("the course report's model has no tower to lock", "use --train full")
        return CourseModel(recipe[0])

    def batch(self, prepared, split, index, rng, pixels=True):
        return self.photos.batch(prepared, split, index, rng, pixels)

    def loss(self, model: CourseModel, batch: dict[str, Tensor]) -> Tensor:
        return self.predict(model, batch)["error"].mean()

    def predict(self, model: CourseModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        output = model(batch["image"], batch["tokens"])
        return {"error": (output - target(batch["tokens"], model.words)[:, None]).square().mean(dim=1)}

    def score(self, prepared, split, outputs):
        return {"error": Items(outputs["error"].numpy(), np.arange(len(outputs["error"])))}

    def metrics(self, prepared, split):
        blind = target(prepared.tokens[split], prepared.vocabulary[0]).var(correction=0)  # loss of the best constant
        return [Metric("loss", "error", unchanged, False, float(blind), 0.0, unit="")]


def target(tokens: Tensor, words: int) -> Tensor:
    """What is to be predicted of captions (batch, context): the mean of their token ids, as a share of the largest id.

    The scale is effbench's choice (the report's is not known): it puts the target into [0, 1]. Padding, id 0, counts.
    """
    return tokens.float().mean(1) / (words - 1)
