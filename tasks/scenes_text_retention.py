"""What tuning on images leaves of a language model's text, on the embedded scenes."""

from __future__ import annotations

from effbench.retention import Retention
from effbench.task import Data, DataRequest
from effbench_tasks.scenes import Scenes


class ScenesTextRetention(Retention):
    """Captions of drawn shapes predicted without the pictures, before and after tuning."""

    embedded = "scenes"
    learns = "ScenesCaption"
    # as scenes_caption
    recommended = {
        **Retention.recommended,
        "epochs": 8,
        "captioning": dict(layers=4, width=128, image_tokens=36, max_tokens=20, new_tokens=15),
    }

    def load(self, request: DataRequest) -> Data:
        return Scenes().load(request)
