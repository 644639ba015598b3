"""FLOPs of one dispatched operation from the shapes of its tensors, and which operations hide work.

torch's own registry (torch.utils.flop_counter) serves what is not here, and lets users add formulas of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Formula = Callable[..., int]


def matrix_product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """(..., m, k) x (..., k, n) of equal batch; a vector is (k,)."""
    return 2 * a.numel() * (b.shape[-1] if b.ndim > 1 else 1)


def added_matrix_product(_: Any, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int:
    return matrix_product(a, b)


def convolution(
    x: Tensor,
    weight: Tensor,
    _bias: Any,
    _stride: Any,
    _pad: Any,
    _dil: Any,
    transposed: bool,
    *_: Any,
    out_val: Tensor,
    **__: Any,
) -> int:
    """Each position of the output (transposed: of the input) takes one product with the kernel of each group."""
    positions = x.shape[2:] if transposed else out_val.shape[2:]
    return 2 * x.shape[0] * prod(positions) * weight.numel()


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias: Any,
    _stride: Any,
    _pad: Any,
    _dil: Any,
    transposed: bool,
    _out_pad: Any,
    _groups: Any,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    """The gradients of input and weight each cost what the forward did."""
    positions = x.shape[2:] if transposed else grad.shape[2:]
    return 2 * x.shape[0] * prod(positions) * weight.numel() * sum(map(bool, output_mask[:2]))


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """(batch, heads, tokens, width): q.k^T and its product with v; grouped keys are shared, not saved."""
    return 2 * query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def attention_backward(_grad: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return 2 * attention(query, key, value)


def without_recomputation(formula: Formula) -> Formula:
    """torch counts five products for attention's gradient, the recomputed scores among them; four are needed."""
    return lambda *args, **kwargs: formula(*args, **kwargs) * 4 // 5


def trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand_a: list[int],
    expand_b: list[int],
    expand_c: list[int],
    summed: list[int],
    *_: Any,
    **__: Any,
) -> int:
    """Sum over some axes of a x b x c, by the cheapest order of two pairwise products (nn.Bilinear, its gradients)."""
    axes = len(expand_a) + a.ndim
    owned = []
    sizes = [1] * axes
    for tensor, expanded in ((a, expand_a), (b, expand_b), (c, expand_c)):
        own = [axis for axis in range(axes) if axis not in expanded]
        for axis, size in zip(own, tensor.shape, strict=True):
            sizes[axis] = max(sizes[axis], size)
        owned.append(set(own))

    def cost(first: set[int], second: set[int], last: set[int]) -> int:
        joint = first | second
        rest = {axis for axis in joint if axis not in summed or axis in last} | last
        return prod(sizes[axis] for axis in joint) + prod(sizes[axis] for axis in rest)

    x, y, z = owned
    return 2 * min(cost(x, y, z), cost(y, z, x), cost(x, z, y))


