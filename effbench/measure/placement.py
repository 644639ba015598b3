"""Where weights lie in memory: drawn for all arms together, so that none is favoured by being built first.

Two copies of the same model differ by some 0.3 % in speed, for as long as they live, by nothing but their addresses
(Mytkowicz et al., "Producing Wrong Data Without Doing Anything Obviously Wrong!", ASPLOS 2009). Built one after the
other, the baseline was the slower of two equal arms by some 0.15 %, the median of 850 trials.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn


def place_anew(models: Sequence[nn.Module], rng: np.random.Generator) -> None:
    """Move the weights of models on the CPU, all mixed, into other memory; values and Parameters stay.

    Weights that share memory, and those of tensor subclasses (torchao's), stay where they are.
    """
    held = {id(tensor): tensor for model in models for tensor in (*model.parameters(), *model.buffers())}
    plain = [t for t in held.values() if type(t.data) is Tensor and t.device.type == "cpu" and t.numel()]
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in plain)
    alone = [tensor for tensor in plain if owners[tensor.untyped_storage().data_ptr()] == 1]
    for i in rng.permutation(len(alone)):
        alone[i].data = alone[i].data.clone()
