"""Connector: what stands between the image tower and the decoder of a captioner."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from effbench.errors import UsageError
from effbench.method import Method, TrainingPlan, param
from effbench.models.connectors import DEPTHS, TYPES, grid_side, make, uneven
from effbench.models.language import context_of
from effbench.models.tower import ModelView, Tower, image_tower, scaling

FIXED = ("linear", "mlp", "shuffle2", "shuffle3")  # how many tokens they give follows from the patches
SQUARE = ("pool", "c_abstractor")  # the tokens that they give are a square grid
OF_A_GRID = ("c_abstractor", "shuffle2", "shuffle3")  # they take one


@dataclass(frozen=True)
class Connector(Method):
    """Put a fresh connector in place of the baseline's, which pools the patches and has one linear layer; train it.

    linear, mlp (two layers, GELU) give a token for each patch. pool takes means over squares of patches, then a linear
    layer; attention has learned queries. perceiver has latents that attend to patches and latents, layer by layer;
    c_abstractor convolutions before and after the means, then two linear layers. shuffle2 and shuffle3 make the patches
    of 2 x 2 and 3 x 3 squares the channels of one token, then an MLP.

    Behind a tower method that drops or merges patches, pool takes means over groups of neighbours in raster order,
    attention and perceiver take any number, linear and mlp hand on what is left; the others need a grid and refuse.

    The base that all arms start from must not have trained the baseline's connector: --stages language.
    """

    source = (
        "comparison: MM1, arXiv 2403.09611; mlp: LLaVA-1.5, 2310.03744; perceiver: Flamingo, 2204.14198; c_abstractor: "
        "Honeybee, 2312.06742; shuffles: VILA, 2312.07533, and NVILA, 2412.04468"
    )
    default_phase = "both"
    phases = ("both",)  # what is trained with it is tested with it

    type: str = param("mlp", "which connector", choices=TYPES)
    tokens: int | None = param(
        None, "image tokens that it hands over; none: as many as the baseline's", low=1, high=65536
    )
    depth: int | None = param(
        None, "layers of perceiver (none: 6), bottlenecks in either stage of c_abstractor (none: 3)", low=1, high=64
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None and self.type not in DEPTHS:
            raise UsageError(
                f"connector: depth={self.depth} says nothing with type={self.type}", "leave out depth, or use perceiver"
            )

    def edit_model(self, model: ModelView) -> None:
        captioner, tower = of_captioner(model), image_tower(model, "connector")
        tokens = self.tokens or baseline_tokens(model, tower)
        if self.type in SQUARE and math.isqrt(tokens) ** 2 != tokens:
            near = math.isqrt(tokens)
            raise UsageError(
                f"connector: type={self.type} gives a square grid, and tokens={tokens} is none",
                f"use tokens={near**2} or tokens={(near + 1) ** 2}",
            )
        old = next(model.connector.parameters())
        fresh = make(self.type, captioner.image_encoder.width, model.decoder.width, tokens, self.depth)
        captioner.connector = model.connector = fresh.to(old.device, old.dtype).train(captioner.training)

    def edit_training(self, plan: TrainingPlan) -> None:
        self.check(plan.model)
        if any(part is plan.model.connector for part in plan.frozen):
            raise UsageError(
                "connector: the fresh connector would not be trained (connector=false)", "leave connector=false out"
            )

    def finish(self, model: ModelView, calibration: object) -> None:
        self.check(model)

    def check(self, model: ModelView) -> None:
        """Refuse what does not fit the tower, edited by all methods of a stack in whatever order they stand.

        Raises:
            UsageError: says what is wrong and what would fit.
        """
        tower = image_tower(model, "connector")
        patches, edit = tower.patch_tokens, breaks_grid(tower)
        if self.type in OF_A_GRID and edit:
            raise UsageError(
                f"connector: type={self.type} needs the grid of patches, which {edit} breaks up",
                "use type=pool, attention or perceiver, or compare them as two arms",
            )
        if self.type in (*SQUARE, *OF_A_GRID) and tower.grid[0] != tower.grid[1]:
            raise UsageError(
                f"connector: type={self.type} knows square images, and this tower's have {tower.grid[0]} x "
                f"{tower.grid[1]} patches",
                "use type=attention, perceiver, linear or mlp",
            )
        given = patches
        if self.type.startswith("shuffle"):
            along = int(self.type[-1])
            side = grid_side(patches, self.type)
            if side % along:
                raise uneven(self.type, side, along)
            given = patches // along**2
        if self.type in FIXED:
            if self.tokens not in (None, given):
                raise UsageError(
                    f"connector: type={self.type} gives {given} tokens of {patches} patches, not tokens={self.tokens}",
                    "leave tokens out, or use type=pool, attention or perceiver",
                )
        else:
            given = handed_over(model.connector)
            if given > patches:
                raise UsageError(
                    f"connector: {given} image tokens are more than the {patches} patches of this {tower.name}",
                    f"use tokens={math.isqrt(patches) ** 2} or fewer",
                )
        captioner, context = model.model, context_of(model.decoder.config)
        answer = max(captioner.options.max_tokens, captioner.options.new_tokens)
        if given + len(captioner.before) + len(captioner.after) + answer > context:
            raise UsageError(
                f"connector: type={self.type} hands {given} image tokens over, and beside an answer of {answer} the "
                f"decoder's context of {context} has no room for them",
                "use a type that pools, with fewer tokens",
            )

        if self.type in OF_A_GRID and any(block.token_edit is not None for block in tower.blocks):
            try_one_image(captioner, tower)

    def notes(self, model: ModelView) -> list[str]:
        found = [f"the {self.type} connector has {sum(p.numel() for p in model.connector.parameters()):,} parameters"]
        if self.type == "pool" and (edit := breaks_grid(model.image)):
            found.append(f"{edit} leaves no grid: the connector's means are over neighbours in raster order")
        return found


def of_captioner(model: ModelView):
    """The captioner whose connector is exchanged.

    Raises:
        UsageError: it is none, a whole model of a library, or one whose base has trained the baseline's connector.
    """
    if model.decoder is None:
        raise UsageError(
            "connector stands between an image tower and a decoder, and this model has no decoder",
            "use a captioning task (effbench list tasks)",
        )
    options = model.model.options
    if options.decoder == "own":
        raise UsageError(
            "connector: a whole model brings its own connector, which its decoder was trained with",
            "use --backbone timm:NAME or openclip:NAME, with --decoder tiny or hf:PATH",
        )
    trained = [stage for stage in options.stages if stage != "language"]
    if trained:
        raise UsageError(
            f"connector: the base that all arms start from has trained the baseline's connector (stage "
            f"{' and '.join(trained)}), and a fresh one would start behind it",
            "use --stages language",
        )
    return model.model


def baseline_tokens(model: ModelView, tower: Tower) -> int:
    """Image tokens that the connector hands over which a captioner was built with."""
    side = getattr(model.connector, "side", None)
    return side**2 if side else tower.patch_tokens


def handed_over(connector) -> int:
    """Image tokens of a connector that gives as many whatever the patches are."""
    latents = getattr(connector, "latents", getattr(connector, "queries", None))
    return connector.side**2 if latents is None else len(latents)


def try_one_image(captioner, tower: Tower) -> None:
    """Let one image through: a tower method may hand a coarser grid over, which the connector refuses or takes."""
    reference, training = next(captioner.parameters()), captioner.training
    scaled = scaling(tower.module)
    side = scaled.native if scaled else tower.grid[0] * tower.patch
    with torch.no_grad(), torch.random.fork_rng():
        captioner.eval().connector(captioner.features(reference.new_zeros(1, 3, side, side)))
    captioner.train(training)


def breaks_grid(tower: Tower) -> str:
    """Name of a method that leaves the patch tokens on no grid; empty for none."""
    edits = [block.token_edit for block in tower.blocks if block.token_edit is not None]
    return next((edit.name for edit in edits if not edit.keeps_grid), "")
