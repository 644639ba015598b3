"""FLOPs by each layer's formula: a second opinion that shares no code with the dispatch count.

Hooks read the shapes that layers really get and their configuration; neither kernels nor dispatched operations are
looked at. Products that are written out inside some forward are not seen, which is the point of comparing the two.
N tokens of width C: linear N C_in C_out MACs, attention's products 2 N^2 C, a block 12 N C^2 + 2 N^2 C in all.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effbench.measure.flop_layer_formulas import Formula, formula_of, may_hide_a_product, speaks_for_its_parts

if TYPE_CHECKING:
    from effbench.measure.flops import FlopCount

MARGIN = 0.01  # share by which the two counts may differ
NAMED = 3  # layers that a disagreement names


@dataclass(frozen=True)
class AnalyticCount:
    """What the formulas of a model's layers add up to, over the whole batch.

    Args:
        flops: 1 MAC = 2 FLOPs, dense; a product of integers counts as if it were floating-point; a method's overhead
            is left out.
        by_layer: the same by the layer's name.
        without_formula: layers with weights that have no formula here; the count lacks them.
    """

    flops: int
    by_layer: dict[str, int]
    without_formula: tuple[str, ...]


def analytic(model: nn.Module, *inputs: Any, train: bool = False, **kwargs: Any) -> AnalyticCount:
    """Count the FLOPs of `model(*inputs, **kwargs)` by the formulas of its layers.

    The model runs forward once; its modes, buffers and torch's random state are as before afterwards.

    Args:
        train: False counts a forward pass in evaluation mode; True a forward pass in training mode and its backward
            pass: per layer the gradients of its weight and of its input, where they require one.

    Example:
        >>> analytic(timm.create_model("deit_tiny_patch16_224"), torch.zeros(1, 3, 224, 224)).flops
        2507366400
    """

    def call() -> None:
        model.train(train)
        model(*inputs, **kwargs)

    return analytic_of(call, model, train=train)


def analytic_of(function: Callable[[], object], model: nn.Module, *, train: bool = False) -> AnalyticCount:
    """Count what `function()` runs of a model's layers, in the modes that they are in, e.g. a forward pass to a loss.

    Args:
        function: called once, with gradients if `train`; it needs to run no backward pass.
        train: add the backward pass, by what requires a gradient.
    """
    counts: Counter[str] = Counter()
    missing: set[str] = set()
    within: tuple[str, ...] = ()  # layers that speak for all that is in them
    handles = []

    def counted(name: str, formula: Formula) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = [*args, *(kwargs[key] for key in signature(module.forward).parameters if key in kwargs)]
            given = [x for x in inputs if isinstance(x, Tensor)] + [x for x in inputs if hasattr(x, "get_seq_length")]
            for product in formula(module, given, output):
                counts[name] += product.flops * (1 + train * sum(product.gradients))

        return hook

    for name, module in model.named_modules():
        if within and name.startswith(within):
            continue
        if getattr(type(module), "is_overhead", False):
            within += (f"{name}." if name else "",)
            continue
        formula = formula_of(module)
        if formula is not None:
            handles.append(module.register_forward_hook(counted(name, formula), with_kwargs=True))
        elif may_hide_a_product(module):
            handles.append(module.register_forward_hook(lambda *_, name=name: missing.add(name)))
        if speaks_for_its_parts(formula):
            within += (f"{name}." if name else "",)
    try:
        with _as_it_was(model), torch.set_grad_enabled(train):
            function()
    finally:
        for handle in handles:
            handle.remove()
    return AnalyticCount(sum(counts.values()), dict(counts), tuple(sorted(missing)))


def disagreement(dispatch: FlopCount, count: AnalyticCount) -> str:
    """One sentence where the two counts differ by more than 1 %, with both and the layers that differ most; else "".

    Integer products are compared as if they were floating-point; a method's overhead is left out.
    """
    dispatched = dispatch.dense_flops + 2 * dispatch.low_bit_macs
    if abs(dispatched - count.flops) <= MARGIN * max(dispatched, count.flops):
        return ""
    apart: Counter[str] = Counter()
    for name, flops in dispatch.by_layer.items():
        own = flops - dispatch.overhead_by_layer.get(name, 0)
        parts = name.split(".")
        upwards = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        apart[next((known for known in upwards if known in count.by_layer), name)] += own
    apart.subtract(count.by_layer)
    most = sorted((name for name in apart if apart[name]), key=lambda name: -abs(apart[name]))[:NAMED]
    layers = ", ".join(f"{name or 'outside of layers'} ({apart[name] / 1e9:+.4g})" for name in most)
    share = abs(dispatched - count.flops) / max(dispatched, count.flops)
    unknown = (*count.without_formula[:NAMED], *(f"the operation {name}" for name in dispatch.unknown_ops[:NAMED]))
    return (
        f"the dispatch count ({dispatched / 1e9:.4g} GFLOPs) and the layers' formulas ({count.flops / 1e9:.4g} GFLOPs) "
        f"differ by {share:.1%}, most in {layers}" + (f"; no formula for {', '.join(unknown)}" if unknown else "")
    )


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Run uncompiled, without the fast path that bypasses layers; then put modes, buffers and random state back."""
    modules, fast = list(model.modules()), torch.backends.mha.get_fastpath_enabled()
    modes = [module.training for module in modules]
    buffers = [(m._buffers, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for owner, name, buffer, value in buffers:
                owner[name] = buffer
                buffer.data.copy_(value)
