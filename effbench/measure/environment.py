"""The machine and the software that a result came from. Imports no torch; fails for nothing that is missing."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from effbench.measure.machine import cpu_info, machine
from effbench.records import Provenance

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
    count, model = cores(), cpu_info().get("model") or platform.machine() or "unknown processor"
    return f"{model}, {count} core{'s' if count > 1 else ''}"


def provenance(command: str, device: str = "cpu") -> Provenance:
    """What is shown beside a result: commit, library versions, platform, machine, load.

    Args:
        command: the command line that the result came from.
        device: whose driver and clocks are told.
    """
    versions = {name: version for name in LIBRARIES if (version := _version(name))}
    commit, branch = _git(Path(__file__).resolve().parents[2])
    return Provenance(
        command=command[:4000],
        effbench=_version("effbench"),
        commit=commit,
        versions=versions,
        platform=platform.platform(),
        python=platform.python_version(),
        load=load_per_core(),
        machine=machine(device) | ({"git branch": branch[:199]} if branch else {}),
        threading={name: os.environ[name] for name in sorted(os.environ) if name.startswith(THREADING)},
    )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _git(checkout: Path) -> tuple[str, str]:
    """Commit of a checkout, ending in `-dirty` where tracked files differ from it, and its branch; empty elsewhere."""
    if not (checkout / ".git").exists():
        return "", ""
    command = ["git", "--no-optional-locks", "-C", str(checkout), "status", "--porcelain=v2", "--branch"]
    try:
        found = subprocess.run(
            [*command, "--untracked-files=no"], capture_output=True, text=True, errors="replace", timeout=2, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "", ""
    lines = found.stdout.splitlines()
    facts = dict(line.removeprefix("# branch.").split(" ", 1) for line in lines if line.startswith("# branch."))
    dirty = "-dirty" * any(not line.startswith("#") for line in lines)
    return facts.get("oid", "") + dirty, facts.get("head", "")
