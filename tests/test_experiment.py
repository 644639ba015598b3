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
    memory_runs=0,
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
    return out, run(data, out, [METHOD, LEARNED], memory_runs=1, batch_sweep="2/4")


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


def test_what_each_arm_really_was(record):
    _, found = record
    baseline, method, learned = found.baseline(), found.arm(METHOD), found.arm(LEARNED)
    assert set(baseline.kernels.attention) == {"sdpa:flash"} and set(baseline.kernels.precision) == {"fp32"}
    assert baseline.kernels.threads == 1 and not baseline.kernels.compiled
    assert baseline.structure.dtypes == {"fp32": baseline.weight_bytes}
    assert "text_encoder" in baseline.structure.trained_layers and method.structure.trained_layers == ()
    assert any("token_edit" in layer for layer in learned.structure.trained_layers)
    assert not any(arm.structure.masked_tokens for arm in found.arms)
    for arm in found.arms:
        assert arm.test_flops.analytic == arm.test_flops.dense and arm.test_flops.useful <= arm.test_flops.dense
    assert method.promised == pytest.approx(baseline.test_flops.dense / method.test_flops.work)
    assert method.realised == pytest.approx(method.test_speedup.value / method.promised)
    assert found.arm("noop").promised == 1 and found.arm("noop").ceiling is None and method.ceiling > 1


def test_where_the_time_goes_adds_up(record):
    _, found = record
    for split in (found.baseline().step_time, found.baseline().train_time, found.arm(LEARNED).train_time):
        parts = split.image + split.text + split.overhead + split.head + split.backward + split.optimiser
        assert parts == pytest.approx(split.compute) and split.first_step > 0
        assert split.total == pytest.approx(split.compute + split.data_wait + split.transfer)
    assert found.baseline().step_time.overhead == 0 < found.arm(METHOD).step_time.overhead
    assert found.baseline().train_time.backward > 0 and found.baseline().train_time.optimiser > 0
    assert found.baseline().step_time.steps == 4  # the middle half of 8; the warm-up is not among them


def test_latency_throughput_and_the_sweep(record):
    _, found = record
    for arm in found.arms:
        assert [timing.batch for timing in arm.by_batch] == [1, 2, 4, 8]  # 16 were asked for, 8 images are there
        assert all(timing.seconds > 0 for timing in arm.by_batch)
    assert found.arm(METHOD).by_batch[-1].speedup == found.arm(METHOD).test_speedup


def test_memory_of_testing_and_of_training(record):
    _, found = record
    baseline = found.baseline()
    assert baseline.memory.weights == baseline.weight_bytes and baseline.memory.gradients in (0, None)
    assert baseline.memory.tensor_peak >= baseline.memory.weights + baseline.memory.activations
    assert baseline.train_memory.gradients == 4 * baseline.trained_parameters
    assert baseline.train_memory.optimiser >= 2 * baseline.train_memory.gradients
    assert found.arm(METHOD).memory is not None and found.arm(METHOD).train_memory is None


def test_agreement_with_the_baseline(record):
    _, found = record
    assert {figure.value for figure in found.arm("noop").agreement.values()} == {1.0}
    assert 0 <= found.arm(METHOD).agreement["t2i_top1"].value <= 1 and found.baseline().agreement == {}


def test_a_method_that_only_masks_is_found_out(data, tmp_path, monkeypatch):
    """It says that it drops tokens, and the tensors keep their length."""
    from effbench_methods.token_prune import Prune

    def masks(self, state, projections):
        state.tokens = torch.cat([state.tokens[:, :3], state.tokens[:, 3:] * 0], dim=1)

    monkeypatch.setattr(Prune, "forward", masks)
    found = run(data, tmp_path, timing_pairs=0)
    assert found.arm(METHOD).structure.masked_tokens and not found.baseline().structure.masked_tokens
    assert any("masked, not removed" in note for note in found.arm(METHOD).notes)
    assert "masked, not removed" in (tmp_path / "README.md").read_text()


@pytest.fixture
def misbehave(monkeypatch):
    """Wrap the forward pass of every image tower: `how(tower, original, images)`; `edited(tower)` tells method arms."""
    from effbench.models.dual_encoder import TimmFeatures

    original = TimmFeatures.forward

    def patch(how):
        monkeypatch.setattr(TimmFeatures, "forward", lambda self, images: how(self, original, images))

    return patch


def edited(tower):
    return any(getattr(block, "token_edit", None) is not None for block in tower.trunk.blocks)


def test_a_method_that_changes_the_shared_batch_fails_and_the_others_go_on(data, tmp_path, misbehave):
    def greedy(tower, original, images):
        return original(tower, images.mul_(0.5) if edited(tower) else images)

    misbehave(greedy)
    found = run(data, tmp_path, timing_pairs=0, train="none")
    assert found.arm(METHOD).status == "FAILED" and "writes into the batch" in found.arm(METHOD).error
    assert "x.clone()" in found.arm(METHOD).error and found.baseline().status == "ok"
    clean = run(data, tmp_path / "clean", [], timing_pairs=0, train="none")
    assert found.baseline().metrics == clean.baseline().metrics


