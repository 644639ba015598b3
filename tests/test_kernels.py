import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import effbench
from effbench.measure.kernels import kernels
from effbench.parity import differs
from effbench.records import Kernels

X = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])


def fused(model, on):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = on
    return model


@MODES
def test_fused_and_written_out_attention_of_a_vit(mode):
    with mode():
        assert kernels(lambda: fused(tiny.vit(), True)(tiny.IMAGES)).attention == {"sdpa:flash": 4}
        assert kernels(lambda: fused(tiny.vit(), False)(tiny.IMAGES)).attention == {"eager": 4}


@MODES
def test_math_backend_of_sdpa(mode):
    with mode(), sdpa_kernel(SDPBackend.MATH):
        assert kernels(lambda: fused(tiny.vit(), True)(tiny.IMAGES)).attention == {"sdpa:math": 4}
        q = torch.randn(2, 3, 7, 8)
        masked = kernels(lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(7, 7).tril()))
        assert masked.attention == {"sdpa:math": 1}


@MODES
def test_einsum_attention_is_written_out(mode):
    q = torch.randn(2, 3, 7, 8)

    def attend():
        weights = (torch.einsum("bhqd,bhkd->bhqk", q, q) * 0.3).softmax(-1)
        return torch.einsum("bhqk,bhkd->bqhd", F.dropout(weights, 0.1), q)

    with mode():
        assert kernels(attend).attention == {"eager": 1}


def test_a_softmax_over_classes_is_no_attention():
    model = nn.Sequential(nn.Linear(24, 5), nn.Softmax(-1), nn.Linear(5, 5))
    assert kernels(lambda: tiny.vit()(tiny.IMAGES).softmax(-1).sum()).attention == {"sdpa:flash": 4}
    assert kernels(lambda: model[1](model[0](X)) * 2).attention == {}


def test_a_methods_single_attention_row_is_no_attention():
    model = effbench.apply(tiny.vit(), "token_prune:keep=0.5,at=1")
    with torch.no_grad():
        assert kernels(lambda: model(tiny.IMAGES)).attention == {"sdpa:flash": 4}


@pytest.mark.parametrize("weights", [False, True])
def test_library_fast_path_is_seen_and_left_on(weights):
    attention = nn.MultiheadAttention(24, 2, batch_first=True).eval()

    def attend():
        return attention(X, X, X, need_weights=weights)

    with torch.no_grad():
        assert kernels(attend).attention == {"library fast path": 1}
    assert kernels(attend).attention == ({"eager": 1} if weights else {"sdpa:flash": 1})


def test_encoder_layer_takes_the_fast_path_in_evaluation_only():
    layer = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True).eval()
    with torch.inference_mode():
        found = kernels(lambda: layer(X))
    assert found.attention == {"library fast path": 1}
    assert found.precision == {"fp32": 1}
    assert kernels(lambda: layer.train()(X)).attention == {"sdpa:math": 1}  # dropout: no fused kernel on a CPU


def test_openclip_takes_another_path_than_the_shared_attention():
    def clip():
        vision = dict(image_size=32, patch_size=8, width=24, head_width=6, layers=4)  # an even number of heads
        return open_clip.CLIP(16, vision, dict(context_length=12, vocab_size=50, width=24, heads=4, layers=2)).eval()

    def seen(model):
        text = torch.randint(1, 49, (2, 12))
        with torch.inference_mode():
            return kernels(lambda: model(tiny.IMAGES, text))

    library, shared = seen(clip()), seen(effbench.apply(clip(), "token_prune:keep=1,at=1"))
    assert library.attention == {"library fast path": 4, "sdpa:flash": 2}  # the text tower's mask keeps it off
    assert shared.attention == {"sdpa:flash": 6}
    assert differs(library, shared) == ("attention library fast path + sdpa:flash vs sdpa:flash",)


