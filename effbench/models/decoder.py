"""The decoder view: what a method sees of a causal language model of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from effbench.errors import UsageError
from effbench.models.shortening import REFUSED, Choice, Shortener

if TYPE_CHECKING:
    from effbench.models.captioner import Language

See = Callable[[int, Tensor], object]


class Decoder:
    """One stack of decoder layers; the library runs it, so that hooks on a layer see its hidden states.

    Attributes:
        name: the library's class, for messages.
        language: the language model.
        module: its body, which holds the layers.
        blocks: the layers, in order.
        width: of the tokens.
    """

    def __init__(self, language: Language) -> None:
        self.language = language
        self.module = language.body
        self.name = type(language.body).__name__
        self.width = language.width
        self.blocks = layers_of(language.body)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def stem(self) -> nn.Module:
        """What makes tokens of ids."""
        return self.module.get_input_embeddings()

    def keep_blocks(self, kept: Iterable[int]) -> None:
        """Remove all layers but some, in place; keys of the state_dict and of the cache count the rest from 0.

        Raises:
            UsageError: no such layer, or none is left.
        """
        wanted = sorted(set(kept))
        if not wanted:
            raise UsageError(f"no layer of {self.name} would be left", "remove fewer")
        if wanted[0] < 0 or wanted[-1] >= len(self):
            missing = wanted[0] if wanted[0] < 0 else wanted[-1]
            raise UsageError(
                f"layer {missing} does not exist: {self.name} has layers 0 to {len(self) - 1}", "choose other layers"
            )
        layers = [self.blocks[index] for index in wanted]
        kinds = {name: [each[index] for index in wanted] for name, each in self._kinds().items()}
        del self.blocks[:]
        self.blocks.extend(layers)
        self.config.num_hidden_layers = len(layers)
        for name, left in kinds.items():
            setattr(self.config, name, left)
        for index, layer in enumerate(layers):
            for part in layer.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = index

    def shorten(self, layer: int, choice: Choice) -> None:
        """Let a choice remove image tokens before a layer (0-based; 0: before the decoder begins).

        Raises:
            UsageError: no such layer, nothing came before it to look at, or this decoder cannot be shortened.
        """
        if not 0 <= layer < len(self):
            raise UsageError(
                f"{choice.name}: layer {layer} does not exist: {self.name} has layers 0 to {len(self) - 1}",
                "choose a lower layer",
            )
        if choice.watches and layer == 0:
            raise UsageError(
                f"{choice.name} looks at the attention of the layer before, and there is none before layer 0",
                "use layer=1 or more",
            )
        windows = "sliding_attention" in (getattr(self.config, "layer_types", None) or ())
        if windows or "position_embeddings" not in inspect.signature(type(self.blocks[0]).forward).parameters:
            why = "it has sliding windows" if windows else "its layers are not given positions"
            raise UsageError(f"{choice.name} cannot remove tokens inside a {self.name}: {why}", REFUSED)
        language = self.language
        if language.shortener is None:
            language.shortener = Shortener(self.module, self.blocks, language.grid is not None)
        if str(layer) in language.shortener.choices:
            raise UsageError(f"{choice.name} acts before layer {layer} already", "apply it once")
        language.shortener.put(layer, choice)

    def _kinds(self) -> dict[str, list[str]]:
        """What the configuration says of each layer, by name: the kind of its attention, of its MLP."""
        held = {name: getattr(self.config, name, None) for name in ("layer_types", "mlp_layer_types")}
        return {name: list(each) for name, each in held.items() if each}

    @contextmanager
    def seeing(self, see: See) -> Iterator[None]:
        """While it lasts, `see(depth, tokens)` is shown the states (batch, tokens, width) before the first layer (depth
        0) and behind each layer (depth 1 to the number of layers). What it returns is not looked at."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(0, args[0] if args else kwargs["hidden_states"])

        def behind(depth: int, _: nn.Module, __: Any, out: Any) -> None:
            see(depth, out if isinstance(out, Tensor) else out[0])

        with ExitStack() as undo:
            undo.callback(self.blocks[0].register_forward_pre_hook(before, with_kwargs=True).remove)
            for index, block in enumerate(self.blocks):
                undo.callback(block.register_forward_hook(partial(behind, index + 1)).remove)
            yield

    @contextmanager
    def showing_attention(self, see: See) -> Iterator[None]:
        """While it lasts, `see(layer, attention)` is shown each layer's attention (batch, heads, queries, keys).

        Raises:
            UsageError: the library's attention of this model cannot give it.
        """
        parts = [_attention(block) for block in self.blocks]
        if None in parts:
            raise self._no_attention()

        def shown(index: int, _: nn.Module, __: Any, out: Any) -> None:
            weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
            if not isinstance(weights, Tensor) or weights.ndim != 4:
                raise self._no_attention()
            see(index, weights)

        before = self.config._attn_implementation
        with ExitStack() as undo:
            if before != "eager":  # the one that computes the whole matrix
                undo.callback(self.module.set_attn_implementation, before)
                try:
                    self.module.set_attn_implementation("eager")
                except (ValueError, AttributeError) as error:
                    raise self._no_attention() from error
                if self.config._attn_implementation != "eager":  # the library only warns
                    raise self._no_attention()
            for index, attention in enumerate(parts):
                undo.callback(attention.register_forward_hook(partial(shown, index)).remove)
            yield

    def _no_attention(self) -> UsageError:
        return UsageError(
            f"{self.name} cannot give the rows of its attention, which this choice of layers looks at",
            "choose layers by another criterion, e.g. by=block_influence",
        )


def _attention(block: nn.Module) -> nn.Module | None:
    """The self-attention of a layer: what the library calls attn, self_attn, attention or self_attention."""
    return next((part for name, part in block.named_children() if name.endswith(("attn", "attention"))), None)


def layers_of(body: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a model of transformers.

    Raises:
        UsageError: there is none that is as long as the configuration says.
    """
    count = body.config.num_hidden_layers
    found = [
        m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == count and len({type(x) for x in m}) == 1
    ]
    if not found:
        raise UsageError(
            f"{type(body).__name__} has no list of {count} equal layers", "use a decoder such as Llama, Qwen or GPT-2"
        )
    return found[0]


def decoder_of(language: Language) -> Decoder:
    """The decoder view of a captioner's language model."""
    return Decoder(language)
