"""channel_prune: equal to torch-pruning where that traces right, exact on both libraries, and what is refused."""

import copy
import io
import pickle
import warnings

import open_clip
import pytest
import timm
import torch
import torch_pruning as tp
from tiny import IMAGES, clip, vit
from torch import nn
from torch_pruning.pruner.importance import GroupMagnitudeImportance, GroupTaylorImportance

import effbench
from effbench.calibration_set import CalibrationSet, of_inputs
from effbench.errors import UsageError
from effbench.measure.analytic import analytic
from effbench.measure.flops import flops
from effbench.models.dual_encoder import DualEncoder, TimmFeatures
from effbench.models.token_state import TokenEdit
from effbench.models.tower import view
from effbench.spec import parse
from effbench_methods._channel_groups import Channels

IDS = torch.tensor([[3, 7, 4, 49, 0, 0, 0, 0, 0, 0, 0, 0], [5, 6, 8, 9, 2, 49, 0, 0, 0, 0, 0, 0]])


def pruned(model, spec, calibration=None):
    """The model, pruned in place, its view and the method."""
    (method,) = parse(f"channel_prune:{spec}")
    seen = view(model)
    method.finish(seen, calibration or of_inputs(None))
    return seen, method


def with_loss(thrifty=False, count=32):
    def loss(model, images):
        return model(images).square().mean()

    batches = [IMAGES, IMAGES.flip(0) * 2]
    return CalibrationSet(lambda: iter(batches), count, lambda model, x: model(x), loss, thrifty)


def dual(image_encoder, width):
    torch.manual_seed(1)
    text = open_clip.transformer.TextTransformer(12, 50, 24, 3, 2, output_dim=16)
    return DualEncoder(image_encoder, text, nn.Linear(width, 16), "bilinear", 16).eval()


def count(model):
    return sum(p.numel() for p in model.parameters())


def size(width, inner, hidden, depth=4, patch=8 * 8 * 3, tokens=17, classes=5):
    """Parameters of the tiny ViT by formula."""
    block = width * 3 * inner + 3 * inner + inner * width + width + 2 * width * hidden + hidden + width + 4 * width
    return depth * block + patch * width + width + width + tokens * width + 2 * width + width * classes + classes


@pytest.mark.parametrize(
    "what, width, head, hidden, heads",
    [
        ("head_dims/mlp/width", 12, 4, 48, 3),
        ("mlp", 24, 8, 48, 3),
        ("head_dims", 24, 4, 96, 3),
        ("width", 12, 8, 96, 3),
        ("heads", 24, 8, 96, 2),
        ("heads/head_dims/mlp/width", 12, 4, 48, 2),
    ],
)
def test_what_is_left_is_what_the_formula_says(what, width, head, hidden, heads):
    model = vit()
    with torch.no_grad():
        before = model(IMAGES)
    seen, method = pruned(model, f"ratio=0.5,round_to=4,what={what}")  # 1.5 of 3 heads: 2 stay
    assert count(model) == size(width, heads * head, hidden)
    for block in model.blocks:
        assert block.attn.num_heads == heads and block.attn.scale == 8**-0.5
        assert (block.attn.qkv.in_features, block.attn.qkv.out_features) == (width, 3 * heads * head)
        assert (block.attn.proj.in_features, block.attn.proj.out_features) == (heads * head, width)
        assert (
            (block.mlp.fc1.in_features, block.mlp.fc1.out_features)
            == (width, hidden)
            == tuple(reversed((block.mlp.fc2.in_features, block.mlp.fc2.out_features)))
        )
        assert block.norm1.normalized_shape == (width,)
    assert model.embed_dim == model.num_features == model.head_hidden_size == seen.image.width == width
    assert model.head.in_features == model.patch_embed.proj.out_channels == width
    with torch.no_grad():
        after = model(IMAGES)
    assert after.shape == before.shape and (after - before).abs().max() > 1e-4
    (note,) = method.notes(view(model))
    assert f"{count(model):,} of the model's {size(24, 24, 96):,} parameters" in note
    assert ("width 24 -> 12" in note) == (width == 12) and ("MLP 96 -> 48" in note) == (hidden == 48)


def test_uniform_pruning_gives_a_vit_of_half_the_size():
    model, half = vit(embed_dim=48, depth=2), vit(embed_dim=24, depth=2)
    pruned(model, "ratio=0.5")
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in half.state_dict().items()}
    assert flops(model, IMAGES).dense_flops == flops(half, IMAGES).dense_flops == analytic(model, IMAGES).flops


