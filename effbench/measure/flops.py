"""FLOPs as they are dispatched: every matrix product that really runs, from the shapes that it really has.

Counted are convolutions, linear layers, matrix products, attention's two products and bilinear layers, multiply and
add apart (1 MAC = 2 FLOPs); elementwise work, norms, softmax and embeddings count 0. Three kinds are kept apart: dense
(floating point, as dense kernels do it), useful (of dense, what attention masks leave) and low-bit (products of
integers). What a backward pass recomputes inside a fused attention kernel is not counted: attention's gradient is four
products, twice its forward.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effbench.errors import UsageError
from effbench.measure.flop_formulas import formula_of, hides_work
from effbench.measure.flop_layers import Layers
from effbench.measure.flop_low_bit import low_bit
from effbench.measure.flop_masks import SDPA, Attend, attention_calls, flex_share


@dataclass(frozen=True)
class FlopCount:
    """What one call cost, over its whole batch.

    Args:
        dense_flops: FLOPs of the model in floating point, as dense kernels do them; weight-only quantisation included.
        macs: dense_flops // 2.
        overhead_flops: FLOPs of a method's own scoring and matching; not within dense_flops.
        by_layer: FLOPs by the name of the innermost module that they ran in (that of `model.named_modules()`; "" is
            the model itself and whatever ran outside its layers), an integer MAC as two. They add up to dense_flops +
            overhead_flops + 2 x low_bit_macs.
        complete: False where an operation without a formula was seen: then all counts are lower bounds.
        unknown_ops: the names of those operations.
        useful_flops: of dense_flops, what causal flags, boolean and -inf masks and FlexAttention's block masks leave of
            scaled_dot_product_attention, exactly. A mask on "meta" has no values and is taken to keep everything;
            attention that is written out as matrix products masks nothing that this could see.
        low_bit_ops: bit operations of the products of integers: MACs x weight bits x activation bits.
        low_bit_macs: their MACs; not within dense_flops.
        overhead_by_layer: of by_layer, what is overhead.
    """

    dense_flops: int
    macs: int
    overhead_flops: int
    by_layer: dict[str, int]
    complete: bool
    unknown_ops: tuple[str, ...]
    useful_flops: int = 0
    low_bit_ops: int = 0
    low_bit_macs: int = 0
    overhead_by_layer: dict[str, int] = field(default_factory=dict)

    @property
    def work(self) -> int:
        """Everything that is computed, a product of integers as if it were floating-point."""
        return self.dense_flops + self.overhead_flops + 2 * self.low_bit_macs


def flops(model: nn.Module, *inputs: Any, train: bool = False, **kwargs: Any) -> FlopCount:
    """Count the FLOPs of `model(*inputs, **kwargs)`: dense, useful, low-bit and a method's overhead.

    The model runs once, on its own device (a model and inputs on "meta" cost no time). Its mode, gradients and buffers
    and torch's random state are as before afterwards.

    Args:
        model: any module: a timm or OpenCLIP model, edited by `effbench.apply` or not.
        inputs: what its forward takes, e.g. images (batch, 3, height, width) of float32.
        train: False counts a forward pass in evaluation mode without gradients. True counts a forward pass in training
            mode and its backward pass from all outputs, into whatever requires a gradient.
        kwargs: further arguments of its forward.

    Returns:
        The counts of the whole batch: divide by the batch size for those of one image. `complete=False` marks lower
        bounds, and `unknown_ops` names why.

    Raises:
        UsageError: `model` is no module, or with train=True nothing requires a gradient.

    Example:
        >>> vit = timm.create_model("deit_tiny_patch16_224")
        >>> effbench.flops(vit, torch.zeros(1, 3, 224, 224)).macs
        1253683200
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"flops needs a torch module, not {type(model).__name__}", "effbench.flops(model, images)")

    def call() -> None:
        with suppress(NotImplementedError):  # an exported program has the one mode that it was exported in
            model.train(train)
        with torch.set_grad_enabled(train):
            outputs = model(*inputs, **kwargs)
        if train:
            _backward(outputs)

    leaves = [leaf for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor) and leaf.is_leaf]
    with _gradients_kept(leaves):
        return flops_of(call, model)


