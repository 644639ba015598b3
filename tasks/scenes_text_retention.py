"""What tuning on images leaves of a language model's text, on the embedded scenes."""

from __future__ import annotations

from effbench.retention import Retention
from effbench.task import Data, DataRequest
from effbench_tasks.scenes import Scenes
from effbench_tasks.scenes_caption import ScenesCaption


class ScenesTextRetention(Retention):
    """Captions of drawn shapes predicted without the pictures, before and after tuning."""

    embedded = "scenes"
    learns = "ScenesCaption"
    recommended = ScenesCaption.recommended

    def load(self, request: DataRequest) -> Data:
        return Scenes().load(request)
