"""What layer_tune trains of a tower or a decoder: what comes before its blocks, and parts of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from effbench.errors import UsageError
from effbench.models.decoder import Decoder

if TYPE_CHECKING:
    from effbench.models.tower import Tower

Part = nn.Module | nn.Parameter
# what comes before the blocks, by the names that timm and OpenCLIP give it; a tower has some of them
TOWER_STEM = (
    *("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "norm_pre"),
    *("conv1", "class_embedding", "ln_pre", "token_embedding", "positional_embedding", "cls_emb"),
)
# the same of a decoder, beside its embeddings: OPT, BLOOM
DECODER_STEM = ("project_in", "word_embeddings_layernorm")


def stem(tower: Tower | Decoder) -> list[Part]:
    """What comes before the blocks; of a decoder the embeddings of tokens and positions."""
    if not isinstance(tower, Decoder):
        held = [getattr(tower.module, name, None) for name in TOWER_STEM]
        return [part for part in held if isinstance(part, Part)]
    within = {part for block in tower.blocks for part in block.modules()}
    named = [getattr(tower.module, name, None) for name in DECODER_STEM]
    embeddings = [part for part in tower.module.modules() if isinstance(part, nn.Embedding) and part not in within]
    return [*embeddings, *(part for part in named if isinstance(part, nn.Module))]


def head_is_stem(tower: Tower | Decoder) -> bool:
    """Whether a decoder's head and its token embedding are one matrix (GPT-2)."""
    if not isinstance(tower, Decoder):
        return False
    before = {id(p) for part in stem(tower) for p in part.parameters()}
    return any(id(p) in before for p in tower.language.head.parameters())


def biases(part: nn.Module) -> list[nn.Parameter]:
    """The biases of all layers in it (BitFit)."""
    return [p for name, p in part.named_parameters() if name.rpartition(".")[2] == "bias"]


def norms(part: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the norms in it."""
    return [p for m in part.modules() if "norm" in type(m).__name__.lower() for p in m.parameters()]


def untrained(part: Part, way: str) -> list[nn.Parameter]:
    """The parameters of a trained part that by=bitfit and by=layernorm leave as they are."""
    if way not in ("bitfit", "layernorm"):
        return []
    if isinstance(part, nn.Parameter):
        return [part]
    trained = {id(p) for p in (biases(part) if way == "bitfit" else norms(part))}
    return [p for p in part.parameters() if id(p) not in trained]


def number(method: str, tower: Tower | Decoder, layers: int | None, share: float) -> int:
    """How many blocks `layers` or else `share` asks for, at least one.

    Raises:
        UsageError: more than there are.
    """
    if layers is None:
        return max(1, int(share * len(tower) + 0.5))
    if layers > len(tower):
        raise UsageError(
            f"{method}: layers={layers}, but this {tower.name} has {len(tower)} {unit(tower)}s",
            f"layers takes 1 to {len(tower)} here",
        )
    return layers


def unit(tower: Tower | Decoder) -> str:
    """What one of its parts is called."""
    return "layer" if isinstance(tower, Decoder) else "block"
