"""Language models for captioners: a tiny Llama of chosen depth and width, or any causal one of transformers.

Weights are read from safetensors alone, and no code that lies beside them is run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.models.captioner import Language
from effbench.models.choose import hub

CONTEXT = 2048  # most tokens of a sequence of the tiny decoder, and where a model names no limit
HEAD = 64  # width of the tiny decoder's attention heads
TOLERANCE = 1e-4  # of the largest logit: how far effbench's and the library's logits may differ


class Words(Protocol):
    """Text to ids and back; `start` stands before every text, `end` behind it."""

    start: int
    end: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def __len__(self) -> int: ...


class Tokenizer:
    """A tokenizer of transformers as `Words`.

    Args:
        rows: ids that the model embeds.

    Raises:
        InvalidError: it has no end-of-text token, or more ids than the model embeds.
    """

    def __init__(self, tokenizer: Any, name: str, rows: int) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise InvalidError(f"the tokenizer of {name} has no end-of-text token", "set eos_token in its files")
        if len(tokenizer) > rows:
            raise InvalidError(
                f"the tokenizer of {name} has {len(tokenizer)} tokens, its model embeds {rows}",
                "use the tokenizer that the model was trained with",
            )
        self.end = tokenizer.eos_token_id
        self.unknown: int | None = tokenizer.unk_token_id
        self.start = self.end if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        ids = list(ids)
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def __len__(self) -> int:
        return len(self.tokenizer)


def tiny(words: int, layers: int, width: int, init: float = 0.02) -> Language:
    """A Llama with random weights, of standard deviation `init`.

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
        initializer_range=init,
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


def pretrained(name: str, single_use: bool = False) -> tuple[Language, Words, int]:
    """A fresh causal language model from disk or the hub, its tokenizer and its context.

    The files are read and the model is checked once per process.

    Args:
        single_use: nothing is kept and nothing checked again: for a process that measures this one model.

    Raises:
        InvalidError: it is neither here nor to be had, or model and tokenizer do not fit each other.
        UsageError: effbench cannot run it as its library does.
    """
    if single_use:
        return _load(name, check=False)
    language, words, context = reference(name)
    return copy.deepcopy(language), words, context


@lru_cache(maxsize=1)
def reference(name: str) -> tuple[Language, Words, int]:
    """What `pretrained` copies; not to be changed."""
    return _load(name, check=True)


