"""sparse_attention: every path computes the same pattern, on both libraries, and what it refuses."""

import copy
import io
import pickle
import shutil

import pytest
import timm
import torch
from tiny import IMAGES
from tiny import clip as tiny_clip
from tiny import vit as tiny_vit

import effbench
from effbench.errors import UsageError
from effbench.measure.flops import flops
from effbench.models.attention import Projections
from effbench.models.token_state import TokenEdit
from effbench.models.tower import view
from effbench.spec import parse
from effbench_methods.algorithms.attention_paths import masked

# blocks of the tiny ViT (a 4x4 grid): a spec for each pattern that is no baseline
SPECS = ["window=2", "pattern=sliding,window=3", "pattern=block,block=3", "pattern=bigbird,block=3,random=2"]
TOPK = "pattern=topk,k=5"


def sharpened(model):
    """Attention that is far from uniform, so that it matters which keys are seen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part in name for part in ("qkv", "in_proj", "attn.proj", "out_proj")):
                parameter.mul_(0.4 / parameter.std())
    return model


def vit(**options):
    return sharpened(tiny_vit(**options))


def clip():
    return sharpened(tiny_clip())


def tower_of(model):
    return getattr(model, "visual", model)


def projections(tokens, batch=2, heads=3, width=8, packed=True):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, 3, heads, width, generator=random).permute(2, 0, 3, 1, 4)
    return Projections(*(x if packed else x.contiguous()).unbind(0), 0.3)


def cores(model):
    return [block.attn.core for block in view(model).image.blocks]


def applied(spec, make=vit):
    return effbench.apply(make(), f"sparse_attention:{spec}")


@pytest.mark.parametrize("make", [vit, lambda: vit(reg_tokens=3), lambda: vit(qk_norm=True), clip])
@pytest.mark.parametrize(
    "spec",
    ["window=4", "window=4,path=masked", "pattern=sliding,window=7", "pattern=topk,k=16", "pattern=block,block=8"],
)
def test_seeing_all_is_the_baseline(spec, make):
    model = make()
    tower = tower_of(model)
    with torch.no_grad():
        expected = tower(IMAGES)
        effbench.apply(model, f"sparse_attention:{spec},at=0/1/2/3")
        assert (tower(IMAGES) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "make", [vit, clip, lambda: vit(qk_norm=True), lambda: vit(class_token=False, global_pool="avg")]
)
@pytest.mark.parametrize("spec", SPECS)
def test_paths_agree_in_a_tower_and_differ_from_dense(spec, make):
    towers = [tower_of(applied(f"{spec},path={path}", make)) for path in ("reshape", "masked")]
    with torch.inference_mode():
        one, other = (tower(IMAGES) for tower in towers)
        assert (one - other).abs().max() < 1e-5
        assert (one - tower_of(make())(IMAGES)).abs().max() > 1e-3
        assert (one[:1] - towers[0](IMAGES[:1])).abs().max() < 1e-5  # an image does not depend on its batch


def test_every_other_block_is_shifted_and_layouts_are_shared():
    found = cores(applied("window=2,path=reshape"))
    assert [core.shifted for core in found] == [False, True, False, True]
    assert found[0].layout is found[2].layout is not found[1].layout
    found = cores(applied("window=2,path=reshape,at=1/3"))
    assert found[0] is None and [found[1].shifted, found[3].shifted] == [False, True]


def test_bigbird_draws_other_blocks_in_every_layer():
    first, second, *_ = cores(applied("pattern=bigbird,block=1,random=3,path=masked"))
    assert not torch.equal(first.layout.seen, second.layout.seen)


@pytest.mark.parametrize("spec", [*SPECS, TOPK])
def test_copies_pickles_compiles_and_autocasts(spec):
    model = applied(spec + ("" if spec is TOPK else ",path=reshape"))
    with torch.inference_mode():
        expected = model(IMAGES)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(IMAGES), expected)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert (compiled(IMAGES) - expected).abs().max() < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(IMAGES).float() - expected).abs().max() < 0.1
    assert list(model.state_dict()) == list(vit().state_dict())
    model.train()(IMAGES).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_flops_fall_by_gathering_and_only_the_useful_ones_by_a_mask():
    dense, reshape, mask = (
        flops(m, IMAGES) for m in (vit(), applied("window=2,path=reshape"), applied("window=2,path=masked"))
    )
    assert reshape.dense_flops < dense.dense_flops == mask.dense_flops > mask.useful_flops
    assert all(count.complete for count in (reshape, mask))
    core = cores(applied("window=2,path=reshape"))[0]
    saved = 4 * (17**2 - core.pairs(17)) * 24 * 2 * len(IMAGES)  # blocks x pairs x width x two products, in MACs
    assert abs(dense.macs - reshape.macs - saved) < 0.02 * saved


class Halve(TokenEdit):
    """Means of 2 x 2 patches: a coarser grid, and tokens of size 4."""

    keeps_grid = True

    def forward(self, state, projections):
        state.sizes = torch.ones(state.tokens.shape[:2])

        def reduce(field, kind):
            x = field[:, 1:].unflatten(1, (2, 2, 2, 2)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
            x = x.sum(2) if kind == "size" else x.float().mean(2).to(field.dtype)
            return torch.cat([field[:, :1], x], dim=1)

        reduce.grid = (2, 2)
        return reduce


@pytest.mark.parametrize("spec", ["window=2,path={}", "pattern=sliding,window=3,path={}"])
def test_sizes_and_a_coarser_grid_are_honoured(spec):
    outputs = []
    for path in ("reshape", "masked"):
        model = vit()
        seen = view(model)
        seen.image.after_attention(1, Halve())
        parse(f"sparse_attention:{spec.format(path)},at=2/3")[0].edit_model(seen)
        with torch.no_grad():
            outputs.append(model(IMAGES))
        assert cores(model)[2].layout.grid == (2, 2) and not cores(model)[2].fallback
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_a_mask_that_gathering_cannot_take_is_honoured_and_said():
    model = applied("window=2,path=reshape")
    core, p = cores(model)[0], projections(17)
    hidden = torch.rand(17, 17) > 0.3
    hidden.fill_diagonal_(True)
    y = core(p, hidden, False, 1, (4, 4))
    assert (y - masked(p, core.layout.seen & hidden)).abs().max() < 1e-5
    assert "but masked where" in parse("sparse_attention")[0].notes(view(model))[0]


def test_pruning_takes_the_grid_away():
    for spec in ("token_prune:at=1+sparse_attention:window=2", "sparse_attention:window=2+token_prune:at=1"):
        with pytest.raises(UsageError, match="breaks the grid that sparse_attention needs"):
            effbench.apply(vit(), spec)
    model = effbench.apply(vit(), f"token_prune:at=1,keep=0.2+sparse_attention:{TOPK}")  # fewer keys than k are left
    with torch.no_grad():
        assert torch.isfinite(model(IMAGES)).all()
    with pytest.raises(UsageError, match="which is gone"):
        cores(applied("window=2"))[0](projections(9), None, False, 1, None)


def test_auto_times_once_and_says_so():
    first = applied("window=2")
    choices = {id(core.choice) for core in cores(first) + cores(applied("window=2"))}
    assert len(choices) == 1
    choice = cores(first)[0].choice
    assert choice.path in choice.ratios and set(choice.ratios) == {"reshape", "masked"} and choice.seconds > 0
    path, ceiling = parse("sparse_attention")[0].notes(view(first))
    assert f"the {choice.path} path" in path and "timing them took" in path
    assert "its ceiling is" in ceiling


def test_the_ceiling_that_attention_allows():
    blocks, at, tokens, patches, width = 4, 2, 17, 16, 24
    products, linears = 2 * tokens**2 * width, 12 * tokens * width**2
    share = at * products / (patches * width * 3 * 8**2 + blocks * (linears + products))
    note = parse("sparse_attention")[0].notes(view(applied("window=2,at=1/2")))[1]
    assert f"attention is {share:.1%} of the tower's FLOPs, so its ceiling is {1 / (1 - share):.2f}x" in note


@pytest.mark.parametrize(
    "spec, message, hint",
    [
        ("window=3", "window=3 does not divide the 4x4 grid", "2, 4"),
        ("window=8", "does not divide", "2, 4"),
        ("window=0", "window", ""),
        ("pattern=sliding,window=4", "odd", "window=3 or window=5"),
        ("pattern=sliding,window=9", "larger than the 4x4 grid", "1 to 7"),
        ("pattern=topk,k=17", "k=17 is larger", "1 to 16"),
        ("pattern=block,block=17", "block=17 is larger", "1 to 16"),
        ("pattern=bigbird,block=4,random=2", "leave 1", "0 to 1"),
        ("pattern=topk,path=reshape", "has no path=reshape", "path=masked"),
        ("pattern=window,k=3", "has no k", "window"),
        ("pattern=axial", "pattern", ""),
        ("window=2,at=9", "block 9 does not exist", "at="),
    ],
)
def test_bad_input_is_refused(spec, message, hint):
    with pytest.raises(UsageError, match=message) as refused:
        applied(spec)
    assert hint in refused.value.hint


def test_flex_does_not_train_on_a_cpu():
    with pytest.raises(UsageError, match="no gradient on a CPU"):
        parse("sparse_attention:window=2,path=flex,phase=both")[0].edit_model(view(vit()))


def test_windows_that_divide_are_named():
    with pytest.raises(UsageError) as refused:
        parse("sparse_attention:window=6")[0].check_grid((14, 14))
    assert refused.value.hint == "windows that do: 2, 7, 14"
    with pytest.raises(UsageError) as refused:
        parse("sparse_attention")[0].check_grid((13, 9))
    assert "pattern=sliding" in refused.value.hint


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_towers_without_a_plain_grid_are_refused(name):
    with pytest.raises(UsageError) as refused:
        effbench.apply(timm.create_model(name), "sparse_attention")
    assert "VisionTransformer" in refused.value.hint


def test_flex_in_a_tower_counts_and_copies():
    if not shutil.which("g++"):
        pytest.skip("FlexAttention needs a C++ compiler on a CPU")
    make = lambda: vit(embed_dim=48)  # noqa: E731 - heads of 16: the kernel's smallest
    model, reference = applied("window=2,path=flex", make), applied("window=2,path=masked", make)
    with torch.inference_mode():
        expected = reference(IMAGES)
        assert (model(IMAGES) - expected).abs().max() < 1e-5
        assert (copy.deepcopy(model)(IMAGES) - expected).abs().max() < 1e-5
        stream = io.BytesIO()
        torch.save(model, stream)
        assert (torch.load(io.BytesIO(stream.getvalue()), weights_only=False)(IMAGES) - expected).abs().max() < 1e-5
    count = flops(model, IMAGES)
    assert count.useful_flops < count.dense_flops and count.complete
