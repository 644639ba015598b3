"""Captioning end to end on a tiny data set: base, stages, training, answers, and every bad input."""

from collections import Counter

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import flickr8k
from torch import nn

import effbench
from effbench import captioner_base, passes
from effbench.captioning import Captioning, accuracy, asked, per_token, perplexity, text_batch
from effbench.datasets import resolve
from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.live import Live
from effbench.lockstep import blocks
from effbench.models.captioner import IGNORE, TEXTS, Captioner, token_losses
from effbench.models.connectors import PooledLinear
from effbench.models.language import tiny as tiny_language
from effbench.records import Captioning as Options
from effbench.records import Protocol
from effbench.registry import backbones

SMALL = dict(
    task="flickr8k_caption",
    backbone="timm:test_vit",
    weights="random",
    image_size=32,
    batch_size=4,
    epochs=2,
    timing_pairs=6,
    threads=1,
    memory_runs=0,
)
WRITING = dict(layers=2, width=32, image_tokens=4, max_tokens=6, new_tokens=3, language_epochs=1, align_epochs=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return flickr8k(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True, scope="module")
def bases(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_cache():
    """The bases of the module are shared."""


def run(data, out, methods=(), captioning=None, **options):
    options = SMALL | dict(live=Live(Console(quiet=True)), captioning=WRITING | (captioning or {})) | options
    return effbench.run(methods, data=data, out=out, **options)


def parts(data, **changed):
    """Task, what it prepared, backbone and protocol."""
    found = resolve("flickr8k_caption", data)
    backbone = backbones.get("timm")("test_vit", "random", image_size=32)
    protocol = Protocol(image_size=32, batch_size=4, epochs=1, captioning=Options(**WRITING | changed))
    found.task.set_apart(found.data, protocol)
    return found.task, found.task.prepare(found.data, backbone, protocol, lambda *_: None), backbone, protocol


@pytest.fixture(scope="module")
def captioner(data):
    task, prepared, backbone, protocol = parts(data, stages=())
    torch.manual_seed(0)
    return task, prepared, task.build(task.recipe(prepared), backbone, protocol).eval()


def test_a_run_trains_writes_and_scores(data, tmp_path):
    record = run(data, tmp_path)
    base = record.baseline()
    assert {"cider", "bleu4", "rouge_l", "token_loss", "text_ppl", "next_word"} <= set(base.metrics)
    assert record.primary_metric == "cider" and record.envelope.protocol.captioning.stages == ("language", "align")
    assert record.envelope.images["train"] == 12  # of 24; the captions of the others taught the decoder its language
    losses = base.losses["0"]
    assert losses[-1] < losses[0]
    noop = record.control("noop")
    assert noop.metrics["token_loss"].value == base.metrics["token_loss"].value
    assert base.step_time.prefill > 0 and base.step_time.decode > 0 and base.step_time.connector > 0


def test_an_untouched_captioner_under_identity_writes_the_same(data, tmp_path):
    record = run(data, tmp_path, timing_pairs=0)
    loss, other = (arm.metrics["token_loss"].value for arm in (record.baseline(), record.control("identity")))
    assert other == pytest.approx(loss, abs=1e-4)


def test_a_stack_that_changes_only_testing_is_not_trained_again(data, tmp_path):
    tuned, pruned = (
        "layer_tune:by=top,target=decoder",
        "layer_tune:by=top,target=decoder+layer_prune:drop=0,target=decoder",
    )
    record = run(data, tmp_path, [tuned, pruned], timing_pairs=0, controls="none")
    first, second = (arm for arm in record.arms if arm.kind == "method")
    assert second.trained_by == first.name and second.train_time is None and first.train_time is not None
    assert second.metrics["token_loss"].value == first.metrics["token_loss"].value
    assert first.trained_by == ""


def test_the_base_is_made_once_and_shared(data, tmp_path, monkeypatch):
    made = []
    whole = captioner_base._STAGES

    def spy(name):
        def stage(*args):
            made.append(name)
            whole[name](*args)

        return stage

    monkeypatch.setattr(captioner_base, "_STAGES", {name: spy(name) for name in whole})
    run(data, tmp_path, timing_pairs=0, captioning=dict(layers=3))
    assert made == ["language", "align"]
    run(data, tmp_path, timing_pairs=0, captioning=dict(layers=3), lr=2e-3, data_share=0.5)
    assert made == ["language", "align"]  # neither the arms' training nor its share of the data is part of it
    run(data, tmp_path, timing_pairs=0, captioning=dict(layers=3), train="none")
    assert made == ["language", "align", "tune"]
    run(data, tmp_path, timing_pairs=0, captioning=dict(layers=3, align="all"))
    assert made == ["language", "align", "tune", "align"]


def test_the_stages_train_what_they_say(data):
    with Live(Console(quiet=True)) as live:

        def made(*stages):
            task, prepared, backbone, protocol = parts(data, layers=1, stages=stages)
            return _state(captioner_base.make(task, prepared, backbone, protocol, live))

        spoken, aligned, both = made("language"), made("language", "align"), made("align")
    changed = {key for key in spoken if not torch.equal(spoken[key], aligned[key])}
    assert changed == {"connector.proj.weight", "connector.proj.bias"}
    assert not torch.equal(spoken["language.head.weight"], both["language.head.weight"])
    assert not any(key.startswith("image_encoder") for key in aligned)


def _state(file):
    from safetensors.torch import load_file

    return load_file(file)


def test_a_killed_run_of_a_captioner_goes_on(data, tmp_path, monkeypatch):
    whole = run(data, tmp_path / "whole", timing_pairs=0)
    from effbench import training

    calls, honest = [], training.reduce

    def dies(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(training, "reduce", dies)
    with pytest.raises((KeyboardInterrupt, EffbenchError)):
        run(data, tmp_path / "killed", timing_pairs=0, checkpoint_every=0.0)
    monkeypatch.setattr(training, "reduce", honest)
    resumed = run(data, tmp_path / "killed", timing_pairs=0, checkpoint_every=0.0)
    assert resumed.provenance.resumed == 1
    assert resumed.baseline().losses == whole.baseline().losses
    assert resumed.baseline().metrics == whole.baseline().metrics


def test_features_in_place_of_pixels_change_nothing(captioner):
    task, prepared, model = captioner
    batch = task.batch(prepared, "train", np.arange(3), np.random.default_rng(0))
    cached = {key: value for key, value in batch.items() if key != "image"}
    cached["features"] = task.frozen_features(model, batch["image"])
    torch.testing.assert_close(task.loss(model, cached), task.loss(model, batch))


def test_a_caption_does_not_depend_on_its_batch(captioner):
    task, prepared, model = captioner
    with torch.inference_mode():
        together = task.predict(model, task.batch(prepared, "test", np.arange(4), None))
        alone = [task.predict(model, task.batch(prepared, "test", np.array([i]), None)) for i in range(4)]
    assert torch.equal(together["ids"], torch.cat([each["ids"] for each in alone]))
    torch.testing.assert_close(together["seen"], torch.cat([each["seen"] for each in alone]), atol=1e-4, rtol=1e-4)


def test_the_loss_is_by_token_and_padding_counts_for_nothing(captioner):
    task, prepared, model = captioner
    batch = task.batch(prepared, "test", np.arange(4), None)
    with torch.inference_mode():
        sums = task.predict(model, batch)["seen"].double()
        loss = task.loss(model, batch).double()
    assert sums[:, 1].sum() == (batch["target"] != IGNORE).sum()
    torch.testing.assert_close(sums[:, 0].sum() / sums[:, 1].sum(), loss, atol=1e-5, rtol=1e-5)


def test_sums_over_tokens_make_the_metrics():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1.0, 1.0, 1.0]]]))
    there = torch.tensor([0, 0])
    sums = token_losses(logits[0, :2], torch.tensor([1, 1]), there, 1).double().numpy()
    np.testing.assert_allclose(sums, [[-np.log(0.25 * 0.8), 2, 1]], rtol=1e-6)
    assert perplexity(sums)[0] == pytest.approx(np.exp(per_token(sums)[0])) and accuracy(sums)[0] == 50


