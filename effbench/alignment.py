"""Image-text alignment: the kind of task that `flickr8k` and `scenes` are. A new one writes only `load`.

Retrieval: R@k is the share of queries whose right answer is among the k best, ties counted against the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbench.distributed import gathered
from effbench.errors import InvalidError
from effbench.models.dual_encoder import DualEncoder
from effbench.pixels import pixels
from effbench.task import Data, Items, Metric, Task, unchanged

if TYPE_CHECKING:
    from effbench.models.backbones import Backbone
    from effbench.records import Protocol


@dataclass
class Prepared:
    """What batches are made of.

    Args:
        read_pixels: gives `pixels`, decoding the images if that was not done before.
        tokens: by split, (captions, context) int64, an image's captions next to each other.
        first: by split, (images + 1,) index of each image's first caption.
        vocabulary: words and context of the vocabulary of the training captions; None where the backbone has its own.
    """

    read_pixels: Callable[[], dict[str, np.ndarray]]
    tokens: dict[str, Tensor]
    first: dict[str, np.ndarray]
    mean: Tensor
    std: Tensor
    vocabulary: tuple[int, int] | None

    @cached_property
    def pixels(self) -> dict[str, np.ndarray]:
        """By split, (images, 3, size, size) uint8."""
        return self.read_pixels()

    def owner(self, split: str) -> np.ndarray:
        """(captions,) index of the image that each caption describes."""
        return np.repeat(np.arange(len(self.first[split]) - 1), np.diff(self.first[split]))


class Alignment(Task):
    """Match images with their captions, both ways."""

    primary = "t2i_r10"
    #: measured on Flickr8k with a frozen DeiT-tiny: dev R@10 stops rising at about the tenth epoch
    recommended = {"train": "locked", "epochs": 12, "batch_size": 256, "lr": 1e-3, "weight_decay": 0.1}

    def prepare(self, data: Data, backbone: Backbone, protocol: Protocol, progress) -> Prepared:
        for split, examples in data.splits.items():
            if not examples or any(not example.captions for example in examples):
                raise InvalidError(f"split {split} of {data.name} has no images, or images without captions")
        captions = {s: [c for e in examples for c in e.captions] for s, examples in data.splits.items()}
        tokenizer = backbone.tokenizer(captions["train"])
        first = {s: np.cumsum([0] + [len(e.captions) for e in examples]) for s, examples in data.splits.items()}
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (backbone.mean, backbone.std))
        return Prepared(
            partial(pixels, data, protocol.image_size, progress),
            {split: tokenizer(lines) for split, lines in captions.items()},
            first,
            mean * 255,
            std * 255,
            None if backbone.has_text else (len(tokenizer), tokenizer.context),
        )

    def recipe(self, prepared: Prepared) -> tuple[int, int] | None:
        return prepared.vocabulary

    def build(self, recipe: tuple[int, int] | None, backbone: Backbone, protocol: Protocol) -> nn.Module:
        return backbone.dual_encoder(protocol, recipe)

    def batch(self, prepared, split, index, rng, pixels=True):
        first = prepared.first[split]
        if rng is None:
            rows = np.concatenate([np.arange(first[i], first[i + 1]) for i in index])
        else:
            rows = rng.integers(first[index], first[index + 1])
        batch = {"tokens": prepared.tokens[split][torch.from_numpy(rows)]}
        if pixels:
            image = torch.from_numpy(prepared.pixels[split][index])
            batch["image"] = torch.sub(image, prepared.mean).div_(prepared.std)
        return batch

    def loss(self, model: DualEncoder, batch: dict[str, Tensor]) -> Tensor:
        return model.loss(gathered(self._images(model, batch)), gathered(model.embed_texts(batch["tokens"])))

    def predict(self, model: DualEncoder, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"image": self._images(model, batch), "text": model.embed_texts(batch["tokens"])}

    def _images(self, model: DualEncoder, batch: dict[str, Tensor]) -> Tensor:
        if "features" in batch:
            return model.embed_features(batch["features"])
        return model.embed_images(batch["image"])

    def frozen_features(self, model: DualEncoder, images: Tensor) -> Tensor:
        return model.image_encoder(images)

    def locked(self, model: DualEncoder) -> list[nn.Module]:
        return [model.image_encoder]

    def score(self, prepared: Prepared, split: str, outputs: dict[str, Tensor]) -> dict[str, Items]:
        owner = prepared.owner(split)
        t2i, i2t = ranks(outputs["image"], outputs["text"], torch.from_numpy(owner))
        return {"t2i_rank": Items(t2i.numpy(), owner), "i2t_rank": Items(i2t.numpy(), np.arange(len(i2t)))}

    def agreement(self, prepared, split, baseline, outputs):
        owner = prepared.owner(split)
        each = np.arange(len(prepared.first[split]) - 1)
        found = {}
        for way, query, gallery, group in (("t2i", "text", "image", owner), ("i2t", "image", "text", each)):
            best = [best_answers(of[query], of[gallery], 10) for of in (baseline, outputs)]
            found[f"{way}_top1"] = Items((best[0][:, 0] == best[1][:, 0]).float().numpy(), group)
            found[f"{way}_overlap10"] = Items(overlap(*best).numpy(), group)
        for side, group in (("image", each), ("text", owner)):
            found[f"{side}_cosine"] = Items(cosine(baseline[side], outputs[side]), group)
        return found

    def metrics(self, prepared: Prepared, split: str) -> list[Metric]:
        images, captions = len(prepared.first[split]) - 1, len(prepared.tokens[split])
        right_of_image = max(1, round(captions / images))
        found = []
        for way, gallery, right in (("t2i", images, 1), ("i2t", captions, right_of_image)):
            for k in (1, 5, 10):
                blind = math.comb(gallery - right, min(k, gallery)) / math.comb(gallery, min(k, gallery))
                value = partial(_recall, k=k)
                found.append(Metric(f"{way}_r{k}", f"{way}_rank", value, True, 100 * (1 - blind), 100.0))
            median = 1 + (1 - 0.5 ** (1 / right)) * (gallery - right)  # of the best of `right` blind guesses
            found.append(Metric(f"{way}_medr", f"{way}_rank", unchanged, False, median, 1.0, "median", "rank"))
        return found

    def parts(self, model: DualEncoder) -> dict[str, nn.Module]:
        return {"image": model.image_encoder, "text": model.text_encoder}


def cosine(one: Tensor, other: Tensor) -> np.ndarray:
    """Cosines of matching rows, (items, width) each: (items,) in [-1, 1]."""
    return F.cosine_similarity(one.double(), other.double()).clamp(-1, 1).float().numpy()


def best_answers(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    """Indices of each query's k best answers, best first, (queries, at most k); embeddings are (items, width)."""
    return (queries.float() @ gallery.float().T).topk(min(k, len(gallery)), dim=1).indices


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Share of the answers (queries, k) that both lists hold, whatever their order: (queries,)."""
    return (one[:, :, None] == other[:, None, :]).any(dim=2).float().mean(dim=1)


def _recall(rank: np.ndarray, k: int) -> np.ndarray:
    return 100.0 * (rank <= k)


def ranks(image: Tensor, text: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of the right answers, 1 = best, ties counted against the model.

    Args:
        image: (images, width) embeddings; text: (captions, width).
        owner: (captions,) index of each caption's image.

    Returns:
        text to image: (captions,), rank of the caption's image among all images; image to text: (images,), rank of
        the best of the image's own captions among the captions of all other images. A score that is not finite
        ranks last.
    """
    scores = (text.float() @ image.float().T).nan_to_num(nan=float("-inf"))  # (captions, images)
    own = scores.gather(1, owner[:, None])
    t2i = (scores >= own).sum(dim=1)
    best = torch.full((len(image),), float("-inf")).scatter_reduce(0, owner, own.squeeze(1), "amax")
    others = scores >= best
    others[torch.arange(len(owner)), owner] = False
    i2t = others.sum(dim=0) + 1
    return t2i, i2t
