"""Image towers that give the tokens of all their patches, as captioners take them."""

from __future__ import annotations

from torch import Tensor, nn


class TimmTokens(nn.Module):
    """Patch tokens of a timm vision transformer, after its last norm.

    Attributes:
        trunk: the timm model; width: of the tokens; patches: their number.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.width = trunk.num_features
        self.patches = trunk.patch_embed.num_patches

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, patches, width)."""
        return self.trunk.forward_features(images)[:, self.trunk.num_prefix_tokens :]


class OpenClipTokens(nn.Module):
    """Patch tokens of an OpenCLIP image tower, before it pools and projects them.

    Attributes:
        trunk: OpenCLIP's `visual`; width: of the tokens; patches: their number.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.trunk = visual
        visual.output_tokens = True
        self.width = visual.transformer.width
        self.patches = visual.grid_size[0] * visual.grid_size[1]

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, patches, width)."""
        return self.trunk(images)[1]
