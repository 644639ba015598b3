"""Few-shot captioning on the embedded scenes, which have synthetic captions beside their own."""

from __future__ import annotations

from functools import partial

from effbench.fewshot import FewShot
from effbench.task import Data, DataRequest
from effbench_tasks.scenes import drawn, examples
from effbench_tasks.scenes_caption import ScenesCaption


class ScenesFewshot(FewShot):
    """Captions of coloured shapes after examples; for training each scene has a description of everything in it too."""

    embedded = "scenes"
    recommended = {
        **ScenesCaption.recommended,
        "captioning": ScenesCaption.recommended["captioning"] | FewShot.recommended["captioning"],
    }

    def load(self, request: DataRequest) -> Data:
        """The scenes and captions of `scenes_caption`; its fingerprint tells that there is a second source."""
        return drawn(request, partial(examples, synthetic=True))
