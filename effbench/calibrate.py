"""What trials on this machine showed of the tool itself: false verdicts, coverage, power. Imports no torch.

    <cache>/calibration/<machine>-<threads>-threads.json         effbench.records.Calibration, for runs and reports
    <cache>/calibration/<machine>-<threads>-threads.<setting>.trials.jsonl   a line with the setting, one per trial

The trials themselves are measured by `effbench.trials`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from effbench import stats
from effbench.datasets import cache_dir, cannot_write
from effbench.records import Calibration, Finite, Seconds, Speedup, Text
from effbench.whole_file import whole_file

MAX_BYTES = 64 * 2**10  # of a calibration
LOADED_UNTIL = 0.03  # half-width to be reached beside a busy process
LEAST = 20  # A/A trials below which nothing is stored

Kind = Literal["same", "slower", "loaded"]


class Setting(BaseModel):
    """All that two trials must share to be counted together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device_model: Text
    threads: Annotated[int, Field(ge=1)]
    backbone: Text
    batch: Annotated[int, Field(ge=1)]
    pairs: Annotated[int, Field(ge=6)]
    slower: Annotated[float, Field(gt=0, lt=1)]
    until: Annotated[float, Field(gt=0, lt=1)]
    budget: Annotated[float, Field(gt=0)]
    effbench: Text = ""


class Trial(BaseModel):
    """Step seconds of both arms, pair by pair.

    `kind` is same (two identical arms), slower (the second has extra work) or loaded (identical arms beside a busy
    process). `extra` is what that work takes on its own, measured just before the trial, as a share of a step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    baseline: tuple[float, ...]
    arm: tuple[float, ...]
    seconds: Seconds = Field(description="of the whole trial, warm-up included")
    extra: Finite = 0.0

    @functools.cached_property
    def speedup(self) -> Speedup:
        return stats.speedup(self.baseline, self.arm)

    @property
    def verdict(self) -> str:
        return self.speedup.verdict


def path(device_model: str, threads: int, folder: Path | None = None) -> Path:
    """Where a machine's calibration is kept; `folder` stands in for the one in the cache."""
    name = re.sub(r"[^a-z0-9]+", "-", device_model.lower()).strip("-")[:80]
    return (folder or cache_dir() / "calibration") / f"{name}-{threads}-thread{'s' if threads > 1 else ''}.json"


def load(device_model: str, threads: int, folder: Path | None = None) -> Calibration | None:
    """The calibration of a machine; None where there is none, or none that can be read: then it is to be made anew."""
    try:
        with path(device_model, threads, folder).open("rb") as file:
            found = Calibration.model_validate_json(file.read(MAX_BYTES))
    except (OSError, ValidationError):
        return None
    return found if (found.device_model, found.threads) == (device_model, threads) else None


def store(calibration: Calibration, folder: Path | None = None) -> Path:
    """Write a calibration, all or nothing, over the one before.

    Raises:
        EffbenchError: it cannot be written.
    """
    final = path(calibration.device_model, calibration.threads, folder)
    _write(final, calibration.model_dump_json(indent=1) + "\n")
    return final


def summary(setting: Setting, trials: list[Trial]) -> Calibration:
    """The calibration that trials amount to; at least one of them is of identical arms."""
    same = [trial.speedup for trial in trials if trial.kind == "same"]
    slower = [trial for trial in trials if trial.kind == "slower"]
    held = [each.low is not None and each.low <= 1 <= each.high for each in same]
    return Calibration(
        created=datetime.now(UTC),
        device_model=setting.device_model,
        threads=setting.threads,
        backbone=setting.backbone,
        batch=setting.batch,
        pairs=setting.pairs,
        margin=stats.MARGIN,
        trials=len(same),
        noise_floor=float(np.percentile([abs(each.value - 1) for each in same], 95)),
        coverage=float(np.mean(held)),
        half_width=float(np.median([each.half_width for each in same])),
        verdicts=dict(Counter(each.verdict for each in same)),
        slower_by=float(np.median([trial.extra for trial in slower])) if slower else None,
        slower_trials=len(slower),
        slower_found=sum(trial.speedup.verdict == "SLOWER" for trial in slower),
        effbench=setting.effbench,
    )


class Log:
    """The trials of one calibration, on the disk as soon as they are measured.

    Args:
        setting: those of another one have a file of their own.
        fresh: drop what there is of this one.

    Raises:
        EffbenchError: the file cannot be written.
    """

    def __init__(self, setting: Setting, folder: Path | None = None, fresh: bool = False) -> None:
        self.setting = setting
        digest = hashlib.sha256(setting.model_dump_json().encode()).hexdigest()[:8]
        self.file = path(setting.device_model, setting.threads, folder).with_suffix(f".{digest}.trials.jsonl")
        self.trials = [] if fresh else self._kept(setting)
        lines = [setting.model_dump_json(), *(trial.model_dump_json() for trial in self.trials)]
        _write(self.file, "".join(f"{line}\n" for line in lines))

    def of(self, kind: Kind) -> list[Trial]:
        return [trial for trial in self.trials if trial.kind == kind]

    def count(self, kind: Kind) -> int:
        return len(self.of(kind))

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(trial.model_dump_json() + "\n")
        except OSError as error:
            raise cannot_write(self.file, error) from error

    def _kept(self, setting: Setting) -> list[Trial]:
        """Trials of this very setting that an interrupted calibration left; a line cut short ends them."""
        found = []
        try:
            with self.file.open(encoding="utf-8") as file:
                if json.loads(next(file)) != setting.model_dump(mode="json"):
                    return []
                for line in file:
                    found.append(Trial.model_validate_json(line))
        except (OSError, ValueError, StopIteration):  # pydantic's ValidationError is a ValueError
            pass
        return found


def _write(final: Path, text: str) -> None:
    try:
        with whole_file(final) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise cannot_write(final, error) from error
