"""token_prune: the published algorithm, on both libraries, and what it refuses."""

import copy

import pytest
import timm
import torch
from tiny import IMAGES, clip, vit

import effbench
from effbench.errors import UsageError
from effbench.examine import tokens_per_layer
from effbench.measure.flops import flops
from effbench.method import TrainingPlan
from effbench.models.tower import view
from effbench.registry import methods
from effbench_methods.algorithms.selection import farthest, fuse_rest, gather, stride
from effbench_methods.token_prune import SCORES, Prune, TokenPrune

TRAINING_FREE = [score for score in SCORES if score != "learned"]


def tokens_of(model, images=IMAGES):
    return tokens_per_layer(model, lambda: model(images))


# reference_numbers.json: evit_gmacs_fused, evit_tokens_fused (DeiT-S, patch and prefix tokens)
@pytest.mark.parametrize(
    "keep, gmacs, tokens",
    [
        (0.9, 4.0219, None),
        (0.8, 3.4772, None),
        (0.7, 3.0293, [140, 100, 72]),
        (0.6, 2.6353, None),
        (0.5, 2.3088, [100, 52, 28]),
    ],
)
def test_evit_reference_numbers(keep, gmacs, tokens):
    model = timm.create_model("deit_small_patch16_224").eval()
    effbench.apply(model, f"token_prune:keep={keep},fuse=true")
    image = torch.randn(1, 3, 224, 224)
    assert round(flops(model, image).macs / 1e9, 4) == gmacs
    if tokens:
        assert list(tokens_of(model, image)) == [197] * 3 + [n for n in tokens for _ in range(3)]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("make", [vit, lambda: vit(reg_tokens=4), clip])
def test_tokens_are_removed_and_prefix_tokens_stay(score, make):
    model = make()
    phase = ",phase=both" if score == "learned" else ""
    tower = getattr(model, "visual", model)
    prefix = getattr(tower, "num_prefix_tokens", 1)
    effbench.apply(model, f"token_prune:keep=0.5,at=1/2,score={score}{phase}")
    with torch.no_grad():
        assert tokens_of(tower) == (prefix + 16, prefix + 8, prefix + 4, prefix + 4)
        assert torch.isfinite(tower(IMAGES)).all()


@pytest.mark.parametrize("score", TRAINING_FREE)
@pytest.mark.parametrize("make", [vit, clip])
def test_keep_one_is_the_baseline(score, make):
    model = make()
    tower = getattr(model, "visual", model)
    with torch.no_grad():
        expected = tower(IMAGES)
        effbench.apply(model, f"token_prune:keep=1,at=1/2,score={score}")
        assert (tower(IMAGES) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("score", [score for score in TRAINING_FREE if score != "random"])
def test_an_image_does_not_depend_on_its_batch(score):
    model = effbench.apply(vit(), f"token_prune:keep=0.4,at=1/2,score={score}")
    with torch.no_grad():
        assert (model(IMAGES)[:1] - model(IMAGES[:1])).abs().max() < 1e-5


def test_class_attention_keeps_what_the_class_token_sees():
    model = vit()
    seen = {}
    tower = view(model).image
    tower.after_attention(1, Prune(TokenPrune(keep=0.25, at=(1,)), 24))

    def before(module, inputs):
        seen["tokens"], seen["projections"] = inputs[0].tokens, inputs[1]

    tower.blocks[1].token_edit.register_forward_pre_hook(before)
    tower.blocks[1].mlp.register_forward_pre_hook(lambda _, inputs: seen.update(input=inputs[0]))
    with torch.no_grad():
        model(IMAGES)
        q, k = seen["projections"].q, seen["projections"].k
        attention = (q @ k.transpose(-2, -1) * seen["projections"].scale).softmax(-1).mean(1)[:, 0, 1:]
        best = attention.argsort(dim=1, descending=True)[:, :4]
        normed = tower.blocks[1].norm2(seen["tokens"])
    for image in range(2):
        kept = {tuple(row.tolist()) for row in seen["input"][image, 1:]}
        assert kept == {tuple(normed[image, 1 + i].tolist()) for i in best[image]}


def test_the_fused_token_is_the_weighted_sum_of_the_rest():
    x = torch.randn(2, 6, 3)  # one prefix token and five patches
    weights = torch.rand(2, 5)
    index = weights.topk(2, dim=1).indices
    fused = fuse_rest(gather(index, 1), index, weights, 1)(x, "tokens")
    rest = torch.ones(2, 5).scatter(1, index, 0)
    assert fused.shape == (2, 4, 3)
    assert torch.allclose(fused[:, -1], ((weights * rest).unsqueeze(-1) * x[:, 1:]).sum(1))
    sizes = fuse_rest(gather(index, 1), index, weights, 1)(torch.ones(2, 6), "size")
    assert sizes.sum(1).tolist() == [6, 6]


def test_farthest_points_are_distinct_and_spread():
    x = torch.eye(4).repeat(1, 5, 1) + 0.01 * torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))
    index = farthest(x, 4)[0].tolist()
    assert sorted(i % 4 for i in index) == [0, 1, 2, 3]  # one of each direction
    assert len(set(farthest(x, 20)[0].tolist())) == 20


