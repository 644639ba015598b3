"""Writing text token by token: greedy and beam search with a cache of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from effbench.models.captioner import Language


def generate(
    language: Language,
    prefix: Tensor,
    most: int,
    end: int,
    *,
    beams: int = 1,
    exactly: bool = False,
    mask: Tensor | None = None,
    cached: bool = True,
) -> tuple[Tensor, int]:
    """Continue embedded sequences.

    Args:
        prefix: (batch, tokens, width).
        most: tokens to write; a text that ends earlier is filled up with `end`.
        beams: 1 is greedy; else the best of so many beams by mean log-probability per token.
        exactly: write all of `most` tokens, whatever they are: equal work for every model (end is a token as any).
        mask: (batch, tokens), 0 for padding at the front; None where there is none.
        cached: False computes the whole sequence anew for every token; for comparison only, greedy.

    Returns:
        ids (batch, most), and the bytes of the cache when the last token was written.
    """
    if not cached:
        return _uncached(language, prefix, most, end, exactly), 0
    cache = _cache(language)
    positions = None if mask is None else (mask.cumsum(dim=1) - 1).clamp(min=0)
    language.part = "prefill"
    logits = language(prefix, prefix.shape[1] - 1, cache, mask, positions)[:, -1]
    language.part = "decode"
    write = _greedy if beams == 1 else _beams
    ids = write(language, logits, cache, mask, most, end, exactly, beams)
    language.part = "prefill"
    return ids, cache_bytes(cache)


def _cache(language: Language) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=language.body.config)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache."""
    held = [part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None]
    return sum(part.numel() * part.element_size() for part in held)


def _step(language: Language, ids: Tensor, cache: Any, mask: Tensor | None, written: int) -> Tensor:
    """Logits (batch, vocabulary) after one more token, ids (batch,)."""
    positions = None
    if mask is not None:
        positions = mask.sum(dim=1, keepdim=True) + written
        mask = torch.cat([mask, mask.new_ones(len(mask), written + 1)], dim=1)
    return language(language.embed(ids[:, None]), 0, cache, mask, positions)[:, -1]


def _greedy(
    language: Language, logits: Tensor, cache: Any, mask: Tensor | None, most: int, end: int, exactly: bool, _: int
) -> Tensor:
    out = torch.full((len(logits), most), end, device=logits.device)
    over = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for place in range(most):
        ids = logits.argmax(dim=-1)
        if not exactly:
            ids = ids.masked_fill(over, end)
            over |= ids == end
        out[:, place] = ids
        if place + 1 == most or (not exactly and over.all()):
            break
        logits = _step(language, ids, cache, mask, place)
    return out


def _beams(
    language: Language, logits: Tensor, cache: Any, mask: Tensor | None, most: int, end: int, exactly: bool, beams: int
) -> Tensor:
    """The `beams` best unfinished texts go on; the best finished one by mean log-probability is returned."""
    batch, words = logits.shape
    beams = min(beams, words)
    scores, ids = logits.log_softmax(dim=-1).topk(beams, dim=-1)  # (batch, beams)
    cache.batch_repeat_interleave(beams)
    mask = None if mask is None else mask.repeat_interleave(beams, dim=0)
    text = ids[:, :, None]  # (batch, beams, written)
    best = torch.full((batch,), float("-inf"), device=logits.device)
    out = torch.full((batch, most), end, device=logits.device)
    base = torch.arange(0, batch * beams, beams, device=logits.device)[:, None]
    for written in range(1, most + 1):
        mean = scores / written
        final = torch.ones_like(ids, dtype=torch.bool) if written == most else ids == end
        if not exactly or written == most:
            value, which = mean.masked_fill(~final, float("-inf")).max(dim=1)
            better = value > best
            found = text[torch.arange(batch), which]
            out[:, :written] = torch.where(better[:, None], found, out[:, :written])
            out[:, written:] = torch.where(better[:, None], end, out[:, written:])
            best = torch.where(better, value, best)
        if not exactly:
            scores = scores.masked_fill(ids == end, float("-inf"))
            # a text can still rise above the best one only if the likeliest that goes on could, adding no more loss
            if written < most and bool((scores.max(dim=1).values / most <= best).all()):
                break
        if written == most:
            break
        step = _step(language, ids.flatten(), cache, mask, written - 1).log_softmax(dim=-1)
        total = (scores[:, :, None] + step.view(batch, beams, words)).flatten(1)
        scores, flat = total.topk(beams, dim=-1)
        origin, ids = flat // words, flat % words
        cache.reorder_cache((base + origin).flatten())
        text = torch.cat([text.gather(1, origin[:, :, None].expand(-1, -1, written)), ids[:, :, None]], dim=2)
    return out


def _uncached(language: Language, prefix: Tensor, most: int, end: int, exactly: bool) -> Tensor:
    out = torch.full((len(prefix), most), end, device=prefix.device)
    over = torch.zeros(len(prefix), dtype=torch.bool, device=prefix.device)
    for place in range(most):
        ids = language(prefix, prefix.shape[1] - 1)[:, -1].argmax(dim=-1)
        ids = ids if exactly else ids.masked_fill(over, end)
        over |= ids == end
        out[:, place] = ids
        if not exactly and over.all():
            break
        prefix = torch.cat([prefix, language.embed(ids[:, None])], dim=1)
    return out
