"""Where a step's time goes: the towers, the method's own work, backward pass and optimiser."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from effbench.measure.clock import Clock


class Split:
    """Marks the parts of one arm's steps. Hooks are in place only inside the context, which surrounds one timed step.

    A part within another (a method's scoring inside the tower) is taken off the outer one. What no part claims is the
    head: projection, similarity and loss.

    Args:
        parts: modules by name, e.g. "image" and "text"; their forward passes are timed. A module may name its part
            itself, step by step, with an attribute `part`, and with `rest` what follows it until the next part begins.
        model: its modules that are a method's overhead (`is_overhead`) make the part "overhead"; not those within a
            compiled module, where a hook would break the graph: there they are part of the tower.
    """

    def __init__(self, parts: dict[str, nn.Module], model: nn.Module, clock: Clock) -> None:
        self.clock = clock
        self.modules = list(parts.items())
        inside = {m for c in model.modules() if c._compiled_call_impl is not None for m in c.modules() if m is not c}
        own = [m for m in model.modules() if getattr(type(m), "is_overhead", False)]
        self.modules += [("overhead", m) for m in own if m not in inside]
        self.marks: list[tuple[str, Any]] = []
        self.open: list[str] = []

    def enter(self, name: str) -> None:
        """A part begins; the one around it waits."""
        self.open.append(name)
        self.marks.append((name, self.clock.mark()))

    def leave(self, rest: str = "head") -> None:
        """The innermost part ends, and the one around it goes on; where there is none, `rest` begins."""
        self.open.pop()
        self.marks.append((self.open[-1] if self.open else rest, self.clock.mark()))

    def __enter__(self) -> Split:
        self.marks, self.open = [], []
        self.undo = ExitStack()
        for name, module in self.modules:
            if module._compiled_call_impl is not None:
                self._around_compiled(name, module)
                continue
            before = module.register_forward_pre_hook(lambda m, *_, name=name: self.enter(getattr(m, "part", name)))
            after = module.register_forward_hook(lambda m, *_: self.leave(getattr(m, "rest", "head")), always_call=True)
            self.undo.callback(before.remove)
            self.undo.callback(after.remove)
        return self

    def _around_compiled(self, name: str, module: nn.Module) -> None:
        """Mark the calls of a module that is compiled whole: hooks would be traced, and a clock breaks the graph."""
        compiled = module._compiled_call_impl

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(name)
            try:
                return compiled(*args, **kwargs)
            finally:
                self.leave()

        module._compiled_call_impl = timed
        self.undo.callback(setattr, module, "_compiled_call_impl", compiled)

    def __exit__(self, *_: Any) -> None:
        self.undo.close()

    def seconds(self, total: float) -> dict[str, float]:
        """Seconds by part of the step that took `total`; what is left goes to what came last, so that they add up."""
        found: dict[str, float] = {"head": 0.0}
        for (name, start), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            found[name] = found.get(name, 0.0) + self.clock.between(start, end)
        last = self.marks[-1][0] if self.marks else "head"
        found[last] = max(0.0, total - sum(spent for name, spent in found.items() if name != last))
        return found
