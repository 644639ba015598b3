"""Methods that look at training data: what they are given, and choices that are made once, before training."""

import pytest
import tiny
import torch
from rich.console import Console

import effbench
from effbench.calibration_set import CalibrationSet, of_inputs
from effbench.errors import UsageError
from effbench.live import Live

PICKY = '''
"""Trains the block whose number the data tell."""
from dataclasses import dataclass, replace
from effbench.method import Method, param

LOOKED = []

@dataclass(frozen=True)
class Picky(Method):
    """Trains one block."""
    at: int | None = param(None, "the block; none: chosen on data")
    default_phase = "train"

    def settle(self, model, calibration):
        losses = [float(loss.detach()) for loss in calibration.losses(model.model, 20)]
        LOOKED.append((calibration.available, calibration.thrifty, len(losses)))
        return replace(self, at=2)

    def edit_training(self, plan):
        assert self.at is not None, "edit_training was called on an unsettled method"
        plan.frozen.append(plan.model.image.module)
        plan.trained.append(plan.model.image.blocks[self.at].mlp.fc1.weight)
'''


def test_images_are_handed_out_in_batches_as_often_as_asked():
    images = torch.randn(40, 3, 8, 8)
    seen = []
    calibration = of_inputs(images)
    for _ in range(2):
        calibration.run(lambda batch: seen.append(batch), 20)
    assert [len(batch) for batch in seen] == [16, 16] * 2  # whole batches, no fewer images than asked for
    assert torch.equal(torch.cat(seen[:2]), images[:32]) and calibration.available == 40


def test_a_model_of_several_inputs_takes_tuples():
    seen = []
    calibration = of_inputs([(torch.zeros(3, 1), torch.ones(3))])
    calibration.run(lambda *inputs: seen.append(inputs), 1)
    assert len(seen[0]) == 2 and calibration.available == 3


def test_too_few_images_are_refused_by_name():
    of_inputs(torch.zeros(5, 3, 8, 8)).need(5, "quantize")
    with pytest.raises(UsageError, match="quantize: images=6 needs 6 training images .* there are 5"):
        of_inputs(torch.zeros(5, 3, 8, 8)).need(6, "quantize: images=6")
    with pytest.raises(UsageError, match="there are none") as nothing:
        of_inputs(None).need(1, "quantize")
    assert "calibration=images" in nothing.value.hint


@pytest.mark.parametrize(
    "inputs, message",
    [
        ([3], "is no tensor"),
        (torch.full((2, 3, 32, 32), torch.nan), "not finite"),
        (torch.zeros(2, 3, 24, 24), "does not take \\(2, 3, 24, 24\\)"),
        (torch.zeros(2, 1, 32, 32), "does not take \\(2, 1, 32, 32\\)"),
    ],
)
def test_what_a_model_cannot_be_calibrated_with_is_refused(inputs, message):
    with pytest.raises(UsageError, match=f"calibration: .*{message}") as refused:
        effbench.apply(tiny.vit(), "quantize:kind=static,images=1", calibration=inputs)
    assert "(images, 3, height, width)" in refused.value.hint


def test_gradients_need_a_loss():
    with pytest.raises(UsageError, match="task's loss"):
        list(of_inputs(torch.zeros(2, 3, 8, 8)).losses(torch.nn.Identity(), 2))


def test_hooks_see_a_run_without_gradients():
    layer = torch.nn.Linear(2, 2)
    grads = []
    layer.register_forward_hook(lambda _, __, output: grads.append(output.requires_grad))
    batch = torch.zeros(3, 2)
    CalibrationSet(lambda: iter([batch]), 3, lambda model, x: model(x)).run(layer, 3)
    assert grads == [False]


def test_choices_are_made_once_per_seed_and_charged_to_the_arm(tmp_path, distribution):
    distribution(
        "picky", {"pickies/__init__.py": "", "pickies/picky.py": PICKY}, {"effbench.methods": {"p": "pickies"}}
    )
    data = tiny.flickr8k(tmp_path)
    small = dict(backbone="timm:test_vit", weights="random", image_size=32, batch_size=8, epochs=1, timing_pairs=0)
    small |= dict(train="full", threads=1, memory_runs=0, seeds=2, live=Live(Console(quiet=True)))
    found = effbench.run(["picky"], data=data, out=tmp_path / "out", **small)

    from pickies.picky import LOOKED

    arm = found.arm("picky")
    assert arm.status == "ok" and arm.spec == "picky"  # as it was asked for
    assert "image_encoder.trunk.blocks.2.mlp.fc1.weight" in arm.structure.trained_layers
    assert arm.trained_parameters < found.baseline().trained_parameters
    real = [look for look in LOOKED if not look[1]]
    assert real == [(24, False, 2)] * 2  # one per seed, on the training split
    assert 0 < arm.train_time.settle < arm.train_time.total and found.baseline().train_time.settle == 0
    parts = arm.train_time
    spent = parts.image + parts.text + parts.overhead + parts.head + parts.backward + parts.optimiser
    assert spent == pytest.approx(parts.compute)


def test_an_interrupted_run_does_not_choose_again(tmp_path, distribution, monkeypatch):
    from effbench import experiment

    distribution(
        "picky", {"pickies/__init__.py": "", "pickies/picky.py": PICKY}, {"effbench.methods": {"p": "pickies"}}
    )
    data = tiny.flickr8k(tmp_path)
    small = dict(backbone="timm:test_vit", weights="random", image_size=32, batch_size=8, epochs=1, timing_pairs=0)
    small |= dict(train="full", threads=1, memory_runs=0, checkpoint_every=0)

    def start(out):
        return effbench.run(["picky"], data=data, out=tmp_path / out, **small, live=Live(Console(quiet=True)))

    whole = start("whole")
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start("stopped")

    from pickies.picky import LOOKED

    LOOKED.clear()
    resumed = start("stopped")
    assert not [look for look in LOOKED if not look[1]]
    assert resumed.arm("picky").metrics == whole.arm("picky").metrics
    assert resumed.arm("picky").train_time.settle > 0
