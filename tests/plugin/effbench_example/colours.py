"""Images of one colour, and captions that name it."""

from functools import partial

from PIL import Image

from effbench.alignment import Alignment
from effbench.task import Data, Example

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")


def draw(colour, size):
    return Image.new("RGB", (size, size), colour)


class Colours(Alignment):
    """Match images of one colour with captions that name it."""

    def load(self, request):
        examples = [Example(partial(draw, c, 40), (f"all {c}", f"nothing but {c}"), f"{c}.png") for c in COLOURS]
        return Data("colours", {"train": examples * 4, "dev": examples, "test": examples}, fingerprint="colours 1")
