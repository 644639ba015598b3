"""A word vocabulary made of the training captions, for text towers that have no tokenizer of their own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

PAD, UNKNOWN = 0, 1
_WORD = re.compile(r"[a-z0-9']+")


class Vocabulary:
    """Words seen at least `least` times, sorted; the end-of-text token has the highest id (argmax pooling).

    Args:
        captions: the training captions.
        context: most tokens per caption, end-of-text included; longer captions are cut. It is less where no training
            caption is that long: padding costs a text tower as much as words.
        least: words seen less often become UNKNOWN.
    """

    def __init__(self, captions: Sequence[str], context: int = 32, least: int = 2) -> None:
        split = [_WORD.findall(caption.lower()) for caption in captions]
        counts = Counter(word for caption in split for word in caption)
        words = sorted(word for word, count in counts.items() if count >= least)
        self.words = words
        self.ids = {word: index + 2 for index, word in enumerate(words)}
        self.context = min(context, max(map(len, split), default=0) + 1)
        self.end = len(words) + 2

    @property
    def start(self) -> int:
        """The id that stands before a text which a language model writes: the end of what came before."""
        return self.end

    def __len__(self) -> int:
        return self.end + 1

    def encode(self, text: str) -> list[int]:
        """The words of a text, all of them, without an end."""
        return [self.ids.get(word, UNKNOWN) for word in _WORD.findall(text.lower())]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids up to the first end; what is no word is left out."""
        ids = list(ids)
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        return " ".join(self.words[i - 2] for i in ids if 2 <= i < self.end)

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """Token ids, (captions, context), int64."""
        out = np.full((len(captions), self.context), PAD, dtype=np.int64)
        for row, caption in zip(out, captions, strict=True):
            words = _WORD.findall(caption.lower())[: self.context - 1]
            row[: len(words)] = [self.ids.get(word, UNKNOWN) for word in words]
            row[len(words)] = self.end
        return torch.from_numpy(out)
