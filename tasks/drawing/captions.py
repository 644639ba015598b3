"""Five captions of a scene, each of which tells a different part of it."""

from __future__ import annotations

import numpy as np

from effbench_tasks.drawing.scene import Scene, Thing


def captions(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    """Five different captions of 12 to 15 words. What they say is true; what they leave out is left open."""
    order = rng.permutation(len(scene.things))
    a, b, c = (scene.things[order[i % len(order)]] for i in range(3))
    return (
        f"{_sized(a)} {_where(a)} and {_sized(b)}",
        f"{_thing(c)} and {_sized(b)} on a {scene.texture} {scene.background} background",
        f"{_relation(a, b)} {_where(b)}",
        f"{_count(scene)} on {scene.texture} {scene.background} with {_sized(b)} {_where(b)}",
        f"{_thing(c)} {_where(c)} and {_thing(b)} {_where(b)}",
    )


def dense(scene: Scene) -> str:
    """Everything that is in a scene, in reading order, in the words of its captions: 20 to 36 of them.

    It stands for the synthetic captions that a captioning model writes for training (VeCap in MM1, arXiv 2403.09611),
    without such a model's errors.
    """
    listed = " and ".join(f"{_sized(thing)} {_where(thing)}" for thing in sorted(scene.things, key=_reading))
    return f"{_count(scene)} on a {scene.texture} {scene.background} background with {listed}"


def _reading(thing: Thing) -> tuple[int, int]:
    return thing.row, thing.column


def _thing(thing: Thing) -> str:
    return f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.colour} {thing.shape}"


def _sized(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


def _where(thing: Thing) -> str:
    return f"in the {thing.place}"


def _count(scene: Scene) -> str:
    return f"{('two', 'three')[len(scene.things) - 2]} shapes"


def _relation(a: Thing, b: Thing) -> str:
    """Two things and how the first lies to the second: by rows, within a row by columns."""
    if a.row != b.row:
        way = "above" if a.row < b.row else "below"
    else:
        way = "left of" if a.column < b.column else "right of"
    return f"{_sized(a)} {way} {_sized(b)}"
