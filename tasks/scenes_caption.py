"""Image captioning on the embedded scenes: write what a drawn picture shows."""

from __future__ import annotations

from effbench.captioning import Captioning
from effbench.task import Data, DataRequest
from effbench_tasks.scenes import Scenes


class ScenesCaption(Captioning):
    """Captions of coloured shapes on a background, drawn by a program."""

    embedded = "scenes"
    # a baseline and three more arms in some three minutes on 2 cores, from nothing
    recommended = {
        **Captioning.recommended,
        "epochs": 8,
        "captioning": dict(layers=4, width=128, image_tokens=36, max_tokens=20, new_tokens=15),
    }

    def load(self, request: DataRequest) -> Data:
        return Scenes().load(request)
