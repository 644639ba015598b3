"""The choices of decoder_prune: what stands before a layer of the decoder and says which image tokens stay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from effbench.errors import UsageError
from effbench.models.attention import Projections, class_attention
from effbench.models.connectors import smaller_grid
from effbench.models.shortening import Choice, Kept, Seen, at
from effbench.models.token_state import TokenEdit, TokenState
from effbench_methods._prune_stages import budget
from effbench_methods.algorithms.decoder_selection import (
    determinantal,
    dominant_and_contextual,
    least_like,
    pivots_by_norm,
    relevance,
)
from effbench_methods.algorithms.selection import farthest, rest, top

if TYPE_CHECKING:
    from torch import Tensor

    from effbench.models.tower import ModelView
    from effbench.models.whole_model import LibraryTower
    from effbench_methods.decoder_prune import DecoderPrune

NAME = "decoder_prune"
DOMINANT = 54 / 64  # of VisionZip's tokens, the others are contextual (2412.04467)


class Pick(Choice):
    """The image tokens that the last token attends to most, the farthest points, or any."""

    name = NAME

    def __init__(self, method: DecoderPrune) -> None:
        super().__init__()
        self.method = method
        self.renumbers = method.renumbers
        self.watches = "row" if method.by in ("fastv", "pyramid") else ""

    def forward(self, seen: Seen) -> Kept:
        k = budget(self.method.keep, seen.image.shape[1])
        match self.method.by:
            case "divprune":
                return Kept(farthest(seen.patches, k))
            case "random":
                return Kept(top(torch.rand(seen.image.shape, device=seen.image.device), k))
        return Kept(top(seen.row.gather(1, seen.image), k))


class Conditional(Pick):
    """CDPruner."""

    wordless = False

    def forward(self, seen: Seen) -> Kept:
        patches = seen.patches
        text = seen.text
        self.wordless = seen.tokens.shape[1] - seen.image.shape[1] < 2  # but for what every text begins with
        if self.wordless:
            weight = torch.ones_like(patches[..., 0])
        else:
            words = text.sum(dim=1, keepdim=True)
            weight = relevance(patches, (seen.tokens * text[..., None]).sum(dim=1) / words)
        return Kept(determinantal(patches, weight, budget(self.method.keep, patches.shape[1])))


class Duplication(Pick):
    """DART."""

    def __init__(self, method: DecoderPrune) -> None:
        super().__init__(method)
        self.watches = "keys"

    def forward(self, seen: Seen) -> Kept:
        n = seen.image.shape[1]
        k = budget(self.method.keep, n)
        of_image = min(k, max(1, self.method.pivots // 2))
        of_text = min(self.method.pivots - of_image, seen.tokens.shape[1] - n)
        keys, patches = seen.keys.flatten(2), seen.patches
        first = pivots_by_norm(at(keys, seen.image), of_image)
        others = rest(first, n)
        pivots = at(patches, first)
        if of_text:
            norms = keys.masked_fill(~seen.text[..., None], 0)
            pivots = torch.cat([pivots, at(seen.tokens, pivots_by_norm(norms, of_text))], dim=1)
        found = least_like(at(patches, others), pivots, k - of_image)
        return Kept(torch.cat([first, others.gather(1, found)], dim=1))


def square_side(keep: float, each: int) -> int:
    """Side of the square of means that pool makes of an image's tokens.

    Raises:
        UsageError: the share or the tokens are no square.
    """
    k = budget(keep, each)
    side = math.isqrt(k)
    if side**2 != k or math.isqrt(each) ** 2 != each:
        near = max(1, round(math.sqrt(keep * each)))
        raise UsageError(
            f"{NAME}: by=pool makes squares of squares; keep={keep:g} of {each} image tokens are {k}",
            f"use keep={near**2 / each:.4g}, which makes {near} x {near}",
        )
    return side


class Pool(Pick):
    """Means over squares."""

    def forward(self, seen: Seen) -> Kept:
        each = seen.image.shape[1] // seen.images
        side = square_side(self.method.keep, each)
        k = side**2
        values = smaller_grid(seen.patches.unflatten(1, (seen.images, each)).flatten(0, 1), side)
        values = values.unflatten(0, (-1, seen.images)).flatten(1, 2)
        first = torch.arange(seen.images, device=values.device)[:, None] * each + torch.arange(k, device=values.device)
        return Kept(first.flatten().expand(len(values), -1), values)


class Look(TokenEdit):
    """Sees what a block's class token attends to, and leaves its tokens alone."""

    name = NAME
    keeps_grid = True
    looked_at = True  # by Zip

    def forward(self, state: TokenState, projections: Projections) -> None:
        scores = class_attention(projections, state.sizes if state.proportional else None)
        self.seen = scores[:, state.prefix :], projections.k.mean(dim=1)[:, state.prefix :]

    def taken(self) -> tuple[Tensor, Tensor]:
        """Attention (batch, patches) and keys (batch, patches, head width)."""
        return self.seen


class LibraryLook:
    """The same of a tower that transformers runs, e.g. LLaVA's CLIP."""

    def __init__(self, tower: LibraryTower) -> None:
        self.watch = tower.show_class_token()

    def taken(self) -> tuple[Tensor, Tensor]:
        row, keys = self.watch.taken()
        if row is not None:  # None where a prompt is read again without a new image
            self.seen = row[:, 1:], keys[:, 1:].mean(dim=2)
        return self.seen


class Zip(Pick):
    """VisionZip."""

    def __init__(self, method: DecoderPrune, model: ModelView) -> None:
        super().__init__(method)
        tower, library = model.image, getattr(model.model.image_encoder, "show_class_token", None)
        if library is None and (tower is None or not tower.has_class_token):
            raise UsageError(
                f"{NAME}: by=visionzip asks the tower's class token, which this one lacks",
                "use by=divprune or by=fastv",
            )
        if library is not None:
            self.look = LibraryLook(model.model.image_encoder)
        else:
            self.look = Look()
            tower.after_attention(len(tower) - 1, self.look)
        self.connector = [model.connector]  # in a list: it is the captioner's own part

    def forward(self, seen: Seen) -> Kept:
        n = seen.image.shape[1]
        pool, (scores, keys) = self.connector[0].pool, self.look.taken()
        scores, keys = pool(scores[..., None])[..., 0], pool(keys)
        if scores.shape != seen.image.shape:
            raise UsageError(
                f"{NAME}: by=visionzip needs an image token for every pooled patch, but there are {scores.shape[1]} "
                f"patches and {n} image tokens",
                "use a linear, mlp or pool connector and one image in a prompt, or by=divprune",
            )
        return Kept(*dominant_and_contextual(seen.patches, scores, keys, budget(self.method.keep, n), DOMINANT))
