"""How often each operation runs: what a wider layer leaves alone and an extra or unfused one does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def census(function: Callable[[], object]) -> dict[str, int]:
    """Operations that `function()` dispatches, by name without overload: `{"aten::addmm": 49, ...}`.

    Left out: views, which compute nothing. Composite operations are counted by their parts. The names are those of
    the installed torch, so only counts of equal versions can be compared.

    Args:
        function: called once, e.g. one test step; it may itself watch the dispatcher (`effbench.measure.kernels`).
    """
    mode = _Census()
    with mode:
        function()
    return dict(sorted(mode.counts.items()))


class _Census(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(each, Tensor) and each.__torch_dispatch__ is not Tensor.__torch_dispatch__ for each in types):
            return NotImplemented  # a quantised tensor takes itself apart, and its parts come by here
        plain = isinstance(func, torch._ops.OpOverload)
        if plain:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if not plain or not (func.is_view or func._schema.name == "aten::_unsafe_view"):
            self.counts[func._schema.name if plain else func.name()] += 1
        return func(*args, **kwargs)
