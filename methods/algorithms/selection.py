"""Choosing tokens: top-k by a score, a uniform stride, farthest points. Pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effbench.models.attention import Projections, class_attention
from effbench.models.token_state import Reduce, picked


def top(scores: Tensor, k: int) -> Tensor:
    """Indices (batch, k) of the k highest of scores (batch, n)."""
    return scores.topk(k, dim=1, sorted=False).indices


BLIND = ("random", "grid", "norm")


def blind(how: str, patches: Tensor, k: int) -> Tensor:
    """Indices (batch, k) of patches (batch, n, width) chosen without a look at what they show: the controls.

    random; grid, a uniform stride; norm, the longest.
    """
    batch, n, _ = patches.shape
    match how:
        case "grid":
            return stride(n, k, patches)
        case "norm":
            return top(patches.norm(dim=-1), k)
    return top(torch.rand(batch, n, device=patches.device), k)


def rest(index: Tensor, n: int) -> Tensor:
    """Indices (batch, n - k), ascending, of those of n tokens that are not at index (batch, k)."""
    taken = torch.zeros(len(index), n, dtype=torch.uint8, device=index.device).scatter(1, index, 1)
    return taken.argsort(dim=1, stable=True)[:, : n - index.shape[1]]


def mean_query_attention(p: Projections, prefix: int, sizes: Tensor | None = None) -> Tensor:
    """Attention of the patch tokens' mean query to all tokens, averaged over heads: for towers without a class token.

    One row per head: tokens x width MACs.

    Returns:
        (batch, tokens), each row sums to 1.
    """
    return class_attention(p._replace(q=p.q[:, :, prefix:].mean(dim=2, keepdim=True)), sizes)


def change(before: Tensor, after: Tensor) -> Tensor:
    """How far tokens (batch, n, width) turned: 1 - cosine, (batch, n), in [0, 2]."""
    return 1 - F.cosine_similarity(before.float(), after.float(), dim=-1)


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
    # the first is the token that is least like its most different partner; the second then is that partner
    pick = similarity.amin(dim=2).argmin(dim=1)
    similarity.diagonal(dim1=1, dim2=2).fill_(float("inf"))  # a chosen one is near itself: it is not chosen again
    rows = similarity.flatten(0, 1)
    first = torch.arange(0, batch * n, n, device=x.device)
    chosen = [pick]
    nearest = rows.index_select(0, first + pick)
    for _ in range(k - 1):  # each depends on the one before
        chosen.append(nearest.argmin(dim=1))
        nearest = torch.maximum(nearest, rows.index_select(0, first + chosen[-1]))
    return torch.stack(chosen, dim=1)


def gather(index: Tensor, prefix: int) -> Reduce:
    """A reduction that keeps the prefix tokens and, of the others, those at index (batch, k)."""
    return picked(behind(index, prefix))


def behind(index: Tensor, prefix: int) -> Tensor:
    """Indices (batch, k) of patch tokens as those of all tokens, (batch, prefix + k), the prefix among them."""
    head = torch.arange(prefix, device=index.device).expand(index.shape[0], prefix)
    return torch.cat([head, index + prefix], dim=1)


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
