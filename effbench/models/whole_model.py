"""Whole vision-language models of transformers: `hf:PATH_OR_NAME`, with their own connector, decoder and tokenizer.

LLaVA (arXiv 2304.08485) and what is built like it: images -> tower -> connector -> tokens among those of the text.
A model is taken apart into a `Captioner`, and nothing is measured before that gives the library's own logits.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.models.backbones import Backbone
from effbench.models.captioner import Captioner, Language
from effbench.models.language import Tokenizer, context_of, library_files, refuse_difference, tokenizer_of, whole

if TYPE_CHECKING:
    from effbench.models.watching import ClassOrLast
    from effbench.records import Captioning

#: what libraries call the module between tower and decoder; the last one gathers squares of patches itself
CONNECTORS = ("multi_modal_projector", "connector", "visual.merger")
INSTRUCTION = "Describe the image briefly."
PLAIN = "USER: {image}\n" + INSTRUCTION + " ASSISTANT:"  # of models without a chat template, as LLaVA-1.5 had it
SIDE = 336  # px of the images of models that take any size
PROBE = 512  # px of the image that shows what a model makes of others
KNOWN = "known to work: LLaVA-1.5, SmolVLM and Idefics3 (without image splitting), Qwen2-VL, Qwen2.5-VL"
SPLITTING = ("do_image_splitting", "crop_to_patches", "do_pan_and_scan")  # what image processors call it


class HuggingFace(Backbone):
    """Whole vision-language models of transformers, e.g. hf:llava-hf/llava-1.5-7b-hf, or a folder.

    Images are resized as for every backbone and are not cut into tiles.

    Attributes:
        words: its tokenizer. context: most tokens of a sequence.
        image_tokens: of one image. around: tokens before a text, those of the image included.
    """

    family = "hf"
    brings_weights = True
    writes = True

    def _create(self, name, weights, pretrained, size):
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        if pretrained is not None or weights not in (None, "random"):
            raise UsageError(f"hf:{name} comes with its own weights", "leave --weights and --pretrained out")
        with library_files(name, "a model of the LLaVA family with its processor"):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            if type(config) not in AutoModelForImageTextToText._model_mapping:
                raise UsageError(
                    f"hf:{name} is a {config.model_type}, which does not write about images",
                    f"{KNOWN}; of a language model alone, use --decoder hf:{name}",
                )
            if weights == "random":
                model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
            else:
                model = whole(AutoModelForImageTextToText, name, f"hf:{name}")
            processor = tokenizer_of(AutoProcessor, name)
            if not hasattr(processor, "image_processor"):
                raise InvalidError(f"hf:{name} has no processor of images", "save it into the folder (save_pretrained)")
            rows = model.get_input_embeddings().num_embeddings
            self.words = Tokenizer(processor.tokenizer, f"hf:{name}", rows)
        self.context = context_of(model.config)
        self._told = f"hf:{name} ({type(model).__name__})"
        try:
            self._prepare(model, processor, size)
            if not self.single_use:
                self._check(model, processor)
        except EffbenchError:
            raise
        except Exception as error:  # whatever else a class of the library asks for or gives
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"effbench cannot run {self._told}: {type(error).__name__}: {reason}", KNOWN) from error
        return model

    def _prepare(self, model: nn.Module, processor: Any, size: int | None) -> None:
        """What the model's own processor makes of an image, and of a prompt around it."""
        pictures = processor.image_processor
        for option in SPLITTING:
            if getattr(pictures, option, False):
                setattr(pictures, option, False)
                self.notes = (f"{self._told} sees each image as one tile, where its processor would cut it into many",)
                if most := getattr(pictures, "max_image_size", None):
                    pictures.size = most  # of a tile; else it would scale up to many tiles and down again
        rescaled, normalised = (getattr(pictures, x, True) for x in ("do_rescale", "do_normalize"))
        if not rescaled:
            raise UsageError(f"effbench cannot run {self._told}: its images are not rescaled to [0, 1]", KNOWN)
        self.mean = tuple(pictures.image_mean) if normalised else (0.0, 0.0, 0.0)
        self.std = tuple(pictures.image_std) if normalised else (1.0, 1.0, 1.0)
        seen = _ask(processor, _picture(PROBE, 0))["pixel_values"]
        if seen.ndim == 2:
            self.patch, self.merge = pictures.patch_size, pictures.merge_size
            unit = self.patch * self.merge
            self.frames = pictures.temporal_patch_size
            self.image_size = size or max(unit, SIDE // unit * unit)
            if self.image_size % unit:
                near = max(unit, self.image_size // unit * unit)
                raise UsageError(
                    f"{self._told} takes images of a multiple of {unit} px, not {self.image_size}",
                    f"the nearest are --image-size {near} and {near + unit}",
                )
        else:
            self.patch = self.merge = self.frames = 0
            if seen.shape[-1] != seen.shape[-2] or math.prod(seen.shape[:-3]) != 1:
                raise UsageError(
                    f"effbench cannot run {self._told}: its processor makes {tuple(seen.shape)} of one square image",
                    KNOWN,
                )
            self.image_size = seen.shape[-1]
            if size not in (None, self.image_size):
                raise UsageError(f"{self._told} takes images of {self.image_size} px", "leave --image-size out")
        self._one_by_one = seen.ndim == 5  # images of a text in a dimension of their own
        ids = _ask(processor, _picture(self.image_size, 0))["input_ids"][0]
        places = (ids == model.config.image_token_id).nonzero().flatten()
        if not len(places) or int(places[-1] - places[0]) + 1 != len(places):
            raise UsageError(
                f"effbench cannot run {self._told}: the tokens of an image do not stand in one piece", KNOWN
            )
        self.image_tokens, self.around = len(places), len(ids)
        self.before, self.after = ids[: places[0]].tolist(), ids[places[-1] + 1 :].tolist()

    def _check(self, model: nn.Module, processor: Any) -> None:
        """Refuse a model whose logits about two images are not those that its library gives."""
        from effbench.records import Captioning

        pictures = [_picture(self.image_size, seed) for seed in range(2)]
        special = {*processor.tokenizer.all_special_ids, model.config.image_token_id}
        plain = [i for i in range(len(self.words)) if i not in special]
        text = torch.from_numpy(np.random.default_rng(0).choice(plain, (1, 5)))
        scale = (torch.tensor(x).view(1, 3, 1, 1) for x in (self.mean, self.std))
        mean, std = scale
        images = torch.stack([torch.tensor(np.asarray(p)).permute(2, 0, 1) for p in pictures])
        images = (images / 255 - mean) / std
        expected, pixels = [], []
        with torch.no_grad():
            for picture in pictures:
                inputs = dict(_ask(processor, picture))
                pixels.append(inputs["pixel_values"].flatten())
                for key, filler in (("input_ids", text), ("attention_mask", torch.ones_like(text))):
                    inputs[key] = torch.cat([inputs[key], filler], dim=1)
                if "mm_token_type_ids" in inputs:
                    kinds = inputs["mm_token_type_ids"]
                    inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(text).to(kinds)], dim=1)
                expected.append(model(**inputs).logits[:, -len(text[0]) - 1 : -1])
        captioner = self._captioner(copy.deepcopy(model), Captioning(decoder="own")).eval()
        prepared = [captioner.image_encoder.prepared(image[None])["pixel_values"].flatten() for image in images]
        apart = max((ours - theirs).abs().max().item() for ours, theirs in zip(prepared, pixels, strict=True))
        if not apart <= 1e-4:
            raise UsageError(
                f"effbench cannot run {self._told}: its processor prepares images otherwise, "
                f"pixels differ by up to {apart:.1e}",
                KNOWN,
            )
        with torch.no_grad():
            prefix = captioner.prefix(captioner.features(images))
            found = captioner.logits(prefix, text.expand(2, -1))
        why = "its class does more with images than tower, connector and decoder"
        refuse_difference(found, torch.cat(expected), self._told, why, KNOWN)

    def dual_encoder(self, protocol, vocabulary):
        raise UsageError(f"{self} writes text and has no pair of towers to align", "use --task flickr8k_caption")

    def patch_tokens(self):
        raise UsageError(f"{self} brings its own language model", "leave --decoder out")

    def captioner(self, options: Captioning) -> Captioner:
        """The model taken apart, with fresh weights."""
        return self._captioner(self._fresh(), options)

    def _captioner(self, model: nn.Module, options: Captioning) -> Captioner:
        body, head, inner = model.get_decoder(), model.get_output_embeddings(), model.base_model
        for name, part in list(inner.named_children()):
            if part is body:
                setattr(inner, name, None)
        held = next((name for name in CONNECTORS if _has(inner, name)), None)
        if held is None:
            raise UsageError(f"effbench cannot run {self._told}: it has no connector called {CONNECTORS}", KNOWN)
        holder, _, name = held.rpartition(".")
        holder = inner.get_submodule(holder)
        gathered = self.merge**2 if self.merge else 0
        connector = Projector(getattr(holder, name), gathered)
        setattr(holder, name, Gathered(gathered) if gathered else nn.Identity())
        side = self.image_size // (self.patch * self.merge) if self.merge else 0
        grid = (len(self.before), side, side) if "mrope_section" in (_rope(body.config)) else None
        tower = LibraryTower(inner, self.image_tokens, self.patch, self.merge, self.frames, self._one_by_one)
        return Captioner(
            tower,
            connector,
            Language(body, head, grid),
            self.before,
            self.after,
            self.words.end,
            options,
            self.words.start,
        )


