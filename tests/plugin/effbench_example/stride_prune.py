"""Keep every n-th patch token after one block."""

from dataclasses import dataclass

import torch

from effbench.method import Method, param
from effbench.models.token_state import TokenEdit


@dataclass(frozen=True)
class StridePrune(Method):
    """Keep every n-th patch token after the attention of one block."""

    every: int = param(2, "one patch token in so many stays", low=1)
    after: int = param(1, "block (0-based) after whose attention tokens are dropped", low=0)

    def edit_model(self, model):
        model.image.after_attention(self.after, Stride(self.every))


class Stride(TokenEdit):
    def __init__(self, every):
        super().__init__()
        self.every = every

    def forward(self, state, projections):
        patches = torch.arange(state.prefix, state.tokens.shape[1], self.every)
        kept = torch.cat([torch.arange(state.prefix), patches])
        return lambda field, kind: field[:, kept]
