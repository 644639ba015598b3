"""DeepSpeed as the engine: ZeRO shards gradients, optimiser state and weights over processes. CPU, float32, gloo.

ZeRO: arXiv 1910.02054. The optimiser is torch's own AdamW (what DeepSpeed calls `torch_adam`), the very one of the
plain engine, and nothing of DeepSpeed is compiled; so both engines train the same weights.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as torch_distributed
from torch.overrides import TorchFunctionMode

from effbench import distributed
from effbench.engine import optimiser
from effbench.records import Protocol

Batch = dict[str, Tensor]


class DeepSpeed:
    """An arm under DeepSpeed. Each process takes its part of the batch; gradients are averaged over them."""

    def __init__(self, model: nn.Module, protocol: Protocol) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it logs to stdout, where results go
        deepspeed.ops.__compatible_ops__ = {}  # it would compile a collective of its own for a minute; gloo does it
        distributed.join()
        # with the group's own patience: DeepSpeed's groups give up on a process that is late by half an hour
        torch_distributed.barrier()
        self.model = model
        self.sharded = protocol.zero_stage == 3
        self.gather = deepspeed.zero.GatheredParameters
        self.optimiser = optimiser(model, protocol)
        with _BytesOfScalars():
            self.engine, *_ = deepspeed.initialize(
                model=_Root(model), optimizer=self.optimiser, config=configuration(protocol)
            )

    def loss(self, compute: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Tensor:
        with distributed.shared(batch) as part:
            return self.engine(compute, part)

    def value(self, loss: Tensor) -> float:
        total = loss.detach().clone()
        torch_distributed.all_reduce(total)
        return total.item() / torch_distributed.get_world_size()

    def whole(self) -> AbstractContextManager[Any]:
        return self.gather(list(self.model.parameters())) if self.sharded else nullcontext()

    def set_lr(self, lr: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = lr

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        self.engine.step()  # and forgets the gradients

    def state_dict(self) -> dict[str, Any]:
        if self.sharded:  # torch's optimiser holds the shards only while it steps
            return self.engine.optimizer.state_dict()["optimizer_state_dict"]
        return self.optimiser.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.sharded:
            now = self.engine.optimizer.state_dict()
            self.engine.optimizer.load_state_dict([now | dict(optimizer_state_dict=state)])
        else:
            self.optimiser.load_state_dict(state)


def configuration(protocol: Protocol) -> dict[str, Any]:
    """What DeepSpeed is told."""
    return dict(
        train_micro_batch_size_per_gpu=max(1, protocol.batch_size // protocol.processes),
        gradient_accumulation_steps=1,
        gradient_clipping=0.0,  # its default is 1
        zero_optimization=dict(stage=protocol.zero_stage),
    )


class _Root(nn.Module):
    """The module that DeepSpeed's forward enters.

    Under ZeRO-3 a weight is gathered when the module that owns it is entered, or when it is touched while the root is.
    A task's loss calls `model.embed_images` and its like, not the model: so the root is a module around it, and what
    the model itself owns (the temperature) is found when it is touched.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Tensor:
        return compute(self.model, batch)


class _BytesOfScalars(TorchFunctionMode):
    """DeepSpeed 0.19 broadcasts parameters as bytes, which torch cannot give of a scalar such as CLIP's logit scale."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.view and args[1:] == (torch.uint8,) and args[0].ndim == 0:
            args = (args[0].view(1), torch.uint8)
        return func(*args, **(kwargs or {}))
