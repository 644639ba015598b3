"""Image-text alignment on the embedded data set: scenes drawn from a seed, five captions each, 2000/500/500."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial

from effbench.alignment import Alignment
from effbench.errors import UsageError
from effbench.task import Data, DataRequest, Example
from effbench_tasks.drawing.captions import captions, dense
from effbench_tasks.drawing.scene import draw, generator, sample

SEED = 0
SIZES = {"train": 2000, "dev": 500, "test": 500}


class Scenes(Alignment):
    """Coloured shapes on a background, drawn by a program: needs no download, proves nothing about photos."""

    embedded = "scenes"
    # enough for text-to-image R@5 between 60 and 95 %, neither chance nor ceiling
    recommended = {**Alignment.recommended, "epochs": 8}

    def load(self, request: DataRequest) -> Data:
        """Sample the scenes and write their captions; the pictures are drawn when they are needed.

        Raises:
            UsageError: a path was given, where there is nothing to read.
        """
        return drawn(request, examples)


def drawn(request: DataRequest, examples: Callable[[str, int], list[Example]]) -> Data:
    """The data of a task on scenes.

    Args:
        examples: gives so many examples of a split.

    Raises:
        UsageError: a path was given, where there is nothing to read.
    """
    if request.path is not None:
        raise UsageError(f"scenes are drawn, not read from {request.path}", "leave --data out")
    splits = {split: examples(split, count) for split, count in SIZES.items()}
    origin = f"drawn by effbench from seed {SEED}"
    return Data("scenes", splits, fingerprint(splits), origin, synthetic=True)


def examples(split: str, count: int, synthetic: bool = False) -> list[Example]:
    """The first `count` scenes of a split, without those of which a caption was seen before.

    Args:
        synthetic: each has a description of everything in it beside its captions.
    """
    seen: set[str] = set()
    chosen: list[Example] = []
    index = 0
    while len(chosen) < count:
        rng = generator(SEED, split, index)
        scene = sample(rng)
        lines = captions(scene, rng)
        if seen.isdisjoint(lines):
            seen.update(lines)
            second = (dense(scene),) if synthetic else ()
            chosen.append(Example(partial(draw, scene), lines, f"{split}-{index}", synthetic=second))
        index += 1
    return chosen


def fingerprint(splits: dict[str, list[Example]]) -> str:
    """sha256 over questions, captions, those of a second source, and the pixels of some pictures of each split.

    Drawing depends on Pillow.
    """
    digest = hashlib.sha256()
    for split, listed in splits.items():
        digest.update(
            json.dumps(
                [split, [[e.name, *filter(None, [e.questions, e.synthetic]), e.captions] for e in listed]]
            ).encode()
        )
        for example in listed[:16]:
            digest.update(example.image().tobytes())
    return digest.hexdigest()
