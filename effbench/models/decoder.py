"""The decoder view: what a method sees of a causal language model of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from effbench.errors import UsageError

if TYPE_CHECKING:
    from effbench.models.captioner import Language


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
            raise UsageError(
                f"layer {wanted[-1]} does not exist: {self.name} has layers 0 to {len(self) - 1}", "choose other layers"
            )
        layers = [self.blocks[index] for index in wanted]
        del self.blocks[:]
        self.blocks.extend(layers)
        self.config.num_hidden_layers = len(layers)
        if getattr(self.config, "layer_types", None):
            self.config.layer_types = [self.config.layer_types[index] for index in wanted]
        for index, layer in enumerate(layers):
            for part in layer.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = index

    @contextmanager
    def seeing(self, see: Any) -> Iterator[None]:
        """While it lasts, `see(depth, tokens)` is shown the states (batch, tokens, width) before the first layer (depth
        0) and behind each layer (depth 1 to the number of layers)."""
        with ExitStack() as undo:
            first = self.blocks[0].register_forward_pre_hook(
                lambda _, args, kwargs: see(0, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            undo.callback(first.remove)
            for index, block in enumerate(self.blocks):
                hook = block.register_forward_hook(
                    lambda _, __, out, index=index: see(index + 1, out if isinstance(out, Tensor) else out[0])
                )
                undo.callback(hook.remove)
            yield

    @contextmanager
    def showing_attention(self, see: Any) -> Iterator[None]:
        """While it lasts, `see(layer, attention)` is shown each layer's attention (batch, heads, queries, keys).

        Raises:
            UsageError: the library's attention of this model cannot give it.
        """
        before = self.config._attn_implementation
        try:
            self.module.set_attn_implementation("eager")
        except (ValueError, AttributeError) as error:
            raise self._no_attention() from error
        seen = []

        def shown(index: int, out: Any) -> None:
            weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
            if not isinstance(weights, Tensor) or weights.ndim != 4:
                raise self._no_attention()
            seen.append(index)
            see(index, weights)

        try:
            with ExitStack() as undo:
                for index, block in enumerate(self.blocks):
                    attention = next(
                        (m for name, m in block.named_children() if "attn" in name or "attention" in name), None
                    )
                    if attention is None:
                        raise self._no_attention()
                    hook = attention.register_forward_hook(lambda _, __, out, index=index: shown(index, out))
                    undo.callback(hook.remove)
                yield
        finally:
            self.module.set_attn_implementation(before)

    def _no_attention(self) -> UsageError:
        return UsageError(
            f"{self.name} cannot give the rows of its attention, which this choice of layers looks at",
            "choose layers by another criterion, e.g. by=block_influence",
        )


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
