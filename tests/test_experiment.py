"""Experiments end to end on a tiny data set: results, resume, failures, every bad input."""

import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from tiny import flickr8k

import effbench
from effbench import store
from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.live import Live
from effbench.samples import read_samples

SMALL = dict(
    backbone="timm:test_vit",
    weights="random",
    image_size=32,
    batch_size=8,
    epochs=2,
    timing_pairs=8,
    threads=1,
)
CLI = "from effbench.cli import main; raise SystemExit(main())"
METHOD = "token_prune:keep=0.5,at=1/2"
LEARNED = METHOD + ",score=learned"
TRAIN = ("locked", "full")


class Evil:
    """Unpickling it would run a command."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return flickr8k(tmp_path_factory.mktemp("data"))


def run(data, out, methods=(METHOD,), **options):
    return effbench.run(methods, data=data, out=out, **SMALL | dict(live=Live(Console(quiet=True))) | options)


@pytest.fixture(scope="module")
def record(data, tmp_path_factory):
    """A run with a training-free arm and one that trains a scorer of its own."""
    out = tmp_path_factory.mktemp("out")
    return out, run(data, out, [METHOD, LEARNED])


def test_a_run_leaves_a_record_and_a_leaderboard(record):
    out, found = record
    path = out / "records" / found.id
    assert store.read(path) == found
    text = (out / "README.md").read_text()
    assert METHOD in text and "noop" in text
    assert not (out / ".partial").exists() or not list((out / ".partial").glob("*/checkpoint.pt"))
    frame = effbench.load(path)
    assert set(frame["arm"]) == {arm.name for arm in found.arms}


def test_the_arms_and_their_phases(record):
    _, found = record
    names = [arm.name for arm in found.arms]
    assert names[:5] == ["baseline", "noop", "identity", METHOD, LEARNED]
    assert {arm.name: arm.status for arm in found.arms} == dict.fromkeys(names, "ok")
    assert found.arm(METHOD).train_time is None  # the baseline's own weights
    assert found.arm(LEARNED).train_time.steps > 0 and found.arm(LEARNED).phase == "both"
    assert found.arm(LEARNED).trained_parameters > found.baseline().trained_parameters
    random = [arm for arm in found.arms if arm.control == "random"]
    assert sorted(arm.phase for arm in random) == ["both", "test"]


def test_measures(record):
    _, found = record
    baseline, method = found.baseline(), found.arm(METHOD)
    assert baseline.tokens == (5,) * 6 and method.tokens == (5, 3, 2, 2, 2, 2)
    assert 0 < method.test_flops.dense < baseline.test_flops.dense
    assert method.test_flops.overhead > 0 == baseline.test_flops.overhead
    assert baseline.weight_bytes >= 4 * baseline.parameters
    assert baseline.memory.run_peak >= baseline.memory.load_peak > 0
    assert baseline.train_time.features > 0 and baseline.train_time.compute >= baseline.train_time.features
    for arm in found.arms[1:]:
        assert arm.test_speedup.n == 8 and arm.image_speedup.value > 0
    assert set(method.metrics) == {f"{way}_{m}" for way in ("t2i", "i2t") for m in ("r1", "r5", "r10", "medr")}


def test_noop_is_the_baseline_to_the_bit_and_identity_to_rounding(record):
    out, found = record
    samples = read_samples(out / "records" / found.id / "samples.parquet")
    ranks = samples[samples["kind"] == "item"].pivot_table(index=["score", "index"], columns="arm", values="value")
    assert (ranks["noop"] == ranks["baseline"]).all()
    assert found.arm("noop").losses == found.baseline().losses
    assert found.arm("identity").losses["0"] == pytest.approx(found.baseline().losses["0"], rel=1e-4)


def test_an_arm_is_the_same_alone_and_beside_others(record, data, tmp_path):
    _, found = record
    alone = run(data, tmp_path, [LEARNED], timing_pairs=0)
    assert alone.arm(LEARNED).losses == found.arm(LEARNED).losses
    assert alone.baseline().losses == found.baseline().losses
    assert alone.arm(LEARNED).metrics["t2i_r5"].by_seed == found.arm(LEARNED).metrics["t2i_r5"].by_seed


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Runs that nothing interrupts, by how they train."""
    return {train: run(data, tmp_path_factory.mktemp(train), [LEARNED], timing_pairs=2, train=train) for train in TRAIN}


