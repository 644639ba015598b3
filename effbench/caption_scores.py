"""Scores of captions by pycocoevalcap's definitions (Chen and others 2015, arXiv:1504.00325).

BLEU-4, ROUGE-L and CIDEr-D need no Java; METEOR and SPICE are there where `java_scores` can run them. All in per cent
of their own unit, as papers print them: CIDEr-D 0.485 is 48.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer, cook_refs
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_test
from pycocoevalcap.rouge.rouge import Rouge

from effbench import java_scores
from effbench.caption_tokens import words
from effbench.task import Metric, unchanged

#: scores that a machine may lack, by name
OPTIONAL: dict[str, Callable[[list[str], list[list[str]]], np.ndarray]] = {
    "meteor": java_scores.meteor,
    "spice": java_scores.spice,
}


class References:
    """The references of a split, split into words and counted once for all arms.

    CIDEr-D's document frequencies are theirs: in how many images' references an n-gram stands.

    Args:
        references: of each image one or more captions.
        optional: whether METEOR and SPICE are computed too, where that is possible.
    """

    def __init__(self, references: Sequence[Sequence[str]], optional: bool = True) -> None:
        self.optional = OPTIONAL if optional else {}
        self.texts = [[" ".join(words(text)) for text in each] for each in references]
        self.bleu = [cook_refs(each) for each in self.texts]
        cider = CiderScorer(n=4, sigma=6.0)
        for each in self.texts:
            cider.cook_append(None, each)
        cider.compute_doc_freq()
        self.cider = cider
        #: why an optional score is missing, by its name
        self.left_out: dict[str, str] = {}
        self._known: dict[tuple[str, ...], dict[str, np.ndarray]] = {}

    def scores(self, written: Sequence[str]) -> dict[str, np.ndarray]:
        """Scores of one caption per image, by name.

        An empty caption scores 0, also against an empty reference.

        Returns:
            "cider", "rouge_l", "spice" (images,); "bleu" (images, 10) counts for `bleu4`; "meteor" (images, 23) counts
            for `java_scores.meteor_score`. "meteor" and "spice" only where they could be computed, else `left_out`
            says why.
        """
        texts = tuple(" ".join(words(text)) for text in written)
        if len(texts) != len(self.texts):
            raise ValueError(f"{len(texts)} captions for {len(self.texts)} images")
        if texts not in self._known:  # noop and identity write what the baseline wrote
            self._known[texts] = self._scores(list(texts))
        return self._known[texts]

    def _scores(self, texts: list[str]) -> dict[str, np.ndarray]:
        bleu, rouge, pairs = BleuScorer(n=4), Rouge(), list(zip(texts, self.texts, strict=True))
        bleu.crefs = self.bleu
        bleu.retest(texts)
        self.cider.ctest = [cook_test(text) for text in texts]
        found = dict(
            cider=100 * np.array(self.cider.compute_cider()),
            bleu=np.array([_bleu_counts(each) for each in bleu.ctest], float),
            rouge_l=100 * np.array([rouge.calc_score([text], refs) if text else 0.0 for text, refs in pairs]),
        )
        for name, score in self.optional.items():
            if name not in self.left_out:
                try:
                    found[name] = score(texts, self.texts)
                except java_scores.Unavailable as reason:
                    self.left_out[name] = f"{name} is left out: {reason}"
        return found


def _bleu_counts(cooked: dict) -> list[int]:
    """Of one caption: matched n-grams and n-grams for n = 1 to 4, words, words of the reference nearest in length."""
    own = cooked["testlen"]
    nearest = min(cooked["reflen"], key=lambda length: (abs(length - own), length))
    return [*cooked["correct"], *cooked["guess"], own, nearest]


def totals(counts: np.ndarray) -> np.ndarray:
    """Counts (images, columns) of which the mean is the sum of what was given: BLEU's smoothing asks for sums."""
    return counts * len(counts)


def bleu4(sums: np.ndarray) -> np.ndarray:
    """BLEU-4 of a corpus in per cent from the sums of the images' counts (..., 10): (...).

    As pycocoevalcap computes it: the brevity penalty by the reference nearest in length, smoothing by tiny numbers.
    """
    precision = (sums[..., :4] + 1e-15) / (sums[..., 4:8] + 1e-9)
    ratio = (sums[..., 8] + 1e-15) / (sums[..., 9] + 1e-9)
    return 100 * np.minimum(1, np.exp(1 - 1 / ratio)) * np.exp(np.log(precision).mean(axis=-1))


METRICS = (
    Metric("cider", "cider", unchanged, True, None, 1000.0, unit=""),
    Metric("bleu4", "bleu", totals, True, None, 100.0, unit="", combine=bleu4),
    Metric("rouge_l", "rouge_l", unchanged, True, None, 100.0, unit=""),
    Metric("meteor", "meteor", unchanged, True, None, 100.0, unit="", combine=java_scores.meteor_score, optional=True),
    Metric("spice", "spice", unchanged, True, None, 100.0, unit="", optional=True),
)
