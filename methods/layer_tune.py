"""Layer-selective tuning: only part of a tower or of a decoder is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.method import Method, TrainingPlan, param
from effbench.models.decoder import Decoder
from effbench.models.tower import image_tower
from effbench_methods._tuned_parts import biases, head_is_stem, number, stem, unit, untrained
from effbench_methods.algorithms.adapters import add_adapters, merge_adapters
from effbench_methods.algorithms.layer_choice import PLACES, best, by_place
from effbench_methods.algorithms.layer_scores import SCORED, scores
from effbench_methods.algorithms.lisa import in_turns

if TYPE_CHECKING:
    from effbench.calibration_set import CalibrationSet
    from effbench.models.tower import ModelView, Tower

WHOLE = ("full", "head", "bitfit", "layernorm", "frozen")  # where no number of blocks is chosen
OF_DECODERS = ("multimodal", "attention", "lisa", "frozen")


@dataclass(frozen=True)
class LayerTune(Method):
    """Train only some blocks of a decoder or a tower, and what comes after its blocks; the rest keeps its weights.

    A training step costs 1 forward pass + D + w, counted in matrix products: D is the share of the depth above the
    lowest trained part, down to which the gradient has to come (attention's products count twice in it, with a gradient
    for either factor), and w the share of the weights that is trained. So top saves most; uniform and bottom train
    block 0 and save weight gradients and optimiser state alone. Adapters do not lower D either. A trained connector or
    token embedding makes D = 1: in a decoder top saves by depth with connector=false alone.

    uniform, top, mid_top, middle, mid_bottom, bottom, hybrid: by place (see `algorithms.layer_choice`; hybrid, half of
    them at the bottom and half at the top, is effbench's own definition). The blocks that score highest on calibration
    data, once per seed: block_influence, multimodal (that of image tokens and of text tokens, the mean of the two),
    angular (the angle that one block turns the tokens by), attention (what texts pay to the image), gradient,
    parameter_change (that of a short training of the whole model with AdamW). full: all blocks. head: none. bitfit: the
    biases of all blocks. layernorm: weights and biases of the norms in all blocks. frozen: nothing of the decoder, the
    connector alone (VILA's question). lisa: other layers now and then, drawn blindly, with embeddings and head always;
    its authors' example (LMFlow) draws every 20 steps, here `draws` is how often in the whole training.

    With lora=RANK the linear layers of the chosen blocks get adapters, which alone are trained there, through peft.
    They are merged before testing, so that testing costs what the baseline's does.
    """

    source = (
        "arXiv 2412.12785; bitfit: BitFit, 2106.10199; lora: LoRA, 2106.09685; block_influence: 2403.03853; "
        "lisa: LISA, 2403.17919; frozen: VILA, 2312.07533"
    )
    default_phase = "train"
    phases = ("train", "both")
    neutral = {}

    share: float = param(0.25, "share of the blocks that is trained, rounded, at least one block", above=0, high=1)
    layers: int | None = param(None, "number of blocks that are trained, in place of share", low=1)
    by: str | None = param(
        None,
        "which blocks are trained; none: uniform, or list with at=",
        choices=(*PLACES, "list", *SCORED, "lisa", *WHOLE[1:]),
    )
    at: tuple[int, ...] = param((), "by=list: the blocks (0-based)", low=0)
    stem: bool | None = param(
        None,
        "what comes before the blocks (patches or token embedding, positions) is trained; none: with by=full, lisa",
    )
    connector: bool = param(True, "target=decoder: what hands images over to it is trained")
    lora: int | None = param(None, "rank of LoRA adapters, trained in place of the blocks' own weights", low=1)
    alpha: float | None = param(
        None, "the adapters' output is scaled by alpha / rank; none: alpha is the rank", above=0
    )
    target: str | None = param(
        None,
        "image tower, text tower or decoder; none: the decoder where there is one, else the image tower",
        choices=("tower", "text", "decoder"),
    )
    images: int = param(64, "training images that a score is computed on", low=1)
    steps: int = param(20, "by=parameter_change: steps of the trial training", low=1)
    draws: int = param(20, "by=lisa: how often in the training layers are drawn, at equal distances", low=1)

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
            ("lora", None, self.way not in (*WHOLE[1:], "lisa")),
            ("images", 64, self.way in SCORED),
            ("steps", 20, self.way == "parameter_change"),
            ("draws", 20, self.way == "lisa"),
        ):
            if getattr(self, name) != default and not unless:
                raise UsageError(f"layer_tune: {name} says nothing with by={self.way}", f"leave out {name} or by")
        if self.way == "head" and self.stem:
            raise UsageError("layer_tune: by=head trains nothing of the tower, its stem neither", "leave stem out")
        if self.way == "frozen" and self.stem:
            raise UsageError("layer_tune: by=frozen trains nothing of the decoder, its stem neither", "leave stem out")
        if self.way == "lisa" and self.stem is False:
            raise UsageError("layer_tune: by=lisa always trains the token embedding", "leave stem out")
        if self.stem is not None and self.stem == (self.way == "lisa" or (self.way == "full" and not self.lora)):
            object.__setattr__(self, "stem", None)
        if self.way == "frozen" and not self.connector:
            raise UsageError(
                "layer_tune: by=frozen trains the connector alone, and connector=false freezes it too",
                "leave connector out",
            )
        if self.target in ("tower", "text"):
            self._refuse_without_decoder(f"target={self.target} is none")
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
        usual = model.image if model.decoder is None else model.decoder
        target = None if tower is usual else self.target  # one name for one choice
        if self.way in (*WHOLE, "list", "lisa"):
            return replace(self, target=target)
        chosen = self._highest(tower, model, calibration) if self.way in SCORED else self._chosen(tower)
        return replace(self, by=None, at=chosen, share=0.25, layers=None, images=64, steps=20, target=target)

    def _highest(self, tower: Tower | Decoder, model: ModelView, calibration: CalibrationSet) -> tuple[int, ...]:
        """The blocks that score highest on calibration data."""
        k = number("layer_tune", tower, self.layers, self.share)
        calibration.need(self.images, f"layer_tune:by={self.way}: images={self.images}")
        steps = 1 if calibration.thrifty else self.steps
        found = scores(self.way, tower, model, calibration, self.images, steps)
        if not found.isfinite().all():
            raise EffbenchError(f"layer_tune: by={self.way} gives scores that are not finite", "choose blocks by place")
        return best(found.tolist(), k)

    def edit_model(self, model: ModelView) -> None:
        tower = self._tower(model)
        if self.lora and self.lora > tower.width:
            raise UsageError(
                f"layer_tune: lora={self.lora} is more than the width {tower.width} of this {tower.name}",
                f"lora takes 1 to {tower.width} here",
            )
        # who asks what testing costs has not settled: merged, adapters cost nothing
        if self.lora and self.way not in SCORED:
            for index in self._chosen(tower):
                add_adapters(tower.blocks[index], self.lora, self.alpha or self.lora)

    def edit_training(self, plan: TrainingPlan) -> None:
        tower = self._tower(plan.model)
        if self.way in SCORED:
            raise InvalidError(f"layer_tune:by={self.way} was not settled", "call settle before edit_training")
        if not isinstance(tower, Decoder) and all(plan.freezes_all_of(block.attn) for block in tower.blocks):
            raise UsageError(
                "layer_tune chooses what of the tower is trained, and this one is frozen (--train locked)",
                f"use --train full, or target={'text' if plan.model.decoder is None else 'decoder'}",
            )
        if not self.connector:
            plan.frozen.append(plan.model.connector)
        if self.way == "frozen":
            plan.frozen.append(tower.language)
            return
        if self.way == "bitfit" and not biases(tower.blocks):
            raise UsageError(
                f"layer_tune: by=bitfit trains biases, and the {unit(tower)}s of this {tower.name} have none",
                "use by=layernorm, or lora=1",
            )
        if self.way == "lisa":
            plan.each_step.append(in_turns(tower, number("layer_tune", tower, self.layers, self.share), self.draws))
            plan.plain_engine = "layer_tune:by=lisa, whose resting layers it would let decay and go on moving"
        kept = stem(tower)
        if not self._trains_stem:
            plan.frozen += kept
        else:
            plan.frozen += [p for part in kept for p in untrained(part, self.way)]
        chosen = self._chosen(tower)
        for index, block in enumerate(tower.blocks):
            if index not in chosen:
                plan.frozen.append(block)
            elif self.lora:
                adapters = {name: p for name, p in block.named_parameters() if ".lora_" in name}
                plan.frozen += [p for name, p in block.named_parameters() if name not in adapters]
                plan.trained += adapters.values()
            else:
                plan.frozen += untrained(block, self.way)

    def finish(self, model: ModelView, calibration: CalibrationSet) -> None:
        if self.lora:
            for block in self._tower(model).blocks:
                merge_adapters(block)

    def notes(self, model: ModelView) -> list[str]:
        if self.way not in (*WHOLE, "list", "lisa"):
            return []
        tower = self._tower(model)
        blocks = f"{unit(tower)}s"
        if self.way == "frozen":
            return [f"trains the connector alone, nothing of the {tower.name}"]
        several = f"{self.layers or f'{100 * self.share:g} %'} of the {blocks}"
        what = {  # without their number: another method may have removed some since
            "head": f"none of the {blocks}",
            "bitfit": f"the biases of all {blocks}",
            "layernorm": f"the norms of all {blocks}",
            "full": f"all {blocks}",
            "lisa": f"{several} at a time (drawn {self.draws} times)",
        }.get(self.way, f"{blocks if len(self.at) > 1 else unit(tower)} {', '.join(map(str, self.at))}")
        if self.lora:
            what = f"adapters of rank {self.lora}, merged for testing, in {what}"
        before = f"what comes before the {blocks}, " if self._trains_stem else ""
        if isinstance(tower, Decoder) and self.connector:
            before = f"the connector, {before}"
        join = "only" if self.way == "head" else "and"
        found = [f"trains {before}{what} of the {tower.name}, {join} what comes after the {blocks}"]
        if isinstance(tower, Decoder) and not self.connector:
            found.append("the connector keeps its weights")
        if head_is_stem(tower):
            fate = "trained, down to which the gradient comes" if self._trains_stem else "not trained: stem=true does"
            found.append(f"head and token embedding of the {tower.name} are one matrix, which is {fate}")
        if self.way == "lisa":
            found.append("the optimiser keeps its moments of every layer that was drawn: their memory is not saved")
        return found

    @property
    def _trains_stem(self) -> bool:
        return self.stem if self.stem is not None else self.way == "lisa" or (self.way == "full" and not self.lora)

    def _tower(self, model: ModelView) -> Tower | Decoder:
        """What the method acts on.

        Raises:
            UsageError: the model has none, or not what a parameter is about.
        """
        if self.target == "decoder" and model.decoder is None:
            raise UsageError(
                "layer_tune: target=decoder needs a captioning task, and this model only aligns images and texts",
                "use target=tower or target=text",
            )
        if model.decoder is not None and self.target in (None, "decoder"):
            return model.decoder
        self._refuse_without_decoder("this model has none")
        if self.target != "text":
            return image_tower(model, "layer_tune")
        if model.text is None:
            raise UsageError(
                "layer_tune: target=text needs a text tower of transformer blocks",
                "choose another model, or target=tower",
            )
        return model.text

    def _refuse_without_decoder(self, why: str) -> None:
        """Refuse what is about a decoder."""
        what = f"by={self.way}" if self.way in OF_DECODERS else "" if self.connector else "connector=false"
        if what:
            raise UsageError(
                f"layer_tune: {what} is about a captioner's decoder, and {why}",
                f"leave {what.partition('=')[0]} out, or use a captioning task, e.g. --task flickr8k_caption",
            )

    def _chosen(self, tower: Tower | Decoder) -> tuple[int, ...]:
        """The blocks of which something is trained."""
        if self.way in ("head", "frozen"):
            return ()
        if self.way in (*WHOLE, "lisa"):
            return tuple(range(len(tower)))
        if self.way != "list":
            return by_place(self.way, len(tower), number("layer_tune", tower, self.layers, self.share))
        if self.at[-1] >= len(tower):
            raise UsageError(
                f"layer_tune: at={self.at[-1]}, but this {tower.name} has {unit(tower)}s 0 to {len(tower) - 1}",
                f"choose other {unit(tower)}s",
            )
        return self.at
