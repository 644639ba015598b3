"""Questions about images: one right answer each, none given away by its words, and answers that hold in any batch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from effbench import records
from effbench.captioning import _texts, asked, of_each, text_batch
from effbench.datasets import check
from effbench.errors import InvalidError, UsageError
from effbench.models import language
from effbench.models.captioner import IGNORE, Captioner
from effbench.models.connectors import PooledLinear
from effbench.models.patch_tokens import TimmTokens
from effbench.models.vocabulary import Vocabulary
from effbench.task import Data, DataRequest, Example
from effbench.vqa import QuestionAnswering, same
from effbench_tasks.drawing.questions import EACH, KINDS, NUMBERS
from effbench_tasks.drawing.scene import COLOURS, PLACES, RADII, SHAPES, Scene
from effbench_tasks.scenes import fingerprint
from effbench_tasks.scenes_vqa import ScenesVqa

OPTIONS = records.Captioning(layers=2, width=32, image_tokens=4, stages=(), max_tokens=3, new_tokens=2)
ANSWERS = [place for row in PLACES for place in row] + list(COLOURS) + list(NUMBERS)


@pytest.fixture(scope="module")
def data():
    return ScenesVqa().load(DataRequest())


def told(words: str, scene: Scene) -> list:
    """The things of a scene that some words are about; reads the words, shares nothing with what wrote them."""
    place = next((p for p in sorted(ANSWERS[:9], key=len, reverse=True) if words.endswith(f"in the {p}")), None)
    said = set(words.replace("crosses", "cross").replace("?", "").split()) if place is None else set()
    said |= {word.removesuffix("s") for word in said}
    return [
        thing
        for thing in scene.things
        if place in (None, thing.place)
        and all(not said & set(names) or value in said for names, value in (
            (SHAPES, thing.shape), (COLOURS, thing.colour), (RADII, thing.size)))
    ]  # fmt: skip


def right(question: str, scene: Scene) -> str:
    things = told(question, scene)
    if question.startswith("how many"):
        return NUMBERS[len(things)]
    (thing,) = things  # else the question has no one answer
    return thing.colour if question.startswith("what colour") else thing.place


def test_every_question_has_exactly_one_right_answer_and_it_is_given(data):
    for examples in data.splits.values():
        for e in examples:
            scene = e.image.args[0]
            assert [right(q, scene) for q in e.questions] == list(e.captions)
            assert len(set(e.questions)) == len(e.questions) == len(KINDS) * EACH
    train, test = ({e.image.args[0] for e in data.splits[split]} for split in ("train", "test"))
    assert not train & test


def test_no_kind_can_be_answered_without_the_image(data):
    task = ScenesVqa()
    prepared = prepare(task, data)
    for split in data.splits:
        chance = task.chance(prepared, split)
        assert chance["colour"] < 16 and chance["position"] < 14 and chance["count"] < 34
        assert chance["accuracy"] == pytest.approx(sum(chance[kind] for kind in KINDS) / 3)


def test_the_fingerprint_depends_on_the_questions(data):
    few = {"test": data.splits["test"][:2]}
    first = few["test"][0]
    other = Example(first.image, first.captions, first.name, (*first.questions[1:], first.questions[0]))
    assert fingerprint(few) == fingerprint(few) != fingerprint({"test": [other, few["test"][1]]})


def test_the_check_of_the_data_speaks_of_questions(data):
    few = Data("scenes", {split: e[:3] for split, e in data.splits.items()}, "f")
    assert check(few).lines()[1] == "train: 3 images, 18 questions with an answer each" and not check(few).problems
    few.splits["train"][0] = example(("how many", "where"), ("one",), "odd")
    assert check(few).problems == ["odd: 2 questions and 1 answers"]


def test_a_path_is_refused():
    with pytest.raises(UsageError, match="drawn, not read"):
        ScenesVqa().load(DataRequest(path="somewhere"))


# the task kind


class Asking(QuestionAnswering):
    """A task of this kind over the examples that a test makes."""

    kinds = {"count": "how many", "colour": "what colour"}

    def load(self, request):
        raise NotImplementedError


def example(questions, answers, name="a"):
    return Example(lambda: Image.new("RGB", (32, 32)), answers, name, questions)


TRAIN = [example(("how many", "what colour is it"), (n, c), f"t{i}") for i, (n, c) in enumerate(
    [("two", "red"), ("two", "blue"), ("two", "red"), ("one", "red")] * 3)]  # fmt: skip


def asking(test, train=None, **more):
    splits = dict(train=list(train or TRAIN), dev=[example(("how many",), ("one",))], test=list(test))
    return prepare(Asking(), Data("mine", splits, "f"), **more)


def prepare(task, data, options=OPTIONS, tower=None):
    protocol = records.Protocol(image_size=32, captioning=options)
    backbone = SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3, patch_tokens=lambda: TimmTokens(tiny.vit()))
    task.set_apart(data, protocol)
    return task.prepare(data, backbone, protocol, lambda *_: None)


def test_chance_is_the_best_answer_without_the_image():
    test = [example(("how many", "what colour is that"), ("two", "red")), example(("how many",), ("one",), "b")]
    # "what colour is that" was never asked in training: then the likeliest answer of its kind
    assert Asking().chance(asking(test), "test") == pytest.approx(dict(accuracy=200 / 3, count=50, colour=100))


def test_the_score_is_an_exact_match_by_kind_and_of_a_look_the_first_questions():
    test = [example(("how many", "what colour is it"), ("two", "Red.")), example(("how many",), ("one",), "b")]
    task, prepared = Asking(), asking(test)
    words = prepared.words
    ids = torch.tensor([[*words.encode(text), words.end, words.end][:3] for text in ("two", "red", "two two")])
    seen = torch.tensor([[1.0, 2, 2], [1, 2, 1], [1, 2, 1]])
    found = task.score(prepared, "test", dict(ids=ids, seen=seen))
    assert found["accuracy"].values.tolist() == [1, 1, 0] and found["accuracy"].group.tolist() == [0, 0, 1]
    assert found["count"].values.tolist() == [1, 0] and found["colour"].values.tolist() == [1]
    look = task.score(prepared, "test", dict(seen=seen[[0, 2]]))
    assert look["accuracy"].values.tolist() == [1, 0] and look["accuracy"].group.tolist() == [0, 1]
    names = [metric.name for metric in task.metrics(prepared, "test")]
    assert names == ["accuracy", "count", "colour", "token_loss"]
    assert same("The  RED", "the red!") and not same("red", "red red")


def test_a_kind_that_a_split_does_not_ask_for_is_left_out():
    task, prepared = Asking(), asking([example(("how many",), ("one",))])
    assert [m.name for m in task.metrics(prepared, "test")] == ["accuracy", "count", "token_loss"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (example(("how many", "where"), ("two",), "odd"), "image odd in test of mine has 2 questions and 1 answers"),
        (example((), ("two",), "odd"), "image odd in test of mine has no questions"),
        (example(("how many",), (" ",), "odd"), "image odd in test of mine has an empty answer"),
        (example((" ",), ("two",), "odd"), "image odd in test of mine has an empty question"),
        (example(("?!",), ("two",), "odd"), "image odd in test of mine has a question without a word"),
        (example((), (), "odd"), "image odd in test of mine has no questions"),
        (
            example(("how many " + "very " * 2050,), ("two",), "odd"),
            r"a question with its answer in test of mine has 2054 tokens.*2048 has room for 2042",
        ),
    ],
)
def test_bad_questions_are_refused_by_name(bad, message):
    with pytest.raises(InvalidError, match=message):
        asking([bad])


# answers: a question alone, and in a batch with longer ones

QUESTIONS = (("how many", "what colour is the large red star in the top left"), ("where is the ring",))
CAPTIONS = (("one two", "red"), ("top left",))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    words = Vocabulary([*(q for each in QUESTIONS for q in each), *(c for each in CAPTIONS for c in each)], least=1)
    options = OPTIONS.model_copy(update=dict(max_tokens=5))
    tower = TimmTokens(tiny.vit())
    body = language.tiny(len(words), 3, 32)
    for parameter in body.parameters():  # as far from uniform as a trained one: else all answers are alike
        parameter.data.normal_(0, 0.3)
    made = Captioner(tower, PooledLinear(24, 32, 2), body, (), (words.start,), words.end, options).eval()
    return made, _texts([example(q, c) for q, c in zip(QUESTIONS, CAPTIONS, strict=True)], words)


def batch_of(texts, rows):
    owner = np.array([0, 0, 1])[rows]
    images = tiny.IMAGES[np.unique(owner)]
    return text_batch(texts, np.array(rows)) | dict(owner=torch.from_numpy(owner - owner.min()), image=images)


def test_an_answer_is_the_same_alone_and_beside_longer_questions(model):
    model, texts = model
    task = Asking()
    with torch.inference_mode():
        together = task.predict(model, batch_of(texts, [0, 1, 2]))
        alone = [task.predict(model, batch_of(texts, [row])) for row in range(3)]
    assert len({tuple(row) for row in together["ids"].tolist()}) > 1
    for row, single in enumerate(alone):
        assert single["ids"].tolist() == together["ids"][row : row + 1].tolist()
        assert torch.allclose(single["seen"], together["seen"][row : row + 1], atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_too_give_the_same_answer_in_any_batch(model, beams):
    model, texts = model
    task = Asking()
    model.options = model.options.model_copy(update=dict(beams=beams))
    with torch.inference_mode():
        together = task.predict(model, batch_of(texts, [0, 1, 2]))["ids"]
        alone = [task.predict(model, batch_of(texts, [row]))["ids"] for row in range(3)]
    model.options = model.options.model_copy(update=dict(beams=1))
    assert torch.cat(alone).equal(together)


def test_teacher_forced_logits_are_those_of_writing(model):
    """What is written next is what the padded training layout holds likeliest after question and answer so far."""
    model, texts = model
    batch = batch_of(texts, [0, 1, 2])
    with torch.inference_mode():
        prefix = model.prefix(model.features(batch["image"]))
        written = Asking().answer(model, prefix, batch)
        front, mask = asked(model, prefix, batch)
        place = (mask.cumsum(dim=1) - 1).clamp(min=0)
        first = model.language(front, front.shape[1] - 1, None, mask, place)[:, -1]
        for row in range(3):
            question = int((batch["target"][row] == IGNORE).long().cumprod(dim=0).sum())
            whole = torch.cat([batch["tokens"][row, :question], written[row]])[None]
            logits = model.logits(of_each(prefix, batch["owner"])[row : row + 1], whole)[0, question:]
            assert torch.allclose(logits[0], first[row], atol=1e-5)
            end = (written[row] == model.end).nonzero().flatten().tolist()
            upto = end[0] + 1 if end else len(written[row])
            assert logits.argmax(dim=-1)[:upto].equal(written[row][:upto])


def test_a_timed_step_writes_one_answer_to_each_question(model):
    model, texts = model
    with torch.inference_mode():
        ids, held = Asking().serve(model, batch_of(texts, [0, 1, 2]))
        assert ids.shape == (3, model.options.new_tokens) and held > 0
        assert Asking().first_token(model, batch_of(texts, [1]))[0].shape == (1, 1)
