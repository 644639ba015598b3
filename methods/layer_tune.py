"""Layer-selective tuning: only part of a tower is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.method import Method, TrainingPlan, param
from effbench.models.tower import image_tower
from effbench_methods.algorithms import layer_importance
from effbench_methods.algorithms.layer_choice import PLACES, best, by_place
from effbench_methods.algorithms.loss_gradients import evaluating

if TYPE_CHECKING:
    from effbench.calibration_set import CalibrationSet
    from effbench.models.tower import ModelView, Tower

SCORED = ("block_influence", "angular", "gradient", "parameter_change")
WHOLE = ("full", "head", "bitfit", "layernorm")  # where no number of blocks is chosen
LEARNING_RATE = 1e-5  # of the trial training behind by=parameter_change
# what comes before the blocks, by the names that timm and OpenCLIP give it; a tower has some of them
STEM = (
    *("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "norm_pre"),
    *("conv1", "class_embedding", "ln_pre", "token_embedding", "positional_embedding", "cls_emb"),
)


@dataclass(frozen=True)
class LayerTune(Method):
    """Train only some blocks of a tower, and what comes after its blocks; the rest keeps the weights that it has.

    A training step costs 1 forward pass + D + w: D is the share of the depth above the lowest trained part, since the
    gradient has to come down to it, and w the share of the weights that is trained. So top saves most; uniform and
    bottom train block 0 and save weight gradients and optimiser state alone. Adapters do not lower D either.

    uniform, top, middle, bottom, hybrid: by place (see `algorithms.layer_choice`; hybrid, half of them at the bottom
    and half at the top, is effbench's own definition). block_influence, angular, gradient, parameter_change: the blocks
    that score highest on calibration data, once per seed; angular is the angle that one block turns the tokens by,
    parameter_change that of a short training of the whole model with AdamW. full: all blocks. head: none. bitfit: the
    biases of all blocks. layernorm: weights and biases of the norms in all blocks.

    With lora=RANK the linear layers of the chosen blocks get adapters, which alone are trained there, through peft.
    They are merged before testing, so that testing costs what the baseline's does.
    """

    source = "arXiv 2412.12785; bitfit: BitFit, 2106.10199; lora: LoRA, 2106.09685; block_influence: 2403.03853"
    default_phase = "train"
    phases = ("train", "both")

    share: float = param(0.25, "share of the blocks that is trained, rounded, at least one block", above=0, high=1)
    layers: int | None = param(None, "number of blocks that are trained, in place of share", low=1)
    by: str | None = param(
        None,
        "which blocks are trained; none: uniform, or list with at=",
        choices=(*PLACES, "list", *SCORED, *WHOLE[1:]),
    )
    at: tuple[int, ...] = param((), "by=list: the blocks (0-based)", low=0)
    stem: bool | None = param(
        None, "what comes before the blocks (patches, positions, class token) is trained; none: with by=full alone"
    )
    lora: int | None = param(None, "rank of LoRA adapters, trained in place of the blocks' own weights", low=1)
    alpha: float | None = param(
        None, "the adapters' output is scaled by alpha / rank; none: alpha is the rank", above=0
    )
    target: str = param("tower", "image tower, text tower or decoder", choices=("tower", "text", "decoder"))
    images: int = param(64, "training images that a score is computed on", low=1)
    steps: int = param(20, "by=parameter_change: steps of the trial training", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "at", tuple(sorted(self.at)))
        if self.by == "list" and not self.at:
            raise UsageError("layer_tune: by=list names no block", "name at least one, e.g. at=3/7/11")
        if self.by == ("list" if self.at else "uniform"):  # one name for one choice: that of the spec without by=
            object.__setattr__(self, "by", None)
        if self.layers is not None and self.share != 0.25:
            raise UsageError("layer_tune: layers stands in place of share", "give one of them")
        if len(set(self.at)) < len(self.at):
            raise UsageError("layer_tune: at= names a block twice", "name each block once")
        for name, default, unless in (
            ("share", 0.25, self.way not in (*WHOLE, "list")),
            ("layers", None, self.way not in (*WHOLE, "list")),
            ("at", (), self.way == "list"),
            ("lora", None, self.way not in WHOLE[1:]),
            ("images", 64, self.way in SCORED),
            ("steps", 20, self.way == "parameter_change"),
        ):
            if getattr(self, name) != default and not unless:
                raise UsageError(f"layer_tune: {name} says nothing with by={self.way}", f"leave out {name} or by")
        if self.way == "head" and self.stem:
            raise UsageError("layer_tune: by=head trains nothing of the tower, its stem neither", "leave stem out")
        if self.alpha is not None and self.lora is None:
            raise UsageError("layer_tune: alpha scales adapters, and there are none", "add lora=16, or leave alpha out")
        if self.phase != self.natural_phase():
            why = "merges its adapters for testing" if self.lora else "changes nothing that testing runs"
            raise UsageError(f"layer_tune: phase={self.phase} cannot be: it {why}", "leave phase out")

        if self.lora:  # adapters are merged into weights that these change
            object.__setattr__(self, "goes_before", ("channel_prune", "compile", "precision", "quantize"))

    @property
    def way(self) -> str:
        """How the blocks are chosen."""
        return self.by or ("list" if self.at else "uniform")

    def natural_phase(self) -> str:
        return "both" if self.lora else "train"

    def settle(self, model: ModelView, calibration: CalibrationSet) -> Method:
        tower = self._tower(model)
        if self.way in (*WHOLE, "list"):
            return self
        chosen = self._highest(tower, model.model, calibration) if self.way in SCORED else self._chosen(tower)
        return replace(self, by=None, at=chosen, share=0.25, layers=None, images=64, steps=20)

    def _highest(self, tower: Tower, model: nn.Module, calibration: CalibrationSet) -> tuple[int, ...]:
        """The blocks that score highest on calibration data."""
        k = self._number(tower)
        calibration.need(self.images, f"layer_tune:by={self.way}: images={self.images}")
        given = (tower, model, calibration, self.images)
        match self.way:
            case "block_influence":
                scores = layer_importance.block_influence(*given)
            case "angular":
                scores = layer_importance.angular_distance(*given, n=1)
            case "gradient":
                scores = layer_importance.gradient_norm(*given)
            case "parameter_change":
                scores = change_in_training(*given, steps=1 if calibration.thrifty else self.steps)
        if not scores.isfinite().all():
            raise EffbenchError(f"layer_tune: by={self.way} gives scores that are not finite", "choose blocks by place")
        return best(scores.tolist(), k)

    def edit_model(self, model: ModelView) -> None:
        tower = self._tower(model)
        if self.lora and self.lora > tower.width:
            raise UsageError(
                f"layer_tune: lora={self.lora} is more than the width {tower.width} of this {tower.name}",
                f"lora takes 1 to {tower.width} here",
            )
        if (
            self.lora and self.way not in SCORED
        ):  # who asks what testing costs has not settled: merged, they cost nothing
            for index in self._chosen(tower):
                add_adapters(tower.blocks[index], self.lora, self.alpha or self.lora)

    def edit_training(self, plan: TrainingPlan) -> None:
        tower = self._tower(plan.model)
        if self.way in SCORED:
            raise InvalidError(f"layer_tune:by={self.way} was not settled", "call settle before edit_training")
        if all(plan.freezes_all_of(block.attn) for block in tower.blocks):
            raise UsageError(
                "layer_tune chooses what of the tower is trained, and this one is frozen (--train locked)",
                "use --train full, or target=text",
            )
        kept = stem(tower)
        if not self._trains_stem:
            plan.frozen += kept
        elif self.way in ("bitfit", "layernorm"):
            plan.frozen += [p for part in kept for p in self._untrained(part)]
        chosen = self._chosen(tower)
        for index, block in enumerate(tower.blocks):
            if index not in chosen:
                plan.frozen.append(block)
            elif self.lora:
                plan.frozen += block.parameters()
                plan.trained += [p for name, p in block.named_parameters() if ".lora_" in name]
            else:
                plan.frozen += self._untrained(block)

    def finish(self, model: ModelView, calibration: CalibrationSet) -> None:
        if self.lora:
            for block in self._tower(model).blocks:
                merge_adapters(block)

    def notes(self, model: ModelView) -> list[str]:
        if self.way not in (*WHOLE, "list"):
            return []
        what = {  # without their number: another method may have removed some since
            "head": "none of the blocks",
            "bitfit": "the biases of all blocks",
            "layernorm": "the norms of all blocks",
            "full": "all blocks",
        }.get(self.way, f"block{'s' * (len(self.at) > 1)} {', '.join(map(str, self.at))}")
        if self.lora:
            what = f"adapters of rank {self.lora}, merged for testing, in {what}"
        before = "what comes before the blocks, " if self._trains_stem else ""
        join = "only" if self.way == "head" else "and"
        return [f"trains {before}{what} of the {self._tower(model).name}, {join} what comes after the blocks"]

    @property
    def _trains_stem(self) -> bool:
        return self.stem if self.stem is not None else self.way == "full" and not self.lora

    def _tower(self, model: ModelView) -> Tower:
        if self.target == "decoder":
            raise UsageError(
                "layer_tune: target=decoder needs a captioning task, and this model only aligns images and texts",
                "use target=tower or target=text",
            )
        if self.target == "tower":
            return image_tower(model, "layer_tune")
        if model.text is None:
            raise UsageError(
                "layer_tune: target=text needs a text tower of transformer blocks",
                "choose another model, or target=tower",
            )
        return model.text

    def _number(self, tower: Tower) -> int:
        """How many blocks are trained."""
        if self.layers is None:
            return max(1, int(self.share * len(tower) + 0.5))
        if self.layers > len(tower):
            raise UsageError(
                f"layer_tune: layers={self.layers}, but this {tower.name} has {len(tower)} blocks",
                f"layers takes 1 to {len(tower)} here",
            )
        return self.layers

    def _chosen(self, tower: Tower) -> tuple[int, ...]:
        """The blocks of which something is trained."""
        if self.way == "head":
            return ()
        if self.way in WHOLE:
            return tuple(range(len(tower)))
        if self.way != "list":
            return by_place(self.way, len(tower), self._number(tower))
        if self.at[-1] >= len(tower):
            raise UsageError(
                f"layer_tune: at={self.at[-1]}, but this {tower.name} has blocks 0 to {len(tower) - 1}",
                "choose other blocks",
            )
        return self.at

    def _untrained(self, part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
        """The parameters of a chosen part that are not trained all the same."""
        if self.way not in ("bitfit", "layernorm"):
            return []
        if isinstance(part, nn.Parameter):
            return [part]
        if self.way == "bitfit":
            trained = [p for name, p in part.named_parameters() if name.rpartition(".")[2] == "bias"]
        else:
            trained = [p for m in part.modules() if "norm" in type(m).__name__.lower() for p in m.parameters()]
        kept = {id(p) for p in trained}
        return [p for p in part.parameters() if id(p) not in kept]


def stem(tower: Tower) -> list[nn.Module | nn.Parameter]:
    """What of a tower comes before its blocks."""
    held = [getattr(tower.module, name, None) for name in STEM]
    return [part for part in held if isinstance(part, nn.Module | nn.Parameter)]


def change_in_training(tower: Tower, model: nn.Module, calibration: CalibrationSet, images: int, steps: int) -> Tensor:
    """(blocks,) how much training the whole model for some steps changes each block; its weights are put back.

    The model runs in evaluation mode, without dropout.

    Raises:
        UsageError: there is no loss: a bare model has no task.
    """
    kept = {p: p.detach().clone() for p in model.parameters()}
    optimiser = torch.optim.AdamW([p for p in kept if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)
    with evaluating(model), torch.enable_grad():
        for loss in islice(_losses(model, calibration, images), steps):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    optimiser.zero_grad()
    with torch.no_grad():
        after = [dict(block.named_parameters()) for block in tower.blocks]
        before = [{name: kept[p] for name, p in block.items()} for block in after]
        scores = layer_importance.parameter_change(before, after)
        for p, was in kept.items():
            p.copy_(was)
    return scores


def _losses(model: nn.Module, calibration: CalibrationSet, images: int) -> Iterator[Tensor]:
    """The loss of batch after batch, over and over."""
    return chain.from_iterable(calibration.losses(model, images) for _ in repeat(None))


def add_adapters(block: nn.Module, rank: int, alpha: float) -> None:
    """Put LoRA adapters on the linear layers of a block's attention and MLP; they add nothing until they are trained.

    Raises:
        UsageError: peft is not installed.
    """
    logging.disable(logging.WARNING)  # importing it warns of what other libraries do
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError("layer_tune: lora needs peft", "pip install 'effbench[lora]'") from error
    finally:
        logging.disable(logging.NOTSET)
    own = {part for held in (block.attn, block.mlp) for part in held.modules()}
    linears = [name for name, part in block.named_modules() if isinstance(part, nn.Linear) and part in own]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=linears), block)


def merge_adapters(block: nn.Module) -> None:
    """Add what a block's adapters have learned to its own weights, and take them out."""
    for name, part in list(block.named_modules()):
        if hasattr(part, "lora_A"):
            part.merge()
            holder, _, own = name.rpartition(".")
            setattr(block.get_submodule(holder), own, part.get_base_layer())
    vars(block).pop("peft_config", None)
