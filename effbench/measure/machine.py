"""What the machine is and how it stands: processor, clocks, load, limits, virtualisation. What is missing is left out.

Read from the kernel's files (py-cpuinfo takes over a second for the same). Imports no torch for a run on the CPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path("/")
LENGTH = 199  # of a value
FLAGS = set(
    "avx avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 "
    "amx_bf16 amx_fp16 neon asimd asimdhp asimddp i8mm bf16 sve sve2 sme vsx".split()
)
MOST = 4096  # CPUs
CLOCKS_OF = 4  # some kernels take 10 ms per core to say a clock


def machine(device: str = "cpu", root: Path = ROOT) -> dict[str, str]:
    """Facts about the machine, each one short line.

    Args:
        device: "cuda..." adds the GPU's.
        root: where the kernel's files are looked for.
    """
    info = cpu_info(root)
    cpus = _cpu_list(_text(root / "sys/devices/system/cpu/online"))
    status = re.search(r"Cpus_allowed_list:\s*(\S+)", _text(root / "proc/self/status"))
    allowed = _cpu_list(status[1]) if status else cpus
    freq = [root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq" for cpu in allowed]
    found = {
        "cpu": info.get("model", ""),
        "cpu flags": " ".join(flag for flag in sorted(info.get("flags", "").split()) if flag in FLAGS),
        "cores": _cores(root, cpus, allowed),
        "governor": _distinct(_text(folder / "scaling_governor") for folder in freq),
        "frequency": _frequency(freq[:CLOCKS_OF], info),
        "turbo": _turbo(root),
        "load": _load(root),
        "memory": _gib(_total_memory(root)),
        "limits": _limits(root, cpus, allowed),
        "virtual": _virtual(root, info),
        "container": _container(root),
        "system": " ".join(_text(root / "sys/class/dmi/id" / file) for file in ("sys_vendor", "product_name")),
    }
    if str(device).startswith("cuda"):
        from effbench.measure import nvidia

        found |= nvidia.facts(str(device))
    lines = {key: "".join(c if c.isprintable() else "?" for c in " ".join(v.split())) for key, v in found.items()}
    return {key: line[:LENGTH] for key, line in lines.items() if line}


def read(path: Path, limit: int = 65_536) -> str:
    """The start of a file of the kernel.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return file.read(limit).decode(errors="replace").strip("\0 \n")


def cpu_info(root: Path = ROOT) -> dict[str, str]:
    """ "model", "flags" and "mhz" of the first core, where the system says them."""
    found: dict[str, str] = {}
    names = {"model name": "model", "cpu model": "model", "flags": "flags", "features": "flags", "cpu mhz": "mhz"}
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if name := names.get(key.strip().lower()):
            found.setdefault(name, value.strip())
    return found


def _text(path: Path) -> str:
    try:
        return read(path)
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,20}", text) else None


def _cpu_list(text: str) -> list[int]:
    """`0-2,8` -> [0, 1, 2, 8]; empty for anything else."""
    found: list[int] = []
    for part in text.split(",")[:MOST]:
        ends = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part.strip())
        if not ends:
            return []
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return found[:MOST]


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(sorted({value for value in values if value}))


def _cores(root: Path, cpus: list[int], allowed: list[int]) -> str:
    logical = len(cpus) or os.cpu_count() or 1
    topology = root / "sys/devices/system/cpu"
    siblings = {_text(topology / f"cpu{cpu}/topology/thread_siblings_list") for cpu in cpus} - {""}
    physical = f"{len(siblings)} physical, " if siblings else ""
    return f"{physical}{logical} logical" + (f", {len(allowed)} allowed" if allowed else "")


def _frequency(folders: list[Path], info: dict[str, str]) -> str:
    def span(files: tuple[str, str]) -> str:
        values = [_number(_text(folder / file)) for folder in folders for file in files]
        mhz = sorted({round(value / 1000) for value in values if value and value > 0})
        return "" if not mhz else f"{mhz[0]} MHz" if len(mhz) == 1 else f"{mhz[0]}-{mhz[-1]} MHz"

    now, allowed = span(("scaling_cur_freq",) * 2), span(("scaling_min_freq", "scaling_max_freq"))
    if not now and re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", info.get("mhz", "")):
        now = f"{float(info['mhz']):.0f} MHz"
    return f"{now} of {allowed}" if now and allowed else now


def _turbo(root: Path) -> str:
    off, on = root / "sys/devices/system/cpu/intel_pstate/no_turbo", root / "sys/devices/system/cpu/cpufreq/boost"
    return {"0": "on", "1": "off"}.get(_text(off)) or {"0": "off", "1": "on"}.get(_text(on), "")


def _load(root: Path) -> str:
    found = re.fullmatch(r"((?:[0-9.]{1,12} ){3})([0-9]{1,9})/([0-9]{1,9}) [0-9]+", _text(root / "proc/loadavg"))
    return f"{found[1]}and {found[2]} of {found[3]} tasks running" if found else ""


def _total_memory(root: Path) -> int | None:
    found = re.search(r"MemTotal:\s*([0-9]{1,15}) kB", _text(root / "proc/meminfo"))
    return int(found[1]) * 1024 if found else None


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.1f} GiB"


def _limits(root: Path, cpus: list[int], allowed: list[int]) -> str:
    """The tightest limits of this process's control groups and of those that they lie in (versions 1 and 2)."""
    groups = _text(root / "proc/self/cgroup")
    if not groups:
        return ""
    quotas, sizes = [], []
    for folder in _groups(root, groups):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        old = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        for amount, per in ((_number(quota), _number(period)), (_number(old[0]), _number(old[1]))):
            if amount and per and amount > 0 and per > 0:
                quotas.append(amount / per)
        sizes += [_number(_text(folder / file)) for file in ("memory.max", "memory.limit_in_bytes")]
    total = _total_memory(root)
    tight = [size for size in sizes if size and 0 < size < (total or 2**60)]  # version 1 writes "none" as 2^63
    parts = [f"{min(quotas):.2f} cores"] if quotas else []
    parts += [f"{_gib(min(tight))} memory"] if tight else []
    parts += [f"{len(allowed)} of {len(cpus)} CPUs"] if len(allowed) < len(cpus) else []
    return ", ".join(parts) or "none"


def _groups(root: Path, groups: str) -> Iterator[Path]:
    mount = root / "sys/fs/cgroup"
    for line in groups.splitlines()[:100]:
        _, _, rest = line.partition(":")
        names, _, place = rest.partition(":")
        parts = [part for part in place.split("/")[:50] if part not in ("", ".", "..")]
        for base in (
            (mount / names, *(mount / name for name in names.split(","))) if names else (mount, mount / "unified")
        ):
            yield from (base.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def _virtual(root: Path, info: dict[str, str]) -> str:
    kind = _text(root / "sys/hypervisor/type")
    if kind or "hypervisor" in info.get("flags", "").split():
        return f"yes, {kind}" if kind else "yes"
    return "no" if "sse2" in info.get("flags", "") else ""  # only x86 would have that flag


def _container(root: Path) -> str:
    marks = {"docker": root / ".dockerenv", "podman": root / "run/.containerenv"}
    found = [name for name, mark in marks.items() if os.path.exists(mark)]
    return ", ".join(found + ["kubernetes"] * ("KUBERNETES_SERVICE_HOST" in os.environ))
