"""Regressions of the deterministic kind, planted in the real harness: what the gate says of each, and its silence."""

import copy

import pytest
import torch
from rich.console import Console
from test_leaderboard import METRICS
from tiny import flickr8k
from torch.nn.attention import SDPBackend, sdpa_kernel

import effbench
from effbench.commands.gate import gate
from effbench.errors import InvalidError
from effbench.gate import compare
from effbench.live import Live
from effbench.models import attention
from effbench.models.backbones import Timm

METHOD = "token_prune:keep=0.5,at=1/2"
ARMS = {"baseline", "noop", "identity", METHOD}
SMALL = dict(
    backbone="timm:test_vit",
    weights="random",
    image_size=32,
    train="none",
    timing_pairs=0,
    threads=1,
    memory_runs=0,
    controls="none",
)
TRAINED = dict(train="locked", epochs=2, batch_size=8)


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """Run the harness on tiny data; a plant is done to every model that it builds."""
    data = flickr8k(tmp_path_factory.mktemp("data"))
    build = Timm.dual_encoder

    def run(plant=None, methods=(METHOD,), **options):
        def planted(self, protocol, vocabulary):
            model = build(self, protocol, vocabulary)
            plant(model)
            return model

        with pytest.MonkeyPatch.context() as patch:
            if plant:
                patch.setattr(Timm, "dual_encoder", planted)
            live = Live(Console(quiet=True))
            out = tmp_path_factory.mktemp("out")  # two runs of one second have one name
            return effbench.run(methods, data=data, out=out, live=live, **SMALL | options)

    return run


@pytest.fixture(scope="module")
def reference(measure):
    return measure()


@pytest.fixture(scope="module")
def trained(measure):
    return measure(**TRAINED)


def said(reference, run):
    """The changed figures by name, each with its changes by arm; everything else passed, and nothing was left out."""
    outcome = compare(reference, run).outcome()
    assert outcome.exit_code == int(outcome.verdict == "CHANGED") and not outcome.of("NOTE", "INVALID")
    found = {}
    for finding in outcome.of("CHANGED"):
        found.setdefault(finding.figure, {})[finding.cell] = finding
    return found


def test_silence_on_an_unchanged_tree(measure, reference, capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    again = measure()
    assert said(reference, again) == {}
    outcome = compare(reference, again).outcome()
    figures = {finding.figure for finding in outcome.findings}
    assert figures >= {"test FLOPs", "tokens", "weight bytes", "operations", "attention", "outputs", *METRICS}
    assert {finding.cell for finding in outcome.findings} == ARMS
    for name, record in (("old", reference), ("new", again)):
        (tmp_path / f"{name}.json").write_text(record.model_dump_json())
    assert gate(str(tmp_path / "old.json"), str(tmp_path / "new.json"), annotations=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("SAME: ") and len(lines) == 3  # and the two that keep it from being a command


def test_silence_after_training_too(measure, trained):
    assert said(trained, measure(**TRAINED)) == {}


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_more_work_in_a_layer(measure, reference, share):
    flops = reference.baseline().test_flops.dense
    tokens, width = 5, 64
    extra = torch.zeros(width, round(share * flops / (4 * tokens * width)))

    def plant(model):
        mlp = model.image_encoder.trunk.blocks[0].mlp
        mlp.register_forward_hook(lambda _, given, out: out + given[0] @ extra @ extra.T)

    found = said(reference, measure(plant))
    assert {"test FLOPs", "operations"} <= set(found)
    assert {"weight bytes", "parameters", "tokens", "outputs"}.isdisjoint(found)  # it adds zeros
    assert set(found["test FLOPs"]) == ARMS
    assert found["test FLOPs"]["baseline"].said == f"+{100 * share:g} %"


def test_wider_layers(measure, reference):
    def plant(model):
        for block in model.image_encoder.trunk.blocks:
            width = block.mlp.fc1.in_features
            hidden = block.mlp.fc1.out_features + 16
            block.mlp.fc1, block.mlp.fc2 = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, width)

    found = said(reference, measure(plant))
    assert {"test FLOPs", "weight bytes", "parameters", "outputs"} <= set(found) and "operations" not in found
    assert float(found["weight bytes"]["baseline"].said.split()[0]) > 0


def test_one_extra_layer(measure, reference):
    def plant(model):
        blocks = model.image_encoder.trunk.blocks
        blocks.append(copy.deepcopy(blocks[-1]))

    found = said(reference, measure(plant))
    assert {"test FLOPs", "weight bytes", "parameters", "operations", "tokens", "outputs"} <= set(found)
    assert (found["tokens"]["baseline"].old, found["tokens"]["baseline"].new) == ("5 x6", "5 x7")
    assert set(found["tokens"]) == ARMS


def test_a_lost_fused_attention_of_the_library(measure, reference):
    def plant(model):
        for module in model.image_encoder.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False

    found = said(reference, measure(plant))
    assert {"attention", "operations"} <= set(found)
    assert {"test FLOPs", "weight bytes", "tokens"}.isdisjoint(found)  # its products are the same
    lost = found["attention"]["baseline"]
    assert (lost.old, lost.new) == ("sdpa:flash", "eager + sdpa:flash")  # the text tower's is still fused


def test_a_lost_fused_attention_of_effbench(measure, reference, monkeypatch):
    fused = attention.F.scaled_dot_product_attention

    def written_out(*args, **options):
        with sdpa_kernel(SDPBackend.MATH):
            return fused(*args, **options)

    class Functional:
        scaled_dot_product_attention = staticmethod(written_out)

        def __getattr__(self, name):
            return getattr(torch.nn.functional, name)

    monkeypatch.setattr(attention, "F", Functional())
    found = said(reference, measure())
    assert set(found["attention"]) == {"identity", METHOD}  # the others have the library's own
    assert "sdpa:math" in found["attention"]["identity"].new and "test FLOPs" not in found


def test_a_quality_drop_that_costs_nothing(measure, reference):
    def plant(model):
        model.projection.weight.data = model.projection.weight.data.flip(0)

    found = said(reference, measure(plant))
    assert "outputs" in found and set(found) <= {"outputs", *METRICS}
    assert set(found["outputs"]) == ARMS
    quality = [finding for name in METRICS for finding in found.get(name, {}).values()]
    assert quality and all("on the same platform and weights it must be equal" in each.said for each in quality)


def test_a_quality_drop_of_trained_arms_beyond_what_training_varies(trained):
    """The tolerance is wide where training is in play: here every test image changes its rank for the worse."""
    bare = tuple(arm.model_copy(update=dict(fingerprint=None)) for arm in trained.arms)  # equal outputs have none
    trained, arms = trained.model_copy(update=dict(arms=bare)), []
    for arm in bare:
        held = {}
        for name, metric in arm.metrics.items():
            step = 2 * (metric.high - metric.low) + 20
            value = metric.value - step if metric.higher_is_better else metric.value + step
            held[name] = metric.model_copy(update=dict(value=value, by_seed=(value,)))
        arms.append(arm.model_copy(update=dict(metrics=held)))
    found = said(trained, trained.model_copy(update=dict(id="new", arms=tuple(arms))))
    assert set(found) == set(METRICS) and all("worse; it was trained" in f["baseline"].said for f in found.values())


def test_a_missing_cell(measure, reference):
    with pytest.raises(InvalidError, match="the run has no arm token_prune") as error:
        compare(reference, measure(methods=()))
    assert error.value.exit_code == 2 and [f.cell for f in error.value.findings] == [METHOD]
