"""Quantisation: the linear layers of towers and decoders on kernels that take few bits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from effbench.errors import UsageError
from effbench.method import Method, param
from effbench_methods.algorithms.attention_written_out import bf16_on_cpu, write_out
from effbench_methods.algorithms.attention_written_out import notes as notes_of_attention
from effbench_methods.algorithms.bf16_linear import unpack_layers, unpack_tower
from effbench_methods.algorithms.fused_gelu import gelus
from effbench_methods.algorithms.int8_linear import Int8Linear
from effbench_methods.algorithms.loss_gradients import evaluating
from effbench_methods.algorithms.low_bit_weights import Fp8Linear, Int4WeightsLinear, Int8WeightsLinear, LowBitWeights
from effbench_methods.algorithms.tower_parts import PARTS, captioner_parts, sides, towers

if TYPE_CHECKING:
    from torch import Tensor

    from effbench.calibration_set import CalibrationSet
    from effbench.models.tower import ModelView

INT8, TORCHAO = "torch.ao", "torchao"
LIBRARIES = dict(dynamic=(INT8, TORCHAO), weight_only=(INT8, TORCHAO), static=(INT8,), int4=(INT8,), fp8=(INT8,))
LAYERS: dict[str, type[nn.Linear]] = dict(
    dynamic=Int8Linear, static=Int8Linear, weight_only=Int8WeightsLinear, int4=Int4WeightsLinear, fp8=Fp8Linear
)
#: what runs, for a reader
KERNELS = dict(
    dynamic="oneDNN int8 (onednn::qlinear_pointwise), {bits}-bit activations with a scale per input",
    static="oneDNN int8 (onednn::qlinear_pointwise), {bits}-bit activations with scales from {images} training images",
    weight_only="int8 weights, products in floating point",
    int4="int4 weights in groups of 32 (aten::_weight_int4pack_mm), products in bfloat16",
    fp8="float8 (aten::_scaled_mm), a scale per token and per output channel",
)
#: least cosine with the float layer for a kernel to be taken as right, on random numbers
COSINE = dict(dynamic=0.999, static=0.999, weight_only=0.999, int4=0.99, fp8=0.99)
NAMED = 3  # layers that a message names


@dataclass(frozen=True)
class Quantize(Method):
    """Replace every linear layer of towers and decoders by a low-bit one that really computes so.

    dynamic: int8 weights with a scale per output channel, int8 activations with a scale that each input tensor is
    looked through for; so an image's features depend on its batch by as much as rounding does. static: the same with
    scales from training images. weight_only: int8 weights, products in floating point: it saves memory, not time. int4:
    4-bit weights in groups of 32, bfloat16 products. fp8: float8 weights and activations, where the device has it.

    torch.ao is what torch itself brings; its int8 (dynamic, static) takes float32 on a CPU and cannot be compiled.
    torchao's dynamic has a scale per token, works in any precision and on GPUs, and is fast only under +compile.

    dynamic and static: attention's own products run in bf16 on a CPU with such instructions, where a short timing shows
    them to be faster than torch's fused attention, and GELU moves into the kernel of the layer before it, which changes
    no result. Of a captioner image tower, connector and decoder are quantised. Its head, which gives the logits, is not
    unless target names it: that is what LLM.int8() and GPTQ do, since its errors go into every word, and often
    it is the token embedding too. Experts (mixture_of_experts) are no linear layers and stay in floating point.

    Patch embedding, token embeddings and OpenCLIP's projections that are bare parameters stay in floating
    point.
    """

    source = (
        "int8: arXiv 1712.05877, 1806.08342; per token: LLM.int8(), 2208.07339; fp8: 2209.05433; torchao: 2507.16099"
    )
    phases = ("test",)
    goes_before = ("compile",)

    kind: str = param("dynamic", "bits of weights and activations", choices=tuple(LIBRARIES))
    library: str = param(INT8, "whose kernels: torch's own or torchao's", choices=(INT8, TORCHAO))
    target: tuple[str, ...] = param(PARTS, "parts of the model; tower is the image tower", choices=(*PARTS, "head"))
    images: int = param(128, "training images that static looks at", low=1)

    @property
    def claims(self) -> tuple[str, ...]:
        one_scale_per_batch = self.kind == "dynamic" and self.library == INT8
        return ("neighbours",) if one_scale_per_batch else ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.library not in LIBRARIES[self.kind]:
            others = " or ".join(kind for kind, known in LIBRARIES.items() if self.library in known)
            raise UsageError(
                f"quantize: library={self.library} has no kind={self.kind} here", f"leave library out, or kind={others}"
            )
        if not self.target:
            raise UsageError("quantize: target= names no tower", "leave it out, or target=tower, or target=text")
        if self.kind != "static" and self.images != 128:
            raise UsageError(
                f"quantize: kind={self.kind} looks at no training images", "leave images out, or kind=static"
            )
        if self.takes_float32:
            object.__setattr__(self, "conflicts", ("precision", "compile"))

    @property
    def takes_float32(self) -> bool:
        """On oneDNN's int8 kernel: a cast around every layer would eat what it saves, and no graph can hold it."""
        return LAYERS[self.kind] is Int8Linear and self.library == INT8

    def finish(self, model: ModelView, calibration: CalibrationSet) -> None:
        for name, tower in towers(model).items():
            if name in self.target:
                unpack_tower(tower)
        for name, part in captioner_parts(model).items():
            if name in self.target:
                unpack_layers(part)
        found = linears(model, self.target)
        if not found:
            raise UsageError(
                f"quantize: target={'/'.join(self.target)}: this model has no such tower with linear layers in "
                "floating point",
                "use another target, or a ViT backbone",
            )
        first = next(iter(found.values())).weight
        if self.takes_float32 and first.dtype != torch.float32:
            raise UsageError(
                f"quantize: kind={self.kind} takes float32 and these weights are {first.dtype}",
                "leave the cast out, or kind=weight_only, or library=torchao",
            )
        if missing := obstacle(self.kind, self.library, first.device):
            others = [kind for kind in ("dynamic", "weight_only") if kind != self.kind]
            raise UsageError(
                f"quantize: kind={self.kind} on {first.device.type}: {missing}", f"kind={' or '.join(others)}"
            )
        if self.library == TORCHAO:
            with_torchao(self.kind, model.model, found)
            return
        if self.kind == "static":
            calibration.need(self.images, f"quantize: images={self.images}")
        layer = LAYERS[self.kind]
        fits = {name: linear for name, linear in found.items() if takes(layer, linear)}
        if not fits:
            raise UsageError(
                f"quantize: kind={self.kind} takes widths in multiples of {layer.multiple[0]} and {layer.multiple[1]}, "
                f"which no layer of this model has",
                "kind=dynamic or kind=weight_only",
            )
        ranges = seen_ranges(model.model, fits, calibration, self.images) if self.kind == "static" else {}
        fused = gelus(model) if layer is Int8Linear else {}
        if layer is Int8Linear and "tower" in self.target and model.image is not None and bf16_on_cpu():
            write_out(model.image, "quantize", torch.float32, torch.bfloat16)
        for name, linear in fits.items():
            if self.kind == "static" and name not in ranges:
                continue
            new = Int8Linear(linear, ranges.get(name), linear in fused) if layer is Int8Linear else layer(linear)
            if linear in fused:
                mlp, act = fused[linear]
                setattr(mlp, act, nn.Identity())
            model.model.set_submodule(name, new.train(linear.training))

    def notes(self, model: ModelView) -> list[str]:
        low, rest = shares(model, self.target)
        whole = sum(low.values()) + sum(rest.values())
        layers = sum(low.values())
        first = next((module for module in model.model.modules() if isinstance(module, Int8Linear)), None)
        how = KERNELS[self.kind].format(bits=first.bits if first else 8, images=self.images)
        if self.library == TORCHAO:
            how = f"torchao int8 {'weights' if self.kind == 'weight_only' else 'weights and activations'}"
        left = ", ".join(f"{name} {count / whole:.1%}" for name, count in sorted(rest.items(), key=lambda r: -r[1])[:5])
        of = "the towers' weights" if model.decoder is None else "the weights there"
        said = [f"{len(low)} linear layers on {how}: {layers / whole:.1%} of {of}"]
        if left:
            said[0] += f"; in floating point stay {left}"
        if model.decoder is not None and "head" not in self.target:
            said.append("the head that gives logits stays in floating point (target names it to quantise it too)")
        if unfit := list(linears(model, self.target)):
            names = ", ".join(unfit[:NAMED]) + (f" and {len(unfit) - NAMED} more" if len(unfit) > NAMED else "")
            why = "does not take the widths of"
            if all(takes(LAYERS[self.kind], linear) for linear in linears(model, self.target).values()):
                why = "saw nothing enter"
            said.append(f"kind={self.kind} {why} {names}: left in floating point")
        return said + notes_of_attention(model)


