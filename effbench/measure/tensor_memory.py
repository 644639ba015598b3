"""Peak of all live tensors together, and what they are. Exact on the CPU: torch's allocator reports every block.

What lives before the first step is counted storage by storage; from there on torch.profiler's memory events give each
block that the allocator hands out and takes back, workspaces inside of operations included. (A dispatch mode would miss
those, and would switch compiled arms off.) What a library allocates behind torch's back, e.g. oneDNN, shows in the
operating system's figure only.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

STEPS = 2  # Adam's state is there from the second step on
MARK = "effbench: end of step"


@dataclass(frozen=True)
class Step:
    """An arm that was built to have its memory measured.

    Args:
        run: takes one step.
        model: whose weights and gradients they are.
        optimiser: of a training step; None for a test step.
    """

    run: Callable[[], object]
    model: nn.Module
    optimiser: torch.optim.Optimizer | None = None


@dataclass
class _Block:
    size: int
    born: int
    died: float = math.inf
    kind: str = ""


def storages(tensors: Iterable[Any]) -> dict[int, torch.UntypedStorage]:
    """The storages behind tensors, by identity; a quantised tensor stands for those that it is made of."""
    found = (t.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor) for t in plain(tensor))
    return {storage._cdata: storage for storage in found}


def weights(model: nn.Module) -> list[Any]:
    """Parameters, buffers and what else a state dict holds, e.g. packed quantised weights; some of it twice."""
    return [*model.parameters(), *model.buffers(), *tree_leaves(model.state_dict())]


def held(step: Step) -> dict[str, dict[int, torch.UntypedStorage]]:
    """Storages of the gradients and of the optimiser's state, as they are now."""
    gradients = [p.grad for p in step.model.parameters() if p.grad is not None]
    state = tree_leaves(list(step.optimiser.state.values())) if step.optimiser else []
    return dict(gradients=storages(gradients), optimiser=storages(state))


def living() -> dict[int, torch.UntypedStorage]:
    """Storages of all tensors on the CPU that Python knows of."""
    gc.collect()  # what building left in reference cycles is no longer the arm's
    # type(o), not isinstance: some libraries' lazy objects import half a framework when asked for their class
    tensors = (o for o in gc.get_objects() if issubclass(type(o), Tensor))
    return storages(t for t in tensors if t.device.type == "cpu" and t.layout == torch.strided)


def tensor_peak(
    step: Step, weights: int, before: dict[int, torch.UntypedStorage], then: Callable[[], None]
) -> dict[str, int | None]:
    """Take two steps; the most bytes that tensors held together in them.

    Args:
        weights: bytes of the model's weights; what else is alive now is found here.
        before: `living()` before the arm was built: not the arm's.
        then: called right after the steps, before their account is made up.

    Returns:
        "tensor_peak" and, of it, "gradients", "optimiser" and "activations" (the rest, the batch included).
    """
    known = before.keys() | storages([*step.model.parameters(), *step.model.buffers()]).keys()
    base = weights + sum(storage.nbytes() for key, storage in living().items() if key not in known)
    seen = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(STEPS):
            step.run()
            seen.append({kind: [s.data_ptr() for s in found.values()] for kind, found in held(step).items()})
            with record_function(MARK):
                pass
        then()
    growth, kinds = _peak(_events(profiler), seen)
    trains = step.optimiser is not None
    return dict(
        tensor_peak=base + growth,
        gradients=kinds["gradients"] if trains else None,
        optimiser=kinds["optimiser"] if trains else None,
        activations=base + growth - weights - sum(kinds.values()),
    )


def _events(profiler: profile) -> list[tuple[int, int]]:
    """(address, bytes) of each block handed out, negative bytes where it was taken back, and (0, 0) after a step."""
    found, nodes = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.name == MARK:
            found.append((node.start_time_ns, 0, 0))
        elif node.name == "[memory]" and node.extra_fields.device.type == "cpu":
            found.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda event: event[0])]


def _peak(events: list[tuple[int, int]], seen: list[dict[str, list[int]]]) -> tuple[int, dict[str, int]]:
    """Peak of the running total, and the bytes of each kind of block that lived then.

    Args:
        seen: after each step, the addresses of each kind.
    """
    blocks: list[_Block] = []
    live: dict[int, _Block] = {}
    total = peak = moment = steps = 0
    for now, (address, size) in enumerate(events):
        if size > 0:
            live[address] = _Block(size, now)
            blocks.append(live[address])
        elif size < 0 and address in live:
            live.pop(address).died = now
        elif not address:
            for kind, addresses in seen[steps].items():
                for place in addresses:
                    if place in live:
                        live[place].kind = kind
            steps += 1
        total += size
        if total > peak:
            peak, moment = total, now
    then = [block for block in blocks if block.born <= moment < block.died]
    return peak, {kind: sum(b.size for b in then if b.kind == kind) for kind in ("gradients", "optimiser")}


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a quantised tensor is made of; any other is itself."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from plain(getattr(tensor, name))
    else:
        yield tensor
