"""Image captioning: the kind of task that `flickr8k_caption` is. A new one writes only `load`, and `pairs` if it asks.

An image tower, a connector and a causal language model that writes about the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from effbench import caption_scores, captioner_base
from effbench.errors import InvalidError, UsageError
from effbench.models.backbones import digest
from effbench.models.captioner import IGNORE, Captioner
from effbench.models.connectors import PooledLinear
from effbench.models.decoding import Read, generate
from effbench.models.language import CONTEXT, Words, check_width, pretrained, reference, tiny
from effbench.models.vocabulary import Vocabulary
from effbench.pixels import pixels
from effbench.records import Answer
from effbench.task import Data, Example, Items, Metric, Task, shown, unchanged

if TYPE_CHECKING:
    from effbench.models.backbones import Backbone
    from effbench.records import Captioning as Options
    from effbench.records import Protocol

ANSWER = 1000  # characters of an answer that a record keeps
FOREIGN = 0.3  # more unknown words make a tokenizer unfit for a text
LEAST = 3  # a word of the tiny decoder's vocabulary was seen so often in training captions


@dataclass(frozen=True)
class Recipe:
    """What building a captioner needs of the data.

    Args:
        words: size of the vocabulary; start, end: the ids around a text.
        base: file of weights that all arms start from; "" for none.
        longest: tokens of the longest training sample, those of its image included.
        second: training images have captions of a second source.
    """

    words: int
    start: int
    end: int
    base: str = ""
    longest: int = 0
    second: bool = False


@dataclass
class Texts:
    """The texts of a split as ids.

    Args:
        ids: (texts, longest) int64, the question if there is one, the text, its end, zeros.
        lengths: (texts,) of question, text and end; asked: (texts,) of the question.
        first: (images + 1,) index of each image's first text.
    """

    ids: np.ndarray
    lengths: np.ndarray
    asked: np.ndarray
    first: np.ndarray


@dataclass
class Prepared:
    """What batches are made of.

    Args:
        read_pixels: gives `pixels`, decoding the images if that was not done before.
        texts: by split, and what is set apart.
        rows: by split, (images,) where its images stand in `pixels`.
        references: by split, the captions of each image.
        words: text to ids and back.
        base: file of the weights that all arms start from; None before they are made.
        around: tokens of a sample before its text, those of its image included.
        context: most tokens of a sequence of the decoder.
        decoder: tells apart the weights of a decoder that was not made here; "" for the tiny one.
        names: by split, of its images.
        synthetic: the images are drawn: METEOR and SPICE, which know English, have nothing to say of their captions.
        judges: see `judge`.
    """

    read_pixels: Callable[[], dict[str, np.ndarray]]
    texts: dict[str, Texts]
    rows: dict[str, np.ndarray]
    references: dict[str, list[tuple[str, ...]]]
    words: Words
    mean: Tensor
    std: Tensor
    fingerprint: str
    around: int
    context: int
    base: Path | None = None
    decoder: str = ""
    names: dict[str, list[str]] = field(default_factory=dict)
    synthetic: bool = False
    judges: dict[str, caption_scores.References] = field(default_factory=dict)

    def judge(self, split: str) -> caption_scores.References:
        """The references of a split as its captions are scored by, counted at the first call."""
        if split not in self.judges:
            self.judges[split] = caption_scores.References(self.references[split], optional=not self.synthetic)
        return self.judges[split]

    @cached_property
    def pixels(self) -> dict[str, np.ndarray]:
        """By split, (images, 3, size, size) uint8."""
        return self.read_pixels()


class Captioning(Task):
    """Write a caption of an image."""

    primary = "cider"
    writes = True
    #: what a text is
    text: ClassVar[str] = "caption"
    #: whether examples may stand before a query (see `effbench.fewshot`)
    few_shot: ClassVar[bool] = False
    #: name of the task whose training is the very same: both share the base that arms start from; empty for its own
    learns: ClassVar[str] = ""
    recommended = {"train": "locked", "epochs": 14, "batch_size": 64, "lr": 1e-3, "weight_decay": 0.05}

    def set_apart(self, data: Data, protocol: Protocol) -> None:
        """Half of the training images lend their captions to the language model alone, where it learns from text."""
        data.apart["all"] = list(data.splits["train"])
        if "language" in protocol.captioning.stages:
            drawn = np.random.default_rng(0).permutation(len(data.splits["train"]))
            half = {int(i) for i in drawn[: len(drawn) // 2]}
            data.apart["language"] = [e for i, e in enumerate(data.splits["train"]) if i in half]
            data.splits["train"] = [e for i, e in enumerate(data.splits["train"]) if i not in half]
        data.apart["tuning"] = list(data.splits["train"])

    def prepare(self, data: Data, backbone: Backbone, protocol: Protocol, progress) -> Prepared:
        options = protocol.captioning
        if options.shots and not self.few_shot:
            raise UsageError(
                f"--shots {'/'.join(map(str, options.shots))}: this task puts no examples before its queries",
                "use a few-shot task, e.g. --task flickr8k_fewshot",
            )
        for split, examples in data.splits.items():
            _check(data.name, split, examples)
        captions = [c for e in data.apart["all"] for c in (*e.captions, *e.questions)]
        words, context, decoder = self._words(options, captions, backbone)
        texts = {name: _texts(each, words) for name, each in (*data.splits.items(), *data.apart.items())}
        if all(example.synthetic for example in data.splits["train"]):
            second = [replace(e, captions=e.synthetic, questions=()) for e in data.splits["train"]]
            texts["synthetic"] = _texts(second, words)
        _check_words(words, texts["tuning"], str(backbone) if options.decoder == "own" else options.decoder)
        longest = {name: int(each.lengths.max()) for name, each in texts.items()}
        name = max(longest, key=longest.__getitem__)
        image = options.image_tokens or backbone.patch_tokens().patches if options.decoder != "own" else backbone.around
        room = context - image - 2
        if max(longest[name], options.max_tokens, options.new_tokens) > room:
            what = f"a {self.text} in {name} of {data.name} has {longest[name]} tokens"
            if max(options.max_tokens, options.new_tokens) > room:
                what = f"answers of {max(options.max_tokens, options.new_tokens)} tokens are asked for"
            raise InvalidError(
                f"{what}, and beside {image} image tokens the decoder's context of {context} has room for {room}",
                "shorten it, or use fewer --image-tokens",
            )
        splits = data.splits | dict(train=data.apart["tuning"])
        whole = Data(data.name, splits, data.fingerprint, data.origin, notes=data.notes)
        place = {id(example): i for i, example in enumerate(data.apart["tuning"])}
        rows = {split: np.arange(len(examples)) for split, examples in data.splits.items()}
        rows["train"] = np.array([place[id(example)] for example in data.splits["train"]])
        rows["tuning"] = np.arange(len(data.apart["tuning"]))
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (backbone.mean, backbone.std))
        return Prepared(
            partial(pixels, whole, protocol.image_size, progress),
            texts,
            rows,
            {split: [example.captions for example in examples] for split, examples in data.splits.items()},
            words,
            mean * 255,
            std * 255,
            data.fingerprint,
            image if options.decoder == "own" else image + 1,
            context,
            decoder=decoder,
            names={split: [example.name for example in examples] for split, examples in data.splits.items()},
            synthetic=data.synthetic,
        )

    def _words(self, options: Options, captions: list[str], backbone: Backbone) -> tuple[Words, int, str]:
        """Text to ids and back, the decoder's context, and what tells its weights apart."""
        if options.decoder == "own":
            return backbone.words, backbone.context, backbone.weights_id
        if options.decoder == "tiny":
            check_width(options.width)
            return Vocabulary(captions, least=LEAST), CONTEXT, ""
        name = options.decoder.partition(":")[2]
        language, words, context = reference(name)
        return words, context, digest(language.state_dict())

    def groundwork(self, prepared: Prepared, backbone: Backbone, protocol: Protocol, live: Any) -> None:
        prepared.base = captioner_base.make(self, prepared, backbone, protocol, live)

    def ahead(self, prepared: Prepared, backbone: Backbone, protocol: Protocol) -> str:
        options = protocol.captioning
        epochs = dict(language=options.language_epochs, align=options.align_epochs, tune=protocol.epochs)
        stages = captioner_base.missing(self, prepared, backbone, protocol)
        named = " and ".join(f"{stage} ({epochs[stage]} epoch{'s' * (epochs[stage] != 1)})" for stage in stages)
        return f"the base that all arms start from, which is made once: {named}" if named else ""

    def recipe(self, prepared: Prepared) -> Recipe:
        words, texts = prepared.words, prepared.texts
        longest = max(int(texts[name].lengths.max()) for name in ("train", "synthetic") if name in texts)
        base = str(prepared.base or "")
        return Recipe(len(words), words.start, words.end, base, prepared.around + longest, "synthetic" in texts)

    def build(self, recipe: Recipe, backbone: Backbone, protocol: Protocol) -> nn.Module:
        options = protocol.captioning
        if options.decoder == "own":
            return self._based(backbone.captioner(options), recipe)
        if options.decoder == "tiny":
            language = tiny(recipe.words, options.layers, options.width, options.init)
        else:
            language, _, _ = pretrained(options.decoder.partition(":")[2], backbone.single_use)
        tower = backbone.patch_tokens()
        side = math.isqrt(options.image_tokens)
        if options.image_tokens and (side**2 != options.image_tokens or options.image_tokens > tower.patches):
            nearest = min(tower.patches, max(1, round(math.sqrt(options.image_tokens)) ** 2))
            raise UsageError(
                f"{options.image_tokens} image tokens are no square that {tower.patches} patches can be pooled to",
                f"use --image-tokens {nearest}, or 0 for all patches",
            )
        connector = PooledLinear(tower.width, language.width, side or None)
        return self._based(Captioner(tower, connector, language, (), (recipe.start,), recipe.end, options), recipe)

    def _based(self, model: Captioner, recipe: Recipe) -> Captioner:
        """The model with the weights that all arms start from, and what methods may ask of its training samples."""
        model.longest, model.second = recipe.longest, recipe.second
        if recipe.base:
            captioner_base.load(model, Path(recipe.base))
        return model

    def batch(self, prepared, split, index, rng, pixels=True):
        texts = prepared.texts[split]
        if rng is None:
            rows = np.concatenate([np.arange(texts.first[i], texts.first[i + 1]) for i in index])
            owner = np.repeat(np.arange(len(index)), np.diff(texts.first)[index])
        else:
            rows = rng.integers(texts.first[index], texts.first[np.asarray(index) + 1])
            owner = np.arange(len(index))
        batch = text_batch(texts, rows) | dict(owner=torch.from_numpy(owner))
        if rng is not None and split == "train" and "synthetic" in prepared.texts:
            second = prepared.texts["synthetic"]
            other = text_batch(second, rng.integers(second.first[index], second.first[np.asarray(index) + 1]))
            batch |= {f"synthetic_{key}": value for key, value in other.items()}
        if pixels:
            batch["image"] = self.images(prepared, split, index)
        return batch

    def images(self, prepared: Prepared, split: str, index: np.ndarray) -> Tensor:
        """Images of a split as the tower takes them (batch, 3, size, size)."""
        kind = split if split in prepared.pixels else "train"
        image = torch.from_numpy(prepared.pixels[kind][prepared.rows[split][index]])
        return torch.sub(image, prepared.mean).div_(prepared.std)

    def features(self, model: Captioner, batch: dict[str, Tensor]) -> Tensor:
        """Pooled tokens of the image tower (images, image tokens, width)."""
        return batch["features"] if "features" in batch else model.features(batch["image"])

    def loss(self, model: Captioner, batch: dict[str, Tensor]) -> Tensor:
        prefix = model.prefix(self.features(model, batch))
        batch = batch if model.source is None else model.source(batch)
        return model.loss(of_each(prefix, batch["owner"]), batch["tokens"], batch["target"])

    def observe(self, model, batch):
        return self.loss(model, batch)

    def predict(self, model, batch):
        prefix = model.prefix(self.features(model, batch))
        prompt = model.read(prefix)
        found = self._losses(model, prefix, batch, prompt)
        return found | dict(ids=self.answer(model, prefix, batch, prompt))

    def answer(self, model: Captioner, prefix: Tensor, batch: dict[str, Tensor], prompt: Read | None = None) -> Tensor:
        """Ids (answers, max_tokens) of what the model writes; `prompt`: the prefix, if it was read; it is used up."""
        options = model.options
        most, beams = options.max_tokens, options.beams
        whole, mask = asked(model, prefix, batch)
        if whole is prefix:  # nothing is asked: the text follows at once
            return generate(model.language, prefix, most, model.end, beams=beams, prompt=prompt)[0]
        return generate(model.language, whole, most, model.end, beams=beams, mask=mask)[0]

    def prompt(self, model: Captioner, batch: dict[str, Tensor]) -> Tensor:
        """What stands before the text, or the question, of a timed step (images, tokens, width)."""
        return model.prefix(self.features(model, batch))

    def serve(self, model, batch):
        return self._write(model, batch, model.options.new_tokens)

    def first_token(self, model, batch):
        return self._write(model, batch, 1)

    def _write(self, model: Captioner, batch: dict[str, Tensor], tokens: int) -> tuple[Tensor, int]:
        prefix, mask = asked(model, self.prompt(model, batch), batch)
        return generate(model.language, prefix, tokens, model.end, beams=model.options.beams, exactly=True, mask=mask)

    def look(self, model, batch):
        """The loss of each image's first text: writing is too slow to be done at every look."""
        owner = batch["owner"]
        firsts = torch.cat([owner.new_ones(1), owner.diff()]).bool()
        batch = batch | {key: batch[key][firsts] for key in ("tokens", "target", "owner")}
        prefix = model.prefix(self.features(model, batch))
        return dict(seen=model.losses(prefix, batch["owner"], batch["tokens"], batch["target"]))

    def _losses(
        self, model: Captioner, prefix: Tensor, batch: dict[str, Tensor], prompt: Read | None = None
    ) -> dict[str, Tensor]:
        seen = model.losses(prefix, batch["owner"], batch["tokens"], batch["target"], prompt)
        return dict(seen=seen, text=self.text_losses(model, batch))

    def text_losses(self, model: Captioner, batch: dict[str, Tensor]) -> Tensor:
        """Of each text without its image: loss, tokens, and how many of them were the likeliest (texts, 3)."""
        if "text" in batch:
            return batch["text"]
        none = torch.zeros_like(batch["owner"])
        return model.losses(model.starts(1), none, batch["tokens"], batch["target"])

    def frozen_features(self, model, images):
        features = model.features(images)
        return features.bfloat16() if torch.is_autocast_enabled(images.device.type) else features

    def weights(self, prepared, backbone):
        known = prepared.decoder in ("", backbone.weights_id)  # made here, or part of a whole model
        return backbone.weights_id if known else f"{backbone.weights_id}, decoder sha256:{prepared.decoder}"

    def locked(self, model):
        return [model.image_encoder]

    def shared(self, model, batch):
        return super().shared(model, batch) | {"text": ([model.language], lambda: self.text_losses(model, batch))}

    def score(self, prepared, split, outputs):
        texts, references = prepared.texts[split], prepared.references[split]
        owner = np.repeat(np.arange(len(references)), np.diff(texts.first))
        owner = owner if len(outputs["seen"]) == len(owner) else np.arange(len(references))  # of a look
        found = {name: Items(outputs[name].numpy(), owner) for name in ("seen", "text") if name in outputs}
        if "ids" in outputs:
            written = [prepared.words.decode(row) for row in outputs["ids"].tolist()]
            each = np.arange(len(references))
            found |= {name: Items(v, each) for name, v in prepared.judge(split).scores(written).items()}
        return found

    def examples(self, prepared, split, outputs):
        if "ids" not in outputs:
            return []
        texts, references, ids = prepared.texts[split], prepared.references[split], outputs["ids"]
        found = []
        for i in shown(len(references)):
            row = int(texts.first[i])  # the image's first question, if questions are asked
            asked = int(texts.asked[row])
            text = prepared.words.decode(ids[row if len(ids) == len(texts.ids) else i].tolist())
            answer = Answer(
                image=prepared.names[split][i] or f"{split} {i}",
                question=prepared.words.decode(texts.ids[row, :asked].tolist())[:ANSWER],
                text=text[:ANSWER],
                references=tuple(each[:ANSWER] for each in references[i][: 1 if asked else 2]),
            )
            found.append(answer)
        return found

    def notes(self, prepared):
        return [note for judge in prepared.judges.values() for note in judge.left_out.values()]

    def metrics(self, prepared, split):
        loss = Metric("token_loss", "seen", unchanged, False, None, 0.0, unit="nats", combine=per_token)
        if split == "dev":
            return [loss]
        return [
            *caption_scores.METRICS,
            loss,
            Metric("text_ppl", "text", unchanged, False, float(len(prepared.words)), 1.0, unit="", combine=perplexity),
            Metric("next_word", "text", unchanged, True, None, 100.0, combine=accuracy),
        ]

    def parts(self, model):
        return {"image": model.image_encoder, "connector": model.connector, "decoder": model.language}


