"""Adaptive token sampling: more tokens where an image's attention is spread, fewer where it is not.

Source: ATS, arXiv 2111.15667. Pure functions of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effbench.models.attention import Projections
from effbench.models.token_state import Reduce


def significance(p: Projections, prefix: int, sizes: Tensor | None) -> Tensor:
    """How much each patch token adds to the class token: its attention x the norm of its value, as a distribution.

    Normalised per head over the patch tokens, then averaged over heads. One row of attention: O(tokens x width).

    Args:
        p: of the block, (batch, heads, tokens, head width) each.
        prefix: number of leading tokens that are no patches; token 0 is the class token.
        sizes: (batch, tokens) or None; tokens of size 0 are padding and get 0.

    Returns:
        (batch, patch tokens), float32, each row sums to 1.
    """
    row = ((p.q[:, :, :1] * p.scale) @ p.k[:, :, prefix:].transpose(-2, -1)).squeeze(2).float()
    if sizes is not None:
        row = row + sizes[:, None, prefix:].log()
    score = row.softmax(dim=-1) * p.v[:, :, prefix:].float().norm(dim=-1)
    return (score / score.sum(dim=-1, keepdim=True)).mean(dim=1)


def sample(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Inverse transform sampling at the fixed quantiles (2i - 1) / 2k, i = 1 .. k; a token drawn twice counts once.

    Args:
        scores: (batch, n), each row a distribution; what has 0 is never drawn.

    Returns:
        Indices (batch, longest), ascending, padded to the image with the most distinct tokens, and which of them are
        tokens of the image (batch, longest). `longest` depends on the data.
    """
    batch, n = scores.shape
    cumulative = scores.cumsum(dim=1)
    cumulative = cumulative / cumulative[:, -1:]
    quantiles = (torch.arange(k, device=scores.device) + 0.5) / k
    drawn = torch.searchsorted(cumulative, quantiles.expand(batch, k).contiguous())
    drawn = drawn.clamp(max=n - 1)  # scores that are not finite must not index out of range
    again = torch.zeros_like(drawn, dtype=torch.bool)
    again[:, 1:] = drawn[:, 1:] == drawn[:, :-1]
    counts = k - again.sum(dim=1)
    longest = int(counts.max())
    distinct_first = again.byte().argsort(dim=1, stable=True)[:, :longest]
    return drawn.gather(1, distinct_first), torch.arange(longest, device=drawn.device) < counts[:, None]


def padded(keep: Reduce, real: Tensor, prefix: int) -> Reduce:
    """`keep` with the size of padding set to 0: later attention does not see it, a mean over tokens leaves it out.

    Args:
        real: (batch, kept patch tokens), False for padding.
    """
    weight = torch.cat([real.new_ones(len(real), prefix), real], dim=1)

    def reduce(field: Tensor, kind: str) -> Tensor:
        kept = keep(field, kind)
        return kept * weight if kind == "size" else kept

    return reduce
