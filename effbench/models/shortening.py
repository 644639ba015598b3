"""Removing image tokens inside a decoder while it reads a prompt, so that later layers and their caches hold fewer.

The library runs its own layers: hooks shorten what each is given, and fit masks and positions to what is left.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from effbench.errors import UsageError

REFUSED = "use a decoder of the Llama or Qwen2 family without sliding windows"


class Seen(NamedTuple):
    """What a choice is made from.

    Args:
        tokens: (batch, tokens, width) the states that enter the layer.
        image: (batch, n) where the image tokens stand among them, ascending.
        row: (batch, tokens) attention of the prompt's last token in the layer before, mean over heads; None if not
            asked for.
        keys: (batch, tokens, heads, head width) of the layer before; None if not asked for.
        text: (batch, tokens) True for the prompt's text: neither image nor padding nor what is written behind it.
        images: of each prompt.
    """

    tokens: Tensor
    image: Tensor
    row: Tensor | None
    keys: Tensor | None
    text: Tensor
    images: int

    @property
    def patches(self) -> Tensor:
        """States of the image tokens (batch, n, width)."""
        return at(self.tokens, self.image)


class Kept(NamedTuple):
    """Which image tokens stay.

    Args:
        index: (batch, kept) 0 to n - 1, each once; they stay in the order in which they stood.
        values: (batch, kept, width) what takes their places; None leaves them as they are.
    """

    index: Tensor
    values: Tensor | None = None


class Choice(nn.Module):
    """What a method puts before a layer of the decoder to choose image tokens. It is overhead.

    Class attributes:
        name: the method's name, for messages.
        watches: "row" or "keys" of the layer before, "" for neither.
        renumbers: what stays gets positions as if nothing had been removed; if not, tokens keep theirs.
    """

    is_overhead: ClassVar[bool] = True
    name: ClassVar[str] = "a method"
    watches: str = ""
    renumbers: bool = False

    def forward(self, seen: Seen) -> Kept | None:
        """Choose; None keeps all. The number may not depend on what the tokens hold."""
        raise NotImplementedError


class Stage(NamedTuple):
    """What is left behind a choice.

    Args:
        origin: (batch, left) which of the tokens of the sequence that enters the first layer each is.
        entered: length of that sequence.
    """

    origin: Tensor
    entered: int

    @property
    def gone(self) -> int:
        return self.entered - self.origin.shape[1]


class Shortener(nn.Module):
    """The choices of one decoder, and what they left of the prompt that was read last.

    Attributes:
        choices: by layer (0-based) the choice that stands before it; "0" acts before the decoder begins.
        left: by layer what its choice left of the last prompt.
    """

    def __init__(self, body: nn.Module, layers: nn.ModuleList, two_dimensional: bool) -> None:
        super().__init__()
        from effbench.models.watching import ClassOrLast

        for each in layers:
            each.register_forward_pre_hook(self.enter, with_kwargs=True)
        self.choices = nn.ModuleDict()
        self.watch = ClassOrLast()
        self.renumbers = False
        self.two_dimensional = two_dimensional  # positions that cannot be renumbered
        self.body = [body]  # in a list: it is no part of this
        self.left: dict[int, Stage] = {}
        self._forget()

    def put(self, layer: int, choice: Choice) -> None:
        """Put a choice before a layer; see `effbench.models.decoder.Decoder.shorten`."""
        from effbench.models.watching import ATTENTION

        (body,) = self.body
        if not self.choices:
            self.renumbers = choice.renumbers and not self.two_dimensional
        if choice.watches and body.config._attn_implementation != ATTENTION:
            body.set_attn_implementation(ATTENTION)
        self.choices[str(layer)] = choice

    def _forget(self) -> None:
        self.active = self.reading = False
        self.layer = 0
        self.now: Stage | None = None
        self.image = self.real = None
        self.images = 0
        self.made: dict[str, tuple[Any, Any]] = {}  # what the layers since the last choice were given, and got

    # what the language model calls

    def begin(
        self, x: Tensor, places: Tensor | None, cache: Any, mask: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Before the layers run: what they are given of tokens, mask and positions.

        Args:
            x: embedded tokens (batch, tokens, width).
            places: (tokens of the prompt,) which are image tokens; None where the sequences hold no image.
            cache, mask, positions: as `Language.forward` has them; positions are never None behind a prompt.
        """
        self._forget()
        self.reading = cache is None or cache.get_seq_length() == 0
        self.padded = mask is not None
        if not self.reading:
            self.left = left_of(cache)
            self.active = bool(self.left)
            if 0 in self.left:
                first = self.left[0]
                mask = None if mask is None else columns(mask, first.origin, first.entered)
                if self.renumbers:
                    positions = positions - first.gone
            return x, mask, positions
        if places is None:
            return x, mask, positions
        self.active, self.left = True, {}
        if cache is not None:
            cache.shortened = self.left  # filled as the layers run
        self.behind = 0 if cache is not None else x.shape[1] - len(places)  # text that is not the prompt's
        index = places.nonzero()[:, 0]
        self.images = 1 + int((index.diff() > 1).sum())
        padding = 0 if mask is None else (mask == 0).sum(dim=1, keepdim=True)  # at the front
        self.image = index.expand(len(x), -1) + padding
        self.real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.bool().clone()
        self.real[:, x.shape[1] - self.behind :] = False  # a choice must not depend on what is written later
        if "0" not in self.choices:
            return x, mask, positions
        batch, entered = x.shape[:2]
        found = self._choose(0, x)
        if found is None:
            return x, mask, positions
        x, origin = found
        if positions is not None and not self.renumbers:
            positions = positions.take_along_dim(origin if positions.ndim == 2 else origin[None], dim=-1)
        elif positions is not None:
            positions = positions[..., : x.shape[1]]
        elif not self.renumbers:
            positions = origin
        self.left[0] = Stage(origin, entered)
        mask = None if mask is None else mask.gather(1, origin)
        if mask is None and cache is None and not self.renumbers:
            mask = origin.new_ones(batch, x.shape[1])  # else the library takes the gaps in positions for new sequences
        return x, mask, positions

    def gone(self) -> dict[int, int]:
        """By layer how many tokens of the last prompt were removed before it."""
        first = self.left[0].gone if 0 in self.left else 0
        return {layer: stage.gone + (first if layer else 0) for layer, stage in sorted(self.left.items())}

    # what the layers call

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer runs."""
        layer, self.layer = self.layer, self.layer + 1
        if not self.active:
            return None
        tokens = args[0] if args else kwargs["hidden_states"]
        if layer and self.reading and str(layer) in self.choices:
            tokens = self._drop(layer, tokens)
        if layer and layer in self.left:
            self.now, self.made = self.left[layer], {}
        kwargs = kwargs | {name: self._fitted(name, kwargs[name], tokens, kwargs) for name in FITTED if name in kwargs}
        later = str(layer + 1)
        if self.reading and later in self.choices and self.choices[later].watches:
            kwargs["watched_by"] = self.watch.of(self.choices[later].watches, -1 - self.behind)
        if args:
            return (tokens, *args[1:]), kwargs
        return args, kwargs | dict(hidden_states=tokens)

    def _drop(self, layer: int, tokens: Tensor) -> Tensor:
        """What a choice leaves of the tokens that enter a layer behind the first."""
        found = self._choose(layer, tokens)
        if found is None:
            return tokens
        left, origin = found
        before = self.now
        whole = (
            Stage(origin, tokens.shape[1])
            if before is None
            else before._replace(origin=before.origin.gather(1, origin))
        )
        self.left[layer] = whole
        return left

    def _choose(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
        """What is left of tokens, and which of them that is (batch, left); None for all."""
        choice = self.choices[str(layer)]
        row, keys = self.watch.taken()
        if choice.watches and (row if choice.watches == "row" else keys) is None:
            raise UsageError(f"{choice.name} cannot see the attention of this decoder", REFUSED)
        text = self.real.scatter(1, self.image, False)
        kept = choice(Seen(tokens, self.image, row, keys, text, self.images))
        if kept is None:
            return None
        index, order = kept.index.sort(dim=1)
        places = self.image.gather(1, index)
        if kept.values is not None:
            tokens = tokens.scatter(1, wide(places, tokens), at(kept.values, order).to(tokens.dtype))
        stays = torch.ones(tokens.shape[:2], dtype=torch.uint8, device=tokens.device)
        stays.scatter_(1, self.image, 0).scatter_(1, places, 1)
        left = tokens.shape[1] - self.image.shape[1] + index.shape[1]
        origin = (1 - stays).argsort(dim=1, stable=True)[:, :left]  # those that stay, in order; without asking how many
        self.real = self.real.gather(1, origin)
        self.image = (stays.cumsum(dim=1).gather(1, places) - 1).long()
        return at(tokens, origin), origin

    def _fitted(self, name: str, given: Any, tokens: Tensor, kwargs: dict[str, Any]) -> Any:
        """A layer's mask or positions for what is left."""
        if self.now is None or given is None:
            return given
        known = self.made.get(name)
        if known is None or known[0] is not given:
            fit = self._mask if name == "attention_mask" else self._positions
            known = self.made[name] = given, fit(given, tokens, kwargs)
        return known[1]

    def _mask(self, mask: Tensor, tokens: Tensor, _: dict[str, Any]) -> Tensor:
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise UsageError("decoder_prune cannot shorten the masks of this decoder's attention", REFUSED)
        origin = self.now.origin
        if self.reading:
            return mask.take_along_dim(origin[:, None, :, None], 2).take_along_dim(origin[:, None, None, :], 3)
        if self.padded:
            return columns(mask[:, 0], origin[:, None], self.now.entered)[:, None]
        return mask[..., self.now.gone :]  # what was read is seen by all that follows

    def _positions(self, given: Any, tokens: Tensor, kwargs: dict[str, Any]) -> Any:
        """Of position ids (..., batch or 1, tokens), or of the pair of cosines and sines (..., tokens, head width)."""
        pair = isinstance(given, tuple)
        if self.reading:
            origin, left = self.now.origin, self.now.origin.shape[1]
            if pair and self.renumbers:
                return tuple(each[..., :left, :] for each in given)
            if pair:
                return tuple(each.take_along_dim(origin[..., None], dim=-2) for each in given)
            return given[..., :left] if self.renumbers else given.take_along_dim(origin, dim=-1)
        if not self.renumbers:
            return given
        if pair:
            return self.body[0].rotary_emb(tokens, kwargs["position_ids"] - self.now.gone)
        return given - self.now.gone


def left_of(cache: Any) -> dict[int, Stage]:
    """What choices left of the prompt whose keys and values a cache holds, by layer."""
    return getattr(cache, "shortened", {})


def tokens_read(cache: Any) -> int:
    """Tokens that a cache stands for, those that were removed before the first layer included."""
    left = left_of(cache)
    return cache.get_seq_length() + (left[0].gone if 0 in left else 0)


FITTED = ("attention_mask", "position_embeddings", "position_ids")


def columns(mask: Tensor, origin: Tensor, entered: int) -> Tensor:
    """A mask (..., tokens read and written) without the columns of what was removed of the `entered` ones.

    Args:
        origin: (batch, ..., left); the mask may have several rows for each of its rows, one for every beam.
    """
    origin = origin.repeat_interleave(len(mask) // len(origin), dim=0)
    written = torch.arange(entered, mask.shape[-1], device=mask.device).expand(*origin.shape[:-1], -1)
    return mask.take_along_dim(torch.cat([origin, written], dim=-1), dim=-1)


def at(x: Tensor, index: Tensor) -> Tensor:
    """x (batch, tokens, width) at index (batch, k)."""
    return x.gather(1, wide(index, x))


def wide(index: Tensor, like: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, like.shape[-1])
