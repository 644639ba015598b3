"""Useful FLOPs under masks, and low-bit operations of quantised models, against pairs and MACs counted by hand."""

import warnings

import pytest
import torch
from tiny import clip
from torch import nn
from torch.nn import functional

from effbench.measure.flops import flops, flops_of

CAUSAL, PADDING = torch.ones(9, 11).tril().bool(), torch.tensor([[True] * 11, [True] * 4 + [False] * 7])[:, None, None]
KEPT = {  # of 2 x 3 x 9 x 11 pairs
    "none": (dict(), 594),
    "causal": (dict(is_causal=True), 6 * 45),
    "boolean": (dict(attn_mask=CAUSAL), 6 * 45),
    "infinite": (dict(attn_mask=torch.zeros(9, 11).masked_fill(~CAUSAL, float("-inf"))), 6 * 45),
    "lowest": (dict(attn_mask=torch.zeros(9, 11).masked_fill(~CAUSAL, torch.finfo(torch.float32).min)), 6 * 45),
    "padding": (dict(attn_mask=PADDING), 3 * 9 * 15),
    "bias": (dict(attn_mask=torch.full((9, 11), -1e9)), 594),
    "nothing": (dict(attn_mask=torch.zeros(9, 11, dtype=torch.bool)), 0),
}


@pytest.mark.parametrize("mask", KEPT)
@pytest.mark.parametrize("way", ["MATH", "FLASH_ATTENTION", "dropout", "meta", "float64", "traced"])
def test_attention_dense_and_useful_whatever_the_kernel(way, mask):
    options, kept = KEPT[mask]
    options = options | (dict(dropout_p=0.5) if way == "dropout" else {})
    kind = dict(dtype=torch.float64 if way == "float64" else torch.float32, device="meta" if way == "meta" else "cpu")
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(kind["dtype"])
    query, key, value = (torch.ones(2, 3, n, 8, requires_grad=True, **kind) for n in (9, 11, 11))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, **options)

    if way == "traced":
        with warnings.catch_warnings(action="ignore"):
            attend = torch.jit.trace(attend, (query, key, value))
    backend = (
        getattr(torch.nn.attention.SDPBackend, way)
        if way.isupper()
        else list(torch.nn.attention.SDPBackend.__members__.values())
    )
    with torch.nn.attention.sdpa_kernel(backend):
        for gradients, mode in ((1, torch.no_grad), (1, torch.inference_mode), (1, torch.enable_grad), (3, None)):
            with (mode or torch.enable_grad)():
                count = flops_of(
                    lambda m=mode: attend(query, key, value) if m else attend(query, key, value).sum().backward()
                )
            assert count.dense_flops == gradients * 4 * 8 * 594
            assert count.useful_flops == gradients * 4 * 8 * kept


@pytest.mark.parametrize("queries, keys, kept", [(5, 5, 15), (2, 5, 3), (5, 2, 9), (1, 1, 1)])
def test_causal_rectangles(queries, keys, kept):
    mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    assert int(mask.sum()) == kept
    q, k = torch.zeros(1, 1, queries, 4), torch.zeros(1, 1, keys, 4)
    count = flops_of(lambda: functional.scaled_dot_product_attention(q, k, k, is_causal=True))
    assert (count.dense_flops, count.useful_flops) == (16 * queries * keys, 16 * kept)


