"""How the samples of a training batch lie in rows of tokens: a method says it, the captioner's loss carries it out."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from effbench.errors import UsageError

if TYPE_CHECKING:
    from effbench.models.captioner import Captioner


class Rows(NamedTuple):
    """Rows of tokens, each with one sample or several behind one another.

    Args:
        sample: (rows, tokens), which sample of the batch stands at each place.
        position: (rows, tokens), which of its tokens that is; both are 0 where none stands, at a row's end.
        held: (samples,) which samples these rows hold; first: (samples,) at which place, flattened, each begins.
        packed: whether positions restart with every sample and no token sees another sample. If not, the samples of a
            row are one sequence in the plain causal order, in which later ones see earlier ones.
        begin: (samples,) the token that each begins with, counted in the whole sample; None for the first of all. One
            that begins with the last token before its text has no image: a start of text stands there.
    """

    sample: np.ndarray
    position: np.ndarray
    held: np.ndarray
    first: np.ndarray
    packed: bool
    begin: np.ndarray | None = None


class Layout(nn.Module):
    """What a method puts into a captioner to say how the samples of each training batch lie in rows. It is overhead.

    Class attributes:
        name: the method's name, for messages.
    """

    is_overhead: ClassVar[bool] = True
    name: ClassVar[str] = "a method"

    def forward(self, lengths: np.ndarray, prefix: int) -> list[Rows]:
        """Lay out one batch.

        Args:
            lengths: (batch,) tokens of each sample, those of its image included, up to the last one that is predicted
                from; the one behind it, which is the end of its text, may stand too where another sample follows.
            prefix: how many of them stand before the text.

        Returns:
            groups of rows, each of which the language model runs on its own.
        """
        raise NotImplementedError


def refuse_second(model: Captioner, name: str) -> None:
    """Refuse a method, by its name, that would lay out the samples which another lays out already."""
    if model.layout is not None:
        raise UsageError(
            f"{model.layout.name} and {name} conflict: both lay out the samples of a batch", "name one of them"
        )


def logits_in_rows(
    model: Captioner, layout: Layout, prefix: Tensor, tokens: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """What is predicted wherever something is to be predicted, and nowhere else.

    A sample is its prefix and its text up to the last token that is predicted from. The lengths decide the shapes, so a
    GPU waits for them once.

    Args:
        prefix: everything before the text, embedded (batch, tokens, width); tokens: ids (batch, text).
        target: the same with IGNORE where nothing is to be predicted.

    Returns:
        logits (n, vocabulary) and what they are to predict (n,).
    """
    predicted = (target >= 0).cpu().numpy()  # IGNORE is below
    place = np.arange(1, predicted.shape[1] + 1)
    lengths = prefix.shape[1] - 1 + np.maximum(1, (predicted * place).max(axis=1))
    words = model.language.embed(tokens).to(prefix.dtype)
    padded = torch.cat([prefix, words], dim=1)
    longest, flat, last = padded.shape[1], padded.flatten(0, 1), prefix.shape[1] - 1
    logits, wanted = [], []
    model.language.part = "prefill"
    for rows in layout(lengths, prefix.shape[1]):
        begin = np.zeros(len(rows.held), dtype=np.int64) if rows.begin is None else rows.begin
        sample, text = predicted[rows.held].nonzero()
        take = rows.first[sample] + last - begin[sample] + text
        which = rows.held[sample] * predicted.shape[1] + text
        origin = rows.sample * longest + rows.position
        blind = begin == last
        alone = rows.begin is not None and bool(blind.any())
        if alone:  # the place behind all tokens of the batch
            origin.reshape(-1)[rows.first[blind]] = len(flat)
        source, take, which, positions = _on(padded.device, origin, take, which, rows.position)
        tokens_held = torch.cat([flat, model.starts(1)[0].to(flat.dtype)]) if alone else flat
        x = tokens_held.index_select(0, source.flatten()).unflatten(0, source.shape)
        # transformers sees from positions that restart where samples begin, and masks them from each other
        positions = positions if rows.packed else None
        image = model.has_image(prefix) and not (alone and blind.all())
        logits.append(model.language(x, positions=positions, take=take, image=image))
        wanted.append(target.flatten()[which])
    return torch.cat(logits), torch.cat(wanted)


def _on(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array).to(device, non_blocking=True) for array in arrays]
