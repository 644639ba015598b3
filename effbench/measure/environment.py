"""The machine and the software that a result came from. Imports no torch; fails for nothing that is missing."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from effbench.records import Provenance

CPU_INFO = Path("/proc/cpuinfo")
LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "torchao",
    "torch-pruning",
    "transformers",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
)


#: variables that change how threads share the cores
THREADING = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_per_core() -> float | None:
    """Load average of the last minute per core; None where the system keeps none."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (OSError, AttributeError):
        return None


def device_model(device: str = "cpu") -> str:
    """What the device is, e.g. `Intel(R) Xeon(R) Platinum 8481C, 2 cores` or `NVIDIA A100-SXM4-80GB`."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    count = cores()
    return f"{_cpu_model()}, {count} core{'s' if count > 1 else ''}"


def provenance(command: str) -> Provenance:
    """What is shown beside a result: commit, library versions, platform, load.

    Args:
        command: the command line that the result came from.
    """
    versions = {name: version for name in LIBRARIES if (version := _version(name))}
    return Provenance(
        command=command[:4000],
        effbench=_version("effbench"),
        commit=_commit(Path(__file__).resolve().parents[2]),
        versions=versions,
        platform=platform.platform(),
        python=platform.python_version(),
        load=load_per_core(),
        threading={name: os.environ[name] for name in sorted(os.environ) if name.startswith(THREADING)},
    )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "cpu model")))
    return next(models, "") or platform.machine() or "unknown processor"


def _commit(checkout: Path) -> str:
    """Commit of a git checkout, ending in `-dirty` where tracked files differ from it; empty elsewhere."""
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "--no-optional-locks", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
