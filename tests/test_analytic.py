"""The layers' formulas against the dispatch count, products counted by hand and DeepSpeed's profiler."""

import pytest
import timm
import torch
from open_clip.transformer import Attention, AttentionalPooler
from tiny import IMAGES, clip, vit
from torch import nn

import effbench
from effbench.measure.analytic import AnalyticCount, analytic, analytic_of, disagreement
from effbench.measure.flops import FlopCount, flops, flops_of

TOKENS = torch.randn(3, 5, 16)


def tiny(name):
    options = dict(img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3, num_classes=5)
    return timm.create_model(name, **options)


LAYERS = {
    "convolutions": (
        nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, groups=2)),
        IMAGES,
    ),
    "unbatched": (nn.Conv1d(16, 4, 3, groups=2), torch.randn(16, 9)),
    "linear": (
        nn.Sequential(nn.LayerNorm((5, 16)), nn.Linear(16, 7, bias=False), nn.PReLU(5)),
        TOKENS,
    ),
    "encoder": (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), TOKENS),
    "first": (nn.TransformerEncoderLayer(16, 2, 32), TOKENS),
    "openclip": (nn.Sequential(nn.Linear(16, 16), Attention(16, 2)), TOKENS),
    "pooler": (AttentionalPooler(8, 16, 2, 4), TOKENS),
    "pruned": (effbench.apply(vit(), "token_prune:keep=0.5,at=1/2"), IMAGES),
    "clip": (clip().visual, IMAGES),
    "pruned clip": (effbench.apply(clip(), "token_prune:keep=0.5,at=1").visual, IMAGES),
    "siglip": (vit(class_token=False, global_pool="map"), IMAGES),
    "gated": (vit(qk_norm=True, reg_tokens=2), IMAGES),
    "eva": (tiny("eva02_tiny_patch14_224"), IMAGES),
    "beit": (tiny("beit_base_patch16_224"), IMAGES),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_same_as_dispatched_to_the_unit(name, train):
    model, x = LAYERS[name]
    count, formulas = flops(model, x, train=train), analytic(model, x, train=train)
    assert (formulas.flops, formulas.without_formula) == (count.dense_flops, ())
    assert disagreement(count, formulas) == ""
    own = {layer: n - count.overhead_by_layer.get(layer, 0) for layer, n in count.by_layer.items()}
    if name not in ("eva", "beit", "clip", "pruned clip"):  # whose weights are used outside of their own layers
        assert formulas.by_layer == {layer: n for layer, n in own.items() if n}


@pytest.mark.parametrize("frozen", ["weight", "query", "everything but out_proj"])
def test_only_gradients_that_are_needed(frozen):
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    query = torch.randn(3, 5, 16, requires_grad=frozen == "weight")
    if frozen == "weight":
        layer.requires_grad_(False)
    elif frozen != "query":
        layer.requires_grad_(False)
        layer.out_proj.requires_grad_(True)
    inputs = (query, torch.randn(3, 7, 16), torch.randn(3, 7, 16))
    count = flops(layer, *inputs, train=True, need_weights=False)  # fused: all four gradients or none
    projections, products = 2 * 16 * 16 * 3 * (5 + 7 + 7), 4 * 3 * 5 * 7 * 16
    out, own = 2 * 3 * 5 * 16 * 16, 2 * 16 * 16 * 3 * 5
    expected = {
        "weight": projections + own + 3 * products + 2 * out,
        "query": 2 * projections + 3 * products + 3 * out,
        "everything but out_proj": projections + products + 2 * out,
    }
    assert analytic(layer, *inputs, train=True, need_weights=False).flops == expected[frozen] == count.dense_flops


def test_bilinear_and_keyword_arguments():
    layer, x, y = nn.Bilinear(6, 5, 3), torch.randn(4, 6, requires_grad=True), torch.randn(4, 5)
    for train, times in ((False, 1), (True, 3)):
        found = analytic(layer, input2=y, input1=x, train=train).flops
        assert found == times * 2 * 4 * (3 * 6 * 5 + 3 * 5) == flops(layer, x, y, train=train).dense_flops


