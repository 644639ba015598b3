"""Backbones: where the towers come from. `timm:NAME`, `openclip:NAME` and the small tower that ships with effbench.

Weights are read from safetensors or by `torch.load(weights_only=True)`; nothing is ever unpickled.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.models.dual_encoder import DualEncoder, TimmFeatures
from effbench.models.patch_tokens import OpenClipTokens, TimmTokens
from effbench.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from effbench.records import Protocol

EMBEDDING = 256  # width of the joint space where the backbone brings none
TEXT = dict(width=256, heads=4, layers=2)  # the small text tower
CONTEXT = 32  # its most tokens


class Backbone(ABC):
    """A source of towers. The weights are read once; every call of `dual_encoder` gives a model with fresh copies.

    Args:
        name: the model's name within its family.
        weights: file of weights; "random" for none (FLOPs and time only); None with no `pretrained` is an error.
        pretrained: a tag that the library downloads or has in its cache.
        image_size: side in pixels; None for the backbone's own.
        single_use: the one model that is asked for takes the loaded weights themselves, not a copy.

    Attributes:
        image_size, mean, std: what the image tower expects.
        weights_id: "sha256:..." of the weights as loaded, or "random".
        has_text: the backbone brings its own text tower and tokenizer.
        brings_weights: no file of weights is looked for.
        writes: it is a whole vision-language model, with a `captioner` of its own in place of towers.
        notes: what whoever reads its results should know.
    """

    family: ClassVar[str]
    has_text: ClassVar[bool] = False
    brings_weights: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    notes: tuple[str, ...] = ()
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __init__(
        self,
        name: str,
        weights: Path | str | None = None,
        pretrained: str | None = None,
        image_size: int | None = None,
        single_use: bool = False,
    ) -> None:
        if weights is not None and pretrained is not None:
            raise UsageError("--weights and --pretrained exclude each other", "give one of them")
        self.name = name
        self.single_use = single_use
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same in every run
            self.reference = self._create(name, weights, pretrained, image_size)
        self.reference.requires_grad_(True).eval()
        #: arguments that make this backbone again in another process
        self.origin = dict(family=self.family, name=name, weights=weights, pretrained=pretrained, image_size=image_size)
        self.weights_id = "random" if weights == "random" else "sha256:" + digest(self.reference.state_dict())

    def __str__(self) -> str:
        return f"{self.family}:{self.name}"

    def _fresh(self) -> nn.Module:
        return self.reference if self.single_use else copy.deepcopy(self.reference)

    @abstractmethod
    def _create(self, name: str, weights: Path | str | None, pretrained: str | None, size: int | None) -> nn.Module:
        """The library's model with its weights; also sets image_size, mean and std."""

    @abstractmethod
    def dual_encoder(self, protocol: Protocol, vocabulary: tuple[int, int] | None) -> DualEncoder:
        """A fresh dual encoder.

        Args:
            vocabulary: words and context of the task's own vocabulary; None where the backbone has a text tower.
        """

    def patch_tokens(self) -> nn.Module:
        """A fresh image tower that gives the tokens of all patches, for a captioner (see `models.patch_tokens`)."""
        raise UsageError(f"{self} has no image tower that a captioner could use", "use a ViT of timm or OpenCLIP")

    def tokenizer(self, captions: Sequence[str]) -> Callable[[Sequence[str]], Tensor]:
        """Captions -> ids (captions, context). `captions` are the training captions that a vocabulary is made of."""
        return Vocabulary(captions, CONTEXT)


