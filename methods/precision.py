"""Half precision: the towers' weights and activations in bfloat16 or float16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effbench.calibration_set import CalibrationSet
from effbench.errors import UsageError
from effbench.method import Method, param
from effbench.models.tower import ModelView
from effbench_methods.algorithms.attention_written_out import bf16_on_cpu, write_out
from effbench_methods.algorithms.attention_written_out import notes as notes_of_attention
from effbench_methods.algorithms.bf16_linear import PackedLinear, pack_tower
from effbench_methods.algorithms.int8_linear import Int8Linear
from effbench_methods.algorithms.tower_parts import sides, towers, towers_asked_for

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16)


@dataclass(frozen=True)
class Precision(Method):
    """Compute the towers in bfloat16 or float16, as `model.bfloat16()` does; heads and losses stay in float32.

    Images are cast where they become patches. A model of your own (`effbench.apply`) gives its outputs in that dtype.
    On a CPU torch's fused bf16 attention can be slower than the same two products written out: both are timed when the
    method is applied, on random tokens of the tower's shape, and blocks with plain attention take the faster. On a CPU
    with bf16 instructions the weights of the blocks' linear layers are kept in oneDNN's own layout, and an exact GELU
    is computed in the kernel of the layer before it; compile and quantize, to the right, lay them out plainly again.
    """

    source = "bfloat16: Kalamkar et al., arXiv 1905.12322; float16: Micikevicius et al., arXiv 1710.03740"
    goes_before = ("quantize", "compile")  # low-bit weights are not to be cast
    phases = ("test",)

    dtype: str = param("bf16", "of weights and activations", choices=tuple(DTYPES))
    target: tuple[str, ...] = param(("tower", "text"), "image tower, text tower or both", choices=("tower", "text"))
    pack: bool = param(True, "weights in oneDNN's own layout, on a CPU with bf16 instructions")

    def finish(self, model: ModelView, calibration: CalibrationSet) -> None:
        asked = towers_asked_for(model, self.target, "precision")
        if any(isinstance(module, Int8Linear) for module in model.model.modules()):
            raise UsageError(
                f"precision: dtype={self.dtype}: this model is quantised in int8, whose kernel takes float32",
                "take precision or quantize, or precision+quantize:kind=weight_only",
            )
        dtype = DTYPES[self.dtype]
        for tower in asked.values():
            device = next(tower.module.parameters()).device
            # a user's model may still be on the CPU here, and move to the GPU afterwards
            if dtype == torch.float16 and device.type == "cpu" and not (_fp16_on_cpu() or torch.cuda.is_available()):
                raise UsageError(
                    "precision: dtype=fp16 needs a GPU; this CPU has no float16 matrix products (they run 10 times "
                    "slower than float32)",
                    "use precision:bf16",
                )
        for module, side in sides(model).items():
            if side in self.target:
                module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, recurse=False)
        for tower in asked.values():
            if tower.stem is not None:
                tower.stem.register_forward_pre_hook(cast_images)
                write_out(tower, "precision", dtype, dtype)
            device = next(tower.module.parameters()).device
            if self.pack and dtype == torch.bfloat16 and device.type == "cpu" and bf16_on_cpu():
                pack_tower(tower)

    def notes(self, model: ModelView) -> list[str]:
        said = []
        if "text" in self.target and model.text is None and hasattr(model.model, "text_encoder"):
            said.append("the text tower stays as it is: effbench does not know its library")
        on_cpu = any(next(tower.module.parameters()).device.type == "cpu" for tower in towers(model).values())
        if on_cpu and self.dtype == "bf16" and not bf16_on_cpu():
            said.append("this CPU has no bf16 instructions (AVX512_BF16 or AMX), so bf16 may be no faster")
        if on_cpu:
            said += notes_of_attention(model)
        packed = [layer for layer in model.model.modules() if isinstance(layer, PackedLinear)]
        if any(layer.packed is not None for layer in packed):
            gelus = sum(layer.gelu for layer in packed)
            said.append(
                f"weights of {len(packed)} linear layers in oneDNN's own layout, {gelus} of them with GELU inside"
            )
        return said


def cast_images(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: the images in the dtype of the module's weights."""
    images, *rest = inputs
    return (images.to(next(module.parameters()).dtype), *rest)


def _fp16_on_cpu() -> bool:
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()
