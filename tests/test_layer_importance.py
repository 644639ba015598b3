"""Layer importance: the published measures against plain loops, on planted blocks, and that nothing is left behind."""

import copy

import pytest
import torch
from tiny import IMAGES, clip, vit

import effbench
from effbench.calibration_set import CalibrationSet, of_inputs
from effbench.errors import UsageError
from effbench.models.tower import view
from effbench_methods.algorithms.layer_importance import (
    angle,
    angular_distance,
    block_influence,
    gradient_norm,
    hidden_states,
    parameter_change,
    turned,
)

TEXTS = torch.tensor([[48, 3, 4, 49] + [0] * 8, [48, 5, 49] + [0] * 9])
PHOTOS = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(2))  # two batches, of 16 and 4


def states_of(tower, model, calibration, images=32):
    """All states, by depth; tokens of both batches behind one another."""
    seen = [[] for _ in range(len(tower) + 1)]
    hidden_states(tower, model, calibration, images, lambda depth, tokens, ends: seen[depth].append((tokens, ends)))
    return seen


def test_cosines_and_angles():
    x, y = torch.randn(5, 7, 16, dtype=torch.float64), torch.randn(5, 7, 16, dtype=torch.float64)
    cosine = torch.cosine_similarity(x, y, dim=-1)
    assert torch.allclose(turned(x, y).double(), 1 - cosine, atol=1e-6)
    assert torch.allclose(angle(x, y), cosine.arccos() / torch.pi, atol=1e-6)
    assert (angle(x, 3 * x) < 1e-6).all() and torch.allclose(angle(x, -x), torch.ones(5, 7).double(), atol=1e-3)
    near = x + 1e-3 * y  # where arccos of a float32 cosine has no digits left
    exact = torch.cosine_similarity(x, near, dim=-1).clamp(-1, 1).arccos() / torch.pi
    assert torch.allclose(angle(x.float(), near.float()), exact, rtol=1e-3)


def test_the_states_are_those_between_the_library_s_blocks():
    model, expected = vit(), []
    plain = copy.deepcopy(model)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0]))
    model.blocks[-1].register_forward_hook(lambda _, __, output: expected.append(output))
    with torch.no_grad():
        model(PHOTOS[:4])
    found = states_of(view(plain).image, plain, of_inputs(PHOTOS[:4]), 4)
    assert len(found) == len(expected) == 5
    for (tokens, ends), state in zip((seen[0] for seen in found), expected, strict=True):
        assert ends is None and (tokens - state).abs().max() < 1e-5


def test_measures_of_an_image_tower_are_means_over_all_tokens_of_all_batches():
    model = vit()
    tower, calibration = view(model).image, of_inputs(PHOTOS)
    states = [torch.cat([tokens for tokens, _ in seen]).double() for seen in states_of(tower, model, calibration)]
    assert states[0].shape == (20, 17, 24)
    cosine = [torch.cosine_similarity(states[i], states[i + 1], dim=-1) for i in range(4)]
    influence = block_influence(tower, model, calibration, 32)
    assert torch.allclose(influence, torch.stack([1 - c.mean() for c in cosine]), atol=1e-6)
    for n in (1, 2, 4):
        far = [torch.cosine_similarity(states[i], states[i + n], dim=-1).arccos() / torch.pi for i in range(5 - n)]
        distance = angular_distance(tower, model, calibration, 32, n)
        assert torch.allclose(distance, torch.stack([f.mean() for f in far]), atol=1e-5)
    for n in (0, 5):
        with pytest.raises(ValueError, match="of 4 blocks"):
            angular_distance(tower, model, calibration, 32, n)


def test_a_text_counts_up_to_its_end_and_its_angle_is_taken_there():
    model = clip()
    tower, calibration = view(model).text, of_inputs([(IMAGES, TEXTS)])
    seen = [(tokens[0][0].double(), tokens[0][1]) for tokens in states_of(tower, model, calibration, 2)]
    assert all(ends.tolist() == [3, 2] for _, ends in seen)
    texts = [torch.cat([states[0, :4], states[1, :3]]) for states, _ in seen]
    influence = [1 - torch.cosine_similarity(texts[i], texts[i + 1], dim=-1).mean() for i in range(2)]
    assert torch.allclose(block_influence(tower, model, calibration, 2), torch.stack(influence), atol=1e-6)
    last = [torch.stack([states[0, 3], states[1, 2]]) for states, _ in seen]
    far = torch.cosine_similarity(last[0], last[2], dim=-1).arccos().mean() / torch.pi
    assert torch.allclose(angular_distance(tower, model, calibration, 2, 2), far, atol=1e-5)


