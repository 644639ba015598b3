"""The machine, the software and the clock."""

import os
import subprocess
import sys
import types

import pytest

from effbench.errors import InvalidError
from effbench.measure import environment, nvidia
from effbench.measure.clock import Clock
from effbench.measure.machine import machine


def test_imports_no_torch():
    code = (
        "import sys; from effbench.measure import environment as e; e.provenance(''); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_provenance_names_what_ran():
    found = environment.provenance("effbench run")
    assert found.machine["cores"] and all(0 < len(value) < 200 for value in found.machine.values())
    assert found.command == "effbench run" and "torch" in found.versions and found.python and found.platform
    assert environment.device_model("cpu").endswith(("core", "cores"))


def test_nothing_missing_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "LIBRARIES", ("no_such_library",))
    (tmp_path / ".git").mkdir()
    assert environment.provenance("x" * 5000).versions == {}
    assert environment._git(tmp_path) == ("", "")
    monkeypatch.setattr(environment, "cpu_info", dict)
    assert environment.device_model("cpu").startswith(environment.platform.machine())


def test_git_state(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    git("init", "-q", "-b", "side")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    commit, branch = environment._git(tmp_path)
    assert len(commit) == 40 and branch == "side"
    (tmp_path / "file").write_text("2")
    assert environment._git(tmp_path) == (f"{commit}-dirty", "side")


def tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


CPU = "sys/devices/system/cpu"
MACHINE = {
    "proc/cpuinfo": "model name\t: Fast CPU\nflags\t\t: fpu sse2 avx2 amx_int8 hypervisor\ncpu MHz\t: 1000.0\n\n"
    "model name\t: other\n",
    "proc/self/status": "Name:\tx\nCpus_allowed_list:\t0-1\n",
    "proc/loadavg": "1.50 0.70 0.10 3/99 4242\n",
    "proc/meminfo": "MemTotal:  8388608 kB\n",
    f"{CPU}/online": "0-3",
    **{f"{CPU}/cpu{i}/topology/thread_siblings_list": f"{i % 2},{i % 2 + 2}" for i in range(4)},
    **{f"{CPU}/cpu{i}/cpufreq/scaling_governor": ("powersave", "performance")[i] for i in range(2)},
    **{f"{CPU}/cpu{i}/cpufreq/scaling_cur_freq": str(2_100_000 + i * 100_000) for i in range(2)},
    **{f"{CPU}/cpu{i}/cpufreq/scaling_min_freq": "800000" for i in range(2)},
    **{f"{CPU}/cpu{i}/cpufreq/scaling_max_freq": "3600000" for i in range(2)},
    f"{CPU}/intel_pstate/no_turbo": "1",
    "sys/class/dmi/id/sys_vendor": "Maker",
    "sys/class/dmi/id/product_name": "Box\x1b[2J 1\n",
    ".dockerenv": "",
}


def test_a_machine_in_full(tmp_path, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    groups = {
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/fs/cgroup/outer/cpu.max": "150000 100000",
        "sys/fs/cgroup/outer/inner/cpu.max": "max 100000",
        "sys/fs/cgroup/outer/inner/memory.max": str(2**31),
    }
    assert machine(root=tree(tmp_path, MACHINE | groups)) == {
        "cpu": "Fast CPU",
        "cpu flags": "amx_int8 avx2",
        "cores": "2 physical, 4 logical, 2 allowed",
        "governor": "performance, powersave",
        "frequency": "2100-2200 MHz of 800-3600 MHz",
        "turbo": "off",
        "load": "1.50 0.70 0.10 and 3 of 99 tasks running",
        "memory": "8.0 GiB",
        "limits": "1.50 cores, 2.0 GiB memory, 2 of 4 CPUs",
        "virtual": "yes",
        "container": "docker",
        "system": "Maker Box?[2J 1",
    }


@pytest.mark.parametrize(
    ("groups", "limits"),
    [
        ({"proc/self/cgroup": "0::/../..\n", "sys/fs/cgroup/cpu.max": "50000 100000"}, "0.50 cores, 2 of 4 CPUs"),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(2**30),
            },
            "2.00 cores, 1.0 GiB memory, 2 of 4 CPUs",
        ),
        ({"proc/self/cgroup": "0::/\n", "proc/self/status": "Cpus_allowed_list:\t0-3"}, "none"),
    ],
)
def test_limits_of_a_container(tmp_path, groups, limits):
    assert machine(root=tree(tmp_path, MACHINE | groups))["limits"] == limits


