"""token_prune: the published algorithms, on both libraries, and what they refuse."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import IMAGES, clip, vit

import effbench
from effbench.arms import plan_arms
from effbench.errors import UsageError
from effbench.examine import tokens_per_layer
from effbench.measure.flops import flops
from effbench.method import TrainingPlan
from effbench.models.attention import Projections
from effbench.models.token_state import TokenState
from effbench.models.tower import view
from effbench.registry import methods
from effbench.spec import parse
from effbench_methods._prune_stages import Prune
from effbench_methods.algorithms.adaptive_sampling import sample, significance
from effbench_methods.algorithms.selection import change, farthest, fuse_rest, gather, rest, stride
from effbench_methods.token_prune import SCORES, TRAINED, TokenPrune

TRAINING_FREE = [score for score in SCORES if score not in TRAINED]
FIXED = [score for score in SCORES if score != "ats"]  # as many tokens for every image
MANY = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def edited(model, **parameters):
    """The model with token_prune, as an experiment edits it, for scores that `effbench.apply` cannot train."""
    torch.manual_seed(3)
    TokenPrune(**parameters).edit_model(view(model))
    return model


def tokens_of(model, images=IMAGES):
    return tokens_per_layer(model, lambda: model(images))


def mean_pooled(**options):
    return vit(class_token=False, global_pool="avg", fc_norm=False, **options)


# reference_numbers.json: evit_tokens_fused (DeiT-S, patch and prefix tokens); test_reference_numbers has the MACs
@pytest.mark.parametrize("keep, tokens", [(0.7, [140, 100, 72]), (0.5, [100, 52, 28])])
def test_evit_reference_numbers(keep, tokens):
    model = timm.create_model("deit_small_patch16_224").eval()
    effbench.apply(model, f"token_prune:keep={keep},fuse=true")
    found = tokens_of(model.to("meta"), torch.empty(1, 3, 224, 224, device="meta"))
    assert list(found) == [197] * 3 + [n for n in tokens for _ in range(3)]


@pytest.mark.parametrize("score", FIXED)
@pytest.mark.parametrize("make", [vit, lambda: vit(reg_tokens=4), clip])
def test_tokens_are_removed_and_prefix_tokens_stay(score, make):
    model = edited(make(), keep=0.5, at=(2, 1), score=score)
    tower = getattr(model, "visual", model)
    prefix = getattr(tower, "num_prefix_tokens", 1)
    with torch.no_grad():
        assert tokens_of(tower) == (prefix + 16, prefix + 8, prefix + 4, prefix + 4)
        assert torch.isfinite(tower(IMAGES)).all()


@pytest.mark.parametrize("score", FIXED)
@pytest.mark.parametrize("make", [vit, clip])
def test_keep_one_is_the_baseline(score, make):
    model = make()
    tower = getattr(model, "visual", model)
    with torch.no_grad():
        expected = tower(IMAGES)
        edited(model, keep=1, at=(1, 2), score=score)
        assert (tower(IMAGES) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("make", [vit, lambda: vit(global_pool="avg", fc_norm=False), clip])
@pytest.mark.parametrize("score", [score for score in SCORES if score != "random"])
def test_an_image_does_not_depend_on_its_batch(score, make):
    model = edited(make(), keep=0.6, at=(1, 2), score=score)
    tower = getattr(model, "visual", model)
    with torch.no_grad():
        alone = torch.cat([tower(image[None]) for image in MANY])
        assert (tower(MANY) - alone).abs().max() < 1e-5


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


def test_mean_query_keeps_what_the_patches_see_on_average():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 4)
    x = torch.randn(2, 9, 12)
    edit = Prune(TokenPrune(keep=0.5, score="mean_query"), 12)
    kept = edit(TokenState(x, prefix=1), Projections(q, k, v, 0.5))(x, "tokens")[:, 1:]
    row = (q[:, :, 1:].mean(2, keepdim=True) @ k.transpose(-2, -1) * 0.5).softmax(-1).mean(1)[:, 0, 1:]
    for image in range(2):
        best = {tuple(x[image, 1 + i].tolist()) for i in row[image].argsort(descending=True)[:4]}
        assert {tuple(token.tolist()) for token in kept[image]} == best


def test_the_fused_token_is_the_weighted_sum_of_the_rest():
    x = torch.randn(2, 6, 3)  # one prefix token and five patches
    weights = torch.rand(2, 5)
    index = weights.topk(2, dim=1).indices
    fused = fuse_rest(gather(index, 1), index, weights, 1)(x, "tokens")
    others = torch.ones(2, 5).scatter(1, index, 0)
    assert fused.shape == (2, 4, 3)
    assert torch.allclose(fused[:, -1], ((weights * others).unsqueeze(-1) * x[:, 1:]).sum(1))
    sizes = fuse_rest(gather(index, 1), index, weights, 1)(torch.ones(2, 6), "size")
    assert sizes.sum(1).tolist() == [6, 6]


@pytest.mark.parametrize("score", ["norm", "random", "settled", "learned", "mean_query"])
def test_a_fused_token_is_no_longer_than_those_it_is_made_of(score):
    model = edited(vit(), keep=0.5, at=(1,), score=score, fuse=True)
    seen = []
    model.blocks[1].norm2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        assert tokens_of(model) == (17, 10, 10, 10)
    lengths = seen[0].norm(dim=-1)
    assert (lengths[:, -1] < 3 * lengths[:, :-1].amax(dim=1)).all()


def test_farthest_points_are_distinct_and_spread():
    x = torch.eye(4).repeat(1, 5, 1) + 0.01 * torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))
    index = farthest(x, 4)[0].tolist()
    assert sorted(i % 4 for i in index) == [0, 1, 2, 3]  # one of each direction
    assert len(set(farthest(x, 20)[0].tolist())) == 20


def test_stride_is_uniform():
    assert stride(10, 5, torch.zeros(2, 1))[1].tolist() == [1, 3, 5, 7, 9]


def test_the_rest_is_what_was_not_taken():
    assert rest(torch.tensor([[3, 0], [1, 4]]), 5).tolist() == [[1, 2, 4], [0, 2, 3]]


@pytest.mark.parametrize("n, keep, k", [(30, 0.1, 3), (196, 0.7, 138), (10, 0.7, 7), (16, 1e-12, 1)])
def test_the_number_kept_is_the_ceiling(n, keep, k):
    edit = Prune(TokenPrune(keep=keep, score="norm"), 8)
    state = TokenState(torch.randn(1, n + 1, 8), prefix=1)
    assert edit(state, None)(state.tokens, "tokens").shape[1] == k + 1


def test_random_differs_between_draws_and_repeats_with_the_seed():
    model = effbench.apply(vit(), "token_prune:keep=0.3,at=1,score=random")
    with torch.no_grad():
        torch.manual_seed(1)
        first, second = model(IMAGES), model(IMAGES)
        torch.manual_seed(1)
        assert torch.equal(model(IMAGES), first) and not torch.equal(first, second)


# --- adaptive token sampling


def test_ats_samples_at_fixed_quantiles():
    scores = torch.tensor([[0.7, 0.0, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    index, real = sample(scores, 4)  # at 1/8, 3/8, 5/8, 7/8
    assert index[0, :2].tolist() == [0, 2] and real[0].tolist() == [True, True, False, False]
    assert index[1].tolist() == [0, 1, 2, 3] and real[1].all()


def test_ats_significance_is_class_attention_times_the_norm_of_the_value():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 4)
    p = Projections(q, k, v, 0.5)
    attention = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)[:, :, 0, 1:]
    expected = attention * v[:, :, 1:].norm(dim=-1)
    expected = (expected / expected.sum(-1, keepdim=True)).mean(1)
    assert torch.allclose(significance(p, 1, None), expected, atol=1e-6)
    sizes = torch.ones(2, 9)
    sizes[:, 7:] = 0
    cut = Projections(q[:, :, :7], k[:, :, :7], v[:, :, :7], 0.5)
    assert torch.allclose(significance(p, 1, sizes), F.pad(significance(cut, 1, None), (0, 2)), atol=1e-6)


def test_ats_keeps_fewer_tokens_where_attention_is_narrow_and_never_more_than_the_cap():
    model = vit()
    model.blocks[1].attn.qkv.weight.data *= 20  # sharpens attention
    effbench.apply(model, "token_prune:keep=0.5,at=1/2/3,score=ats")
    with torch.no_grad():
        counts = [tokens_of(model, image[None]) for image in MANY]
        batch = tokens_of(model, MANY)
    assert len({count[1] for count in counts}) > 1
    assert all(limit >= n for count in counts for limit, n in zip((17, 9, 5, 3), count, strict=True))
    assert batch == tuple(map(max, zip(*counts, strict=True)))  # padded to its longest, and padding is never drawn


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_ats_padding_changes_nothing(pool):
    model = vit(global_pool=pool, fc_norm=False)
    model.blocks[1].attn.qkv.weight.data *= 20
    effbench.apply(model, "token_prune:keep=0.8,at=1/2,score=ats")
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in MANY])
        together = model(MANY)
        assert len({tokens_of(model, image[None]) for image in MANY}) > 1
        assert (together - alone).abs().max() < 1e-5
        assert (model(MANY.flip(0)).flip(0) - together).abs().max() < 1e-5


# --- early exit


def test_exit_brings_the_dropped_tokens_back_as_they_were():
    model, seen = mean_pooled(), []
    effbench.apply(model, "token_prune:keep=0.5,at=1,score=settled,exit=true")
    model.blocks[1].norm1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.blocks[1].token_edit.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tokens))
    with torch.no_grad():
        out = model.forward_features(IMAGES)
        assert tokens_of(model) == (16, 8, 8, 8) and out.shape == (2, 16, 24)
        before, after = seen[0], seen[1]
        settled = change(before, after).argsort(dim=1)[:, :8]
        for image in range(2):
            expected = {tuple(row.tolist()) for row in model.norm(after[image, settled[image]])}
            assert {tuple(row.tolist()) for row in out[image, 8:]} == expected


@pytest.mark.parametrize("score", ["settled", "grid", "mean_query"])
def test_exit_keeps_every_token_in_the_mean_and_costs_no_flops(score):
    spec = f"token_prune:keep=0.5,at=1/2,score={score}"
    left, stayed = effbench.apply(mean_pooled(), spec + ",exit=true"), effbench.apply(mean_pooled(), spec)
    with torch.no_grad():
        assert flops(left, IMAGES).dense_flops == flops(stayed, IMAGES).dense_flops
        assert left.forward_features(IMAGES).shape[1] == 16 and stayed.forward_features(IMAGES).shape[1] == 4
        assert (left(IMAGES) - stayed(IMAGES)).abs().max() > 1e-4


def test_exit_changes_nothing_for_a_class_token():
    spec = "token_prune:keep=0.5,at=1/2,score=settled"
    with torch.no_grad():
        for make in (vit, clip):
            one, other = effbench.apply(make(), spec), effbench.apply(make(), spec + ",exit=true")
            pair = (getattr(one, "visual", one)(IMAGES), getattr(other, "visual", other)(IMAGES))
            assert (pair[0] - pair[1]).abs().max() < 1e-5


# --- in use


@pytest.mark.parametrize("score", SCORES)
def test_edited_models_copy_pickle_and_autocast(score):
    model = edited(vit(global_pool="avg", fc_norm=False), keep=0.5, at=(1, 2), score=score)
    with torch.inference_mode():
        results = []
        for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.manual_seed(0)
            results.append(each(IMAGES))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model(IMAGES)).all()
    assert torch.isfinite(model.bfloat16()(IMAGES.bfloat16())).all()


@pytest.mark.parametrize("options", [dict(score=score) for score in FIXED] + [dict(score="settled", exit=True)])
def test_edited_models_compile_without_graph_breaks(options):
    model = edited(mean_pooled() if "exit" in options else vit(), keep=0.5, at=(1, 2), **options)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(IMAGES)
        torch.manual_seed(0)
        assert (compiled(IMAGES) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "spec, message, hint",
    [
        ("keep=0", "keep takes a number, > 0, <= 1", ""),
        ("keep=1.5", "keep", ""),
        ("score=best", "score", ""),
        ("at=1/9", "block 9 does not exist", "at="),
        ("at=", "names no block", "at=3/6/9"),
        ("score=learned,phase=test", "must be trained", "phase=both"),
        ("score=dynamic,phase=test", "must be trained", "phase=both"),
        ("score=grid,fuse=true", "no weights to fuse", "class_attention"),
        ("score=diversity,fuse=true", "no weights to fuse", "class_attention"),
        ("score=ats,fuse=true", "no weights to fuse", "class_attention"),
        ("score=dynamic,fuse=true", "no weights to fuse", "class_attention"),
        ("exit=true,fuse=true", "both bring the dropped tokens back", "one of them"),
        ("score=ats,exit=true", "cannot exit", "score=settled"),
        ("score=dynamic,exit=true", "cannot exit", "score=settled"),
        ("score=ats+token_merge", "conflict", ""),
    ],
)
def test_bad_parameters_are_refused(spec, message, hint):
    with pytest.raises(UsageError, match=message) as refused:
        effbench.apply(vit(), f"token_prune:{spec}")
    assert hint in refused.value.hint


@pytest.mark.parametrize("score", ["class_attention", "ats"])
def test_without_a_class_token_the_refusal_names_mean_query(score):
    with pytest.raises(UsageError, match="needs a class token") as refused:
        effbench.apply(mean_pooled(), f"token_prune:at=1,score={score}")
    assert refused.value.hint.startswith("use score=mean_query")
    effbench.apply(mean_pooled(), "token_prune:at=1,score=mean_query")


# --- controls


def test_controls_have_the_same_budget():
    controls = methods.get("token_prune")(keep=0.4, at=(2, 1)).controls()
    assert [(name, c.score, c.keep, c.at) for name, c in controls.items()] == [
        (name, name, 0.4, (1, 2)) for name in ("random", "grid", "norm")
    ]
    fused = TokenPrune(keep=0.4, at=(1,), fuse=True).controls()
    assert set(fused) == {"random", "norm"} and all(control.fuse for control in fused.values())
    assert TokenPrune(keep=1).controls() == {}
    with torch.no_grad():
        for control in [*controls.values(), *fused.values()]:
            like = TokenPrune(keep=0.4, at=control.at, fuse=control.fuse)
            counts = [tokens_of(effbench.apply(vit(), (method,))) for method in (control, like)]
            assert counts[0] == counts[1]


def test_methods_of_one_budget_share_their_controls():
    same = ["keep=0.5,at=1/2", "keep=0.5,at=2/1,score=ats", "keep=0.5,at=1/2,score=settled,anneal=true"]
    stacks = [parse(f"token_prune:{spec}") for spec in same]
    controls = plan_arms(stacks, ("random", "grid", "norm"))[3 + len(stacks) :]
    assert len(controls) == 3 and all(len(arm.controls_for) == 3 for arm in controls)


def test_what_is_promised():
    assert TokenPrune(keep=0.5).claims == ("tokens",) and TokenPrune(keep=1).claims == ()
    assert TokenPrune(score="ats").claims == ("tokens", "per image")
    assert TokenPrune(score="learned").phase == TokenPrune(score="dynamic").phase == "both"
    plan = TrainingPlan(view(edited(vit(), at=(1,))), [], [])
    TokenPrune(at=(1,), phase="both").edit_training(plan)
    assert not plan.trained and not plan.each_step and not plan.losses
