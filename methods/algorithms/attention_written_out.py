"""Dense attention as two matrix products in half precision, where that beats torch's fused kernel.

On a CPU with bf16 instructions the products run on them, and torch's fused attention does not (torch 2.15): at 197
tokens ViT-B's take 0.8 of the time of fused float32, which in turn is faster than fused bf16.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from effbench.models.attention import AttentionCore, Projections
from effbench_methods.algorithms.attention_paths import Choice, fastest

if TYPE_CHECKING:
    from effbench.models.tower import ModelView, Tower

BATCH = 4  # images that attention is timed with
GAIN = 1.05  # what attention written out must win over torch's own to take its place


def written_out(p: Projections, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T + mask) v, (batch, heads, tokens, head width); products and scores in `dtype`."""
    scores = (p.q * p.scale).to(dtype) @ p.k.to(dtype).transpose(-2, -1)
    if mask is not None:
        scores += mask
    return (scores.softmax(dim=-1) @ p.v.to(dtype)).to(p.v.dtype)


class WrittenOut(AttentionCore):
    """On a CPU, and where no boolean or causal mask stands; else torch's fused attention."""

    def __init__(self, name: str, choice: Choice, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.choice, self.dtype = name, choice, dtype

    def forward(
        self, p: Projections, mask: Tensor | None, is_causal: bool, prefix: int, grid: tuple[int, int] | None
    ) -> Tensor:
        if is_causal or p.q.device.type != "cpu" or mask is not None and mask.dtype == torch.bool:
            return F.scaled_dot_product_attention(p.q, p.k, p.v, attn_mask=mask, is_causal=is_causal, scale=p.scale)
        return written_out(p, self.dtype, mask)

    def note(self, blocks: int) -> str:
        gain = self.choice.ratios[self.choice.path]
        half = "bf16 " if self.dtype == torch.bfloat16 else ""
        return (
            f"attention is written out as two {half}products in {blocks} blocks, {gain:.2f}x as fast as torch's fused "
            f"attention at batch {BATCH}"
        )


def write_out(tower: Tower, name: str, given: torch.dtype, dtype: torch.dtype) -> None:
    """Put it into the blocks of an image tower on a CPU that have plain attention, where it is the faster by a timing.

    Args:
        name: of the method, for messages.
        given: dtype of queries, keys and values; dtype: of the products.
    """
    if next(tower.module.parameters()).device.type != "cpu" or not tower.patch_tokens:
        return
    for number, block in enumerate(tower.blocks):
        shape = (BATCH, block.attn.num_heads, tower.prefix + tower.patch_tokens)
        width = block.attn.qkv.out_features // (3 * block.attn.num_heads)
        choice = _timed((*shape, width), block.attn.scale, given, dtype)
        if block.attn.core is None and choice.ratios[choice.path] > GAIN:
            tower.attend(number, WrittenOut(name, choice, dtype))


@cache
def _timed(shape: tuple[int, int, int, int], scale: float, given: torch.dtype, dtype: torch.dtype) -> Choice:
    """Timed once a process, so that all arms of an experiment take the same path."""
    return fastest({"written out": partial(written_out, dtype=dtype)}, shape, scale, given, torch.device("cpu"))


def notes(model: ModelView) -> list[str]:
    """Where attention is written out, for a reader."""
    blocks = model.image.blocks if model.image else ()
    cores = [block.attn.core for block in blocks if isinstance(block.attn.core, WrittenOut)]
    return [cores[0].note(len(cores))] if cores else []


def bf16_on_cpu() -> bool:
    """Whether this CPU has instructions for bf16 products."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