def traced(model, importance, **options):
    """The model, pruned in place by torch-pruning's own tracer, as its ViT examples do."""
    heads = {block.attn.qkv: block.attn.num_heads for block in model.blocks}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model, IMAGES, importance, pruning_ratio=0.5, num_heads=heads, ignored_layers=[model.head], **options
        )
    pruner.step()
    return model


@pytest.mark.parametrize("ranking", ["magnitude", "taylor"])
@pytest.mark.parametrize("isomorphic", [False, True])
def test_the_groups_are_those_that_torch_pruning_traces(ranking, isomorphic):
    mine, theirs = (vit(init_values=0.5, qkv_bias=True) for _ in range(2))
    for model in (mine, theirs):  # no two channels alike
        torch.manual_seed(3)
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
    pruned(
        mine, f"ratio=0.5,round_to=1,images=32,importance={ranking},isomorphic={str(isomorphic).lower()}", with_loss()
    )
    view(theirs)
    if ranking == "taylor":
        for loss in with_loss().losses(theirs, 32):
            theirs(IMAGES)
            loss.backward()
    options = dict(global_pruning=True, isomorphic=True) if isomorphic else {}
    traced(theirs, GroupTaylorImportance() if ranking == "taylor" else GroupMagnitudeImportance(), **options)
    mine, theirs = mine.state_dict(), theirs.state_dict()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    if isomorphic:
        assert len({mine[f"blocks.{i}.mlp.fc1.bias"].numel() for i in range(4)}) > 1


def attention_written_out(self, query, key, value, *_, scale, attn_mask=None, is_causal=False, **__):
    logits = query @ key.transpose(-2, -1) * scale
    if attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1) @ value


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_fused_and_unfused_attention_agree_and_the_scale_stays(monkeypatch, ratio):
    model = vit(embed_dim=96)
    pruned(model, f"ratio={ratio}")
    scales = []

    def plain(q, k, v, **options):
        scales.append((q.shape[-1], options["scale"]))
        return attention_written_out(None, q, k, v, **{n: options[n] for n in ("attn_mask", "is_causal", "scale")})

    with torch.no_grad():
        fused = model(IMAGES)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", plain)
        assert (model(IMAGES) - fused).abs().max() < 1e-5
    assert scales == [(32 * (1 - ratio), 32**-0.5)] * 4  # of the unpruned heads, 32 wide


def silence(model, image=True):
    """Make half of the heads' channels, a head and half of the hidden units of a tower contribute nothing."""
    seen = view(model)
    for number, block in enumerate((seen.image if image else seen.text).blocks):
        attention = block.attn
        rows = attention.qkv.weight.data.view(3, 3, 8, -1)
        for name, gone in (("head", (slice(None), number % 3)), ("dims", (slice(None), slice(None), [1, 2, 4, 7]))):
            if name in silence.what:
                rows[gone] = 0
                attention.qkv.bias.data.view(3, 3, 8)[gone] = 0
                attention.proj.weight.data.view(-1, 3, 8)[gone] = 0
        if "mlp" in silence.what:
            first, last = (layer for layer in block.mlp.modules() if isinstance(layer, nn.Linear))
            first.weight.data[number::2] = 0
            first.bias.data[number::2] = 0
            last.weight.data[:, number::2] = 0
    return model


@pytest.mark.parametrize("make", ["timm", "clip image", "clip text", "qk norm"])
@pytest.mark.parametrize("what, ratio", [("heads", 0.34), ("head_dims", 0.5), ("mlp", 0.25)])
def test_channels_that_are_zero_can_go(make, what, ratio):
    text = make == "clip text"
    if make == "qk norm" and what == "head_dims":
        pytest.skip("the statistics of a norm over the head's channels change")
    model = vit(qk_norm=True) if make == "qk norm" else vit() if make == "timm" else clip()
    silence.what = dict(heads="head", head_dims="dims", mlp="mlp")[what]
    silence(model, not text)

    def run():
        with torch.no_grad():
            return model(IMAGES) if make in ("timm", "qk norm") else torch.cat(model(IMAGES, IDS)[:2])

    expected, before = run(), count(model)
    pruned(model, f"ratio={ratio},round_to=1,what={what}" + (",target=text" if text else ""))
    assert count(model) < before
    assert (run() - expected).abs().max() < 1e-5


def test_nothing_is_changed_where_nothing_is_removed():
    model = vit()
    with torch.no_grad():
        expected = model(IMAGES)
        _, method = pruned(model, "ratio=0.01,what=heads/head_dims/mlp/width")
        assert torch.equal(model(IMAGES), pickle.loads(pickle.dumps(model))(IMAGES))
        assert (model(IMAGES) - expected).abs().max() < 1e-5
    assert "width 24, heads 3 x 8, MLP 96 in the timm" in method.notes(view(model))[0]


