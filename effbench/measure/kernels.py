"""How a model really computes: which attention kernels run, and in what precision its matrix products are.

Read from what reaches the dispatcher, with nothing switched off. A TorchFunctionMode must not watch: it turns the
library's attention fast path off. Code under torch.compile cannot be watched; it runs as its source and is named.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from effbench.records import Kernels

ATTENTION = {
    "aten::_native_multi_head_attention": "library fast path",
    "aten::_transformer_encoder_layer_fwd": "library fast path",
    "aten::_scaled_dot_product_flash_attention": "sdpa:flash",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "sdpa:flash",
    "aten::_scaled_dot_product_efficient_attention": "sdpa:efficient",
    "aten::_scaled_dot_product_cudnn_attention": "sdpa:cudnn",
    "aten::_scaled_dot_product_fused_attention_overrideable": "sdpa:overrideable",
    "aten::_scaled_dot_product_attention_math_for_mps": "sdpa:math",
    "aten::_safe_softmax": "sdpa:math",  # its decomposition into matrix products; nothing else has this softmax
    "flex_attention": "flex",
}
#: words of the names of operations that multiply matrices
PRODUCTS = set("mm addmm bmm baddbmm addbmm mv addmv linear qlinear convolution conv1d conv2d conv3d qconv".split())
PRODUCTS |= set("attention attn trilinear encoder".split())
PREPARATION = {"prepack", "unpack", "packed"}
DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.qint8: "int8",
    torch.quint8: "uint8",
}
AUTOCAST = ("cpu", "cuda", "xpu", "mps")


def kernels(function: Callable[[], object]) -> Kernels:
    """What `function()` really runs, e.g. one test step.

    Attention that is written out is seen as a softmax between two matrix products whose sizes fit.

    Args:
        function: called once, under the modes, gradients and autocast that hold around this call.
    """
    census = _Census()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
        for register in (register_module_forward_pre_hook, register_module_forward_hook):
            handle = register(census.note_autocast)
            stack.callback(handle.remove)
        if "torch._dynamo" in sys.modules:  # under a dispatch mode nothing is compiled, and flex_attention would refuse
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(census)
        function()
    return Kernels(
        attention=dict(sorted(census.attention.items())),
        precision=dict(sorted(census.precision.items())),
        autocast=census.autocast,
        compiled=census.compiled,
        channels_last=census.channels_last,
        threads=torch.get_num_threads(),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """A short name: fp32, bf16, int8, fp8_e4m3fn."""
    return DTYPES.get(dtype) or str(dtype).removeprefix("torch.").replace("float8", "fp8")


class _Census(TorchDispatchMode):
    """Notes the operations that reach the dispatcher."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.attention: Counter[str] = Counter()
        self.precision: Counter[str] = Counter()
        self.autocast = self.compiled = self.channels_last = False
        self.scores = 0  # elements of the last matrix product's result
        self.weights = (0, 0)  # elements of the last softmax of such a result, and the size of its axis
        self.note_autocast()

    def note_autocast(self, *_: Any) -> None:
        """Where autocast is on now; inside an operation torch no longer tells."""
        self.casting = {device for device in AUTOCAST if torch.is_autocast_enabled(device)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(each, Tensor) and each.__torch_dispatch__ is not Tensor.__torch_dispatch__ for each in types):
            return NotImplemented  # a quantised tensor takes itself apart, and its parts come by here
        if isinstance(func, torch._ops.OpOverload):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        self.compiled = self.compiled or _in_compiled_code()
        self.note(func._schema.name if isinstance(func, torch._ops.OpOverload) else func.name(), args, out)
        return out

    def note(self, name: str, args: Any, out: Any) -> None:
        namespace, _, short = name.rpartition("::")
        words = set(short.split("_"))
        if path := ATTENTION.get(name):
            self.attention[path] += 1
        elif namespace not in ("aten", "") and words & {"attention", "attn", "flash"} and "backward" not in words:
            self.attention[name] += 1
        if name == "aten::_softmax" and args[0].numel() == self.scores:
            self.weights = args[0].numel(), args[0].shape[args[1]]
        if not words & PRODUCTS or words & PREPARATION:
            return
        operands = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim > 1]
        operands = operands[short.lstrip("_").startswith(("add", "badd")) and len(operands) > 2 :][:2]
        self.precision[_precision(namespace, words, operands)] += 1
        self.autocast = self.autocast or any(operand.device.type in self.casting for operand in operands)
        if words & {"mm", "addmm", "bmm", "baddbmm"}:
            self.written_out(operands, out)
        elif "convolution" in words:
            self.channels_last = self.channels_last or any(map(_channels_last, operands))

    def written_out(self, operands: list[Tensor], out: Tensor) -> None:
        """Count attention where an operand of this product came from a softmax of an earlier product."""
        elements, axis = self.weights
        if any(operand.numel() == elements and axis in operand.shape[-2:] for operand in operands):
            self.attention["eager"] += 1
            self.weights = 0, 0
        self.scores = out.numel()


def _precision(namespace: str, words: set[str], operands: list[Tensor]) -> str:
    """The operands' dtype, or both where they differ; torch.ao's own operations hide their packed weights.

    Bytes are int8, signed or not: kernels for x86 take unsigned activations and signed weights.
    """
    if namespace in ("quantized", "onednn"):
        return "fp16" if "fp16" in words else "int8"
    names = [dtype_name(operand.dtype) for operand in operands]
    if "int4pack" in words:  # several to a byte or word
        names[1:] = ["int4"]
    return " x ".join(dict.fromkeys("int8" if name == "uint8" else name for name in names))


def _channels_last(tensor: Tensor) -> bool:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    return layout is not None and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous()


def _in_compiled_code() -> bool:
    """Whether a function that torch.compile returned is running; flex_attention's own use of it does not count."""
    if "torch._dynamo" not in sys.modules:
        return False
    frame = sys._getframe()
    while frame is not None:
        caller = frame.f_back
        if frame.f_code.co_qualname.startswith("_TorchDynamoContext.__call__.") and (
            caller is None or not caller.f_code.co_filename.endswith("flex_attention.py")
        ):
            return True
        frame = caller
    return False
