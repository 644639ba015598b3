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
from effbench.measure.kernels import kernels
from effbench.measure.memory import disk_bytes, weight_bytes
from effbench.measure.structure import parameters, structure
from effbench.measure.tensor_memory import storages, weights
from effbench.models.dual_encoder import DualEncoder, TimmFeatures
from effbench.models.tower import view
from effbench.spec import parse
from effbench_methods import precision
from effbench_methods.algorithms import attention_written_out
from effbench_methods.algorithms.attention_paths import Choice
from effbench_methods.algorithms.attention_written_out import WrittenOut, written_out
from effbench_methods.algorithms.bf16_linear import PackedLinear, kernel_exists, pack, unpack
from effbench_methods.precision import Precision

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
    monkeypatch.setattr(attention_written_out, "_timed", lambda *_: Choice("written out", ratios={"written out": 1.4}))


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
    monkeypatch.setattr(attention_written_out, "_timed", lambda *_: Choice("written out", ratios={"written out": 1.0}))
    assert all(block.attn.core is None for block in effbench.apply(vit(), "precision").blocks)


def test_attention_written_out_is_attention_and_costs_the_same(attention_is_written_out):
    from effbench.models.attention import Projections

    q, k, v = torch.randn(3, 2, 3, 5, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert (written_out(Projections(q, k, v, 0.3), torch.float32) - expected).abs().max() < 1e-5
    model = effbench.apply(vit(), "precision")
    counted, dense = flops(model, IMAGES), flops(vit(), IMAGES)
    assert counted.dense_flops == dense.dense_flops == counted.useful_flops and counted.complete
    assert analytic(model, IMAGES).flops == dense.dense_flops
    core = WrittenOut("precision", Choice("written out"), torch.float32)
    mask = torch.zeros(5, 5).masked_fill_(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    causal = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    for arguments in ((mask, False), (mask.isfinite(), False), (None, True)):
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
    monkeypatch.setattr(precision, "bf16_on_cpu", lambda: False)
    assert "no bf16 instructions" in " ".join(Precision().notes(view(model)))
    monkeypatch.setattr(precision, "bf16_on_cpu", lambda: True)
    assert "no bf16 instructions" not in " ".join(Precision().notes(view(model)))


@pytest.fixture
def weights_are_packed(monkeypatch):
    if not kernel_exists():
        pytest.skip("no oneDNN kernel for bf16 on this CPU")
    monkeypatch.setattr(precision, "bf16_on_cpu", lambda: True)
    monkeypatch.setattr(attention_written_out, "_timed", lambda *_: Choice("", ratios={"": 1.0}))


def packed_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, PackedLinear) and layer.packed is not None]


def taken(make, images=IMAGES):
    return (images,) if make in (vit, pooled) else (images, TEXTS[:1].expand(len(images), -1))


@pytest.mark.parametrize("stack", ["", "token_merge:r=2+", "resize:size=16+"])
@pytest.mark.parametrize("make", [vit, clip, custom_clip])
def test_packed_weights_give_what_the_plain_cast_gives(make, stack, weights_are_packed):
    plain, packed = effbench.apply(make(), f"{stack}precision:pack=false"), effbench.apply(make(), f"{stack}precision")
    assert not packed_layers(plain) and len(packed_layers(packed)) == (16 if make is vit else 24)
    assert sum(layer.gelu for layer in packed_layers(packed)) == (4 if make is vit else 6)
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            found, expected = _tensors(packed(*taken(make, images))), _tensors(plain(*taken(make, images)))
        for y, x in zip(found[:2], expected[:2], strict=True):
            assert torch.cosine_similarity(y.float(), x.float(), dim=-1).min() > 0.999
            assert torch.cosine_similarity(y.float().flatten(), x.float().flatten(), dim=0) > 0.9999
    said = f"weights of {len(packed_layers(packed))} linear layers in oneDNN's own layout"
    assert said in " ".join(Precision().notes(view(packed)))
    assert "layout" not in " ".join(Precision().notes(view(plain)))


@pytest.mark.parametrize("make", [vit, clip, custom_clip])
def test_a_packed_state_is_the_plain_casts(make, weights_are_packed):
    plain, packed = effbench.apply(make(), "precision:pack=false"), effbench.apply(make(), "precision")
    expected, state = plain.state_dict(), packed.state_dict()
    assert list(state) == list(expected) and state.keys() == make().state_dict().keys()
    assert all(value.dtype == expected[key].dtype and torch.equal(value, expected[key]) for key, value in state.items())
    torch.manual_seed(1)
    other = {key: torch.randn_like(value.float()).to(value.dtype) / 8 for key, value in state.items()}
    plain.load_state_dict(other)
    packed.load_state_dict(other)
    assert all(torch.equal(value, other[key]) for key, value in packed.state_dict().items())
    with torch.inference_mode():
        assert close(_tensors(packed(*taken(make)))[0], _tensors(plain(*taken(make)))[0].float())
    lacking = [key for key in state if "mlp" in key and key.endswith("weight")][0]
    with pytest.raises(RuntimeError, match=f"Missing key.*{lacking}"):
        packed.load_state_dict({key: value for key, value in state.items() if key != lacking})
    with pytest.raises(RuntimeError, match=f"size mismatch for {lacking}"):
        packed.load_state_dict(state | {lacking: torch.zeros(2, 3)})


