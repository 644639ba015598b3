"""How much each layer of a decoder matters for images, measured on training data (criteria of arXiv 2412.12785)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from effbench.errors import UsageError
from effbench_methods.algorithms.layer_importance import hidden_states, turned, unpacked

if TYPE_CHECKING:
    from effbench.calibration_set import CalibrationSet
    from effbench.models.captioner import Span
    from effbench.models.decoder import Decoder


def image_attention(decoder: Decoder, model: nn.Module, calibration: CalibrationSet, images: int) -> Tensor:
    """(layers,) share of its attention that a text token pays to image tokens, in [0, 1].

    A mean over heads and over the tokens behind the image, up to each text's end; those before it cannot see it.

    Raises:
        UsageError: the decoder cannot give the rows of its attention, or no image stands in its sequences.
    """
    sums, count = torch.zeros(len(decoder), dtype=torch.float64), 0

    def see(layer: int, attention: Tensor) -> None:
        nonlocal count
        span = decoder.language.span
        image, text = kinds(span, attention.shape[2])
        asking = text & (torch.arange(attention.shape[2], device=text.device) >= span.image[1])
        paid = attention[..., image].float().sum(dim=-1).mean(dim=1)
        sums[layer] += paid[asking].sum(dtype=torch.float64).item()
        if layer == 0:
            count += int(asking.sum())

    with unpacked(model), decoder.showing_attention(see):
        calibration.run(model, images)
    return sums / count


def multimodal_influence(decoder: Decoder, model: nn.Module, calibration: CalibrationSet, images: int) -> Tensor:
    """(layers,) block influence of image tokens and of text tokens apart: the mean of the two.

    Each is 1 - mean over its tokens of cos(h_l, h_l+1), so that the many image tokens do not hide the few of a text.
    Padding counts nowhere.

    Raises:
        UsageError: no image stands in the sequences.
    """
    sums, counts = torch.zeros(2, len(decoder), dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    last: list[Tensor] = []

    def see(depth: int, tokens: Tensor, ends: Tensor | None) -> None:
        image, text = kinds(decoder.language.span, tokens.shape[1])
        states = [tokens[:, image].flatten(0, 1), tokens[text]]
        for kind, now in enumerate(states):
            if depth:
                sums[kind, depth - 1] += turned(last[kind], now).sum(dtype=torch.float64).item()
            else:
                counts[kind] += len(now)
        last[:] = states

    hidden_states(decoder, model, calibration, images, see)
    return (sums / counts).mean(dim=0)


def kinds(span: Span, tokens: int) -> tuple[Tensor, Tensor]:
    """Which tokens of a batch are what: (tokens,) those of the image, (batch, tokens) those of the text, no padding.

    Raises:
        UsageError: there is no image.
    """
    first, behind = span.image
    if first == behind:
        raise UsageError(
            "layer_tune: no image stands in the sequences that the layers would be chosen by",
            "choose them by place, or by=block_influence",
        )
    place = torch.arange(tokens, device=span.ends.device)
    image = (place >= first) & (place < behind)
    return image, ~image & (place <= span.ends[:, None])
