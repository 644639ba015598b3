"""Sample packing: image-text samples stand close together in training instead of being padded to the longest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from effbench.calibration_set import CalibrationSet
from effbench.errors import UsageError
from effbench.method import Method, TrainingPlan, param
from effbench.models.captioner import Captioner, Language
from effbench.models.sequences import Layout, Rows, refuse_second
from effbench.models.tower import ModelView
from effbench_methods.algorithms.packing import groups, pack, places, tightest

WIDEST = 2  # times the longest sample of a batch: wider rows hold hardly more, and cost more attention


@dataclass(frozen=True)
class SamplePack(Method):
    """Lay out training samples (image tokens and text) without padding; losses, gradients and testing stay the same.

    pack puts several samples into a row, by best fit, the longest first; no token sees another sample, positions
    restart with every sample, and the last token of one does not predict the first of the next. bucket sorts the
    samples of a batch into groups by length and pads each to its own longest. Both compute logits only where a token is
    to be predicted, and take the mean over the same tokens as padding does. Testing is untouched. The lengths decide
    the shapes: on a GPU each step waits once for them.
    """

    source = "Krell et al., Efficient Sequence Packing without Cross-contamination, arXiv 2107.02027"
    default_phase = "train"
    phases = ("train",)
    neutral = {}

    layout: str = param("pack", "how padding is avoided", choices=("pack", "bucket"))
    width: int | None = param(
        None,
        f"layout=pack: tokens in a row, or the longest sample's; none: up to {WIDEST} times that, the fewest places",
        low=1,
    )
    buckets: int = param(4, "layout=bucket: most groups", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, layout, default in (("width", "pack", None), ("buckets", "bucket", 4)):
            if getattr(self, name) != default and self.layout != layout:
                raise UsageError(
                    f"sample_pack: {name} says nothing with layout={self.layout}",
                    f"use layout={layout}, or leave it out",
                )

    def edit_model(self, model: ModelView) -> None:
        if not isinstance(model.model, Captioner):
            raise UsageError(
                f"sample_pack packs the samples of a captioner, and {type(model.model).__name__} writes no text",
                "choose a captioning task, e.g. --task flickr8k_caption; for a text tower see text_pack",
            )

    def edit_training(self, plan: TrainingPlan) -> None:
        model = plan.model.model
        refuse_second(model, "sample_pack")
        if self.layout == "pack":
            check(model.language)
        model.layout = SampleLayout(self)

    def finish(self, model: ModelView, calibration: CalibrationSet) -> None:
        model.model.laid_out = model.left.get("layout.counts")  # for notes

    def notes(self, model: ModelView) -> list[str]:
        counts = model.model.laid_out
        if counts is None or not counts[0]:
            return []
        steps, samples, rows, tokens, padded, used = counts.tolist()
        how = "in rows" if self.layout == "pack" else "in buckets"
        return [
            f"places that hold a token, in the {steps} training steps before the tested weights: "
            f"{100 * tokens / padded:.1f} % padded to a batch's longest sample, {100 * tokens / used:.1f} % {how}"
            f" ({samples / rows:.1f} samples a row); with no padding at all, {padded / tokens:.2f}x fewer"
        ]


class SampleLayout(Layout):
    """Lays out the samples of a batch.

    Attributes:
        counts: of all training steps so far: steps, samples, rows, tokens, places if all samples were padded to their
            batch's longest, places. A buffer, so that they are kept and resumed with the weights.
    """

    name = "sample_pack"

    def __init__(self, method: SamplePack) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("counts", torch.zeros(6, dtype=torch.long))

    @torch.compiler.disable
    def forward(self, lengths: np.ndarray, prefix: int = 0) -> list[Rows]:
        found = self._packed(lengths) if self.method.layout == "pack" else self._in_buckets(lengths)
        if self.training:
            rows, used = (sum(n) for n in zip(*((len(r.sample), r.sample.size) for r in found), strict=True))
            padded = len(lengths) * int(lengths.max())
            self.counts += self.counts.new_tensor([1, len(lengths), rows, int(lengths.sum()), padded, used])
        return found

    def _packed(self, lengths: np.ndarray) -> list[Rows]:
        width = self.method.width
        packing = pack(lengths, width) if width else tightest(lengths, WIDEST * int(lengths.max()))
        sample, position, last = places(lengths, packing)
        return [Rows(sample, position, np.arange(len(lengths)), last - lengths + 1, packed=True)]

    def _in_buckets(self, lengths: np.ndarray) -> list[Rows]:
        found = []
        for held in groups(lengths, self.method.buckets):
            longest = int(lengths[held].max())
            sample, position = np.broadcast_arrays(held[:, None], np.arange(longest))
            found.append(Rows(sample, position, held, longest * np.arange(len(held)), packed=False))
        return found


def check(language: Language) -> None:
    """Refuse a language model in which a sample's logits depend on what stands before it in its row.

    Raises:
        UsageError: they differ by more than 1e-4 (float32; 3e-2 in half precision) from those of the sample alone.
    """
    weight = language.body.get_input_embeddings().weight
    ids = torch.randint(len(weight), (7,), generator=torch.Generator().manual_seed(0)).to(weight.device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=weight.device)
    training, why = language.training, ""
    language.eval()
    try:
        with torch.no_grad():
            x = language.embed(ids)[None]
            apart = torch.cat([language(x[:, :3]), language(x[:, 3:])], dim=1)
            difference = (language(x, positions=positions) - apart).abs().max().item()
        if not difference <= (1e-4 if weight.dtype == torch.float32 else 3e-2):
            why = f"packed, its logits differ by {difference:.1e}"
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:  # as libraries raise
        why = " ".join(str(error).split())[:200]
    finally:
        language.train(training)
    if why:
        raise UsageError(
            f"sample_pack: {type(language.body).__name__} cannot keep samples in one row apart: {why}",
            "use sample_pack:layout=bucket, or a decoder with rotary or learned positions",
        )
