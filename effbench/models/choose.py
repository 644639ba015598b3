"""Which backbone a run uses, and where its weights lie: `--backbone auto` and the search for weights."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from effbench.datasets import cache_dir
from effbench.errors import UsageError
from effbench.registry import backbones

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
SHIPPED = "shipped:scenes_vit"
HUB_DEFAULT = ("timm:deit_tiny_patch16_224", "default")


def choose(
    spec: str,
    weights: Path | str | None = None,
    pretrained: str | None = None,
    *,
    embedded: bool = False,
    **options: Any,
) -> tuple[Any, list[str]]:
    """The backbone that a spec names, with its weights loaded.

    Args:
        spec: "FAMILY:NAME" or "auto". auto takes the first weights of a known model from $EFFBENCH_WEIGHTS (a file
            or a folder) or the cache, then the hub, then the shipped tower.
        weights: a file; "random" for none.
        embedded: the data are the embedded ones, for which auto is the shipped tower.
        options: passed to the backbone (image_size, single_use).

    Returns:
        the backbone, and lines for a banner where the choice must not be missed (else none).

    Raises:
        UsageError: an unknown family or model. InvalidError: weights that are missing or do not fit.
    """
    if spec != "auto":
        family, _, name = spec.partition(":")
        if not name:
            raise UsageError(
                f"{spec!r} names no backbone",
                "write FAMILY:NAME, e.g. timm:deit_tiny_patch16_224; see effbench list backbones",
            )
        kind = backbones.get(family)
        if weights is None and pretrained is None and not kind.brings_weights:
            weights = next((path for path in _stored() if path.stem == name), None)
        if pretrained is None:
            return kind(name, weights, **options), []
        with hub():
            return kind(name, weights, pretrained, **options), []
    if weights not in (None, "random"):
        path = Path(weights)
        return _load(_model_of(path.stem) or _unknown(path), path, options), []
    if pretrained is not None or weights == "random":
        raise UsageError("--backbone auto chooses weights by itself", "name the model with --backbone FAMILY:NAME")
    if embedded:
        return _load(SHIPPED, None, options), []
    for path in _stored():
        if spec := _model_of(path.stem):
            return _load(spec, path, options), []
    try:
        if not reachable():
            raise ConnectionError
        family, _, name = HUB_DEFAULT[0].partition(":")
        return backbones.get(family)(name, None, HUB_DEFAULT[1], **options), []
    except Exception:
        banner = [
            "No pretrained weights were found, so the small tower that ships with effbench is used.",
            "It was trained on drawn scenes: its quality on photos says nothing about real models.",
            f"Looked for: {', '.join(str(p) for p in _places())}, and {HUB_DEFAULT[0]} on the hub.",
            "To use real weights: --backbone timm:NAME --weights FILE, or set EFFBENCH_WEIGHTS to a folder of them.",
        ]
        return _load(SHIPPED, None, options), banner


def _load(spec: str, path: Path | None, options: dict[str, Any]) -> Any:
    family, _, name = spec.partition(":")
    return backbones.get(family)(name, path, None, **options)


def _unknown(path: Path) -> str:
    raise UsageError(
        f"no model is called {path.stem!r}, after the file {path.name}", "name the model with --backbone FAMILY:NAME"
    )


def _places() -> list[Path]:
    named = os.environ.get("EFFBENCH_WEIGHTS")
    return ([Path(named)] if named else []) + [cache_dir() / "weights"]


def _stored() -> Iterator[Path]:
    """Files of weights in the usual places, in order of name."""
    for place in _places():
        files = [place] if place.is_file() else sorted(place.glob("*")) if place.is_dir() else []
        yield from (file for file in files if file.suffix in SUFFIXES)


def _model_of(stem: str) -> str | None:
    import timm

    if timm.is_model(stem):
        return f"timm:{stem}"
    import open_clip

    return f"openclip:{stem}" if stem in open_clip.list_models() else None


def reachable(timeout: float = 3.0) -> bool:
    """Whether the hub answers on its port; the hub's own client would retry for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlparse(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout).close()
    except OSError:
        return False
    return True


@contextmanager
def hub(local: bool = False) -> Iterator[None]:
    """Where the hub does not answer, its client reads its cache alone, at once.

    Args:
        local: the hub is not wanted.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = before or local or not reachable()
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
