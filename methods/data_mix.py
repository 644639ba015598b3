"""Data mixtures: shares of captions, interleaved samples, text alone and synthetic captions in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbench.errors import UsageError
from effbench.method import Method, TrainingPlan, param
from effbench.models.captioner import IGNORE, Captioner
from effbench.models.language import context_of
from effbench.models.sequences import Layout, Rows, refuse_second

if TYPE_CHECKING:
    from effbench.calibration_set import CalibrationSet
    from effbench.models.tower import ModelView

IMAGES = 4


@dataclass(frozen=True)
class DataMix(Method):
    """Train on a mixture of captions, interleaved samples and text alone, made of the very batches that all arms get.

    Of every batch `captions` stay samples of their own, `interleaved` stand behind one another in sequences of `images`
    samples, where later ones see earlier ones, and `text` lose their image. The loss is the mean over the tokens of all
    captions, as many as the baseline's: equal samples, not equal time. An interleaved sequence is few-shot's own
    format, so what --task flickr8k_fewshot asks is trained; an image that its sample does not use still passes tower
    and connector. `synthetic` of the texts are replaced by those of a second source, if the task has one
    (scenes_fewshot); its longer texts are more tokens.

    The papers' questions: text re-blended in tuning (VILA) is the text share with a base that was aligned (--stages
    language/align, the default); mixtures in pretraining (VILA, MM1) are the same with --stages language, where the
    arm's training is all that connector and decoder ever see of images. Testing is untouched. The samples are drawn
    anew in every step.
    """

    source = "VILA, arXiv 2312.07533; MM1, arXiv 2403.09611"
    conflicts = ("sample_pack",)
    default_phase = "train"
    phases = ("train",)
    neutral = {"captions": 1.0, "interleaved": 0.0, "text": 0.0}

    captions: float = param(0.45, "share of image-caption samples", low=0, high=1)
    interleaved: float = param(0.45, "share of samples in sequences of several images", low=0, high=1)
    text: float = param(0.1, "share of samples that are text without their image", low=0, high=1)
    images: int = param(IMAGES, "most samples of an interleaved sequence, which are cut evenly", low=2)
    synthetic: float = param(0.0, "share of texts that a second source gives", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.captions + self.interleaved + self.text
        if abs(total - 1) > 1e-6:
            raise UsageError(
                f"data_mix: captions={self.captions:g}, interleaved={self.interleaved:g} and text={self.text:g} sum to "
                f"{total:g}",
                "name all three so that they sum to 1, e.g. captions=0.45,interleaved=0.45,text=0.1",
            )
        if self.images != IMAGES and not self.interleaved:
            raise UsageError("data_mix: images says nothing with interleaved=0", "leave it out")

    def edit_model(self, model: ModelView) -> None:
        if not isinstance(model.model, Captioner):
            raise UsageError(
                f"data_mix mixes the samples of a captioner, and {type(model.model).__name__} writes no text",
                "choose a captioning task, e.g. --task flickr8k_fewshot",
            )

    def edit_training(self, plan: TrainingPlan) -> None:
        model = plan.model.model
        refuse_second(model, "data_mix")
        if self.synthetic:
            if not model.second:
                raise UsageError(
                    f"data_mix: synthetic={self.synthetic:g}, and this task offers no synthetic captions",
                    "use --task scenes_fewshot, which does, or leave it out",
                )
            model.source = SecondSource(self.synthetic)
        if self.interleaved:
            self._check_sequences(model)
        if self.captions < 1:
            model.layout = Mixture(self, model.opening)

    def _check_sequences(self, model: Captioner) -> None:
        """Refuse a model that cannot read several images in one sequence."""
        if model.language.grid is not None:
            raise UsageError(
                f"data_mix: {type(model.language.body).__name__} counts the positions of its image tokens in two "
                "dimensions, which effbench does for one image in a sequence",
                "use interleaved=0, or a model with one-dimensional positions such as LLaVA-1.5",
            )
        context = context_of(model.language.body.config)
        if self.images * model.longest > context:
            fitting = context // model.longest
            raise UsageError(
                f"data_mix: images={self.images} samples of up to {model.longest} tokens are longer than the decoder's "
                f"context of {context}",
                f"use images={fitting}, or fewer --image-tokens" if fitting > 1 else "use interleaved=0",
            )

    def finish(self, model: ModelView, calibration: CalibrationSet) -> None:
        model.model.mixed = model.left.get("layout.counts")  # for notes

    def notes(self, model: ModelView) -> list[str]:
        counts = model.model.mixed
        if counts is None or not counts[0]:
            return []
        steps, single, interleaved, sequences, text = counts.tolist()
        total = single + interleaved + text
        shares = ", ".join(f"{100 * n / total:.1f} % {what}" for n, what in (
            (single, "captions"), (interleaved, "interleaved"), (text, "text alone")))  # fmt: skip
        length = f" ({interleaved / sequences:.1f} images a sequence)" if sequences else ""
        return [f"samples of the {steps} training steps before the tested weights: {shares}{length}"]


class Mixture(Layout):
    """Lays out the samples of a batch, drawn by torch's generator.

    Args:
        opening: tokens that open a sequence, and do not stand again before its later samples.

    Attributes:
        counts: of all training steps so far: steps, samples of their own, interleaved samples, the sequences that hold
            them, texts alone. A buffer, so that they are kept and resumed with the weights.
    """

    name = "data_mix"

    def __init__(self, method: DataMix, opening: int) -> None:
        super().__init__()
        self.method, self.opening = method, opening
        self.register_buffer("counts", torch.zeros(5, dtype=torch.long))

    @torch.compiler.disable
    def forward(self, lengths: np.ndarray, prefix: int) -> list[Rows]:
        text, interleaved = numbers(len(lengths), self.method.text, self.method.interleaved)
        drawn = torch.randperm(len(lengths)).numpy()
        alone, mixed, single = np.split(drawn, (text, text + interleaved))
        sequences = np.array_split(mixed, -(-interleaved // self.method.images)) if interleaved else []
        if self.training:
            found = [1, len(single), interleaved, len(sequences), text]
            self.counts += self.counts.new_tensor(found)
        groups = [([[s] for s in sorted(single)], 0), (sequences, 0), ([[s] for s in sorted(alone)], prefix - 1)]
        return [behind(each, lengths, begin, self.opening) for each, begin in groups if len(each)]


class SecondSource(nn.Module):
    """Replaces some texts of a training batch, drawn by torch's generator, by those of a second source."""

    is_overhead = True

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    @torch.compiler.disable
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch with "synthetic_tokens" and "synthetic_target" (texts, longest) -> the same with other texts."""
        if "synthetic_tokens" not in batch:  # what a method looks at before training
            return batch
        texts = len(batch["tokens"])
        chosen = torch.zeros(texts, dtype=torch.bool)
        chosen[torch.randperm(texts)[: round(self.share * texts)]] = True
        chosen = chosen.to(batch["tokens"].device)[:, None]
        found = {}
        for key, filler in (("tokens", 0), ("target", IGNORE)):
            own, other = batch[key], batch[f"synthetic_{key}"]
            longest = max(own.shape[1], other.shape[1])
            own, other = (F.pad(each, (0, longest - each.shape[1]), value=filler) for each in (own, other))
            found[key] = torch.where(chosen, other, own)
        return batch | found


def numbers(samples: int, text: float, interleaved: float) -> tuple[int, int]:
    """How many samples of a batch are text alone and how many are interleaved: the nearest to their shares."""
    alone = min(samples, round(text * samples))
    return alone, min(samples - alone, round((text + interleaved) * samples) - alone)


def behind(sequences: list, lengths: np.ndarray, begin: int, opening: int) -> Rows:
    """Rows of one sequence each, padded to the longest.

    Args:
        sequences: of each row its samples, in order. lengths: (samples,) see `Layout.forward`.
        begin: the token that samples begin with; opening: that those begin with which are not the first of their row.
    """
    sample, position, held, first, begins = [], [], [], [], []
    for row in sequences:
        samples, positions = [], []
        for place, each in enumerate(row):
            start = max(begin, opening if place else 0)
            stop = lengths[each] + (place + 1 < len(row))  # the end of a text stands where another sample follows
            held.append(each)
            begins.append(start)
            first.append((len(sample), sum(map(len, positions))))
            samples.append(np.full(stop - start, each))
            positions.append(np.arange(start, stop))
        sample.append(np.concatenate(samples))
        position.append(np.concatenate(positions))
    width = max(map(len, sample))
    return Rows(
        np.stack([np.pad(each, (0, width - len(each))) for each in sample]),
        np.stack([np.pad(each, (0, width - len(each))) for each in position]),
        np.array(held),
        np.array([row * width + place for row, place in first]),
        packed=False,
        begin=np.array(begins),
    )
