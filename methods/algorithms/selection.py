"""Choosing tokens: top-k by a score, a uniform stride, farthest points. Pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effbench.models.tower import Reduce


def top(scores: Tensor, k: int) -> Tensor:
    """Indices (batch, k) of the k highest of scores (batch, n)."""
    return scores.topk(k, dim=1, sorted=False).indices


def stride(n: int, k: int, like: Tensor) -> Tensor:
    """Indices (batch, k) of every n/k-th of n tokens; `like` gives batch and device."""
    index = (torch.arange(k, device=like.device) * n + n // 2) // k
    return index.expand(like.shape[0], k)


def farthest(x: Tensor, k: int) -> Tensor:
    """Indices (batch, k) that spread over x (batch, n, width) by cosine distance, chosen greedily (max-min).

    Starts from the pair with the largest distance, as DivPrune (arXiv 2503.02175) states the problem; each step adds
    the token whose nearest chosen one is farthest away.
    """
    batch, n, _ = x.shape
    x = F.normalize(x, dim=-1)
    similarity = x @ x.transpose(1, 2)
    chosen = torch.empty(batch, k, dtype=torch.long, device=x.device)
    # the first is the token that is least like its most different partner; the second then is that partner
    nearest = similarity.amin(dim=2)
    for step in range(k):
        pick = nearest.argmin(dim=1)
        chosen[:, step] = pick
        row = similarity.gather(1, pick[:, None, None].expand(batch, 1, n)).squeeze(1)
        nearest = row if step == 0 else torch.maximum(nearest, row)
        nearest = nearest.scatter(1, chosen[:, : step + 1], float("inf"))
    return chosen


def gather(index: Tensor, prefix: int) -> Reduce:
    """A reduction that keeps the prefix tokens and, of the others, those at index (batch, k)."""
    batch = index.shape[0]
    head = torch.arange(prefix, device=index.device).expand(batch, prefix)
    index = torch.cat([head, index + prefix], dim=1)

    def reduce(field: Tensor, kind: str) -> Tensor:
        # whole rows are copied at once: several times faster on a CPU than torch.gather
        tokens = field.shape[1]
        flat = (index + torch.arange(0, batch * tokens, tokens, device=index.device)[:, None]).flatten()
        return field.reshape(batch * tokens, *field.shape[2:]).index_select(0, flat).unflatten(0, (batch, -1))

    return reduce


def fuse_rest(keep: Reduce, index: Tensor, weights: Tensor, prefix: int) -> Reduce:
    """Extends `keep` by one token: the sum of the dropped tokens by weight, not renormalised (EViT, 2202.07800).

    Args:
        index: (batch, k) kept tokens, prefix not counted.
        weights: (batch, n) weight of every token, prefix not counted.
    """
    rest = weights.scatter(1, index, 0.0)
    dropped = torch.ones_like(rest).scatter(1, index, 0.0)

    def reduce(field: Tensor, kind: str) -> Tensor:
        others = field[:, prefix:]
        if kind == "tokens":
            extra = (rest.unsqueeze(-1).to(field.dtype) * others).sum(dim=1, keepdim=True)
        elif kind == "size":
            extra = (dropped.to(field.dtype) * others).sum(dim=1, keepdim=True)
        else:
            extra = torch.full_like(field[:, :1], -1)
        return torch.cat([keep(field, kind), extra], dim=1)

    return reduce
