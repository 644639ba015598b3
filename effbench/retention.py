"""What a language model keeps of its text while it learns to write about images: the kind of task of `text_retention`.

Captions of the test split are predicted word by word without their images, before and after tuning (the text tasks of
arXiv 2412.12785, for a model that knows nothing but captions). A new one writes only `load`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from effbench import captioner_base
from effbench.captioning import Captioning, Prepared, per_token
from effbench.errors import UsageError
from effbench.task import Data, Items, Metric, unchanged

if TYPE_CHECKING:
    from torch import Tensor

    from effbench.models.backbones import Backbone
    from effbench.models.captioner import Captioner
    from effbench.records import Protocol


@dataclass
class Remembered(Prepared):
    """What batches are made of, and what the language model knew.

    Args:
        before: of each text of the test split, before tuning, its summed cross entropy, its tokens and those of them
            that were the likeliest, (texts, 3); None before the base is made.
    """

    before: np.ndarray | None = None


class Retention(Captioning):
    """Train to write captions, then go on with text alone."""

    primary = "text_ppl"

    def prepare(self, data: Data, backbone: Backbone, protocol: Protocol, progress) -> Remembered:
        options = protocol.captioning
        if options.decoder == "tiny" and "language" not in options.stages:
            raise UsageError(
                f"--stages {'/'.join(options.stages) or 'none'}: the tiny decoder learns no text before it is tuned, "
                "so there is nothing that tuning could make it forget",
                "use --stages language/align, or --decoder hf:PATH, which knows its language",
            )
        return Remembered(**vars(super().prepare(data, backbone, protocol, progress)))

    def groundwork(self, prepared: Remembered, backbone: Backbone, protocol: Protocol, live: Any) -> None:
        """The base, and what it knows of the test split's texts before it is tuned."""
        stages = tuple(stage for stage in captioner_base.stages(protocol) if stage != "tune")
        file = captioner_base.make(self, prepared, backbone, protocol, live, stages)
        recipe = replace(self.recipe(prepared), base=str(file or ""))
        model = self.build(recipe, backbone, protocol).to(protocol.device).eval()
        images = len(prepared.references["test"])
        live.stage("text alone, before tuning", images, "images")
        parts = []
        for start in range(0, images, protocol.eval_batch):
            rows = np.arange(start, min(start + protocol.eval_batch, images))
            batch = self.batch(prepared, "test", rows, None, pixels=False)
            with torch.inference_mode():
                parts.append(self.text_losses(model, {k: v.to(protocol.device) for k, v in batch.items()}).cpu())
            live.advance(int(rows[-1]) + 1)
        prepared.before = torch.cat(parts).numpy()
        super().groundwork(prepared, backbone, protocol, live)

    def predict(self, model: Captioner, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses with and without the image; nothing is written."""
        return self._losses(model, model.prefix(self.features(model, batch)), batch)

    def score(self, prepared: Remembered, split: str, outputs: dict[str, Tensor]) -> dict[str, Items]:
        found = super().score(prepared, split, outputs)
        if split != "test" or prepared.before is None:
            return found
        after, before = found["text"], prepared.before
        change = np.stack([after.values[:, 0] - before[:, 0], before[:, 1]], axis=1)
        return found | dict(before=Items(before, after.group), change=Items(change, after.group))

    def metrics(self, prepared: Remembered, split: str) -> list[Metric]:
        found = {metric.name: metric for metric in super().metrics(prepared, split)}
        if split != "test":
            return list(found.values())
        return [
            found["text_ppl"],
            replace(found["text_ppl"], name="text_ppl_before", items="before"),
            Metric("text_change", "change", unchanged, False, None, None, unit="nats", combine=per_token),
            found["next_word"],
            replace(found["next_word"], name="next_word_before", items="before"),
            found["token_loss"],
        ]
