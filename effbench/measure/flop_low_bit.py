"""Products of integers: their MACs and bits, from the operations that torch.ao and torchao dispatch.

Activations and weights must both be integers. Weight-only quantisation computes in floating point, so it is dense.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from effbench.measure.flop_formulas import Formula

QUANTISED = re.compile(r"_?quantized::(?!.*fp16)(linear|conv|matmul|quantized_\w+_cell)(\w*)|onednn::q(linear|conv)\w*")
RECURRENT = ("aten::quantized_lstm", "aten::quantized_gru")


def low_bit(
    func: Any, formula: Formula | None, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> tuple[int, int] | None:
    """(MACs, weight bits x activation bits) of an integer product; None for every other operation.

    Args:
        formula: of the operation's FLOPs, where there is one.
        out: the operation's result.
    """
    if not isinstance(func, torch._ops.OpOverload):
        return None
    if formula is not None:
        factors = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim][-2:]
        if len(factors) < 2 or not all(map(_is_integer, factors)):
            return None
        return int(formula(*args, **kwargs, out_val=out)) // 2, prod(8 * f.element_size() for f in factors)
    name = func._schema.name
    if name == "aten::_dyn_quant_matmul_4bit":
        return out.numel() * args[0].shape[-1], 4 * 8
    if name in RECURRENT:
        return _recurrent(args)
    if not QUANTISED.fullmatch(name) or name.startswith("onednn") and not _is_integer(args[0]):
        return None
    x = args[0]
    if "_cell" in name:
        return x.shape[0] * sum(_weight(packed).numel() for packed in args[2:4]), 8 * 8
    if "conv" not in name:
        return out.numel() * x.shape[-1], 8 * 8
    weight = args[3] if name.startswith("onednn") else _weight(next(a for a in args if _is_packed(a)))
    positions = x.shape[2:] if "transpose" in name else out.shape[2:]
    return x.shape[0] * prod(positions) * weight.numel(), 8 * 8


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _is_packed(argument: Any) -> bool:
    return isinstance(argument, torch.ScriptObject)


def _weight(packed: Any) -> Tensor:
    """The weight inside a quantised layer's packed parameters."""
    return packed.unpack()[0]


def _recurrent(args: tuple[Any, ...]) -> tuple[int, int] | None:
    """Every weight matrix of every layer and direction once per step and sequence; None for float16 weights."""
    cells = next(arg for arg in args if isinstance(arg, (list, tuple)) and arg and _is_packed(arg[0]))
    leaves = [leaf for cell in cells for leaf in tree_leaves(cell.__getstate__())]
    weights = [_weight(leaf) for leaf in leaves if _is_packed(leaf)]
    if not all(weight.is_quantized for weight in weights):
        return None
    return prod(args[0].shape[:-1]) * sum(weight.numel() for weight in weights), 8 * 8
