"""Layer pruning: remove whole blocks of a tower or a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from effbench.errors import InvalidError, UsageError
from effbench.method import Method, param
from effbench.models.decoder import Decoder
from effbench.models.tower import ModelView, Tower, image_tower
from effbench_methods.algorithms.layer_importance import angular_distance, block_influence

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from effbench.calibration_set import CalibrationSet

DROP, BY = 3, "block_influence"


@dataclass(frozen=True)
class LayerPrune(Method):
    """Remove whole blocks of a tower, or layers of a decoder, by what training data show of them.

    A pattern or `at` names them otherwise.

    Of a captioner they are those of its decoder, unless target says otherwise: there the cost is. Texts are given, and
    angular looks at the last token of each.

    block_influence removes the blocks that turn the tokens least, 1 - mean cos(h_l, h_l+1) (ShortGPT, in one shot).
    angular removes `drop` consecutive blocks, those between whose ends arccos(cos) / pi is smallest; the paper then
    heals the model by tuning, which phase=both does. every_other goes from the end backwards and leaves the last block:
    of 12 the blocks 10, 8, 6, ...; past half of them also 11, 9, ... random is the control.

    phase=test removes blocks of the trained model. Those that another method of the stack acts in stay; where methods
    act in every block (token_merge), a block goes with its part of them. Blocks are compared with all tokens, as if no
    method dropped or merged any.

    phase=both chooses before training, on the weights that the model comes with, and trains and tests what is left:
    methods that stand to the right see a shorter tower. There is no phase=train, since the weights of a shorter tower
    fit no other.
    """

    source = "ShortGPT, arXiv 2403.03853; angular: 2403.17887; every_other: LayerDrop, 1909.11556"
    goes_before = ("channel_prune", "quantize", "precision", "compile")
    phases = ("test", "both")
    neutral = {"drop": 0}

    drop: int = param(DROP, "how many blocks are removed", low=0)
    by: str = param(BY, "how they are chosen", choices=("block_influence", "angular", "every_other", "random"))
    at: tuple[int, ...] = param((), "the blocks (0-based) themselves, in place of drop and by", low=0)
    target: str | None = param(
        None,
        "whose blocks; tower: of the images; none: those of a captioner's decoder, else tower",
        choices=("tower", "text", "decoder"),
    )
    images: int = param(64, "training images that block_influence and angular look at", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at and self.by != BY:
            raise UsageError(f"layer_prune: at= names the blocks that by={self.by} would choose", "give one of them")
        if self.at and self.drop not in (DROP, len(self.at)):
            raise UsageError(f"layer_prune: at= names {len(self.at)} blocks, not drop={self.drop}", "leave drop out")
        if len(set(self.at)) < len(self.at):
            raise UsageError("layer_prune: at= names a block twice", "name each once, e.g. at=3/5/7")
        if self.phase == "both":  # it names blocks too, and they would be others
            object.__setattr__(self, "goes_before", (*self.goes_before, "layer_tune"))
        if self.target in (None, "decoder"):  # it would not find its region again
            object.__setattr__(self, "conflicts", ("region_prune",))

    @property
    def count(self) -> int:
        return len(self.at) or self.drop

    def settle(self, model: ModelView, calibration: CalibrationSet) -> Method:
        if self.at or not self.drop:
            return self
        at, _ = self.choose(self.tower(model), model, calibration)
        return LayerPrune(at=at, target=self.target, phase=self.phase)

    def edit_model(self, model: ModelView) -> None:
        if self.phase == "test":
            return
        if not self.at and self.drop:
            raise InvalidError("layer_prune: its blocks are not chosen yet", "call settle() first")
        tower = self.tower(model)
        if others := " and ".join(acting(tower.blocks)):
            raise UsageError(
                f"layer_prune with phase=both must stand before {others} in a stack, whose blocks it would renumber",
                "write layer_prune first",
            )
        self.remove(tower, self.at, "as chosen before training")

    def finish(self, model: ModelView, calibration: CalibrationSet) -> None:
        if self.phase == "test" and self.count:
            tower = self.tower(model)
            self.remove(tower, *self.choose(tower, model, calibration))

    def choose(
        self, tower: Tower | Decoder, model: ModelView, calibration: CalibrationSet
    ) -> tuple[tuple[int, ...], str]:
        """The blocks to remove, ascending, and why these."""
        layers, drop = len(tower), self.count
        if drop >= layers:
            raise UsageError(
                f"layer_prune: {drop} of the {layers} {_words(tower)} of {tower.name} would leave none",
                f"drop takes 0 to {layers - 1} here",
            )
        if self.at:
            return tuple(sorted(self.at)), "as named"
        free = candidates(tower)
        if drop > len(free):
            others = " and ".join(acting(tower.blocks))
            raise UsageError(
                f"layer_prune: drop={drop}, but blocks that {others} acts in stay; {len(free)} of {layers} are free",
                f"use drop={len(free)} or fewer, or compare them as two arms",
            )
        if self.by == "random":
            return tuple(sorted(free[i] for i in torch.randperm(len(free))[:drop].tolist())), "at random"
        if self.by == "every_other":
            order = [*range(layers - 2, -1, -2), *range(layers - 1, -1, -2)]
            return tuple(sorted([block for block in order if block in free][:drop])), "every other one from the end"
        calibration.need(self.images, f"layer_prune: images={self.images}")
        if self.by == "angular":
            return least_angle(angular_distance(tower, model.model, calibration, self.images, drop), free, drop)
        return least_influence(block_influence(tower, model.model, calibration, self.images), free, drop)

    def remove(self, tower: Tower | Decoder, at: tuple[int, ...], why: str) -> None:
        """Remove blocks, and leave word for `notes` with the tower."""
        if not at:
            return
        layers = len(tower)
        if max(at) >= layers:
            raise UsageError(
                f"layer_prune: {_words(tower, 1)} {max(at)} does not exist: {tower.name} has {_words(tower)} 0 to "
                f"{layers - 1}",
                f"choose other {_words(tower)} with at=",
            )
        free = candidates(tower)
        if taken := [block for block in at if block not in free]:
            other = " and ".join(acting([tower.blocks[taken[0]]]))
            raise UsageError(
                f"layer_prune and {other} conflict: {other} acts in block {taken[0]}, which would go",
                "give them different blocks with at=, or compare them as two arms",
            )
        gone = acting(tower.blocks[block] for block in at)
        tower.keep_blocks(set(range(layers)) - set(at))
        whose = " of the decoder" if isinstance(tower, Decoder) else ""
        note = f"{_words(tower, len(at))} {', '.join(map(str, at))} of {layers}{whose} removed, {why}"
        if gone:
            note += f"; with them their part of {' and '.join(gone)}"
        tower.module.blocks_removed = (*getattr(tower.module, "blocks_removed", ()), note)

    def tower(self, model: ModelView) -> Tower | Decoder:
        """The tower or decoder whose blocks are meant."""
        target = self.target or ("tower" if model.decoder is None else "decoder")
        if target == "tower":
            return image_tower(model, "layer_prune")
        found = model.text if target == "text" else model.decoder
        if found is None:
            what, other = ("text tower of transformer blocks", "backbone")
            if target == "decoder":
                what, other = "decoder", "task, one that writes captions"
            raise UsageError(
                f"layer_prune: target={target} needs a {what}, and this model has none that effbench knows",
                f"use target=tower, or another {other}",
            )
        return found

    def controls(self) -> dict[str, Method]:
        """As many blocks of the same tower, chosen blindly."""
        if not self.count:
            return {}
        return {"random": LayerPrune(drop=self.count, by="random", target=self.target, phase=self.phase)}

    def notes(self, model: ModelView) -> list[str]:
        return list(getattr(self.tower(model).module, "blocks_removed", ()))


def least_influence(influence: Tensor, free: list[int], drop: int) -> tuple[tuple[int, ...], str]:
    """The blocks of least influence (blocks,) among those that are free; the first of equal ones."""
    values = influence.tolist()
    at = tuple(sorted(sorted(free, key=values.__getitem__)[:drop]))
    rest = [values[block] for block in range(len(values)) if block not in at]
    found = ", ".join(f"{values[block]:.4f}" for block in at)
    return at, f"of the least block influence ({found}; the others {min(rest):.4f} to {max(rest):.4f})"


def least_angle(distance: Tensor, free: list[int], drop: int) -> tuple[tuple[int, ...], str]:
    """The `drop` consecutive free blocks between whose ends the distance (blocks - drop + 1,) is least.

    Raises:
        UsageError: nowhere are so many free blocks next to one another.
    """
    values = distance.tolist()
    starts = [start for start in range(len(values)) if set(range(start, start + drop)) <= set(free)]
    if not starts:
        raise UsageError(
            f"layer_prune: by=angular finds no {drop} blocks in a row that no other method acts in",
            "use a smaller drop, or by=block_influence",
        )
    best = min(starts, key=values.__getitem__)
    others = f"; elsewhere up to {max(values):.4f}" if len(values) > 1 else ""
    return tuple(range(best, best + drop)), f"of the least angular distance ({values[best]:.4f}{others})"


def candidates(tower: Tower | Decoder) -> list[int]:
    """The blocks that may go: those that no other method acts in, or all where methods act in every one."""
    free = [i for i, block in enumerate(tower.blocks) if not _methods_in(block)]
    return free or list(range(len(tower)))


def acting(blocks: Iterable[nn.Module]) -> list[str]:
    """Names of the methods that act in some blocks."""
    return list(dict.fromkeys(method.name for block in blocks for method in _methods_in(block)))


def _methods_in(block: nn.Module) -> list[nn.Module]:
    """What methods placed in a block; a decoder's layers have no place for it."""
    places = (block, "token_edit"), (block, "token_bypass"), (getattr(block, "attn", None), "core")
    return [part for holder, name in places if (part := getattr(holder, name, None)) is not None]


def _words(tower: Tower | Decoder, count: int = 2) -> str:
    return ("layer" if isinstance(tower, Decoder) else "block") + "s" * (count > 1)