def test_useful_through_checkpointing_and_grouped_keys():
    q, k = torch.randn(1, 4, 6, 8, requires_grad=True), torch.randn(1, 2, 6, 8)

    def attend(q: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    step = flops_of(lambda: torch.utils.checkpoint.checkpoint(attend, q, use_reentrant=False).sum().backward())
    assert step.dense_flops == 4 * 4 * 4 * 36 * 8  # once, again, and twice for the gradients
    assert step.useful_flops * 36 == step.dense_flops * 21


def test_openclip_text_tower_is_causal():
    model = clip()  # 12 tokens, 2 layers of width 24
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            count = flops_of(lambda: model.encode_text(torch.zeros(3, 12, dtype=torch.long)), model)
        assert count.dense_flops - count.useful_flops == 3 * 2 * 4 * 24 * (12 * 12 - 12 * 13 // 2)


def flex_masks() -> dict[str, tuple]:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    def make(mask_mod, batch=None, heads=None):
        return create_block_mask(mask_mod, batch, heads, 200, 200, device="cpu")

    lengths = torch.tensor([50, 150])
    listed = torch.tensor([[[1, 2]]], dtype=torch.int32), torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32)
    return {
        "none": (None, 2 * 3 * 200 * 200),
        "causal": (make(lambda b, h, q, k: q >= k), 2 * 3 * 200 * 201 // 2),
        "padding": (make(lambda b, h, q, k: k < lengths[b], 2), 3 * 200 * 200),
        "heads": (make(lambda b, h, q, k: (h == 0) | (q == k), None, 3), 2 * (200 * 200 + 2 * 200)),
        "listed": (BlockMask.from_kv_blocks(*listed, BLOCK_SIZE=128, seq_lengths=(200, 200)), 6 * (128**2 + 72 * 200)),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention(mode, compiled):
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, backend="eager") if compiled else flex_attention
    x = torch.randn(2, 3, 200, 16)
    for name, (mask, kept) in flex_masks().items():
        with mode():
            count = flops_of(lambda m=mask: attend(x, x, x, block_mask=m))
        assert count.dense_flops == 4 * 16 * 2 * 3 * 200 * 200 and count.complete
        assert count.useful_flops == 4 * 16 * kept, name


def quantised(kind: str, engine: str = "") -> tuple[nn.Module, tuple[int, ...]]:
    """A quantised model, and the shape of its input."""
    quantization = torch.ao.quantization
    if kind == "lstm":
        lstm = nn.LSTM(8, 4, 2, bidirectional=True)
        return quantization.quantize_dynamic(nn.Sequential(lstm), {nn.LSTM}, dtype=torch.qint8), (3, 2, 8)
    if kind in ("qint8", "float16"):
        linears = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5, bias=False)).eval()
        return quantization.quantize_dynamic(linears, {nn.Linear}, dtype=getattr(torch, kind)), (2, 3, 8)
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = engine
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(128, 6))
    x = torch.randn(2, 4, 8, 8)
    prepared = prepare_fx(model.eval(), quantization.get_default_qconfig_mapping(engine), (x,))
    prepared(x)
    return convert_fx(prepared), (2, 4, 8, 8)


needs_int8 = pytest.mark.skipif(
    "x86" not in torch.backends.quantized.supported_engines, reason="torch.ao has no int8 kernels on this processor"
)


@needs_int8
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(
    "kind, macs",
    [
        ("qint8", 6 * (8 * 6 + 6 * 5)),
        ("lstm", 6 * 2 * (16 * (8 + 4) + 16 * (8 + 4))),
        ("x86", 2 * (36 * 8 * 4 * 9 + 16 * 8 * 2 * 9 + 128 * 6)),
        ("onednn", 2 * (36 * 8 * 4 * 9 + 16 * 8 * 2 * 9 + 128 * 6)),
        ("qnnpack", 2 * (36 * 8 * 4 * 9 + 16 * 8 * 2 * 9 + 128 * 6)),
    ],
)
def test_torch_ao_int8_is_low_bit(kind, macs, mode, monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", torch.backends.quantized.engine)
    if kind not in ("qint8", "lstm", *torch.backends.quantized.supported_engines):
        pytest.skip(f"this torch has no {kind}")
    model, shape = quantised(kind, kind)
    with mode():
        count = flops_of(lambda: model(torch.randn(shape)), model)
    assert (count.low_bit_macs, count.low_bit_ops) == (macs, macs * 8 * 8)
    assert count.complete and count.dense_flops == count.useful_flops == 0
    assert sum(count.by_layer.values()) == 2 * macs and count.by_layer.keys() <= dict(model.named_modules()).keys()


@needs_int8
@pytest.mark.filterwarnings("ignore")
def test_float16_weights_are_dense():
    model, shape = quantised("float16")
    count = flops(model, torch.randn(shape))
    assert (count.macs, count.low_bit_ops, count.complete) == (6 * (8 * 6 + 6 * 5), 0, True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_torchao(mode):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    x, macs = torch.randn(2, 3, 64), 6 * (64 * 32 + 32 * 16)
    for config, low in ((torchao.Int8DynamicActivationInt8WeightConfig, True), (torchao.Int8WeightOnlyConfig, False)):
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16, bias=False)).eval()
        torchao.quantize_(model, config())
        with mode():
            count = flops(model, x)
        assert (count.low_bit_ops, count.low_bit_macs) == ((64 * macs, macs) if low else (0, 0))
        assert count.macs == (0 if low else macs) and count.complete
        assert count.by_layer == {"0": 2 * 6 * 64 * 32, "1": 2 * 6 * 32 * 16}


def test_weight_only_kernels_are_dense():
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    eight = flops_of(
        lambda: torch._weight_int8pack_mm(x, torch.ones(32, 64, dtype=torch.int8), torch.ones(32, dtype=x.dtype))
    )
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.ones(32, 64, dtype=torch.int32), 1)
    scales = torch.ones(2, 32, 2, dtype=x.dtype)
    four = flops_of(lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales))
    for count in (eight, four):
        assert (count.macs, count.low_bit_ops, count.complete) == (3 * 64 * 32, 0, True)
    ints = flops_of(lambda: torch.ones(3, 4, dtype=torch.int32) @ torch.ones(4, 5, dtype=torch.int32))
    assert (ints.low_bit_macs, ints.low_bit_ops, ints.dense_flops) == (60, 60 * 32 * 32, 0)
