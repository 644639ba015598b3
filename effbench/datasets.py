"""Where data come from: the user's copy, or the embedded stand-in; and whether a copy is sound."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effbench.errors import DataNotFound, EffbenchError
from effbench.task import Data, DataRequest, Example, Task

Progress = Callable[[str, int, int], None]


def silent(description: str, done: int, total: int) -> None:
    """The progress of those who do not look."""


@dataclass(frozen=True)
class Resolved:
    """A task with its data.

    Args:
        source: the task whose data they are: the task itself, or its stand-in.
        stood_in: True where no real copy was found and the embedded data stand in.
        looked: then the message that names the places looked at and the way to get the real data, for the banner.
    """

    task: Task
    data: Data
    source: Task
    stood_in: bool = False
    looked: str = ""

    @property
    def recommended(self) -> dict[str, Any]:
        """Protocol values for these data where the user says nothing; how a task writes is apart from them."""
        return {name: value for name, value in self.source.recommended.items() if name != "captioning"}


@dataclass
class CheckReport:
    """What `check` saw; `problems` is empty for a sound copy."""

    name: str
    origin: str
    images: dict[str, int]
    captions: dict[str, int]
    per_image: dict[int, int]
    notes: list[str]
    problems: list[str] = field(default_factory=list)
    text: str = "captions"

    def lines(self) -> list[str]:
        """The report as plain lines."""
        counts = [f"{split}: {self.images[split]} images, {self.captions[split]} {self.text}" for split in self.images]
        spread = ", ".join(f"{images} with {captions}" for captions, images in sorted(self.per_image.items()))
        verdict = f"{len(self.problems)} problems" if self.problems else "sound"
        return [
            f"{self.name} in {self.origin}" if self.origin else self.name,
            *counts,
            f"images by number of {self.text.split()[0]}: {spread}",
            *(f"note: {note}" for note in self.notes),
            *(f"problem: {problem}" for problem in self.problems),
            verdict,
        ]


def cache_dir() -> Path:
    """Folder for what effbench keeps between runs: EFFBENCH_CACHE, else the user's cache folder. It need not exist."""
    import platformdirs

    named = os.environ.get("EFFBENCH_CACHE")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("effbench")


def cannot_write(path: Path, error: OSError) -> EffbenchError:
    """The error to raise where the disk is full, read-only or out of quota."""
    return EffbenchError(
        f"cannot write {path}: {error.strerror or error}",
        "make room there, or set EFFBENCH_CACHE to a folder on another disk",
    )


def resolve(task_name: str, where: str | Path | None = None, progress: Progress = silent) -> Resolved:
    """The task of that name with its data.

    Args:
        where: None for the usual places and, where there is no copy, the task's stand-in; "real" for the usual
            places only; the stand-in's name for its data; else the path of a copy.

    Raises:
        UsageError: there is no such task.
        DataNotFound: there is no copy, and nothing may stand in.
        InvalidError: the copy is damaged.
    """
    from effbench.registry import tasks

    task = tasks.get(task_name)()
    stand_in = tasks.get(task.stand_in)() if task.stand_in else None
    if stand_in and where is not None and where in (task.stand_in, stand_in.embedded):
        return Resolved(task, stand_in.load(DataRequest(progress=progress)), stand_in)
    if where not in (None, "real") and (stand_in or where not in (task_name, task.embedded)):
        return Resolved(task, task.load(DataRequest(Path(where), progress)), task)
    try:
        return Resolved(task, task.load(DataRequest(progress=progress)), task)
    except DataNotFound as missing:
        if where == "real" or stand_in is None:
            raise
        data = stand_in.load(DataRequest(progress=progress))
        return Resolved(task, data, stand_in, stood_in=True, looked=f"{missing}. {missing.hint}")


def check(data: Data, progress: Progress = silent, expected: dict[str, int] | None = None) -> CheckReport:
    """Whether a copy is sound: counts, splits that share no image, captions, and every image decoded.

    Args:
        expected: images by split in a complete copy; None where no count is wrong.
    """
    report = CheckReport(
        data.name,
        data.origin,
        images=data.sizes(),
        captions={split: sum(len(e.captions) for e in examples) for split, examples in data.splits.items()},
        per_image=dict(Counter(len(e.captions) for examples in data.splits.values() for e in examples)),
        notes=list(data.notes),
    )
    for split, count in (expected or {}).items():
        if report.images.get(split, 0) != count:
            report.problems.append(f"{split} has {report.images.get(split, 0)} images, a complete copy has {count}")
    examples = [example for split in data.splits.values() for example in split]
    report.problems += [
        f"{name}: in the splits {count} times"
        for name, count in Counter(e.name for e in examples if e.name).items()
        if count > 1
    ]
    report.problems += [f"{e.name}: no captions" for e in examples if not e.captions]
    if any(e.questions for e in examples):
        report.text = "questions with an answer each"
        report.problems += [
            f"{e.name}: {len(e.questions)} questions and {len(e.captions)} answers"
            for e in examples
            if len(e.questions) != len(e.captions)
        ]
    # decoding releases the interpreter lock, so threads do
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for done, problem in enumerate(pool.map(_problem, examples), start=1):
            progress("checking images", done, len(examples))
            report.problems += [problem] if problem else []
    return report


def _problem(example: Example) -> str:
    """Why the example's image cannot be used, or an empty string."""
    from effbench.pixels import open_image

    try:
        open_image(example)
    except EffbenchError as error:
        return str(error)
    return ""
