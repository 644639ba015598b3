"""Mixture of experts: a decoder's MLPs become several, of which each token takes some."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from effbench.errors import UsageError
from effbench.method import Method, TrainingPlan, param

if TYPE_CHECKING:
    from effbench.models.decoder import Decoder
    from effbench.models.tower import ModelView

GATED = ("gate_proj", "up_proj", "down_proj")  # layers of an MLP of Llama, Mistral, Qwen, Gemma, SmolLM


@dataclass(frozen=True)
class MixtureOfExperts(Method):
    """Make a sparse mixture of experts of each decoder MLP, at the FLOPs per token of the dense one, and train it.

    Sparse upcycling: the experts start as copies of the trained MLP and a router is drawn anew. With active=1 each
    expert has the MLP's size. With active=k each is a slice of it, 1/k wide, and k slices that make up the MLP have
    equal rows in the router, so that they are chosen together at first and their outputs add up (virtual groups, arXiv
    2410.07524). The weights of the chosen experts add up to k at all times, so either way the model starts as the dense
    one.

    Of one active expert that weight is always 1, so its gradient is taken as if the sum of the chosen were a constant:
    the router learns from the task as Switch's does. The balance loss is Switch's, per layer, without padding.

    FLOPs: experts compute the tokens that chose them and no others; no capacity limits them, so no token is dropped and
    none depends on the rest of its batch. The router is overhead. Weights, gradients and optimiser state grow with the
    number of experts.
    """

    source = (
        "sparse upcycling, arXiv 2212.05055; Switch, 2101.03961; Mixtral, 2401.04088; slices and virtual groups: "
        "2410.07524"
    )
    default_phase = "both"
    phases = ("both",)

    experts: int = param(4, "experts in each layer", low=2, high=4096)
    active: int = param(1, "experts that each token takes, each 1/active of the dense size", low=1)
    layers: str = param("every", "which layers have experts; other: 1, 3, 5, ...", choices=("every", "other"))
    balance: float = param(0.01, "weight of the load-balancing loss; 0: none", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.active > self.experts:
            raise UsageError(
                f"mixture_of_experts: active={self.active} is more than experts={self.experts}",
                f"active takes 1 to {self.experts}",
            )
        if self.experts % self.active:
            lower = self.experts - self.experts % self.active
            raise UsageError(
                f"mixture_of_experts: experts={self.experts} is no multiple of active={self.active}, and {self.active} "
                "slices make up one dense MLP",
                f"the nearest are experts={lower} and experts={lower + self.active}",
            )

    def edit_model(self, model: ModelView) -> None:
        from effbench_methods.algorithms.experts import Experts

        decoder = self._decoder(model)
        chosen = list(decoder.blocks)[(self.layers == "other") :: (2 if self.layers == "other" else 1)]
        if not chosen:
            raise UsageError(
                f"mixture_of_experts: layers=other of {len(decoder)} layer is none", "use layers=every, or more layers"
            )
        for block in chosen:
            self._check(decoder, getattr(block, "mlp", None))
        dense = sum(p.numel() * p.element_size() for block in chosen for p in block.mlp.parameters())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if dense * self.growth > memory:
            raise UsageError(
                f"mixture_of_experts: experts={self.experts} of {len(chosen)} layers are "
                f"{dense * self.growth >> 20:,} MiB of weights, and this machine has {memory >> 20:,} MiB of memory",
                f"use experts={max(2, memory // dense // 8 * self.active)} or fewer: training needs four times as much",
            )
        spread = getattr(decoder.config, "initializer_range", 0.02)
        for block in chosen:
            block.mlp = Experts(block.mlp, self.experts, self.active, spread)

    def edit_training(self, plan: TrainingPlan) -> None:
        if not self.balance:
            return
        from effbench_methods.algorithms.experts import balance_loss

        blocks, language = mixtures(plan.model), plan.model.decoder.language
        for block in blocks:
            block.gate.keeps = True

        def balanced() -> torch.Tensor:
            span = language.span
            return self.balance * balance_loss(blocks, None if span is None else span.ends)

        plan.losses.append(balanced)

    def notes(self, model: ModelView) -> list[str]:
        blocks = mixtures(model)
        if not blocks:
            return []
        size = blocks[0].experts.intermediate_dim
        said = (
            f"{self.experts} experts with hidden layers of {size} in {len(blocks)} of {len(model.decoder)} layers, "
            f"{self.active} of them active: the MLPs' FLOPs are those of the dense model, their weights {self.growth}x"
        )
        shares = [
            torch.bincount(block.gate.chosen.flatten(), minlength=self.experts) / block.gate.chosen.numel()
            for block in blocks
            if block.gate.chosen is not None
        ]
        if not shares:
            return [said]
        found = torch.stack(shares)
        return [
            said,
            f"tokens of a test step by expert: {found.min():.0%} to {found.max():.0%} over all layers (even: "
            f"{1 / self.experts:.0%}), and {(found == 0).sum()} of {found.numel()} experts take none",
        ]

    @property
    def growth(self) -> int:
        """Weights of the experts, in those of the dense MLP."""
        return self.experts // self.active

    def _decoder(self, model: ModelView) -> Decoder:
        if model.decoder is None:
            raise UsageError(
                f"mixture_of_experts acts on a captioner's decoder, and {type(model.model).__name__} has none",
                "choose a captioning task, e.g. --task flickr8k_caption",
            )
        return model.decoder

    def _check(self, decoder: Decoder, mlp: Any) -> None:
        """Refuse an MLP that is not gated as Llama's, or that does not divide."""
        layers = [getattr(mlp, name, None) for name in GATED]
        extra = [name for name, _ in mlp.named_children() if name not in (*GATED, "act_fn")] if mlp is not None else []
        plain = all(type(layer) is nn.Linear and layer.bias is None for layer in layers)
        if not plain or extra or not hasattr(mlp, "act_fn"):
            named = (
                "no MLP" if mlp is None else f"{type(mlp).__name__} ({', '.join(n for n, _ in mlp.named_children())})"
            )
            raise UsageError(
                f"mixture_of_experts: the layers of {decoder.name} hold {named}, and experts are made of an MLP with "
                "gate_proj, up_proj and down_proj, plain linear layers without biases",
                "use a decoder such as tiny, Llama, Mistral, Qwen or SmolLM, and put mixture_of_experts before "
                "layer_tune:lora in a stack",
            )
        hidden = mlp.gate_proj.out_features
        if hidden % self.active:
            fits = [n for n in range(1, self.experts + 1) if not (hidden % n or self.experts % n)]
            raise UsageError(
                f"mixture_of_experts: the hidden layers of {decoder.name} have {hidden} channels, which do not divide "
                f"into active={self.active} slices",
                f"active={' or '.join(map(str, fits))}",
            )


def mixtures(model: ModelView) -> list[Any]:
    """The mixtures of experts of a model's decoder, by layer."""
    from effbench_methods.algorithms.experts import Experts

    return [block.mlp for block in model.decoder.blocks if isinstance(getattr(block, "mlp", None), Experts)]
