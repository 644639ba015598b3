"""What the NVIDIA driver says of a GPU, through NVML (`nvidia-ml-py`) where it is installed. Nothing here raises."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Any

SMI = {
    "gpu": "name",
    "gpu driver": "driver_version",
    "gpu clock": "clocks.sm",
    "gpu clock max": "clocks.max.sm",
    "gpu memory clock": "clocks.mem",
    "gpu memory clock max": "clocks.max.mem",
    "gpu power limit": "power.limit",
    "gpu ecc": "ecc.mode.current",
    "gpu mig": "mig.mode.current",
    "gpu throttling": "clocks_throttle_reasons.active",
}


def facts(device: str) -> dict[str, str]:
    """Name, driver, clocks, throttle reasons, power limit, ECC and MIG of a GPU; what cannot be read is left out."""
    found = _handle(device)
    if found is None:
        return _smi(device)
    nvml, gpu = found

    def say(query: str, *args: Any, show: Callable[[Any], str] = str) -> str:
        return _ask(lambda: show(getattr(nvml, query)(*args))) or ""

    read = {
        "gpu": say("nvmlDeviceGetName", gpu, show=_text),
        "gpu driver": say("nvmlSystemGetDriverVersion", show=_text),
        "gpu clock": say("nvmlDeviceGetClockInfo", gpu, 1, show="{} MHz".format),  # 1: the processors', 2: the memory's
        "gpu clock max": say("nvmlDeviceGetMaxClockInfo", gpu, 1, show="{} MHz".format),
        "gpu memory clock": say("nvmlDeviceGetClockInfo", gpu, 2, show="{} MHz".format),
        "gpu memory clock max": say("nvmlDeviceGetMaxClockInfo", gpu, 2, show="{} MHz".format),
        "gpu temperature": say("nvmlDeviceGetTemperature", gpu, 0, show="{} C".format),
        "gpu power limit": say(
            "nvmlDeviceGetEnforcedPowerLimit", gpu, show=lambda milliwatt: f"{milliwatt / 1000:g} W"
        ),
        "gpu ecc": say("nvmlDeviceGetEccMode", gpu, show=_on),
        "gpu mig": say("nvmlDeviceGetMigMode", gpu, show=_on),
        "gpu throttling": say(
            "nvmlDeviceGetCurrentClocksThrottleReasons", gpu, show=lambda bits: _reasons(nvml, int(bits))
        ),
    }
    return {key: value for key, value in read.items() if value}


def process_memory(device: str) -> int | None:
    """Bytes of the GPU that this process holds; None where the driver does not say (e.g. in a PID namespace)."""
    found = _handle(device)
    if found is None:
        return None
    nvml, gpu = found
    used = _ask(lambda: {p.pid: p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)})
    return (used or {}).get(os.getpid())


def energy_counter(device: str) -> Callable[[], int] | None:
    """Reads the GPU's energy since the driver was loaded, in mJ; None where it keeps no such counter."""
    found = _handle(device)
    if found is None:
        return None
    nvml, gpu = found
    if _ask(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) is None:
        return None
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)


def installed() -> bool:
    """Whether NVML can be asked at all."""
    return _nvml() is not None


def _nvml() -> Any | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml
    except Exception:
        return None


def _handle(device: str) -> tuple[Any, Any] | None:
    """NVML and its handle of a torch device."""
    nvml, name = _nvml(), _uuid(device)
    if nvml is None or name is None:
        return None
    gpu = _ask(lambda: nvml.nvmlDeviceGetHandleByUUID(name.encode()))
    return None if gpu is None else (nvml, gpu)


def _uuid(device: str) -> str | None:
    """torch counts only the GPUs of CUDA_VISIBLE_DEVICES, in an order of its own, so a GPU goes by its UUID."""

    def ask() -> str:
        import torch

        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"

    return _ask(ask)


def _smi(device: str) -> dict[str, str]:
    name = _uuid(device)
    if name is None:
        return {}
    query = ["nvidia-smi", f"--id={name}", f"--query-gpu={','.join(SMI.values())}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=0.3, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.stdout[:10_000].partition("\n")[0].split(",")]
    if len(values) != len(SMI):
        return {}
    return {key: value for key, value in zip(SMI, values, strict=True) if value and not value.startswith("[")}


def _ask(question: Callable[[], Any]) -> Any | None:
    try:
        return question()
    except Exception:  # NVMLError, or a driver older than the question
        return None


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _on(mode: Any) -> str:
    """NVML gives [current, pending]."""
    return "on" if mode[0] else "off"


def _reasons(nvml: Any, bits: int) -> str:
    prefix = "nvmlClocksThrottleReason"
    single = {name.removeprefix(prefix): bit for name, bit in vars(nvml).items() if name.startswith(prefix)}
    return (
        ", ".join(sorted(n for n, b in single.items() if n not in ("All", "UserDefinedClocks") and bits & b)) or "none"
    )
