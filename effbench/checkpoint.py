"""The checkpoint of a running experiment: one file, replaced atomically, read back without unpickling code."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import torch

from effbench.errors import EffbenchError


class Checkpoint:
    """Where an experiment stands. A step group lasts at least `every` seconds, and a hundred times what saving costs.

    Args:
        path: the file.
        every: seconds between two checkpoints.
    """

    def __init__(self, path: Path, every: float) -> None:
        self.path = path
        self.every = every
        self.cost = 0.0
        self.saved = time.monotonic()

    def due(self) -> bool:
        """Whether the step group is long enough to be saved."""
        return time.monotonic() - self.saved >= max(self.every, 100 * self.cost)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file; `state` holds tensors and plain values only.

        Raises:
            EffbenchError: the disk is full or the folder cannot be written; the last checkpoint stays valid.
        """
        start = time.monotonic()
        part = self.path.with_suffix(".part")
        try:
            with open(part, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except (OSError, RuntimeError) as error:  # torch reports a short write as RuntimeError
            part.unlink(missing_ok=True)
            full = getattr(error, "errno", None) == errno.ENOSPC or "enough" in str(error) or "file write" in str(error)
            reason = "the disk is full" if full else str(error).splitlines()[0]
            raise EffbenchError(
                f"the checkpoint {self.path} could not be written: {reason}",
                "free some space or choose another --out; the same command goes on from the last checkpoint",
            ) from error
        self.saved = time.monotonic()
        self.cost = self.saved - start

    def load(self) -> dict[str, Any] | None:
        """The last saved state; None where there is none or it is damaged (then the run starts again)."""
        if not self.path.exists():
            return None
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception:
            return None