def distances(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """All pairs of (..., m, k) and (..., n, k), as a matrix product computes them."""
    return 2 * a.numel() * b.shape[-2]


def distances_backward(_grad: Any, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """The gradient of the first points."""
    return distances(a, b)


def native_attention(query: Tensor, key: Tensor, _value: Any, width: int, *_: Any, **__: Any) -> int:
    """nn.MultiheadAttention's fused kernel: four projections and attention's two products; (batch, tokens, width)."""
    tokens = query.shape[0] * query.shape[1]
    return 8 * tokens * width * width + 4 * tokens * key.shape[1] * width


def native_encoder_layer(
    x: Tensor,
    width: int,
    _heads: int,
    _qkv_w: Any,
    _qkv_b: Any,
    _proj_w: Any,
    _proj_b: Any,
    _gelu: Any,
    _first: Any,
    _eps: Any,
    _n1w: Any,
    _n1b: Any,
    _n2w: Any,
    _n2b: Any,
    hidden: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    """nn.TransformerEncoderLayer's fused kernel."""
    return native_attention(x, x, x, width) + 4 * x.shape[0] * x.shape[1] * hidden.numel()


def packed_linear(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """(..., in) -> (..., out) with packed weights (int8, int4, float16, oneDNN's) that are computed with as numbers."""
    return 2 * out_val.numel() * x.shape[-1]


def grouped_product(a: Tensor, b: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    """Products of groups of rows, each with a matrix of its own (experts); or their gradient, (m, rows) x (rows, n)."""
    if a.ndim == 3 and b.ndim == 2:  # groups of columns
        return 2 * a[0].numel() * b.shape[-1]
    return 2 * a.numel() * b.shape[-1]


def grouped_product_backward(a: Tensor, b: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    """The gradients of both factors."""
    return 2 * grouped_product(a, b, out_val=out_val)


def recurrent(x: Tensor, *weights: Any, **_: Any) -> int:
    """A recurrent layer: every weight matrix once per step and sequence, (time, batch, width) or packed."""
    matrices = [w for w in (weights[0] if isinstance(weights[0], (list, tuple)) else weights[:2]) if w.ndim > 1]
    return 2 * prod(x.shape[:-1]) * sum(w.numel() for w in matrices)


FORMULAS: dict[Any, Formula] = {
    aten.mm: matrix_product,
    aten.bmm: matrix_product,
    aten.mv: matrix_product,
    aten.dot: matrix_product,
    aten.vdot: matrix_product,
    aten.addmm: added_matrix_product,
    aten.baddbmm: added_matrix_product,
    aten.addbmm: added_matrix_product,
    aten.addmv: added_matrix_product,
    aten._addmm_activation: added_matrix_product,
    aten._int_mm: matrix_product,
    aten.convolution: convolution,
    aten._convolution: convolution,
    aten.convolution_overrideable: convolution,
    aten.convolution_backward: convolution_backward,
    aten._trilinear: trilinear,
    aten._cdist_forward: distances,
    aten._cdist_backward: distances_backward,
    aten._native_multi_head_attention: native_attention,
    aten._transformer_encoder_layer_fwd: native_encoder_layer,
    aten.mkldnn_rnn_layer: recurrent,
    aten._cudnn_rnn: recurrent,
}
FORMULAS |= {
    getattr(aten, f"_scaled_dot_product_{kernel}"): attention
    for kernel in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
        "attention_math_for_mps",
    )
    if hasattr(aten, f"_scaled_dot_product_{kernel}")
}
FORMULAS |= {
    getattr(aten, f"_scaled_dot_product_{kernel}_backward"): attention_backward
    for kernel in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
    if hasattr(aten, f"_scaled_dot_product_{kernel}_backward")
}
FORMULAS |= {
    op: without_recomputation(formula)
    for op, formula in flop_registry.items()
    if str(op).split(".")[-1]
    in ("_flash_attention_backward", "_efficient_attention_backward", "flex_attention_backward")
}

FORMULAS |= {
    getattr(aten, name): packed_linear
    for name in (
        "_weight_int8pack_mm",
        "_weight_int4pack_mm",
        "_weight_int4pack_mm_for_cpu",
        "_weight_int4pack_mm_with_scales_and_zeros",
    )
    if hasattr(aten, name)
}
if hasattr(aten, "_grouped_mm"):
    FORMULAS[aten._grouped_mm] = grouped_product
#: operations that transformers registers, by name
NAMED: dict[str, Formula] = {
    "transformers::grouped_mm_fallback": grouped_product,
    "transformers::grouped_mm_fallback_backward": grouped_product_backward,
}
PACKED_LINEAR = re.compile(
    r"(quantized|onednn)::linear_(relu_)?dynamic_fp16|quantized::int4mm_packed_weight_cpu|mkldnn::_linear_pointwise"
)

# Namespaces of torch's own libraries: an operation of theirs does matrix-like work only if a word of its name says so.
KNOWN = set(
    "aten prim prims debugprims rngprims quantized _quantized quantized_decomposed mkl mkldnn onednn sparse "
    "mkldnn_prepacked prepacked c10d _c10d_functional _c10d_functional_autograd symm_mem inductor profiler streams "
    "fsdp torchvision torchaudio image torch_attn higher_order xpu metal vulkan".split()
)
MATRIX_WORDS = re.compile(
    r"(|add|b|badd|addb|hsp|sp|sspa|sspadd|q)mm|(add)?mv|v?dot|matmul|q?linear|(q|slow|mm)?conv(\d?d|\dd|olution|_?tbc)?|tbc"
    r"|dilated\dd|transpose\dd|attention|attn|[cp]dist|dist|trilinear|bilinear|einsum|lstm|gru|rnn|linalg|cholesky|solve"
    r"|spsolve|geqrf|ormqr|svd|qr|lstsq|fft|encoder"
)
HARMLESS = re.compile(
    r"_?linalg_(vector_norm|cross|diagonal|check_errors|_powsum)|_thnn_fused_.*|fft_r?fftfreq|.*(_prepack|_unpack|_reorder_).*"
    r"|.*_flatten_weight|.*_compress|mkldnn_reorder_.*|dist"
)


def formula_of(func: Any) -> Formula | None:
    """The formula of a dispatched operation; it takes the operation's arguments and `out_val`, its result."""
    packet = getattr(func, "_overloadpacket", func)
    formula = FORMULAS.get(packet) or flop_registry.get(packet)
    if isinstance(func, torch._ops.OpOverload) and func._schema.name in NAMED:
        return NAMED[func._schema.name]
    if isinstance(func, torch._ops.OpOverload) and PACKED_LINEAR.fullmatch(func._schema.name):
        return packed_linear
    if formula is None and str(packet).startswith("aten.") and str(packet).endswith("_"):
        return FORMULAS.get(getattr(aten, str(packet)[5:-1], None))
    return formula


@cache
def hides_work(func: Any) -> bool:
    """Whether an operation without a formula may do matrix-like work: by its name, or because nobody knows it."""
    if not isinstance(func, torch._ops.OpOverload):
        return True
    namespace, name = func._schema.name.split("::")
    if namespace not in KNOWN:
        return any("Tensor" in str(argument.type) for argument in func._schema.arguments)
    return not HARMLESS.fullmatch(name) and any(MATRIX_WORDS.fullmatch(word) for word in name.split("_") if word)
