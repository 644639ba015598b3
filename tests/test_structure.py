import pytest
import tiny
import torch
from torch import nn

import effbench
from effbench.examine import tokens_per_layer
from effbench.measure.memory import weight_bytes
from effbench.measure.structure import masked_tokens, parameters, structure, trained_layers
from effbench.models.token_state import TokenEdit
from effbench.models.tower import view
from effbench.records import Flops

DENSE = Flops(dense=1_000_000, useful=1_000_000)


@pytest.mark.parametrize(
    "model",
    [tiny.vit, tiny.clip, lambda: tiny.vit().bfloat16(), lambda: effbench.apply(tiny.clip(), "token_prune:at=1")],
)
def test_bytes_by_dtype_add_up_to_the_weights(model):
    model = model()
    found = structure(model)
    assert sum(found.dtypes.values()) == weight_bytes(model)
    assert found.quantised_share == 0 and found.trained_layers == () and not found.masked_tokens


def test_dtypes_of_a_mixed_model_with_shared_weights():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4).bfloat16())
    model[1].weight = model[0].weight
    model.register_buffer("steps", torch.zeros(3, dtype=torch.long))
    assert structure(model).dtypes == {"bf16": 40, "fp32": 64, "int64": 24}


def test_share_that_torch_ao_quantised():
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch quantises nothing on this processor")
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.LayerNorm(8), nn.Linear(8, 9))  # 24 of 96 weights stay
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    found = structure(model)
    assert found.quantised_share == 0.75
    assert found.dtypes["int8"] == 72
    assert sum(found.dtypes.values()) == weight_bytes(model)


def test_share_that_torchao_quantised():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Embedding(50, 32)).eval()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda module, name: name == "0")
    found = structure(model)
    assert found.quantised_share == 0.5
    assert found.dtypes["int8"] in (32 * 32, 32 * 32 + 32)  # with or without zero points
    assert sum(found.dtypes.values()) == weight_bytes(model)


def test_attention_projections_count_as_linear():
    attention = nn.MultiheadAttention(8, 2)  # in_proj 3 x 64, out_proj 64
    attention.out_proj.weight = nn.Parameter(attention.out_proj.weight.to(torch.int8), requires_grad=False)
    assert structure(attention).quantised_share == 0.25


def test_trained_layers_by_block():
    model = tiny.vit()
    assert trained_layers(model.requires_grad_(False)) == ()
    model.blocks[1].requires_grad_(True)
    model.blocks[2].requires_grad_(True)
    model.norm.requires_grad_(True)
    model.cls_token.requires_grad_(True)
    assert trained_layers(model) == ("cls_token", "blocks.1-2", "norm")
    model.blocks.requires_grad_(False)
    for block in (0, 1, 3):
        model.blocks[block].norm1.requires_grad_(True)
    assert trained_layers(model) == ("cls_token", "blocks.0-1,3.norm1", "norm")
    assert structure(model, model).trained_layers == trained_layers(model)
    model.blocks.requires_grad_(True)
    assert trained_layers(model) == ("cls_token", "blocks", "norm")
    biases = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    biases[0].weight.requires_grad_(False)
    assert trained_layers(biases) == ("0.bias", "1")


class Blind(TokenEdit):
    """Every second token is multiplied with zero; its keys are masked as well if asked for."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, state, projections):
        tokens = state.tokens.shape[1]
        kept = torch.arange(tokens) % 2 == 0
        if self.mask:
            state.mask = kept.expand(tokens, tokens)
        return lambda field, kind: field * kept[:, None] if kind == "tokens" else field


def tokens_of(edit):
    model = tiny.vit()
    if edit is not None:
        view(model).image.after_attention(0, edit)
    return tokens_per_layer(model, lambda: model(tiny.IMAGES))


def test_tokens_that_are_only_zeroed_or_masked():
    baseline = tokens_of(None)
    zeroed, hidden = tokens_of(Blind(False)), tokens_of(Blind(True))
    assert baseline == zeroed == hidden == (17,) * 4
    note = "masked, not removed: fewer tokens are claimed, but every block still takes 17 tokens"
    assert masked_tokens(zeroed, baseline, ("tokens",), DENSE, DENSE) == note
    half = Flops(dense=1_000_000, useful=980_000)
    assert masked_tokens(hidden, baseline, (), half, DENSE).startswith(
        "masked, not removed: its masks hide 2.0% of the FLOPs"
    )


def test_what_is_not_masking():
    causal = Flops(dense=1_000_000, useful=900_000)
    shallow = Flops(dense=500_000, useful=400_000)  # fewer layers beside the same causal text tower
    pruned = effbench.apply(tiny.vit(), "token_prune:keep=0.5,at=1")
    removed = tokens_per_layer(pruned, lambda: pruned(tiny.IMAGES))
    assert removed == (17, 9, 9, 9)
    assert masked_tokens(removed, (17,) * 4, ("tokens",), DENSE, DENSE) == ""
    assert masked_tokens((17,) * 4, (17,) * 4, (), causal, causal) == ""
    assert masked_tokens((17,) * 2, (17,) * 4, (), shallow, causal) == ""
    assert masked_tokens((9,) * 2, (17,) * 4, ("tokens",), DENSE, DENSE) == ""
    assert masked_tokens((17,), (17,), (), Flops(dense=10, useful=None), DENSE) == ""
    assert masked_tokens((), (), ("tokens",), None, None) == ""


def test_parameters_count_what_packed_weights_stand_for():
    vit = tiny.vit
    plain = parameters(vit())
    assert plain == sum(p.numel() for p in vit().parameters())
    for spec in ("quantize", "quantize:weight_only", "precision:bf16"):
        assert parameters(effbench.apply(vit(), spec)) == plain
    assert parameters(effbench.apply(vit(embed_dim=96), "quantize:int4")) == parameters(vit(embed_dim=96))
