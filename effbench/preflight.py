"""Before anything is measured: each arm answers the same question twice, on a batch of its own."""

from __future__ import annotations

import numpy as np
import torch

from effbench import randomness
from effbench.errors import EffbenchError, InvalidError
from effbench.lockstep import Arm, Batch, Setting, describe, versions, written_into

IMAGES = 2
TOLERANCE = 1e-5  # of the largest output: kernels of a GPU may add in another order


def preflight(arms: list[Arm], setting: Setting) -> None:
    """Mark arms FAILED that could not be measured: not deterministic, or writing into the batch that all arms share.

    An arm that raises is left to the pass that comes, which names it. Random states are as before.

    Raises:
        InvalidError: the baseline is such an arm, so that nothing can be compared.
    """
    rows = np.arange(IMAGES)
    for arm in arms:
        if arm.error:
            continue
        batch = setting.to_device(setting.task.batch(setting.prepared, "test", rows, np.random.default_rng(0)))
        try:
            arm.error = _problem(arm, batch, setting)
        except Exception as error:
            if isinstance(error, EffbenchError):
                arm.error = describe(error)
            continue
        if arm.error and arm.plan.kind == "baseline":
            raise InvalidError(f"the baseline cannot be measured: {arm.error}", "mend the backbone or the task")


def _problem(arm: Arm, batch: Batch, setting: Setting) -> str:
    """Why the arm cannot be measured; empty where it can."""
    untouched = versions(batch)
    before, answers = arm.random, []
    for _ in range(2):
        arm.random = before
        with randomness.swapped(arm), torch.inference_mode():
            answers.append(setting.task.predict(arm.model, dict(batch)))
        if changed := written_into(batch, untouched):
            arm.random = before
            return f"it writes into the batch that all arms share ({', '.join(changed)}): work on a copy, x = x.clone()"
    arm.random = before
    for name, first in answers[0].items():
        second = answers[1][name]
        if first.shape != second.shape:
            return f"not deterministic: twice the same batch gave {name} of shapes {_both(first, second)}"
        if not first.is_floating_point():
            same = torch.equal(first, second)
        else:
            scale = first.abs().max().nan_to_num()
            same = bool(((first - second).abs() <= TOLERANCE * scale).logical_or(first.isnan()).all())
        if not same:
            worst = (first.double() - second.double()).abs().max().item()
            return (
                f"not deterministic: the same batch under the same random state gave another {name} the second time "
                f"(by up to {worst:.2g}); draw random numbers from torch's generator alone"
            )
    return ""


def _both(first: torch.Tensor, second: torch.Tensor) -> str:
    return f"{tuple(first.shape)} and {tuple(second.shape)}"
