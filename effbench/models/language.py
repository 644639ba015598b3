"""Language models for captioners: a tiny Llama of chosen depth and width, or any causal one of transformers.

Weights are read from safetensors alone, and no code that lies beside them is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from effbench.errors import InvalidError, UsageError
from effbench.models.captioner import Language

CONTEXT = 2048  # most tokens of a sequence of the tiny decoder
HEAD = 64  # width of its attention heads


class Words(Protocol):
    """Text to ids and back; `start` stands before every text, `end` behind it."""

    start: int
    end: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def __len__(self) -> int: ...


class Tokenizer:
    """A tokenizer of transformers as `Words`."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise InvalidError(f"the tokenizer of {name} has no end-of-text token", "set eos_token in its files")
        self.end = tokenizer.eos_token_id
        self.start = self.end if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        ids = list(ids)
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def __len__(self) -> int:
        return len(self.tokenizer)


def tiny(words: int, layers: int, width: int) -> Language:
    """A Llama with random weights.

    Raises:
        UsageError: the width is no multiple of the heads' 64.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    check_width(width)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=-(-width * 8 // 3 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // HEAD),
        num_key_value_heads=max(1, width // HEAD),
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    return Language(model.model, model.lm_head)


def check_width(width: int) -> None:
    """Refuse a width that the heads of the tiny decoder do not divide."""
    if width % HEAD and width not in (8, 16, 32):
        raise UsageError(
            f"--decoder-width {width} is no multiple of {HEAD}, the width of a head",
            f"the nearest are {max(HEAD, width // HEAD * HEAD)} and {(width // HEAD + 1) * HEAD}",
        )


def pretrained(name: str) -> tuple[Language, Words, int]:
    """A causal language model on disk or on the hub, its tokenizer and its context.

    Raises:
        InvalidError: it is neither here nor to be had, or model and tokenizer do not fit each other.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from effbench.models.choose import hub

    try:
        with hub():
            # outside of autocast's reach, and never by pickle
            model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, dtype="float32")
            tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # libraries raise anything on a bad folder
        where = "its files are damaged" if Path(name).is_dir() else "there is no such folder, and the hub has none"
        reason = " ".join(str(error).split())[:200]
        raise InvalidError(
            f"hf:{name} cannot be loaded, {where}: {reason}",
            "give the folder of a causal language model in safetensors",
        ) from error
    words = Tokenizer(tokenizer, name)
    rows = model.get_input_embeddings().num_embeddings
    if len(words) > rows:
        raise InvalidError(
            f"the tokenizer of hf:{name} has {len(words)} tokens, its model embeds {rows}",
            "use the tokenizer that the model was trained with",
        )
    context = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", CONTEXT)
    return Language(model.get_decoder(), model.get_output_embeddings()), words, context
