"""Sparse attention by a mask, by its scores, by FlexAttention; and which path is the fastest where."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effbench.errors import EffbenchError
from effbench.measure.clock import Clock
from effbench.measure.threads import threads
from effbench.models.attention import Projections

PAIRS = 5  # timed repetitions of each path


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
    stance = torch._dynamo.eval_frame._stance.stance
    if stance == "force_eager":  # FLOPs are being counted, which nothing compiled shows
        from torch.nn.attention.flex_attention import flex_attention

        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it is not compiled
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
    paths: dict[str, Callable[[Projections], Tensor]],
    shape: tuple[int, int, int, int],
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Choice:
    """Time paths against dense attention on random tokens, interleaved, and choose the fastest.

    On a CPU it is the time of one thread that counts, and not the clock on the wall: the choice decides what the method
    computes, so it must not depend on what else the machine does.

    Args:
        paths: by name.
        shape: (batch, heads, tokens, head width).
    """
    on_cpu = device.type == "cpu"
    clock = Clock("cpu", time.thread_time) if on_cpu else Clock(str(device))
    begun, compiling, failed = time.perf_counter(), 0.0, ""
    batch, heads, tokens, width = shape
    random = torch.Generator(device).manual_seed(0)
    run = {"dense": lambda p: F.scaled_dot_product_attention(p.q, p.k, p.v, scale=p.scale)} | paths
    with torch.inference_mode(), threads(1 if on_cpu else torch.get_num_threads()):
        x = torch.randn(batch, tokens, 3, heads, width, generator=random, device=device, dtype=dtype)
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
