"""Random state that is swapped in around an arm's step, so that no arm sees the draws of another."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed torch, numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def get_state() -> dict[str, Any]:
    """The state of all generators, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    state = dict(torch=torch.get_rng_state(), numpy=[name, torch.from_numpy(keys.astype(np.int64)), *rest])
    state["python"] = random.getstate()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_state(state: dict[str, Any]) -> None:
    """Put a state of `get_state` back."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def seeded(seed: int) -> dict[str, Any]:
    """The state that a seed gives; the outer state is untouched."""
    outer = get_state()
    seed_all(seed)
    state = get_state()
    set_state(outer)
    return state


@contextmanager
def swapped(holder: Any) -> Iterator[None]:
    """Run with `holder.random` as the random state and keep what it has become; the outer state is untouched."""
    outer = get_state()
    set_state(holder.random)
    try:
        yield
    finally:
        holder.random = get_state()
        set_state(outer)
