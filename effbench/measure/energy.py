"""Energy by the counters of the hardware: NVML on a GPU, RAPL on a CPU. Nothing is estimated where there is no counter.

RAPL is read from the kernel's files, as codecarbon does (which falls back to guesses from the processor's name, and
brings 17 packages). Each package is counted once: its cores lie inside of it, its DRAM beside it, and `psys` is the
whole platform, packages included. The counters move about every ms (RAPL) and every 20 to 100 ms (NVML).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from effbench.errors import EffbenchError
from effbench.measure import nvidia
from effbench.measure.machine import read

POWERCAP = Path("/sys/class/powercap")
LEAVE_OUT = "leave energy out of this run"


@dataclass
class Counter:
    """One counter of the hardware.

    Args:
        name: for messages.
        value: reads it.
        unit: joules per count.
        span: counts after which it starts again at 0; None where it never does.
    """

    name: str
    value: Callable[[], int]
    unit: float
    span: int | None = None
    last: int = field(init=False)
    total: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.last = self.value()

    def joules(self) -> float:
        now = self.value()
        grown = now - self.last
        if grown < 0 and self.span is not None:
            grown += self.span
        if grown < 0:
            raise EffbenchError(f"the energy counter {self.name} stepped back", LEAVE_OUT)
        self.last = now
        self.total += grown * self.unit
        return self.total


class Meter:
    """Energy since the meter was made. Read it at least once per counter's round (RAPL: minutes at full power).

    Args:
        source: what is read, e.g. "RAPL: package-0, dram".
        counters: summed.
    """

    def __init__(self, source: str, counters: list[Counter]) -> None:
        self.source = source
        self._counters = counters

    def joules(self) -> float:
        """A running total in joules; it never falls.

        Raises:
            EffbenchError: a counter can no longer be read, or went back.
        """
        try:
            return sum(counter.joules() for counter in self._counters)
        except EffbenchError:
            raise
        except Exception as error:
            raise EffbenchError(f"energy can no longer be read: {error}", LEAVE_OUT) from error


def meter(device: str = "cpu", powercap: Path = POWERCAP) -> tuple[Meter | None, str]:
    """What measures the energy of a device, and ""; or None and the reason why nothing here does."""
    if str(device).startswith("cuda"):
        count = nvidia.energy_counter(str(device))
        if count is not None:
            return Meter("NVML: the GPU alone", [Counter("of NVML", count, 1e-3)]), ""
        if not nvidia.installed():
            return None, "energy is not measurable here: NVML cannot be reached (pip install nvidia-ml-py)"
        return (
            None,
            "energy is not measurable here: this GPU keeps no energy counter (Volta and later do, MIG slices do not)",
        )
    domains = [zone for zone in _zones(powercap) if _counts(zone)]
    if not domains:
        return None, (
            f"energy is not measurable here: no RAPL counters under {powercap} (a virtual machine hides them) "
            "and the run uses no NVIDIA GPU"
        )
    try:
        return Meter(f"RAPL: {', '.join(_name(zone) for zone in domains)}", [_counter(zone) for zone in domains]), ""
    except PermissionError as error:
        return None, (
            f"energy is not measurable here: only root may read {error.filename}; "
            f"allow it with: sudo chmod a+r {powercap}/intel-rapl:*/energy_uj"
        )
    except (OSError, ValueError) as error:
        return None, f"energy is not measurable here: a RAPL counter cannot be read: {error}"


def _zones(powercap: Path) -> list[Path]:
    try:
        return sorted(powercap.glob("intel-rapl:*"))
    except OSError:
        return []


def _counts(zone: Path) -> bool:
    inside = zone.name.count(":") > 1
    return _name(zone) == "dram" if inside else _name(zone).startswith("package")


def _name(zone: Path) -> str:
    try:
        return read(zone / "name", 100)
    except OSError:
        return ""


def _counter(zone: Path) -> Counter:
    def number(file: str) -> int:
        text = read(zone / file, 100)
        if not re.fullmatch("[0-9]{1,20}", text):
            raise ValueError(f"{zone / file} says {text[:40]!r}")
        return int(text)

    span = number("max_energy_range_uj")
    if not span:
        raise ValueError(f"{zone / 'max_energy_range_uj'} says 0")
    return Counter(zone.name, lambda: number("energy_uj"), 1e-6, span)
