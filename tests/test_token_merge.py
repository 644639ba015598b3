"""token_merge: the published algorithms, their invariants, and what is refused."""

import copy
import math
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from tiny import IMAGES, clip, vit

import effbench
from effbench.errors import UsageError
from effbench.examine import tokens_per_layer
from effbench.measure.flops import flops
from effbench.models.dual_encoder import TimmFeatures
from effbench.models.tower import view
from effbench.registry import methods
from effbench_methods.algorithms.matching import bipartite, by_energy, merge
from effbench_methods.token_merge import TokenMerge, mean_key, per_block

VARIANTS = ("tome", "pitome", "tofu", "random", "grid", "norm")
STEADY = [variant for variant in VARIANTS if variant != "random"]


def tokens_of(model, images=IMAGES):
    return tokens_per_layer(model, lambda: model(images))


# reference_numbers.json: tome_gmacs_without_matching, tome_final_tokens
@pytest.mark.parametrize(
    "name, r, gmacs, last",
    [
        ("deit_small_patch16_224", 8, 3.4165, 101),
        ("deit_small_patch16_224", 13, 2.7027, 41),
        ("deit_small_patch16_224", 16, 2.2909, 11),
        ("vit_base_patch16_224", 8, 13.104, 101),
        ("vit_base_patch16_224", 13, 10.367, 41),
        ("vit_base_patch16_224", 16, 8.772, 11),
    ],
)
def test_reference_numbers(name, r, gmacs, last):
    model = effbench.apply(timm.create_model(name).eval(), f"token_merge:r={r}")
    image = torch.randn(1, 3, 224, 224)
    digits = len(str(gmacs).partition(".")[2])
    assert round(flops(model, image).macs / 1e9, digits) == gmacs
    assert tokens_of(model, image)[-1] == last


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", [vit, clip, lambda: vit(reg_tokens=4)])
def test_r_zero_is_the_baseline(variant, make):
    model = make()
    tower = getattr(model, "visual", model)
    with torch.no_grad():
        expected = tower(IMAGES)
        effbench.apply(model, f"token_merge:r=0,variant={variant}")
        assert (tower(IMAGES) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("make", [vit, clip, lambda: vit(reg_tokens=4)])
def test_every_block_loses_r_tokens_until_half_is_the_limit(variant, make):
    model = make()
    tower = getattr(model, "visual", model)
    prefix = getattr(tower, "num_prefix_tokens", 1)
    effbench.apply(model, f"token_merge:r=6,variant={variant}")
    with torch.no_grad():
        assert tokens_of(tower) == tuple(prefix + n for n in (10, 5, 3, 2))  # 16 patches; then 10 // 2, 5 // 2, 3 // 2


@pytest.mark.parametrize("variant", ["tome", "pitome", "tofu"])
def test_sizes_always_sum_to_the_original_tokens(variant):
    model = effbench.apply(vit(reg_tokens=2), f"token_merge:r=5,variant={variant}")
    model.blocks.hands_out_sizes = True
    with torch.no_grad():
        model(IMAGES)
    seen = model.blocks.take_sizes()
    assert seen.shape[1] == model.num_prefix_tokens + 2
    assert seen.sum(dim=1).tolist() == [16 + model.num_prefix_tokens] * 2
    assert (seen[:, : model.num_prefix_tokens] == 1).all()  # class and register tokens never merge


class Holder(torch.nn.Module):
    """What `view` takes for a dual encoder."""

    def __init__(self, image_encoder):
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = torch.nn.Identity()


def merged_by_hand(x, metric, sizes, r, prefix):
    """ToMe in plain loops for one image: new tokens in their order, and sizes."""
    n = len(x)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    a, b = list(range(prefix + 1, n, 2)), list(range(prefix, n, 2))
    best = {i: max(b, key=lambda j: float(metric[i] @ metric[j])) for i in a}
    gone = sorted(a, key=lambda i: -float(metric[i] @ metric[best[i]]))[:r]
    new, size = [], []
    for i in [*range(prefix), *(i for i in a if i not in gone), *b]:
        group = [i, *(j for j in gone if best[j] == i)]
        weight = sizes[group]
        new.append((weight[:, None] * x[group]).sum(0) / weight.sum())
        size.append(weight.sum())
    return torch.stack(new), torch.stack(size)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_tome_is_the_algorithm_of_the_paper(prefix):
    torch.manual_seed(prefix)
    x, metric, sizes = torch.randn(3, 15, 8), torch.randn(3, 15, 4), torch.randint(1, 5, (3, 15)).float()
    reduce = merge(bipartite(metric, 5, prefix), sizes)
    for image in range(3):
        tokens, size = merged_by_hand(x[image], metric[image], sizes[image], 5, prefix)
        assert torch.allclose(reduce(x, "tokens")[image], tokens, atol=1e-6)
        assert torch.equal(reduce(sizes, "size")[image], size)
        assert torch.equal(reduce(sizes.clone(), "size")[image], size)
        labels = reduce(torch.arange(15).expand(3, 15), "label")[image].tolist()
        alone = [sizes[image, label] == new if label >= 0 else None for label, new in zip(labels, size, strict=True)]
        assert alone.count(None) > 0 and False not in alone  # -1 marks those that took somebody in


def test_pitome_is_the_algorithm_of_the_paper():
    torch.manual_seed(0)
    metric, r, prefix, margin = torch.randn(2, 13, 4), 3, 1, 0.5
    found = by_energy(metric, r, prefix, margin)
    for image in range(2):
        k = metric[image, prefix:] / metric[image, prefix:].norm(dim=-1, keepdim=True)
        cosine = (k @ k.T).tolist()
        energy = [sum(s - margin if s >= margin else math.exp(s - margin) - 1 for s in row) / 12 for row in cosine]
        order = sorted(range(12), key=lambda i: -energy[i])
        a, b = order[0 : 2 * r : 2], order[1 : 2 * r : 2]
        assert found.source[image].tolist() == [prefix + i for i in a]
        kept = found.keep[image].tolist()
        assert kept == [0, *sorted(prefix + i for i in order[2 * r :]), *(prefix + j for j in b)]
        partners = [kept[place] - prefix for place in found.target[image].tolist()]
        assert partners == [max(b, key=lambda j: cosine[i][j]) for i in a]


def test_tofu_prunes_early_and_preserves_norms_late():
    torch.manual_seed(0)
    x, metric, sizes = torch.randn(2, 11, 8), torch.randn(2, 11, 4), torch.ones(2, 11)
    matching = bipartite(metric, 4, 1)
    plain, kept = merge(matching, sizes)(x, "tokens"), merge(matching, sizes, preserve_norm=True)(x, "tokens")
    for image in range(2):
        for place in range(7):
            group = [matching.keep[image, place].item()]
            group += matching.source[image, matching.target[image] == place].tolist()
            largest = x[image, group].norm(dim=-1).max()
            assert torch.allclose(kept[image, place].norm(), largest, rtol=1e-5)
            assert torch.allclose(
                kept[image, place] / largest, plain[image, place] / plain[image, place].norm(), atol=1e-5
            )
    tower = view(vit()).image
    TokenMerge(r=2, variant="tofu").edit_model(type("View", (), dict(image=tower)))
    assert [block.token_edit.drops for block in tower.blocks] == [True, True, False, False]


def test_attention_after_a_merge_weights_keys_by_size():
    """Merging exact duplicates changes nothing, if keys count as often as the tokens they stand for."""
    model = vit(depth=3, pos_embed="none")
    tile = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    same = tile.repeat(1, 1, 4, 4)
    with torch.no_grad():
        expected = model(same)
        exact = effbench.apply(copy.deepcopy(model), "token_merge:r=8")
        blunt = effbench.apply(copy.deepcopy(model), "token_merge:r=8,proportional=false")
        assert (exact(same) - expected).abs().max() < 1e-5
        assert (blunt(same) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("make", ["classifier", "features"])
def test_the_mean_over_patch_tokens_counts_merged_tokens_as_often_as_they_stand_for(make):
    torch.manual_seed(0)
    if make == "classifier":
        model = plain = vit(class_token=False, global_pool="avg", depth=1)
    else:
        plain = vit(depth=1)
        model = TimmFeatures(plain)
    with torch.no_grad():
        plain.blocks[0].mlp.fc2.weight.zero_()  # tokens leave the block as they are after attention
        plain.norm = torch.nn.Identity()
        plain.fc_norm = torch.nn.Identity()
        expected = model(IMAGES)
        holder = model if make == "classifier" else Holder(model)
        TokenMerge(r=6).edit_model(view(holder))
        assert (model(IMAGES) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("variant", STEADY)
def test_an_image_does_not_depend_on_its_batch(variant):
    model = effbench.apply(vit(), f"token_merge:r=3,variant={variant}")
    with torch.no_grad():
        assert (model(IMAGES)[:1] - model(IMAGES[:1])).abs().max() < 1e-5


def test_schedules():
    assert per_block(TokenMerge(r=13, schedule="decreasing"), 12) == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]
    assert per_block(TokenMerge(r=(4, 0, 2, 1)), 4) == [4, 0, 2, 1]
    with torch.no_grad():
        assert tokens_of(effbench.apply(vit(), "token_merge:r=4/0/2/1")) == (13, 13, 11, 10)
        assert tokens_of(effbench.apply(vit(), "token_merge:ratio=0.75")) == (13, 10, 8, 7)  # 16, 12, 9, 7 patches; 6
        assert tokens_of(effbench.apply(vit(), "token_merge:ratio=0.75,variant=pitome")) == (13, 10, 8, 7)
        assert tokens_of(effbench.apply(vit(), "token_merge:r=2,schedule=decreasing")) == (13, 11, 10, 10)


@pytest.mark.parametrize("variant", ["tome", "pitome", "tofu"])
def test_copies_pickles_compiles_and_trains(variant):
    model = effbench.apply(vit(), f"token_merge:r=3,variant={variant}")
    with torch.inference_mode():
        expected = model(IMAGES)
        assert torch.equal(copy.deepcopy(model)(IMAGES), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), expected)
        torch.compiler.reset()  # other tests compile the same code
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert (compiled(IMAGES) - expected).abs().max() < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model(IMAGES)).all()
    model.train()
    model(IMAGES).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("tokens", [25, 16])
