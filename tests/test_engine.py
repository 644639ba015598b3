"""The engines: DeepSpeed trains what torch alone trains, in one process and in two; what it cannot do is refused.

DeepSpeed leaves state behind in its process, so this file is also the program that trains in processes of its own.
"""

import io
import operator
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import nn

from effbench import distributed, engine, engine_deepspeed, randomness
from effbench.alignment import Alignment, Prepared
from effbench.arms import ArmPlan
from effbench.errors import UsageError
from effbench.live import Live
from effbench.lockstep import Arm, Setting
from effbench.measure.clock import Clock
from effbench.models.dual_encoder import DualEncoder, TimmFeatures
from effbench.records import Protocol
from effbench.training import train

IMAGES, WORDS, STEPS, STOP = dict(train=24, dev=6), 20, 6, 4
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs pip install 'effbench[deepspeed]'")


class Pairs(Alignment):
    def load(self, request):
        raise NotImplementedError


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 24)
        self.place = nn.Parameter(0.02 * torch.randn(5, 24))
        self.out = nn.Linear(24, 16)

    def forward(self, tokens):
        return self.out((self.embedding(tokens) + self.place).mean(dim=1))


def arms():
    """Baseline and noop: two models side by side, with scalars, frozen weights and weights outside any forward."""
    found = []
    for name, kind in (("baseline", "baseline"), ("noop", "control")):
        image = TimmFeatures(tiny.vit(num_classes=0, depth=1, qkv_bias=False))  # a key's bias has no gradient but noise
        randomness.seed_all(0)
        model = DualEncoder(image, Words(), nn.Linear(image.width, 16), "sigmoid", 16)
        image.trunk.patch_embed.requires_grad_(False)
        found.append(Arm(ArmPlan(name, kind=kind), model, randomness.get_state()))
    return found


def prepared():
    drawn = np.random.default_rng(0)
    pixels = {split: drawn.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8) for split, n in IMAGES.items()}
    tokens = {split: torch.from_numpy(drawn.integers(0, WORDS, (2 * n, 5))) for split, n in IMAGES.items()}
    first = {split: np.arange(0, 2 * n + 1, 2) for split, n in IMAGES.items()}
    return Prepared(lambda: pixels, tokens, first, torch.full((3, 1, 1), 128.0), torch.full((3, 1, 1), 64.0), None)


def trained(partial=None, keep=lambda index, state: None, **options):
    """Losses by step and what training left, both arms."""
    facts = dict(train="full", epochs=2, batch_size=8, lr=1e-2)
    setting = Setting(Pairs(), prepared(), Protocol(**facts | options), Clock(), Live(Console(quiet=True)))
    taken = iter(range(partial["index"] + 1 if partial else 0, STEPS))
    result = train(arms(), 0, setting, IMAGES, partial, lambda state: keep(next(taken), state))
    losses = {name: [row["loss"] for row in setting.rows if row["arm"] == name] for name in result["arms"]}
    return dict(losses=losses, errors=result["errors"], arms=result["arms"])


def one_step(protocol):
    """Gradients of one step, and how many numbers this process holds: of the model, of Adam's first moment."""
    model = arms()[0].model.requires_grad_(True)
    updates = engine.engine(model, protocol)
    batch = Pairs().batch(prepared(), "train", np.arange(8), np.random.default_rng(0))
    updates.backward(updates.loss(Pairs().loss, batch))
    full = operator.attrgetter("grad")
    if protocol.zero_stage:
        from deepspeed.utils import safe_get_full_grad as full
    gradients = {name: full(parameter).clone() for name, parameter in model.named_parameters()}
    updates.step()
    here = sum(p.numel() for p in model.parameters())
    with updates.whole():
        whole = sum(p.numel() for p in model.parameters())
    moment = sum(state["exp_avg"].numel() for state in updates.optimiser.state.values())
    return dict(gradients=gradients, here=here, whole=whole, moment=moment)