@pytest.mark.parametrize("make", [vit, clip])
def test_packed_weights_are_measured_as_the_plain_cast(make, weights_are_packed):
    plain, packed = effbench.apply(make(), "precision:pack=false"), effbench.apply(make(), "precision")
    inputs = taken(make)
    counted, dense = flops(packed, *inputs), flops(plain, *inputs)
    assert counted.complete and counted == dense  # layer by layer
    assert analytic(packed, *inputs) == analytic(plain, *inputs)
    assert parameters(packed) == parameters(plain) == sum(p.numel() for p in plain.parameters())
    assert structure(packed) == structure(plain) and structure(packed).quantised_share == 0
    assert weight_bytes(packed) == weight_bytes(plain)
    assert abs(disk_bytes(packed) - disk_bytes(plain)) < 0.02 * disk_bytes(plain)
    with torch.inference_mode():
        assert kernels(lambda: packed(*inputs)).precision == kernels(lambda: plain(*inputs)).precision
    held = [tensor for layer in packed_layers(packed) for tensor in layer.__dict__.values() if torch.is_tensor(tensor)]
    assert len(held) == len(packed_layers(packed)) and all(tensor.layout == torch._mkldnn for tensor in held)
    live = weights(packed)  # held, so that no storage's address is used twice
    assert sum(storage.nbytes() for storage in storages(live).values()) == weight_bytes(plain)


def test_copies_of_packed_weights_are_packed_and_what_is_moved_or_cast_is_plain(weights_are_packed):
    model = effbench.apply(vit(), "precision")
    with torch.inference_mode():
        expected = model(IMAGES)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to(BF16)):
            assert len(packed_layers(again)) == 16 and torch.equal(again(IMAGES), expected)
        wide = copy.deepcopy(model).float()
        assert not packed_layers(wide) and dtypes(wide) == {torch.float32} and close(wide(IMAGES), expected.float())
        assert wide.state_dict().keys() == model.state_dict().keys()
        assert dtypes(copy.deepcopy(wide)) == {torch.float32}
    away = copy.deepcopy(model).to("meta")
    assert away.blocks[0].mlp.fc1.weight.device.type == "meta" and away(IMAGES.to("meta")).shape == (2, 5)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_gives_what_its_linear_gave(weights_are_packed, gelu, bias):
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 72, bias=bias).to(BF16)
    layer, x = copy.deepcopy(plain), torch.randn(3, 5, 24, dtype=BF16)
    act = torch.nn.functional.gelu if gelu else lambda y: y
    pack(layer, gelu)
    assert torch.equal(layer.weight, plain.weight) and layer.int8_original_dtype == BF16
    with torch.no_grad():
        for entered in (x, x[:, ::2], x.transpose(0, 1), x[0, 0], x[:0]):
            assert layer(entered).shape == (*entered.shape[:-1], 72)
            assert torch.allclose(layer(entered).float(), act(plain(entered.float().to(BF16)).float()), atol=2e-2)
    grown = x.clone().requires_grad_()
    layer(grown).sum().backward()  # by F.linear
    other = x.clone().requires_grad_()
    act(plain(other)).sum().backward()
    assert torch.equal(grown.grad, other.grad)
    with torch.autocast("cpu", BF16):
        assert torch.equal(layer(x.float()), act(plain(x.float())))
    unpack(layer)
    assert type(layer) is torch.nn.Linear and layer.__dict__.keys() == plain.__dict__.keys()
    assert torch.equal(layer(x), plain(x)) and list(layer.state_dict()) == list(plain.state_dict())


def test_what_stands_to_the_right_finds_plain_weights(weights_are_packed, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, mode, **options: real(*args, backend="eager", **options))
    for right in ("compile", "quantize:weight_only"):
        found, expected = (effbench.apply(clip(), f"precision{parameter}+{right}") for parameter in ("", ":pack=false"))
        assert not any(isinstance(module, PackedLinear) for module in found.modules())
        assert [type(module) for module in found.modules()] == [type(module) for module in expected.modules()]
        with torch.inference_mode():
            assert torch.equal(found(IMAGES, TEXTS)[0], expected(IMAGES, TEXTS)[0])
    one = effbench.apply(clip(), "precision+quantize:weight_only,target=text")
    assert len(packed_layers(one.visual)) == 16 and not packed_layers(one.transformer)


def test_inductor_compiles_what_was_packed_and_what_the_user_compiles_himself(weights_are_packed):
    model = effbench.apply(vit(depth=1), "precision+compile")
    layer = torch.nn.Linear(24, 72).to(BF16)
    pack(layer, gelu=True)
    with torch.inference_mode():
        assert close(model(IMAGES), effbench.apply(vit(depth=1), "precision:pack=false")(IMAGES).float())
        x = torch.randn(3, 24, dtype=BF16)
        assert torch.allclose(torch.compile(layer, fullgraph=True)(x).float(), layer(x).float(), atol=2e-2)


def test_only_a_cpu_with_bf16_instructions_packs(weights_are_packed, monkeypatch):
    assert packed_layers(effbench.apply(vit(), "precision"))
    monkeypatch.setattr(precision, "bf16_on_cpu", lambda: False)
    assert not any(isinstance(module, PackedLinear) for module in effbench.apply(vit(), "precision").modules())
