"""Peak memory in a fresh process."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from effbench.errors import EffbenchError, UsageError
from effbench.measure.memory import probe, process_peak, rss, weight_bytes

MIB = 2**20
ARMS = """
import os, sys, time, torch

def allocates(load, run):
    held = torch.ones(load, dtype=torch.uint8)
    def step():
        torch.ones(run, dtype=torch.uint8)
        held.add_(1)
    return step, load

def threads(path):
    open(path, "w").write(str(torch.get_num_threads()))
    return (lambda: None), 0

def raises():
    raise ValueError("no such arm")

def killed():
    os.kill(os.getpid(), 9)

def hangs(path):
    open(path, "w").write(str(os.getpid()))
    time.sleep(60)
"""

linux = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="this system has no resettable peak")


@pytest.fixture
def arms(tmp_path, monkeypatch):
    (tmp_path / "arms_of_the_memory_test.py").write_text(ARMS)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("arms_of_the_memory_test")
    sys.modules.pop("arms_of_the_memory_test")


@linux
@pytest.mark.parametrize("start", ["", "spawn"])
def test_a_known_allocation(arms, start):
    memory, reason = probe(arms.allocates, 100 * MIB, 200 * MIB, start=start)
    assert reason == ""
    assert memory.weights == 100 * MIB
    assert memory.load_peak == pytest.approx(100 * MIB, rel=0.05)
    assert memory.run_peak == pytest.approx(300 * MIB, rel=0.05)


def test_threads_of_the_protocol(arms, tmp_path):
    probe(arms.threads, str(tmp_path / "threads"), threads=2)
    assert (tmp_path / "threads").read_text() == "2"


def test_a_process_that_fails_dies_or_hangs(arms, tmp_path):
    with pytest.raises(EffbenchError, match="ValueError: no such arm"):
        probe(arms.raises)
    with pytest.raises(EffbenchError, match="out of memory"):
        probe(arms.killed)
    with pytest.raises(EffbenchError, match="longer than 1 s"):
        probe(arms.hangs, str(tmp_path / "pid"), timeout=1)
    assert not alive(int((tmp_path / "pid").read_text()))
    with pytest.raises(UsageError, match="fresh process"):
        probe(lambda: None)


@linux
def test_a_script_without_a_guard_and_ctrl_c(arms, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import arms_of_the_memory_test as arms\n"
        "from effbench.measure.memory import probe\n"
        "print('started', probe(arms.allocates, 1, 1)[1], flush=True)\n"
        f"probe(arms.hangs, {str(tmp_path / 'pid')!r})\n"
    )
    command = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert command.stdout.readline().split() == ["started"]
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    command.send_signal(signal.SIGINT)
    output, errors = command.communicate(timeout=30)
    assert output == "" and "KeyboardInterrupt" in errors
    assert not alive(int((tmp_path / "pid").read_text()))


def test_weights_share_storage():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(4, 8))
    model[2].weight = model[0].weight
    model.register_buffer("view", model[0].weight.detach()[:2], persistent=False)
    assert weight_bytes(model) == 4 * (4 * 8 + 8 + 8) + 4 * 4 * 8 + 8
    assert weight_bytes(nn.Linear(4, 8, device="meta")) == 4 * 40


@pytest.mark.filterwarnings("ignore")
def test_weights_of_a_quantised_model():
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch quantises nothing on this processor")
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(64, 64)), {nn.Linear}, dtype=torch.qint8)
    assert 64 * 64 <= weight_bytes(model) <= 64 * 64 + 64 * 4 + 64


@linux
def test_peak_is_at_least_what_is_resident():
    assert process_peak() >= rss() > MIB


def alive(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.02)
    return True


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
