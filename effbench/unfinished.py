"""Runs that were started and left no record yet: under way, or interrupted and ready to go on. Never imports torch.

<root>/.partial/<digest>/checkpoint.pt   where the experiment stands (effbench.checkpoint)
<root>/.partial/<digest>/lock            held while it runs
<root>/.partial/<digest>/about.json      what it is
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_BYTES = 2**20
MOST = 1000  # folders that are looked at


class About(BaseModel):
    """What an unfinished run is; the file may have been put there by anybody."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = Field("", max_length=4000)
    data: str = Field("", max_length=4000)
    backbone: str = Field("", max_length=4000)
    arms: tuple[str, ...] = Field((), max_length=10_000)
    command: str = Field("", max_length=100_000)


class Unfinished(BaseModel):
    """An unfinished run.

    Attributes:
        state: `running`, `interrupted`, or `unfinished` where the system does not say whether it runs.
        saved: when it was last saved; None where nothing is kept yet, so that it would start again.
        about: None where it is not known (damaged, or of an effbench that did not write it).
    """

    digest: str
    state: str
    saved: datetime | None
    about: About | None


def note(folder: Path, about: About) -> None:
    """Write down what a run is, in its folder of checkpoints; where that fails the run goes on without."""
    try:
        part = folder / "about.part"
        part.write_text(about.model_dump_json(indent=1), encoding="utf-8")
        part.replace(folder / "about.json")
    except OSError:
        pass


def runs(root: Path) -> list[Unfinished]:
    """The unfinished runs of a leaderboard's folder, by when they were last saved; links are not followed."""
    folder = Path(root) / ".partial"
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        found = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    held = _held()
    listed = [_unfinished(folder / name, held) for name in found[:MOST]]
    return sorted(listed, key=lambda run: (run.saved or datetime.max.replace(tzinfo=UTC), run.digest))


def _unfinished(folder: Path, held: set[int] | None) -> Unfinished:
    state = "unfinished"
    if held is not None:
        lock = _stat(folder / "lock")
        state = "running" if lock and lock.st_ino in held else "interrupted"
    saved = _stat(folder / "checkpoint.pt")
    when = datetime.fromtimestamp(saved.st_mtime, UTC) if saved else None
    return Unfinished(digest=folder.name, state=state, saved=when, about=_about(folder / "about.json"))


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _about(path: Path) -> About | None:
    try:
        # a plain open would hang on a named pipe
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
            return About.model_validate_json(file.read(MAX_BYTES))
    except (OSError, ValidationError):
        return None


def _held() -> set[int] | None:
    """Inodes of the files that some process has locked; None where the system does not say.

    To try the lock itself would make a run fail that starts at this moment.
    """
    try:
        lines = Path("/proc/locks").read_text().splitlines()
        return {int(part.rpartition(":")[2]) for line in lines for part in line.split() if part.count(":") == 2}
    except (OSError, ValueError):
        return None
