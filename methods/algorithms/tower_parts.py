"""What of a model belongs to which of its parts: "tower" is the image tower, "text" the other; of a captioner there are
"connector", "decoder" (its embeddings and layers) and "head" (what gives logits)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import nn

from effbench.errors import UsageError

if TYPE_CHECKING:
    from effbench.models.tower import ModelView, Tower


#: what a method acts on unless its target= says otherwise
PARTS = ("tower", "text", "connector", "decoder")


def towers(model: ModelView) -> dict[str, Tower]:
    """The towers that a model has."""
    return {name: tower for name, tower in dict(tower=model.image, text=model.text).items() if tower is not None}


def towers_asked_for(model: ModelView, target: Collection[str], method: str) -> dict[str, Tower]:
    """Those of a model's towers that a method's target= names; none where it names other parts of a captioner.

    Raises:
        UsageError: the model has nothing that it names.
    """
    there: dict[str, Any] = captioner_parts(model) or towers(model)
    found = {name: tower for name, tower in towers(model).items() if name in target}
    if not there.keys() & set(target):
        raise UsageError(
            f"{method}: target={'/'.join(target)} names no tower of this {type(model.model).__name__}",
            f"it has target={'/'.join(there) or 'none'}",
        )
    return found


def captioner_parts(model: ModelView) -> dict[str, nn.Module]:
    """The parts of a captioner, its image tower as a whole, wrapped by effbench or not; none of another model."""
    if model.decoder is None:
        return {}
    whole = model.model
    language = whole.language
    return dict(tower=whole.image_encoder, connector=whole.connector, decoder=language.body, head=language.head)


def sides(model: ModelView) -> dict[nn.Module, str]:
    """Which part each module belongs to: "tower", "text" or one of a captioner's; "" for what joins them.

    What a library puts around a tower, e.g. its projection, is a part of it. OpenCLIP's CLIP is its own text tower.
    """
    if parts := captioner_parts(model):
        inside = {m: name for name, part in parts.items() for m in part.modules()}
        return {module: inside.get(module, "") for module in model.model.modules()}
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