def linears(model: ModelView, target: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The floating-point linear layers of the towers asked for, by name. A layer that others read (out_proj of
    nn.MultiheadAttention) is of another class and no part of them."""
    of = sides(model)
    return {
        name: module
        for name, module in model.model.named_modules()
        if type(module) is nn.Linear and type(module.weight.data) is torch.Tensor and of[module] in target
    }


def seen_ranges(
    model: nn.Module, found: dict[str, nn.Linear], calibration: CalibrationSet, images: int
) -> dict[str, tuple[float, int]]:
    """Scale and zero point of what enters each layer."""
    from torch.ao.quantization import HistogramObserver

    from effbench_methods.algorithms.int8_linear import bits

    observers = {name: HistogramObserver(dtype=torch.quint8, reduce_range=bits() < 8) for name in found}

    def observe(observer: nn.Module, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        observer(inputs[0])

    hooks = [linear.register_forward_pre_hook(partial(observe, observers[name])) for name, linear in found.items()]
    try:
        with evaluating(model):
            calibration.run(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    ranges = {}
    for name, observer in observers.items():
        if observer.min_val.isinf().any():
            if hasattr(model, "language"):  # of a captioner's tower the library may use a part
                continue
            raise UsageError(
                f"quantize: kind=static: nothing entered {name} while calibrating",
                "calibrate with all that the model takes, as tuples (images, texts), or target=tower",
            )
        scale, zero = observer.calculate_qparams()
        ranges[name] = (scale.item(), zero.item())
    return ranges


def with_torchao(kind: str, model: nn.Module, found: dict[str, nn.Linear]) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    config = Int8DynamicActivationInt8WeightConfig() if kind == "dynamic" else Int8WeightOnlyConfig()
    for linear in found.values():
        linear.int8_original_dtype = linear.weight.dtype
    quantize_(model, config, lambda module, name: name in found)


def takes(layer: type[nn.Linear], linear: nn.Linear) -> bool:
    inputs, outputs = getattr(layer, "multiple", (1, 1))
    return not (linear.in_features % inputs or linear.out_features % outputs)


def obstacle(kind: str, library: str, device: torch.device) -> str:
    """Why a kind cannot run on a device; empty where a small layer on its kernel gives what it should."""
    if library == TORCHAO:
        try:
            import torchao.quantization  # noqa: F401
        except ImportError:
            return "torchao is not installed (pip install 'effbench[torchao]')"
        return ""
    if LAYERS[kind] is Int8Linear and device.type != "cpu":
        return "torch.ao's int8 kernels are for CPUs (library=torchao has others)"
    if kind == "fp8" and device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        return "this CPU has no AMX, and torch would compute aten::_scaled_mm in float32"
    linear = nn.Linear(64, 64, device=device)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # deprecated; torch says so once
            fixed = (8 / 255, 128) if kind == "static" else None
            layer = Int8Linear(linear, fixed) if LAYERS[kind] is Int8Linear else LAYERS[kind](linear)
            cosine = torch.cosine_similarity(layer(x).flatten(), linear(x).flatten(), dim=0).item()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return f"its kernel is missing: {str(error).splitlines()[0]}"
    return "" if cosine > COSINE[kind] else f"its kernel gives wrong results (cosine {cosine:.3f} with float32)"


def shares(model: ModelView, target: tuple[str, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """Weights of the towers by number: of the quantised layers by name, and of the rest."""
    low, rest, of = {}, {}, sides(model)
    for name, module in model.model.named_modules():
        if of[module] not in target:
            continue
        packed = isinstance(module, (Int8Linear, LowBitWeights))
        if packed or type(module) is nn.Linear and type(module.weight.data) is not torch.Tensor:
            low[name] = module.in_features * module.out_features
        else:
            for key, weight in module.named_parameters(prefix=name, recurse=False):
                if weight.ndim > 1:
                    rest[key] = weight.numel()
    return low, rest
