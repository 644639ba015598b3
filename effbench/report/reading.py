"""What places each record of a folder, read by two processes where there are many records."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from effbench import store
from effbench.errors import InvalidError
from effbench.report.markdown import clean
from effbench.report.standings import Brief, Group, arrange, brief

CHUNK = 250  # records that a process reads at a time
MANY = 4000  # records from which on a second process pays
PROCESSES = 2


class Found(NamedTuple):
    """A record of a folder: what places it, or why it cannot be read."""

    name: str
    brief: Brief | None
    fingerprint: bytes = b""
    problem: str = ""


def groups(root: Path, problems: list[str]) -> list[Group]:
    """`standings.arrange` of the records under `root/records`, none of which is kept; like `store.each`.

    Args:
        problems: gets one sentence for each record that is left out.
    """
    names = store.names(root)
    seen: dict[bytes, list[str]] = defaultdict(list)
    found = arrange(_briefs(root, names, seen, problems))
    left_out = store.doubled(root, seen)
    problems += left_out.values()
    if any(first in left_out for first, *_ in seen.values()):
        # it was placed before the record was met that contradicts it: once more without both
        found = arrange(_briefs(root, [name for name in names if name not in left_out], defaultdict(list), []))
    return found


def _briefs(root: Path, names: list[str], seen: dict[bytes, list[str]], problems: list[str]) -> Iterator[Brief]:
    """What places the records of these names; of those with one fingerprint the first.

    Args:
        seen: gets the names by fingerprint. problems: gets one sentence for each that cannot be read.
    """
    chunks = [(str(root), names[at : at + CHUNK]) for at in range(0, len(names), CHUNK)]
    with _pool(len(names)) as pool:
        for found in pool.imap(_read, chunks) if pool else map(_read, chunks):
            for each in found:
                if each.brief is None:
                    problems.append(each.problem)
                    continue
                same = seen[each.fingerprint]
                same.append(each.name)
                if len(same) == 1:
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
            found.append(Found(name, None, problem=clean(str(error), None)))
        else:
            found.append(Found(name, brief(record, known), store.fingerprint(record)))
    return found
