import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import nn

import effbench
from effbench import arms, records
from effbench.arms import ArmPlan, trained_state, training_model
from effbench.calibration_set import of_inputs
from effbench.errors import UsageError
from effbench.models import language
from effbench.models.captioner import IGNORE, Captioner, Language
from effbench.models.connectors import PooledLinear
from effbench.models.sequences import logits_in_rows
from effbench.spec import parse
from effbench_methods.algorithms.packing import pack, tightest
from effbench_methods.sample_pack import SamplePack

SPECS = (
    "sample_pack",
    "sample_pack:width=1",
    "sample_pack:width=40",
    "sample_pack:bucket",
    "sample_pack:bucket,buckets=1",
)
TEXTS = (9, 3, 1, 6, 4, 2, 7, 5)  # tokens of each, its end included
ASKED = (0, 1, 0, 4, 0, 0, 3, 1)  # of them a question, which nothing predicts
IMAGE = 4
LENGTHS = np.array(TEXTS) + IMAGE  # a start token more, and nothing is predicted from the last


def llama():
    return language.tiny(words=50, layers=3, width=32)


def gpt2():
    """Learned positions, and dropout."""
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=20, use_cache=False)
    return of(transformers.GPT2LMHeadModel(config))


def mistral():
    """A window that is shorter than the samples."""
    config = transformers.MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=3,
        use_cache=False,
    )
    return of(transformers.MistralForCausalLM(config))


def bloom():
    """Positions that count from the beginning of the row."""
    return of(
        transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4))
    )


def of(model):
    return Language(model.get_decoder(), model.get_output_embeddings())


def captioner(make=llama, spec=None):
    """In training mode, but for its dropout."""
    torch.manual_seed(0)
    model = Captioner(nn.Identity(), PooledLinear(24, 32, None), make(), (), (49,), 49, records.Captioning())
    with torch.no_grad():
        for p in model.parameters():  # attention that matters
            p.mul_(1 if p.ndim == 1 else 4)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    if spec:
        return training_model(ArmPlan(spec, parse(spec)), task(model), None, None, records.Protocol(train="full"))[0]
    return model.train()


def task(model):
    return SimpleNamespace(build=lambda *_: model, locked=lambda _: [])


def batch(texts=TEXTS, image=IMAGE, asked=ASKED):
    draw = torch.Generator().manual_seed(1)
    place, lengths = torch.arange(max(texts)), torch.tensor(texts)[:, None]
    tokens = torch.randint(0, 49, (len(texts), max(texts)), generator=draw)
    target = tokens.where((place < lengths) & (place >= torch.tensor(asked)[:, None]), IGNORE)
    return torch.randn(len(texts), image, 24, generator=draw), tokens.where(place < lengths, 0), target


def loss(model, features, tokens, target):
    return model.loss(model.prefix(features), tokens, target)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make, spec", [(llama, spec) for spec in SPECS] + [(gpt2, SPECS[0]), (mistral, SPECS[0])])
def test_loss_and_gradients_are_those_of_padding(make, spec):
    native, model = captioner(make), captioner(make, spec)
    ours, theirs = loss(model, *batch()), loss(native, *batch())
    assert abs(ours.item() - theirs.item()) < 2e-6
    ours.backward()
    theirs.backward()
    expected, found = gradients(native), gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-7), name


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("asked", [(0,) * 8, (0, 3, 0, 0, 4, 0, 0, 0)])  # of two texts nothing is to be predicted
def test_texts_alone_and_samples_without_a_target(spec, asked):
    native, model = captioner(), captioner(spec=spec)
    _, tokens, target = batch(asked=asked)
    found, expected = (m.loss(m.starts(8), tokens, target) for m in (model, native))
    assert abs(found.item() - expected.item()) < 2e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_sample_sees_another(attention):
    model = captioner(spec="sample_pack:width=40")
    model.language.body.set_attn_implementation(attention)
    features, tokens, target = batch()
    (rows,) = model.layout(LENGTHS)
    assert len(rows.sample) < 4  # several samples in each row
    owner = (target != IGNORE).nonzero()[:, 0]

    def logits(features, tokens):
        return logits_in_rows(model, model.layout, model.prefix(features), tokens, target)[0]

    with torch.no_grad():
        alone = captioner().logits(model.prefix(features), tokens)[target != IGNORE]
        whole = logits(features, tokens)
        assert (whole - alone).abs().max() < 1e-4 * alone.abs().max()
        for sample in range(8):
            others, another = features.clone(), tokens.clone()
            others[sample], another[sample] = others[sample] * -3, (another[sample] + 7) % 50
            changed = logits(others, another)
            assert torch.equal(changed[owner != sample], whole[owner != sample])
            assert not torch.equal(changed[owner == sample], whole[owner == sample])
    features.requires_grad_()
    whole = logits(features, tokens)
    for sample in range(8):
        (gradient,) = torch.autograd.grad(whole[owner == sample].sum(), features, retain_graph=True)
        reached = gradient.abs().amax(dim=(1, 2)) > 0
        assert reached.tolist() == [other == sample for other in range(8)]


