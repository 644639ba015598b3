"""Several processes that share each training batch: who they are, and what they exchange.

A launcher (`torchrun`, `deepspeed`) starts them and says so in the environment; alone there is nothing to exchange.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as torch_distributed

#: the first process tests and writes between two seeds while the others wait
PATIENCE = timedelta(days=1)
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_sharing = 1  # processes that share the batch at hand: a process may also compute a loss on its own, e.g. for FLOPs


def launched() -> int:
    """Number of processes that a launcher started together; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in VARIABLES) else 1


def rank() -> int:
    """Which of them this process is, from 0; the first one writes."""
    return int(os.environ["RANK"]) if launched() > 1 else 0


def join() -> None:
    """Join the process group of the launcher; alone, make one of this process, with no port and no network."""
    if torch_distributed.is_initialized():
        return
    if launched() > 1:
        torch_distributed.init_process_group("gloo", timeout=PATIENCE)
    else:
        torch_distributed.init_process_group("gloo", store=torch_distributed.HashStore(), rank=0, world_size=1)


@contextmanager
def shared(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """This process's consecutive part of a batch; within the context `gathered` puts the parts together again.

    Args:
        batch: each entry (rows, ...), rows a multiple of the number of processes.
    """
    global _sharing
    _sharing = torch_distributed.get_world_size()
    try:
        yield {key: value.chunk(_sharing)[torch_distributed.get_rank()] for key, value in batch.items()}
    finally:
        _sharing = 1


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes that share a batch, in order, with gradients: a contrastive loss needs the whole batch.

    Every process computes the same loss from them, and the engine averages gradients over the processes. A row's
    gradient arises in its own process alone, so it is multiplied by their number; what every process holds (the
    temperature) is right as it is.

    Args:
        x: (rows, ...), of the same shape in every process.
    """
    number = _sharing
    if number == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(number)]
    torch_distributed.all_gather(parts, x.detach().contiguous())
    own = x.view_as(x)
    if own.requires_grad:
        own.register_hook(lambda gradient: number * gradient)
    parts[torch_distributed.get_rank()] = own
    return torch.cat(parts)
