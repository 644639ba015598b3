"""LISA, arXiv 2403.17919: of a decoder's layers a few are trained at a time, drawn anew now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from effbench.models.decoder import layers_of

if TYPE_CHECKING:
    from effbench.models.decoder import Decoder


def drawn(layers: int, k: int, seed: int, number: int) -> tuple[int, ...]:
    """k of the layers, all equally likely, ascending; it depends on the arguments alone.

    Args:
        number: which draw of the training it is, from 0.
    """
    return tuple(sorted(np.random.default_rng([seed, number]).choice(layers, k, replace=False).tolist()))


def in_turns(decoder: Decoder, k: int, draws: int) -> Callable[[float], None]:
    """Let a forward pass with gradients train k of the layers, at first those of draw 0.

    The others require no gradient while it lasts, so that none is computed for them and the optimiser skips them; it
    may keep the moments of them all. Around it every layer requires what it did: what looks at the model between two
    steps (optimiser, checkpoint) sees that all of them are trained.

    Args:
        draws: in the whole training, at equal distances.

    Returns:
        to be called before each step with the share of the steps that is done, in [0, 1). It alone decides which layers
        are drawn, with the seed that torch has now: a training that is resumed, or runs beside others, draws the same.
    """
    layers, seed = len(decoder), torch.initial_seed() % 2**32
    chosen: list[int] = []
    resting: list[nn.Parameter] = []

    def draw(done: float) -> None:
        chosen[:] = drawn(layers, k, seed, int(done * draws + 1e-9))  # a third of the way, times 3, is draw 1

    def freeze(body: nn.Module, *_: object) -> None:
        if torch.is_grad_enabled():
            others = [layer for index, layer in enumerate(layers_of(body)) if index not in chosen]
            resting.extend(p for layer in others for p in layer.parameters() if p.requires_grad)
            for p in resting:
                p.requires_grad_(False)

    def thaw(*_: object) -> None:
        while resting:
            resting.pop().requires_grad_(True)

    draw(0.0)
    decoder.module.register_forward_pre_hook(freeze)
    decoder.module.register_forward_hook(thaw, always_call=True)
    return draw
