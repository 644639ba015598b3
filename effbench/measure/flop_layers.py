"""Which layer is running while FLOPs are counted, in forward and in backward passes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn


class Place(NamedTuple):
    """Where an operation runs.

    Args:
        layer: name of the innermost module; "" outside of the model's layers.
        is_overhead: it is a method's own scoring or matching.
        kept: share of the attention's query-key pairs that its mask keeps; 1 outside of masked attention.
    """

    layer: str = ""
    is_overhead: bool = False
    kept: Fraction = Fraction(1)


class Layers:
    """Which layer is running: in a forward pass the innermost module, in a backward pass the one that made the node.

    Autograd numbers its nodes in the order of the forward pass. The number at which each module is entered and left is
    noted, so a node's number leads back to its module, and likewise to the masked attention that it belongs to.

    Args:
        model: its modules name the layers; a module that is not of it is named after the class of the outermost one.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.names: dict[nn.Module, str] = {}
        if model is not None:
            self.names.update((module, name) for name, module in model.named_modules())
        self.stack = [Place()]
        self.numbers = [-1]
        self.places = [Place()]

    def current(self) -> Place:
        """Where the operation that is being dispatched runs."""
        node = torch._C._current_autograd_node()
        if node is None or len(self.stack) > 1:
            return self.stack[-1]
        return self.places[bisect_right(self.numbers, node._sequence_nr()) - 1]

    @contextmanager
    def masked(self, kept: Fraction) -> Iterator[None]:
        """An attention whose mask keeps this share of its pairs; what runs inside and its gradients belong to it."""
        self.stack.append(self.stack[-1]._replace(kept=kept))
        self._note()
        try:
            yield
        finally:
            self.stack.pop()
            self._note()

    def _note(self) -> None:
        number = torch._C._autograd._get_sequence_nr()
        if self.numbers[-1] == number:
            self.places[-1] = self.stack[-1]
        else:
            self.numbers.append(number)
            self.places.append(self.stack[-1])

    def _entered(self, module: nn.Module, _inputs: Any) -> None:
        if module not in self.names:
            for name, child in module.named_modules(prefix=type(module).__name__):
                self.names.setdefault(child, name)
        is_overhead = self.stack[-1].is_overhead or bool(getattr(type(module), "is_overhead", False))
        self.stack.append(Place(self.names[module], is_overhead))
        self._note()

    def _left(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self.stack.pop()
        self._note()

    def __enter__(self) -> Layers:
        modules = torch.nn.modules.module
        self.hooks = (
            modules.register_module_forward_pre_hook(self._entered),
            modules.register_module_forward_hook(self._left, always_call=True),
        )
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()
