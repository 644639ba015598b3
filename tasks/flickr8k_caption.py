"""Image captioning on Flickr8k: write what a photo shows."""

from __future__ import annotations

from effbench.captioning import Captioning
from effbench.task import Data, DataRequest
from effbench_tasks.flickr8k import Flickr8k


class Flickr8kCaption(Captioning):
    """Captions of Flickr8k's photos (Hodosh, Young and Hockenmaier 2013), judged by five of people each."""

    stand_in = "scenes_caption"

    def load(self, request: DataRequest) -> Data:
        return Flickr8k().load(request)
