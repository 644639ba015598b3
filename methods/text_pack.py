"""Text packing: captions stand close together instead of being padded to the context length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from effbench.errors import UsageError
from effbench.method import Method, param
from effbench.models.text_rows import TextLayout, TextRows, one_text_per_row
from effbench.models.tower import ModelView
from effbench_methods.algorithms.packing import Packing, groups, pack, places

ROW = 64  # of 32, 48, 64 and 77, all equally fast on Flickr8k captions, the one that leaves the least padding


@dataclass(frozen=True)
class TextPack(Method):
    """Run the text tower on captions without their padding; features, their order and number stay the same.

    trim cuts the batch to its longest caption; bucket sorts the captions into groups by length and trims each; pack
    puts several captions into a row, hidden from each other by a block-diagonal causal mask, with positions that
    restart per caption. Lossless in a causal tower pooled at the end-of-text token, in training too. The lengths decide
    the shapes, so all three break the graph of torch.compile (fullgraph=True is refused by torch), and on a GPU each
    batch waits once for its lengths.
    """

    source = "Krell et al., Efficient Sequence Packing without Cross-contamination, arXiv 2107.02027"
    claims = ("per batch",)
    neutral = {}

    how: str = param("pack", "how padding is avoided", choices=("trim", "bucket", "pack"))
    buckets: int = param(4, "how=bucket: most groups", low=1)
    row: int | None = param(None, f"how=pack: tokens in a row; none is {ROW}, or the context if shorter", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, how, default in (("buckets", "bucket", 4), ("row", "pack", None)):
            if getattr(self, name) != default and self.how != how:
                raise UsageError(
                    f"text_pack: {name} says nothing with how={self.how}", f"use how={how}, or leave it out"
                )

    def edit_model(self, model: ModelView) -> None:
        text = getattr(model.text, "module", None)
        if not hasattr(text, "lay_out"):
            held = getattr(model.model, "text", getattr(model.model, "text_encoder", text))
            found = "no text tower" if held is None else f"a {type(held).__name__}"
            raise UsageError(
                "text_pack needs an OpenCLIP text tower (causal, pooled at the end-of-text token), but "
                f"{type(model.model).__name__} has {found}",
                "choose a model with CLIP's text tower, e.g. openclip:ViT-B-32; for image towers see token_prune",
            )
        if self.row is not None and self.row > text.context_length:
            raise UsageError(
                f"text_pack: row={self.row} is longer than the context of {text.context_length} tokens",
                f"row takes 1 to {text.context_length}",
            )
        text.lay_out(Layout(self))

    def notes(self, model: ModelView) -> list[str]:
        return model.text.module.layout.notes()


class Layout(TextLayout):
    """Lays out the captions of a batch.

    Attributes:
        lengths: of the last batch's captions; context: what they were padded to.
    """

    name = "text_pack"

    def __init__(self, method: TextPack) -> None:
        super().__init__()
        self.method = method
        self.lengths: list[int] = []
        self.context = 0

    @torch.compiler.disable
    def forward(self, ends: Tensor, context: int) -> tuple[list[TextRows], Tensor | None]:
        self.lengths, self.context = (ends + 1).tolist(), context
        if not self.lengths:
            return [one_text_per_row(ends, context, context)], None
        lengths = np.array(self.lengths)
        if self.method.how == "trim":
            return [one_text_per_row(ends, max(self.lengths), context)], None
        if self.method.how == "bucket":
            found = groups(lengths, self.method.buckets)
            order = torch.from_numpy(np.concatenate(found)).to(ends.device)
            texts = order.split([len(group) for group in found])
            longest = [self.lengths[group[-1]] for group in found]
            return [one_text_per_row(ends, n, context, t) for n, t in zip(longest, texts, strict=True)], order
        sequence, position, last = places(lengths, self._packing(lengths))
        plan = np.stack([sequence * context + position, position])
        source, positions = torch.from_numpy(plan).to(ends.device)  # in one transfer
        return [TextRows(source, positions, torch.from_numpy(last).to(ends.device))], None

    def _packing(self, lengths: np.ndarray) -> Packing:
        return pack(lengths, self.method.row or min(ROW, self.context))

    def notes(self) -> list[str]:
        """Which share of the places holds a caption's tokens, in each of the ways: sum of lengths / (rows x tokens)."""
        if not self.lengths:
            return []
        lengths = np.array(self.lengths)
        found, packing = groups(lengths, self.method.buckets), self._packing(lengths)
        needed = {
            f"padded to {self.context}": len(lengths) * self.context,
            "trimmed": len(lengths) * lengths.max(),
            f"in {len(found)} buckets": sum(len(group) * lengths[group].max() for group in found),
            f"packed in rows of {packing.width}": packing.rows * packing.width,
        }
        shares = ", ".join(f"{100 * lengths.sum() / count:.0f} % {how}" for how, count in needed.items())
        return [f"tokens that are captions, in the last batch of {len(lengths)}: {shares}"]