@pytest.mark.parametrize("make", ["clip", "custom text", "dual"])
@pytest.mark.parametrize("target", ["tower", "text", "tower/text"])
def test_both_towers_shrink_and_the_joint_space_stays(make, target):
    if make == "dual":
        model = dual(TimmFeatures(vit(num_classes=0)), 48)
    else:
        model = clip()
        if make == "custom text":
            vision = dict(image_size=32, patch_size=8, width=24, head_width=8, layers=4, ls_init_value=0.1)
            text = dict(context_length=12, vocab_size=50, width=24, heads=3, layers=2, proj_bias=True)
            model = open_clip.CustomTextCLIP(16, vision, text).eval()
    model.requires_grad_(False)
    view(model)
    with torch.no_grad():
        before = model(IMAGES, IDS)[:2]
        seen, method = pruned(model, f"ratio=0.5,round_to=4,what=heads/head_dims/mlp/width,target={target}")
        after = model(IMAGES, IDS)[:2]
    assert not any(p.requires_grad for p in model.parameters())
    assert len(method.notes(view(model))) == len(target.split("/"))
    for name, tower, old, new in zip(("tower", "text"), (seen.image, seen.text), before, after, strict=True):
        assert old.shape == new.shape == (2, 16) and torch.isfinite(new).all()
        left = (12, 4, 2, 48) if name in target.split("/") else (24, 8, 3, 96)
        assert torch.equal(old, new) == (left[0] == 24)
        assert view(model).image.width == view(model).image.blocks[0].attn.qkv.in_features
        for block in tower.blocks:
            hidden = next(layer for layer in block.mlp.modules() if isinstance(layer, nn.Linear)).out_features
            inner = block.attn.proj.in_features // block.attn.num_heads
            assert (tower.width, inner, block.attn.num_heads, hidden) == left
    assert {"tower", "text"} - set(target.split("/")) or count(model) < 0.5 * count(dual(TimmFeatures(vit()), 48))


def padded_text():
    torch.manual_seed(0)
    shape = dict(context_length=12, vocab_size=50, width=24, heads=3, layers=2, output_dim=16)
    return open_clip.transformer.TextTransformer(**shape, no_causal_mask=True, use_pad_mask=True).eval()


def test_a_text_towers_padding_mask_follows_its_heads():
    model = padded_text()
    pruned(model, "ratio=0.34,what=heads,target=text")
    assert model.heads == model.transformer.resblocks[0].attn.num_heads == 2
    with torch.no_grad():
        assert model(IDS).shape == (2, 16)
    said = "the same number of heads in every block"
    assert said in refused(padded_text, "ratio=0.34,what=heads,target=text,isomorphic=true")


@pytest.mark.parametrize("proj", ["linear", "mlp", ""])
def test_openclip_with_a_timm_tower(proj):
    vision = dict(timm_model_name="vit_tiny_patch16_224", timm_proj=proj, timm_pool="token", image_size=224)
    text = dict(context_length=12, vocab_size=50, width=24, heads=3, layers=2)
    model = open_clip.CustomTextCLIP(16, vision, text).eval()
    images = torch.randn(1, 3, 224, 224)
    pruned(model, "ratio=0.75,what=width")
    assert model.visual.trunk.embed_dim == 48
    with torch.no_grad():
        assert model.encode_image(images).shape == (1, 16)


def test_class_token_and_mean_lose_the_same_channels_of_the_projection():
    model = dual(TimmFeatures(vit(num_classes=0)), 48)
    view(model)
    weight = model.projection.weight.detach().clone()
    marks = torch.arange(24.0).expand(1, 1, 24).clone()
    model.image_encoder.trunk.cls_token = nn.Parameter(marks)
    pruned(model, "ratio=0.5,round_to=1,what=width")
    stays = model.image_encoder.trunk.cls_token.flatten().long()
    assert len(stays) == 12 == model.image_encoder.trunk.embed_dim and model.image_encoder.width == 24
    assert torch.equal(model.projection.weight, weight[:, torch.cat([stays, stays + 24])])


