"""Peak memory in a fresh process."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from effbench.arms import ArmPlan
from effbench.errors import EffbenchError, UsageError
from effbench.measure import memory as measure
from effbench.measure.memory import probe, process_peak, rss, weight_bytes
from effbench.measure.tensor_memory import Step, living, tensor_peak
from effbench.memory_probe import make_step, make_training_step
from effbench.records import Protocol

MIB = 2**20
ARMS = """
import os, sys, time, torch
from torch import nn
from effbench.measure.tensor_memory import Step

def allocates(load, run):
    model = nn.Module()
    model.register_buffer("held", torch.ones(load, dtype=torch.uint8))
    def step():
        torch.ones(run, dtype=torch.uint8)
        model.held.add_(1)
    return Step(step, model)

def differs(path, *sizes):
    with open(path, "a") as file:
        file.write(".")
    return allocates(1, sizes[os.path.getsize(path) - 1])

def leaves_holes(mib):
    def step():
        torch.ones(30 * mib, dtype=torch.uint8)  # freed, it makes glibc keep what is smaller
        for size in (8 * mib, 10 * mib):
            pairs = [(torch.ones(size, dtype=torch.uint8), torch.ones(100_000, dtype=torch.uint8)) for _ in range(10)]
            kept.append([small for _, small in pairs])
            del pairs
    kept = []
    return Step(step, nn.Module())

def mlp(train):
    model = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)])
    batch = torch.randn(8, 2048)
    if not train:
        return Step(torch.inference_mode()(lambda: model(batch)), model)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    def step():
        loss = model(batch).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return Step(step, model, optimiser)

def threads(path):
    open(path, "w").write(str(torch.get_num_threads()))
    return Step(lambda: None, nn.Module())

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
    memory, reason = probe(arms.allocates, 100 * MIB, 200 * MIB, start=start, runs=1)
    assert reason == "" and memory.runs == 1
    assert memory.weights == 100 * MIB
    assert memory.load_peak == pytest.approx(100 * MIB, rel=0.05)
    assert memory.run_peak == pytest.approx(300 * MIB, rel=0.05)
    assert memory.tensor_peak == 300 * MIB and memory.activations == 200 * MIB
    assert memory.gradients is None and memory.optimiser is None and memory.cache is None


@linux
def test_the_median_of_three_processes(arms, tmp_path):
    memory, _ = probe(arms.differs, str(tmp_path / "runs"), 10 * MIB, 30 * MIB, 20 * MIB)
    assert memory.activations == 20 * MIB and memory.runs == 3
    assert (tmp_path / "runs").read_text() == "..."


@linux
def test_training_peak_is_the_one_computed_by_hand(arms):
    memory, _ = probe(arms.mlp, True, runs=1)
    weights = 8 * (2048 * 2048 + 2048) * 4
    activations = 10 * 8 * 2048 * 4  # the batch, what each layer gives, and its square
    by_hand = weights + weights + 2 * weights + activations
    assert by_hand > 500 * MIB
    assert memory.run_peak == pytest.approx(by_hand, rel=0.05)
    assert memory.tensor_peak == pytest.approx(by_hand, rel=1e-4)
    assert memory.weights == memory.gradients == weights
    assert memory.optimiser == pytest.approx(2 * weights, rel=1e-4)  # and a step count for each parameter
    assert memory.activations == pytest.approx(activations, rel=1e-2)


@linux
def test_inference_peak_is_the_one_computed_by_hand(arms):
    memory, _ = probe(arms.mlp, False, runs=1)
    assert memory.tensor_peak == memory.weights + 3 * 8 * 2048 * 4  # the batch, a layer's input and its output
    assert memory.run_peak == pytest.approx(memory.tensor_peak, rel=0.05)


@linux
def test_blocks_that_were_freed_are_not_counted(arms):
    memory, _ = probe(arms.leaves_holes, MIB, runs=1)
    assert memory.tensor_peak == 10 * 10 * MIB + 4 * 10 * 100_000
    assert memory.run_peak == pytest.approx(memory.tensor_peak, rel=0.05)


