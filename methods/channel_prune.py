"""Structured pruning: take whole channels, hidden units or heads out of a trained tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effbench.errors import UsageError
from effbench.method import Method, param
from effbench.models.attention import Attention
from effbench.models.tower import ModelView, Tower
from effbench_methods.algorithms.loss_gradients import loss_gradients

if TYPE_CHECKING:
    from effbench.calibration_set import CalibrationSet
    from effbench_methods._channel_groups import Channels

WHAT = ("heads", "head_dims", "mlp", "width")


@dataclass(frozen=True)
class ChannelPrune(Method):
    """Remove the least important channels of a tower: smaller dense layers, no masks, nothing trained afterwards.

    width: channels of the tokens, one choice for all blocks and what stands before and behind them. mlp: hidden units.
    head_dims: channels of queries, keys and values, the same of every head; the softmax scale stays. heads: whole ones.
    A width becomes the multiple of round_to that is nearest to (1 - ratio) of it, heads the nearest number: what is
    removed is removed from the FLOPs, but from the time only where the kernels like the widths that are left.

    Importance is torch-pruning's: the mean over a group's layers of the squared weights (magnitude) or of |weight x
    gradient| (taylor). isomorphic ranks like groups of all blocks of a tower together, so blocks come out unequal.
    Nothing is trained afterwards, so only small ratios leave much quality. A timm model without a head hands out
    narrower features.
    """

    source = "DepGraph, arXiv 2301.12900; isomorphic pruning, 2407.04616; Taylor, 1906.10771; code: torch-pruning"
    goes_before = ("quantize", "precision", "compile")
    phases = ("test",)

    ratio: float = param(0.25, "share of the channels that is removed, below 1", above=0, high=0.999)
    what: tuple[str, ...] = param(WHAT[1:], "what is removed; all but heads is uniform pruning", choices=WHAT)
    importance: str = param("magnitude", "what channels are ranked by", choices=("magnitude", "taylor"))
    isomorphic: bool = param(False, "rank the channels of all blocks together, in place of block by block")
    round_to: int = param(8, "widths that are left are multiples of it", low=1)
    target: tuple[str, ...] = param(("tower",), "tower: the image tower; text", choices=("tower", "text"))
    images: int = param(64, "training images whose loss taylor looks at", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("what", "target"):
            if not getattr(self, name):
                raise UsageError(
                    f"channel_prune: {name}= names nothing", f"e.g. {name}={'mlp' if name == 'what' else 'tower'}"
                )

    def finish(self, model: ModelView, calibration: CalibrationSet) -> None:
        from torch_pruning.pruner.importance import GroupMagnitudeImportance, GroupTaylorImportance

        # whatever can be refused is refused before the first cut
        if self.importance == "taylor":
            calibration.need(self.images, f"channel_prune: images={self.images}")
        towers = [_tower(model, name) for name in dict.fromkeys(self.target)]
        ranks = [rank for tower in towers for rank in self._ranks(model, tower)]
        same_shapes = calibration.thrifty and not self.isomorphic  # whatever the scores are
        if self.importance == "taylor" and not same_shapes:
            weights = [p for rank in ranks for p in rank.channels.parameters()]
            with loss_gradients(model.model, weights, calibration, self.images):
                scores = [rank.scores(GroupTaylorImportance()) for rank in ranks]
        else:
            scores = [rank.scores(GroupMagnitudeImportance()) for rank in ranks]
        gone = self._chosen(ranks, scores)
        parameters = sum(p.numel() for p in model.model.parameters())
        for tower in towers:
            tower.loop.before_pruning = (widths(tower), parameters)
        _cut(model, dict(zip(ranks, gone, strict=True)))

    def _ranks(self, model: ModelView, tower: Tower) -> list[Rank]:
        """What is ranked in a tower, block by block.

        Raises:
            UsageError: nothing would be left, or the tower holds a layer that is not known.
        """
        from effbench_methods._channel_groups import attention_channels, hidden_channels, norms_per_head, width_channels

        found = []
        if "width" in self.what:
            found.append(Rank(tower, "width", None, width_channels(model, tower), *self._left("width", tower.width)))
        for number, block in enumerate(tower.blocks):
            if "heads" in self.what:
                left = self._left("heads", block.attn.num_heads)
                found.append(Rank(tower, "heads", number, attention_channels(block.attn), *left))
            if "head_dims" in self.what:
                norms_per_head(block.attn)  # refuses norms that are not known
                left = self._left("head_dims", head_width(block.attn))
                found.append(Rank(tower, "head_dims", number, attention_channels(block.attn), *left))
            if "mlp" in self.what:
                hidden = hidden_channels(block.mlp)
                found.append(Rank(tower, "mlp", number, hidden, *self._left("mlp", hidden.size)))
        masked = getattr(tower.module, "use_pad_mask", False) or getattr(tower.module, "cls_emb", None) is not None
        if "heads" in self.what and self.isomorphic and masked:
            raise UsageError(
                f"channel_prune: the masks of this {tower.name} need the same number of heads in every block",
                "leave isomorphic or what=heads out",
            )
        return found

    def _left(self, kind: str, count: int) -> tuple[int, int, int]:
        """`count` of a kind, how many of them stay, and the number that what stays is a multiple of."""
        step = 1 if kind == "heads" else self.round_to
        name = NAMES[kind]
        if step > count:
            raise UsageError(
                f"channel_prune: round_to={step} is more than the {name} of {count}",
                f"use round_to={count} or less, or leave {kind} out of what=",
            )
        keep = nearest((1 - self.ratio) * count, step, count)
        if not keep:
            raise UsageError(
                f"channel_prune: ratio={self.ratio} leaves nothing of the {name} of {count} (round_to={step})",
                f"use a smaller ratio, or leave {kind} out of what=",
            )
        return count, keep, step

    def _chosen(self, ranks: list[Rank], scores: list[Tensor]) -> list[list[int]]:
        """What is removed of each, by its number."""
        keep = [rank.keep for rank in ranks]
        if self.isomorphic:
            for alike in {(id(rank.tower), rank.kind): None for rank in ranks}:
                places = [i for i, rank in enumerate(ranks) if (id(rank.tower), rank.kind) == alike]
                together = torch.cat([scores[i] for i in places])
                best = together.argsort(descending=True, stable=True)[: sum(keep[i] for i in places)]
                stays = torch.zeros_like(together, dtype=torch.bool).index_fill(0, best, True)
                for i, part in zip(places, stays.split([len(scores[i]) for i in places]), strict=True):
                    keep[i] = max(ranks[i].step, nearest(int(part.sum()), ranks[i].step, ranks[i].count))
        order = [score.argsort(stable=True).tolist() for score in scores]
        return [sorted(worst[: rank.count - n]) for rank, worst, n in zip(ranks, order, keep, strict=True)]

    def notes(self, model: ModelView) -> list[str]:
        found = []
        for tower in filter(None, (model.image, model.text)):
            before, parameters = getattr(tower.loop, "before_pruning", (None, 0))
            if before is not None:
                changed, now = zip(before, widths(tower), strict=True), sum(p.numel() for p in model.model.parameters())
                said = [old if old == new else f"{old} -> {new.split(' ', 1)[1]}" for old, new in changed]
                found.append(
                    f"{', '.join(said)} in the {tower.name}; {now:,} of the model's {parameters:,} parameters are left"
                )
        return found


NAMES = dict(heads="number of heads", head_dims="head width", mlp="MLP width", width="tower width")


@dataclass(frozen=True, eq=False)
class Rank:
    """What is ranked against each other: heads or channels of one block, or the width of a tower.

    Args:
        kind: one of `WHAT`; block: its number, None for the width.
        channels: the layers that it runs through.
        count: of heads or channels; keep: how many stay; step: what stays is a multiple of it.
    """

    tower: Tower
    kind: str
    block: int | None
    channels: Channels
    count: int
    keep: int
    step: int

    def scores(self, importance: Any) -> Tensor:
        """(count,), the least important lowest."""
        each = self.channels.scores(importance)
        if self.kind == "heads":
            return each.view(self.count, -1).mean(1)
        return each.view(-1, self.count).mean(0) if self.kind == "head_dims" else each


def head_width(attention: Attention) -> int:
    return attention.proj.in_features // attention.num_heads


def nearest(wanted: float, step: int, most: int) -> int:
    """The multiple of step that is nearest, or all."""
    multiple = int(wanted / step + 0.5) * step
    return multiple if multiple <= most else most


def widths(tower: Tower) -> tuple[str, str, str]:
    """Width, heads and MLPs of a tower in words; where the blocks differ, from the least to the most."""
    from effbench_methods._channel_groups import linears

    heads = _span([block.attn.num_heads for block in tower.blocks])
    each = _span([head_width(block.attn) for block in tower.blocks])
    return (
        f"width {tower.width}",
        f"heads {heads} x {each}",
        f"MLP {_span([linears(block.mlp)[-1].in_features for block in tower.blocks])}",
    )


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _cut(model: ModelView, gone: dict[Rank, list[int]]) -> None:
    from effbench_methods._channel_groups import remove_from_attention, tell_width

    attention: dict[nn.Module, dict[str, list[int]]] = {}
    for rank, out in gone.items():
        if rank.block is None:
            rank.channels.remove(out)
            tell_width(model, rank.tower, rank.count - len(out))
        elif rank.kind == "mlp":
            rank.channels.remove(out)
        else:
            attention.setdefault(rank.tower.blocks[rank.block].attn, {})[rank.kind] = out
    for module, out in attention.items():
        remove_from_attention(module, out.get("heads", []), out.get("head_dims", []))
    for tower in {rank.tower for rank in gone}:
        if hasattr(tower.module, "heads"):
            tower.module.heads = tower.heads  # OpenCLIP makes its padding masks with it


def _tower(model: ModelView, name: str) -> Tower:
    tower = model.image if name == "tower" else model.text
    if tower is None:
        kind, hint = ("image", "use a ViT backbone") if name == "tower" else ("text", "leave target=text out")
        raise UsageError(f"channel_prune: target={name}: no {kind} tower of transformer blocks is here", hint)
    return tower