class Timm(Backbone):
    """timm's vision transformers, e.g. timm:deit_tiny_patch16_224."""

    family = "timm"

    def _create(self, name, weights, pretrained, size):
        import timm

        if not timm.is_model(name):
            raise UsageError(f"timm has no model named {name!r}", _closest(name, timm.list_models()))
        tagged = f"{name}.{pretrained}" if pretrained not in (None, "default") else name
        options = dict(num_classes=0) | ({} if size is None else dict(img_size=size))
        try:
            model = timm.create_model(tagged if pretrained else name, pretrained=pretrained is not None, **options)
        except TypeError as error:
            raise UsageError(f"timm:{name} does not take an image size: {error}", "leave --image-size out") from error
        except Exception as error:
            if pretrained is None:
                raise
            raise _not_downloaded(f"timm:{tagged}", error) from error
        config = timm.data.resolve_model_data_config(model)
        self.image_size, self.mean, self.std = size or config["input_size"][-1], config["mean"], config["std"]
        if weights not in (None, "random"):
            load_into(model, weights, _timm_filter)
        elif weights is None and pretrained is None:
            raise _no_weights(f"timm:{name}")
        return model

    def patch_tokens(self):
        return TimmTokens(self._fresh())

    def dual_encoder(self, protocol, vocabulary):
        from open_clip.transformer import TextTransformer

        image = TimmFeatures(self._fresh())
        words, context = vocabulary
        text = TextTransformer(vocab_size=words, context_length=context, output_dim=EMBEDDING, **TEXT)
        return DualEncoder(image, text, nn.Linear(image.width, EMBEDDING), protocol.head, EMBEDDING)


class Shipped(Timm):
    """The small tower inside the package, trained on drawn scenes: shipped:scenes_vit."""

    family = "shipped"
    brings_weights = True

    def _create(self, name, weights, pretrained, size):
        from safetensors import safe_open
        from timm.models.vision_transformer import VisionTransformer

        if pretrained is not None or weights not in (None, "random"):
            raise UsageError(f"shipped:{name} comes with its own weights", "leave --weights and --pretrained out")
        file = resources.files("effbench.models") / "shipped" / f"{Path(name).name}.safetensors"
        with resources.as_file(file) as path:
            if not path.is_file():
                raise UsageError(f"effbench ships no tower named {name!r}", "try --backbone shipped:scenes_vit")
            with safe_open(path, "pt") as stored:
                facts = stored.metadata()
            architecture = json.loads(facts["architecture"])
            if size is not None:
                architecture["img_size"] = size
            model = VisionTransformer(**architecture)
            self.image_size = architecture["img_size"]
            self.mean, self.std = tuple(json.loads(facts["mean"])), tuple(json.loads(facts["std"]))
            if weights != "random":
                load_into(model, path, _timm_filter)
        return model


class OpenClip(Backbone):
    """OpenCLIP's models with both towers, e.g. openclip:ViT-B-32."""

    family = "openclip"
    has_text = True

    def _create(self, name, weights, pretrained, size):
        import open_clip

        if name not in open_clip.list_models():
            raise UsageError(f"OpenCLIP has no model named {name!r}", _closest(name, open_clip.list_models()))
        try:
            logging.disable(logging.WARNING)  # it warns of the random weights that were asked for
            model = open_clip.create_model(
                name,
                pretrained=pretrained,
                force_custom_text=True,
                force_image_size=size,
                load_weights=pretrained is not None,
            )
        except Exception as error:
            if pretrained is None:
                raise UsageError(f"OpenCLIP cannot make {name!r}: {error}", "choose a model with ViT towers") from error
            raise _not_downloaded(f"openclip:{name} ({pretrained})", error) from error
        finally:
            logging.disable(logging.NOTSET)
        if weights not in (None, "random"):
            load_into(model, weights, _openclip_filter)
        elif weights is None and pretrained is None:
            raise _no_weights(f"openclip:{name}")
        side = model.visual.image_size
        self.image_size = side[0] if isinstance(side, tuple) else side
        config = open_clip.get_model_preprocess_cfg(model)
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        return model

    def tokenizer(self, captions):
        import open_clip

        return open_clip.get_tokenizer(self.name)

    def patch_tokens(self):
        return OpenClipTokens(self._fresh().visual)

    def dual_encoder(self, protocol, vocabulary):
        model = self._fresh()
        width = model.visual.output_dim
        scale = None if protocol.head == "sigmoid" else model.logit_scale.item()
        return DualEncoder(model.visual, model.text, nn.Identity(), protocol.head, width, scale)


