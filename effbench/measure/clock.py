"""The clock: seconds of a step with the device synchronised on both sides, and its split into parts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from effbench.errors import InvalidError

Result = TypeVar("Result")

_OFF = nullcontext()
_recorder: _Recorder | None = None


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

    @contextmanager
    def spans(self) -> Iterator[dict[str, float]]:
        """Record the spans entered inside; seconds by name, each without the spans nested in it, so that they add up.

            with clock.spans() as seconds:
                step()          # enters span("image_tower"), span("backward"), ...

        On CUDA every border of a span synchronises: split steps apart from those whose total is reported.
        """
        global _recorder
        outer, _recorder = _recorder, _Recorder(self)
        try:
            yield _recorder.seconds
        finally:
            _recorder = outer


def elapsed(start: float, end: float) -> float:
    """Seconds from start to end.

    Raises:
        InvalidError: the clock stepped backwards.
    """
    if end < start:
        raise InvalidError(f"the clock stepped back by {start - end:.6f} s", "run again with nothing setting the time")
    return end - start


def span(name: str) -> Any:
    """A context manager for one part of a step (image_tower, text_tower, overhead, head, backward, optimiser).

    Free where nobody records (well below 1 us); see `Clock.spans`.
    """
    return _OFF if _recorder is None else _recorder.span(name)


class _Recorder:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self.nested = [0.0]

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.nested.append(0.0)
        start = self.clock.now()
        try:
            yield
        finally:
            total = elapsed(start, self.clock.now())
            self.seconds[name] = self.seconds.get(name, 0.0) + total - self.nested.pop()
            self.nested[-1] += total
