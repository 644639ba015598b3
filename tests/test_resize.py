"""resize: the tower takes its images at another side, with positions interpolated as the libraries do it."""

import copy
import pickle

import open_clip
import pytest
import timm
import torch
from timm.layers import RmsNorm, SwiGLU
from tiny import IMAGES, clip, vit
from torch.nn.functional import interpolate

import effbench
from effbench.errors import UsageError
from effbench.examine import tokens_per_layer
from effbench.measure.flops import flops
from effbench.models.tower import view
from effbench.spec import parse
from effbench_methods.resize import Resize


def aim(**options):
    """As timm's AIMv2: no class token, RMS norms, SwiGLU, average pool."""
    plain = dict(class_token=False, global_pool="avg", fc_norm=False, mlp_layer=SwiGLU, norm_layer=RmsNorm)
    return vit(**plain | dict(embed_norm_layer=RmsNorm, qkv_bias=False, proj_bias=False) | options)


TIMM = [
    vit,
    lambda **size: vit(reg_tokens=4, no_embed_class=True, **size),
    lambda **size: vit(class_token=False, global_pool="avg", **size),
    lambda **size: vit(dynamic_img_size=True, **size),
    aim,
]


def scaled(images, size):
    return interpolate(images, (size, size), mode="bicubic", antialias=True)


@pytest.mark.parametrize("size", [16, 24, 40])
@pytest.mark.parametrize("make", TIMM)
def test_equals_timms_own_model_of_that_size(make, size):
    model, other = make(), make(img_size=size)
    state = copy.deepcopy(model.state_dict())
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(
        state["pos_embed"], (size // 8, size // 8), (4, 4), 0 if model.no_embed_class else model.num_prefix_tokens
    )
    other.load_state_dict(state)
    effbench.apply(model, f"resize:size={size}")
    with torch.no_grad():
        assert (model(IMAGES) - other(scaled(IMAGES, size))).abs().max() < 1e-5
        assert tokens_per_layer(model, lambda: model(IMAGES))[0] == model.num_prefix_tokens + (size // 8) ** 2


@pytest.mark.parametrize("size", [16, 24, 40])
def test_equals_openclips_own_model_of_that_size(size):
    model = clip()
    vision = dict(image_size=size, patch_size=8, width=24, head_width=8, layers=4)
    other = open_clip.CLIP(16, vision, dict(context_length=12, vocab_size=50, width=24, heads=3, layers=2)).eval()
    state = copy.deepcopy(model.state_dict())
    open_clip.model.resize_pos_embed(state, other)
    other.load_state_dict(state)
    effbench.apply(model, f"resize:size={size}")
    with torch.no_grad():
        assert (model.encode_image(IMAGES) - other.encode_image(scaled(IMAGES, size))).abs().max() < 1e-5


@pytest.mark.parametrize("make", [*TIMM, clip])
def test_the_native_size_is_the_baseline(make):
    model = make()
    tower = getattr(model, "visual", model)
    with torch.no_grad():
        expected = tower(IMAGES)
        effbench.apply(model, "resize:size=32")
        assert torch.allclose(tower(IMAGES), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [vit, clip])
def test_copies_pickles_trains_and_takes_half_precision(make):
    model = make()
    tower = getattr(effbench.apply(model, "resize:size=16"), "visual", model)
    with torch.no_grad():
        expected = tower(IMAGES)
        for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
            assert torch.equal(other(IMAGES), expected)
        assert torch.equal(tower(scaled(IMAGES, 16)), expected)  # what has the size is not scaled again
        assert (tower(IMAGES)[:1] - tower(IMAGES[:1])).abs().max() < 1e-5
    tower(IMAGES).sum().backward()
    assert all(p.grad is not None for p in tower.parameters())
    assert tower.bfloat16()(IMAGES.bfloat16()).dtype == torch.bfloat16


def test_a_second_resize_scales_once():
    model = effbench.apply(effbench.apply(vit(), "resize:size=16"), "resize:size=24")
    assert len(model.patch_embed._forward_pre_hooks) == 1
    assert tokens_per_layer(model, lambda: model(IMAGES))[0] == 1 + 9


def test_flops_are_those_of_the_smaller_image():
    expected = flops(effbench.apply(vit(img_size=16), "resize:size=16"), IMAGES[:, :, :16, :16])
    count = flops(effbench.apply(vit(), "resize:size=16"), IMAGES)
    assert count.complete and count.dense_flops == expected.dense_flops


@pytest.mark.parametrize("make", [vit, clip])
def test_the_ladder_holds_every_smaller_size(make):
    assert [step.size for step in Resize.ladder(view(make()).image)] == [16, 24]


def test_upsampling_is_said():
    model = view(vit())
    for size, said in ((40, "upsampled from images of 32 px"), (24, "")):
        method = Resize(size)
        method.edit_model(model)
        assert method.no_quality(model) == said


@pytest.mark.parametrize("make", [vit, clip])
@pytest.mark.parametrize(
    "size, message, hint",
    [
        (30, "no whole number of patches of 8 px", "size=24 and size=32"),
        (8, "fewer than 2 x 2 patches", "size=16"),
        (0, "size=0 is not valid", ""),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, size, message, hint):
    model = make()
    with pytest.raises(UsageError, match=message) as refused:
        effbench.apply(model, f"resize:size={size}")
    assert hint in refused.value.hint
    assert getattr(model, "visual", model)(IMAGES).isfinite().all()  # nothing was changed


def test_towers_that_cannot_are_refused():
    with pytest.raises(UsageError, match="square images.* 2 x 4 patches"):
        effbench.apply(vit(img_size=(16, 32)), "resize:size=16")
    with pytest.raises(UsageError, match="needs an image tower"):
        Resize(16).edit_model(type("View", (), dict(image=None)))
    fixed = view(vit())
    fixed.image.resize = None
    with pytest.raises(UsageError, match="one side only"):
        Resize(16).edit_model(fixed)
    with pytest.raises(UsageError, match="phase=train is not valid"):
        Resize(16, phase="train")


def test_it_stands_before_what_acts_on_tokens():
    assert len(parse("resize:size=16+token_prune")) == 2
    with pytest.raises(UsageError, match="resize must stand before token_prune"):
        parse("token_prune+resize:size=16")
