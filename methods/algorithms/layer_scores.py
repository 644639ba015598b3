"""The published measures of how much a block matters, by the names that `by=` gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from effbench.models.decoder import Decoder
from effbench_methods.algorithms.decoder_importance import image_attention, multimodal_influence
from effbench_methods.algorithms.layer_importance import angular_distance, block_influence, gradient_norm
from effbench_methods.algorithms.trial_training import change_in_training

if TYPE_CHECKING:
    from effbench.calibration_set import CalibrationSet
    from effbench.models.tower import ModelView, Tower

SCORED = ("block_influence", "multimodal", "angular", "attention", "gradient", "parameter_change")


def scores(
    by: str, tower: Tower | Decoder, model: ModelView, calibration: CalibrationSet, images: int, steps: int
) -> Tensor:
    """(blocks,) the scores of the blocks, the higher the more it matters.

    Args:
        by: one of `SCORED`; multimodal and attention are about decoders.
        steps: of the trial training behind parameter_change; of a captioner it leaves the image tower out.

    Raises:
        UsageError: the model cannot give what a measure looks at.
    """
    given = (tower, model.model, calibration, images)
    match by:
        case "block_influence":
            return block_influence(*given)
        case "multimodal":
            return multimodal_influence(*given)
        case "angular":
            return angular_distance(*given, n=1)
        case "attention":
            return image_attention(*given)
        case "gradient":
            return gradient_norm(*given)
        case "parameter_change":
            parts = (model.connector, tower.language) if isinstance(tower, Decoder) else (model.model,)
            weights = [p for part in parts for p in part.parameters()]
            return change_in_training(tower, model.model, weights, calibration, images, steps)
    raise ValueError(by)
