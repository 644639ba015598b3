"""How a sparse pattern is computed: by gathering keys, by a mask, by FlexAttention; and which is fastest where."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effbench.errors import EffbenchError
from effbench.measure.clock import Clock
from effbench.models.attention import Projections
from effbench_methods.algorithms.attention_patterns import Layout

PAIRS = 5  # timed repetitions of each path


def gathered(p: Projections, layout: Layout, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Each block of queries with the keys that it sees, copied together: dense attention on less.

    On a CPU without gradients the images go one by one, so that what is copied stays in the cache: ViT-B's windows of
    7 x 7 are then 1.7 times as fast as dense attention or more, with the whole batch at once only 1.1 times.

    Args:
        bias: added to the scores, (batch, 1, 1, tokens), or None.

    Returns:
        (batch, heads, tokens, head width).
    """
    batch, heads, tokens, width = p.q.shape
    q, k, v = (x.transpose(1, 2).flatten(2) for x in p[:3])  # (batch, tokens, heads x head width)
    first, attend = layout.prefix, partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=p.scale)

    def in_blocks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, images: int) -> Tensor:
        """(blocks x block size of all images, heads x head width) from rows (tokens of all images, the same)."""
        queries, keys = (_of_all(index, images, tokens) for index in (layout.queries, layout.keys))
        parts = (x.index_select(0, index) for x, index in ((q, queries), (k, keys), (v, keys)))
        parts = [x.view(images * layout.blocks, -1, heads, width).transpose(1, 2) for x in parts]
        mask = layout.mask
        if mask is not None and images > 1:
            mask = mask.repeat(images, 1, 1, 1)
        if bias is not None:
            bias = bias.reshape(-1).index_select(0, keys).view(images * layout.blocks, 1, 1, -1)
            mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
        return attend(*parts, attn_mask=mask).transpose(1, 2).reshape(-1, heads * width)

    def of_prefix(image: slice) -> Tensor:
        one = attend(p.q[image, :, :first], p.k[image], p.v[image], attn_mask=None if bias is None else bias[image])
        return one.transpose(1, 2).flatten(2)

    if q.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        y = in_blocks(*(x.flatten(0, 1) for x in (q, k, v)), bias, batch)
        y = y.index_select(0, _of_all(layout.order, batch, layout.queries.numel())).unflatten(0, (batch, -1))
        out = torch.cat([of_prefix(slice(None)), y], dim=1) if first else y
    else:
        out = v.new_empty(batch, tokens, heads * width)
        for i, (q_, k_, v_, out_) in enumerate(zip(q.unbind(), k.unbind(), v.unbind(), out.unbind(), strict=True)):
            y = in_blocks(q_, k_, v_, None if bias is None else bias[i], 1)
            torch.index_select(y, 0, layout.order, out=out_[first:])
            if first:
                out_[:first] = of_prefix(slice(i, i + 1))[0]
    return out.view(batch, tokens, heads, width).transpose(1, 2)


def _of_all(index: Tensor, images: int, rows: int) -> Tensor:
    """Indices into the rows of one image as indices into those of all images."""
    if images == 1:
        return index
    return (index + torch.arange(0, images * rows, rows, device=index.device)[:, None]).flatten()


