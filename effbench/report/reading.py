"""What places each record of a folder, read by two processes where there are many records."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from effbench import store
from effbench.errors import InvalidError
from effbench.report.standings import Brief, brief

CHUNK = 250  # records that a process reads at a time
MANY = 4000  # records from which on a second process pays
PROCESSES = 2


class Found(NamedTuple):
    """A record of a folder: what places it, or why it cannot be read."""

    name: str
    brief: Brief | None
    fingerprint: bytes = b""
    problem: str = ""


def briefs(root: Path, problems: list[str]) -> Iterator[Brief]:
    """`standings.brief` of the records under `root/records`, none of which is kept; like `store.each`.

    Args:
        problems: gets one sentence for each record that is left out.
    """
    names = store.names(root)
    chunks = [(str(root), names[at : at + CHUNK]) for at in range(0, len(names), CHUNK)]
    seen: dict[bytes, str] = {}
    with _pool(len(names)) as pool:
        for found in pool.imap(_read, chunks) if pool else map(_read, chunks):
            for each in found:
                problem = each.problem or store.copied(root, each.name, each.fingerprint, seen)
                if problem:
                    problems.append(problem)
                else:
                    yield each.brief


def _pool(count: int):
    """Processes that share the reading; None where one does.

    They are forked, which is safe only in a process without threads: not after a run, which has loaded torch.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if count < MANY or cores < PROCESSES or "torch" in sys.modules:
        return nullcontext()
    return multiprocessing.get_context("fork").Pool(PROCESSES, _quiet)


def _quiet() -> None:
    """In a child: no handlers of the command line; it ends when its parent says so, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read(chunk: tuple[str, list[str]]) -> list[Found]:
    root, names = chunk
    found, known = [], {}
    for name in names:
        try:
            record = store.member(root, name)
        except InvalidError as error:
            found.append(Found(name, None, problem=str(error)))
        else:
            found.append(Found(name, brief(record, known), store.fingerprint(record)))
    return found