def _load(name: str, check: bool) -> tuple[Language, Words, int]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    told = f"hf:{name}"
    with library_files(name, "a causal language model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.is_encoder_decoder:
            raise UsageError(f"{told} is an encoder with a decoder ({config.model_type})", ONE_STACK)
        model = whole(AutoModelForCausalLM, name, told)
        words = Tokenizer(tokenizer_of(AutoTokenizer, name), told, model.get_input_embeddings().num_embeddings)
    language = Language(model.get_decoder(), model.get_output_embeddings()).eval()
    if check:
        _check(language, model, f"{told} ({type(model).__name__})")
    return language, words, context_of(model.config)


ONE_STACK = "use a causal language model such as Llama, Qwen, SmolLM or GPT-2"


def context_of(config: Any) -> int:
    """Most tokens of a sequence; `CONTEXT` where the model names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or CONTEXT


@contextmanager
def library_files(name: str, what: str) -> Iterator[None]:
    """Whatever transformers raises while it reads a model's files becomes one message; it shows no bars of its own.

    Args:
        name: a folder, or a name on the hub. what: that it should hold.
    """
    from transformers.utils import logging

    folder = Path(name).is_dir()
    if not folder and name.startswith(("/", ".", "~")):
        raise InvalidError(f"hf:{name}: there is no such folder", "check the path")
    if folder and not (Path(name) / "config.json").is_file():
        raise InvalidError(f"hf:{name} has no config.json", f"give {what}, as save_pretrained writes it")
    weights = {path.suffix for path in Path(name).iterdir()} & {".safetensors", ".bin", ".pt", ".pth"} if folder else ()
    if weights and ".safetensors" not in weights:
        raise InvalidError(
            f"hf:{name} holds pickled weights alone, which could run any code and are not read",
            "save it again as safetensors (save_pretrained of a recent transformers)",
        )
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with hub(local=folder):
            yield
    except EffbenchError:
        raise
    except Exception as error:  # libraries raise anything on a bad folder
        where = "in its files" if folder else "there is no such folder, and the hub has none or cannot be reached"
        reason = " ".join(str(error).split())[:200]
        raise InvalidError(f"hf:{name} cannot be loaded, {where}: {reason}", f"give {what} in safetensors") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def whole(kind: Any, name: str, told: str) -> nn.Module:
    """A model of transformers in float32 with all of its weights, in evaluation mode.

    Args:
        kind: one of the library's Auto classes. told: what messages call the model.

    Raises:
        InvalidError: the files lack some, or some do not fit the configuration.
    """
    model, found = kind.from_pretrained(
        name,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # named below
    )
    if other := sorted(found["mismatched_keys"]):
        key, *shapes = other[0]
        held, wanted = ("x".join(map(str, shape)) for shape in shapes)
        raise InvalidError(
            f"the weights of {told} do not fit its config.json: {key} is {held} in the files and {wanted} by the "
            f"configuration ({len(other)} such weights)",
            "take the configuration that the weights were saved with",
        )
    if missing := sorted(found["missing_keys"]):
        raise InvalidError(
            f"the files of {told} lack {len(missing)} of its weights ({', '.join(missing[:3])})",
            "save the whole model: what is missing would be random",
        )
    return model.eval()


def tokenizer_of(kind: Any, name: str) -> Any:
    """The tokenizer in a model's files, or the processor with it; the library makes an empty one where there is none.

    Args:
        kind: one of the library's Auto classes.

    Raises:
        InvalidError: there is none.
    """
    found = kind.from_pretrained(name, trust_remote_code=False)
    tokenizer = found.tokenizer if hasattr(found, "image_processor") else found
    files = {*tokenizer.vocab_files_names.values(), "tokenizer.json"}
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        raise InvalidError(f"hf:{name} has no tokenizer", "save it into the folder (tokenizer.save_pretrained)")
    return found


def _check(language: Language, model: nn.Module, name: str) -> None:
    """Compare with the library: the same logits, from earlier tokens alone, and the same with a cache.

    Raises:
        UsageError: they differ.
    """
    from effbench.models.decoding import new_cache

    rows = model.get_input_embeddings().num_embeddings
    ids = torch.randint(rows, (2, 6), generator=torch.Generator().manual_seed(0))
    other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % rows], dim=1)
    try:
        with torch.no_grad():
            found, changed = (language(language.embed(each)) for each in (ids, other))
            refuse_difference(changed[:, :-1], found[:, :-1], name, "its tokens look at those behind them")
            expected = model(input_ids=ids).logits
            refuse_difference(found, expected, name, "its class does more than its layers and its head")
            cache = new_cache(language)
            language(language.embed(ids[:, :-1]), 0, cache)
            step = language(language.embed(ids[:, -1:]), 0, cache)
            refuse_difference(step, found[:, -1:], name, "it goes on otherwise with a cache of keys and values")
    except EffbenchError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{name} cannot be run as a decoder: {reason}", ONE_STACK) from error


def refuse_difference(found: Tensor, expected: Tensor, name: str, why: str, hint: str = ONE_STACK) -> None:
    """Nothing is measured of a model that does not give its library's own logits.

    Raises:
        UsageError: the largest difference is above `TOLERANCE` of the largest logit.
    """
    apart = (found - expected).abs().max().item()
    if not apart <= TOLERANCE * expected.abs().max().item():
        raise UsageError(f"effbench cannot run {name}: logits differ by {apart:.1e}, since {why}", hint)
