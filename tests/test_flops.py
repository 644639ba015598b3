"""FLOPs against products counted by hand; masks and integers: test_flop_kinds, models: test_reference_numbers."""

import logging

import open_clip
import pytest
import timm
import torch
from tiny import IMAGES, vit
from torch import nn
from torch.nn import functional

from effbench.errors import UsageError
from effbench.measure.flops import flops, flops_of


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


def test_deit_small_exactly():
    count = flops(on_meta("deit_small_patch16_224"), images(224))
    assert count.macs == 4598882304  # reference_numbers.json: dense_exact_macs
    assert count.by_layer["blocks.3.attn.qkv"] == 2 * 197 * 384 * 3 * 384
    assert count.by_layer["blocks.3.attn"] == 4 * 197 * 197 * 384


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
    unseen = 2 * 3 * 7 * 2 * 4 * 64 if masked else 0  # two keys of seven
    assert count.dense_flops - count.useful_flops == unseen
    with torch.no_grad():
        traced = torch.jit.trace(layers, torch.zeros(3, 7, 64))
        assert flops_of(lambda: traced(torch.zeros(3, 7, 64))).dense_flops == count.dense_flops


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_multihead_attention(weights, train):
    layer, x, y = (
        nn.MultiheadAttention(16, 2, kdim=8, vdim=12, batch_first=True),
        torch.randn(3, 5, 16),
        torch.randn(3, 7, 20),
    )
    count = flops(layer, x, y[..., :8], y[..., 8:], need_weights=weights, train=train)
    inputs, products = 2 * 3 * (5 * 16 * 16 + 7 * (8 + 12) * 16), 4 * 3 * 5 * 7 * 16
    out = 2 * 3 * 5 * 16 * 16
    forward = inputs + products + out
    assert count.dense_flops == (2 * inputs + 3 * (products + out) if train else forward)
    assert count.complete and count.useful_flops == count.dense_flops


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_timm_fused_or_not(fused, train):
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    n, c = 17, 24
    patches, head, block = 16 * c * 3 * 8 * 8, c * 5, n * 12 * c * c + 2 * n * n * c
    count = flops(model, IMAGES, train=train)
    # the images take no gradient
    assert count.macs == 2 * ((2 * patches + 3 * (4 * block + head)) if train else patches + 4 * block + head)
    assert count.complete and count.useful_flops == count.dense_flops


def test_embeddings_and_transposed_convolutions():
    assert flops(nn.EmbeddingBag(10, 4), torch.zeros(2, 3, dtype=torch.long)).by_layer == {}
    embedded = flops(nn.Embedding(10, 4), torch.zeros(2, 3, dtype=torch.long), train=True)
    assert embedded.dense_flops == 0 and embedded.complete
    layer, x = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), torch.randn(2, 4, 5, 5, requires_grad=True)
    assert flops(layer, x).macs == 2 * 25 * 4 * 3 * 9
    assert flops(layer, x, train=True).macs == 3 * 2 * 25 * 4 * 3 * 9


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


def test_a_complex_product_is_four_real_ones():
    x = torch.zeros(4, 4, dtype=torch.complex64)
    assert flops_of(lambda: x @ x).dense_flops == 4 * 128


def test_an_exported_program_counts_in_the_mode_that_it_has():
    layer = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)).eval()
    exported = torch.export.export(layer, (torch.zeros(3, 4),)).module()
    assert flops(exported, torch.zeros(3, 4)).dense_flops == 2 * 2 * 3 * 32
    assert flops(exported, torch.zeros(3, 4), train=True).dense_flops == 2 * 3 * 32 * (2 + 2 + 1)