def test_questions_are_no_targets_and_stand_before_the_answer(captioner):
    task, prepared, model = captioner
    texts = prepared.texts["test"]
    batch = text_batch(texts, np.arange(3)) | dict(owner=torch.arange(3))
    prefix = torch.randn(3, 5, 32)
    assert asked(model, prefix, batch)[0] is prefix  # nothing is asked
    batch["target"][0, :2] = IGNORE
    whole, mask = asked(model, prefix, batch)
    assert whole.shape[1] == 7 and mask.sum(dim=1).tolist() == [7, 5, 5]
    torch.testing.assert_close(whole[0, 5:], model.language.embed(batch["tokens"][0, :2]))
    torch.testing.assert_close(whole[1, 2:], prefix[1])


@pytest.mark.parametrize(
    "captioning, options, error, message",
    [
        (dict(image_tokens=5), {}, UsageError, "no square"),
        (dict(image_tokens=100), {}, UsageError, "no square"),
        (dict(width=72), {}, UsageError, "multiple of 64"),
        (dict(max_tokens=3000), {}, InvalidError, "has room for"),
        (dict(layers=0), {}, UsageError, "--decoder-layers 0"),
        (dict(stages=("sing",)), {}, UsageError, "--stages"),
        (dict(decoder="gpt", layers=None, width=None), {}, UsageError, "not known"),
        ({}, dict(task="flickr8k"), UsageError, "write text"),
        ({}, dict(precision="fp8"), UsageError, "--precision fp8"),
        (dict(beams=0), {}, UsageError, "--beams 0"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(data, tmp_path, monkeypatch, captioning, options, error, message):
    monkeypatch.setattr(captioner_base, "make", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(error, match=message):
        run(data, tmp_path, captioning=captioning, **options)


def test_an_empty_caption_is_named(tmp_path):
    folder = flickr8k(tmp_path)
    file = folder / "flickr8k/Flickr8k_text/Flickr8k.token.txt"
    found = resolve("flickr8k_caption", folder)
    example = found.data.splits["dev"][0]
    found.data.splits["dev"][0] = type(example)(example.image, ("a word", "  "), example.name)
    protocol = Protocol(image_size=32, captioning=Options(**WRITING))
    found.task.set_apart(found.data, protocol)
    backbone = backbones.get("timm")("test_vit", "random", image_size=32)
    with pytest.raises(InvalidError, match=f"{example.name}.*empty caption"):
        found.task.prepare(found.data, backbone, protocol, lambda *_: None)
    assert file.is_file()


def test_a_caption_that_does_not_fit_is_refused(tmp_path):
    found = resolve("flickr8k_caption", flickr8k(tmp_path))
    example = found.data.splits["test"][0]
    found.data.splits["test"][0] = type(example)(example.image, ("word " * 3000,), example.name)
    protocol = Protocol(image_size=32, captioning=Options(**WRITING))
    found.task.set_apart(found.data, protocol)
    backbone = backbones.get("timm")("test_vit", "random", image_size=32)
    with pytest.raises(InvalidError, match="test of flickr8k has 3001 tokens.*room for"):
        found.task.prepare(found.data, backbone, protocol, lambda *_: None)


def test_bf16_trains_under_autocast(data, tmp_path):
    record = run(data, tmp_path, precision="bf16", timing_pairs=0)
    assert record.envelope.protocol.precision == "bf16"
    single = run(data, tmp_path, timing_pairs=0)
    pairs = zip(record.baseline().losses["0"], single.baseline().losses["0"], strict=True)
    assert all(a != b and a == pytest.approx(b, rel=0.05) for a, b in pairs)


def test_the_kind_has_no_name_of_its_own():
    assert Captioning.writes and Captioning.__abstractmethods__ == {"load"}


def test_a_tokenizer_to_which_the_words_are_foreign_is_refused():
    from types import SimpleNamespace

    from effbench.captioning import Texts, _check_words

    ids = np.array([[5, 3, 3, 9], [5, 6, 3, 9]])
    texts = Texts(ids, np.array([4, 4]), np.array([0, 0]), np.array([0, 2]))
    with pytest.raises(InvalidError, match="hf:foreign knows no token for 38%"):
        _check_words(SimpleNamespace(unknown=3), texts, "hf:foreign")
    for words in (SimpleNamespace(unknown=6), SimpleNamespace(unknown=None), SimpleNamespace()):
        _check_words(words, texts, "hf:near")


def test_stages_follow_one_another(data, tmp_path):
    with pytest.raises(UsageError, match="--stages tune/align"):
        run(data, tmp_path, captioning=dict(stages=("tune", "align")))


def test_arms_with_the_same_frozen_tower_share_its_features(data, tmp_path, monkeypatch):
    calls, honest = [], Captioning.frozen_features

    def counted(self, model, images):
        calls.append(model)  # held, so that no two have the same id
        return honest(self, model, images)

    methods = ["layer_tune:by=top", "layer_tune:by=bottom"]
    both = run(data, tmp_path / "both", methods, timing_pairs=0, controls="none", captioning=dict(stages=()))
    alone = run(data, tmp_path / "alone", methods[1:], timing_pairs=0, controls="none", captioning=dict(stages=()))
    assert both.arm(methods[1]).losses == alone.arm(methods[1]).losses
    assert both.arm(methods[1]).train_time.features > 0
    steps = sum(-(-both.envelope.images[split] // 64) for split in ("train", "dev"))
    assert steps == 2
    monkeypatch.setattr(Captioning, "frozen_features", counted)
    run(data, tmp_path / "counted", methods, timing_pairs=0, memory_runs=0, controls="none", captioning=dict(stages=()))
    passes = Counter(map(id, calls)).values()
    # two steps of baseline, noop, identity and the first method, one of the second; FLOPs are counted on other models
    assert sorted(passes)[-4:] == [steps] * 4 and 1 in passes


def test_arms_with_the_same_decoder_share_what_it_makes_of_text_alone(data, tmp_path, monkeypatch):
    options = dict(timing_pairs=0, memory_runs=0, controls="none", train="none", captioning=dict(stages=()))
    methods = ["token_prune:at=1,keep=0.5,score=norm", "quantize"]
    calls, honest = [], Captioning.text_losses

    def counted(self, model, batch):
        if "text" not in batch:
            calls.append(model)
        return honest(self, model, batch)

    monkeypatch.setattr(Captioning, "text_losses", counted)
    monkeypatch.setattr(passes, "blocks", lambda split, n, size: blocks(split, n, 2))
    record = run(data, tmp_path / "shared", methods, **options)
    shared = len(calls)
    monkeypatch.setattr(Captioning, "shared", lambda self, model, batch: {})
    alone = run(data, tmp_path / "alone", methods, **options)
    assert len(calls) - shared == shared + 3  # all steps but the first of token_prune, whose decoder is the baseline's
    found, expected = ([arm.metrics["text_ppl"] for arm in each.arms] for each in (record, alone))
    assert found == expected and found[-1] != found[0]


def test_many_texts_are_scored_as_each_alone():
    torch.manual_seed(0)
    language = tiny_language(50, 2, 32, init=0.2)
    model = Captioner(nn.Identity(), PooledLinear(8, 32, None), language, (), (49,), 48, Options()).eval()
    lengths = torch.randint(0, 12, (3 * TEXTS,))  # some have nothing to predict
    tokens = torch.randint(0, 48, (3 * TEXTS, 12))
    target = tokens.masked_fill(torch.arange(12) >= lengths[:, None], IGNORE)
    owner = torch.randint(0, 4, (3 * TEXTS,))
    with torch.no_grad():
        prefix = model.prefix(torch.randn(4, 5, 8))
        found = model.losses(prefix, owner, tokens, target)
        singly = zip(owner.split(1), tokens.split(1), target.split(1), strict=True)
        each = [model.losses(prefix, *text) for text in singly]
    torch.testing.assert_close(found, torch.cat(each), atol=1e-4, rtol=1e-5)
    assert found[:, 1].equal(lengths.float())