def test_precision_and_autocast():
    plain = kernels(lambda: tiny.vit()(tiny.IMAGES))
    half = kernels(lambda: tiny.vit().bfloat16()(tiny.IMAGES.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        cast = kernels(lambda: tiny.vit()(tiny.IMAGES))
        exempt = kernels(lambda: uncast(tiny.vit()))
    assert (set(plain.precision), plain.autocast) == ({"fp32"}, False)
    assert (set(half.precision), half.autocast) == ({"bf16"}, False)
    assert "bf16" in cast.precision and cast.autocast
    assert (set(exempt.precision), exempt.autocast) == ({"fp32"}, False)
    assert sum(plain.precision.values()) == 1 + 4 * (1 + 4) + 1  # patches, four blocks, head


def uncast(model):
    with torch.autocast("cpu", enabled=False):
        return model(tiny.IMAGES)


def test_autocast_inside_the_step():
    def step():
        with torch.autocast("cpu", torch.bfloat16):
            tiny.vit()(tiny.IMAGES)

    assert kernels(step).autocast


def test_integer_products_of_torch_ao():
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch quantises nothing on this processor")
    model = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(nn.Linear(24, 8), nn.Conv1d(7, 2, 1)), {nn.Linear}, dtype=torch.qint8
    )
    assert kernels(lambda: model(X)).precision == {"fp32": 1, "int8": 1}


def test_integer_products_of_torchao():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    weights, both = (nn.Sequential(nn.Linear(64, 64)).eval() for _ in range(2))
    torchao.quantize_(weights, torchao.Int8WeightOnlyConfig())
    torchao.quantize_(both, torchao.Int8DynamicActivationInt8WeightConfig())
    x = torch.randn(4, 64)
    with torch.no_grad():
        assert kernels(lambda: weights(x)).precision == {"fp32": 1}  # it computes densely
        assert kernels(lambda: both(x)).precision == {"int8": 1}


def test_compiled_code_is_named():
    model = tiny.vit()
    wrapped = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert not kernels(lambda: model(tiny.IMAGES)).compiled
        found = kernels(lambda: wrapped(tiny.IMAGES))
        assert (found.compiled, found.attention) == (True, {"sdpa:flash": 4})
        model.blocks[1].norm1.compile(backend="eager")
        assert kernels(lambda: model(tiny.IMAGES)).compiled
        assert kernels(lambda: torch.compile(F.gelu, backend="eager")(X)).compiled


def test_flex_attention():
    flex = pytest.importorskip("torch.nn.attention.flex_attention", reason="this torch has no FlexAttention")
    q = torch.randn(1, 2, 16, 16)
    with torch.no_grad():
        plain = kernels(lambda: flex.flex_attention(q, q, q))
        compiled = kernels(lambda: torch.compile(flex.flex_attention, backend="eager")(q, q, q))
    assert (plain.attention, plain.precision, plain.compiled) == ({"flex": 1}, {"fp32": 1}, False)
    assert (compiled.attention, compiled.compiled) == ({"flex": 1}, True)


def test_channels_last():
    conv = nn.Conv2d(3, 8, 4, 4)
    images = tiny.IMAGES
    assert not kernels(lambda: conv(images)).channels_last
    assert kernels(lambda: conv(images.to(memory_format=torch.channels_last))).channels_last
    assert kernels(lambda: conv.to(memory_format=torch.channels_last)(images)).channels_last
    pointwise = nn.Conv2d(3, 8, 1).to(memory_format=torch.channels_last)  # one layout is both
    assert not kernels(lambda: pointwise(images)).channels_last


def test_the_callers_modes_hold_and_an_error_leaves_nothing_behind():
    model = tiny.vit().train()
    seen = kernels(lambda: model(tiny.IMAGES).sum().backward())
    assert model.training and all(p.grad is not None for p in model.parameters())
    assert seen.threads == torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        kernels(lambda: 1 / 0)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_differences_in_words():
    a = Kernels(attention={"library fast path": 12}, precision={"fp32": 50}, threads=2)
    assert differs(a, a.model_copy(update=dict(attention={"library fast path": 6}, precision={"fp32": 25}))) == ()
    b = Kernels(
        attention={"sdpa:flash": 6, "eager": 6},
        precision={"bf16": 50},
        autocast=True,
        compiled=True,
        channels_last=True,
        threads=4,
    )
    assert differs(a, b) == (
        "attention library fast path vs eager + sdpa:flash",
        "precision fp32 vs bf16",
        "autocast off vs on",
        "torch.compile off vs on",
        "channels-last off vs on",
        "threads 2 vs 4",
    )
    assert differs(Kernels(), a) == ("attention none vs library fast path", "precision none vs fp32", "threads 0 vs 2")
