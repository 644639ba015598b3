"""A mixture of experts in place of an MLP: transformers' own block, its weights copied from the MLP's.

The copies: sparse upcycling (Komatsuzaki et al., arXiv 2212.05055). Experts that are slices, and routers whose rows are
equal within a group of slices that make up one MLP: He et al., arXiv 2410.07524.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
    load_balancing_loss_func,
)


class Router(MixtralTopKRouter):
    """The library's router, in float32 (Switch, arXiv 2101.03961, 2.4), with weights that add up to `top_k`.

    The library's add up to 1: slices of an MLP would add up to a part of it, and of one expert the weight would be 1
    with a gradient of 0. Here each is p / sum of the chosen p x top_k, and the gradient is that of p alone: the sum is
    taken as a number.

    Attributes:
        keeps: whether logits of training steps are kept, for a loss; it empties `logits`, (tokens, experts) per call.
        chosen: (tokens, top_k), the experts in the largest call without gradients so far.
    """

    is_overhead: ClassVar[bool] = True

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        self.keeps = False
        self.logits: list[Tensor] = []
        self.chosen: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., width) -> logits (tokens, experts), weights and experts (tokens, top_k)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.reshape(-1, self.hidden_dim).float(), self.weight.float())
        weights, index = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        weights = weights * (self.top_k / weights.detach().sum(dim=-1, keepdim=True))
        if torch.compiler.is_compiling():
            return logits, weights, index
        if self.keeps and self.training and torch.is_grad_enabled():
            self.logits.append(logits)
        elif not self.training and (self.chosen is None or len(index) >= len(self.chosen)):
            self.chosen = index
        return logits, weights, index

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | dict(logits=[], chosen=None)  # what belongs to a graph cannot be copied


class Experts(MixtralSparseMoeBlock):
    """What a gated MLP becomes; at first it computes the same, whatever the router says.

    Args:
        mlp: with gate_proj, up_proj, down_proj without biases, and act_fn.
        experts, active: of them so many take each token. Each is a slice of the MLP, 1 / active of it, and `active` of
            them in a row are the whole; their router's rows are equal, so that they are chosen together at first.
        spread: standard deviation of the router's weights.
    """

    def __init__(self, mlp: nn.Module, experts: int, active: int, spread: float) -> None:
        weight = mlp.gate_proj.weight
        hidden, width = weight.shape
        config = MixtralConfig(
            hidden_size=width,
            intermediate_size=hidden // active,
            num_local_experts=experts,
            num_experts_per_tok=active,
            router_jitter_noise=0.0,
        )
        super().__init__(config)
        self.gate = Router(config)
        self.experts.act_fn = mlp.act_fn
        copies = experts // active
        with torch.no_grad():
            gate, up = (layer.weight.unflatten(0, (active, -1)) for layer in (mlp.gate_proj, mlp.up_proj))
            down = mlp.down_proj.weight.unflatten(1, (active, -1)).movedim(1, 0)
            self.experts.gate_up_proj = nn.Parameter(torch.cat([gate, up], dim=1).repeat(copies, 1, 1))
            self.experts.down_proj = nn.Parameter(down.repeat(copies, 1, 1))
            rows = torch.randn(copies, width) * spread
            self.gate.weight = nn.Parameter(rows.repeat_interleave(active, dim=0).to(weight))
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        # both compute active experts alone. grouped_mm is the faster (and waits for no GPU), but knows no autocast:
        # it would compute in float32. The third, batched_mm, copies an expert's weights for every token.
        casts = torch.is_autocast_enabled(x.device.type)
        self.experts.config._experts_implementation = "eager" if casts else "grouped_mm"
        return super().forward(x)


def balance_loss(blocks: list[Experts], last: Tensor | None) -> Tensor:
    """Switch's load-balancing loss (arXiv 2101.03961, equation 4) of the step that the routers have just seen.

    Per layer experts x sum_i f_i P_i, f_i the tokens that expert i takes and P_i its mean probability; it is `top_k`
    where all take as many. The layers' are added up.

    Args:
        last: (batch,) index of each sequence's last token that is no padding, which is not counted; None: all count.
    """
    total = blocks[0].gate.weight.new_zeros((), dtype=torch.float32)
    for block in blocks:
        calls, block.gate.logits = block.gate.logits, []
        if not calls:  # a frozen layer
            continue
        logits = torch.cat(calls)
        there = None
        if last is not None:
            there = (torch.arange(len(logits) // len(last), device=last.device) <= last[:, None]).long()
        total = total + load_balancing_loss_func((logits,), block.gate.num_experts, block.gate.top_k, there)
    return total