@pytest.mark.parametrize("spec", ["token_merge:r=4", "token_prune:keep=0.5,at=1/2", "text_pack:how=pack,row=12"])
def test_what_methods_do_to_tokens_is_off_while_it_is_measured_and_on_again_after(spec):
    plain, edited = clip(), effbench.apply(clip(), spec)
    calibration = of_inputs([(IMAGES, TEXTS)])
    with torch.no_grad():
        before = edited(IMAGES, TEXTS)
    for name in ("image", "text"):
        towers = [getattr(view(model), name) for model in (plain, edited)]
        influence = [
            block_influence(tower, model, calibration, 2) for tower, model in zip(towers, (plain, edited), strict=True)
        ]
        assert torch.allclose(*influence, atol=1e-6)
        assert "_through" not in vars(towers[1].loop)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(before, edited(IMAGES, TEXTS), strict=True))


def test_it_measures_without_dropout_and_leaves_the_modes_of_all_parts():
    model = vit(proj_drop_rate=0.5).train()
    tower = view(model).image  # which puts all of it in one mode
    model.blocks[1].eval()
    modes = [part.training for part in model.modules()]
    first = block_influence(tower, model, of_inputs(PHOTOS), 20)
    assert torch.equal(first, block_influence(tower, model, of_inputs(PHOTOS), 20))
    assert [part.training for part in model.modules()] == modes and True in modes and False in modes


def test_a_failure_leaves_nothing_behind():
    model = effbench.apply(vit(), "token_merge:r=2")
    tower = view(model).image
    edits = [block.token_edit for block in tower.blocks]

    def fails(depth, tokens, ends):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        hidden_states(tower, model, of_inputs(PHOTOS), 20, fails)
    assert [block.token_edit for block in tower.blocks] == edits and "_through" not in vars(tower.loop)


def test_a_tower_that_the_data_never_reach_is_refused():
    model = clip()
    with pytest.raises(UsageError, match="never reaches the OpenCLIP text tower") as refused:
        block_influence(view(model).text, model, of_inputs(IMAGES), 2)
    assert "(images, texts)" in refused.value.hint


@pytest.mark.parametrize("name", ["image", "text"])
def test_gradient_norms_are_those_of_the_summed_loss(name):
    model = clip()
    tower = getattr(view(model), name)
    batches = [(IMAGES, TEXTS), (IMAGES.flip(0), TEXTS), (IMAGES + 1, TEXTS)]

    def loss(model, batch):
        images, texts = model(*batch)[:2]
        return (images * texts).sum()

    calibration = CalibrationSet(lambda: iter(batches), 48, lambda model, batch: model(*batch), loss)
    other = copy.deepcopy(model)
    sum(loss(other, batch) for batch in batches[:2]).backward()
    blocks = getattr(view(other), name).blocks
    expected = [torch.cat([p.grad.flatten() for p in block.parameters()]).norm().double() for block in blocks]

    frozen = next(tower.blocks[0].parameters()).requires_grad_(False)
    kept = model.logit_scale.grad = torch.ones(())
    with torch.no_grad():  # as a caller may have it
        found = gradient_norm(tower, model, calibration, 32)
    assert torch.allclose(found, torch.stack(expected), rtol=1e-4) and (found > 0).all()
    assert not frozen.requires_grad and all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert model.logit_scale.grad is kept
    assert all(p.grad is None for p in model.parameters() if p is not model.logit_scale)
    with pytest.raises(UsageError, match="task's loss"):
        gradient_norm(tower, model, of_inputs([(IMAGES, TEXTS)]), 2)


def test_parameter_change_is_relative_and_summed_within_a_block():
    before = [dict(w=torch.tensor([3.0, 4.0]), b=torch.tensor([2.0])), dict(w=torch.zeros(2), b=torch.ones(1))]
    after = [dict(w=torch.tensor([3.0, 3.0]), b=torch.tensor([1.0])), dict(w=torch.ones(2), b=torch.ones(1))]
    assert torch.allclose(parameter_change(before, after), torch.tensor([1 / 5 + 1 / 2, 0.0]).double())