@pytest.mark.parametrize("train, stop", [("locked", 2), ("locked", 7), ("locked", 11), ("full", 7)])
def test_a_killed_run_ends_as_if_it_had_not_been(whole, data, tmp_path, monkeypatch, train, stop):
    """Interrupted in any phase, with a checkpoint after every step: losses, ranks and samples are the same."""
    from effbench import lockstep

    options = dict(methods=[LEARNED], timing_pairs=2, train=train, checkpoint_every=0.0)
    turns = [0]
    original = lockstep.turn

    def interrupted(*args):
        turns[0] += 1
        if turns[0] == stop:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(lockstep, "turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, **options)
    cut = run(data, tmp_path, **options)
    assert turns[0] > stop and cut.provenance.resumed == 1
    for arm in whole[train].arms:
        other = cut.arm(arm.name)
        assert other.losses == arm.losses
        assert {k: m.by_seed for k, m in other.metrics.items()} == {k: m.by_seed for k, m in arm.metrics.items()}
    steps = effbench.load(tmp_path, samples=True)
    steps = steps[steps["kind"] == "step"]
    assert not steps.duplicated(["arm", "seed", "phase", "index"]).any()
    assert set(steps["phase"]) == {"train", "quality", "timing"} | ({"features"} if train == "locked" else set())


def test_another_number_of_threads_does_not_resume(data, tmp_path, monkeypatch):
    from effbench import experiment

    monkeypatch.setattr(experiment, "pairs", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path)
    with pytest.raises(UsageError, match="used 1 threads, this one has 2"):
        run(data, tmp_path, threads=2)


def test_full_training_and_seeds(data, tmp_path):
    found = run(data, tmp_path, train="full", seeds=2, epochs=1, timing_pairs=0)
    assert set(found.baseline().losses) == {"0", "1"} and len(found.baseline().metrics["t2i_r1"].by_seed) == 2
    assert found.baseline().trained_parameters == found.baseline().parameters
    assert found.baseline().train_time.features == 0


def test_no_training(data, tmp_path):
    found = run(data, tmp_path, train="none", timing_pairs=0)
    assert found.baseline().train_time is None and found.baseline().losses == {}
    with pytest.raises(UsageError, match="acts while training, but nothing is trained"):
        run(data, tmp_path, [METHOD + ",phase=both"], train="none")


def test_an_arm_that_fails_is_named_and_the_others_go_on(data, tmp_path, monkeypatch):
    from effbench_methods.token_prune import Prune

    original = Prune.forward

    def broken(self, state, projections):
        if self.method.score == "norm" and self.training is False and state.tokens.shape[0] == 8:
            raise RuntimeError("no such kernel")
        return original(self, state, projections)

    monkeypatch.setattr(Prune, "forward", broken)
    found = run(data, tmp_path, ["token_prune:keep=0.5,at=1,score=norm", METHOD], timing_pairs=0)
    broken_arm = found.arm("token_prune:keep=0.5,at=1,score=norm")
    assert (broken_arm.status, broken_arm.error) == ("FAILED", "RuntimeError: no such kernel")
    assert found.arm(METHOD).status == "ok" and "FAILED" in (tmp_path / "README.md").read_text()


def test_nan_in_training_is_named(data, tmp_path):
    with pytest.raises(EffbenchError, match="loss is nan at step") as failed:
        run(data, tmp_path, lr=1e38, epochs=4)
    assert "--lr" in failed.value.hint


def test_dry_run_writes_nothing(data, tmp_path, capsys):
    assert run(data, tmp_path / "out", dry_run=True) is None
    shown = capsys.readouterr().out
    assert METHOD in shown and "MiB of memory" in shown and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(methods=["token_prun"]), UsageError, "token_prun"),
        (dict(methods=[""]), UsageError, "a method is missing"),
        (dict(methods=[METHOD + "+"]), UsageError, "a method is missing"),
        (dict(methods=["token_prune:"]), UsageError, "nothing follows the colon"),
        (dict(methods=["noop"]), UsageError, "an arm of every run"),
        (dict(methods=["token_prune:kep=0.5"]), UsageError, "kep"),
        (dict(methods=["token_prune:keep=2"]), UsageError, "keep"),
        (dict(methods=["token_prune:at=40"]), UsageError, "block 40 does not exist"),
        (dict(task="flickr9k"), UsageError, "flickr9k"),
        (dict(backbone="tim:x"), UsageError, "tim"),
        (dict(backbone="timm:vit_tiny_patch16_225"), UsageError, "no model named"),
        (dict(backbone="vit"), UsageError, "names no backbone"),
        (dict(backbone="timm:resnet18", image_size=None), UsageError, "image tower of transformer blocks"),
        (dict(weights="nowhere.safetensors"), InvalidError, "no weights file"),
        (dict(weights=None), InvalidError, "no weights were named"),
        (dict(epochs=-1), UsageError, "--epochs -1"),
        (dict(batch_size=1), UsageError, "--batch-size 1"),
        (dict(seeds=0), UsageError, "--seeds 0"),
        (dict(data="nowhere"), InvalidError, "nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(data, tmp_path, options, error, message):
    with pytest.raises(error, match=message) as refused:
        run(**dict(data=data, out=tmp_path / "out") | options)
    assert refused.value.hint and not (tmp_path / "out").exists()


def test_weights_that_do_not_fit(data, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(InvalidError, match="do not fit"):
        run(data, tmp_path / "out", weights=file)
    save_file({"pos_embed": torch.zeros(1, 5, 64), "norm.weight": torch.zeros(7)}, file)
    with pytest.raises(InvalidError, match=r"norm.weight is \(7,\) in the file, \(64,\) in the model"):
        run(data, tmp_path / "out", weights=file)
    with pytest.raises(InvalidError, match="is a folder"):
        run(data, tmp_path / "out", weights=tmp_path)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(InvalidError, match="not a readable file of weights"):
        run(data, tmp_path / "out", weights=file)
    malicious = tmp_path / "evil.pth"
    malicious.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(InvalidError, match="not a readable file of weights"):
        run(data, tmp_path / "out", weights=malicious)


def test_a_real_kill_resumes_from_the_command_line(data, tmp_path):
    """SIGKILL in mid-run, then the same command: it says that it resumes, and ends."""
    command = [sys.executable, "-c", CLI, "run", "--method", METHOD, "--data", str(data), "--out", str(tmp_path)]
    command += ["--backbone", SMALL["backbone"], "--weights", "random", "--image-size", "32", "--batch-size", "8"]
    command += ["--epochs", "40", "--timing-pairs", "0", "--threads", "1", "--checkpoint-every", "0"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".partial/*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    first.kill()
    first.wait()
    assert not list(tmp_path.glob("records/*/record.json"))
    second = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert second.returncode == 0 and "resuming an interrupted run" in second.stderr, second.stderr[-2000:]
    assert len(list(tmp_path.glob("records/*/record.json"))) == 1