def masked(
    p: Projections, seen: Tensor, mask: Tensor | None = None, is_causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Dense attention with a mask: exact, and no faster for it.

    Args:
        seen: bool, broadcastable to (batch, heads, tokens, tokens).
        mask, is_causal: the tower's own, as `AttentionCore` is given them.
    """
    allowed = allow(seen, mask, is_causal)
    return F.scaled_dot_product_attention(p.q, p.k, p.v, attn_mask=allowed, dropout_p=dropout, scale=p.scale)


def allow(seen: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """A pattern and a tower's own mask as one, boolean or additive."""
    if is_causal:
        seen = seen.tril()
    if mask is None:
        return seen
    return seen & mask if mask.dtype == torch.bool else torch.where(seen, mask, float("-inf"))


def best_keys(
    p: Projections, k: int, prefix: int, mask: Tensor | None = None, is_causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Every patch attends to its k best patches and the prefix, the prefix to all (KVT, arXiv 2106.00515).

    All scores are computed to know the best, so nothing is saved.
    """
    tokens = p.q.shape[2]
    scores = p.scale * p.q @ p.k.transpose(-2, -1)
    if mask is not None or is_causal:
        everything = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device)
        allowed = allow(everything, mask, is_causal)
        scores = scores.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else scores + allowed
    best = scores[:, :, prefix:, prefix:].topk(k, dim=-1, sorted=False).indices + prefix
    rest = torch.ones_like(scores, dtype=torch.bool)
    rest[:, :, :prefix], rest[..., :prefix] = False, False
    rest[:, :, prefix:] = rest[:, :, prefix:].scatter(-1, best, False)
    weights = scores.masked_fill(rest, float("-inf")).softmax(dim=-1).to(p.v.dtype)
    return F.dropout(weights, dropout) @ p.v


def block_mask(seen: Tensor) -> Any:
    """FlexAttention's own form of a pattern, bool (tokens, tokens); made once."""
    from torch.nn.attention.flex_attention import create_block_mask

    def pair(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen[query, key]

    size = 128 if seen.is_cuda else 32  # the GPU kernel's; on a CPU smaller ones hide more
    with torch.inference_mode(False):
        return create_block_mask(pair, None, None, *seen.shape, device=seen.device, BLOCK_SIZE=size)


def flex(p: Projections, pattern: Any) -> Tensor:
    """FlexAttention with a block mask, compiled or not at all.

    Raises:
        EffbenchError: it did not compile, e.g. no compiler is there or dynamo's recompile limit is passed.
    """
    if torch.compiler.is_compiling():
        return _flex(*p, pattern)
    if (
        torch._dynamo.eval_frame._stance.stance == "force_eager"
    ):  # FLOPs are being counted, which nothing compiled shows
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(*p[:3], block_mask=pattern, scale=p.scale)
    try:
        return _compiled_flex()(*p, pattern)
    except EffbenchError:
        raise
    except Exception as error:  # noqa: BLE001 - a compiler fails in any way
        reason = str(error).strip().splitlines() or [""]
        raise EffbenchError(
            f"sparse_attention: FlexAttention did not compile: {type(error).__name__}: {reason[0]}", "use path=reshape"
        ) from error


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """One for all towers; fullgraph makes passing the recompile limit an error instead of a path 30 times slower."""
    return torch.compile(_flex, fullgraph=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float, pattern: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if not torch.compiler.is_compiling():  # a constant where dynamo traces this; false only where it gave up
        raise EffbenchError("sparse_attention: torch.compile is switched off, so FlexAttention is not compiled")
    return flex_attention(q, k, v, block_mask=pattern, scale=scale)


@dataclass(frozen=True)
class Choice:
    """The path that is taken, and why.

    Args:
        path: its name.
        batch: images that were timed.
        ratios: of each path that was timed, dense attention's time / its own; empty where nothing was.
        seconds: what timing took, compilation left out.
        compile_seconds: what compiling took.
        failed: a path that could not be timed, and the reason.
    """

    path: str
    batch: int = 0
    ratios: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    compile_seconds: float = 0.0
    failed: str = ""


def fastest(
    paths: dict[str, Callable[[Projections], Tensor]], shape: tuple[int, ...], like: Tensor, scale: float
) -> Choice:
    """Time paths against dense attention on random tokens, interleaved, and choose the fastest.

    On a CPU it is the time of one thread that counts, and not the clock on the wall: the choice decides what the method
    computes, so it must not depend on what else the machine does.

    Args:
        paths: by name.
        shape: (batch, heads, tokens, head width).
        like: gives dtype and device.
    """
    on_cpu = like.device.type == "cpu"
    clock = Clock("cpu", time.thread_time) if on_cpu else Clock(str(like.device))
    begun, compiling, failed = time.perf_counter(), 0.0, ""
    batch, heads, tokens, width = shape
    random = torch.Generator(like.device).manual_seed(0)
    run = {"dense": lambda p: F.scaled_dot_product_attention(p.q, p.k, p.v, scale=p.scale)} | paths
    with torch.inference_mode(), _threads(1 if on_cpu else torch.get_num_threads()):
        x = torch.randn(batch, tokens, 3, heads, width, generator=random, device=like.device, dtype=like.dtype)
        p = Projections(*x.permute(2, 0, 3, 1, 4).unbind(0), scale)
        for name, path in list(run.items()):  # warm-up
            try:
                seconds = clock.timed(partial(path, p))[1]
            except EffbenchError as error:
                failed = str(error)
                del run[name]
            else:
                compiling += seconds if name == "flex" else 0.0
        times: dict[str, list[float]] = {name: [] for name in run}
        for turn in range(PAIRS):
            for name in list(run)[:: 1 if turn % 2 else -1]:
                times[name].append(clock.timed(partial(run[name], p))[1])
    dense = times.pop("dense")
    ratios = {n: statistics.median(d / s for d, s in zip(dense, own, strict=True)) for n, own in times.items()}
    seconds = time.perf_counter() - begun - compiling
    return Choice(max(ratios, key=ratios.__getitem__), batch, ratios, seconds, compiling, failed)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
