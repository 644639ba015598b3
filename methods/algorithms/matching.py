"""Which tokens to merge into which, and merging them. Pure functions of tensors.

Bipartite soft matching: ToMe, arXiv 2210.09461. Matching of the tokens with the highest energy: PiToMe, arXiv
2405.16148. Merging that preserves norms: ToFu, arXiv 2312.01026.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effbench.models.token_state import Reduce, picked


class Matching(NamedTuple):
    """Who is merged into whom.

    Args:
        keep: (batch, tokens - r) indices of the tokens that stay, in their new order.
        source: (batch, r) indices of the tokens that are merged away.
        target: (batch, r) place in the new order of the token that each is merged into.
        first: no place before this one is a target.
    """

    keep: Tensor
    source: Tensor
    target: Tensor
    first: int


def bipartite(metric: Tensor, r: int, prefix: int) -> Matching:
    """ToMe's matching: patch tokens alternate between two sets; every token of one finds the most similar token of
    the other, and the r most similar pairs are merged.

    Args:
        metric: (batch, tokens, width), compared by cosine.
        r: pairs, at most half of the patch tokens.
        prefix: leading tokens that are never merged.
    """
    batch, tokens, _ = metric.shape
    x = F.normalize(metric[:, prefix:], dim=-1)
    similarity = x[:, 1::2] @ x[:, ::2].transpose(1, 2)
    order = similarity.amax(dim=-1).argsort(dim=-1, descending=True)
    merged, stay = order[:, :r], order[:, r:].sort(dim=-1).values
    partner = picked(merged)(similarity).argmax(dim=-1)  # of those alone: an argmax costs several times an amax
    place = torch.arange(tokens, device=metric.device).expand(batch, tokens)
    keep = torch.cat([place[:, :prefix], prefix + 1 + 2 * stay, place[:, prefix::2]], dim=1)
    first = prefix + stay.shape[1]
    return Matching(keep, prefix + 1 + 2 * merged, first + partner, first)


def by_energy(metric: Tensor, r: int, prefix: int, margin: float) -> Matching:
    """PiToMe's matching: tokens that have many similar ones are redundant; the 2r most redundant, in that order,
    alternate between two sets, and every token of one is merged into the most similar token of the other.

    The energy of a token is the mean over all tokens of f(cosine), f(s) = s - margin from the margin on and
    exp(s - margin) - 1 below it.

    Args:
        metric, r, prefix: as for `bipartite`.
    """
    batch, tokens, _ = metric.shape
    x = F.normalize(metric[:, prefix:], dim=-1)
    similarity = x @ x.transpose(1, 2)
    order = F.elu(similarity - margin).mean(dim=-1).argsort(dim=-1, descending=True)
    source, target = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2]
    protected = order[:, 2 * r :].sort(dim=-1).values
    width = similarity.shape[-1]
    rows = similarity.gather(1, source.unsqueeze(-1).expand(batch, r, width))
    partner = rows.gather(2, target.unsqueeze(1).expand(batch, r, r)).argmax(dim=-1)
    head = torch.arange(prefix, device=metric.device).expand(batch, prefix)
    keep = torch.cat([head, prefix + protected, prefix + target], dim=1)
    first = prefix + protected.shape[1]
    return Matching(keep, prefix + source, first + partner, first)


def merge(matching: Matching, sizes: Tensor, preserve_norm: bool = False) -> Reduce:
    """A reduction that replaces matched tokens by their mean, each weighted by its size.

    Args:
        sizes: (batch, tokens), original tokens that each stands for.
        preserve_norm: the mean is scaled to the largest norm of those that it is made of (ToFu's MLERP).
    """
    keep, source, target, first = matching
    stay, leave = picked(keep), picked(source)
    before, joining_sizes = stay(sizes), leave(sizes)
    after = before.scatter_add(1, target, joining_sizes)
    share = (joining_sizes / after.gather(1, target)).unsqueeze(-1)

    def reduce(field: Tensor, kind: str) -> Tensor:
        if field is sizes:
            return after
        kept = stay(field)
        if kind == "size":
            return kept.scatter_add(1, target, leave(field))
        if kind == "label":
            return kept.scatter(1, _like(target, kept), -1)
        joining, place = leave(field), _like(target, kept)
        # the mean is x + sum of share (y - x) over all y that x takes in: only those rows are touched
        if not preserve_norm:
            add = kept.scatter_add if torch.is_grad_enabled() else kept.scatter_add_
            return add(1, place, (joining - kept.gather(1, place)) * share.to(field.dtype))
        tail, place = kept[:, first:], _like(target - first, kept)
        norms = tail.norm(dim=-1).scatter_reduce(1, target - first, joining.norm(dim=-1), "amax")
        mean = tail.scatter_add(1, place, (joining - tail.gather(1, place)) * share.to(field.dtype))
        scale = norms / mean.norm(dim=-1).clamp_min(1e-6)
        return torch.cat([kept[:, :first], mean * scale.unsqueeze(-1)], dim=1)

    return reduce


def prune(matching: Matching, sizes: Tensor) -> Reduce:
    """A reduction that drops the matched tokens: their partners stand for them, unchanged."""
    stay = picked(matching.keep)
    after = stay(sizes).scatter_add(1, matching.target, picked(matching.source)(sizes))

    def reduce(field: Tensor, kind: str) -> Tensor:
        if kind == "size":
            return after if field is sizes else stay(field)
        return stay(field)

    return reduce


def _like(index: Tensor, field: Tensor) -> Tensor:
    """Indices (batch, k) as (batch, k, ...) for a scatter along the tokens of a field."""
    return index.view(*index.shape, *(1,) * (field.ndim - 2)).expand(*index.shape, *field.shape[2:])
