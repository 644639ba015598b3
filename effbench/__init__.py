"""effbench: does this efficiency method really make my model cheaper, and what does it cost in quality?

In Python, what the command line does: `effbench.apply(model, "token_merge:r=13")` edits a timm or OpenCLIP model,
`effbench.flops(model, *inputs)` counts it, `effbench.run([...], task=...)` returns the record of a comparison and
`effbench.load(path)` a pandas frame of results.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

# Imported here, not on use: this attribute would otherwise become the module of the same name.
from effbench.apply import apply

# torch warns of two classes of torchao whenever transformers, timm or OpenCLIP is imported beside it
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant() on Enum" not in record.msg)

__all__ = ["apply", "flops", "load", "run"]

_LAZY = {"flops": "effbench.measure.flops", "load": "effbench.store", "run": "effbench.start"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("effbench")
    raise AttributeError(f"module 'effbench' has no attribute {name!r}")
