"""Scenes: a few coloured shapes on a background, sampled from a seed and drawn with PIL.

A scene is a function of (seed, split, index) alone; the random numbers are numpy's PCG64, so they are the same on
every platform and in every process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 96  # side of a drawn image, pixels
CELL = SIZE // 3
OVERSAMPLING = 3  # drawn larger, then averaged down: smooth edges

COLOURS = {
    "red": (214, 32, 38),
    "orange": (250, 128, 16),
    "yellow": (246, 210, 24),
    "green": (24, 140, 54),
    "blue": (32, 84, 224),
    "purple": (130, 40, 172),
    "pink": (252, 118, 184),
    "brown": (122, 70, 30),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "grey": (164, 166, 170),
    "black": (34, 34, 38),
    "cream": (250, 238, 208),
    "lavender": (208, 200, 240),
    "mint": (190, 236, 212),
}
TEXTURES = ("plain", "striped", "dotted", "checked")
RADII = {"small": 7, "large": 13}  # pixels
PLACES = (
    ("top left", "top centre", "top right"),
    ("middle left", "centre", "middle right"),
    ("bottom left", "bottom centre", "bottom right"),
)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SPLITS = (
    "train",
    "dev",
    "test",
    "tower",
)  # "tower" is what the shipped tower was trained on, never a split of the task


@dataclass(frozen=True)
class Thing:
    """One shape: names of its attributes, its grid cell (0-2 each) and its centre in pixels."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    centre: tuple[int, int]

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]


@dataclass(frozen=True)
class Scene:
    """What is in a picture. No two things share a colour or a cell."""

    background: str
    texture: str
    things: tuple[Thing, ...]


def generator(seed: int, split: str, index: int) -> np.random.Generator:
    """The random numbers of one scene."""
    return np.random.Generator(np.random.PCG64([seed, SPLITS.index(split), index]))


def sample(rng: np.random.Generator, counts: tuple[int, ...] = (2, 3, 3)) -> Scene:
    """Draw a scene; the number of things and all attributes are uniform over what there is (`counts` at most 8)."""
    count = counts[rng.integers(len(counts))]
    colours = rng.permutation(len(COLOURS))[:count]
    cells = rng.permutation(9)[:count]
    things = []
    for colour, cell in zip(colours, cells, strict=True):
        row, column = divmod(int(cell), 3)
        size = list(RADII)[rng.integers(2)]
        slack = CELL // 2 - RADII[size] - 1
        x, y = (int(v) for v in rng.integers(-slack, slack + 1, 2))
        centre = (CELL * column + CELL // 2 + x, CELL * row + CELL // 2 + y)
        things.append(Thing(SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[colour], size, row, column, centre))
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(background, TEXTURES[rng.integers(len(TEXTURES))], tuple(things))


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image of SIZE x SIZE pixels."""
    paper = BACKGROUNDS[scene.background]
    image = Image.new("RGB", (SIZE * OVERSAMPLING,) * 2, paper)
    pen = ImageDraw.Draw(image)
    _texture(pen, scene.texture, tuple(v - 22 if sum(paper) > 300 else v + 22 for v in paper))
    for thing in scene.things:
        _thing(pen, thing)
    return image.reduce(OVERSAMPLING)


def _texture(pen: ImageDraw.ImageDraw, texture: str, ink: tuple[int, ...]) -> None:
    side, step = SIZE * OVERSAMPLING, 12 * OVERSAMPLING
    half = step // 2
    for y in range(0, side, step):
        match texture:
            case "striped":
                pen.rectangle((0, y, side, y + half - 1), ink)
            case "dotted":
                for x in range(0, side, step):
                    pen.ellipse((x + half - 6, y + half - 6, x + half + 6, y + half + 6), ink)
            case "checked":
                for x in range(0, side, step):
                    pen.rectangle((x, y, x + half - 1, y + half - 1), ink)
                    pen.rectangle((x + half, y + half, x + step - 1, y + step - 1), ink)


def _thing(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y = (v * OVERSAMPLING for v in thing.centre)
    r, ink = RADII[thing.size] * OVERSAMPLING, COLOURS[thing.colour]
    box = (x - r, y - r, x + r, y + r)

    def polygon(*points: tuple[float, float]) -> None:
        pen.polygon([(x + round(r * px), y + round(r * py)) for px, py in points], ink)

    match thing.shape:
        case "circle":
            pen.ellipse(box, ink)
        case "ring":
            pen.ellipse(box, outline=ink, width=r * 2 // 5)
        case "square":
            polygon((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88))
        case "triangle":
            polygon((0, -1), (1, 0.85), (-1, 0.85))
        case "cross":
            polygon((-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1))
            polygon((-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3))
        case "star":
            turns = [(math.pi * k / 5, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
            polygon(*((d * math.sin(a), -d * math.cos(a)) for a, d in turns))
