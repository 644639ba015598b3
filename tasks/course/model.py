"""The course report's model as it was, slips included: do not learn from it, see docs/course-report.md."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

PATCH = 16
WIDTH = 64


def patches(images: Tensor) -> Tensor:
    """(batch, 3, height, width) -> (batch, patches, 768), cut without a permute as in the report.

    Memory holds the red parts of all patches, then the green ones, then the blue ones. Cut into rows of 768 as it lies
    there, a token is one colour of three neighbouring patches; no token is a patch.
    """
    cut = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (batch, 3, rows, columns, PATCH, PATCH)
    return cut.reshape(len(images), -1, 3 * PATCH * PATCH)


class CourseModel(nn.Module):
    """Patches -> tokens -> a head. The baseline's head never looks at the captions.

    Args:
        words: size of the vocabulary, for heads that embed captions.

    Attributes:
        course_head: maps tokens (batch, tokens, WIDTH) and captions (batch, context) to the output.
    """

    #: read by effbench.models.tower.view: there are no transformer blocks that a method could edit
    has_towers: ClassVar[bool] = False

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = words
        self.width = WIDTH
        self.embed = nn.Linear(3 * PATCH * PATCH, WIDTH)
        self.course_head = Projector(WIDTH)

    def forward(self, images: Tensor, captions: Tensor) -> Tensor:
        """Images (batch, 3, height, width) and token ids (batch, context) -> (batch, WIDTH or 1)."""
        return self.course_head(self.embed(patches(images)), captions)


class Projector(nn.Module):
    """The baseline's head: a linear layer on every token, then the mean over the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, tokens: Tensor, captions: Tensor) -> Tensor:
        return self.linear(tokens).mean(dim=1)