def flops_of(function: Callable[[], object], model: nn.Module | None = None) -> FlopCount:
    """Count the FLOPs of whatever `function()` runs, e.g. a training step with its backward pass.

    Args:
        function: called once, in the gradient mode and under the autocast that hold around this call.
        model: its modules name the layers, and its mode, gradients and buffers are as before afterwards, as is torch's
            random state. Without it a layer is named after the class of the outermost module.

    Returns:
        The count. An optimiser's step costs nothing, but it does change the model.

    Example:
        >>> flops_of(lambda: loss(model(images)).backward(), model).dense_flops
    """
    layers = Layers(model)
    with ExitStack() as stack:
        stack.enter_context(_state_kept(model))
        stack.enter_context(_visible())
        stack.enter_context(layers)
        attend = stack.enter_context(attention_calls(layers.masked))
        counts = stack.enter_context(_Counter(layers, attend))
        function()
    dense = sum((counts.by_layer - counts.overhead).values()) - 2 * counts.low_bit_macs
    return FlopCount(
        dense_flops=dense,
        macs=dense // 2,
        overhead_flops=sum(counts.overhead.values()),
        by_layer=dict(counts.by_layer),
        complete=not counts.unknown,
        unknown_ops=tuple(sorted(counts.unknown)),
        useful_flops=dense - counts.masked,
        low_bit_ops=counts.low_bit_ops,
        low_bit_macs=counts.low_bit_macs,
        overhead_by_layer=dict(counts.overhead),
    )


class _Counter(TorchDispatchMode):
    """Adds up the formulas of the operations that reach the dispatcher, by layer."""

    supports_higher_order_operators = True

    def __init__(self, layers: Layers, attend: Attend) -> None:
        super().__init__()
        self.layers = layers
        self.attend = attend
        self.by_layer: Counter[str] = Counter()
        self.overhead: Counter[str] = Counter()
        self.masked = 0
        self.low_bit_ops = 0
        self.low_bit_macs = 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = formula_of(func)
        if any(isinstance(arg, Tensor) and arg.is_nested for arg in args):  # ragged: no formula knows its lengths
            if formula is not None or hides_work(func):
                self.unknown.add(f"{func} on nested tensors")
            return func(*args, **kwargs)
        if func is SDPA:
            with self:
                return self.attend(*args, **kwargs)
        if formula is None and isinstance(func, torch._ops.OpOverload):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if integers := low_bit(func, formula, args, kwargs, out):
            self.add_low_bit(*integers)
        elif formula is not None:
            kept = flex_share(args) if "flex_attention" in str(func) else None
            parts = 4 if isinstance(out, Tensor) and out.is_complex() else 1  # a complex MAC is four of real numbers
            self.add(parts * int(formula(*args, **kwargs, out_val=out)), kept)
        elif hides_work(func):
            self.unknown.add(str(func))
        return out

    def add(self, count: int, kept: Fraction | None = None) -> None:
        if count:
            place = self.layers.current()
            self.by_layer[place.layer] += count
            if place.is_overhead:
                self.overhead[place.layer] += count
            else:
                self.masked += count - int(count * (place.kept if kept is None else kept))

    def add_low_bit(self, macs: int, bits: int) -> None:
        self.add(2 * macs, Fraction(1))
        if not self.layers.current().is_overhead:
            self.low_bit_macs += macs
            self.low_bit_ops += macs * bits


def _backward(outputs: Any) -> None:
    trained = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not trained:
        raise UsageError(
            "no output of the model requires a gradient", "unfreeze what is trained, or leave out train=True"
        )
    torch.autograd.backward(trained, [torch.ones_like(leaf) for leaf in trained])


@contextmanager
def _visible() -> Iterator[None]:
    """Switch off what hides work from the dispatcher: the attention fast path, and compiled code where there is any."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
        if {"torch._dynamo", "torch.nn.attention.flex_attention"} & sys.modules.keys():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _state_kept(model: nn.Module | None) -> Iterator[None]:
    """Put back the modes, buffers and gradients of the model and the random state."""
    modules = list(model.modules()) if model is not None else []
    modes = [module.training for module in modules]
    buffers = [(m._buffers, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    generators = [g for m in modules for g in vars(m).values() if isinstance(g, torch.Generator)]
    drawn = [generator.get_state() for generator in generators]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), _gradients_kept([p for m in modules for p in m._parameters.values()]):
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            for owner, name, buffer, value in buffers:
                owner[name] = buffer
                buffer.data.copy_(value)
            for generator, state in zip(generators, drawn, strict=True):
                generator.set_state(state)


@contextmanager
def _gradients_kept(tensors: list[Tensor | None]) -> Iterator[None]:
    kept = [(tensor, tensor.grad) for tensor in tensors if tensor is not None]
    try:
        for tensor, _ in kept:
            tensor.grad = None
        yield
    finally:
        for tensor, grad in kept:
            tensor.grad = grad
