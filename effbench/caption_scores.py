"""Scores of captions by pycocoevalcap's definitions, without Java."""

from __future__ import annotations

import re

import numpy as np

from effbench.task import Metric

_WORD = re.compile(r"[a-z0-9']+")


def _same(values):
    return values


def scores(written, references):
    """Per-image scores by name."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider_scorer import CiderScorer
    from pycocoevalcap.rouge.rouge import Rouge

    written = [" ".join(_WORD.findall(t.lower())) for t in written]
    references = [[" ".join(_WORD.findall(t.lower())) for t in each] for each in references]
    cider, bleu, rouge = CiderScorer(n=4, sigma=6.0), BleuScorer(n=4), Rouge()
    for hyp, refs in zip(written, references, strict=True):
        cider += (hyp, refs)
        bleu += (hyp, refs)
    _, c = cider.compute_score()
    counts = np.array(
        [
            [*x["correct"], *x["guess"], x["testlen"], min(x["reflen"], key=lambda r: (abs(r - x["testlen"]), r))]
            for x in bleu.ctest
        ],
        float,
    )
    r = [rouge.calc_score([hyp], refs) for hyp, refs in zip(written, references, strict=True)]
    return dict(cider=100 * np.asarray(c), bleu=counts, rouge_l=100 * np.array(r))


def bleu4(sums):
    """From mean counts."""
    correct, guess = sums[..., :4], sums[..., 4:8]
    precision = (correct + 1e-15) / (guess + 1e-9)
    brevity = np.minimum(1.0, np.exp(1 - sums[..., 9] / np.maximum(sums[..., 8], 1e-9)))
    return 100 * brevity * np.exp(np.log(precision).mean(axis=-1))


METRICS = (
    Metric("cider", "cider", _same, True, None, 1000.0, unit=""),
    Metric("bleu4", "bleu", _same, True, None, 100.0, unit="", combine=bleu4),
    Metric("rouge_l", "rouge_l", _same, True, None, 100.0, unit=""),
)
