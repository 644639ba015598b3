"""Image size: the tower sees a smaller image, so it has fewer tokens from its first block on."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.errors import UsageError
from effbench.method import Method, param
from effbench.models.tower import ModelView, Tower, image_tower, scaling


@dataclass(frozen=True)
class Resize(Method):
    """Take the images at another side; position embeddings are interpolated.

    The tower scales the images itself (bicubic, antialiased), so the time of it is the method's. It is also the control
    that every other way to spend fewer FLOPs has to beat (`ladder`).

    A captioner's connector takes the smaller grid; where it has fewer patches than image tokens are pooled from them,
    all of them go to the decoder as they are.

    A side above --image-size has no more to show, so the quality there is not shown. Sides are compared downwards, from
    --image-size as the largest; of photos that are smaller than that the record says how many there are.
    """

    source = "interpolated position embeddings: ViT, arXiv 2010.11929; image size matters most: MM1, arXiv 2403.09611"
    goes_before = ("token_prune", "token_merge", "patch_pool", "sparse_attention")
    phases = ("test", "both")  # what is trained at one side has no positions for another

    size: int = param(160, "side of the images in pixels, a multiple of the patch", low=2, high=4096)

    def edit_model(self, model: ModelView) -> None:
        tower = image_tower(model, "resize")
        if tower.resize is None:
            raise UsageError(
                f"resize: this {tower.name} takes images of one side only", "use token_prune to save tokens"
            )
        if tower.grid[0] != tower.grid[1]:
            raise UsageError(
                f"resize knows square images, and this tower's have {tower.grid[0]} x {tower.grid[1]} patches",
                "use token_prune to save tokens",
            )
        tower.resize(self.size)

    def no_quality(self, model: ModelView) -> str:
        native = scaling(model.image.module).native
        return f"upsampled from images of {native} px" if self.size > native else ""

    @classmethod
    def ladder(cls, tower: Tower) -> list[Resize]:
        """Every size below the tower's own that it can take, ascending, from 2 patches a side."""
        return [cls(side * tower.patch) for side in range(2, tower.grid[0])]