def work(out: Path) -> None:
    """The program: train with every stage, and go on from what a checkpoint of the middle of it holds."""
    torch.set_num_threads(1)
    told = engine_deepspeed.configuration

    def sharded(protocol):  # ZeRO-3 shards no small weights, and these are small
        told_then = told(protocol)
        told_then["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return told_then

    engine_deepspeed.configuration = sharded
    number = distributed.launched()
    results = dict(plain=trained(), step=one_step(Protocol())) if number == 1 else {}
    for stage in range(4):
        options, kept = dict(engine="deepspeed", zero_stage=stage, processes=number), io.BytesIO()

        def keep(index, state, kept=kept):
            if index == STOP and number == 1:  # as a checkpoint keeps it
                torch.save(state(), kept)

        results[stage] = trained(keep=keep, **options)
        if number == 1:
            kept.seek(0)
            results[f"resumed {stage}"] = trained(torch.load(kept, weights_only=True), **options)
        results[f"step {stage}"] = one_step(Protocol(batch_size=8, **options))
    torch.save(results, out / f"{number}-{distributed.rank()}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What plain training found, and each of the processes under its own name; and what they said."""
    out = tmp_path_factory.mktemp("engine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    alone = {key: value for key, value in os.environ.items() if key not in distributed.VARIABLES}
    places = [alone] + [alone | group | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    command = [sys.executable, __file__, str(out)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children = [subprocess.Popen(command, env=place, **pipes) for place in places]
    try:
        said = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, lines in zip(children, said, strict=True):
        assert child.returncode == 0, lines
    found = {name: torch.load(out / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")}
    return found | found["1-0"] | dict(said=said)


def assert_same(one, other, tolerance):
    assert set(one["errors"].values()) == set(other["errors"].values()) == {""}
    for name in ("baseline", "noop"):
        np.testing.assert_allclose(one["losses"][name], other["losses"][name], rtol=tolerance, atol=0)
        kept = [run["arms"][name] for run in (one, other)]
        assert kept[0]["dev"] == pytest.approx(kept[1]["dev"])
        assert kept[0]["state"].keys() == kept[1]["state"].keys()
        for key, value in kept[0]["state"].items():
            torch.testing.assert_close(value, kept[1]["state"][key], rtol=tolerance, atol=tolerance)


@needs_deepspeed
@pytest.mark.parametrize("stage", range(4))
def test_one_process_trains_as_torch_alone_does(runs, stage):
    assert len(runs["plain"]["losses"]["baseline"]) == STEPS
    assert_same(runs["1-0"][stage], runs["plain"], 1e-6)


@needs_deepspeed
@pytest.mark.parametrize("stage", range(4))
def test_two_processes_train_as_torch_alone_does(runs, stage):
    for process in ("2-0", "2-1"):
        assert_same(runs[process][stage], runs["plain"], 1e-5)


@needs_deepspeed
@pytest.mark.parametrize("stage", range(4))
def test_a_resumed_run_is_bit_equal(runs, stage):
    resumed, whole = runs["1-0"][f"resumed {stage}"], runs["1-0"][stage]
    for name in ("baseline", "noop"):
        assert resumed["losses"][name] == whole["losses"][name][STOP + 1 :] != []
        for key, value in whole["arms"][name]["state"].items():
            assert torch.equal(value, resumed["arms"][name]["state"][key]), key


@needs_deepspeed
@pytest.mark.parametrize("stage", range(4))
def test_two_processes_have_the_gradients_of_the_whole_batch(runs, stage):
    expected = runs["step"]["gradients"]  # Adam would forgive a wrong factor
    for process in ("2-0", "2-1"):
        gradients = runs[process][f"step {stage}"]["gradients"]
        assert gradients.keys() == expected.keys()
        for name, value in gradients.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@needs_deepspeed
@pytest.mark.parametrize("stage", range(4))
def test_a_process_holds_no_more_than_its_part(runs, stage):
    for process in ("2-0", "2-1"):
        step = runs[process][f"step {stage}"]
        assert step["here"] == (0 if stage == 3 else step["whole"])
        assert step["moment"] == (step["whole"] if stage == 0 else pytest.approx(step["whole"] / 2, rel=0.01))


@needs_deepspeed
def test_deepspeed_keeps_quiet_and_compiles_nothing(runs):
    assert all(lines.strip() == "" for lines in runs["said"]), runs["said"]


def test_without_deepspeed_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UsageError, match="needs DeepSpeed") as caught:
        engine.check(Protocol(engine="deepspeed"), 100)
    assert caught.value.hint == "pip install 'effbench[deepspeed]'"


@pytest.mark.parametrize(
    "options, images, message, hint",
    [
        (dict(processes=2), 100, "2 processes were started", "add --engine deepspeed"),
        (dict(zero_stage=1), 100, "--zero-stage 1 belongs to DeepSpeed", "add --engine deepspeed"),
        (dict(engine="deepspeed", device="cuda:1"), 100, "not on cuda:1", "add --device cpu"),
        (dict(engine="deepspeed", processes=3), 1000, "a batch of 256 evenly", "--batch-size 255"),
        (dict(engine="deepspeed", processes=2), 99, "a batch of 99 evenly", "--batch-size 98"),
        (dict(engine="deepspeed", processes=4), 3, "a batch of 3 evenly", "start fewer processes"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(monkeypatch, options, images, message, hint):
    monkeypatch.setattr(engine, "find_spec", lambda name: True)
    with pytest.raises(UsageError, match=message) as caught:
        engine.check(Protocol(**options), images)
    assert caught.value.hint == hint


def test_what_an_engine_can_do_is_not(monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: True)
    engine.check(Protocol(), 3)
    engine.check(Protocol(engine="deepspeed", processes=2, zero_stage=3), 1000)


@pytest.mark.parametrize("stage", [-1, 4])
def test_there_are_four_stages(stage):
    with pytest.raises(ValidationError, match="zero_stage"):
        Protocol(engine="deepspeed", zero_stage=stage)


def test_alone_nothing_is_exchanged():
    x = torch.randn(2, 3)
    assert distributed.gathered(x) is x and distributed.rank() == 0


def test_a_launcher_says_all_or_nothing(monkeypatch):
    for name in distributed.VARIABLES:
        monkeypatch.setenv(name, "3")
    assert (distributed.launched(), distributed.rank()) == (3, 3)
    monkeypatch.delenv("MASTER_PORT")
    assert (distributed.launched(), distributed.rank()) == (1, 0)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
