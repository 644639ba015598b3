"""Choosing image tokens inside a language model: DART, CDPruner, VisionZip. Pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effbench.models.shortening import at
from effbench_methods.algorithms.selection import rest, stride, top

BIAS = 1e-6  # of a relevance: the least relevant token of an image can still be chosen


def least_like(tokens: Tensor, pivots: Tensor, k: int) -> Tensor:
    """Indices (batch, k) of the tokens that repeat the pivots least (DART, arXiv 2502.11494).

    Each pivot in turn keeps its share of those that are still there and have the lowest cosine with it.

    Args:
        tokens: (batch, n, width); pivots: (batch, p, width).
    """
    batch, n, _ = tokens.shape
    likeness = F.normalize(pivots, dim=-1) @ F.normalize(tokens, dim=-1).transpose(1, 2)  # (batch, p, n)
    shares = [(k * (i + 1)) // pivots.shape[1] - k * i // pivots.shape[1] for i in range(pivots.shape[1])]
    chosen = [tokens.new_zeros(batch, 0, dtype=torch.long)]
    for pivot, share in enumerate(shares):  # each depends on what those before it took
        found = top(-likeness[:, pivot], share)
        chosen.append(found)
        likeness = likeness.scatter(2, found[:, None].expand(-1, pivots.shape[1], -1), float("inf"))
    return torch.cat(chosen, dim=1)


def pivots_by_norm(keys: Tensor, k: int) -> Tensor:
    """Indices (batch, k) of the tokens whose keys (batch, n, width) have the largest L1 norm."""
    return top(keys.abs().sum(dim=-1), k)


def relevance(tokens: Tensor, text: Tensor) -> Tensor:
    """Cosine of image tokens with the mean of the text, scaled to [0, 1] within each sample (CDPruner).

    Args:
        tokens: (batch, n, width); text: (batch, width).

    Returns:
        (batch, n), which no other sample of the batch changes.
    """
    likeness = F.cosine_similarity(tokens, text[:, None], dim=-1)
    low, high = likeness.amin(dim=1, keepdim=True), likeness.amax(dim=1, keepdim=True)
    return (likeness - low + BIAS) / (high - low + BIAS)


def determinantal(tokens: Tensor, weight: Tensor, k: int) -> Tensor:
    """Indices (batch, k) that greedily maximise the determinant of a kernel (CDPruner, arXiv 2506.10967).

    The kernel is weight_i cos(token_i, token_j) weight_j: what is chosen is relevant and unlike the others chosen.
    Fast greedy MAP inference by a Cholesky factor that grows by a column per choice (Chen et al., arXiv 1709.05135).

    Args:
        tokens: (batch, n, width); weight: (batch, n) above 0.
    """
    batch, n, _ = tokens.shape
    unit = F.normalize(tokens.float(), dim=-1) * weight.float()[..., None]
    kernel = unit @ unit.transpose(1, 2)
    gain = kernel.diagonal(dim1=1, dim2=2).clone()  # of the determinant, by each token
    factor = kernel.new_zeros(batch, k, n)
    chosen = []
    for step in range(k):  # each depends on those before it
        pick = gain.argmax(dim=1)
        chosen.append(pick)
        where = pick[:, None, None].expand(-1, 1, n)
        column = kernel.gather(1, where)
        if step:
            known = factor[:, :step]
            column = column - known.gather(2, pick[:, None, None].expand(-1, step, 1)).transpose(1, 2) @ known
        scale = gain.gather(1, pick[:, None]).clamp(min=1e-12).sqrt()
        factor[:, step] = column[:, 0] / scale
        gain = (gain - factor[:, step].square()).clamp(min=0)  # rounding may take it below 0, where nothing is gained
        gain = gain.scatter(1, torch.stack(chosen, dim=1), -1.0)
    return torch.stack(chosen, dim=1)


def dominant_and_contextual(
    tokens: Tensor, scores: Tensor, keys: Tensor, k: int, share: float
) -> tuple[Tensor, Tensor]:
    """The tokens with the highest scores, and means of the others (VisionZip, arXiv 2412.04467).

    Every n-th of the others is a context: each of the rest joins the one whose key is most like its own.

    Args:
        tokens: (batch, n, width); scores: (batch, n), of class attention; keys: (batch, n, width).
        share: of the k that are dominant.

    Returns:
        indices (batch, k), dominant ones first, and the tokens (batch, k, width) that stand for them.
    """
    n = tokens.shape[1]
    first = min(k, max(1, round(share * k)))
    dominant = top(scores, first)
    others = rest(dominant, n)
    context = others.gather(1, stride(n - first, k - first, others))
    index = torch.cat([dominant, context], dim=1)
    if k == first:
        return index, at(tokens, index)
    unit = F.normalize(at(keys, others), dim=-1)
    own = F.normalize(at(keys, context), dim=-1)
    joins = (unit @ own.transpose(1, 2)).argmax(dim=2)  # (batch, others); a context is most like itself
    totals = tokens.new_zeros(len(tokens), k - first, tokens.shape[2])
    totals.scatter_add_(1, joins[..., None].expand(-1, -1, tokens.shape[2]), at(tokens, others))
    counts = tokens.new_zeros(totals.shape[:2]).scatter_add_(1, joins, torch.ones_like(joins, dtype=tokens.dtype))
    return index, torch.cat([at(tokens, dominant), totals / counts.clamp(min=1)[..., None]], dim=1)