def test_a_method_that_changes_the_batch_later_ends_the_run(data, tmp_path, misbehave):
    """What the arms after it computed means nothing, and a training step cannot be taken back."""

    def late(tower, original, images):
        return original(tower, images.mul_(0.5) if edited(tower) and len(images) > 2 else images)

    misbehave(late)
    with pytest.raises(EffbenchError, match="changed the batch that all arms share") as stopped:
        run(data, tmp_path, timing_pairs=0, train="none")
    assert "clone" in stopped.value.hint and not list(tmp_path.glob("records/*/record.json"))


def test_a_method_that_is_not_deterministic_gets_no_figures(data, tmp_path, misbehave):
    def moody(tower, original, images):
        noise = float.fromhex(f"0x{os.urandom(2).hex()}p-16")
        return original(tower, images) * (1 + noise if edited(tower) else 1) + (noise if edited(tower) else 0)

    misbehave(moody)
    found = run(data, tmp_path, timing_pairs=0, train="none")
    assert found.arm(METHOD).status == "FAILED" and "not deterministic" in found.arm(METHOD).error
    assert found.arm(METHOD).metrics == {} and found.baseline().status == "ok"


def test_a_model_that_is_not_deterministic_is_no_baseline(data, tmp_path, misbehave):
    misbehave(lambda tower, original, images: original(tower, images) + os.urandom(1)[0] * torch.rand(tower.width))
    with pytest.raises(InvalidError, match="the baseline cannot be measured: not deterministic"):
        run(data, tmp_path, timing_pairs=0, train="none")
    assert not list(tmp_path.glob("records/*/record.json"))


def test_a_model_that_turns_moody_later_makes_the_run_invalid(data, tmp_path, misbehave):
    calls = [0]

    def moody(tower, original, images):
        calls[0] += len(images) > 2
        noise = torch.randn(len(images), tower.width, generator=torch.Generator().manual_seed(calls[0]))
        return original(tower, images) + 10 * noise * (len(images) > 2)

    misbehave(moody)
    found = run(data, tmp_path, timing_pairs=0, train="none")
    assert found.status == "INVALID" and "not deterministic" in found.why_invalid


def test_a_metric_without_a_direction_is_refused(data, tmp_path, monkeypatch):
    from dataclasses import replace

    from effbench.alignment import Alignment

    original = Alignment.metrics
    monkeypatch.setattr(Alignment, "metrics", lambda *a: [replace(m, higher_is_better=None) for m in original(*a)])
    with pytest.raises(InvalidError, match="t2i_r1 of flickr8k does not say whether higher is better"):
        run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_few_pairs_give_no_verdict(data, tmp_path):
    found = run(data, tmp_path, timing_pairs=4, train="none")
    figure = found.arm(METHOD).test_speedup
    assert (figure.verdict, figure.n, figure.low) == ("TOO FEW SAMPLES", 4, None)
    assert "TOO FEW SAMPLES (n = 4)" in (tmp_path / "README.md").read_text()


def test_timing_goes_on_until_it_is_sure_or_the_budget_ends(data, tmp_path):
    found = run(data, tmp_path, timing_pairs=6, train="none", until=1e-9, budget=1.0)
    assert found.arm(METHOD).test_speedup.n > 6 and (found.provenance.until, found.provenance.budget) == (1e-9, 1.0)
    sure = run(data, tmp_path, timing_pairs=6, train="none", until=0.999)
    assert sure.arm(METHOD).test_speedup.n < 200


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
    """Runs that nothing interrupts, by how they train; dev is looked at after steps 2 and 3 of each epoch."""
    options = dict(timing_pairs=2, dev_checks=2)
    return {train: run(data, tmp_path_factory.mktemp(train), [LEARNED], train=train, **options) for train in TRAIN}


@pytest.mark.parametrize("train, stop", [("locked", 2), ("locked", 7), ("locked", 11), ("full", 7)])
def test_a_killed_run_ends_as_if_it_had_not_been(whole, data, tmp_path, monkeypatch, train, stop):
    """Interrupted in any phase, with a checkpoint after every step: losses, ranks and samples are the same."""
    from effbench import lockstep

    options = dict(methods=[LEARNED], timing_pairs=2, train=train, dev_checks=2, checkpoint_every=0.0)
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
        assert other.losses == arm.losses and other.dev == arm.dev
        assert {len(seen) for seen in arm.dev.values()} == ({4} if arm.train_time else set())
        assert {k: m.by_seed for k, m in other.metrics.items()} == {k: m.by_seed for k, m in arm.metrics.items()}
    steps = effbench.load(tmp_path, samples=True)
    steps = steps[steps["kind"] == "step"]
    assert not steps.duplicated(["arm", "seed", "phase", "index"]).any()
    assert set(steps["phase"]) == {"train", "quality", "timing 8", "timing 1"} | (
        {"features"} if train == "locked" else set()
    )


