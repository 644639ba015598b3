"""token_prune while training: annealing, the learned scorer, and DynamicViT's predictors."""

import copy
import pickle

import pytest
import torch
from tiny import IMAGES, vit

from effbench.examine import tokens_per_layer
from effbench.method import TrainingPlan
from effbench.models.tower import view
from effbench_methods import _prune_stages
from effbench_methods.algorithms.gumbel import keep_mask, masked_sizes, ratio_loss
from effbench_methods.token_prune import TokenPrune, annealed


def planned(model, **parameters):
    """The model with token_prune as it trains, in train mode, and its plan."""
    torch.manual_seed(3)
    method = TokenPrune(**parameters)
    seen = view(model)
    method.edit_model(seen)
    plan = TrainingPlan(seen, [], [])
    method.edit_training(plan)
    model.train()
    return model, plan


def tokens_of(model):
    return tokens_per_layer(model, lambda: model(IMAGES))


# --- EViT's annealing


def test_the_keep_rate_is_one_then_a_cosine_then_final():
    assert annealed(0.5, 0.0) == annealed(0.5, 10 / 300) == 1
    assert annealed(0.5, 55 / 300) == pytest.approx(0.75)  # half way between epochs 10 and 100 of 300
    assert annealed(0.5, 100 / 300) == annealed(0.5, 0.99) == 0.5
    rates = [annealed(0.3, step / 100) for step in range(100)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("score, full", [("class_attention", 17), ("learned", 17), ("mean_query", 17)])
def test_annealing_acts_in_training_only(score, full):
    model, plan = planned(vit(), keep=0.5, at=(1, 2), score=score, anneal=True, phase="both")
    (set_keep,) = plan.each_step
    final = (17, 9, 5, 5)
    for done, expected in ((0.0, (full,) * 4), (55 / 300, (17, 13, 10, 10)), (0.5, final)):
        set_keep(done)
        assert tokens_of(model) == expected
        model.eval()
        assert tokens_of(model) == final
        model.train()
    set_keep(0.0)
    assert tokens_of(copy.deepcopy(model)) == (full,) * 4


def test_ats_caps_are_annealed():
    model, plan = planned(vit(), keep=0.5, at=(1, 2), score="ats", anneal=True, phase="both")
    caps = []
    for done in (0.0, 55 / 300, 1.0):
        plan.each_step[0](done)
        caps.append([model.blocks[block].token_edit.cap for block in (1, 2)])
    assert caps == [[16, 16], [12, 9], [8, 4]]


# --- the learned scorer


@pytest.mark.parametrize("keep", [0.5, 1])
def test_the_learned_scorer_trains(keep):
    model, plan = planned(vit(), keep=keep, at=(1,), score="learned")
    assert plan.trained == [model.blocks[1].token_edit]
    with torch.no_grad():
        hard = model.eval()(IMAGES)
    out = model.train()(IMAGES)
    assert (out - hard).abs().max() < 1e-5  # the gate is 1 going forward
    out.square().sum().backward()
    gradients = [p.grad.abs().sum().item() for p in model.blocks[1].token_edit.parameters()]
    assert min(gradients) > 0


# --- DynamicViT


def test_predictors_train_and_no_token_leaves():
    model, plan = planned(vit(), keep=0.5, at=(1, 2), score="dynamic")
    stages = [model.blocks[block].token_edit for block in (1, 2)]
    assert plan.trained == stages and not plan.each_step
    assert tokens_of(model) == (17,) * 4
    out = model(IMAGES)
    (out.square().sum() + plan.losses[0]()).backward()
    for stage in stages:
        gradients = torch.cat([p.grad.flatten() for p in stage.parameters()])
        assert torch.isfinite(gradients).all() and gradients.abs().sum() > 0
    model.zero_grad()
    model(IMAGES).square().sum().backward()  # and without the ratio loss: through attention
    for stage in stages:
        assert sum(p.grad.abs().sum().item() for p in stage.parameters()) > 0


def test_an_all_keep_mask_is_the_baseline():
    for options in (dict(), dict(class_token=False, global_pool="avg", fc_norm=False)):
        model = vit(**options)
        with torch.no_grad():
            expected = model(IMAGES)
        planned(model, keep=0.5, at=(1, 2), score="dynamic")
        for block in (1, 2):
            model.blocks[block].token_edit.logits[-1].bias.data = torch.tensor([100.0, -100.0])
        assert (model(IMAGES) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("options", [dict(), dict(class_token=False, global_pool="avg", fc_norm=False)])
def test_masked_tokens_are_as_good_as_gone(options, monkeypatch):
    """Later attention, the predictors' mean and the mean over patch tokens leave them out."""
    model, _ = planned(vit(**options), keep=0.5, at=(1, 2), score="dynamic")

    def likeliest(logits):
        score = (logits[..., 0] - logits[..., 1]).masked_fill(gone[: logits.shape[0]], float("-inf"))
        k = 8 if not gone.any() else 4
        keep = torch.zeros_like(score).scatter(1, score.topk(k, dim=1).indices, 1.0)
        gone.copy_(keep == 0)
        return keep

    gone = torch.zeros(2, 16, dtype=torch.bool)
    monkeypatch.setattr(_prune_stages, "keep_mask", likeliest)
    with torch.no_grad():
        masked = model(IMAGES)
        removed = model.eval()(IMAGES)
        assert tokens_of(model)[1:3] == (model.num_prefix_tokens + 8, model.num_prefix_tokens + 4)
    assert (masked - removed).abs().max() < 1e-4


def test_the_ratio_loss_alone_leads_to_the_published_rates():
    model, plan = planned(vit(), keep=0.7, at=(1, 2, 3), score="dynamic")
    stages = [model.blocks[block].token_edit for block in (1, 2, 3)]
    model.requires_grad_(False)
    for stage in stages:
        stage.requires_grad_(True)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    images = torch.randn(16, 3, 32, 32)
    shares = []
    for _ in range(50):
        model(images)
        shares.append(torch.stack([stage.share.detach() for stage in stages]).cumprod(0).mean(1))
        optimiser.zero_grad()
        plan.losses[0]().backward()
        optimiser.step()
    assert shares[0][2] < 0.2  # untrained predictors keep about half at each stage
    assert torch.stack(shares[-20:]).mean(0).tolist() == pytest.approx([0.7, 0.49, 0.343], abs=0.05)


def test_ratio_loss_is_the_mean_over_images_and_stages():
    shares = [torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.5])]
    assert ratio_loss(shares, 0.5).item() == pytest.approx((0 + 0.25 + 0 + 0.0625) / 4)


def test_masks_are_hard_and_follow_the_logits():
    torch.manual_seed(0)
    logits = torch.log(torch.tensor([0.8, 0.2])).expand(4, 5000, 2)
    keep = keep_mask(logits)
    assert torch.allclose(keep, keep.round(), atol=1e-6) and keep.mean().item() == pytest.approx(0.8, abs=0.02)
    keep = torch.tensor([[1.0, 0.0]], requires_grad=True)
    masked_sizes(torch.ones(1, 2), keep).log().softmax(-1)[0, 0].backward()
    assert torch.isfinite(keep.grad).all() and keep.grad[0, 1] < -0.9  # the masked softmax's own slope


def test_a_model_copies_and_pickles_after_a_training_step():
    model, _ = planned(vit(), keep=0.5, at=(1,), score="dynamic")
    model(IMAGES)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(IMAGES), model.eval()(IMAGES))
        model.train()


def test_dynamic_trains_under_autocast_and_compile():
    model, plan = planned(vit(), keep=0.5, at=(1, 2), score="dynamic")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IMAGES).float().square().sum() + plan.losses[0]()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(IMAGES).square().sum().backward()
    assert plan.losses[0]().item() >= 0
