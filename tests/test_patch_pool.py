"""patch_pool: squares of the patch grid become one token each."""

import pytest
import torch
from tiny import IMAGES, clip, vit
from torch.nn.functional import avg_pool2d

import effbench
from effbench.errors import UsageError
from effbench.examine import tokens_per_layer
from effbench.models.token_state import TokenState
from effbench.models.tower import view
from effbench_methods.patch_pool import PatchPool, Pool
from effbench_methods.token_prune import Prune, TokenPrune

WAYS = ("mean", "grid", "norm", "random")


def state(height=4, width=6, prefix=2):
    tokens = torch.randn(2, prefix + height * width, 3, generator=torch.Generator().manual_seed(0))
    return TokenState(tokens, prefix, grid=(height, width))


def pooled(way, before, side=2):
    return before.reduced(Pool(PatchPool(side=side, how=way))(before, None))


def test_mean_is_average_pooling_of_the_grid():
    before = state()
    after = pooled("mean", before)
    image = before.tokens[:, 2:].transpose(1, 2).reshape(2, 3, 4, 6)
    assert torch.allclose(after.tokens[:, 2:], avg_pool2d(image, 2).flatten(2).transpose(1, 2), atol=1e-6)
    assert torch.equal(after.tokens[:, :2], before.tokens[:, :2])
    assert after.grid == (2, 3) and after.sizes is None
    twice = pooled("mean", pooled("mean", state(8, 8)))
    assert twice.grid == (2, 2) and twice.tokens.shape[1] == 2 + 4


def test_tracked_fields_follow():
    before = state()
    before.sizes = torch.ones(2, 26)
    before.source = torch.arange(26).expand(2, 26)
    before.positions = torch.rand(2, 26, 2)
    after = pooled("mean", before)
    assert after.sizes.tolist() == [[1, 1] + [4] * 6] * 2
    assert after.source.tolist() == [[0, 1] + [-1] * 6] * 2
    assert after.positions.shape == (2, 8, 2)
    kept = pooled("grid", before)
    assert kept.source[0].tolist() == [0, 1] + [2 + row * 6 + column for row in (1, 3) for column in (1, 3, 5)]
    assert kept.grid == (2, 3) and kept.sizes.sum() == 16


def test_norm_keeps_the_longest_and_random_any():
    before = state()
    before.source = torch.arange(26).expand(2, 26)
    longest = before.tokens[:, 2:].norm(dim=-1).topk(6).indices + 2
    after = pooled("norm", before)
    assert after.grid is None and [set(row[2:].tolist()) for row in after.source] == [set(r.tolist()) for r in longest]
    torch.manual_seed(0)
    first, second = pooled("random", before).source, pooled("random", before).source
    torch.manual_seed(0)
    assert torch.equal(pooled("random", before).source, first) and not torch.equal(first, second)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "make", [vit, lambda: vit(reg_tokens=4), lambda: vit(class_token=False, global_pool="avg"), clip]
)
def test_a_quarter_of_the_patches_goes_on(make, way):
    model = effbench.apply(make(), f"patch_pool:at=1,how={way}")
    tower = getattr(model, "visual", model)
    prefix = view(model).image.prefix
    with torch.no_grad():
        assert tokens_per_layer(tower, lambda: tower(IMAGES)) == (prefix + 16, *[prefix + 4] * 3)
        if way != "random":
            assert (tower(IMAGES)[:1] - tower(IMAGES[:1])).abs().max() < 1e-5


def test_the_controls_have_the_same_budget():
    controls = PatchPool(side=4, at=1).controls()
    assert {name: (c.side, c.at, c.how) for name, c in controls.items()} == {n: (4, 1, n) for n in WAYS[1:]}
    assert PatchPool(side=1).controls() == {} and PatchPool(side=1).claims == ()


def test_it_follows_resize():
    model = effbench.apply(vit(), "resize:size=24+patch_pool:side=3,at=0")
    with torch.no_grad():
        assert tokens_per_layer(model, lambda: model(IMAGES)) == (2,) * 4


@pytest.mark.parametrize(
    "spec, message, hint",
    [
        ("patch_pool:side=3", "side=3 does not divide the grid of 4 x 4 patches", "side=2, side=4"),
        ("patch_pool:side=0", "side=0 is not valid", ""),
        ("patch_pool:how=best", "how=best is not valid", ""),
        ("patch_pool:at=4", "block 4 does not exist", "at="),
        ("patch_pool:at=1+token_prune:at=1", "both reduce the tokens in block 1", "at="),
        ("token_prune:at=1+patch_pool:at=2", "grid that token_prune breaks up", "at="),
    ],
)
def test_what_does_not_fit_is_refused(spec, message, hint):
    with pytest.raises(UsageError, match=message) as refused:
        effbench.apply(vit(), spec)
    assert hint in refused.value.hint


def test_a_grid_that_is_none_is_refused():
    with pytest.raises(UsageError, match="no image tower|needs an image tower"):
        PatchPool().edit_model(type("View", (), dict(image=None)))
    with pytest.raises(UsageError, match="needs a full grid"):
        Pool(PatchPool())(TokenState(torch.randn(1, 17, 4), 1), None)
    model = vit(dynamic_img_size=True)
    effbench.apply(model, "patch_pool:at=1")
    with pytest.raises(UsageError, match="needs a full grid, and 36 patch tokens"):
        model(torch.randn(1, 3, 48, 48))
    odd = vit(img_size=(16, 24))
    with pytest.raises(UsageError) as refused:
        effbench.apply(odd, "patch_pool")
    assert "resize" in refused.value.hint


def test_what_reduces_tokens_later_may_follow():
    seen = view(vit())
    PatchPool(at=1).edit_model(seen)
    seen.image.after_attention(2, Prune(TokenPrune(keep=0.5, at=(2,), score="norm"), 24))
    with torch.no_grad():
        assert tokens_per_layer(seen.model, lambda: seen.model(IMAGES)) == (17, 5, 3, 3)