@pytest.mark.filterwarnings("ignore")
def test_recurrent_layers():
    layer = nn.LSTM(8, 6, 2, bidirectional=True, proj_size=3)
    first, second = 6 * 4 * (8 + 3) + 3 * 6, 6 * 4 * (6 + 3) + 3 * 6
    assert analytic(layer, torch.zeros(5, 2, 8)).flops == 2 * 5 * 2 * 2 * (first + second)
    assert flops(nn.GRU(8, 6), torch.zeros(5, 2, 8)).dense_flops == analytic(nn.GRU(8, 6), torch.zeros(5, 2, 8)).flops


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_count_as_their_products():
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch.ao has no int8 kernels on this processor")
    model = nn.Sequential(nn.Linear(8, 6), nn.LSTM(6, 4, batch_first=True))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.LSTM}, dtype=torch.qint8)
    count, formulas = flops(quantised, torch.zeros(2, 3, 8)), analytic(quantised, torch.zeros(2, 3, 8))
    assert formulas.flops == 2 * count.low_bit_macs == 2 * 6 * (8 * 6 + 16 * (6 + 4))
    assert disagreement(count, formulas) == ""


class Mixing(nn.Module):
    """A product that no layer owns, and a layer with a matrix that nobody knows."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16, 16))

        def forward(self, x):
            return x @ self.weight

    def __init__(self):
        super().__init__()
        self.known, self.mixer = nn.Linear(16, 16), self.Mixer()

    def forward(self, x):
        return self.mixer(self.known(x)) @ torch.zeros(16, 16)


def test_what_layers_cannot_say_is_found_by_comparing():
    model = Mixing()
    count, formulas = flops(model, TOKENS), analytic(model, TOKENS)
    assert formulas == AnalyticCount(2 * 15 * 256, {"known": 2 * 15 * 256}, ("mixer",))
    said = disagreement(count, formulas)
    assert "differ by 66.7%" in said and "mixer (+7.68e-06)" in said and "outside of layers" in said
    assert "no formula for mixer" in said


def test_one_per_cent_is_let_pass_either_way():
    formulas = AnalyticCount(1000, {"a": 1000}, ())
    for dense, differs in ((1000, False), (991, False), (1010, False), (1012, True), (989, True), (0, True)):
        count = FlopCount(dense, dense // 2, 50, {"a": dense, "scorer": 50}, True, (), overhead_by_layer={"scorer": 50})
        said = disagreement(count, formulas)
        assert bool(said) == differs and "scorer" not in said
    low = FlopCount(0, 0, 0, {"a": 1000}, True, (), low_bit_macs=500)
    assert disagreement(low, formulas) == ""
    bound = FlopCount(0, 0, 0, {}, False, ("x::product",))
    assert "no formula for the operation x::product" in disagreement(bound, formulas)


def test_a_loss_and_the_model_as_it_was():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3600, 2)
    ).train()
    model[1].eval()
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    step = analytic_of(lambda: model(IMAGES).square().mean(), model, train=True)
    assert step.flops == flops_of(lambda: model(IMAGES).square().mean().backward(), model).dense_flops
    analytic(model, IMAGES, train=True)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError):
        analytic(model, torch.zeros(1))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore")
def test_deepspeeds_profiler_agrees_on_plain_models():
    profiler = pytest.importorskip("deepspeed.profiling.flops_profiler", reason="deepspeed is not installed")
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 4)).eval()
    for model in (vit(), plain):
        _, macs, parameters = profiler.get_model_profile(
            model, args=[IMAGES], print_profile=False, as_string=False, warm_up=0
        )
        assert macs == flops(model, IMAGES).macs == analytic(model, IMAGES).flops // 2
        assert parameters == sum(p.numel() for p in model.parameters())