def test_only_what_is_trained_has_gradients_and_state():
    before = living()
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 64, bias=False))
    model[0].requires_grad_(False)
    trained = list(model[1].parameters())
    optimiser, batch = torch.optim.SGD(trained, momentum=0.9), torch.ones(32, 256)

    def run():
        loss = model(batch).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    bytes_trained, weights = 256 * 64 * 4, 256 * 320 * 4
    found = tensor_peak(Step(run, model, optimiser), weights, before, lambda: None)
    assert found["gradients"] == found["optimiser"] == bytes_trained
    # the peak is at the end of the forward pass: the gradients of the step before, the batch and both layers' outputs
    assert found["activations"] == pytest.approx(32 * (256 + 256 + 64) * 4, abs=64)
    assert found["tensor_peak"] == weights + 2 * bytes_trained + found["activations"]


def test_views_in_place_work_and_what_was_there_before():
    other = torch.ones(MIB)
    before = living()
    model = nn.Linear(8, 8)
    state = torch.zeros(1000)

    def run():
        wide = torch.empty(5000)
        wide.view(50, 100)[:, ::2].t().add_(state[:1]).mul_(2)
        wide.expand(9, -1)

    found = tensor_peak(Step(run, model), 288, before, lambda: None)
    assert found["activations"] == pytest.approx(4000 + 20000, abs=64)
    assert found["tensor_peak"] == 288 + found["activations"]
    assert other.numel() == MIB


SHIPPED = dict(family="shipped", name="scenes_vit", weights=None, pretrained=None, image_size=None)


@pytest.mark.parametrize("train", ["locked", "full"])
def test_the_training_step_of_an_arm(train):
    size = 96
    protocol = Protocol(train=train, image_size=size, batch_size=4)
    shapes = {"tokens": np.array([[3, 4, 5, 0, 0, 0]] * 4), "image": ((4, 3, size, size), "float32")}
    arguments = ("scenes", ArmPlan("baseline", kind="baseline"), (50, 6), SHIPPED, protocol)
    tower = make_step(*arguments, shapes).model.image_encoder
    if train == "locked":
        shapes = {"tokens": shapes["tokens"], "features": ((4, tower.width), "float32")}
    before = living()
    step = make_training_step(*arguments, shapes)
    found = tensor_peak(step, weight_bytes(step.model), before, lambda: None)
    trained = sum(p.numel() * 4 for p in step.model.parameters() if p.requires_grad)
    everything = sum(p.numel() * 4 for p in step.model.parameters())
    assert (trained == everything) is (train == "full")
    assert 0 < found["gradients"] <= trained and found["activations"] > 0
    assert found["optimiser"] == pytest.approx(2 * trained, rel=0.01)


def test_on_cuda_torch_and_the_driver_are_asked(monkeypatch):
    model = nn.Linear(4, 4, bias=False)
    optimiser = torch.optim.SGD(model.parameters(), momentum=0.9)
    peaks, ran = iter([100, 500]), []

    def run():
        ran.append(model(torch.ones(2, 4)).sum().backward())
        optimiser.step()

    for name, answer in dict(set_device=None, reset_peak_memory_stats=None, synchronize=None).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 900)
    monkeypatch.setattr(measure.nvidia, "process_memory", lambda device: 2000)
    found = measure._device_growth(lambda: Step(run, model, optimiser), (), "cuda")
    assert len(ran) == 2
    assert found == dict(
        weights=64, gradients=64, optimiser=64, activations=500 - 3 * 64, tensor_peak=500, load_peak=100, run_peak=500,
        reserved=900, process=2000,
    )  # fmt: skip


def test_a_system_without_a_peak_says_so(monkeypatch):
    def refuses(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(measure, "open", refuses, raising=False)
    assert measure.unmeasurable() == "peak memory is not measured here: Permission denied (/proc/self/clear_refs)"
    assert process_peak() == 0


def test_threads_of_the_protocol(arms, tmp_path):
    probe(arms.threads, str(tmp_path / "threads"), threads=2, runs=1)
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
    # a shell starts its background jobs deaf to Ctrl-C, and the tests may run in one
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = subprocess.Popen([sys.executable, script], preexec_fn=hear, **pipes)
    assert command.stdout.readline().split() == ["started"]
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    command.send_signal(signal.SIGINT)
    output, errors = command.communicate(timeout=120)
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
