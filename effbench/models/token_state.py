"""The tokens on their way through a tower, and the loop over its blocks that carries them.

The loop stands in for a library's own: it runs each block's parts and lets methods act where no library hook reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effbench.models.attention import Attention, Projections

Reduce = Callable[[Tensor, str], Tensor]
"""Maps a field (batch, tokens, ...) to fewer tokens; the second argument is the kind of the field:
"tokens" (features), "size" (how many original tokens each stands for) or "label" (indices, positions).
A reduction that leaves the patch tokens on a coarser grid has that grid as its attribute `grid`."""


@dataclass
class TokenState:
    """The tokens between two parts of a block. Fields that are None are not tracked; an edit may start to track them.

    Args:
        tokens: (batch, tokens, width).
        prefix: number of leading tokens (class, registers) that must not be touched.
        mask: attention mask, additive or boolean, (tokens, tokens) or (batch, heads or 1, tokens, tokens).
        is_causal: each token sees itself and those before it.
        sizes: (batch, tokens), original tokens that each stands for, 0 for padding: keys are weighted by it in the
            attention that follows, patch tokens in a mean over them.
        proportional: False leaves the sizes out of attention.
        source: (batch, tokens), index of the original token; -1 for a token made of several.
        positions: (batch, tokens, axes).
        grid: (height, width) in patches while the patch tokens are a full grid, else None.
        entered: (batch, tokens, width), the tokens as they entered the block; only while an edit looks at them.
        exited: tokens (batch, some, width) that left the tower early, with their sizes, to come back at its end.
    """

    tokens: Tensor
    prefix: int = 0
    mask: Tensor | None = None
    is_causal: bool = False
    sizes: Tensor | None = None
    proportional: bool = True
    source: Tensor | None = None
    positions: Tensor | None = None
    grid: tuple[int, int] | None = None
    entered: Tensor | None = None
    exited: tuple[tuple[Tensor, Tensor | None], ...] = ()

    def reduced(self, reduce: Reduce) -> TokenState:
        """The state after a reduction, applied to every tracked field."""
        batch, tokens = self.tokens.shape[:2]
        mask = self.mask
        if mask is not None:
            mask = mask.expand(batch, *mask.shape[1:]) if mask.ndim > 2 else mask.expand(batch, tokens, tokens)
            for axis in (-2, -1):
                mask = reduce(mask.movedim(axis, 1), "label").movedim(1, axis)
            mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
        return replace(
            self,
            tokens=reduce(self.tokens, "tokens"),
            mask=mask,
            sizes=None if self.sizes is None else reduce(self.sizes, "size"),
            source=None if self.source is None else reduce(self.source, "label"),
            positions=None if self.positions is None else reduce(self.positions, "label"),
            grid=getattr(reduce, "grid", None),
            entered=None,
        )

    def exit(self, leaving: Reduce) -> None:
        """Let some tokens skip the blocks that follow; a reduction must take them out of the others.

        Args:
            leaving: gives the tokens that leave.
        """
        sizes = None if self.sizes is None else leaving(self.sizes, "size")
        self.exited += ((leaving(self.tokens, "tokens"), sizes),)

    def with_exited(self) -> TokenState:
        """The state with the tokens that left early behind the others."""
        if not self.exited:
            return self
        parts = [(self.tokens, self.sizes), *self.exited]
        sizes = None
        if any(part is not None for _, part in parts):
            sizes = torch.cat([torch.ones_like(x[..., 0]) if part is None else part for x, part in parts], dim=1)
        return replace(self, tokens=torch.cat([x for x, _ in parts], dim=1), sizes=sizes, exited=())


class TokenEdit(nn.Module):
    """What a method places between attention and MLP of one block. Its matrix products count as overhead.

    `forward(state, projections)` returns a `Reduce` or None (nothing to do); it may set fields of the state.

    Class attributes:
        name: the method's name, for messages.
        needs_grid: the patch tokens must be a full grid; keeps_grid: they are one afterwards.
    """

    is_overhead: ClassVar[bool] = True
    name: ClassVar[str] = "a method"
    needs_grid: ClassVar[bool] = False
    keeps_grid: ClassVar[bool] = False

    def forward(self, state: TokenState, projections: Projections) -> Reduce | None:
        raise NotImplementedError


class TokenBypass(nn.Module):
    """What a method places around a block: only some tokens go through it, the others pass by unchanged.

    `forward(state)` returns the indices (batch, k) of the tokens that go through, prefix included, or None for all.
    """

    is_overhead: ClassVar[bool] = True
    name: ClassVar[str] = "a method"

    def forward(self, state: TokenState) -> Tensor | None:
        raise NotImplementedError


class BlockLoop:
    """The loop over blocks, mixed into a library's block container by its adapter.

    The adapter says how a block's two branches are computed.

    Attributes:
        prefix, grid: of the tokens that come in (see `TokenState`).
        hands_out_sizes: whoever pools the tokens asks for their sizes with `take_sizes`.
    """

    prefix: int = 0
    grid: tuple[int, int] | None = None
    hands_out_sizes: bool = False
    _sizes: Tensor | None = None

    @staticmethod
    def attention_branch(block: nn.Module, state: TokenState) -> tuple[Tensor, Projections]:
        raise NotImplementedError

    @staticmethod
    def mlp_branch(block: nn.Module, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def loop(self, blocks: Any, x: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Run the blocks on x (batch, tokens, width); the result may have fewer tokens."""
        state = TokenState(x, self.prefix, mask, is_causal, grid=self.grid)
        for block in blocks:
            index = None if block.token_bypass is None else block.token_bypass(state)
            if index is None:
                state = self._through(block, state)
            else:
                inside = self._through(block, state.reduced(picked(index)))
                wide = index.unsqueeze(-1).expand_as(inside.tokens)
                state = replace(state, tokens=state.tokens.scatter(1, wide, inside.tokens.to(state.tokens.dtype)))
        state = state.with_exited()
        if self.hands_out_sizes:
            self._sizes = state.sizes
        return state.tokens

    def _through(self, block: nn.Module, state: TokenState) -> TokenState:
        branch, projections = self.attention_branch(block, state)
        state = replace(state, tokens=_residual(state.tokens, branch), entered=state.tokens)
        if block.token_edit is not None:
            reduce = block.token_edit(state, projections)
            if reduce is not None:
                state = state.reduced(reduce)
        state.entered = None
        del branch, projections  # not held through the MLP, where memory peaks
        state.tokens = _residual(state.tokens, self.mlp_branch(block, state.tokens))
        return state

    def take_sizes(self) -> Tensor | None:
        """Sizes (batch, tokens) of the tokens of the last pass, None where all count alike. They are given away."""
        sizes, self._sizes = self._sizes, None
        return sizes


