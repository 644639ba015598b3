"""Linear layers with weights of 8 or 4 bits whose products are floating-point, and in float8.

int4: groups of weights of one output channel share a scale and a zero point. float8 (e4m3): arXiv 2209.05433, one scale
per output channel and one per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbench.errors import UsageError
from effbench_methods.algorithms.int8_linear import per_channel

GROUP = 32  # int4 weights that share a scale
FP8 = torch.float8_e4m3fn


class LowBitWeights(nn.Linear):
    """An nn.Linear whose weight is held in fewer bits. `weight` and `scale` are what the kernel takes."""

    multiple: tuple[int, int] = (1, 1)  # of which in_features and out_features must be

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.int8_original_dtype = linear.weight.dtype  # OpenCLIP's word for the dtype of the activations
        weight, scale = self.narrowed(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @staticmethod
    def narrowed(weight: Tensor) -> tuple[Tensor, Tensor]:
        """A float weight (out, in) -> what the kernel takes: weight and scales."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out), without the bias."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        y = self.product(x.reshape(-1, self.in_features)).to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class Int8WeightsLinear(LowBitWeights):
    """int8 weights, widened for each product.

    aten::_weight_int8pack_mm would read them as they are, but on a CPU it takes 30 times as long in float32, and twice
    as long in bfloat16 on the 1,576 tokens of 8 images (torch 2.15).
    """

    @staticmethod
    def narrowed(weight: Tensor) -> tuple[Tensor, Tensor]:
        whole, scale = per_channel(weight)
        return whole, scale.to(weight.dtype)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


class Int4WeightsLinear(LowBitWeights):
    """int4 weights in groups of 32, multiplied by bfloat16 activations.

    On a CPU the kernel takes 30 times as long for float32 activations (torch 2.15).
    """

    multiple = (GROUP, 16)

    @staticmethod
    def narrowed(weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = weight.float().unflatten(1, (-1, GROUP))
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        scale = ((high - low) / 15).clamp_min(1e-6)
        middle = low + 8 * scale  # the kernel takes (weight - 8) x scale + middle
        whole = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).flatten(1)
        if weight.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
        else:
            halves = (whole[:, ::2] << 4 | whole[:, 1::2]).to(torch.uint8)
            packed = torch.ops.aten._convert_weight_to_int4pack(halves, 2)
        return packed, torch.stack([scale, middle], dim=2).transpose(0, 1).contiguous().bfloat16()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        packed_for = self.weight.device.type
        super()._apply(fn, recurse)
        if self.weight.device.type != packed_for:
            raise UsageError(
                f"int4 weights packed for {packed_for} cannot be moved to {self.weight.device.type}",
                "move the model first, or quantize:weight_only",
            )
        return self

    def product(self, x: Tensor) -> Tensor:
        aten = torch.ops.aten
        kernel = aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else aten._weight_int4pack_mm
        return kernel(x.bfloat16(), self.weight, GROUP, self.scale)


class Fp8Linear(LowBitWeights):
    """float8 weights by float8 activations, a scale per output channel and per token."""

    multiple = (16, 16)

    @staticmethod
    def narrowed(weight: Tensor) -> tuple[Tensor, Tensor]:
        return rows_in_fp8(weight)

    def product(self, x: Tensor) -> Tensor:
        rows, scale = rows_in_fp8(x)
        return torch._scaled_mm(rows, self.weight.t(), scale, self.scale.t(), out_dtype=torch.bfloat16)


def rows_in_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, width) -> the same in float8, and its scales (rows, 1)."""
    x = x.float()
    scale = (x.abs().amax(dim=1, keepdim=True) / torch.finfo(FP8).max).clamp_min(1e-12)
    return (x / scale).to(FP8), scale