class LibraryTower(nn.Module):
    """The library's own way from images to what its connector takes.

    Args:
        inner: its model without connector and decoder.
        patches: tokens of an image.
        patch, merge, frames: of models that take patches: side in pixels, patches along the square that becomes one
            token, and copies of a still image; 0 of those that take images.
        one_by_one: images stand in a dimension of their own.
    """

    def __init__(self, inner: nn.Module, patches: int, patch: int, merge: int, frames: int, one_by_one: bool) -> None:
        super().__init__()
        self.inner = inner
        self.patches, self.patch, self.merge, self.frames = patches, patch, merge, frames
        self.one_by_one = one_by_one

    def prepared(self, images: Tensor) -> dict[str, Tensor]:
        """Arguments of the library's `get_image_features`."""
        if not self.patch:
            return dict(pixel_values=images[:, None] if self.one_by_one else images)
        grid = images.shape[-1] // self.patch
        sizes = torch.tensor([[1, grid, grid]], device=images.device).expand(len(images), -1)
        return dict(pixel_values=patches_of(images, self.patch, self.merge, self.frames), image_grid_thw=sizes)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, patches, width)."""
        features = self.inner.get_image_features(**self.prepared(images), return_dict=True).pooler_output
        return torch.stack(list(features))

    def show_class_token(self) -> ClassOrLast:
        """What sees from now on the class token's attention, and the keys, in the layer whose states are handed over.

        Raises:
            UsageError: the tower has no class token, or hands over several layers.
        """
        from effbench.models.watching import ATTENTION, ClassOrLast, watch

        vision = getattr(self.inner, "vision_tower", None)
        layer = getattr(self.inner.config, "vision_feature_layer", None)
        classed = any(name.endswith("class_embedding") for name, _ in vision.named_parameters()) if vision else False
        drops = getattr(self.inner.config, "vision_feature_select_strategy", "") == "default"
        if not (classed and drops and isinstance(layer, int)):
            raise UsageError(
                "the image tower of this model has no class token beside its patches", "use by=divprune or by=fastv"
            )
        depth = vision.config.num_hidden_layers
        stacks = [m for m in vision.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        vision.set_attn_implementation(ATTENTION)
        seen = ClassOrLast().of("both", 0)
        watch(stacks[0][depth + layer if layer < 0 else layer - 1], seen)
        return seen


def patches_of(images: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """Flat patches, the `merge` x `merge` of a square next to each other (Qwen2-VL, arXiv 2409.12191).

    Args:
        images: (batch, channels, height, width).

    Returns:
        (batch x patches, channels x frames x patch x patch), a still image repeated `frames` times.
    """
    along = [side // patch // merge for side in images.shape[-2:]]
    squares = images.unflatten(3, (along[1], merge, patch)).unflatten(2, (along[0], merge, patch))
    squares = squares.permute(0, 2, 5, 3, 6, 1, 4, 7)  # batch, rows, columns, merge, merge, channels, patch, patch
    still = squares.unsqueeze(6).expand(*squares.shape[:6], frames, patch, patch)
    return still.flatten(5).flatten(0, 4)


class Projector(nn.Module):
    """A library's connector, which takes the tokens of each image and pools none without parameters.

    Args:
        gathered: so many patches lie side by side in the width of a token, and it takes them as rows; 0: as they are.
    """

    def __init__(self, module: nn.Module, gathered: int) -> None:
        super().__init__()
        self.module = module
        self.gathered = gathered

    def pool(self, tokens: Tensor) -> Tensor:
        return tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, patches, width) -> (batch, image tokens, out)."""
        if not self.gathered:
            return self.module(tokens)
        rows = tokens.flatten(0, 1).unflatten(1, (self.gathered, -1)).flatten(0, 1)
        return self.module(rows).unflatten(0, tokens.shape[:2])


class Gathered(nn.Module):
    """In a connector's place: so many rows after each other become one, (rows, width) -> (rows / n, n x width)."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.rows)).flatten(1)


def _ask(processor: Any, picture: Any) -> Any:
    """What the library's model takes of one image and the instruction."""
    if processor.chat_template:
        content = [dict(type="image", image=picture), dict(type="text", text=INSTRUCTION)]
        return processor.apply_chat_template(
            [dict(role="user", content=content)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    return processor(images=picture, text=PLAIN.format(image=processor.image_token), return_tensors="pt")


def _picture(side: int, seed: int) -> Any:
    """A square image of noise."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def _has(module: nn.Module, name: str) -> bool:
    try:
        return isinstance(module.get_submodule(name), nn.Module)
    except AttributeError:
        return False


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
