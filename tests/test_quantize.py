"""quantize: every linear layer on a low-bit kernel, the counts and bytes that follow, and what is refused."""

import copy
import io
import pickle
import sys

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import IMAGES, clip, vit
from torch import nn

import effbench
from effbench.calibration_set import of_inputs
from effbench.errors import UsageError
from effbench.measure.analytic import analytic, disagreement
from effbench.measure.flops import flops
from effbench.measure.kernels import kernels
from effbench.measure.memory import disk_bytes, weight_bytes
from effbench.measure.structure import structure
from effbench.models.tower import view
from effbench.registry import methods
from effbench.spec import check_stack, parse

Quantize = methods.get("quantize")
module = sys.modules[Quantize.__module__]
algorithms = sys.modules["effbench_methods.algorithms.int8_linear"]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        "onednn" not in torch.backends.quantized.supported_engines, reason="torch has no int8 kernels on this processor"
    ),
]

PHOTOS = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))
TEXTS = torch.randint(1, 49, (2, 12), generator=torch.Generator().manual_seed(3))
KINDS = ["quantize", "quantize:static,images=16", "quantize:weight_only", "quantize:int4"]
TORCHAO = ["quantize:library=torchao", "quantize:weight_only,library=torchao"]


def wide(**options):
    """Widths that int4 takes as well, its head apart."""
    return vit(**dict(embed_dim=96) | options)


def output(model, *inputs):
    with torch.inference_mode():
        out = model(*inputs)
    return out if isinstance(out, torch.Tensor) else torch.cat(out[:2], dim=1)


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=-1).min().item()


def plain_linears(model):
    return [name for name, m in model.named_modules() if type(m) is nn.Linear and type(m.weight.data) is torch.Tensor]


@pytest.mark.parametrize("spec", KINDS + TORCHAO)
def test_a_vit(spec):
    if "torchao" in spec:
        pytest.importorskip("torchao")
    model = wide()
    expected, dense = output(model, IMAGES), flops(model, IMAGES).macs
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    head = model.head.weight.numel() if "int4" in spec else 0  # 5 wide
    before = weight_bytes(model)
    effbench.apply(model, spec, calibration=PHOTOS)
    found = output(model, IMAGES)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    assert cosine(found, expected) > (0.97 if "int4" in spec else 0.999)

    whole = "int4" not in spec and "weight_only" not in spec
    count = flops(model, IMAGES)
    assert count.complete and count.macs + count.low_bit_macs == dense
    projections = 2 * (17 * 4 * 12 * 96**2 + 96 * 5)
    assert (count.low_bit_macs, count.low_bit_ops) == ((projections, 64 * projections) if whole else (0, 0))
    assert disagreement(count, analytic(model, IMAGES)) == ""
    path = {"quantize:int4": "bf16 x int4"}.get(spec, "int8" if whole else "fp32")
    assert kernels(lambda: output(model, IMAGES)).precision[path] >= 16

    seen = structure(model)
    assert seen.quantised_share == pytest.approx((linear - head) / (linear + 96 * 192))
    assert sum(seen.dtypes.values()) == weight_bytes(model)
    rest = before - 4 * linear
    assert 4 * linear / (weight_bytes(model) - rest) > (5.5 if "int4" in spec else 3.5)
    assert disk_bytes(model) - weight_bytes(model) < 60_000
    assert plain_linears(model) == (["head"] if head else [])


@pytest.mark.parametrize("spec", KINDS + TORCHAO)
def test_copies_and_state(spec):
    if "torchao" in spec:
        pytest.importorskip("torchao")
    model = effbench.apply(wide(), spec, calibration=PHOTOS)
    expected = output(model, IMAGES)
    assert torch.equal(output(copy.deepcopy(model), IMAGES), expected)
    if "torchao" not in spec:
        assert torch.equal(output(pickle.loads(pickle.dumps(model)), IMAGES), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(7)
    other = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=5
    ).eval()
    effbench.apply(other, spec, calibration=PHOTOS / 2)
    assert not torch.equal(output(other, IMAGES), expected)
    other.load_state_dict(torch.load(file), assign="torchao" in spec)
    assert torch.equal(output(other, IMAGES), expected)
    model.requires_grad_(False).eval()


def small_clip(text=None, vision=None):
    """Widths of 32, which all kinds take."""
    torch.manual_seed(0)
    text = dict(context_length=12, vocab_size=50, width=32, heads=4, layers=2) | (text or {})
    vision = dict(image_size=32, patch_size=8, width=32, head_width=8, layers=3) | (vision or {})
    return open_clip.CLIP(16, vision, text).eval()


@pytest.mark.parametrize("spec", KINDS + TORCHAO)
@pytest.mark.parametrize("target, layers", [("tower/text", 20), ("tower", 12), ("text", 8)])
def test_every_linear_layer_of_openclip_once(spec, target, layers):
    if "torchao" in spec:
        pytest.importorskip("torchao")
    model = small_clip()
    expected = output(model, IMAGES, TEXTS)
    calibration = [(PHOTOS, torch.cat([TEXTS] * 8))]
    effbench.apply(model, spec + (":" if ":" not in spec else ",") + f"target={target}", calibration)
    assert len(module.shares(view(model), ("tower", "text"))[0]) == layers  # 4 in a block
    left = plain_linears(model)
    assert len(left) == 20 - layers and all(name.startswith("visual.") == (target == "text") for name in left)
    assert cosine(output(model, IMAGES, TEXTS), expected) > (0.97 if "int4" in spec else 0.999)


