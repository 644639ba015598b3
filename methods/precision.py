"""Half precision: weights and activations of towers and decoders in bfloat16 or float16."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from effbench.calibration_set import CalibrationSet
from effbench.errors import UsageError
from effbench.method import Method, param
from effbench.models.tower import ModelView
from effbench_methods.algorithms.attention_written_out import bf16_on_cpu, write_out
from effbench_methods.algorithms.attention_written_out import notes as notes_of_attention
from effbench_methods.algorithms.bf16_linear import PackedLinear, pack_layers, pack_tower
from effbench_methods.algorithms.int8_linear import Int8Linear
from effbench_methods.algorithms.tower_parts import PARTS, captioner_parts, sides, towers_asked_for

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16)


@dataclass(frozen=True)
class Precision(Method):
    """Compute towers and decoders in bfloat16 or float16, as `model.bfloat16()` does; heads and losses stay in float32.

    Of a captioner everything is cast unless target says otherwise: image tower, connector and decoder, with it the head
    that gives logits, which are widened before a word is chosen. Its cache of keys and values takes half the bytes.
    Tables of rotary positions stay as they are: in bfloat16 the places of long texts would fall together.

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
    target: tuple[str, ...] = param(PARTS, "parts of the model that are cast", choices=PARTS)
    pack: bool = param(True, "weights in oneDNN's own layout, on a CPU with bf16 instructions")

    def finish(self, model: ModelView, calibration: CalibrationSet) -> None:
        asked = towers_asked_for(model, self.target, "precision")
        target = {*self.target, "head"} if "decoder" in self.target else {*self.target}
        if any(isinstance(module, Int8Linear) for module in model.model.modules()):
            raise UsageError(
                f"precision: dtype={self.dtype}: this model is quantised in int8, whose kernel takes float32",
                "take precision or quantize, or precision+quantize:kind=weight_only",
            )
        dtype = DTYPES[self.dtype]
        on_cpu = _on_cpu(model)
        # a user's model may still be on the CPU here, and move to the GPU afterwards
        if dtype == torch.float16 and on_cpu and not (_fp16_on_cpu() or torch.cuda.is_available()):
            raise UsageError(
                "precision: dtype=fp16 needs a GPU; this CPU has no float16 matrix products (they run 10 times "
                "slower than float32)",
                "use precision:bf16",
            )
        for module, side in sides(model).items():
            if side in target and not (_rotary(module) and (side == "decoder" or model.image is None)):
                module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, recurse=False)
        for tower in asked.values():
            if tower.stem is not None:
                tower.stem.register_forward_pre_hook(cast_images)
                write_out(tower, "precision", dtype, dtype)
            if self.pack and dtype == torch.bfloat16 and on_cpu and bf16_on_cpu():
                pack_tower(tower)
        if model.decoder is not None:
            self._join(model, dtype)
            if self.pack and dtype == torch.bfloat16 and on_cpu and bf16_on_cpu():
                for name in ("connector", "decoder", "head"):
                    if name in target:
                        pack_layers(captioner_parts(model)[name], model.model)

    def _join(self, model: ModelView, dtype: torch.dtype) -> None:
        """Let each part of a captioner take what the one before it gives, whatever the dtypes of both."""
        whole, language = model.model, model.decoder.language
        if "tower" in self.target and model.image is None:
            whole.image_encoder.register_forward_pre_hook(partial(cast_input, dtype))
        joint = dtype if "connector" in self.target else next((p.dtype for p in whole.connector.parameters()), None)
        if joint is not None:
            whole.connector.register_forward_pre_hook(partial(cast_input, joint))
        inside = dtype if "decoder" in self.target else model.decoder.stem.weight.dtype
        language.body.register_forward_pre_hook(partial(cast_embedded, inside), with_kwargs=True)
        if "decoder" in self.target:
            language.head.register_forward_hook(widen)

    def notes(self, model: ModelView) -> list[str]:
        said = []
        if "text" in self.target and model.text is None and hasattr(model.model, "text_encoder"):
            said.append("the text tower stays as it is: effbench does not know its library")
        on_cpu = _on_cpu(model)
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


def cast_input(dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: the first input in a dtype."""
    first, *rest = inputs
    return (first.to(dtype), *rest)


def cast_embedded(
    dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a decoder: its embedded tokens in a dtype."""
    return args, kwargs | dict(inputs_embeds=kwargs["inputs_embeds"].to(dtype))


def widen(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """Forward hook: logits in float32."""
    return output.float()


def _rotary(module: nn.Module) -> bool:
    return "Rotary" in type(module).__name__


def _on_cpu(model: ModelView) -> bool:
    return any(part.device.type == "cpu" for part in model.model.parameters())


def _fp16_on_cpu() -> bool:
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()