def test_the_best_look_at_dev_is_kept_and_costed(data, tmp_path, monkeypatch):
    """Four looks of which the second is best: its weights are tested, and the target is reached at it."""
    from effbench import experiment, training

    values, seen, found = (10.0, 300.0, 200.0, 300.0), {}, {}  # far above what chance is on six images
    original, train = training.evaluate, training.train

    def evaluate(arm, *args):
        seen.setdefault(arm.name, []).append({key: value.clone() for key, value in arm.model.state_dict().items()})
        training.look = len(seen[arm.name])
        return original(arm, *args)

    def kept(*args):
        return found.setdefault("kept", train(*args))

    monkeypatch.setattr(training, "evaluate", evaluate)
    monkeypatch.setattr(training, "look", 0, raising=False)
    monkeypatch.setattr(training, "reduce", lambda *args: values[training.look - 1])
    monkeypatch.setattr(experiment, "train", kept)
    record = run(data, tmp_path, [LEARNED], dev_checks=2)
    steps = effbench.load(tmp_path, samples=True)
    for name in ("baseline", LEARNED):
        arm, state = record.arm(name), found["kept"]["arms"][name]["state"]
        assert arm.dev == {"0": values} and len(seen[name]) == 4
        assert state and all(torch.equal(value, seen[name][1][key]) for key, value in state.items())
        assert any(not torch.equal(value, seen[name][3][key]) for key, value in state.items())
        costs, own = arm.economics, steps[steps["arm"] == name]
        assert (costs.target, costs.best_dev, costs.reached, costs.seeds) == (285.0, 300.0, 1, 1)
        passed = own.loc[own["phase"] == "features", "seconds"].sum()
        trained = own[own["phase"] == "train"].set_index("index")["seconds"]
        assert costs.seconds_to_target == pytest.approx(passed + trained.loc[:2].sum())  # three of six steps
        assert costs.tuning_seconds == pytest.approx(passed + trained.sum()) and len(trained) == 6
        step = arm.train_flops
        # the learned scorer sits inside the tower, whose features then change with every step
        assert (step.once > 0) == (name == "baseline") == bool(passed)
        head, pairs = step.work - step.once / 2, 3 * 8
        assert costs.flops_to_target == pytest.approx(step.once * (24 + 6) + head * pairs)
        assert costs.tuning_flops == pytest.approx(step.once * (24 + 6) + head * 2 * pairs)
    assert record.baseline().economics.break_even is None
    assert all(arm.economics is None for arm in record.arms if arm.train_time is None)
    assert "speed-up to target" in (tmp_path / "README.md").read_text()


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


def test_dry_run_counts_the_looks_at_dev(data, tmp_path, monkeypatch):
    """With every step taken to last a second, each further look lasts as long as the dev split has batches."""
    from effbench import dry_run

    monkeypatch.setattr(dry_run, "_seconds", lambda step: (step(), 1.0)[1])
    monkeypatch.setattr(dry_run, "_time", str)
    found = {}
    monkeypatch.setattr(dry_run, "show", lambda experiment, _: found.update(rows=dry_run.estimate(experiment)))

    def training_seconds(**options):
        run(data, tmp_path, [LEARNED], dry_run=True, **options)
        header, rows, lines = found["rows"]
        assert any(f"looks at dev per seed {2 * options['dev_checks']}" in line for line in lines)
        return {row[0]: float(row[header.index("train")]) for row in rows}

    for train in TRAIN:
        one, three = (training_seconds(dev_checks=checks, seeds=2, train=train) for checks in (1, 3))
        # 2 seeds x 2 epochs x 2 more looks at 6 images, which are timed as one batch
        assert three["baseline"] - one["baseline"] == three[LEARNED] - one[LEARNED] == pytest.approx(8)


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
        (dict(batch_sweep="1/x"), UsageError, "not batch sizes"),
        (dict(batch_sweep="0"), UsageError, "not batch sizes"),
        (dict(threads=999), UsageError, "--threads 999"),
        (dict(device="tpu"), UsageError, "--device tpu"),
        pytest.param(
            dict(device="cuda:0"),
            UsageError,
            "sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
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
    command += ["--memory-runs", "0"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".partial/*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    first.kill()
    first.wait()
    assert not list(tmp_path.glob("records/*/record.json"))
    second = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert second.returncode in (0, 2) and "resuming an interrupted run" in second.stderr, second.stderr[-2000:]
    ends = [line for line in second.stderr.splitlines() if line.endswith("elapsed")]
    assert len(ends) >= 3 and all(", 100 %, " in line for line in ends), ends
    assert len(list(tmp_path.glob("records/*/record.json"))) == 1
