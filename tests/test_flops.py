"""FLOPs against /shared/reference_numbers.json (copied here with its keys) and against products counted by hand."""

import logging

import open_clip
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from effbench.errors import UsageError
from effbench.measure.flops import flops, flops_of

# reference_numbers.json: dense_gmacs
DENSE_GMACS = {
    "deit_tiny_patch16_224": 1.2537,
    "deit_small_patch16_224": 4.5989,
    "vit_base_patch16_224": 17.5638,
    "vit_base_patch32_224": 4.4092,
    "vit_small_patch16_384": 15.49,
    "vit_large_patch16_224": 61.555,
}
# reference_numbers.json: openclip_gflops
OPENCLIP_GFLOPS = {
    "ViT-B-32": (8.82, 5.96),
    "ViT-B-16": (35.13, 5.96),
    "ViT-S-16": (9.2, 3.38),
    "ViT-L-14": (162.03, 13.3),
}
# reference_numbers.json: clip_text_vit_b_gflops_by_length
TEXT_GFLOPS = {77: 5.96, 32: 2.442, 24: 1.827, 20: 1.52, 16: 1.215, 14: 1.062, 12: 0.91}
# reference_numbers.json: train_cost_in_forwards_deit_small; blocks trained, stem trained
TRAIN_COST = {
    "full": (2.987, range(12), True),
    "uniform_0_4_8_with_stem": (2.305, (0, 4, 8), True),
    "uniform_3_7_11_no_stem": (2.026, (3, 7, 11), False),
    "top3_no_stem": (1.494, (9, 10, 11), False),
    "head_only": (1.0, (), False),
}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def images(size: int) -> torch.Tensor:
    return torch.empty(1, 3, size, size, device="meta")


def openclip(name: str, device: str = "meta") -> nn.Module:
    logging.disable(logging.WARNING)
    try:
        with torch.device(device):
            return open_clip.create_model(name, pretrained=None, device=device).eval()
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", DENSE_GMACS)
def test_timm_vits(name):
    count = flops(on_meta(name), images(int(name[-3:])))
    assert count.macs / 1e9 == pytest.approx(DENSE_GMACS[name], rel=5e-5)
    assert count.complete and count.overhead_flops == 0 and sum(count.by_layer.values()) == count.dense_flops


def test_deit_small_exactly():
    count = flops(on_meta("deit_small_patch16_224"), images(224))
    assert count.macs == 4598882304  # reference_numbers.json: dense_exact_macs
    assert count.by_layer["blocks.3.attn.qkv"] == 2 * 197 * 384 * 3 * 384
    assert count.by_layer["blocks.3.attn"] == 4 * 197 * 197 * 384


@pytest.mark.parametrize("name", OPENCLIP_GFLOPS)
def test_openclip(name):
    model = openclip(name)
    size = model.visual.image_size[0]
    image = flops_of(lambda: model.encode_image(images(size)), model).dense_flops
    text = flops_of(lambda: model.encode_text(torch.zeros(1, 77, dtype=torch.long, device="meta")), model).dense_flops
    assert (round(image / 1e9, 2), round(text / 1e9, 2)) == OPENCLIP_GFLOPS[name]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_openclip_on_the_cpu_where_the_fast_path_hides_a_third(mode):
    model = openclip("ViT-B-32", "cpu")
    with mode():
        image = flops_of(lambda: model.encode_image(torch.zeros(1, 3, 224, 224)), model)
        text = flops_of(lambda: model.encode_text(torch.zeros(1, 77, dtype=torch.long)), model)
    # reference_numbers.json: openclip_exact_flops
    assert (image.dense_flops, text.dense_flops) == (8817623040, 5959540736)
    assert image.complete and text.complete
    assert torch.backends.mha.get_fastpath_enabled()


def test_text_tower_by_length():
    model = openclip("ViT-B-32")

    def trimmed(length: int) -> torch.Tensor:
        x = torch.empty(1, length, 512, device="meta")
        x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
        return x[:, -1] @ model.text_projection

    for length, gflops in TEXT_GFLOPS.items():
        assert flops_of(lambda n=length: trimmed(n), model).dense_flops / 1e9 == pytest.approx(gflops, abs=5.1e-4)


@pytest.mark.parametrize("case", TRAIN_COST)
def test_training_in_forwards(case):
    expected, blocks, stem = TRAIN_COST[case]
    model = on_meta("deit_small_patch16_224").requires_grad_(False)
    for part in [model.norm, model.head, *(model.blocks[i] for i in blocks), *([model.patch_embed] if stem else [])]:
        part.requires_grad_(True)
    model.cls_token.requires_grad_(stem)
    model.pos_embed.requires_grad_(stem)
    forward, step = flops(model, images(224)), flops(model, images(224), train=True)
    assert step.dense_flops / forward.dense_flops == pytest.approx(expected, abs=6e-4)


def test_backward_is_booked_on_the_layer_that_ran_forward():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    count = flops(model, torch.zeros(5, 4), train=True)
    assert count.by_layer == {"0": 2 * 2 * 5 * 4 * 8, "2": 3 * 2 * 5 * 8 * 2}
    checkpointed = flops_of(
        lambda: torch.utils.checkpoint.checkpoint(model, torch.zeros(5, 4), use_reentrant=False).sum().backward(), model
    )
    assert checkpointed.by_layer == {
        "0": 3 * 2 * 5 * 4 * 8,
        "2": 3 * 2 * 5 * 8 * 2,
    }  # the last output is not recomputed


