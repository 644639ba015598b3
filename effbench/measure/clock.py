"""The clock: seconds of a step with the device synchronised on both sides, and marks within it that cost no wait."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

from effbench.errors import InvalidError

Result = TypeVar("Result")


class Clock:
    """Times steps on a device.

    On the CPU a mark is a reading of the timer. On CUDA it is an event in the device's queue, so that marking parts of
    a step stalls nothing; seconds between two marks can be had once the device has passed both.

    Args:
        device: "cpu", "cuda" or "cuda:1".
        timer: seconds, monotonic; time.perf_counter unless a test needs another.
    """

    def __init__(self, device: str = "cpu", timer: Callable[[], float] = time.perf_counter) -> None:
        self.device = str(device)
        self.timer = timer

    @property
    def uses_events(self) -> bool:
        return self.device.startswith("cuda")

    def now(self) -> float:
        """Seconds at which everything queued on the device is done.

        Raises:
            InvalidError: the clock gave no finite number.
        """
        self._synchronise()
        return self._read()

    def mark(self) -> Any:
        """A point in the device's work, for `between`."""
        if not self.uses_events:
            return self._read()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to a later one; on CUDA after a synchronisation.

        Raises:
            InvalidError: the clock stepped backwards.
        """
        return start.elapsed_time(end) / 1000 if self.uses_events else elapsed(start, end)

    def timed(self, function: Callable[[], Result]) -> tuple[Result, float]:
        """The result of `function()` and the seconds that it took, the device synchronised before and after.

        Python's garbage collector waits until it is over: it would come round at the same place of every few steps.

        Raises:
            InvalidError: the clock stepped backwards or is not finite.
        """
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._synchronise()
            start = self.mark()
            result = function()
            end = self.mark()
            self._synchronise()
        finally:
            if collecting:
                gc.enable()
        return result, self.between(start, end)

    def _read(self) -> float:
        seconds = self.timer()
        if not math.isfinite(seconds):
            raise InvalidError(
                f"the clock reads {seconds}", "run again; if it persists, this machine's clock is broken"
            )
        return seconds

    def _synchronise(self) -> None:
        if self.uses_events:
            import torch

            torch.cuda.synchronize(self.device)


def elapsed(start: float, end: float) -> float:
    """Seconds from start to end.

    Raises:
        InvalidError: the clock stepped backwards.
    """
    if end < start:
        raise InvalidError(f"the clock stepped back by {start - end:.6f} s", "run again with nothing setting the time")
    return end - start
