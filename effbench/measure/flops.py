"""FLOPs as they are dispatched: every matrix product that really runs, from the shapes that it really has.

Counted are convolutions, linear layers, matrix products, attention's two products and bilinear layers, multiply and
add apart (1 MAC = 2 FLOPs); elementwise work, norms and softmax count 0. A masked product counts as its dense kernel
computes it. What a backward pass recomputes inside a fused attention kernel is not counted: attention's gradient is
four products, twice its forward.
"""

from __future__ import annotations

import sys
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effbench.errors import UsageError
from effbench.measure.flop_formulas import formula_of, hides_work


@dataclass(frozen=True)
class FlopCount:
    """What one call cost, over its whole batch.

    Args:
        dense_flops: FLOPs of the model, as dense kernels do them.
        macs: dense_flops // 2.
        overhead_flops: FLOPs of a method's own scoring and matching; not within dense_flops.
        by_layer: FLOPs by the name of the innermost module that they ran in (that of `model.named_modules()`; "" is
            the model itself and whatever ran outside its layers). They add up to dense_flops + overhead_flops.
        complete: False where an operation without a formula was seen: then dense_flops is a lower bound.
        unknown_ops: the names of those operations.
    """

    dense_flops: int
    macs: int
    overhead_flops: int
    by_layer: dict[str, int]
    complete: bool
    unknown_ops: tuple[str, ...]


def flops(model: nn.Module, *inputs: Any, train: bool = False, **kwargs: Any) -> FlopCount:
    """Count the FLOPs of `model(*inputs, **kwargs)`.

    The model runs once, on its own device (a model and inputs on "meta" cost no time). Its mode, gradients and buffers
    and torch's random state are as before afterwards.

    Args:
        model: any module: a timm or OpenCLIP model, edited by `effbench.apply` or not.
        inputs: what its forward takes, e.g. images (batch, 3, height, width) of float32.
        train: False counts a forward pass in evaluation mode without gradients. True counts a forward pass in training
            mode and its backward pass from all outputs, into whatever requires a gradient.
        kwargs: further arguments of its forward.

    Returns:
        FLOPs of the whole batch: divide by the batch size for those of one image.

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
    layers = _Layers(model)
    counts = _Counter(layers)
    with ExitStack() as stack:
        stack.enter_context(_state_kept(model))
        stack.enter_context(_visible())
        stack.enter_context(layers)
        stack.enter_context(counts)
        function()
    total, overhead = sum(counts.by_layer.values()), sum(counts.overhead.values())
    dense = total - overhead
    unknown = tuple(sorted(counts.unknown))
    return FlopCount(dense, dense // 2, overhead, dict(counts.by_layer), not unknown, unknown)


class _Counter(TorchDispatchMode):
    """Adds up the formulas of the operations that reach the dispatcher, by layer."""

    supports_higher_order_operators = True

    def __init__(self, layers: _Layers) -> None:
        super().__init__()
        self.layers = layers
        self.by_layer: Counter[str] = Counter()
        self.overhead: Counter[str] = Counter()
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = formula_of(func)
        if any(isinstance(arg, Tensor) and arg.is_nested for arg in args):  # ragged: no formula knows its lengths
            if formula is not None or hides_work(func):
                self.unknown.add(f"{func} on nested tensors")
            return func(*args, **kwargs)
        if formula is None and isinstance(func, torch._ops.OpOverload):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.add(int(formula(*args, **kwargs, out_val=out)))
        elif hides_work(func):
            self.unknown.add(str(func))
        return out

    def add(self, count: int) -> None:
        if count:
            name, is_overhead = self.layers.current()
            self.by_layer[name] += count
            if is_overhead:
                self.overhead[name] += count


class _Layers:
    """Which layer is running: in a forward pass the innermost module, in a backward pass the one that made the node.

    Autograd numbers its nodes in the order of the forward pass. The number at which each module is entered and left is
    noted, so a node's number leads back to its module.
    """

    OUTSIDE = ("", False)

    def __init__(self, model: nn.Module | None) -> None:
        self.names: dict[nn.Module, str] = {}
        if model is not None:
            self.names.update((module, name) for name, module in model.named_modules())
        self.stack = [self.OUTSIDE]
        self.numbers = [-1]
        self.layers = [self.OUTSIDE]

    def current(self) -> tuple[str, bool]:
        """Name of the layer, and whether it is a method's overhead."""
        node = torch._C._current_autograd_node()
        if node is None or len(self.stack) > 1:
            return self.stack[-1]
        return self.layers[bisect_right(self.numbers, node._sequence_nr()) - 1]

    def note(self) -> None:
        number = torch._C._autograd._get_sequence_nr()
        if self.numbers[-1] == number:
            self.layers[-1] = self.stack[-1]
        else:
            self.numbers.append(number)
            self.layers.append(self.stack[-1])

    def entered(self, module: nn.Module, _inputs: Any) -> None:
        if module not in self.names:
            for name, child in module.named_modules(prefix=type(module).__name__):
                self.names.setdefault(child, name)
        is_overhead = self.stack[-1][1] or bool(getattr(type(module), "is_overhead", False))
        self.stack.append((self.names[module], is_overhead))
        self.note()

    def left(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self.stack.pop()
        self.note()

    def __enter__(self) -> _Layers:
        modules = torch.nn.modules.module
        self.hooks = (
            modules.register_module_forward_pre_hook(self.entered),
            modules.register_module_forward_hook(self.left, always_call=True),
        )
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()


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
        if "torch._dynamo" in sys.modules:
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