def text_batch(texts: Texts, rows: np.ndarray) -> dict[str, Tensor]:
    """Some texts as a batch: "tokens" (texts, longest of them), and "target", which skips questions and padding."""
    lengths, asked = texts.lengths[rows], texts.asked[rows]
    longest = int(lengths.max())
    tokens = texts.ids[rows, :longest]
    place = np.arange(longest)
    target = np.where((place >= asked[:, None]) & (place < lengths[:, None]), tokens, IGNORE)
    return dict(tokens=torch.from_numpy(tokens), target=torch.from_numpy(target))


def asked(model: Captioner, prefix: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What an answer continues: the images' prefixes, or where something is asked prefix and question for each text.

    Returns:
        embedded (answers, tokens, width), padded at the front, and the mask (answers, tokens); None for no padding.
    """
    questions = (batch["target"] == IGNORE).long().cumprod(dim=1).sum(dim=1)  # tokens before the first target
    longest = int(questions.max())
    if not longest:
        return prefix, None
    prefix = of_each(prefix, batch["owner"])
    words = model.language.embed(batch["tokens"][:, :longest]).to(prefix.dtype)
    whole = torch.cat([prefix, words], dim=1)
    if int(questions.min()) == longest:
        return whole, None
    place = torch.arange(whole.shape[1], device=whole.device) - (longest - questions)[:, None]
    mask = (place >= 0).long()
    return whole.gather(1, place.clamp(min=0)[:, :, None].expand_as(whole)), mask


def of_each(prefix: Tensor, owner: Tensor) -> Tensor:
    """The prefix of each text's image."""
    return prefix if len(owner) == len(prefix) else prefix[owner]


def _check(name: str, split: str, examples: list[Example]) -> None:
    if not examples or any(not example.captions for example in examples):
        raise InvalidError(f"split {split} of {name} has no images, or images without captions")
    for example in examples:
        if any(not caption.strip() for caption in example.captions):
            raise InvalidError(f"image {example.name} in {split} of {name} has an empty caption", "remove the line")
        if example.questions and len(example.questions) != len(example.captions):
            many = f"{len(example.questions)} questions and {len(example.captions)} answers"
            raise InvalidError(f"image {example.name} in {split} of {name} has {many}", "give every question one")


def _check_words(words: Words, texts: Texts, decoder: str) -> None:
    """Refuse a tokenizer to which the texts are foreign: to write its unknown token would count as right."""
    unknown = getattr(words, "unknown", None)
    if unknown is None:
        return
    inside = np.arange(texts.ids.shape[1]) < texts.lengths[:, None]  # an unknown token of id 0 looks like padding
    share = ((texts.ids == unknown) & inside).sum() / texts.lengths.sum()
    if share > FOREIGN:
        raise InvalidError(
            f"the tokenizer of {decoder} knows no token for {share:.0%} of the words of these texts",
            "use a decoder whose vocabulary covers them, or --decoder tiny, which makes its own",
        )


def _texts(examples: list[Example], words: Words) -> Texts:
    questions = [q for e in examples for q in (e.questions or ("",) * len(e.captions))]
    asked = [words.encode(q) if q else [] for q in questions]
    encoded = [words.encode(c) for e in examples for c in e.captions]
    lengths = np.array([len(q) + len(c) + 1 for q, c in zip(asked, encoded, strict=True)])
    ids = np.zeros((len(lengths), lengths.max(initial=1)), dtype=np.int64)
    for row, question, text in zip(ids, asked, encoded, strict=True):
        row[: len(question) + len(text) + 1] = [*question, *text, words.end]
    first = np.cumsum([0] + [len(e.captions) for e in examples])
    return Texts(ids, lengths, np.array([len(q) for q in asked]), first)


def per_token(sums: np.ndarray) -> np.ndarray:
    """Mean cross entropy of (..., [loss, tokens, right ones])."""
    return sums[..., 0] / sums[..., 1]


def perplexity(sums: np.ndarray) -> np.ndarray:
    """exp of the mean cross entropy of (..., [loss, tokens, right ones])."""
    return np.exp(per_token(sums))


def accuracy(sums: np.ndarray) -> np.ndarray:
    """Per cent of tokens that were the likeliest, of (..., [loss, tokens, right ones])."""
    return 100 * sums[..., 2] / sums[..., 1]
