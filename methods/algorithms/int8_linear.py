"""Linear layers that multiply int8 weights by int8 activations on a CPU: float in, float out, oneDNN's kernel.

Weights have one scale per output channel, symmetric (per-channel weights, per-tensor activations: arXiv 1806.08342).
torch.ao's packed linear on oneDNN keeps the weights twice, as given and as the kernel wants them (2.02 bytes of
resident memory per weight, measured on torch 2.15); this one keeps the kernel's alone (1.01) and gives the others back
on demand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effbench.errors import UsageError

HIGHEST = 127  # of a weight


def bits() -> int:
    """Bits of an activation that this CPU's kernel adds up without overflow: 8 with VNNI instructions, else 7."""
    return 8 if torch.cpu._is_vnni_supported() else 7


def activation_range(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and zero point of unsigned integers of so many bits that span low to high, and zero exactly."""
    levels = 2**bits - 1
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / levels, torch.finfo(torch.float32).eps)
    return scale, min(round(-low / scale), levels)


def per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (out, in) -> int8 of the same shape, and the scales (out,)."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1) / HIGHEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round().clamp(-HIGHEST, HIGHEST).to(torch.int8), scale


def as_bytes(quantised: Tensor) -> Tensor:
    """The integers of a contiguous quint8 tensor as uint8, without the copy that `int_repr` makes (6 % of a ViT-B)."""
    return torch.empty(0, dtype=torch.uint8).set_(quantised.untyped_storage(), 0, quantised.shape, quantised.stride())


class Int8Linear(nn.Linear):
    """An nn.Linear in int8.

    Args:
        linear: in float32; left as it is.
        fixed: scale and zero point of the activations; None to find them for each input, from its least and greatest
            value.
        gelu: apply GELU (exact) to the result, in the same kernel.
    """

    int8_original_dtype = torch.float32  # what OpenCLIP asks a quantised layer for, to know the activations' dtype

    def __init__(self, linear: nn.Linear, fixed: tuple[float, int] | None = None, gelu: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.fixed, self.gelu, self.bits = fixed, gelu, bits()
        weight, scale = per_channel(linear.weight)
        self.register_buffer("scale", scale)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.pack(weight)

    def pack(self, weight: Tensor) -> None:
        """Take an int8 weight (out, in)."""
        self.packed = torch.ops.onednn.qlinear_prepack(weight, None)

    def weight_int8(self) -> Tensor:
        """The weight (out, in), a copy."""
        return self.packed.to_dense().t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), float32."""
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        scale, zero = self.fixed or activation_range(*(end.item() for end in x.aminmax()), self.bits)
        whole = as_bytes(torch.quantize_per_tensor(x.contiguous(), scale, zero, torch.quint8))
        if self.bits < 8:
            whole.clamp_(max=2**self.bits - 1)
        after, kind = ("gelu", "none") if self.gelu else ("none", "")
        return torch.ops.onednn.qlinear_pointwise(
            whole,
            scale,
            zero,
            self.packed,
            self.scale,
            None,
            self.bias,
            1.0,
            0,
            torch.float32,
            after,
            [],
            kind,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.scale.device.type != "cpu" or self.scale.dtype != torch.float32:
            raise UsageError(
                "torch's int8 kernels run on a CPU, on float32, and this model was moved or cast after quantisation",
                "quantize:library=torchao, or kind=weight_only",
            )
        return self

    # The packed weight is oneDNN's own and cannot be copied or saved: the int8 weight goes in its place.

    def get_extra_state(self) -> dict[str, Any]:
        return dict(weight=self.weight_int8(), fixed=self.fixed)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.pack(state["weight"])
        self.fixed = state["fixed"]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | dict(packed=self.weight_int8())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack(self.packed)

    def extra_repr(self) -> str:
        how = "dynamic" if self.fixed is None else "static"
        return f"{super().extra_repr()}, {how}, {self.bits}-bit activations" + (", gelu" if self.gelu else "")
