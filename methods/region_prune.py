"""Region pruning: remove decoder layers outside the region that was tuned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from effbench.errors import UsageError
from effbench.method import Method, param
from effbench_methods._tuned_parts import number
from effbench_methods.algorithms.layer_choice import PLACES, by_place
from effbench_methods.algorithms.layer_importance import angular_distance

if TYPE_CHECKING:
    from effbench.calibration_set import CalibrationSet
    from effbench.models.decoder import Decoder
    from effbench.models.tower import ModelView


@dataclass(frozen=True)
class RegionPrune(Method):
    """Remove the layers of a decoder outside a region that turn the last token of a text least.

    The measure is the angular distance arccos(cos(h_l, h_l+1)) / pi, the states before and behind a layer, on training
    data; as published, each layer is looked at alone and all of them in the model as it was trained.

    The region are the layers that were tuned, where training changed some layers and not others:
    `layer_tune:target=decoder+region_prune:drop=2`. Where it changed all, or none, share, layers, by and at name the
    region as they do for layer_tune, so that `region_prune:drop=2` alone is the same on a fully tuned model; give it
    the share or the layers of the layer_tune that it stands beside.

    criterion=random removes layers outside the region blindly: the control.
    """

    source = "arXiv 2412.12785 (ACL 2025); angular distance: 2403.17887"
    goes_before = ("quantize", "precision", "compile")
    phases = ("test",)
    neutral = {"drop": 0}

    drop: int = param(2, "how many layers are removed; the paper removes 0 to 4 of 32", low=0)
    criterion: str = param("angular", "which layers outside the region go", choices=("angular", "random"))
    share: float = param(0.25, "share of the layers that is the region where training names none", above=0, high=1)
    layers: int | None = param(None, "number of layers of that region, in place of share", low=1)
    by: str = param("uniform", "where it lies", choices=tuple(place for place in PLACES if place != "full"))
    at: tuple[int, ...] = param((), "its layers (0-based) themselves, in place of share, layers and by", low=0)
    images: int = param(64, "training images that the angular distance is computed on", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "at", tuple(sorted(self.at)))
        if len(set(self.at)) < len(self.at):
            raise UsageError("region_prune: at= names a layer twice", "name each once, e.g. at=0/3/7")
        if self.layers is not None and self.share != 0.25:
            raise UsageError("region_prune: layers stands in place of share", "give one of them")
        if self.at and (self.share, self.layers, self.by) != (0.25, None, "uniform"):
            raise UsageError("region_prune: at= stands in place of share, layers and by", "give one of them")

    def edit_model(self, model: ModelView) -> None:
        decoder = decoder_of(model)
        region, what = self.region(model)
        outside = len(decoder) - len(region)
        if self.drop > outside:
            raise UsageError(
                f"region_prune: drop={self.drop}, but {outside} of the {len(decoder)} layers of {decoder.name} lie "
                f"outside {what}",
                f"use drop={outside} or fewer" if outside else "use a smaller region: share, layers or at",
            )

    def finish(self, model: ModelView, calibration: CalibrationSet) -> None:
        if not self.drop:
            return
        decoder, (region, what) = decoder_of(model), self.region(model)
        free = [layer for layer in range(len(decoder)) if layer not in region]
        if self.criterion == "random":
            gone, why = [free[i] for i in torch.randperm(len(free))[: self.drop].tolist()], "at random"
        else:
            calibration.need(self.images, f"region_prune: images={self.images}")
            found = angular_distance(decoder, model.model, calibration, self.images, 1).tolist()
            gone = sorted(free, key=found.__getitem__)[: self.drop]
            rest = [found[layer] for layer in free if layer not in gone]
            distances = ", ".join(f"{found[layer]:.4f}" for layer in sorted(gone))
            others = f"the others outside {spread(rest)}" if rest else "all that lie outside"
            why = f"angular distance {distances}; {others}; inside {spread([found[layer] for layer in region])}"
        note = f"{named(sorted(gone))} of {len(decoder)} of the decoder removed ({why}), outside {what}"
        decoder.keep_blocks(set(range(len(decoder))) - set(gone))
        decoder.module.outside_removed = note  # for `notes`, which sees the shorter decoder

    def region(self, model: ModelView) -> tuple[tuple[int, ...], str]:
        """The layers that stay whatever they do, ascending, and what they are in words."""
        decoder = decoder_of(model)
        tuned = tuned_layers(model)
        if tuned and len(tuned) < len(decoder):
            return tuned, f"the tuned {named(tuned)}"
        why = "" if tuned is None else " (all layers were tuned)" if tuned else " (no layer was tuned)"
        own = self.at or by_place(self.by, len(decoder), number("region_prune", decoder, self.layers, self.share))
        if own[-1] >= len(decoder):
            raise UsageError(
                f"region_prune: layer {own[-1]} does not exist: {decoder.name} has layers 0 to {len(decoder) - 1}",
                "choose other layers with at=",
            )
        return own, f"the region of {named(own)}{why}"

    def controls(self) -> dict[str, Method]:
        """As many layers outside the same region, chosen blindly."""
        return {"random": replace(self, criterion="random", images=64)} if self.drop else {}

    def notes(self, model: ModelView) -> list[str]:
        note = getattr(decoder_of(model).module, "outside_removed", "")
        return [note] if note else []


def decoder_of(model: ModelView) -> Decoder:
    """The decoder that is pruned.

    Raises:
        UsageError: the model has none.
    """
    if model.decoder is None:
        raise UsageError(
            "region_prune needs a language decoder, and this model has none",
            "use a captioning task (effbench list tasks), or layer_prune for an image or text tower",
        )
    return model.decoder


def tuned_layers(model: ModelView) -> tuple[int, ...] | None:
    """The decoder layers of which training changed something, ascending; None where that is not known."""
    if model.trained is None:
        return None
    path = next(name for name, part in model.model.named_modules() if part is model.decoder.blocks)
    names = [name.removeprefix(f"{path}.") for name in model.trained if name.startswith(f"{path}.")]
    return tuple(sorted({int(name.partition(".")[0]) for name in names}))


def named(layers: list[int] | tuple[int, ...]) -> str:
    """Layers in words."""
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(map(str, layers))


def spread(values: list[float]) -> str:
    """Least and largest value in words."""
    least, most = f"{min(values):.4f}", f"{max(values):.4f}"
    return least if least == most else f"{least} to {most}"
