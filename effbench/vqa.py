"""Visual question answering: the kind of task that `scenes_vqa` is. A new one writes only `load` and `kinds`.

An example's `questions` are asked about its image, its `captions` are the right answers, one each.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from effbench.captioning import Captioning, Prepared
from effbench.errors import InvalidError
from effbench.models.captioner import Captioner
from effbench.models.decoding import Read
from effbench.task import Data, Example, Items, Metric, Task

if TYPE_CHECKING:
    from effbench.models.backbones import Backbone
    from effbench.records import Protocol

_WORD = re.compile(r"\w+")
ALL = "accuracy"  # over all questions


@dataclass
class Asked(Prepared):
    """What batches are made of, and what the questions are.

    Args:
        questions: by split, those of each image.
        blind: the likeliest answer to a question, or to a kind of question, in the training split.
    """

    questions: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    blind: dict[str, str] = field(default_factory=dict)


class QuestionAnswering(Captioning):
    """Answer questions about an image in a word or two."""

    primary = ALL
    text = "question with its answer"
    #: what a question begins with, by kind: {"count": "how many"}
    kinds: ClassVar[dict[str, str]] = {}

    def prepare(self, data: Data, backbone: Backbone, protocol: Protocol, progress) -> Asked:
        for split, examples in data.splits.items():
            _check(data.name, split, examples)
        prepared = Asked(**vars(super().prepare(data, backbone, protocol, progress)))
        prepared.questions = {split: [e.questions for e in examples] for split, examples in data.splits.items()}
        for split, examples in data.splits.items():
            texts = prepared.texts[split]
            if (texts.asked == 0).any():  # nothing would tell it from a caption
                name = examples[np.searchsorted(texts.first, texts.asked.argmin(), "right") - 1].name
                raise InvalidError(f"image {name} in {split} of {data.name} has a question without a word", "remove it")
        pairs = [pair for e in data.apart["all"] for pair in zip(e.questions, e.captions, strict=True)]
        prepared.blind = blind_answers(pairs + [(self.kind(question), answer) for question, answer in pairs])
        return prepared

    def kind(self, question: str) -> str:
        """The kind of a question, "" for none."""
        return next((kind for kind, start in self.kinds.items() if question.startswith(start)), "")

    def _losses(self, model: Captioner, prefix: Tensor, batch: dict[str, Tensor], prompt: Read | None = None):
        """Of the answers alone: what the decoder makes of a question without an image is no language to retain."""
        return dict(seen=model.losses(prefix, batch["owner"], batch["tokens"], batch["target"], prompt))

    def shared(self, model: Captioner, batch: dict[str, Tensor]):
        return Task.shared(self, model, batch)  # not the texts' losses without an image, which nobody asks for

    def score(self, prepared: Asked, split: str, outputs: dict[str, Tensor]) -> dict[str, Items]:
        """Per question 1 where the answer is right, word for word, and 0 where not; its loss."""
        seen = outputs["seen"].numpy()
        asked = [each if len(seen) > len(prepared.questions[split]) else each[:1] for each in prepared.questions[split]]
        image = np.repeat(np.arange(len(asked)), [len(each) for each in asked])
        if "ids" in outputs:
            answers = [answer for each in prepared.references[split] for answer in each]
            written = [prepared.words.decode(row) for row in outputs["ids"].tolist()]
            right = np.array([same(*pair) for pair in zip(written, answers, strict=True)], float)
        else:  # of a look, at the first questions: greedy writing is right where every token was the likeliest
            right = (seen[:, 1] == seen[:, 2]).astype(float)
        kind = np.array([self.kind(question) for each in asked for question in each])
        among = {name: Items(right[kind == name], image[kind == name]) for name in self.kinds if name in kind}
        return {ALL: Items(right, image), "seen": Items(seen, image)} | among

    def metrics(self, prepared: Asked, split: str) -> list[Metric]:
        chance = self.chance(prepared, split)
        found = [Metric(name, name, _percent, True, chance[name], 100.0) for name in chance]
        return [*found, next(each for each in super().metrics(prepared, "dev") if each.name == "token_loss")]

    def chance(self, prepared: Asked, split: str) -> dict[str, float]:
        """Per cent of a split's questions that the likeliest answers of the training split are right for, by kind."""
        right = defaultdict(list)
        for questions, answers in zip(prepared.questions[split], prepared.references[split], strict=True):
            for question, answer in zip(questions, answers, strict=True):
                kind = self.kind(question)
                hit = same(prepared.blind.get(question, prepared.blind.get(kind, "")), answer)
                right[ALL].append(hit)
                right[kind].append(hit)
        return {name: 100 * float(np.mean(right[name])) for name in (ALL, *self.kinds) if right[name]}


def blind_answers(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """By question the answer that it had most often, the first in the alphabet where several had."""
    times: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in pairs:
        times[question][answer] += 1
    return {question: min(found, key=lambda a: (-found[a], a)) for question, found in times.items()}


def same(one: str, other: str) -> bool:
    """Whether two answers have the same words, whatever their case and punctuation."""
    return _WORD.findall(one.lower()) == _WORD.findall(other.lower())


def _check(name: str, split: str, examples: list[Example]) -> None:
    for e in examples:
        where = f"image {e.name} in {split} of {name}"
        if not e.questions:
            raise InvalidError(f"{where} has no questions", "leave the image out")
        for what, texts in (("question", e.questions), ("answer", e.captions)):
            if any(not text.strip() for text in texts):
                raise InvalidError(f"{where} has an empty {what}", "remove question and answer")


def _percent(right: np.ndarray) -> np.ndarray:
    return 100 * right
