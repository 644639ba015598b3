"""The clock: seconds of a step with the device synchronised on both sides."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

from effbench.errors import InvalidError

Result = TypeVar("Result")


class Clock:
    """Times steps on a device.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        timer: seconds, monotonic; time.perf_counter unless a test needs another.
    """

    def __init__(self, device: str = "cpu", timer: Callable[[], float] = time.perf_counter) -> None:
        self.device = str(device)
        self.timer = timer

    def now(self) -> float:
        """Seconds at which everything queued on the device is done.

        Raises:
            InvalidError: the clock gave no finite number.
        """
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self.device)
        seconds = self.timer()
        if not math.isfinite(seconds):
            raise InvalidError(
                f"the clock reads {seconds}", "run again; if it persists, this machine's clock is broken"
            )
        return seconds

    def timed(self, function: Callable[[], Result]) -> tuple[Result, float]:
        """The result of `function()` and the seconds that it took.

        Raises:
            InvalidError: the clock stepped backwards or is not finite.
        """
        start = self.now()
        result = function()
        return result, elapsed(start, self.now())


def elapsed(start: float, end: float) -> float:
    """Seconds from start to end.

    Raises:
        InvalidError: the clock stepped backwards.
    """
    if end < start:
        raise InvalidError(f"the clock stepped back by {start - end:.6f} s", "run again with nothing setting the time")
    return end - start
