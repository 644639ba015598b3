"""Few-shot captioning: the kind of task that `flickr8k_fewshot` is. A new one writes only `load`.

Image-caption examples stand before each query in one sequence, in the format in which interleaved training data stand
(VILA, arXiv 2312.07533; MM1, 2403.09611): [before] [image tokens] [after] caption [end], then the query. They are drawn
once from the training split, the same for all queries, arms and seeds; the first 2 of 8 are those that 2 shots have.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from effbench import caption_scores
from effbench.captioning import Captioning, Prepared, Recipe
from effbench.errors import UsageError
from effbench.models.captioner import Captioner, Shots
from effbench.task import Data, Items, Metric

if TYPE_CHECKING:
    from effbench.models.backbones import Backbone
    from effbench.records import Protocol

SCORES = ("cider", "bleu4")  # of what is written, at each number of examples


@dataclass
class Exemplified(Prepared):
    """What batches are made of, and the examples.

    Args:
        shots: how many examples stand before a query, ascending; one quality pass for each.
        drawn: (most shots,) training images; captions: (most shots,) which of the training texts each has.
    """

    shots: tuple[int, ...] = ()
    drawn: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    captions: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class FewShot(Captioning):
    """Write a caption of an image, after so many examples.

    Quality: one pass over the test split for each number of examples; `cider_4shot` is CIDEr-D after four. The primary
    metric is CIDEr-D at the most examples, which is what a timed step computes: quality and cost of one row belong
    together, and without examples the task is captioning. Weights are chosen on dev by the loss without examples, as in
    captioning: that is the loss which all arms train.

    A timed step reads query and examples and writes; what is fixed is made once per model and is no part of it: the
    examples' image tokens behind tower and connector, and their embedded words. Their keys and values are computed for
    every query anew: what methods inside the decoder remove may depend on the query.
    """

    few_shot = True
    recommended = {**Captioning.recommended, "captioning": dict(shots=(0, 2, 4, 8))}

    def __init__(self) -> None:
        #: by model, its examples
        self.kept: WeakKeyDictionary[nn.Module, Shots] = WeakKeyDictionary()

    def prepare(self, data: Data, backbone: Backbone, protocol: Protocol, progress) -> Exemplified:
        shots = protocol.captioning.shots
        if not shots:
            raise UsageError("--shots: a few-shot task needs a number of examples", "use --shots 0/2/4/8")
        pool, most = len(data.splits["train"]), shots[-1]
        if most > pool:
            raise UsageError(
                f"--shots {most}: the training split, which examples are drawn from, has {pool} images",
                "ask for fewer, or use more data (--data, --data-share)",
            )
        prepared = Exemplified(**vars(super().prepare(data, backbone, protocol, progress)))
        rng, texts = np.random.default_rng(protocol.seeds[0]), prepared.texts["train"]
        drawn = rng.permutation(pool)[:most]
        prepared.shots, prepared.drawn = shots, drawn
        prepared.captions = np.array([rng.integers(texts.first[i], texts.first[i + 1]) for i in drawn], dtype=np.int64)
        _check_room(prepared, protocol)
        # METEOR and SPICE start a Java program for every number of examples
        prepared.judges["test"] = caption_scores.References(prepared.references["test"], optional=False)
        return prepared

    def build(self, recipe: Recipe, backbone: Backbone, protocol: Protocol) -> Captioner:
        model = super().build(recipe, backbone, protocol)
        if model.language.grid is not None and protocol.captioning.shots[-1]:
            raise UsageError(
                f"--shots {protocol.captioning.shots[-1]}: {backbone} counts the positions of its image tokens in two "
                "dimensions, which effbench does for one image in a sequence",
                "use --shots 0, or a model with one-dimensional positions such as LLaVA-1.5",
            )
        return model

    def batch(self, prepared: Exemplified, split, index, rng, pixels=True):
        batch = super().batch(prepared, split, index, rng, pixels)
        if split != "test" or not len(prepared.drawn):
            return batch
        texts = prepared.texts["train"]
        lengths = texts.lengths[prepared.captions]
        batch["shot_tokens"] = torch.from_numpy(texts.ids[prepared.captions, : lengths.max()])
        batch["shot_lengths"] = torch.from_numpy(lengths)
        if pixels:
            batch["shot_image"] = self.images(prepared, "train", prepared.drawn)
        return batch

    def shots(self, model: Captioner, batch: dict[str, Tensor], count: int) -> Shots | None:
        """The first `count` examples as a model sees them; computed once per model."""
        if not count:
            return None
        if model in self.kept:
            return self.kept[model].first(count)
        lengths = batch["shot_lengths"]
        if "shot_image" not in batch:
            # of a model that is only counted or estimated: any image will do, and is not kept
            features = self.features(model, batch)[:1].expand(len(lengths), -1, -1)
            return model.shots(features, batch["shot_tokens"], lengths).first(count)
        made = model.shots(model.features(batch["shot_image"]), batch["shot_tokens"], lengths)
        if not model.training:
            self.kept[model] = made
        return made.first(count)

    def predict(self, model: Captioner, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features, found = self.features(model, batch), dict(text=self.text_losses(model, batch))
        for count in model.options.shots:
            shots = self.shots(model, batch, count)
            prefix = model.prefix(features, shots)
            prompt = model.read(prefix)
            seen = model.losses(prefix, batch["owner"], batch["tokens"], batch["target"], prompt)
            found |= {f"seen_{count}": seen, f"ids_{count}": self.answer(model, prefix, batch, prompt)}
        return found

    def prompt(self, model: Captioner, batch: dict[str, Tensor]) -> Tensor:
        features = self.features(model, batch)  # first: who looks for the tower's input takes the first
        shots = self.shots(model, batch, model.options.shots[-1])
        return model.prefix(features, shots)

    def score(self, prepared: Exemplified, split: str, outputs: dict[str, Tensor]) -> dict[str, Items]:
        if "seen" in outputs:  # of a look at dev
            return super().score(prepared, split, outputs)
        found: dict[str, Items] = {}
        for count in prepared.shots:
            own = dict(seen=outputs[f"seen_{count}"], ids=outputs[f"ids_{count}"], text=outputs["text"])
            scores = super().score(prepared, split, own)
            found |= {name if name == "text" else named(name, count): each for name, each in scores.items()}
        return found

    def examples(self, prepared: Exemplified, split: str, outputs: dict[str, Tensor]):
        """What was written after the most examples."""
        most = f"ids_{prepared.shots[-1]}"
        return super().examples(prepared, split, dict(ids=outputs[most]) if most in outputs else {})

    def metrics(self, prepared: Exemplified, split: str) -> list[Metric]:
        found = {metric.name: metric for metric in super().metrics(prepared, split)}
        if split == "dev":
            return list(found.values())
        each = [found[name] for name in (*SCORES, "token_loss")]
        metrics = [
            replace(metric, name=named(metric.name, count), items=named(metric.items, count))
            for metric in each
            for count in prepared.shots
        ]
        return [*metrics, found["text_ppl"], found["next_word"]]

    def primary_metric(self, prepared: Exemplified, split: str) -> Metric:
        """CIDEr-D after the most examples; on dev the loss."""
        found = {metric.name: metric for metric in self.metrics(prepared, split)}
        return found["token_loss"] if split == "dev" else found[named("cider", prepared.shots[-1])]


def named(name: str, count: int) -> str:
    """What a score is called after so many examples."""
    return f"{name}_{count}shot"


def _check_room(prepared: Exemplified, protocol: Protocol) -> None:
    """Refuse more examples than the decoder's context holds beside the longest query and its answer.

    Raises:
        UsageError: says how many fit.
    """
    options, texts = protocol.captioning, prepared.texts
    longest = max(int(texts["test"].lengths.max()), options.max_tokens, options.new_tokens)
    used = prepared.around + longest + np.cumsum(prepared.around + texts["train"].lengths[prepared.captions])
    fitting = int((used <= prepared.context).sum())
    if fitting < len(used):
        fit = [count for count in options.shots if count <= fitting]
        fit += [fitting] * (not any(fit))
        raise UsageError(
            f"--shots {options.shots[-1]}: examples, query and answer have up to {used[-1]} tokens, and the "
            f"decoder's context holds {prepared.context}",
            f"{fitting} fit: use --shots {'/'.join(map(str, fit))}, or fewer --image-tokens",
        )