@pytest.mark.parametrize(
    "make",
    [
        lambda: vit(reg_tokens=2, init_values=1e-3, pre_norm=True, global_pool="avg"),
        lambda: vit(mlp_layer=timm.layers.SwiGLUPacked, qk_norm=True),
        lambda: vit(mlp_layer=timm.layers.SwiGLU, scale_mlp_norm=True, scale_attn_norm=True),
        lambda: timm.models.deit.VisionTransformerDistilled(
            img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=5
        ).eval(),
    ],
)
def test_kinds_of_vit(make):
    model = make()
    with torch.no_grad():
        before = model(IMAGES)
        pruned(model, "ratio=0.5,round_to=2,what=heads/head_dims/mlp/width")
        after = model(IMAGES)
    assert after.shape == before.shape and torch.isfinite(after).all()
    assert flops(model, IMAGES).dense_flops < 0.5 * flops(make(), IMAGES).dense_flops


def test_norms_keep_their_channels_in_order_where_few_are_left():
    """torch-pruning 1.6.1 itself mixes them up: 768 -> 192 and more."""
    norm = nn.LayerNorm(768)
    norm.weight.data = torch.arange(768.0)
    stays = torch.randperm(768, generator=torch.Generator().manual_seed(0))[:77].sort().values
    group = Channels(768)
    group.writes(norm)
    group.remove(sorted(set(range(768)) - set(stays.tolist())))
    assert torch.equal(norm.weight, stays.float()) and norm.normalized_shape == (77,)


def test_taylor_looks_at_the_loss_and_leaves_no_trace():
    by_size, by_loss = vit(), vit()
    by_loss.head.requires_grad_(False)
    by_loss.cls_token.grad = torch.ones_like(by_loss.cls_token)
    view(by_loss).image.blocks[0].train()
    pruned(by_size, "ratio=0.5,round_to=1,what=mlp")
    pruned(by_loss, "ratio=0.5,round_to=1,what=mlp,importance=taylor,images=32", with_loss())
    assert not torch.equal(by_size.blocks[0].mlp.fc1.weight, by_loss.blocks[0].mlp.fc1.weight)
    assert [n for n, p in by_loss.named_parameters() if not p.requires_grad] == ["head.weight", "head.bias"]
    assert [n for n, p in by_loss.named_parameters() if p.grad is not None] == ["cls_token"]
    assert by_loss.blocks[0].mlp.training and not by_loss.blocks[1].training


def test_a_result_that_is_thrown_away_costs_no_gradients():
    def refuse(*_):
        raise AssertionError("looked at the loss")

    thrifty = CalibrationSet(lambda: iter([IMAGES]), 2**31, refuse, refuse, thrifty=True)
    one, other = vit(), vit()
    pruned(one, "ratio=0.5,importance=taylor", thrifty)
    pruned(other, "ratio=0.5,importance=taylor", with_loss(count=64))
    assert [p.shape for p in one.parameters()] == [p.shape for p in other.parameters()]


def test_isomorphic_keeps_the_budget_and_empties_no_block():
    model = vit()
    for block, factor in zip(model.blocks, (1e-4, 1, 1, 1), strict=True):
        block.mlp.fc1.weight.data[4:] *= factor  # nearly all of the first MLP is of no importance
        block.mlp.fc2.weight.data[:, 4:] *= factor
    pruned(model, "ratio=0.5,what=mlp/heads,isomorphic=true")
    left = [block.mlp.fc1.out_features for block in model.blocks]
    assert left[0] == 8 == min(left) and max(left) > 48 and abs(sum(left) - 192) <= 16
    assert not any(n % 8 for n in left) and all(block.attn.num_heads >= 1 for block in model.blocks)
    with torch.no_grad():
        assert torch.isfinite(model(IMAGES)).all()


def test_what_is_not_pruned_need_not_be_known():
    model = vit(mlp_layer=Wide, qk_norm=True, norm_layer=timm.layers.RmsNorm)
    _, method = pruned(model, "ratio=0.34,what=heads")
    assert "heads 3 x 8 -> 2 x 8, MLP 96 in" in method.notes(view(model))[0]
    with torch.no_grad():
        assert model(IMAGES).shape == (2, 5)


def test_it_copies_saves_and_takes_other_image_sizes():
    model = vit(dynamic_img_size=True)
    pruned(model, "ratio=0.5")
    with torch.no_grad():
        expected = model(IMAGES)
        assert torch.equal(copy.deepcopy(model)(IMAGES), expected)
        again = vit(dynamic_img_size=True)
        pruned(again, "ratio=0.5")
        for p in again.parameters():
            p.zero_()
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        again.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
        assert torch.equal(again(IMAGES), expected)
        assert model(torch.randn(1, 3, 48, 48)).shape == (1, 5)
        effbench.apply(model, "resize:size=48")
        assert model(IMAGES).shape == (2, 5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half):
    model = vit().to(half)
    pruned(model, "ratio=0.5")
    assert {p.dtype for p in model.parameters()} == {half} and count(model) == size(16, 3 * 8, 48)