@pytest.mark.parametrize(
    "spec, shapes",
    [
        ("sample_pack", [(4, 18)]),  # 72 places for 69 tokens
        ("sample_pack:width=1", [(6, 13)]),
        ("sample_pack:width=26", [(3, 24)]),
        ("sample_pack:bucket,buckets=2", [(4, 8), (4, 13)]),
    ],
)
def test_padding_enters_neither_the_layers_nor_the_head(spec, shapes):
    model = captioner(spec=spec)
    tokens, predicted = [], []
    model.language.body.layers[0].register_forward_pre_hook(lambda _, inputs: tokens.append(tuple(inputs[0].shape[:2])))
    model.language.head.register_forward_pre_hook(lambda _, inputs: predicted.append(inputs[0].shape[0]))
    loss(model, *batch())
    assert tokens == shapes
    assert sum(predicted) == sum(TEXTS) - sum(ASKED)


@pytest.mark.parametrize("spec", ["sample_pack", "sample_pack:bucket"])
def test_training_goes_the_same_way(spec):
    curves = []
    for model in (captioner(), captioner(spec=spec), captioner(spec=spec)):
        optimiser, curve = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for _ in range(8):
            optimiser.zero_grad()
            found = loss(model, *batch())
            found.backward()
            optimiser.step()
            curve.append(found.item())
        curves.append(curve)
    assert curves[1] == curves[2]
    assert curves[0][-1] < curves[0][0] - 0.1
    assert np.allclose(curves[0], curves[1], atol=1e-3)


@pytest.mark.parametrize("spec", SPECS[::3])
def test_it_autocasts_copies_and_pickles(spec):
    model = captioner(spec=spec)
    expected = loss(model, *batch())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loss(other, *batch()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        found, padded = loss(model, *batch()), loss(captioner(), *batch())
    found.backward()
    assert abs(found.item() - padded.item()) < 0.02 * expected.item()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_notes_tell_the_efficiency_of_the_training_steps():
    arm = ArmPlan("sample_pack", parse("sample_pack:width=26"))
    model, _ = training_model(arm, task(captioner()), None, None, records.Protocol(train="full"))
    model.train()
    for texts in (TEXTS, (1, 9)):  # 3 rows of 24, one of 18
        loss(model, *batch(texts, asked=(0,) * len(texts)))
    model.eval()
    loss(model, *batch())  # no training step
    state = trained_state(model)
    tested = captioner()
    arms.testing_model(arm, task(tested), None, None, records.Protocol(train="full"), state, of_inputs(None))
    assert tested.layout is None
    (note,) = arm.methods[0].notes(SimpleNamespace(model=tested))
    tokens, padded, packed = 69 + 18, 8 * 13 + 2 * 13, 3 * 24 + 18
    assert "in the 2 training steps" in note
    assert f"{100 * tokens / padded:.1f} % padded" in note and f"{100 * tokens / packed:.1f} % in rows" in note
    untrained = captioner()
    arms.testing_model(arm, task(untrained), None, None, records.Protocol(train="full"), {}, of_inputs(None))
    assert arm.methods[0].notes(SimpleNamespace(model=untrained)) == []


@pytest.mark.parametrize("seed", range(3))
def test_the_tightest_rows(seed):
    lengths = np.random.default_rng(seed).integers(15, 40, 64)
    found = tightest(lengths, 120)
    assert lengths.max() <= found.width <= 120
    assert (np.bincount(found.row, lengths) <= found.width).all() and np.bincount(found.row).min() > 0
    assert lengths.sum() > 0.93 * found.rows * found.width
    assert found.rows * found.width <= min(p.rows * p.width for p in (pack(lengths, 40), pack(lengths, 120)))
    assert tightest(np.array([7]), 3).width == 7  # never cut
    assert len(tightest(np.array([7, 7]), 21).row) == 2


def test_positions_of_another_kind_are_refused_for_rows_alone():
    with pytest.raises(UsageError, match="BloomModel cannot keep samples in one row apart"):
        captioner(bloom, "sample_pack")
    native, model = captioner(bloom), captioner(bloom, "sample_pack:bucket")
    assert abs(loss(model, *batch()).item() - loss(native, *batch()).item()) < 1e-5


@pytest.mark.parametrize(
    "spec, message",
    [
        ("sample_pack:sort", "layout=sort is not valid"),
        ("sample_pack:width=0", "width=0 is not valid"),
        ("sample_pack:bucket,buckets=0", "buckets=0 is not valid"),
        ("sample_pack:bucket,width=8", "width says nothing with layout=bucket"),
        ("sample_pack:buckets=2", "buckets says nothing with layout=pack"),
        ("sample_pack:phase=test", "phase"),
        ("sample_pack+sample_pack:bucket", "sample_pack"),
    ],
)
def test_bad_input_is_refused(spec, message):
    with pytest.raises(UsageError, match=message) as refused:
        captioner(spec=spec)
    assert refused.value.hint


def test_a_model_that_writes_no_text_is_refused():
    with pytest.raises(
        UsageError, match="sample_pack packs the samples of a captioner, and .*CLIP writes no text"
    ) as error:
        SamplePack().edit_model(effbench.models.tower.view(tiny.clip()))
    assert "text_pack" in error.value.hint
