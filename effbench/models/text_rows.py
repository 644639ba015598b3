"""How the texts of a batch lie in rows of tokens: a method says it, a text tower's adapter carries it out."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class TextRows(NamedTuple):
    """Rows of tokens, each with one text or several behind one another.

    Args:
        source: (rows, tokens), which of the batch's ids, flattened, stands at each place.
        positions: which position of its text that is: (tokens,) where every row is one text from its beginning, else
            (rows, tokens); 0 at places that no text needs.
        last: (texts,), at which place, flattened, the end of each text stands.
    """

    source: Tensor
    positions: Tensor
    last: Tensor

    def mask(self) -> Tensor | None:
        """Boolean, (rows, 1, tokens, tokens): a token sees those before it in its own text, and itself.

        None where every row is one text: then the plain causal order says the same.
        """
        if self.positions.ndim == 1:
            return None
        place = torch.arange(self.positions.shape[1], device=self.positions.device)
        back = place[:, None] - place  # how far the key (last axis) lies behind the query
        return ((back >= 0) & (back <= self.positions.unsqueeze(2))).unsqueeze(1)


def one_text_per_row(ends: Tensor, tokens: int, context: int, texts: Tensor | None = None) -> TextRows:
    """Each text in a row of its own, cut to `tokens`.

    Args:
        ends: (batch,) position of each text's end-of-text token.
        context: tokens of each text as it comes in.
        texts: (texts,) which of them; None for all.
    """
    if texts is None:
        texts = torch.arange(len(ends), device=ends.device)
    positions = torch.arange(tokens, device=ends.device)
    last = torch.arange(0, len(texts) * tokens, tokens, device=ends.device) + ends[texts]
    return TextRows(texts[:, None] * context + positions, positions, last)


class TextLayout(nn.Module):
    """What a method puts into a text tower to say how the texts of each batch lie in rows. Its time is overhead.

    Class attributes:
        name: the method's name, for messages.
    """

    is_overhead: ClassVar[bool] = True
    name: ClassVar[str] = "a method"

    def forward(self, ends: Tensor, context: int) -> tuple[list[TextRows], Tensor | None]:
        """Lay out one batch.

        Args:
            ends: (batch,) position of each text's end-of-text token.
            context: tokens of each text as it comes in, padding included.

        Returns:
            groups of rows, each of which the tower runs on its own; and (batch,) the texts in the order in which the
            groups hold them, None where that is the batch's own.
        """
        raise NotImplementedError
