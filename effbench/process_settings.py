"""Settings that a whole process shares, which a plugin may change by accident: read, compared and put back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _device


def _set_threads_for_children(count: str | None) -> None:
    os.environ.pop("OMP_NUM_THREADS", None)
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = count


# The device is None where none was set: to set one, the CPU too, installs a mode that keeps attention off its fast path
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (lambda: _device.CURRENT_DEVICE, torch.set_default_device),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "the fast path of attention": (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    "cuDNN's benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda on: setattr(torch.backends.cudnn, "benchmark", on),
    ),
    "the folder": (os.getcwd, os.chdir),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "OMP_NUM_THREADS": (lambda: os.environ.get("OMP_NUM_THREADS"), _set_threads_for_children),
}


def process_settings() -> dict[str, Any]:
    """The settings' values by name."""
    return {name: read() for name, (read, _) in SETTINGS.items()}


def restored(before: dict[str, Any]) -> list[str]:
    """Put back what is no longer as it was; what had changed, in words."""
    after = process_settings()
    changed = [name for name in before if before[name] != after[name]]
    for name in changed:
        SETTINGS[name][1](before[name])
    return [f"{name} from {before[name]} to {after[name]}" for name in changed]
