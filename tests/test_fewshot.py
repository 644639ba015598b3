"""Few-shot captioning: no example is captioning itself, all arms see the same ones, every query stands alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import tiny_hf
import torch
from PIL import Image
from pydantic import ValidationError

from effbench import captioning, records
from effbench.captioning import Captioning
from effbench.errors import UsageError
from effbench.fewshot import FewShot
from effbench.measure.flops import flops_of
from effbench.models import language
from effbench.models.captioner import Captioner
from effbench.models.connectors import PooledLinear
from effbench.models.patch_tokens import TimmTokens
from effbench.registry import backbones, tasks
from effbench.start import captioning_options
from effbench.task import Data, Example
from effbench.training import reduce

OPTIONS = records.Captioning(layers=2, width=32, image_tokens=4, stages=(), max_tokens=5, new_tokens=3, shots=(0, 2, 4))
COLOURS = ("red", "green", "blue", "yellow")


class Shown(FewShot):
    """A task of this kind over the examples that a test makes."""

    def load(self, request):
        raise NotImplementedError


def example(index, synthetic=()):
    image = Image.fromarray(np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    lines = tuple(f"a {COLOURS[(index + n) % 4]} circle" + " beside number" * (index % 3) for n in range(2))
    return Example(lambda: image, lines, f"{index}", synthetic=synthetic)


def data(train=10, synthetic=()):
    splits = dict(train=range(train), dev=range(100, 102), test=range(200, 205))
    return Data("mine", {name: [example(i, synthetic) for i in each] for name, each in splits.items()}, "f")


def backbone():
    return SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3, patch_tokens=lambda: TimmTokens(tiny.vit()))


def prepare(task, seeds=(0,), found=None, **options):
    protocol = records.Protocol(image_size=32, captioning=OPTIONS.model_copy(update=options), seeds=seeds)
    found = found or data()
    task.set_apart(found, protocol)
    return task.prepare(found, backbone(), protocol, lambda *_: None)


def captioner(prepared, shots=OPTIONS.shots, beams=1):
    torch.manual_seed(3)
    words, options = prepared.words, OPTIONS.model_copy(update=dict(shots=shots, beams=beams))
    body = language.tiny(len(words), 3, 32)
    for parameter in body.parameters():  # as far from uniform as a trained one: else all answers are alike
        parameter.data.normal_(0, 0.5)
    connector = PooledLinear(24, 32, 2)
    connector.proj.weight.data.normal_(0, 3)
    made = (TimmTokens(tiny.vit()), connector, body, (), (words.start,), words.end, options)
    return Captioner(*made).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        task = Shown()
        prepared = prepare(task)
        prepared.pixels  # noqa: B018
        yield task, prepared


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path))


def predict(task, prepared, model, rows):
    with torch.inference_mode():
        return task.predict(model, task.batch(prepared, "test", np.array(rows), None))


def test_without_examples_it_is_captioning_exactly(made):
    task, prepared = made
    model = captioner(prepared)
    found = predict(task, prepared, model, range(5))
    with torch.inference_mode():
        expected = Captioning.predict(task, model, task.batch(prepared, "test", np.arange(5), None))
    for name, other in (("seen", "seen_0"), ("ids", "ids_0"), ("text", "text")):
        assert torch.equal(expected[name], found[other])
    assert not torch.allclose(found["seen_0"], found["seen_2"]) and not torch.allclose(found["seen_2"], found["seen_4"])


def test_the_sequence_is_examples_and_query_one_behind_another(made):
    task, prepared = made
    model = captioner(prepared)
    batch = task.batch(prepared, "test", np.array([1, 3]), None)
    with torch.inference_mode():
        found = model.prefix(task.features(model, batch), task.shots(model, batch, 2))
        places = model.language.places
        parts, image = [], []
        for row, caption in zip(prepared.drawn[:2], prepared.captions, strict=False):
            pixels = task.batch(prepared, "train", np.array([row]), np.random.default_rng(0))["image"]
            ids = torch.from_numpy(prepared.texts["train"].ids[caption, : prepared.texts["train"].lengths[caption]])
            assert ids[-1] == model.end
            parts += [model.connector(model.features(pixels))[0], model.language.embed(model.after)]
            parts.append(model.language.embed(ids))
            image += [True] * 4 + [False] * (1 + len(ids))
        query = model.prefix(model.features(batch["image"]))
    assert torch.allclose(found[:, : -query.shape[1]], torch.cat(parts).expand(2, -1, -1), atol=1e-5)
    assert torch.allclose(found[:, -query.shape[1] :], query, atol=1e-5)
    assert places.tolist() == [*image, *[True] * 4, False]


@pytest.mark.parametrize("beams", [1, 2])
def test_an_answer_does_not_depend_on_the_other_queries(made, beams):
    task, prepared = made
    model = captioner(prepared, beams=beams)
    together = predict(task, prepared, model, range(5))
    assert all(len({tuple(row) for row in together[f"ids_{n}"].tolist()}) > 1 for n in OPTIONS.shots)
    for row in (0, 3, 4):
        alone = predict(task, prepared, captioner(prepared, beams=beams), [row])
        for count in OPTIONS.shots:
            assert torch.equal(alone[f"ids_{count}"], together[f"ids_{count}"][row : row + 1])
            # two texts an image
            both = together[f"seen_{count}"][2 * row : 2 * row + 2]
            assert torch.allclose(alone[f"seen_{count}"], both, atol=1e-4)


def test_examples_are_the_same_for_every_batch_and_nested(made):
    task, prepared = made
    first = task.batch(prepared, "test", np.array([0]), None)
    other = task.batch(prepared, "test", np.array([4, 2]), np.random.default_rng(9))
    for key in ("shot_image", "shot_tokens", "shot_lengths"):
        assert torch.equal(first[key], other[key])
    fewer = prepare(Shown(), shots=(2,))
    assert fewer.drawn.tolist() == prepared.drawn[:2].tolist() and len(set(prepared.drawn.tolist())) == 4
    assert fewer.captions.tolist() == prepared.captions[:2].tolist()
    assert prepare(Shown(), seeds=(1, 0)).drawn.tolist() != prepared.drawn.tolist()
    assert not [key for key in task.batch(prepared, "train", np.arange(2), np.random.default_rng(0)) if "shot" in key]
    model = captioner(prepared)
    shots = task.shots(model, first, 4)
    part = task.shots(model, other, 2)
    assert torch.equal(part.tokens, shots.tokens[:, : shots.ends[2]]) and part.image.sum() == 8


def test_a_timed_step_reads_the_most_examples_and_makes_their_features_once(made):
    task, prepared = made
    model = captioner(prepared)
    batch = task.batch(prepared, "test", np.array([0, 1]), np.random.default_rng(0))
    seen, read = [], []
    model.image_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model.language.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    with torch.inference_mode():
        ids, held = task.serve(model, batch)
        assert ids.shape == (2, OPTIONS.new_tokens) and held > 0
        task.first_token(model, batch)
        assert seen == [2, 4, 2]  # the query first; examples once
        length = task.shots(model, batch, 4).ends[4] + 5
        assert read[0] == length and read[-1] == length
        steps = [flops_of(lambda: task.serve(model, batch)).dense_flops for _ in range(2)]
    assert steps[0] == steps[1]
    counted = {key: value for key, value in batch.items() if key != "shot_image"}  # of a model that is only counted
    with torch.inference_mode():
        task.serve(captioner(prepared), counted)


def test_scores_at_each_number_and_text_retention_in_one_record(made):
    task, prepared = made
    outputs = predict(task, prepared, captioner(prepared), range(5))
    items = task.score(prepared, "test", outputs)
    values = {m.name: reduce(m, items[m.items].values) for m in task.metrics(prepared, "test")}
    each = [f"{name}_{count}shot" for name in ("cider", "bleu4", "token_loss") for count in (0, 2, 4)]
    assert list(values) == [*each, "text_ppl", "next_word"]
    assert task.primary_metric(prepared, "test").name == "cider_4shot"
    assert task.primary_metric(prepared, "dev").name == "token_loss"
    seen = outputs["seen_2"].sum(dim=0)
    assert values["token_loss_2shot"] == pytest.approx((seen[0] / seen[1]).item(), rel=1e-5)
    answers = task.examples(prepared, "test", outputs)
    assert answers[0].text == prepared.words.decode(outputs["ids_4"][0].tolist())
    with torch.inference_mode():
        look = task.look(captioner(prepared), task.batch(prepared, "dev", np.arange(2), None))
    assert set(task.score(prepared, "dev", look)) == {"seen"}


def test_texts_of_a_second_source_come_beside_an_unchanged_batch(made):
    task, prepared = made
    rich = prepare(Shown(), found=data(synthetic=("a red circle beside a blue circle",)))
    assert len(rich.words) == len(prepared.words) and task.recipe(rich).second and not task.recipe(prepared).second
    batches = [task.batch(p, "train", np.arange(6), np.random.default_rng(1), pixels=False) for p in (prepared, rich)]
    added = {"synthetic_tokens", "synthetic_target"}
    assert set(batches[1]) == set(batches[0]) | added
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    assert rich.words.decode(batches[1]["synthetic_tokens"][0].tolist()) == "a red circle beside a blue circle"
    assert task.recipe(rich).longest == 4 + 1 + 8


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(shots=()), "needs a number of examples"),
        (dict(shots=(0, 11)), "--shots 11: the training split, which examples are drawn from, has 10 images"),
        (dict(shots=(0, 4), max_tokens=2030), r"--shots 4: .* 2048"),
    ],
)
def test_shots_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message) as refused:
        prepare(Shown(), **options)
    assert refused.value.hint


def test_a_context_that_is_too_short_tells_how_many_fit(monkeypatch):
    monkeypatch.setattr(captioning, "CONTEXT", 40)
    with pytest.raises(UsageError, match="context holds 40") as refused:
        prepare(Shown())
    assert "use --shots 0/2" in refused.value.hint
    prepare(Shown(), shots=(0, 2))


@pytest.mark.parametrize("shots", [("-1",), ("two",), ("2", "2"), ("",), (0, 2000)])
def test_numbers_that_are_none_are_refused_by_the_option(shots):
    found = SimpleNamespace(task=Shown(), source=Shown())
    with pytest.raises(UsageError, match="^--shots"):
        captioning_options(found, dict(shots=shots))
    assert captioning_options(found, dict(shots=("8", "0"))).shots == (0, 8)
    assert captioning_options(found, None).shots == (0, 2, 4, 8)


def test_other_tasks_take_none_and_their_envelopes_are_what_they_were():
    class Plain(Captioning):
        load = Shown.load

    with pytest.raises(UsageError, match="--shots 0/2/4: this task puts no examples"):
        prepare(Plain())
    assert "shots" not in records.Captioning().model_dump(mode="json")
    assert OPTIONS.model_dump(mode="json")["shots"] == [0, 2, 4]
    assert records.Captioning.model_validate(OPTIONS.model_dump(mode="json")) == OPTIONS
    with pytest.raises(ValidationError, match="stands twice"):
        records.Captioning(shots=(2, 2))


def test_the_built_in_tasks_share_what_captioning_trains():
    assert tasks.get("flickr8k_fewshot").learns == "Flickr8kCaption"
    for name in ("scenes", "flickr8k"):
        task, other = tasks.get(f"{name}_fewshot"), tasks.get(f"{name}_caption")
        assert {key: task.recommended[key] for key in other.recommended if key != "captioning"} == {
            key: value for key, value in other.recommended.items() if key != "captioning"
        }
        assert task.recommended["captioning"]["shots"] == (0, 2, 4, 8)


# whole models


def whole(folder, shots=(0, 2)):
    found = backbones.get("hf")(str(folder))
    options = records.Captioning(decoder="own", image_tokens=0, stages=(), shots=shots, max_tokens=4, new_tokens=2)
    return found, records.Protocol(image_size=found.image_size, captioning=options)


def test_a_whole_model_reads_its_own_format_and_opens_it_once(tmp_path):
    tiny_hf.llava(tmp_path)
    found, protocol = whole(tmp_path)
    task, own = Shown(), data()
    task.set_apart(own, protocol)
    prepared = task.prepare(own, found, protocol, lambda *_: None)
    model = task.build(task.recipe(prepared), found, protocol).eval()
    outputs = predict(task, prepared, model, range(5))
    assert not torch.allclose(outputs["seen_0"], outputs["seen_2"])
    batch = task.batch(prepared, "test", np.array([0]), None)
    with torch.inference_mode():
        prefix = model.prefix(task.features(model, batch), task.shots(model, batch, 2))
    starts = (prefix[0] == model.language.embed(model.start)).all(dim=-1)
    assert model.opening == int(model.before[0] == model.start) and int(starts.sum()) == model.opening
    assert int(model.language.places.sum()) == 3 * found.image_tokens


def test_positions_in_two_dimensions_are_refused_for_several_images(tmp_path):
    tiny_hf.qwen_vl(tmp_path)
    found, protocol = whole(tmp_path)
    recipe = captioning.Recipe(len(found.words), found.words.start, found.words.end)
    with pytest.raises(UsageError, match="--shots 2: .*positions of its image tokens in two dimensions"):
        Shown().build(recipe, found, protocol)
    Shown().build(recipe, *whole(tmp_path, (0,)))
