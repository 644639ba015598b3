"""Learning which tokens to keep with none leaving: Gumbel masks and a loss on their rate.

Source: DynamicViT, arXiv 2106.02034. Pure functions of tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# What a dropped token still weighs as a key. At 0 the gradient of the logarithm in attention would not be finite; so
# the kept tokens change by about 1e-6 of what the dropped ones hold, and the gradient is that of the masked softmax.
RESIDUE = 1e-6


def keep_mask(logits: Tensor) -> Tensor:
    """Hard Gumbel-softmax decisions: (batch, n, 2) logits of keep and drop -> (batch, n), 1 keep, 0 drop.

    Straight-through: the gradient is that of the soft sample.
    """
    return F.gumbel_softmax(logits.float(), hard=True, dim=-1)[..., 0]


def masked_sizes(sizes: Tensor, keep: Tensor) -> Tensor:
    """Sizes (batch, n) of which only the kept tokens' are left, for `TokenState.sizes`."""
    return sizes * (RESIDUE + (1 - RESIDUE) * keep)


def ratio_loss(shares: list[Tensor], rate: float) -> Tensor:
    """Mean over images and stages of (share of the tokens kept so far - rate^stage)^2, stages counted from 1.

    Args:
        shares: per stage (batch,), kept tokens / tokens that were left before the stage.
    """
    so_far = torch.stack(shares).cumprod(dim=0)
    target = torch.tensor([rate**stage for stage in range(1, len(shares) + 1)], device=so_far.device)
    return (so_far - target[:, None]).square().mean()
