"""precision: what is cast, what it composes with, and what is refused."""

import copy
import pickle

import open_clip
import pytest
import torch
from tiny import IMAGES, clip, vit

import effbench
from effbench.errors import UsageError
from effbench.measure.analytic import analytic
from effbench.measure.flops import flops
from effbench.models.dual_encoder import DualEncoder, TimmFeatures
from effbench.models.tower import view
from effbench.spec import parse
from effbench_methods import precision
from effbench_methods.algorithms.attention_paths import Choice
from effbench_methods.precision import Precision, WrittenOut, written_out

BF16 = torch.bfloat16
TEXTS = torch.tensor([[1, 5, 9, 49, 0, 0, 0, 0, 0, 0, 0, 0], [2, 7, 8, 11, 3, 49, 0, 0, 0, 0, 0, 0]])


def custom_clip():
    torch.manual_seed(0)
    text = dict(context_length=12, vocab_size=50, width=24, heads=3, layers=2)
    return open_clip.CustomTextCLIP(
        16, dict(image_size=32, patch_size=8, width=24, head_width=8, layers=4), text
    ).eval()


def pooled():
    return vit(class_token=False, global_pool="avg")


def dtypes(module):
    return {tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()}


def close(y, expected):
    return torch.nn.functional.cosine_similarity(y.float().flatten(), expected.flatten(), dim=0) > 0.999


@pytest.fixture
def attention_is_written_out(monkeypatch):
    monkeypatch.setattr(precision, "_timed", lambda *_: Choice("written out", ratios={"written out": 1.4}))


@pytest.mark.parametrize(
    "stack", ["", "token_merge:r=2+", "token_prune:keep=0.7,at=1+", "resize:size=16+", "text_pack+"]
)
@pytest.mark.parametrize("make", [vit, pooled, clip, custom_clip])
def test_it_gives_what_float32_gives(make, stack, attention_is_written_out):
    if stack.startswith("text") and make in (vit, pooled):
        pytest.skip("no texts")
    if stack.startswith("token_prune") and make is pooled:
        pytest.skip("its score needs a class token")
    inputs = (IMAGES, TEXTS)[: 1 if make in (vit, pooled) else 2]
    edited = effbench.apply(make(), stack[:-1]) if stack else make()
    model = effbench.apply(make(), f"{stack}precision")
    with torch.no_grad():
        for image in range(2):  # one by one: which tokens are cut is then the only thing that rounding may turn
            one = tuple(x[image : image + 1] for x in inputs)
            found, expected = model(*one), edited(*one)
            for y, x in zip(*([(v,) if torch.is_tensor(v) else v[:2] for v in (found, expected)]), strict=True):
                assert y.dtype == BF16 and y.shape == x.shape
                assert close(y, x)
        towers = (tower.module for tower in (view(model).image, view(model).text) if tower)
        assert all(dtypes(tower) == {BF16} for tower in towers)
        again = copy.deepcopy(model)
        assert all(map(torch.equal, _tensors(again(*inputs)), _tensors(model(*inputs))))
        assert all(map(torch.equal, _tensors(pickle.loads(pickle.dumps(model))(*inputs)), _tensors(model(*inputs))))
    assert model.state_dict().keys() >= make().state_dict().keys()


def _tensors(outputs):
    return [outputs] if torch.is_tensor(outputs) else [y for y in outputs if torch.is_tensor(y)]


@pytest.mark.parametrize("make", [clip, custom_clip])
def test_only_the_towers_that_are_named_are_cast(make):
    plain = make()
    with torch.no_grad():
        images, texts = plain.encode_image(IMAGES), plain.encode_text(TEXTS)
        one = effbench.apply(make(), "precision:target=tower")
        assert dtypes(one.visual) == {BF16} and one.encode_image(IMAGES).dtype == BF16
        assert torch.allclose(one.encode_text(TEXTS), texts, atol=1e-5)
        other = effbench.apply(make(), "precision:target=text")
        assert dtypes(other.visual) == {torch.float32} and other.encode_text(TEXTS).dtype == BF16
        assert close(other.encode_text(TEXTS), texts)
        assert torch.allclose(other.encode_image(IMAGES), images, atol=1e-5)