def test_notes_name_the_kernel_and_what_stays_in_floating_point():
    model = effbench.apply(clip(), "quantize")
    (note,) = Quantize().notes(view(model))
    weights = 6 * 12 * 24**2
    rest = 24 * 192 + 2 * 16 * 24 + 17 * 24 + 12 * 24 + 50 * 24
    assert "24 linear layers on oneDNN int8" in note and f"{weights / (weights + rest):.1%} of the towers'" in note
    for name in ("visual.conv1.weight", "token_embedding.weight", "visual.proj ", "text_projection "):
        assert name in note
    four = effbench.apply(wide(), "quantize:int4")
    assert "does not take the widths of head:" in Quantize(kind="int4").notes(view(four))[1]


@pytest.mark.parametrize("spec", KINDS)
def test_batches_of_any_size(spec):
    model = effbench.apply(wide(), spec, calibration=PHOTOS)
    for images in (PHOTOS[:1], PHOTOS[:3]):
        whole = output(model, images)
        alone = torch.cat([output(model, image[None]) for image in images])
        assert cosine(whole, alone) > 0.999  # dynamic: a batch shares its scales
        if spec != "quantize":
            assert (whole - alone).abs().max() < (1e-4 if "int4" not in spec else 0.05)
    assert output(model, PHOTOS[:0]).shape == (0, 5)


def test_after_a_token_method():
    model, tokens = wide(), wide()
    expected = output(effbench.apply(tokens, "token_merge:r=2"), IMAGES)
    effbench.apply(model, "token_merge:r=2+quantize")
    assert plain_linears(model) == []
    assert cosine(output(model, IMAGES), expected) > 0.99  # a pair may merge that else would not
    assert flops(model, IMAGES).low_bit_macs < flops(effbench.apply(wide(), "quantize"), IMAGES).low_bit_macs


def test_gelu_in_the_kernel_changes_no_result(monkeypatch):
    fused = effbench.apply(wide(), "quantize")
    assert all(isinstance(block.mlp.act, nn.Identity) for block in fused.blocks)
    monkeypatch.setattr(module, "gelus", lambda model: {})
    apart = effbench.apply(wide(), "quantize")
    assert all(isinstance(block.mlp.act, nn.GELU) for block in apart.blocks)
    assert cosine(output(fused, IMAGES), output(apart, IMAGES)) > 0.9999


@pytest.mark.parametrize("name", ["GluMlp", "SwiGLU"])
def test_gated_and_other_activations_stay(name):
    layer = {"GluMlp": timm.layers.GluMlp, "SwiGLU": timm.layers.SwiGLU}[name]
    gated = wide(mlp_layer=layer, act_layer=nn.GELU)
    tanh = wide(act_layer=lambda: nn.GELU(approximate="tanh"))
    for model in (gated, tanh):
        expected = output(model, IMAGES)
        assert cosine(output(effbench.apply(model, "quantize"), IMAGES), expected) > 0.999


def test_seven_bits_do_not_overflow(monkeypatch):
    """Without VNNI a kernel adds pairs of products in 16 bits."""
    monkeypatch.setattr(algorithms, "bits", lambda: 7)
    linear, x = nn.Linear(64, 32), torch.randn(5, 64)
    for fixed in (None, (6 / 127, 64)):
        layer = algorithms.Int8Linear(linear, fixed)
        assert cosine(layer(x), linear(x)) > 0.999
    assert layer(100 * x).isfinite().all()


def test_zero_input_and_zero_weight():
    linear = nn.Linear(8, 4)
    nn.init.zeros_(linear.weight)
    layer = algorithms.Int8Linear(linear)
    assert torch.equal(layer(torch.zeros(2, 8)), linear.bias.detach().expand(2, 4))


def test_the_weight_is_in_memory_once():
    weight, scale = algorithms.per_channel(torch.randn(6, 5))
    layer = algorithms.Int8Linear(nn.Linear(5, 6))
    layer.pack(weight)
    assert torch.equal(layer.weight_int8(), weight)
    assert [p.numel() for p in layer.parameters()] == [6] and [b.numel() for b in layer.buffers()] == [6]


@pytest.mark.parametrize(
    "spec, message, hint",
    [
        ("quantize:int2", "kind=int2 is not valid", ""),
        ("quantize:static,library=torchao", "library=torchao has no kind=static", "dynamic or weight_only"),
        ("quantize:fp8,library=torchao", "library=torchao has no kind=fp8", ""),
        ("quantize:target=", "names no tower", "target=tower"),
        ("quantize:target=heads", "target=heads is not valid", ""),
        ("quantize:images=64", "kind=dynamic looks at no training images", "kind=static"),
        ("quantize:static,images=0", "images=0 is not valid", ""),
        ("quantize:phase=train", "phase=train is not valid", ""),
        ("quantize:static", "images=128 needs 128 training images to calibrate with, and there are 16", "images=16"),
        ("quantize:target=text", "no such tower", "use another target"),
        ("quantize:int4", "kind=int4 takes widths in multiples of 32 and 16", "dynamic"),
        ("quantize+quantize", "quantize stands twice", ""),
    ],
)
def test_bad_parameters_are_refused(spec, message, hint):
    with pytest.raises(UsageError, match=message) as refused:
        effbench.apply(vit(), spec, calibration=PHOTOS)
    assert hint in refused.value.hint


