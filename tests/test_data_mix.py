"""Mixtures of training samples: exact shares, few-shot's own format, texts that see no image, and every bad input."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

import effbench
from effbench import arms, records
from effbench.arms import ArmPlan, trained_state, training_model
from effbench.calibration_set import of_inputs
from effbench.errors import UsageError
from effbench.measure.flops import flops_of
from effbench.models import language
from effbench.models.captioner import IGNORE, Captioner
from effbench.models.connectors import PooledLinear
from effbench.spec import parse
from effbench_methods.data_mix import DataMix, behind, numbers
from effbench_tasks.drawing.captions import dense
from effbench_tasks.scenes import examples, fingerprint

TEXTS = (9, 3, 1, 6, 4, 2, 7, 5)  # tokens of each, its end included
IMAGE, END = 4, 49
ALL = "data_mix:captions=0,interleaved=0,text=0"
INTERLEAVED, TEXT = ALL.replace("interleaved=0", "interleaved=1"), ALL.replace("text=0", "text=1")


def captioner(spec=None, before=(), after=(END,), start=None, second=False, longest=0):
    torch.manual_seed(0)
    body = language.tiny(words=50, layers=3, width=32)
    model = Captioner(nn.Identity(), PooledLinear(24, 32, None), body, before, after, END, records.Captioning(), start)
    model.second, model.longest = second, longest
    with torch.no_grad():
        for p in model.parameters():  # attention that matters
            p.mul_(1 if p.ndim == 1 else 4)
    return training_model(*plan(spec, model))[0] if spec else model.train()


def plan(spec, model):
    return ArmPlan(spec, parse(spec)), task(model), None, None, records.Protocol(train="full")


def task(model):
    return SimpleNamespace(build=lambda *_: model, locked=lambda _: [])


def batch(texts=TEXTS, seed=1):
    draw = torch.Generator().manual_seed(seed)
    place, lengths = torch.arange(max(texts)), torch.tensor(texts)[:, None]
    tokens = torch.randint(0, END, (len(texts), max(texts)), generator=draw)
    tokens[range(len(texts)), lengths[:, 0] - 1] = END
    return (
        torch.randn(len(texts), IMAGE, 24, generator=draw),
        tokens.where(place < lengths, 0),
        tokens.where(place < lengths, IGNORE),
    )


def loss(model, features, tokens, target):
    return model.loss(model.prefix(features), tokens, target)


@pytest.mark.parametrize("chat", [False, True])
def test_an_interleaved_loss_is_that_of_one_sequence_made_by_hand(chat):
    around = dict(before=(1, 7), after=(8, 9), start=1) if chat else {}
    model = captioner(INTERLEAVED + ",images=8", **around)
    model.layout.forward = lambda lengths, _: [behind([[4, 0, 2], [5, 1]], lengths, 0, model.opening)]
    features, tokens, target = batch()
    found = loss(model, features, tokens, target)
    total, count = 0.0, 0
    for row in ([4, 0, 2], [5, 1]):
        parts, wanted = [], []
        for place, each in enumerate(row):
            prefix = model.prefix(features[each : each + 1])[0, 1 if chat and place else 0 :]
            text = tokens[each, : TEXTS[each]]
            parts += [prefix, model.language.embed(text)]
            wanted += [torch.full((len(prefix) - 1,), IGNORE), text, torch.tensor([IGNORE])]
        logits = model.language(torch.cat(parts)[None])[0]
        total += F.cross_entropy(logits, torch.cat(wanted), reduction="sum", ignore_index=IGNORE)
        count += sum(TEXTS[each] for each in row)
    assert abs(found.item() - (total / count).item()) < 2e-6
    apart = captioner(**around)
    assert abs(found.item() - loss(apart, *(x[[4, 0, 2, 5, 1]] for x in (features, tokens, target))).item()) > 1e-3


def test_later_samples_see_earlier_ones_and_never_the_reverse():
    model = captioner(INTERLEAVED)
    model.layout.forward = lambda lengths, _: [behind([[0, 1, 2], [3, 4, 5, 6, 7]], lengths, 0, 0)]
    features, tokens, target = batch()
    for sample, after in ((1, [1, 2]), (3, [3, 4, 5, 6, 7]), (7, [7])):
        features.requires_grad_(True)
        only = torch.where(torch.arange(8)[:, None] == sample, target, IGNORE)
        (gradient,) = torch.autograd.grad(loss(model, features, tokens, only), features)
        reached = (gradient.abs().amax(dim=(1, 2)) > 0).nonzero()[:, 0].tolist()
        row = [0, 1, 2] if sample < 3 else [3, 4, 5, 6, 7]
        assert reached == [each for each in row if each <= sample]
        assert sample in after


@pytest.mark.parametrize("chat", [False, True])
def test_text_alone_never_sees_an_image(chat):
    model = captioner(TEXT, **(dict(before=(1, 7), after=(8, 9), start=1) if chat else {}))
    features, tokens, target = batch()
    found = loss(model, features, tokens, target)
    assert torch.equal(found, loss(model, features * -3 + 1, tokens, target))
    native = copy.deepcopy(model)
    native.layout = None
    assert abs(found.item() - native.loss(native.starts(8), tokens, target).item()) < 2e-6
    found.backward()
    assert model.connector.proj.weight.grad is None or not model.connector.proj.weight.grad.any()


def test_pixels_of_the_texts_alone_change_nothing_in_a_mixture():
    model = captioner("data_mix:captions=0.25,interleaved=0.5,text=0.25,images=2")
    features, tokens, target = batch()
    features.requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(model, features, tokens, target), features)
    assert int((gradient.abs().amax(dim=(1, 2)) == 0).sum()) == 2


def test_captions_alone_are_the_baseline_bit_for_bit():
    native, model = captioner(), captioner("data_mix:captions=1,interleaved=0,text=0")
    before = torch.get_rng_state()
    assert torch.equal(loss(model, *batch()), loss(native, *batch()))
    assert torch.equal(before, torch.get_rng_state())
    laid_out = captioner(INTERLEAVED)  # and in the layout, each in a row of its own, they are it to 1e-6
    laid_out.layout.forward = lambda lengths, _: [behind([[each] for each in range(8)], lengths, 0, 0)]
    assert abs(loss(laid_out, *batch()).item() - loss(native, *batch()).item()) < 2e-6


def test_shares_are_exact_and_every_sample_is_there_once():
    model = captioner("data_mix")
    lengths = np.arange(64) % 7 + 6
    groups = model.layout(lengths, 5)
    assert sorted(np.concatenate([rows.held for rows in groups])) == list(range(64))
    single, mixed, alone = groups
    assert [len(rows.held) for rows in groups] == [29, 29, 6]
    assert len(mixed.sample) == 8 and (mixed.begin == 0).all() and (alone.begin == 4).all()
    assert alone.sample.shape[1] == lengths[alone.held].max() - 4
    for samples in (1, 2, 5, 32):
        for text, interleaved in ((0.1, 0.45), (0, 1), (1, 0), (0.5, 0.5)):
            found = numbers(samples, text, interleaved)
            assert sum(found) <= samples and (sum(found) == samples or text + interleaved < 1)
            assert all(abs(n - share * samples) <= 1 for n, share in zip(found, (text, interleaved), strict=True))


def test_all_tokens_are_predicted_and_what_is_not_there_costs_nothing():
    predicted = []
    model = captioner("data_mix:captions=0.5,interleaved=0.25,text=0.25,images=2")
    model.language.head.register_forward_pre_hook(lambda _, inputs: predicted.append(inputs[0].shape[0]))
    loss(model, *batch())
    assert sum(predicted) == sum(TEXTS)
    equal = batch((6,) * 8)
    costs = []
    for spec in (None, TEXT):
        model = captioner(spec)
        costs.append(flops_of(lambda model=model: loss(model, *equal), model.language).dense_flops)
    queries, hidden = (8 * (IMAGE + 6), 8 * 6), 128

    def decoder(tokens, length):  # of 3 layers, and the logits of 48 tokens
        return 2 * (3 * (tokens * (4 * 32**2 + 3 * 32 * hidden) + 2 * tokens * length * 32) + 48 * 32 * 50)

    connector = 2 * 8 * IMAGE * 24 * 32
    assert costs == [connector + decoder(queries[0], IMAGE + 6), connector + decoder(queries[1], 6)]


def test_draws_come_from_the_random_state_and_resume():
    def curve(model, state, steps):
        torch.set_rng_state(state)
        updates, found = torch.optim.SGD(model.parameters(), lr=1e-2), []
        for _ in range(steps):
            updates.zero_grad()
            value = loss(model, *batch())
            value.backward()
            updates.step()
            found.append(value.item())
        return found, torch.get_rng_state()

    torch.manual_seed(3)
    start = torch.get_rng_state()
    whole, _ = curve(captioner("data_mix"), start, 6)
    model = captioner("data_mix")
    first, state = curve(model, start, 3)
    held = trained_state(model)
    again = captioner("data_mix")
    again.load_state_dict(held, strict=False)
    torch.manual_seed(99)
    second, _ = curve(again, state, 3)
    assert first + second == whole and again.layout.counts.tolist()[0] == 6
    other, _ = curve(captioner("data_mix"), torch.Generator().manual_seed(8).get_state(), 6)
    assert other != whole


def test_a_second_source_replaces_its_share_of_the_texts():
    model = captioner("data_mix:captions=1,interleaved=0,text=0,synthetic=0.5", second=True)
    _, tokens, target = batch()
    _, other, goal = batch((11,) * 8, seed=2)
    given = dict(tokens=tokens, target=target, synthetic_tokens=other, synthetic_target=goal)
    untouched = {key: value.clone() for key, value in given.items()}
    found = model.source(given)
    replaced = [row for row in range(8) if torch.equal(found["tokens"][row], other[row])]
    assert len(replaced) == 4 and found["tokens"].shape == (8, 11)
    for row in set(range(8)) - set(replaced):
        assert torch.equal(found["target"][row], F.pad(target[row], (0, 2), value=IGNORE))
    assert all(torch.equal(given[key], untouched[key]) for key in given)


def test_synthetic_captions_name_all_things_in_the_words_of_the_others():
    plain, rich = examples("train", 300), examples("train", 300, synthetic=True)
    known = {word for e in plain for caption in e.captions for word in caption.split()}
    for one, other in zip(plain, rich, strict=True):
        assert one.captions == other.captions and not one.synthetic
        (text,) = other.synthetic
        scene = other.image.args[0]
        assert text == dense(scene) and set(text.split()) <= known
        assert all(f"{t.size} {t.colour} {t.shape} in the {t.place}" in text for t in scene.things)
    assert fingerprint({"train": plain}) != fingerprint({"train": rich})


def test_notes_tell_the_shares_that_were_trained():
    arm = ArmPlan("data_mix", parse("data_mix"))
    model = captioner("data_mix")
    for _ in range(2):
        loss(model, *batch())
    model.eval()
    loss(model, *batch())  # no training step
    tested = captioner()
    given = (None, None, records.Protocol(train="full"), trained_state(model), of_inputs(None))
    arms.testing_model(arm, task(tested), *given)
    assert tested.layout is None
    (note,) = arm.methods[0].notes(SimpleNamespace(model=tested))
    assert note == (
        "samples of the 2 training steps before the tested weights: 50.0 % captions, 37.5 % interleaved, "
        "12.5 % text alone (3.0 images a sequence)"
    )


@pytest.mark.parametrize(
    "spec, message",
    [
        ("data_mix:captions=0.5", "captions=0.5, interleaved=0.45 and text=0.1 sum to 1.05"),
        ("data_mix:captions=0.5,interleaved=0,text=0.4", "sum to 0.9"),
        ("data_mix:captions=-0.1", "captions=-0.1 is not valid"),
        ("data_mix:images=1", "images=1 is not valid"),
        ("data_mix:captions=1,interleaved=0,text=0,images=3", "images says nothing with interleaved=0"),
        ("data_mix:synthetic=0.5", "synthetic=0.5, and this task offers no synthetic captions"),
        ("data_mix:synthetic=2", "synthetic=2.*is not valid"),
        ("data_mix:phase=test", "phase"),
        ("data_mix+sample_pack", "data_mix.*sample_pack|sample_pack.*data_mix"),
        ("sample_pack+data_mix", "data_mix.*sample_pack|sample_pack.*data_mix"),
        ("data_mix:images=32", "images=32 samples of up to 70 tokens are longer than the decoder's context of 2048"),
    ],
)
def test_bad_input_is_refused(spec, message):
    with pytest.raises(UsageError, match=message) as refused:
        captioner(spec, longest=70)
    assert refused.value.hint


def test_models_that_cannot_be_mixed_are_refused():
    with pytest.raises(UsageError, match="data_mix mixes the samples of a captioner, and .*CLIP writes no text"):
        DataMix().edit_model(effbench.models.tower.view(tiny.clip()))
    model = captioner()
    model.language.grid = (0, 2, 2)
    with pytest.raises(UsageError, match="counts the positions of its image tokens in two dimensions"):
        training_model(*plan("data_mix", model))