def test_a_dual_encoder_keeps_its_heads_in_float32():
    text = custom_clip().text
    model = DualEncoder(TimmFeatures(vit()), text, torch.nn.Linear(48, 16), "cosine", 16).eval()
    with torch.no_grad():
        expected = model(IMAGES, TEXTS)
        effbench.apply(model, "precision")
        found = model(IMAGES, TEXTS)
    assert dtypes(model.image_encoder) == dtypes(model.text_encoder) == {BF16}
    assert dtypes(model.projection) == {torch.float32} and all(y.dtype == torch.float32 for y in found)
    assert all(close(y, x) for y, x in zip(found, expected, strict=True))


def test_a_timm_trunk_inside_openclip_is_cast_with_its_head():
    torch.manual_seed(0)
    vision = dict(timm_model_name="vit_tiny_patch16_224", image_size=32, timm_proj="linear", timm_pool="")
    text = dict(context_length=12, vocab_size=50, width=24, heads=3, layers=1)
    model = effbench.apply(open_clip.CustomTextCLIP(16, vision, text).eval(), "precision:target=tower")
    assert dtypes(model.visual) == {BF16} and model.encode_image(torch.zeros(1, 3, 224, 224)).dtype == BF16


def test_attention_is_written_out_only_where_that_is_faster(monkeypatch, attention_is_written_out):
    model = effbench.apply(vit(), "sparse_attention:pattern=window,window=2,at=1+precision")
    kinds = [type(block.attn.core) is WrittenOut for block in model.blocks]
    assert kinds == [True, False, True, True]
    assert "3 blocks, 1.40x" in " ".join(Precision().notes(view(model)))
    monkeypatch.setattr(precision, "_timed", lambda *_: Choice("written out", ratios={"written out": 1.0}))
    assert all(block.attn.core is None for block in effbench.apply(vit(), "precision").blocks)


def test_attention_written_out_is_attention_and_costs_the_same(attention_is_written_out):
    from effbench.models.attention import Projections

    q, k, v = torch.randn(3, 2, 3, 5, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert (written_out(Projections(q, k, v, 0.3)) - expected).abs().max() < 1e-5
    model = effbench.apply(vit(), "precision")
    counted, dense = flops(model, IMAGES), flops(vit(), IMAGES)
    assert counted.dense_flops == dense.dense_flops == counted.useful_flops and counted.complete
    assert analytic(model, IMAGES).flops == dense.dense_flops
    core = WrittenOut(Choice("written out"))
    mask = torch.zeros(5, 5).masked_fill_(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    causal = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    for arguments in ((mask, False), (None, True)):
        assert (core(Projections(q, k, v, 0.3), *arguments, 1, None) - causal).abs().max() < 1e-5


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(precision, "_fp16_on_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="fp16 needs a GPU") as refused:
        effbench.apply(vit(), "precision:fp16")
    assert "precision:bf16" in refused.value.hint
    with pytest.raises(UsageError, match="target=text names no tower") as refused:
        effbench.apply(vit(), "precision:target=text")
    assert "target=tower" in refused.value.hint
    for spec in ("precision:fp32", "precision:target=head", "precision:phase=train"):
        with pytest.raises(UsageError, match="is not valid"):
            parse(spec)
    for other in ("compile", "quantize:weight_only"):
        with pytest.raises(UsageError, match="precision must stand before"):
            parse(f"{other}+precision")
    with pytest.raises(UsageError, match="conflict"):
        parse("precision+quantize")  # torch.ao's int8 takes float32


def test_a_cpu_without_bf16_instructions_is_named(monkeypatch):
    model = effbench.apply(vit(), "precision")
    monkeypatch.setattr(precision, "_bf16_on_cpu", lambda: False)
    assert "no bf16 instructions" in " ".join(Precision().notes(view(model)))
    monkeypatch.setattr(precision, "_bf16_on_cpu", lambda: True)
    assert "no bf16 instructions" not in " ".join(Precision().notes(view(model)))