def load_into(model: nn.Module, path: Path | str, adapt: Callable[[dict, nn.Module], dict]) -> None:
    """Load a file of weights into a model, strictly.

    Args:
        adapt: maps the file's state to the model's keys and shapes (position embeddings of another image size).

    Raises:
        InvalidError: the file is missing, truncated, of another kind, or does not fit.
    """
    state = read_weights(path)
    try:
        state = adapt(state, model)
        _check_shapes(path, state, model)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, KeyError, ValueError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InvalidError(f"the weights in {path} do not fit {type(model).__name__}: {reason}", _FIT_HINT) from error
    if missing or unexpected:
        what = [
            f"{len(k)} {w} ({', '.join(k[:3])}...)" for k, w in ((missing, "missing"), (unexpected, "unknown")) if k
        ]
        raise InvalidError(
            f"the weights in {path} do not fit {type(model).__name__}: keys {' and '.join(what)}", _FIT_HINT
        )


def _check_shapes(path: Path | str, state: dict[str, Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    wrong = [key for key in state if key in own and state[key].shape != own[key].shape]
    if wrong:
        found, wanted = (tuple(some[wrong[0]].shape) for some in (state, own))
        raise InvalidError(
            f"the weights in {path} do not fit {type(model).__name__}: {wrong[0]} is {found} in the file, "
            f"{wanted} in the model, and {len(wrong) - 1} more differ",
            _FIT_HINT,
        )


_FIT_HINT = "name the model that the file was saved from with --backbone"


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """A state dict from safetensors, or from torch.load(weights_only=True).

    Raises:
        InvalidError: missing, truncated or not a file of weights.
    """
    path = Path(path)
    if path.is_dir():
        raise InvalidError(
            f"{path} is a folder, not a file of weights", "name the file, or set EFFBENCH_WEIGHTS to the folder"
        )
    if not path.is_file():
        raise InvalidError(f"no weights file at {path}", "check --weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidError(
            f"{path} is not a readable file of weights ({type(error).__name__} while reading it)",
            "use safetensors, or a file that torch.load(weights_only=True) accepts",
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InvalidError(f"{path} holds no state dict", "save model.state_dict() as safetensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def digest(state: dict[str, Tensor]) -> str:
    """First 16 hex digits of the sha256 of a state dict's names and bytes."""
    hashed = hashlib.sha256()
    for key in sorted(state):
        hashed.update(key.encode())
        hashed.update(state[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


def _timm_filter(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    own = model.state_dict()
    state = {key: value for key, value in state.items() if key in own or not key.startswith(("head.", "head_dist."))}
    return checkpoint_filter_fn(state, model) if isinstance(model, VisionTransformer) else state


def _openclip_filter(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed

    state = convert_to_custom_text_state_dict(state)
    state.pop("text.attn_mask", None)
    resize_pos_embed(state, model)
    own = model.state_dict()
    for key in ("logit_bias", "text.transformer.embeddings.position_ids"):
        if key not in own:
            state.pop(key, None)
    return state


def _no_weights(what: str) -> EffbenchError:
    return InvalidError(
        f"no weights were named for {what}",
        "give --weights FILE or --pretrained TAG; --weights random measures time and FLOPs alone",
    )


def _not_downloaded(what: str, error: Exception) -> EffbenchError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return InvalidError(
        f"the pretrained weights of {what} are neither in the library's cache nor could they be downloaded: {reason}",
        "download them on a machine with a connection and give --weights FILE",
    )


def _closest(name: str, known: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, 3)
    return f"did you mean {', '.join(close)}?" if close else "effbench list backbones tells the families"