@pytest.mark.parametrize("garbage", [b"", b"\xff\x00\xfe" * 99, b"9" * 99, b"0-99999999", b": : :\n/" * 10_000, None])
def test_garbage_is_left_out(tmp_path, garbage):
    files = [*MACHINE, "proc/self/cgroup", "sys/fs/cgroup/cpu.max", "sys/fs/cgroup/memory.max", "sys/hypervisor/type"]
    if garbage is None:
        for name in files:
            (tmp_path / name).mkdir(parents=True)
    else:
        tree(tmp_path, dict.fromkeys(files, garbage))
    found = machine(root=tmp_path)
    assert all(isinstance(value, str) and 0 < len(value) < 200 for value in found.values())
    assert not {"frequency", "load", "memory", "turbo"} & found.keys()
    assert "cores" in machine(root=tmp_path / "nothing")


class FakeNvml(types.SimpleNamespace):
    """NVML of one GPU that knows neither its temperature nor an ECC mode, and gives its name as bytes."""

    def __init__(self, **more):
        super().__init__(
            nvmlClocksThrottleReasonSwPowerCap=4,
            nvmlClocksThrottleReasonHwSlowdown=8,
            nvmlClocksThrottleReasonAll=15,
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByUUID=lambda uuid: {b"GPU-1-2": "gpu"}[uuid],
            nvmlDeviceGetName=lambda gpu: b"Some GPU",
            nvmlSystemGetDriverVersion=lambda: "550.1",
            nvmlDeviceGetClockInfo=lambda gpu, kind: {1: 1200, 2: 900}[kind],
            nvmlDeviceGetMaxClockInfo=lambda gpu, kind: {1: 1980, 2: 2600}[kind],
            nvmlDeviceGetCurrentClocksThrottleReasons=lambda gpu: 4,
            nvmlDeviceGetEnforcedPowerLimit=lambda gpu: 350_000,
            nvmlDeviceGetMigMode=lambda gpu: [0, 1],
            nvmlDeviceGetComputeRunningProcesses=lambda gpu: [
                types.SimpleNamespace(pid=1, usedGpuMemory=5),
                types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=7),
            ],
            **more,
        )


def test_a_gpu_by_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2"))
    found = machine("cuda:0")
    assert {key: value for key, value in found.items() if key.startswith("gpu")} == {
        "gpu": "Some GPU",
        "gpu driver": "550.1",
        "gpu clock": "1200 MHz",
        "gpu clock max": "1980 MHz",
        "gpu memory clock": "900 MHz",
        "gpu memory clock max": "2600 MHz",
        "gpu power limit": "350 W",
        "gpu mig": "off",
        "gpu throttling": "SwPowerCap",
    }
    assert nvidia.process_memory("cuda") == 7


def test_a_gpu_by_nvidia_smi_or_not_at_all(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvidia.facts("cuda") == {} and nvidia.process_memory("cuda") is None
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia.facts("cuda") == {}
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'A GPU, 550.1, 1200 MHz, 1980 MHz, 900 MHz, 2600 MHz, 350.00 W, [N/A], Disabled, 0x4'"
    )
    smi.chmod(0o755)
    if os.name == "nt":
        pytest.skip("the stand-in for nvidia-smi is a shell script")
    found = nvidia.facts("cuda")
    assert found["gpu"] == "A GPU" and found["gpu throttling"] == "0x4" and "gpu ecc" not in found


def test_timed_returns_result_and_seconds():
    ticks = iter([1.0, 3.5])
    assert Clock(timer=lambda: next(ticks)).timed(lambda: "done") == ("done", 2.5)


@pytest.mark.parametrize("ticks", [(2.0, 1.0), (1.0, float("nan")), (float("inf"), 1.0)])
def test_a_broken_clock_is_an_error(ticks):
    reading = iter(ticks)
    with pytest.raises(InvalidError, match="clock"):
        Clock(timer=lambda: next(reading)).timed(lambda: None)