def test_the_metric_is_the_mean_key(tokens):
    k = torch.randn(2, 3, tokens, 8)
    projections = type("P", (), dict(k=k))
    assert torch.allclose(mean_key(projections) / 3, k.mean(dim=1), atol=1e-6)


@pytest.mark.parametrize(
    "spec, message, hint",
    [
        ("token_merge:r=9", "more than half of the 16 patch tokens", "0 to 8"),
        ("token_merge:r=-1", "r=-1 is not valid", ""),
        ("token_merge:r=", "names no number", "r=13"),
        ("token_merge:r=4,ratio=0.9", "ratio stands in place of r", ""),
        ("token_merge:r=1/2", "2 values of r for the 4 blocks", "one number or 4"),
        ("token_merge:ratio=0.3", "ratio=0.3 is not valid", ""),
        ("token_merge:variant=best", "variant=best is not valid", ""),
        ("token_merge:r=1/1/1/1,schedule=decreasing", "one number r", ""),
        ("token_merge:variant=norm,prune=2", "drops tokens in every block", ""),
        ("token_merge:r=1,prune=5", "prune=5 of 4 blocks", "0 to 4"),
        (
            "token_merge:r=2+token_prune:at=1",
            "token_merge and token_prune conflict: both reduce the tokens in block 1",
            "at=",
        ),
    ],
)
def test_bad_parameters_are_refused(spec, message, hint):
    with pytest.raises(UsageError, match=message) as refused:
        effbench.apply(vit(), spec)
    assert hint in refused.value.hint


