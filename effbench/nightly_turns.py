"""One set of processes (base, head and a twin of base) that go through all cells, taking turns. No torch here.

One step at a time, and before each an idle gap: OpenMP's threads spin for a while after their step, and those of one
process would slow the other down (10 to 15 % where this was measured).
"""

from __future__ import annotations

import json
import math
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effbench.errors import InvalidError
from effbench.nightly_cells import Cell
from effbench.nightly_versions import Version

GAP = 0.02  # seconds of idling before each step
START_S, STEP_S = 600.0, 120.0  # after which a worker that says nothing is given up
MOST_BYTES = 2**20  # of an answer
RUN_IT = "run one of the cells in that version: effbench run --task TASK --backbone BACKBONE --method METHOD"
WORKER = Path(__file__).with_name("nightly_worker.py")
#: turns with a twin: all six orders, each followed by its reverse
ORDERS = ((0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1), (0, 2, 1), (1, 2, 0))


def command(version: Version) -> list[str]:
    """-P: the script's own folder holds effbench's files, which must not be importable under their bare names."""
    return [sys.executable, "-P", str(WORKER), str(version.home), *version.packages]


class Worker:
    """A process that runs one version's cells.

    Args:
        role: base, head or twin; for messages.
        line: its command line.
    """

    def __init__(self, role: str, line: Sequence[str], surroundings: dict[str, str]) -> None:
        self.role = role
        self.errors = tempfile.TemporaryFile()
        # a session of its own: Ctrl-C is for us, and we close its stdin
        self.process = subprocess.Popen(
            line,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=surroundings,
            start_new_session=True,
            bufsize=0,
        )
        self.rest = b""

    def ask(self, **request: Any) -> None:
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError:
            raise InvalidError(f"the worker of {self.role} ended: {self._last_words()}", RUN_IT) from None

    def answer(self, timeout: float) -> dict[str, Any]:
        """The answer to the request before.

        Raises:
            InvalidError: it ended, says nothing for `timeout` seconds, which ends it, or says what cannot be read.
        """
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.rest:
                if not waiting.select(max(0.0, deadline - time.monotonic())):
                    self.process.kill()  # a late answer would be taken for that of the next request
                    self.process.wait()
                    raise InvalidError(f"the worker of {self.role} said nothing for {timeout:g} s", "try fewer cells")
                part = os.read(self.process.stdout.fileno(), 65536)
                self.rest += part
                if not part:
                    raise InvalidError(f"the worker of {self.role} ended: {self._last_words()}", RUN_IT)
                if len(self.rest) > MOST_BYTES:
                    raise InvalidError(f"the worker of {self.role} says more than {MOST_BYTES} bytes at once")
        line, _, self.rest = self.rest.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InvalidError(f"the worker of {self.role} says what is no answer: {line[:100]!r}")
        return found

    def step(self, number: int, turn: int) -> float:
        """Seconds of a step.

        Raises:
            InvalidError: it failed, or the time is impossible.
        """
        self.ask(do="step", number=number, turn=turn)
        found = self.answer(STEP_S)
        if "error" in found:
            raise InvalidError(f"{self.role}: {found['error']}")
        seconds = found.get("seconds")
        if not isinstance(seconds, float) or not math.isfinite(seconds) or seconds <= 0:
            raise InvalidError(f"{self.role}: a step of {seconds!r} s is impossible", "check the machine's clock")
        return seconds

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            stream.close()

    def _last_words(self) -> str:
        self.process.wait(10)
        self.errors.seek(0)
        lines = self.errors.read()[-2000:].decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else f"exit code {self.process.returncode}"


@dataclass
class Measured:
    """One cell in one set of processes.

    Attributes:
        error: why it could not be measured; empty where it was.
        envelope: of base; what must be equal between versions.
        seconds: by role, one entry per turn; "twin" is missing where none took part.
    """

    error: str = ""
    envelope: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)


def measure(
    workers: Sequence[Worker],
    cells: Sequence[Cell],
    twins: Sequence[bool],
    turns: int,
    seconds: float,
    shift: int,
    setting: dict[str, Any],
    timed: Callable[[int], None] = lambda cells: None,
    gap: float = GAP,
) -> list[Measured]:
    """Take all cells through one set of fresh processes, and end these.

    Args:
        workers: base, head, and a twin of base where one takes part in any cell.
        twins: whether it takes part, by cell.
        turns: of each cell, at most.
        seconds: for everything; each cell gets its share of what is left when it begins.
        shift: which order is the first; another one for each set of processes.
        setting: seed of weights and inputs, device, threads.
        timed: told how many cells are done.

    Raises:
        InvalidError: a process did not start.
    """
    begun = time.monotonic()
    try:
        for worker in workers:
            worker.ask(do="start", threads=setting["threads"])
        for worker in workers:
            found = worker.answer(START_S)
            if "error" in found:
                raise InvalidError(f"{worker.role} cannot run: {found['error']}", "choose another version")
        results = []
        due = False
        for number, (cell, twin) in enumerate(zip(cells, twins, strict=True)):
            due = due or twin
            results.append(_built(workers if due else workers[:2], number, cell, setting))
            due = due and bool(results[-1].error)  # where a cell cannot run, its twin goes to the next one
        for number, result in enumerate(results):
            if not result.error:
                left = sum(not each.error for each in results[number:])
                until = time.monotonic() + (begun + seconds - time.monotonic()) / left
                _take_turns(workers[: len(result.seconds)], number, result, turns, until, shift, gap)
            timed(number + 1)
        return results
    finally:
        for worker in workers:
            worker.end()


def _built(workers: Sequence[Worker], number: int, cell: Cell, setting: dict[str, Any]) -> Measured:
    """Build a cell in each process, all at once; the envelopes must agree."""
    for worker in workers:
        worker.ask(do="build", number=number, cell=cell.model_dump(), **setting)
    answers = {worker.role: worker.answer(START_S) for worker in workers}
    for role, found in answers.items():
        if "error" in found:
            return Measured(f"{role} cannot run it: {found['error']}")
        if not isinstance(found.get("envelope"), dict):
            return Measured(f"{role} gives no envelope")
    base = answers["base"]["envelope"]
    for role, found in answers.items():
        for key in sorted({*base, *found["envelope"]}):
            was, now = base.get(key), found["envelope"].get(key)
            if was != now:
                return Measured(f"another envelope: {key} is {was} in base and {now} in {role}")
    return Measured(envelope=base, seconds={role: [] for role in answers})


def _take_turns(
    workers: Sequence[Worker], number: int, result: Measured, turns: int, until: float, shift: int, gap: float
) -> None:
    """Turns until there are enough, or `until` is over; two by two, of which the second goes the other way round."""
    orders = ORDERS if len(workers) == 3 else ((0, 1), (1, 0))
    for turn in range(turns):
        if turn % 2 == 0 and time.monotonic() >= until:
            return
        taken = {}
        for place in orders[(turn + 2 * shift) % len(orders)]:
            time.sleep(gap)
            worker = workers[place]
            try:
                taken[worker.role] = worker.step(number, turn)
            except InvalidError as error:
                if worker.process.poll() is not None:
                    raise
                result.error = str(error)
                return
        for role, spent in taken.items():
            result.seconds[role].append(spent)
