"""precision, quantize and compile on captioners: connector, decoder and head beside the image tower."""

import copy
import pickle

import pytest
import tiny
import tiny_hf
import torch
import transformers
from torch import nn

import effbench
from effbench import records
from effbench.calibration_set import CalibrationSet
from effbench.errors import UsageError
from effbench.measure.analytic import analytic_of, disagreement
from effbench.measure.clock import Clock
from effbench.measure.flops import flops_of
from effbench.measure.memory import weight_bytes
from effbench.measure.split import Split
from effbench.measure.structure import structure
from effbench.models import language
from effbench.models.captioner import Captioner, Language
from effbench.models.connectors import PooledLinear
from effbench.models.decoding import generate
from effbench.models.patch_tokens import TimmTokens
from effbench.models.tower import view
from effbench.models.whole_model import HuggingFace
from effbench.spec import parse
from effbench_methods.algorithms.bf16_linear import PackedLinear
from effbench_methods.algorithms.int8_linear import Int8Linear

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH, WORDS, LAYERS = 64, 50, 3
BF16 = torch.bfloat16
TOKENS = torch.randint(11, 30, (2, 6), generator=torch.Generator().manual_seed(1))
int8 = pytest.mark.skipif(
    "onednn" not in torch.backends.quantized.supported_engines, reason="torch has no int8 kernels on this processor"
)


def captioner(layers=LAYERS, words=None):
    torch.manual_seed(0)
    words = words or language.tiny(words=WORDS, layers=layers, width=WIDTH)
    tower = TimmTokens(tiny.vit(num_classes=0))
    model = Captioner(tower, PooledLinear(24, WIDTH, 2), words, (), (49,), 49, records.Captioning())
    for p in model.language.parameters():
        if p.ndim > 1:
            p.data.mul_(4)
    return model.eval()


def images(model):
    side = 32 if isinstance(model.connector, PooledLinear) else model.side
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def loss(model):
    return model.loss(model.prefix(model.features(images(model))), TOKENS, TOKENS)


def write(model, tokens=4, beams=1):
    prefix = model.prefix(model.features(images(model)))
    return generate(model.language, prefix, tokens, 49, beams=beams, exactly=True)


def applied(spec, model=None):
    model = model or captioner()
    seen, data = view(model), CalibrationSet(lambda: iter([0]), 500, lambda each, _: loss(each))
    for method in parse(spec):
        method.edit_model(seen)
    for method in parse(spec):
        method.finish(seen, data)
    return model.eval().requires_grad_(False)


def notes(spec, model):
    return " ".join(note for method in parse(spec) for note in method.notes(view(model)))


def both_counts(model):
    with torch.no_grad():
        count, formulas = flops_of(lambda: write(model), model), analytic_of(lambda: write(model), model)
    assert count.complete and disagreement(count, formulas) == ""
    return count


PARTS = dict(tower="image_encoder", connector="connector", decoder="language")


@pytest.mark.parametrize("target", ["", "tower", "connector", "decoder", "tower/decoder", "connector/decoder"])
@pytest.mark.parametrize("pack", ["", "pack=false"])
def test_bf16_parts_of_a_captioner(target, pack):
    plain = captioner()
    options = ",".join(part for part in (f"target={target}" if target else "", pack) if part)
    model = applied(f"precision:{options}" if options else "precision")
    cast = PARTS.keys() if not target else target.split("/")
    for name, path in PARTS.items():
        held = {t.dtype for key, t in model.state_dict().items() if key.startswith(path) and t.is_floating_point()}
        assert held == {BF16 if name in cast else torch.float32}
    assert any(isinstance(layer, PackedLinear) for layer in model.modules()) <= (pack == "")
    with torch.inference_mode():
        found, expected = loss(model), loss(plain)
        assert found.dtype == torch.float32 and abs(found - expected) < 0.02 and found != expected
        ids, size = write(model)
        assert ids.shape == (2, 4) and size == write(plain)[1] // (2 if "decoder" in cast else 1)
        assert write(model, beams=3)[0].shape == (2, 4)
    assert both_counts(model).macs == both_counts(plain).macs
    if not target:
        assert abs(weight_bytes(model) / weight_bytes(plain) - 0.5) < 0.01


def test_positions_stay_in_float32_and_logits_are_widened():
    model = applied("precision")
    rotary = model.language.body.rotary_emb
    assert torch.equal(rotary.inv_freq, captioner().language.body.rotary_emb.inv_freq)
    with torch.inference_mode():
        logits = model.logits(model.prefix(model.features(images(model))), TOKENS)
        assert logits.dtype == torch.float32
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(loss(other), loss(model))


