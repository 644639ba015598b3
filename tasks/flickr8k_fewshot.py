"""Few-shot captioning on Flickr8k: write what a photo shows, after 0, 2, 4 and 8 other photos with their captions."""

from __future__ import annotations

from effbench.fewshot import FewShot
from effbench.task import Data, DataRequest
from effbench_tasks.flickr8k import Flickr8k


class Flickr8kFewshot(FewShot):
    """Captions of Flickr8k's photos (Hodosh, Young and Hockenmaier 2013) after examples from its training split."""

    stand_in = "scenes_fewshot"
    learns = "Flickr8kCaption"

    def load(self, request: DataRequest) -> Data:
        return Flickr8k().load(request)
