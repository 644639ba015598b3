"""Token pruning inside the decoder: drop image tokens while the language model reads its prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from effbench.errors import UsageError
from effbench.method import Method, param
from effbench_methods._decoder_choices import NAME, Conditional, Duplication, Pick, Pool, Zip, square_side

if TYPE_CHECKING:
    from effbench.models.decoder import Decoder
    from effbench.models.shortening import Choice
    from effbench.models.tower import ModelView

INSIDE = ("fastv", "pyramid", "dart")  # look at a layer's attention; the others choose before the decoder begins


@dataclass(frozen=True)
class DecoderPrune(Method):
    """Keep ceil(keep x image tokens) of a prompt's image tokens; text stays. Training-free.

    Later layers compute fewer tokens and cache fewer keys and values. At each of the layers in `at`, a share goes.

    fastv: after layer 2 those that the last token attends to most (one row of attention); they keep their positions.
    pyramid: the same by 1/4, 1/2 and 3/4 of the depth, keep each time; positions are renumbered.
    dart: after layer 2 those least like a few pivots, the tokens with the largest keys; positions are kept.

    The others act before the decoder, so that positions are consecutive:
    visionzip: most tokens by class attention in the tower's last block, the rest merged into means by key (behind the
    connector, which for a linear one is the same as before it). Its tower needs a class token.
    divprune: the farthest points by cosine. cdpruner: relevant to the text of the prompt and unlike each other; without
    words in the prompt all are equally relevant, and the arm says so.
    pool: means over a smaller square grid. random: the control.

    With keep=1 nothing is looked at.
    """

    source = (
        "FastV, arXiv 2403.06764; pyramid: PyramidDrop, 2410.17247; visionzip: 2412.04467; divprune: 2503.02175; "
        "cdpruner: 2506.10967; dart: 2502.11494"
    )
    goes_before = ("quantize", "precision", "compile")
    phases = ("test",)
    neutral = {"keep": 1.0}

    by: str = param(
        "fastv",
        "how tokens are chosen",
        choices=("fastv", "pyramid", "dart", "visionzip", "divprune", "cdpruner", "pool", "random"),
    )
    keep: float = param(0.5, "share of the image tokens that stays, at each layer of `at`", above=0, high=1)
    at: tuple[int, ...] = param((), "layers (0-based) before which tokens go; none: 2, or 0 for the others", low=0)
    quarters: bool = param(False, "tokens go before 1/4, 1/2 and 3/4 of the depth, as pyramid has it")
    positions: str = param("published", "of what stays", choices=("published", "keep", "renumber"))
    pivots: int = param(8, "of dart, half of them text tokens", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "at", tuple(sorted(set(self.at))))
        if self.by in ("visionzip", "pool") and (self.quarters or self.at not in ((), (0,))):
            raise UsageError(
                f"{NAME}: by={self.by} makes new tokens before the decoder begins, not inside it",
                "leave at= and quarters= out",
            )
        if self.quarters and self.at:
            raise UsageError(f"{NAME}: quarters=true stands in place of at=", "give one of them")
        if self.pivots != 8 and self.by != "dart":
            raise UsageError(f"{NAME}: pivots={self.pivots} is of by=dart alone", "leave it out")

    @property
    def claims(self) -> tuple[str, ...]:
        return ("random",) if self.by == "random" and self.keep < 1 else ()

    def edit_model(self, model: ModelView) -> None:
        decoder = model.decoder
        if decoder is None:
            raise UsageError(f"{NAME} needs a language model that reads image tokens", "use --task flickr8k_caption")
        at = self.layers(len(decoder))
        self._check(decoder, at)
        if self.by == "pool" and (side := getattr(model.connector, "side", None)):
            square_side(self.keep, side**2)  # of other connectors a first image tells
        if self.keep == 1:
            return
        for layer in at:
            decoder.shorten(layer, self._choice(model))

    def layers(self, depth: int) -> tuple[int, ...]:
        """Before which layers of a decoder tokens go."""
        if self.at:
            return self.at
        if self.by == "pyramid" or self.quarters:
            return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))
        return (2,) if self.by in INSIDE else (0,)

    @property
    def renumbers(self) -> bool:
        if self.positions != "published":
            return self.positions == "renumber"
        return self.by == "pyramid" or not (self.by in INSIDE or self.quarters or any(self.at))

    def _check(self, decoder: Decoder, at: tuple[int, ...]) -> None:
        if at[-1] >= len(decoder):
            raise UsageError(
                f"{NAME}: by={self.by} acts before layer {at[-1]}, but {decoder.name} has layers 0 to "
                f"{len(decoder) - 1}",
                f"use at={len(decoder) // 2}, or a deeper decoder",
            )
        if self.by in INSIDE and at[0] == 0:
            raise UsageError(
                f"{NAME}: by={self.by} looks at the attention of the layer before, and there is none before layer 0",
                "use at=1 or more, or another choice, e.g. by=divprune",
            )

    def _choice(self, model: ModelView) -> Choice:
        match self.by:
            case "visionzip":
                return Zip(self, model)
            case "cdpruner":
                return Conditional(self)
            case "dart":
                return Duplication(self)
            case "pool":
                return Pool(self)
        return Pick(self)

    def controls(self) -> dict[str, Method]:
        if self.keep == 1 or self.by == "random":
            return {}
        at = self.at or ((2,) if self.by in ("fastv", "dart") and not self.quarters else ())
        quarters = self.quarters or (self.by == "pyramid" and not at)
        blind = DecoderPrune("random", self.keep, at, quarters, phase=self.phase)
        positions = "renumber" if self.renumbers else "keep"
        return {"random": blind if blind.renumbers == self.renumbers else replace(blind, positions=positions)}

    def notes(self, model: ModelView) -> list[str]:
        shortener = model.decoder.language.shortener if model.decoder is not None else None
        if shortener is None or not shortener.choices:
            return []
        gone = shortener.gone()
        found = [f"{' / '.join(map(str, gone.values()))} image tokens gone before layer {' / '.join(map(str, gone))}"]
        wordless = any(isinstance(each, Conditional) and each.wordless for each in shortener.choices.values())
        return found + ["the prompt has no words, so that all image tokens are equally relevant to it"] * wordless
