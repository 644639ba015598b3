"""The captioner: an image tower, a connector and a causal language model (LLaVA, arXiv 2304.08485).

A sequence is [before] [image tokens] [after] [text]; the language model predicts the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbench.models.decoding import Read, read, shared
from effbench.models.sequences import Layout, logits_in_rows
from effbench.models.shortening import left_of, tokens_read

if TYPE_CHECKING:
    from effbench.models.shortening import Shortener
    from effbench.records import Captioning

IGNORE = -100  # a target that no token has to meet
TEXTS = 40  # that are read together when many are scored


class Span(NamedTuple):
    """Where things stand in the sequences of a batch.

    Args:
        image: first and behind the last image token; equal where there is none.
        text: index of the first token that is predicted from, the last one before the text.
        ends: (batch,) index of each sequence's last token that is no padding.
    """

    image: tuple[int, int]
    text: int
    ends: Tensor


class Shots(NamedTuple):
    """Examples that stand before a query, each [before] [image tokens] [after] caption [end].

    Args:
        tokens: embedded (1, tokens, width); image: (tokens,) which of them are image tokens.
        ends: how many tokens the first n examples have, n from 0 on.
    """

    tokens: Tensor
    image: Tensor
    ends: tuple[int, ...]

    def first(self, count: int) -> Shots | None:
        """The first `count` of them; None for none."""
        end = self.ends[count]
        return Shots(self.tokens[:, :end], self.image[:end], self.ends[: count + 1]) if count else None


class Language(nn.Module):
    """A causal language model of transformers: its body, and the head that gives logits.

    Args:
        body: takes `inputs_embeds`, gives `last_hidden_state`; head: (..., width) -> (..., vocabulary).
        grid: index of the first image token, rows and columns of image tokens, where the model counts their positions
            in two dimensions (see `image_positions`); None where it counts all tokens in one.

    Attributes:
        part, rest: what the time of a step, and of what follows it, counts as (see `effbench.measure.split.Split`).
        span: of the padded sequences that a loss was last asked of; None of packed ones.
        places: (tokens,) which tokens of the prompt that was made last are image tokens.
        shortener: removes image tokens while a prompt is read; None without such a method.
    """

    def __init__(self, body: nn.Module, head: nn.Module, grid: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.grid = grid
        self.part, self.rest = "prefill", "head"
        self.span: Span | None = None
        self.places: Tensor | None = None
        self.shortener: Shortener | None = None

    @property
    def width(self) -> int:
        return self.body.get_input_embeddings().embedding_dim

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> (..., width)."""
        return self.body.get_input_embeddings()(ids)

    def forward(
        self,
        x: Tensor,
        first: int = 0,
        cache: Any = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        take: Tensor | None = None,
        image: bool = True,
    ) -> Tensor:
        """Logits of the tokens from `first` on, (batch, tokens - first, vocabulary).

        Args:
            x: embedded tokens (batch, tokens, width).
            cache: keys and values of earlier tokens, which those of x are added to (transformers' `Cache`).
            mask: (batch, earlier and new tokens), 0 for padding; or (batch, 1, tokens, tokens), True where attended.
            positions: (batch, tokens); None counts from the tokens in the cache.
            take: (n,) indices into the flattened tokens; then only their logits, (n, vocabulary).
            image: the sequences hold image tokens.
        """
        asked = x.shape[1] - first
        in_grid = self.grid is not None and image
        if positions is None and (in_grid or (cache is not None and left_of(cache))):
            seen = 0 if cache is None else tokens_read(cache)
            positions = torch.arange(seen, seen + x.shape[1], device=x.device).expand(len(x), -1)
        if in_grid:
            positions = image_positions(positions, *self.grid)
        if self.shortener is not None:
            x, mask, positions = self.shortener.begin(x, self.places if image else None, cache, mask, positions)
        hidden = self.body(
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        # counted from the end: image tokens may be gone, those that are asked for never are
        return self.head(
            hidden[:, hidden.shape[1] - asked :] if take is None else hidden.flatten(0, 1).index_select(0, take)
        )


def image_positions(positions: Tensor, first: int, rows: int, columns: int) -> Tensor:
    """Positions of multimodal RoPE in time, height and width (Qwen2-VL, arXiv 2409.12191, 2.1), (3, batch, tokens).

    An image is one moment; its tokens count rows and columns from where it begins, and the text goes on behind the
    larger of both.

    Args:
        positions: (batch, tokens), counted in one dimension from the start of each sequence.
        first: of the first image token.
    """
    tokens = rows * columns
    place = positions - first
    text = torch.where(place < tokens, positions, positions - tokens + max(rows, columns))
    inside = (place >= 0) & (place < tokens)
    there = [torch.zeros_like(place), place // columns, place % columns]
    return torch.stack([torch.where(inside, first + along, text) for along in there])


class Captioner(nn.Module):
    """Writes text about an image.

    Args:
        image_encoder: images (batch, 3, height, width) -> tokens (batch, patches, tower width).
        connector: tokens -> (batch, image tokens, width); its `pool`, without parameters, comes first.
        language: the language model.
        before, after: ids of what stands around the image tokens; `after` ends with what a text begins with.
        end: id that ends a text.
        options: how it writes.
        start: id before a text where there is no image; None for the last of `after`.

    Attributes:
        layout: how samples of a training batch are laid out in rows; None pads them.
        source: replaces texts of a training batch by those of a second source; None leaves them.
        second: the task offers texts of a second source.
        longest: most tokens of a training sample, those of its image included; 0 where that is not known.
        opening: tokens of `before` that open a whole sequence: they stand once, whatever the number of its images.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        connector: nn.Module,
        language: Language,
        before: Sequence[int],
        after: Sequence[int],
        end: int,
        options: Captioning,
        start: int | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.connector = connector
        self.language = language
        start = after[-1] if start is None else start
        for name, ids in (("before", before), ("after", after), ("start", (start,))):
            self.register_buffer(name, torch.tensor(ids, dtype=torch.long), persistent=False)
        self.end = end
        self.options = options
        self.layout: Layout | None = None
        self.source: nn.Module | None = None
        self.second, self.longest = False, 0
        self.opening = int(bool(before) and before[0] == start)

    def features(self, images: Tensor) -> Tensor:
        """Images -> pooled tokens of the tower (batch, image tokens, tower width); a frozen tower is asked once."""
        return self.connector.pool(self.image_encoder(images))

    def prefix(self, features: Tensor, shots: Shots | None = None) -> Tensor:
        """Pooled tokens of the tower -> everything before the text, embedded (batch, tokens, width).

        Args:
            shots: examples that stand before it.
        """
        if not torch.is_autocast_enabled(features.device.type):  # what is kept of a frozen tower may be narrower
            features = features.to(self.language.embed(self.after[:1]).dtype)
        image = self.connector(features)
        before = self.before if shots is None else self.before[self.opening :]
        around = [self.language.embed(ids).to(image.dtype).expand(len(image), -1, -1) for ids in (before, self.after)]
        places = torch.zeros(len(before) + image.shape[1] + len(self.after), dtype=torch.bool, device=image.device)
        places[len(before) : len(before) + image.shape[1]] = True
        earlier = []
        if shots is not None:
            earlier = [shots.tokens.to(image.dtype).expand(len(image), -1, -1)]
            places = torch.cat([shots.image, places])
        self.language.places = places
        return torch.cat([*earlier, around[0], image, around[1]], dim=1)

    def shots(self, features: Tensor, tokens: Tensor, lengths: Tensor) -> Shots:
        """Examples as they stand before a query.

        Args:
            features: pooled tokens of the tower (examples, image tokens, tower width).
            tokens: ids (examples, longest); lengths: (examples,) tokens of each caption, its end included.
        """
        prefix = self.prefix(features)
        whole = torch.cat([prefix, self.language.embed(tokens).to(prefix.dtype)], dim=1)
        image = torch.cat([self.language.places, self.language.places.new_zeros(tokens.shape[1])])
        ends = [prefix.shape[1] + length for length in lengths.tolist()]
        kept = [slice(self.opening if index else 0, end) for index, end in enumerate(ends)]
        counts = [0]
        for part in kept:
            counts.append(counts[-1] + part.stop - part.start)
        embedded = torch.cat([row[part] for row, part in zip(whole, kept, strict=True)])
        return Shots(embedded[None], torch.cat([image[part] for part in kept]), tuple(counts))

    def starts(self, texts: int) -> Tensor:
        """What stands before a text where there is no image, embedded (texts, tokens, width)."""
        return self.language.embed(self.start).expand(texts, -1, -1)

    def has_image(self, prefix: Tensor) -> bool:
        """Whether what stands before a text, embedded (batch, tokens, width), holds image tokens."""
        return prefix.shape[1] > len(self.before) + len(self.after)

    def read(self, prefix: Tensor) -> Read:
        """Read what stands before texts, embedded (batch, tokens, width)."""
        return read(self.language, prefix, image=self.has_image(prefix))

    def losses(
        self, prefix: Tensor, owner: Tensor, tokens: Tensor, target: Tensor, prompt: Read | None = None
    ) -> Tensor:
        """Of each text the sums that `token_losses` gives, (texts, 3); texts of one prefix share its keys and values.

        Args:
            prefix: everything before the texts, embedded (prefixes, tokens, width); owner: (texts,) the prefix of each.
            tokens: ids (texts, tokens), padded at the end; target: the same, IGNORE where nothing is to be predicted.
            prompt: the prefix, where it was read already; it stays as it is.
        """
        prompt = prompt or self.read(prefix)
        self.language.part = "prefill"
        like = prefix.dtype, self.has_image(prefix)
        parts = len(owner) // TEXTS
        if parts < 2:
            return self._losses(prompt, owner, tokens, target, *like)
        # texts of about one length together, so that little padding is computed
        lengths = lengths_of(target)
        order = lengths.argsort()
        found = []
        for texts in order.tensor_split(parts):
            end = max(1, int(lengths[texts[-1]]))
            found.append(self._losses(prompt, owner[texts], tokens[texts, :end], target[texts, :end], *like))
        return torch.cat(found)[order.argsort()]

    def _losses(
        self, prompt: Read, owner: Tensor, tokens: Tensor, target: Tensor, dtype: torch.dtype, image: bool
    ) -> Tensor:
        first, cache = prompt
        cache = shared(cache)
        if not torch.equal(owner, torch.arange(len(first), device=owner.device)):
            cache.reorder_cache(owner)
        there = target != IGNORE
        at_once, later = there[:, 0].nonzero()[:, 0], there[:, 1:].nonzero()[:, 0]
        words = self.language.embed(tokens[:, :-1]).to(dtype)
        rest = first[:0]
        if len(later):
            rest = self.language(words, cache=cache, take=there[:, 1:].flatten().nonzero()[:, 0], image=image)
        wanted = torch.cat([target[at_once, 0], target[:, 1:][there[:, 1:]]])
        logits = torch.cat([first[owner[at_once]], rest])
        return token_losses(logits, wanted, torch.cat([at_once, later]), len(tokens))

    def logits(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """What is predicted at each token of a text, (batch, tokens, vocabulary).

        Args:
            prefix: everything before the text, embedded; tokens: ids (batch, tokens), padded at the end.
        """
        words = self.language.embed(tokens[:, :-1]).to(prefix.dtype)
        self.language.part = "prefill"
        return self.language(torch.cat([prefix, words], dim=1), first=prefix.shape[1] - 1, image=self.has_image(prefix))

    def loss(self, prefix: Tensor, tokens: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy over the tokens of a batch that are to be predicted.

        Args:
            prefix: everything before the text, embedded; tokens: ids (batch, tokens), padded at the end.
            target: the same with IGNORE where nothing is to be predicted: questions and padding.
        """
        self.language.span = None
        if self.layout is not None:
            logits, target = logits_in_rows(self, self.layout, prefix, tokens, target)
        else:
            text = prefix.shape[1] - 1
            around = len(self.before), prefix.shape[1] - len(self.after)
            ends = text + lengths_of(target) - 1
            self.language.span = Span(around if self.has_image(prefix) else (0, 0), text, ends)
            logits = self.logits(prefix, tokens)
        return F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), ignore_index=IGNORE)


def lengths_of(target: Tensor) -> Tensor:
    """Tokens of each text up to the last one that is to be predicted, (texts,); target: see `Captioner.loss`."""
    return (target != IGNORE).long().flip(1).cumsum(dim=1).gt(0).sum(dim=1)


def token_losses(logits: Tensor, target: Tensor, owner: Tensor, texts: int) -> Tensor:
    """Of each text its summed cross entropy, its tokens, and those of them that were the likeliest: (texts, 3).

    Args:
        logits: (n, vocabulary) wherever something is to be predicted; target: (n,) what; owner: (n,) of which text.
    """
    loss = F.cross_entropy(logits.float(), target, reduction="none")
    right = (logits.argmax(dim=-1) == target).to(loss)
    return loss.new_zeros(texts, 3).index_add_(0, owner, torch.stack([loss, torch.ones_like(loss), right], dim=1))
