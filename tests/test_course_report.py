"""The course report (docs/course-report.md): its figures come out, and what is wrong with it is measured."""

import numpy as np
import pytest
import timm
from tiny import flickr8k

from effbench import store
from effbench.cli import main
from effbench.datasets import resolve
from effbench.errors import DataNotFound, UsageError
from effbench.models.tower import view
from effbench.quality import lossiness
from effbench.registry import backbones, presets
from effbench.spec import parse
from effbench.task import Items

MACS = 49 * 768 * 64  # of embedding one image's patches
SCORER = 49 * (64 * 16 + 16)
TEXT_AND_BILINEAR = 50 * 64 + (64 * 64 + 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return flickr8k(tmp_path_factory.mktemp("data"), train=20, dev=4, test=20)


@pytest.fixture(scope="module")
def experiment(folder, tmp_path_factory):
    """Task, what it prepared, backbone and protocol, on a tiny data set."""
    from effbench.records import Protocol

    found = resolve("course_report", folder)
    backbone = backbones.get("course")("patches")
    protocol = Protocol(image_size=112, **found.task.recommended)
    prepared = found.task.prepare(found.data, backbone, protocol, lambda *_: None)
    return found.task, prepared, backbone, protocol


@pytest.fixture(scope="module")
def evidence(experiment):
    from effbench_tasks.course.evidence import examine

    return {spec: examine(spec, *experiment) for spec in ("", "course_pruning", "course_pruning:keep=1.0")}


def test_the_reports_flops_come_out_of_its_own_convention(evidence):
    assert evidence[""].own == 83_494_912 and evidence["course_pruning"].own == 78_807_104


def test_the_right_flops_and_that_dropping_tokens_saves_none(evidence):
    baseline, pruned, all_tokens = (each.right for each in evidence.values())
    assert baseline.dense_flops == 2 * 16 * (MACS + 49 * 64 * 64) and baseline.overhead_flops == 0
    assert pruned.dense_flops == 2 * 16 * (MACS + TEXT_AND_BILINEAR) and pruned.overhead_flops == 2 * 16 * SCORER
    assert baseline.complete and pruned.complete
    assert (all_tokens.dense_flops, all_tokens.overhead_flops) == (pruned.dense_flops, pruned.overhead_flops)


def test_the_pruned_model_has_no_gradient_and_the_baseline_has_one(evidence):
    baseline, pruned = evidence[""], evidence["course_pruning"]
    assert pruned.gradient == 0 and baseline.gradient > 1
    assert pruned.changed == 0 and baseline.changed > 0.99  # with all weights moved no output moves by a single bit
    assert pruned.of_loss_double < 1e-12 and pruned.of_loss < 1e-4 * baseline.of_loss  # what rounding makes of zero
    assert baseline.of_loss_double == pytest.approx(baseline.of_loss, rel=1e-3) and baseline.of_loss > 1e-3


def test_no_token_is_a_patch():
    from effbench_tasks.course.evidence import real_patches

    assert real_patches(112) == (0, 49)


def test_forty_per_cent_of_the_images_and_one_caption_to_test_with(experiment):
    task, prepared, _, _ = experiment
    assert {split: len(first) - 1 for split, first in prepared.first.items()} == {"train": 16, "dev": 4, "test": 16}
    assert len(prepared.tokens["test"]) == 16 and len(prepared.tokens["train"]) == 5 * 16


def test_lossiness_of_a_baseline_that_is_no_better_than_a_constant_is_refused(experiment):
    task, prepared, _, _ = experiment
    (metric,) = task.metrics(prepared, "test")
    targets = prepared.tokens["test"].float().mean(1).numpy() / (prepared.vocabulary[0] - 1)
    group = np.arange(len(targets))
    constant = [Items((targets - targets.mean()) ** 2, group)]
    assert not metric.higher_is_better and metric.chance == pytest.approx(constant[0].values.mean(), rel=1e-4)
    judged = lossiness(metric, constant, [Items(np.full(len(group), 0.505), group)])
    assert judged.lossiness is None and "baseline at chance" in judged.note


def test_the_preset_tells_both_stories(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("effbench.examine.probe", lambda *_, **__: (None, "left out of this test"))  # slow
    out = tmp_path / "out"
    options = ["--data", folder, "--out", out, "--threads", 1, "--backbone", "timm:test_vit", "--weights", "random"]
    code = main(["run", "--preset", "course-report", *map(str, options)])
    shown = capsys.readouterr().out
    records, problems = store.read_all(out)
    assert not problems and [record.envelope.task for record in records] == ["course_report", "flickr8k"]
    assert code == 2 * any(record.status == "INVALID" for record in records)
    own, fair = records
    pruned = own.arm("course_pruning")
    assert pruned.metrics["loss"].lossiness is None and "baseline at chance" in pruned.metrics["loss"].note
    assert pruned.test_speedup and pruned.train_speedup and own.arm("course_pruning:keep=1.0").control == "all_tokens"
    assert own.envelope.protocol.schedule == "constant" and own.envelope.protocol.weight_decay == 0
    assert fair.envelope.protocol.data_share == 0.4 and fair.envelope.protocol.image_size == 112
    assert fair.arm("token_prune:keep=0.5,at=3").tokens[-1] < fair.baseline().tokens[-1]
    table = (out / "course-report.md").read_text()
    for figure in ("83,494,912", "78,807,104", "83,492,864", "0 of 49", "n/a (baseline at chance)", "13.05x", "0.99x"):
        assert figure in shown and figure in table, figure


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--preset course-repot", "did you mean course_report?"),
        ("--preset course-report --method token_prune", "--preset course-report and --method exclude each other"),
        ("--preset course-report --task scenes", "--preset course-report and --task exclude each other"),
        ("--task course_report --backbone timm:test_vit --weights random --data {}", "brings its own model"),
        ("--task course_report --backbone course:patches --train locked --data {}", "no tower to lock"),
        ("--task course_report --backbone course:patch --data {}", "no model named 'patch'"),
        ("--task course_report --backbone course:patches --image-size 100 --data {}", "do not fit 100"),
        ("--task course_report --backbone course:patches --method token_prune --data {}", "needs an image tower"),
        ("--task flickr8k --backbone course:patches --data {}", "has no towers"),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["run", *arguments.format(folder).split()]) == 3
    error = capsys.readouterr().err
    assert said in error and "next:" in error and not list(tmp_path.iterdir())


def test_the_method_edits_its_own_model_alone():
    with pytest.raises(UsageError, match="edits the course report's model alone"):
        parse("course_pruning")[0].edit_model(view(timm.create_model("test_vit")))


@pytest.mark.parametrize("data", [(), ("nowhere",), ("scenes",)])
def test_without_real_photos_nothing_stands_in(tmp_path, monkeypatch, data):
    monkeypatch.delenv("EFFBENCH_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataNotFound, match="flickr8k was not found") as missing:
        presets.get("course_report")().run(None, **dict(zip(("data",), data, strict=False)))
    assert "effbench data get flickr8k" in missing.value.hint
