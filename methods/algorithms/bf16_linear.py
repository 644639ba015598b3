"""Linear layers in bfloat16 whose weights lie as oneDNN's CPU kernel reads them, with GELU in the same kernel.

F.linear hands oneDNN a plain weight, which it brings into its own blocked layout in every call; here that is done once.
The values are the same: laid out plainly again, the weight is the one that was given, bit for bit. Layout and fused
operation are what TorchInductor's freezing does (torch/_inductor/fx_passes/mkldnn_fusion.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbench_methods.algorithms.fused_gelu import GeluDoneBefore, gelus_of

if TYPE_CHECKING:
    from effbench.models.tower import Tower


def pack_tower(tower: Tower) -> None:
    """Pack the linear layers of a tower's blocks, in place; their weights are bfloat16 on a CPU."""
    fused = gelus_of(tower)
    for block in tower.blocks:
        for linear in block.modules():
            if type(linear) is nn.Linear:
                pack(linear, gelu=linear in fused)
    for mlp, act in fused.values():
        getattr(mlp, act).__class__ = GeluDoneBefore


def pack_layers(part: nn.Module, model: nn.Module) -> None:
    """Pack the linear layers of any part of a model, in place; a weight that it uses elsewhere too stays plain."""
    held = [id(p) for m in model.modules() for p in m._parameters.values()]
    for linear in part.modules():
        if type(linear) is nn.Linear and held.count(id(linear.weight)) == 1:
            pack(linear)


def unpack_layers(part: nn.Module) -> None:
    """The part as it was before `pack_layers`; what was not packed stays as it is."""
    for layer in part.modules():
        if isinstance(layer, PackedLinear):
            unpack(layer)


def unpack_tower(tower: Tower) -> None:
    """The tower as it was before `pack_tower`; what was not packed stays as it is."""
    for block in tower.blocks:
        for module in block.modules():
            if isinstance(module, PackedLinear):
                unpack(module)
            elif isinstance(module, GeluDoneBefore):
                module.__class__ = nn.GELU


class PackedLinear(nn.Linear):
    """An nn.Linear whose weight lies in oneDNN's layout. `pack` makes one of an nn.Linear, `unpack` undoes it.

    It computes on bfloat16 activations without gradients. Whatever else enters, and what is compiled or was moved or
    cast, is computed by F.linear with the plain weight, as the nn.Linear would: right, but slower. The weight itself
    takes no gradients.

    Attributes:
        packed: the weight in oneDNN's layout, a tensor without a storage; None where the layer holds a plain one.
        gelu: apply GELU (exact) to the result.
        weight: (out, in), what the layer was made of; laid out anew each time that it is asked for.
    """

    packed: Tensor | None
    gelu: bool

    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"] if self.packed is None else self.packed.to_dense()

    @property
    def int8_original_dtype(self) -> torch.dtype:
        """OpenCLIP's word for the activations' dtype of a layer without a plain weight; asked in every forward."""
        return self._parameters["weight"].dtype if self.packed is None else self.packed.dtype

    def hold(self, weight: Tensor) -> None:
        """Take a weight (out, in), in oneDNN's layout where its kernel takes it."""
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and kernel_exists():
            self._parameters.pop("weight", None)
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        else:
            self.packed = None
            self._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        plainly = self.packed is None or x.dtype != torch.bfloat16 or torch.is_grad_enabled() and x.requires_grad
        if plainly or torch.compiler.is_compiling():  # Inductor takes no weight in this layout that it did not make
            y = F.linear(x, self.weight, self.bias)
            return F.gelu(y) if self.gelu else y
        after, kind = ("gelu", "none") if self.gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, after, [], kind)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.packed is not None:
            probe = fn(torch.empty(0, dtype=torch.bfloat16))
            if probe.device.type != "cpu" or probe.dtype != torch.bfloat16:  # moved or cast
                self.hold(fn(self.weight))
        return self

    # A tensor without a storage can be neither copied nor saved: the plain weight goes in its place.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.packed is not None:
            destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        if self.packed is not None:
            weight = state_dict.pop(key, None)
            if weight is None:
                missing_keys.append(key)
            elif weight.shape != self.packed.shape:
                error_msgs.append(
                    f"size mismatch for {key}: {tuple(weight.shape)} was saved, and the model's is "
                    f"{tuple(self.packed.shape)}"
                )
            else:
                self.hold(weight.to("cpu", torch.bfloat16))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | dict(packed=None if self.packed is None else self.weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.packed is not None:
            self.hold(self.packed)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'plain' if self.packed is None else 'packed'}" + ", gelu" * self.gelu


def pack(linear: nn.Linear, gelu: bool = False) -> None:
    """Make a PackedLinear of an nn.Linear, in place; its weight no longer takes gradients."""
    weight = linear.weight
    linear.__class__ = PackedLinear
    linear.gelu = gelu
    linear.hold(weight)


def unpack(layer: PackedLinear) -> None:
    """The nn.Linear that a PackedLinear was; a GELU in it is the caller's again."""
    weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
    layer._parameters = dict(weight=weight, bias=layer.bias)
    layer.__class__ = nn.Linear
    del layer.packed, layer.gelu


def kernel_exists() -> bool:
    """Whether torch was built with oneDNN, and it takes bfloat16 on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
