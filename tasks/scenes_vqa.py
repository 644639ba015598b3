"""Visual question answering on the embedded scenes: what colour, how many, where."""

from __future__ import annotations

from functools import partial

from effbench.task import Data, DataRequest, Example
from effbench.vqa import QuestionAnswering
from effbench_tasks.drawing.questions import KINDS, ask
from effbench_tasks.drawing.scene import draw, generator, sample
from effbench_tasks.scenes import SEED, drawn

THINGS = (1, 2, 3, 4)  # in a scene, equally often: "how many shapes are there" has no likeliest answer


class ScenesVqa(QuestionAnswering):
    """Questions on colour, count and position of drawn shapes, each with one right answer."""

    embedded = "scenes"
    kinds = KINDS
    # one image token per cell of a scene; all is learned from nothing, since text alone answers no question
    recommended = {
        **QuestionAnswering.recommended,
        "epochs": 20,
        "batch_size": 32,
        "lr": 2e-3,
        # wider first weights than 0.02, with which it only learned to name any thing that is there
        "captioning": dict(layers=4, width=128, init=0.09, image_tokens=9, stages=(), max_tokens=4, new_tokens=3),
    }

    def load(self, request: DataRequest) -> Data:
        """Sample the scenes and ask about them; the pictures are drawn when they are needed.

        Raises:
            UsageError: a path was given, where there is nothing to read.
        """
        return drawn(request, examples)


def examples(split: str, count: int) -> list[Example]:
    """The first `count` scenes of a split with questions and answers."""
    scenes = [sample(generator(SEED, split, index), THINGS) for index in range(count)]
    asked = ask(scenes, generator(SEED, split, count))
    return [
        Example(partial(draw, scene), tuple(a for _, a in pairs), f"{split}-{index}", tuple(q for q, _ in pairs))
        for index, (scene, pairs) in enumerate(zip(scenes, asked, strict=True))
    ]
