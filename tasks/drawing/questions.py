"""Questions about scenes with exactly one right answer each: of what colour, how many, where.

Which of all possible ones are asked is balanced, so that a question's words do not give its answer away
(VQA v2, arXiv 1612.00837).
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from effbench_tasks.drawing.scene import RADII, SHAPES, Scene, Thing

#: what a question begins with, by kind
KINDS = {"colour": "what colour", "count": "how many", "position": "where"}
EACH = 2  # questions of a kind about a scene
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")

Asked = tuple[str, str]
"""A question and its answer."""


def ask(scenes: list[Scene], rng: np.random.Generator) -> list[list[Asked]]:
    """EACH questions of every kind about each scene, in random order (fewer where there are not so many).

    Of all that can be asked, what was asked with that answer least often so far: so the answers to a question come up
    equally often, as far as the scenes have them.
    """
    times: Counter[Asked] = Counter()
    found = []
    for scene in scenes:
        chosen: list[Asked] = []
        for possible in (colour(scene), count(scene), position(scene)):
            mixed = [possible[i] for i in rng.permutation(len(possible))]
            chosen += sorted(mixed, key=times.__getitem__)[:EACH]
        times.update(chosen)
        found.append([chosen[i] for i in rng.permutation(len(chosen))])
    return found


def colour(scene: Scene) -> list[Asked]:
    """What colour a thing has that is told by its shape, size and shape, or place."""
    told = [(f"the {name}", thing) for name, thing in _unique(scene)]
    told += [(f"the shape in the {thing.place}", thing) for thing in scene.things]
    return [(f"what colour is {name}", thing.colour) for name, thing in told]


def count(scene: Scene) -> list[Asked]:
    """How many shapes there are, of any kind, of a size or of a name."""
    sizes, names = ([getattr(thing, field) for thing in scene.things] for field in ("size", "shape"))
    counted = [("shapes", len(scene.things))]
    counted += [(f"{size} shapes", sizes.count(size)) for size in RADII]
    counted += [(f"{name}{'es' if name.endswith('s') else 's'}", names.count(name)) for name in SHAPES]
    return [(f"how many {what} are there", NUMBERS[number]) for what, number in counted]


def position(scene: Scene) -> list[Asked]:
    """Where a thing is that is told by its shape, size and shape, or colour and shape."""
    told = _unique(scene) + [(f"{thing.colour} {thing.shape}", thing) for thing in scene.things]
    return [(f"where is the {name}", thing.place) for name, thing in told]


def _unique(scene: Scene) -> list[tuple[str, Thing]]:
    """The things that their shape tells from all others, and those that size and shape do."""
    short, long = ([name(thing) for thing in scene.things] for name in (_shape, _sized))
    return [
        (name, thing)
        for names in (short, long)
        for name, thing in zip(names, scene.things, strict=True)
        if names.count(name) == 1
    ]


def _shape(thing: Thing) -> str:
    return thing.shape


def _sized(thing: Thing) -> str:
    return f"{thing.size} {thing.shape}"