def test_what_cannot_be_calibrated():
    with pytest.raises(UsageError, match="needs training images"):
        effbench.apply(vit(), "quantize:static")
    with pytest.raises(UsageError, match="nothing entered transformer.resblocks.0.attn.qkv"):
        effbench.apply(clip(), "quantize:static,images=16", calibration=PHOTOS)
    model = vit()
    thrifty = of_inputs(IMAGES)
    thrifty.available, thrifty.thrifty = 128, True
    Quantize(kind="static").finish(view(model), thrifty)  # two images stand for 128
    assert plain_linears(model) == []


def test_half_precision():
    with pytest.raises(UsageError, match="kind=dynamic takes float32 and these weights are torch.bfloat16"):
        effbench.apply(vit().bfloat16(), "quantize")
    for spec in ("quantize:weight_only", "quantize:int4"):
        model = wide().bfloat16()
        expected = output(model, IMAGES.bfloat16())
        found = output(effbench.apply(model, spec), IMAGES.bfloat16())
        assert found.dtype == torch.bfloat16 and cosine(found.float(), expected.float()) > 0.98
    assert parse("quantize")[0].conflicts == parse("quantize:static")[0].conflicts == ("precision", "compile")
    assert parse("quantize:weight_only")[0].conflicts == parse("quantize:library=torchao")[0].conflicts == ()


def test_compile_stands_behind(monkeypatch):
    other = type("Compile", (), dict(conflicts=(), goes_before=()))()
    monkeypatch.setattr(methods, "name_of", lambda cls: "quantize" if cls is Quantize else "compile")
    check_stack((Quantize(library="torchao"), other))
    with pytest.raises(UsageError, match="quantize must stand before compile"):
        check_stack((other, Quantize(library="torchao")))
    with pytest.raises(UsageError, match="quantize and compile conflict"):  # torch.ao's int8 breaks the graph
        check_stack((Quantize(), other))


def test_packed_weights_stay_where_they_are():
    with pytest.raises(UsageError, match="moved or cast after quantisation"):
        effbench.apply(wide(), "quantize").bfloat16()
    with pytest.raises(UsageError, match="packed for cpu cannot be moved to meta"):
        effbench.apply(wide(), "quantize:int4").to("meta")
    effbench.apply(wide(), "quantize").to("cpu").float()


@pytest.mark.parametrize("kind", ["int4", "fp8", "dynamic"])
def test_no_kernel_is_said_before_anything_changes(kind, monkeypatch):
    layer = module.LAYERS[kind]
    cpu = torch.device("cpu")

    def missing(self, x):
        raise NotImplementedError("no kernel\nmore")

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(layer, "forward", missing)
    assert module.obstacle(kind, "torch.ao", cpu) == "its kernel is missing: no kernel"
    model = wide()
    with pytest.raises(UsageError, match=f"kind={kind} on cpu: its kernel is missing") as refused:
        effbench.apply(model, f"quantize:{kind}")
    assert "weight_only" in refused.value.hint and len(plain_linears(model)) == 17
    monkeypatch.setattr(layer, "forward", lambda self, x: -F.linear(x, torch.ones(64, 64)))
    assert "wrong results" in module.obstacle(kind, "torch.ao", cpu)


def test_emulated_float8_is_no_float8(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(UsageError, match="no AMX"):
        effbench.apply(wide(), "quantize:fp8")
    linear, x = nn.Linear(64, 32), torch.randn(2, 3, 64)
    assert cosine(module.Fp8Linear(linear)(x), linear(x)) > 0.998  # the arithmetic is right all the same


def test_torchao_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UsageError, match="torchao is not installed"):
        effbench.apply(vit(), "quantize:library=torchao")
    effbench.apply(vit(), "quantize")


def test_a_cast_after_int8_is_refused_and_leaves_the_model_as_it_is():
    model = effbench.apply(vit(), "quantize")
    expected = model(IMAGES)
    with pytest.raises(UsageError, match="precision: dtype=bf16: this model is quantised in int8"):
        effbench.apply(model, "precision:bf16")
    assert torch.equal(model(IMAGES), expected)


def test_the_flops_command_counts_int8():
    from effbench.measure.flop_towers import Request, count_towers

    request = Request("timm:test_vit")
    towers = [count_towers(request, stack)["image"] for stack in ((), parse("quantize"))]
    plain, low = (tower.count for tower in towers)
    assert towers[0].parameters == towers[1].parameters
    assert low.dense_flops + 2 * low.low_bit_macs == plain.dense_flops and low.low_bit_macs > 0
