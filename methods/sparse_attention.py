"""Sparse attention: each patch attends to some patches only; class and register tokens see all and are seen by all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from effbench.errors import UsageError
from effbench.method import Method, param
from effbench.models.attention import Attention, AttentionCore, Projections
from effbench.models.tower import ModelView, Tower
from effbench_methods.algorithms.attention_gather import gathered
from effbench_methods.algorithms.attention_paths import Choice, best_keys, block_mask, fastest, flex, masked
from effbench_methods.algorithms.attention_patterns import Layout, block_sparse, divisors, sliding, windows

#: the parameters that each pattern has
PATTERNS = dict(window=("window",), sliding=("window",), block=("block",), bigbird=("block", "random"), topk=("k",))
#: images that the paths are timed with; a CPU takes them one by one
BATCH = dict(cpu=4, cuda=16)


@dataclass(frozen=True)
class SparseAttention(Method):
    """Attention over some of the patches, in place of all.

    window: windows of window x window patches, shifted by half of it in every other block (Swin). sliding: the
    window x window patches around each. block: blocks of consecutive patches with their neighbours; bigbird adds random
    blocks. topk: each patch's k best keys, which computes all scores and saves nothing.

    Paths: reshape gathers each block's keys and attends densely there; masked is dense attention under a mask; flex is
    compiled FlexAttention. auto times them when the method is applied, on random tokens of the tower's shape.
    """

    source = (
        "windows: Swin, arXiv 2103.14030; sliding: Longformer, 2004.05150, and Vision Longformer, 2103.15358; "
        "bigbird: 2007.14062; topk: KVT, 2106.00515"
    )

    pattern: str = param("window", "which patches see each other", choices=tuple(PATTERNS))
    window: int = param(7, "side in patches of a window, or of a sliding window (odd)", low=1)
    block: int = param(28, "patches of a block, of block and bigbird", low=1)
    random: int = param(1, "random blocks that each block sees besides, of bigbird", low=0)
    k: int = param(100, "keys that each patch keeps, of topk", low=1)
    at: tuple[int, ...] | None = param(None, "blocks (0-based) whose attention is sparse; none is all", low=0)
    path: str = param("auto", "how it is computed", choices=("auto", "reshape", "masked", "flex"))

    def __post_init__(self) -> None:
        super().__post_init__()
        own, every = PATTERNS[self.pattern], self.parameters()
        for name in ("window", "block", "random", "k"):
            if name not in own and getattr(self, name) != every[name].default:
                raise UsageError(
                    f"sparse_attention: pattern={self.pattern} has no {name}", f"it has {' and '.join(own)}"
                )
        if self.pattern == "topk" and self.path in ("reshape", "flex"):
            raise UsageError(
                f"sparse_attention: pattern=topk has no path={self.path}: its keys depend on the scores",
                "leave path out, or use path=masked",
            )
        if self.pattern == "sliding" and self.window % 2 == 0:
            raise UsageError(
                f"sparse_attention: window={self.window} has no middle patch; pattern=sliding takes an odd one",
                f"use window={self.window - 1} or window={self.window + 1}",
            )

    def edit_model(self, model: ModelView) -> None:
        tower = model.image
        if tower is None or tower.grid is None:
            raise UsageError("sparse_attention needs an image tower with a grid of patches", "use a ViT backbone")
        self.check_grid(tower.grid)
        device = next(tower.module.parameters()).device
        if self.path == "flex" and device.type == "cpu" and self.phase != "test":
            raise UsageError("sparse_attention: FlexAttention has no gradient on a CPU", "use path=reshape")
        layouts: dict[Any, Layout] = {}
        for place, number in enumerate(range(len(tower)) if self.at is None else sorted(set(self.at))):
            core = SparseCore(self, number, shifted=place % 2 == 1)
            tower.attend(number, core)
            core.dropout = tower.blocks[number].attn.attn_drop
            if self.pattern != "topk":
                if core.variant not in layouts:
                    layouts[core.variant] = core.layout_of(tower.prefix, tower.grid).to(device)
                core.place(tower.blocks[number].attn, layouts[core.variant])

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Refuse what does not fit a grid (height, width) of patches.

        Raises:
            UsageError: names the values that do.
        """
        patches, shape = grid[0] * grid[1], f"{grid[0]}x{grid[1]}"
        if self.pattern == "window" and (grid[0] % self.window or grid[1] % self.window):
            fit = ", ".join(map(str, divisors(grid)))
            raise UsageError(
                f"sparse_attention: window={self.window} does not divide the {shape} grid of patches",
                f"windows that do: {fit}" if fit else "no window but 1 does: use pattern=sliding or another image size",
            )
        blocks = -(-patches // self.block)
        limits = dict(
            sliding=("window", 1, 2 * max(grid) - 1),
            block=("block", 1, patches),
            bigbird=("block", 1, patches),
            topk=("k", 1, patches),
        )
        if self.pattern in limits:
            name, low, high = limits[self.pattern]
            if not low <= getattr(self, name) <= high:
                raise UsageError(
                    f"sparse_attention: {name}={getattr(self, name)} is larger than the {shape} grid of patches allows",
                    f"{name} takes {low} to {high} here",
                )
        if self.pattern == "bigbird" and self.random > max(0, blocks - 3):
            raise UsageError(
                f"sparse_attention: random={self.random}, but of {blocks} blocks of {self.block} patches a block and "
                f"its neighbours leave {max(0, blocks - 3)}",
                f"random takes 0 to {max(0, blocks - 3)} here; a smaller block= makes more blocks",
            )

    def notes(self, model: ModelView) -> list[str]:
        tower = model.image
        cores = [block.attn.core for block in tower.blocks if isinstance(block.attn.core, SparseCore)]
        if not cores:  # it acted while training only
            return []
        share = attention_share(tower, len(cores))
        ceiling = f"attention is {share:.1%} of the tower's FLOPs, so its ceiling is {1 / (1 - share):.2f}x"
        return list(dict.fromkeys(core.note for core in cores)) + [f"sparse_attention: {ceiling}"]


class SparseCore(AttentionCore):
    """The attention of one block. Its layout is made once, and the blocks with the same pattern share it.

    Args:
        number: of the block in its tower, the seed of its random blocks.
        shifted: its windows are the shifted ones.
    """

    name = "sparse_attention"

    def __init__(self, method: SparseAttention, number: int, shifted: bool) -> None:
        super().__init__()
        self.method, self.number, self.shifted = method, number, shifted
        self.needs_grid = method.pattern != "topk"  # the other patterns are about where a patch lies
        self.dropout = 0.0
        self.layout: Layout | None = None
        self.choice = Choice("masked")
        self.fallback = ""
        self._block_mask: Any = None

    @property
    def variant(self) -> Any:
        """What tells the patterns of two blocks apart."""
        return {"window": self.shifted, "bigbird": self.number}.get(self.method.pattern)

    def layout_of(self, prefix: int, grid: tuple[int, int]) -> Layout:
        method, patches = self.method, grid[0] * grid[1]
        match method.pattern:
            case "window":
                pattern = windows(grid, method.window, self.shifted)
            case "sliding":
                pattern = sliding(grid, method.window)
            case "block":
                pattern = block_sparse(patches, method.block)
            case "bigbird":
                pattern = block_sparse(patches, method.block, method.random, self.number)
        return Layout(pattern, prefix, grid)

    def place(self, attention: Attention, layout: Layout) -> None:
        """Take the place of a block's attention, by the path that is fastest on the layout's device."""
        self.heads, self.width = attention.num_heads, attention.proj.in_features
        self.scale, self.dtype = attention.scale, attention.proj.weight.dtype
        self.layout = layout
        self._choose()

    def _choose(self) -> None:
        layout, device = self.layout, self.layout.seen.device
        if self.method.path != "auto":
            self.choice = Choice(self.method.path)
        elif device.type != "meta":
            shape = (BATCH.get(device.type, 16), self.heads, len(layout.seen), self.width // self.heads)
            key = (replace(self.method, at=None), layout.grid, layout.prefix, shape, self.dtype, str(device))
            if key not in _CHOICES:
                paths = dict(reshape=lambda p: gathered(p, layout), masked=lambda p: masked(p, layout.seen))
                if device.type == "cuda":  # on a CPU flex takes half a minute to compile, and is slower than reshape
                    pattern = block_mask(layout.seen)
                    paths["flex"] = lambda p: flex(p, pattern)
                _CHOICES[key] = fastest(paths, shape, self.scale, self.dtype, device)
            self.choice = _CHOICES[key]
        self._make_block_mask()

    def _make_block_mask(self) -> None:
        wanted = self.choice.path == "flex" and self.layout is not None and not self.layout.seen.is_meta
        self._block_mask = block_mask(self.layout.seen) if wanted else None

    def forward(
        self, p: Projections, mask: Tensor | None, is_causal: bool, prefix: int, grid: tuple[int, int] | None
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.method.pattern == "topk":
            patches = p.q.shape[2] - prefix
            return best_keys(p, min(self.method.k, patches), prefix, mask, is_causal, dropout)
        if grid is None:
            raise UsageError(
                f"sparse_attention: pattern={self.method.pattern} needs the grid of patches, which is gone",
                "leave the tokens of these blocks alone, choose others with at=, or use pattern=topk",
            )
        layout = self.layout
        if (grid, prefix) != (layout.grid, layout.prefix):  # a coarser grid, or images of another size
            self.method.check_grid(grid)
            layout = self.layout = self.layout_of(prefix, grid).to(p.q.device)
            self._choose()
        if self.choice.path == "reshape" and not is_causal and (mask is None or _weighs_keys(mask)):
            return gathered(p, layout, mask, dropout)
        if self.choice.path == "flex" and not is_causal and mask is None and not dropout:
            return flex(p, self._block_mask)
        if self.choice.path != "masked":
            self.fallback = f", but masked where tokens carry a mask or sizes that {self.choice.path} cannot take"
        return masked(p, layout.seen, mask, is_causal, dropout)

    @property
    def note(self) -> str:
        """The path that is taken, and why."""
        if self.method.pattern == "topk":
            return "sparse_attention: topk computes every score and saves no FLOPs"
        choice = self.choice
        text = f"sparse_attention: the {choice.path} path{self.fallback}"
        if choice.ratios:
            timed = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in choice.ratios.items())
            text += (
                f"; against dense attention at batch {choice.batch}, {timed}; timing them took {choice.seconds:.1f} s"
            )
        if choice.compile_seconds:
            text += f", compiling {choice.compile_seconds:.1f} s"
        if choice.path == "masked":
            text += "; a mask saves no time"
        return text + (f"; {choice.failed}" if choice.failed else "")

    def pairs(self, tokens: int) -> int:
        """Query-key products per head and image that the path computes for so many tokens."""
        gathers = self.layout is not None and self.choice.path == "reshape" and not self.fallback
        return self.layout.pairs if gathers else tokens**2

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.layout is not None:  # on another device another path may be the fastest
            self._choose()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | dict(_block_mask=None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_block_mask()


_CHOICES: dict[Any, Choice] = {}  # timed once a process, so that all arms of an experiment take the same path


def attention_share(tower: Tower, blocks: int) -> float:
    """Share of attention's two products, in so many blocks, of the FLOPs of a tower's patch embedding and blocks.

    g patches, N tokens: 2 N^2 C of g C 3p^2 + sum over all blocks of (12 N C^2 + 2 N^2 C), the latter for a plain MLP.
    """
    tokens = tower.prefix + tower.patch_tokens
    products = 2 * tokens**2 * tower.blocks[0].attn.proj.in_features
    linears = sum(tokens * weight.numel() for weight in nn.ModuleList(tower.blocks).parameters() if weight.ndim == 2)
    embedding = tower.patch_tokens * next((w.numel() for w in tower.module.parameters() if w.ndim == 4), 0)
    return blocks * products / (embedding + linears + len(tower) * products)


def _weighs_keys(mask: Tensor) -> bool:
    """Whether a mask is a bias per key, (batch, 1, 1, tokens), as the sizes of tokens are."""
    return mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1 and mask.dtype != torch.bool
