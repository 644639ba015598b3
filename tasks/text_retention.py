"""What tuning on images leaves of a language model's text, on Flickr8k."""

from __future__ import annotations

from effbench.retention import Retention
from effbench.task import Data, DataRequest
from effbench_tasks.flickr8k import Flickr8k


class TextRetention(Retention):
    """Flickr8k's captions predicted without their photos, before and after tuning: what does tuning forget?"""

    stand_in = "scenes_text_retention"
    learns = "Flickr8kCaption"

    def load(self, request: DataRequest) -> Data:
        return Flickr8k().load(request)