@int8
@pytest.mark.parametrize("kind", ["dynamic", "static", "weight_only", "library=torchao"])
@pytest.mark.parametrize("head", [False, True])
def test_low_bit_captioners(kind, head):
    if "torchao" in kind:
        pytest.importorskip("torchao")
    target = ",target=tower/connector/decoder/head" if head else ""
    plain, model = captioner(), applied(f"quantize:{kind}{target}")
    with torch.inference_mode():
        assert 0 < abs(loss(model) - loss(plain)) < 0.05
        assert write(model)[1] == write(plain)[1]
    linears = [(name, m) for name, m in plain.named_modules() if isinstance(m, nn.Linear)]
    chosen = [m for name, m in linears if head or name != "language.head"]
    count, dense = both_counts(model), both_counts(plain).macs
    assert count.macs + count.low_bit_macs == dense
    integers = kind != "weight_only"
    assert (count.low_bit_macs > dense / 2 and count.low_bit_ops == 64 * count.low_bit_macs) == integers
    share = sum(m.weight.numel() for m in chosen) / (sum(m.weight.numel() for _, m in linears) + 24 * 192)
    assert structure(model).quantised_share == pytest.approx(share)
    saved = weight_bytes(plain) - weight_bytes(model)
    assert saved == pytest.approx(3 * sum(m.weight.numel() for m in chosen), rel=0.06)  # scales stay
    said = notes(f"quantize:{kind}{target}", model)
    assert f"{len(chosen)} linear layers" in said and ("head that gives logits stays" in said) != head
    assert "language.body.embed_tokens.weight" in said


@int8
def test_one_part_alone_is_quantised():
    for target, path in PARTS.items():
        model = applied(f"quantize:target={target}")
        names = [name for name, m in model.named_modules() if isinstance(m, Int8Linear)]
        assert names and all(name.startswith(path) for name in names)


@int8
def test_a_head_that_is_the_embedding_stays():
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    for spec in ("quantize", "precision"):
        whole = transformers.LlamaForCausalLM(config)
        model = applied(spec, captioner(words=Language(whole.get_decoder(), whole.get_output_embeddings())))
        assert model.language.head.weight is model.language.body.embed_tokens.weight
        with torch.inference_mode():
            write(model)


@int8
@pytest.mark.parametrize("stack", ["token_merge:r=2+", "token_prune:keep=0.7,at=1+", "layer_prune:at=1+"])
@pytest.mark.parametrize("spec", ["quantize", "precision"])
def test_stacks_across_the_seam(stack, spec):
    model = applied(stack + spec, captioner())
    with torch.inference_mode():
        assert loss(model).isfinite() and write(model)[0].shape == (2, 4)
    count = both_counts(model)
    assert count.macs + count.low_bit_macs < both_counts(captioner()).macs


@pytest.fixture
def traced(monkeypatch):
    """Dynamo traces and guards as ever, but nothing is handed to a C++ compiler."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, mode=None, **options: real(*args, backend="eager", **options))


def graphs(part):
    return part._compiled_call_impl.graphs


def test_a_compiled_decoder_has_two_graphs_whatever_the_lengths(traced):
    plain, model = captioner(1), applied("compile", captioner(1))
    with torch.inference_mode():
        for most in (3, 7):
            assert torch.equal(write(model, most)[0], write(plain, most)[0])
        longer = torch.randn(3, 9, WIDTH)
        found, expected = (generate(each.language, longer, 6, 49, exactly=True)[0] for each in (model, plain))
    assert torch.equal(found, expected)
    assert graphs(model.language.body) == 2 and graphs(model.connector) == 1
    assert "LlamaModel: 2 graphs" in notes("compile", model)
    parts = {"image": model.image_encoder, "connector": model.connector, "decoder": model.language}
    split, call = Split(parts, model, Clock("cpu")), model.connector._compiled_call_impl
    with torch.inference_mode(), split:
        _, seconds = split.clock.timed(lambda: write(model))
    assert {"image", "connector", "prefill", "decode"} <= split.seconds(seconds).keys()
    assert graphs(model.language.body) == 2 and model.connector._compiled_call_impl is call and call.graphs == 1
    assert flops_of(lambda: write(model), model).macs == flops_of(lambda: write(plain), plain).macs


def test_alignment_models_have_the_parts_that_they_had():
    for spec in ("quantize", "precision", "compile"):
        with pytest.raises(UsageError, match="target=decoder"):
            effbench.apply(tiny.clip(), f"{spec}:target=decoder")


@int8
@pytest.mark.parametrize("name", ["llava", "qwen_vl"])
def test_whole_models_of_transformers(name, tmp_path):
    getattr(tiny_hf, name)(tmp_path)
    made = HuggingFace(str(tmp_path), image_size=32 if name == "qwen_vl" else None)

    def fresh():
        model = made.captioner(records.Captioning(decoder="own", image_tokens=0, stages=(), max_tokens=4)).eval()
        model.side = made.image_size
        return model

    with torch.inference_mode():
        expected, (_, size) = loss(fresh()), write(fresh())
        for spec in ("precision", "precision:target=tower", "precision:target=decoder", "quantize", "quantize:static"):
            model = applied(spec, fresh())
            assert 0 < abs(loss(model) - expected) < 0.2, spec
            assert write(model)[1] == (size // 2 if spec in ("precision", "precision:target=decoder") else size)
            both_counts(model)
    with pytest.raises(UsageError, match="target=tower names no part of this model whose loop effbench runs"):
        applied("compile:target=tower", fresh())
