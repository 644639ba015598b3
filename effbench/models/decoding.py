"""Writing text token by token: greedy and beam search with a cache of keys and values."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from effbench.models.captioner import Language


class Read(NamedTuple):
    """A prompt that was read: logits (batch, vocabulary) behind its last token, and its keys and values."""

    logits: Tensor
    cache: Any


def read(
    language: Language, prefix: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, image: bool = True
) -> Read:
    """Read an embedded prompt (batch, tokens, width); arguments as of `Language.forward`."""
    cache = new_cache(language)
    language.part, language.rest = "prefill", "head"
    return Read(language(prefix, prefix.shape[1] - 1, cache, mask, positions, image=image)[:, -1], cache)


def shared(cache: Any) -> Any:
    """A cache with the same keys and values, to go on with apart: what is added to one is not in the other."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


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
    prompt: Read | None = None,
) -> tuple[Tensor, int]:
    """Continue embedded sequences.

    Args:
        prefix: (batch, tokens, width).
        most: tokens to write; a text that ends earlier is filled up with `end`.
        beams: 1 is greedy; else the best of so many beams by mean log-probability per token.
        exactly: write all of `most` tokens, whatever they are: equal work for every model (end is a token as any).
        mask: (batch, tokens), 0 for padding at the front; None where there is none.
        prompt: the prefix, where it was read already without a mask; it is used up.
        cached: False computes the whole sequence anew for every token; for comparison only, greedy and without mask.

    Returns:
        ids (batch, most), and the bytes of the cache when the last token was written.
    """
    if not cached:
        return _uncached(language, prefix, most, end, exactly), 0
    positions = None if mask is None else (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits, cache = prompt or read(language, prefix, mask, positions)
    language.part = language.rest = "decode"  # from the second token on, choosing them included
    write = _greedy if beams == 1 else _beams
    ids = write(language, logits, cache, mask, most, end, exactly, beams)
    language.part, language.rest = "prefill", "head"
    return ids, cache_bytes(cache)


def new_cache(language: Language) -> Any:
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
    """The best ended text by mean log-probability; of the `beams` best so far, those that have not ended go on.

    Fewer are kept while there are not so many.
    """
    batch, words = logits.shape
    scores, ids = logits.log_softmax(dim=-1).topk(min(beams, words), dim=-1)  # (batch, kept)
    cache.batch_repeat_interleave(ids.shape[1])
    text = ids[:, :, None]  # (batch, kept, written)
    best = torch.full((batch,), float("-inf"), device=logits.device)
    out = torch.full((batch, most), end, device=logits.device)
    rows = torch.arange(batch, device=logits.device)
    for written in range(1, most + 1):
        mean = scores / written
        final = torch.ones_like(ids, dtype=torch.bool) if written == most else ids == end
        if not exactly or written == most:
            value, which = mean.masked_fill(~final, float("-inf")).max(dim=1)
            better = value > best
            found = text[rows, which]
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
        kept = ids.shape[1]
        padding = None if mask is None else mask.repeat_interleave(kept, dim=0)
        step = _step(language, ids.flatten(), cache, padding, written - 1).log_softmax(dim=-1)
        total = (scores[:, :, None] + step.view(batch, kept, words)).flatten(1)
        scores, flat = total.topk(min(beams, kept * words), dim=-1)
        origin, ids = flat // words, flat % words
        cache.reorder_cache((rows[:, None] * kept + origin).flatten())
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
