"""How an arm's weights are updated: torch alone, or an engine that shards the work over processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any
from typing import Protocol as Interface

import torch
from torch import Tensor, nn

from effbench.errors import UsageError
from effbench.records import Protocol

Batch = dict[str, Tensor]


class Engine(Interface):
    """Updates what an arm trains. `loss`, `backward` and `step` are called in turn, once per batch."""

    def loss(self, compute: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Tensor:
        """The scalar `compute(model, batch)`; of a batch that processes share, each computes its part."""

    def value(self, loss: Tensor) -> float:
        """The loss as a number: the mean over the processes, where each has one of its own items."""

    def whole(self) -> AbstractContextManager[Any]:
        """While it lasts, the model's weights are all here, to be read; where they are sharded, all processes enter."""

    def set_lr(self, lr: float) -> None: ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, those of the step before forgotten."""

    def step(self) -> None:
        """One step of the optimiser."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Plain:
    """torch alone: AdamW on what is trained."""

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        self.model = model
        self.optimiser = optimiser(model, protocol)

    def loss(self, compute: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Tensor:
        return compute(self.model, batch)

    def value(self, loss: Tensor) -> float:
        return loss.item()

    def whole(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def set_lr(self, lr: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = lr

    def backward(self, loss: Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()

    def step(self) -> None:
        self.optimiser.step()

    def state_dict(self) -> dict[str, Any]:
        return self.optimiser.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state)


def groups(model: nn.Module, protocol: Protocol) -> list[dict[str, Any]]:
    """What is trained, as an optimiser's parameter groups; vectors and scalars are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = [
        dict(params=[p for p in trained if p.ndim > 1], weight_decay=protocol.weight_decay),
        dict(params=[p for p in trained if p.ndim <= 1], weight_decay=0.0),
    ]
    return [group for group in found if group["params"]]


def optimiser(model: nn.Module, protocol: Protocol) -> torch.optim.Optimizer:
    """AdamW on what is trained."""
    return torch.optim.AdamW(groups(model, protocol), lr=protocol.lr, fused=True)


def engine(model: nn.Module, protocol: Protocol) -> Engine:
    """The engine that the protocol names."""
    if protocol.engine == "deepspeed":
        from effbench.engine_deepspeed import DeepSpeed

        return DeepSpeed(model, protocol)
    return Plain(model, protocol)


def check(protocol: Protocol, images: int) -> None:
    """Refuse what the engine cannot do, before any work.

    Args:
        images: of the training split.

    Raises:
        UsageError: DeepSpeed is not installed or cannot train this; the plain engine is asked for what only it can.
    """
    number = protocol.processes
    if protocol.engine == "plain":
        if number > 1:
            raise UsageError(f"{number} processes were started, and --engine plain uses one", "add --engine deepspeed")
        if protocol.zero_stage:
            raise UsageError(f"--zero-stage {protocol.zero_stage} belongs to DeepSpeed", "add --engine deepspeed")
        return
    if find_spec("deepspeed") is None:
        raise UsageError("--engine deepspeed needs DeepSpeed", "pip install 'effbench[deepspeed]'")
    if torch.device(protocol.device).type != "cpu":
        raise UsageError(f"--engine deepspeed trains on the CPU, not on {protocol.device}", "add --device cpu")
    size = min(protocol.batch_size, images)
    if size % number:
        hint = f"--batch-size {size - size % number}" if size > number else "start fewer processes"
        raise UsageError(f"{number} processes cannot share a batch of {size} evenly", hint)
