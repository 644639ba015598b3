"""Image captioning on the embedded scenes: write what a drawn picture shows."""

from __future__ import annotations

from effbench.captioning import Captioning
from effbench.task import Data, DataRequest
from effbench_tasks.scenes import Scenes


class ScenesCaption(Captioning):
    """Captions of coloured shapes on a background, drawn by a program."""

    embedded = "scenes"

    def load(self, request: DataRequest) -> Data:
        return Scenes().load(request)