def test_bilinear_is_its_two_products():
    count = flops(nn.Bilinear(64, 64, 1), torch.zeros(16, 64), torch.zeros(16, 64))
    assert count.dense_flops == 2 * 16 * (64 * 64 + 64)
    inputs = [torch.zeros(16, 64, requires_grad=True) for _ in range(2)]
    assert flops(nn.Bilinear(64, 64, 1), *inputs, train=True).dense_flops == 4 * 2 * 16 * (
        64 * 64 + 64
    )  # and three gradients


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layer_in_evaluation(masked, autocast):
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    padding = torch.tensor([[False] * 5 + [True] * 2] * 3) if masked else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        count = flops(layers, torch.zeros(3, 7, 64), src_key_padding_mask=padding)
    assert count.dense_flops == 2 * 2 * 3 * (7 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 7 * 7 * 64)
    assert count.complete
    with torch.no_grad():
        traced = torch.jit.trace(layers, torch.zeros(3, 7, 64))
        assert flops_of(lambda: traced(torch.zeros(3, 7, 64))).dense_flops == count.dense_flops


@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION"])
@pytest.mark.parametrize("mask", [None, torch.zeros(9, 11)])
def test_attention_forward_and_backward(backend, mask):
    query, key, value = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (9, 11, 11))

    def step() -> None:
        functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()

    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
        assert flops_of(step).dense_flops == 3 * 4 * 2 * 3 * 9 * 11 * 8


def test_grouped_convolution_with_its_gradients():
    forward = 2 * 2 * 36 * 16 * 2 * 9
    layer, x = nn.Conv2d(8, 16, 3, groups=4, padding=1), torch.randn(2, 8, 6, 6, requires_grad=True)
    assert flops(layer, x).dense_flops == forward
    assert flops(layer, x, train=True).dense_flops == 3 * forward
    assert x.grad is None


def test_compiled_model_counts_as_its_source():
    model = torch.compile(nn.Linear(4, 8), backend="eager")
    model(torch.zeros(5, 4))
    assert flops(model, torch.zeros(5, 4)).dense_flops == 2 * 5 * 4 * 8


class Scorer(nn.Module):
    is_overhead = True

    def __init__(self) -> None:
        super().__init__()
        self.rank = nn.Linear(8, 1)

    def forward(self, x):
        return (x @ x.transpose(1, 2)).sum(-1, keepdim=True) + self.rank(x)


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.scorer, self.head = nn.Linear(8, 8), Scorer(), nn.Linear(8, 2)

    def forward(self, x):
        x = self.proj(x)
        return self.head(x * self.scorer(x))


def test_scoring_is_overhead_forward_and_backward():
    x = torch.randn(2, 5, 8)
    forward, step = flops(Scored(), x), flops(Scored(), x, train=True)
    assert forward.overhead_flops == 2 * 2 * (5 * 5 * 8 + 5 * 8)
    assert forward.dense_flops == 2 * 2 * 5 * (8 * 8 + 8 * 2)
    assert step.overhead_flops == 3 * forward.overhead_flops
    assert step.dense_flops == 2 * 2 * 5 * (2 * 8 * 8 + 3 * 8 * 2)
    assert forward.by_layer["scorer"] + forward.by_layer["scorer.rank"] == forward.overhead_flops


@torch.library.custom_op("effbench_test::product", mutates_args=())
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def test_work_without_a_formula_is_named():
    custom = flops_of(lambda: product(torch.zeros(2, 2), torch.zeros(2, 2)))
    assert not custom.complete and custom.unknown_ops == ("effbench_test.product.default",)
    spectral = flops_of(lambda: torch.fft.fft(torch.zeros(8)))
    assert not spectral.complete
    ragged = torch.nested.nested_tensor([torch.zeros(3, 8), torch.zeros(5, 8)], layout=torch.jagged)
    assert not flops(nn.Linear(8, 2), ragged).complete


@pytest.mark.filterwarnings("ignore")
def test_quantised_linears_are_named():
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch quantises nothing on this processor")
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}, dtype=torch.qint8)
    count = flops(model, torch.zeros(2, 8))
    assert not count.complete and "linear_dynamic" in count.unknown_ops[0]


def test_harmless_operations_are_never_named():
    def harmless() -> None:
        x = torch.rand(2, 3, 8, 8, requires_grad=True)
        y = functional.interpolate(functional.silu(x), scale_factor=2.0, mode="bilinear")
        y = (
            functional.layer_norm(y, (16,))
            + functional.gelu(y).softmax(-1)
            + torch.linalg.vector_norm(y, dim=1, keepdim=True)
        )
        y = functional.group_norm(functional.dropout(functional.max_pool2d(y, 2)), 3)
        y = y.flatten(2).cumsum(-1).sort(-1).values.gather(1, y.flatten(2).topk(2, dim=1).indices)
        functional.normalize(functional.embedding(torch.arange(2), y[0]), dim=-1).logsumexp(-1).mean().backward()
        torch.optim.AdamW([nn.Parameter(torch.zeros(2))], foreach=True).step()

    count = flops_of(harmless)
    assert count.unknown_ops == () and count.dense_flops == 0


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 4)
    ).train()
    model[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    grads = [parameter.grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for train in (False, True):
        flops(model, x, train=train)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(p.grad is g and (g == 1).all() for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_an_error_leaves_nothing_behind():
    model = nn.Sequential(nn.Linear(4, 8)).train()
    with pytest.raises(RuntimeError):
        flops(model, torch.zeros(5, 3))
    assert model.training and torch.backends.mha.get_fastpath_enabled()
    assert flops(model, torch.zeros(5, 4)).by_layer == {"0": 2 * 5 * 4 * 8}


def test_errors_of_the_user():
    with pytest.raises(UsageError, match="torch module"):
        flops("deit_tiny", torch.zeros(1))
    with pytest.raises(UsageError, match="requires a gradient"):
        flops(nn.Linear(4, 8).requires_grad_(False), torch.zeros(5, 4), train=True)