def test_what_has_no_blocks_is_refused():
    with pytest.raises(UsageError, match="no transformer tower"):
        effbench.apply(timm.create_model("resnet18"), "token_merge")
    with pytest.raises(UsageError, match="no transformer tower"):
        effbench.apply(timm.create_model("swin_tiny_patch4_window7_224"), "token_merge")


def test_controls_have_the_same_budget_and_do_not_depend_on_the_variant():
    cls = methods.get("token_merge")
    controls = [cls(r=7, variant=v, **o).controls() for v, o in (("tome", {}), ("tofu", dict(prune=1)), ("pitome", {}))]
    assert controls[0] == controls[1] == controls[2]
    with torch.no_grad():
        expected = tokens_of(effbench.apply(vit(), "token_merge:r=7"))
        for name in ("random", "grid", "norm"):
            assert controls[0][name].variant == name
            assert tokens_of(effbench.apply(vit(), (controls[0][name],))) == expected


@pytest.mark.skipif("EFFBENCH_WEIGHTS" not in os.environ, reason="real weights: EFFBENCH_WEIGHTS is not set")
def test_real_weights_still_agree():
    file = next(Path(os.environ["EFFBENCH_WEIGHTS"]).glob("deit_tiny*"), None)
    if file is None:
        pytest.skip("EFFBENCH_WEIGHTS holds no deit_tiny weights")
    from effbench.models.backbones import read_weights

    model = timm.create_model("deit_tiny_patch16_224").eval()
    model.load_state_dict({k: v for k, v in read_weights(file).items() if k in model.state_dict()}, strict=False)
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model.forward_features(images)[:, 0]
        merged = effbench.apply(copy.deepcopy(model), "token_merge:r=8").forward_features(images)[:, 0]
    assert torch.cosine_similarity(dense, merged).min() > 0.8


def test_it_claims_tokens_only_where_it_takes_some():
    assert TokenMerge(r=3).claims == ("tokens",) and TokenMerge(r=0).claims == ()
    assert TokenMerge(ratio=0.9).claims == ("tokens",) and TokenMerge(ratio=1.0).claims == ()