@pytest.mark.parametrize("first", ["token_merge:r=2", "token_prune:keep=0.5,at=1", "sparse_attention:window=2"])
def test_it_stacks_with_methods_on_tokens(first):
    model = effbench.apply(vit(), f"{first}+channel_prune:ratio=0.5")
    other = effbench.apply(vit(), "channel_prune:ratio=0.5")
    with torch.no_grad():
        assert model(IMAGES).shape == (2, 5)
        assert not torch.allclose(model(IMAGES), other(IMAGES))  # the edits are still there
    assert count(model) == count(other)


def refused(make, spec, calibration=None):
    model = make()
    seen = view(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (method,) = parse(f"channel_prune:{spec}")
    with pytest.raises(UsageError) as error:
        method.finish(seen, calibration or of_inputs(None))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    return f"{error.value} {error.value.hint}"


class Wide(nn.Module):
    """An MLP that drops what it does not need."""

    def __init__(self, in_features, hidden_features, **_):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(in_features, hidden_features + 1), nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc2(self.fc1(x)[..., :-1].relu())


def scored():
    model = vit()
    edit = TokenEdit()
    edit.scorer = nn.Linear(24, 1)
    view(model).image.after_attention(1, edit)
    return model


@pytest.mark.parametrize(
    "make, spec, said",
    [
        (vit, "ratio=0.9,what=heads", "leaves nothing of the number of heads of 3"),
        (vit, "ratio=0.9,what=head_dims", "leaves nothing of the head width of 8"),
        (vit, "ratio=0.5,what=head_dims/mlp,round_to=16", "round_to=16 is more than the head width of 8"),
        (vit, "ratio=0.5,what=mlp,round_to=97", "round_to=97 is more than the MLP width of 96"),
        (vit, "ratio=0.5,target=text", "target=text: no text tower"),
        (vit, "ratio=0.5,importance=taylor", "images=64 needs training images"),
        (lambda: vit(class_token=False, global_pool="map"), "ratio=0.5", "global_pool=map"),
        (lambda: TimmFeatures(vit()), "ratio=0.5", "reads its features"),
        (lambda: vit(mlp_layer=Wide), "ratio=0.5,what=mlp", "an MLP of type Wide is not known"),
        (lambda: vit(qk_norm=True, norm_layer=timm.layers.RmsNorm), "ratio=0.5,what=head_dims", "RmsNorm"),
        (scored, "ratio=0.5", "blocks.1.token_edit.scorer.weight"),
        (lambda: vit(norm_layer=timm.layers.RmsNorm), "ratio=0.5", "RmsNorm"),
        (
            lambda: open_clip.transformer.TextTransformer(12, 50, 24, 3, 2, output_dim=0),
            "ratio=0.5,target=text",
            "no pr",
        ),
    ],
)
def test_refused_before_anything_is_changed(make, spec, said):
    assert said in refused(make, spec)


def test_taylor_needs_images_and_a_loss():
    short = "channel_prune: images=64 needs 64 training images to calibrate with, and there are 10"
    assert short in refused(vit, "ratio=0.5,importance=taylor", with_loss(count=10))
    bare = refused(vit, "ratio=0.5,importance=taylor,images=2", of_inputs(IMAGES))
    assert "gradients need a task's loss" in bare


@pytest.mark.parametrize(
    "spec, said",
    [
        ("ratio=0", "ratio"),
        ("ratio=1", "ratio"),
        ("what=neurons", "what"),
        ("importance=hessian", "importance"),
        ("target=image", "target"),
        ("round_to=0", "round_to"),
        ("images=0", "images"),
        ("phase=train", "phase"),
        ("what=", "what"),
    ],
)
def test_bad_parameters(spec, said):
    with pytest.raises(UsageError, match=said):
        parse(f"channel_prune:{spec}")


def test_vit_base_halved_has_the_size_of_deit_small():
    """22.05 M parameters; its MACs are those that the reference numbers give for deit_small_patch16_224."""
    model = effbench.apply(timm.create_model("vit_base_patch16_224").eval(), "channel_prune:ratio=0.5,round_to=1")
    assert count(model) == 22_050_664
    assert flops(model, torch.zeros(1, 3, 224, 224)).macs == 4_598_882_304
    assert {block.attn.scale for block in model.blocks} == {64**-0.5}