def test_stride_is_uniform():
    assert stride(10, 5, torch.zeros(2, 1))[1].tolist() == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("n, keep, k", [(30, 0.1, 3), (196, 0.7, 138), (10, 0.7, 7)])
def test_the_number_kept_is_the_ceiling(n, keep, k):
    edit = Prune(TokenPrune(keep=keep, score="norm"), 8)
    state = type("State", (), dict(prefix=1, tokens=torch.randn(1, n + 1, 8)))
    assert edit(state, None)(state.tokens, "tokens").shape[1] == k + 1


def test_the_learned_scorer_trains():
    model = vit()
    seen = view(model)
    method = TokenPrune(keep=0.5, at=(1,), score="learned")
    assert method.phase == "both"
    method.edit_model(seen)
    plan = TrainingPlan(seen, [model], [])
    method.edit_training(plan)
    assert plan.trained == [model.blocks[1].token_edit]
    with torch.no_grad():
        model.eval()
        hard = model(IMAGES)
    model.train()
    out = model(IMAGES)
    assert (out - hard).abs().max() < 1e-5  # the gate is 1 going forward
    out.square().sum().backward()
    gradients = [p.grad.abs().sum().item() for p in model.blocks[1].token_edit.parameters()]
    assert min(gradients) > 0


def test_random_differs_between_draws_and_repeats_with_the_seed():
    model = effbench.apply(vit(), "token_prune:keep=0.3,at=1,score=random")
    with torch.no_grad():
        torch.manual_seed(1)
        first, second = model(IMAGES), model(IMAGES)
        torch.manual_seed(1)
        assert torch.equal(model(IMAGES), first) and not torch.equal(first, second)


def test_apply_copies_and_autocasts():
    model = effbench.apply(vit(), "token_prune:keep=0.5,at=1/2")
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(IMAGES), model(IMAGES))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model(IMAGES)).all()


@pytest.mark.parametrize(
    "spec, message",
    [
        ("token_prune:keep=0", "keep"),
        ("token_prune:keep=1.5", "keep"),
        ("token_prune:score=best", "score"),
        ("token_prune:at=1/9", "block 9 does not exist"),
        ("token_prune:score=learned,phase=test", "must be trained"),
        ("token_prune:score=grid,fuse=true", "no weights to fuse"),
    ],
)
def test_bad_parameters_are_refused(spec, message):
    with pytest.raises(UsageError, match=message):
        effbench.apply(vit(), spec)


def test_class_attention_needs_a_class_token():
    with pytest.raises(UsageError, match="needs a class token.*") as refused:
        effbench.apply(vit(class_token=False, global_pool="avg"), "token_prune:at=1")
    assert "score=norm" in refused.value.hint


def test_the_control_has_the_same_budget():
    control = methods.get("token_prune")(keep=0.4, at=(1,), score="norm").controls()["random"]
    assert (control.keep, control.at, control.score) == (0.4, (1,), "random")
