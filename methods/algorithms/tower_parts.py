"""What of a model belongs to which of its towers: "tower" is the image tower, "text" the other."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn

from effbench.errors import UsageError

if TYPE_CHECKING:
    from effbench.models.tower import ModelView, Tower


def towers(model: ModelView) -> dict[str, Tower]:
    """The towers that a model has."""
    return {name: tower for name, tower in dict(tower=model.image, text=model.text).items() if tower is not None}


def towers_asked_for(model: ModelView, target: Collection[str], method: str) -> dict[str, Tower]:
    """Those of a model's towers that a method's target= names.

    Raises:
        UsageError: the model has none of them.
    """
    there = towers(model)
    found = {name: tower for name, tower in there.items() if name in target}
    if not found:
        raise UsageError(
            f"{method}: target={'/'.join(target)} names no tower of this {type(model.model).__name__}",
            f"it has target={'/'.join(there) or 'none'}",
        )
    return found


def sides(model: ModelView) -> dict[nn.Module, str]:
    """Which tower each module belongs to: "tower", "text", or "" for what joins them.

    What a library puts around a tower, e.g. its projection, is a part of it. OpenCLIP's CLIP is its own text tower.
    """
    paths = {module: path for path, module in model.model.named_modules()}
    image = text = None
    if model.text is not None:
        text = paths[model.text.module]
    if model.image is not None:
        image = paths[model.image.module]
        blocks = "" if model.text is None else paths[model.text.loop]
        while (parent := image.rpartition(".")[0]) and not _within(blocks, parent):
            image = parent

    def side(path: str) -> str:
        if image is not None and _within(path, image):
            return "tower"
        return "text" if text is not None and _within(path, text) else ""

    return {module: side(path) for module, path in paths.items()}


def _within(path: str, of: str) -> bool:
    """Whether the module at a path is the one at another, or a part of it; "" is the whole model."""
    return not of or f"{path}.".startswith(f"{of}.")
