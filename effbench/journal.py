"""Which phases of an experiment are done: what an interrupted run goes on from."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from effbench.checkpoint import Checkpoint
from effbench.errors import UsageError
from effbench.lockstep import Partial

if TYPE_CHECKING:
    from effbench.experiment import Experiment


class Journal:
    """Which phases of an experiment are done, and where the one under way stands."""

    def __init__(self, checkpoint: Checkpoint, experiment: Experiment, fresh: bool) -> None:
        self.checkpoint = checkpoint
        self.setting = experiment.setting
        self.threads = experiment.protocol.threads
        self.started = time.monotonic()
        state = None if fresh else checkpoint.load()
        if state and state["threads"] != self.threads:
            raise UsageError(
                f"an interrupted run of this experiment used {state['threads']} threads, this one has {self.threads}",
                f"resume it with --threads {state['threads']}, or start again with --fresh",
            )
        self.done: dict[str, Partial] = state["done"] if state else {}
        self.partial: dict[str, Partial] = state["partial"] if state else {}
        self.before: float = state["wall_time"] if state else 0.0
        self.resumed: int = state["resumed"] + 1 if state else 0
        if state:
            self.setting.rows[:] = state["rows"]
            self.setting.seconds.update(state["seconds"])
            last = next(reversed(self.done), "its first steps")
            experiment.live.note(f"resuming an interrupted run after {last}")

    def phase(self, name: str, work: Any) -> Partial:
        """The result of a phase; it is run unless it was finished before."""
        if name not in self.done:

            def save(state: Any) -> None:
                if self.checkpoint.due():
                    begin = time.monotonic()
                    self._write({name: state()})
                    self.setting.seconds["other"] += time.monotonic() - begin

            self.done[name] = work(self.partial.get(name), save)
            self._write({})
        return self.done[name]

    def _write(self, partial: dict[str, Partial]) -> None:
        wall_time = self.before + time.monotonic() - self.started
        state = dict(done=self.done, partial=partial, rows=self.setting.rows, seconds=self.setting.seconds)
        self.checkpoint.save(state | dict(threads=self.threads, wall_time=wall_time, resumed=self.resumed))
