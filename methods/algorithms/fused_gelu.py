"""Which GELU of a transformer block can be computed inside the kernel of the linear layer before it."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from effbench.models.tower import ModelView, Tower


class GeluDoneBefore(nn.GELU):
    """A GELU that the layer before it has computed already: it passes on what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def gelus(model: ModelView) -> dict[nn.Linear, tuple[nn.Module, str]]:
    """First linear layers of plain MLPs that an exact GELU follows, and where that GELU is."""
    return {linear: where for tower in (model.image, model.text) if tower for linear, where in gelus_of(tower).items()}


def gelus_of(tower: Tower) -> dict[nn.Linear, tuple[nn.Module, str]]:
    """The same of one tower: layer -> (the MLP, the name of its GELU)."""
    found = {}
    for block in tower.blocks:
        children = list(block.mlp.named_children())
        layers = [child for _, child in children if isinstance(child, nn.Linear)]
        if len(layers) != 2 or layers[0].out_features != layers[1].in_features:
            continue  # gated
        for (_, linear), (name, act) in pairwise(children):
            if linear is layers[0] and type(act) is nn.GELU and act.approximate == "none":
                found[linear] = (block.mlp, name)
    return found