def _residual(tokens: Tensor, branch: Tensor) -> Tensor:
    """Their sum; in place where autocast gave the branch no narrower dtype, since it is nobody else's."""
    return branch.add_(tokens) if branch.dtype == tokens.dtype else tokens + branch


def attend(attention: Attention, x: Tensor, state: TokenState) -> tuple[Tensor, Projections]:
    """A block's attention on its normalised tokens x (batch, tokens, width), and its projections."""
    sizes = state.sizes if state.proportional else None
    return attention(x, state.mask, state.is_causal, sizes, True, state.prefix, state.grid)


def picked(index: Tensor) -> Reduce:
    """A reduction that keeps the tokens at index (batch, k), in that order."""
    batch = index.shape[0]
    flat: Tensor | None = None

    def reduce(field: Tensor, kind: str = "label") -> Tensor:
        # whole rows are copied at once: several times faster on a CPU than torch.gather
        nonlocal flat
        tokens = field.shape[1]
        if flat is None:
            flat = (index + torch.arange(0, batch * tokens, tokens, device=index.device)[:, None]).flatten()
        return field.reshape(batch * tokens, *field.shape[2:]).index_select(0, flat).unflatten(0, (batch, -1))

    return reduce


def mean_by_size(tokens: Tensor, sizes: Tensor | None) -> Tensor:
    """Mean of tokens (batch, tokens, width) -> (batch, width), each counted as often as its size (batch, tokens) says.

    A merged token stands for all that it was made of (ToMe, arXiv 2210.09461); padding, of size 0, for nothing.
    """
    if sizes is None:
        return tokens.mean(dim=1)
    weights = (sizes / sizes.sum(dim=1, keepdim=True)).to(tokens.dtype)
    return (weights.unsqueeze(-1) * tokens).sum(dim=1)
