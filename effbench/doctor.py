"""`effbench doctor`: what is installed, the machine, and the data and weights that were found."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from effbench.datasets import cache_dir, resolve
from effbench.errors import EffbenchError
from effbench.measure.energy import meter
from effbench.measure.environment import cores, device_model
from effbench.measure.machine import machine
from effbench.registry import backbones, methods, tasks
from effbench.terminal import plain

if TYPE_CHECKING:
    from rich.console import Console

GOOD, NOTE, BAD = "green", "yellow", "red"


def examine(console: Console) -> int:
    """Print the table; the exit code is 1 where something that effbench needs is missing or broken, else 0."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    bad = False
    for what, look in LOOKS.items():
        for style, line in look():
            table.add_row(Text(what, "bold"), Text(plain(line), style if style != GOOD else ""))
            bad |= style == BAD
            what = ""
    console.print(table)
    return int(bad)


def _software() -> list[tuple[str, str]]:
    versions, missing = [], []
    for requirement in metadata.requires("effbench") or []:
        name = re.match(r"[\w.-]+", requirement).group()
        extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            if extra:
                missing.append((NOTE, f"{name} is not installed: pip install 'effbench[{extra[1]}]'"))
            else:
                missing.append((BAD, f"{name} is missing: pip install {name}"))
    head = f"effbench {metadata.version('effbench')}, Python {platform.python_version()}"
    return [(GOOD, head), (GOOD, ", ".join(sorted(versions))), *missing]


def _machine() -> list[tuple[str, str]]:
    lines = [(GOOD, f"{platform.platform()}"), (GOOD, f"cpu: {device_model()}")]
    facts = machine()
    shown = ("memory", "frequency", "turbo", "limits", "virtual", "container")
    lines += [(GOOD, f"{name}: {facts[name]}") for name in shown if name in facts]
    if governor := facts.get("governor"):
        slow = governor != "performance"
        lines.append((NOTE if slow else GOOD, f"governor: {governor}" + "; timings may be noisy" * slow))
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * cores():
        lines.append((NOTE, f"load average {os.getloadavg()[0]:.1f} on {cores()} cores: timings will be noisy"))
    try:
        import torch
    except Exception as error:
        return [*lines, (BAD, f"torch does not import: {error}")]
    count = torch.cuda.device_count()
    lines += [(GOOD, f"cuda:{i}: {device_model(f'cuda:{i}')}") for i in range(count)]
    return lines if count else [*lines, (GOOD, "no GPU that torch can use")]


def _measuring() -> list[tuple[str, str]]:
    try:
        import torch

        from effbench.measure.memory import unmeasurable
    except Exception as error:
        return [(BAD, f"nothing can be measured: {error}")]
    why = unmeasurable()
    lines = [(NOTE, why) if why else (GOOD, "peak memory: each arm in a fresh process")]
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        found, why = meter(device)
        lines.append((GOOD, f"energy of {device}: {found.source}") if found else (NOTE, why))
    return lines


def _plugins() -> list[tuple[str, str]]:
    lines = []
    for registry in (methods, tasks, backbones):
        broken = []
        for name in registry.names():
            try:
                registry.get(name)
            except EffbenchError as error:
                broken.append((BAD, str(error)))
        lines += [(GOOD, f"{len(registry.names())} {registry.kind}s: {', '.join(registry.names())}"), *broken]
    return lines


def _data() -> list[tuple[str, str]]:
    lines = []
    for name in tasks.names():
        try:
            data = resolve(name, "real").data
        except EffbenchError as error:
            lines.append((NOTE, f"{name}: {error}"))
            lines += [(NOTE, f"    {error.hint}")] if error.hint else []
        except Exception as error:
            lines.append((BAD, f"{name}: {type(error).__name__}: {error}"))
        else:
            sizes = ", ".join(f"{split} {size}" for split, size in data.sizes().items())
            lines.append((GOOD, f"{name}: {sizes}" + (f", in {data.origin}" if data.origin else "")))
    return lines


def _weights() -> list[tuple[str, str]]:
    shipped = resources.files("effbench.models") / "shipped"
    names = [f.name for f in shipped.iterdir() if f.name.endswith(".safetensors")] if shipped.is_dir() else []
    lines = [(GOOD, f"shipped: {', '.join(sorted(names))}")] if names else [(BAD, "the shipped tower is missing")]
    named = os.environ.get("EFFBENCH_WEIGHTS")
    for folder in [Path(named).expanduser()] if named else []:
        found = sorted(f.name for f in folder.glob("*") if f.suffix in (".safetensors", ".pt", ".pth", ".bin"))
        lines.append((GOOD if found else NOTE, f"EFFBENCH_WEIGHTS={folder}: {', '.join(found) or 'no weights there'}"))
    return lines if named else [*lines, (GOOD, "EFFBENCH_WEIGHTS is not set")]


def _cache() -> list[tuple[str, str]]:
    folder = cache_dir()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    return [(GOOD, f"{folder}: {size / 2**20:.0f} MiB")]


LOOKS = {
    "software": _software,
    "machine": _machine,
    "measuring": _measuring,
    "plugins": _plugins,
    "data": _data,
    "weights": _weights,
    "cache": _cache,
}
