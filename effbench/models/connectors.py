"""Connectors: what hands the tokens of an image tower over to a language model, (batch, N, width) -> (batch, M, out).

Each has `pool`, what it does without parameters (a frozen tower's kept features stand behind it), and `forward`, which
takes what `pool` gives. Nothing looks at other images of a batch: no batch norm, no dropout.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbench.errors import UsageError

TYPES = ("linear", "mlp", "pool", "attention", "perceiver", "c_abstractor", "shuffle2", "shuffle3")
DEPTHS = dict(perceiver=6, c_abstractor=3)  # as published
HEAD = 64  # channels of an attention head


def make(kind: str, width: int, out: int, tokens: int, depth: int | None = None) -> nn.Module:
    """A fresh connector.

    Args:
        kind: one of `TYPES`.
        width, out: of the tower's and of the language model's tokens.
        tokens: that it hands over; linear, mlp and the shuffles give what follows from the patches.
        depth: layers of a perceiver, bottlenecks in each of c_abstractor's two stages; None for the published number.
    """
    if kind in ("linear", "pool"):
        return PooledLinear(width, out, math.isqrt(tokens) if kind == "pool" else None)
    if kind == "mlp":
        return Mlp(width, out)
    if kind == "attention":
        return AttentionPool(width, out, tokens)
    if kind == "perceiver":
        return Perceiver(width, out, tokens, depth or DEPTHS[kind])
    if kind == "c_abstractor":
        return Abstractor(width, out, math.isqrt(tokens), depth or DEPTHS[kind])
    return Shuffle(width, out, int(kind[-1]))


class PooledLinear(nn.Module):
    """The simplest connector: a mean over squares of patches, then one linear layer (VILA, arXiv 2312.07533).

    Args:
        width, out: of the tower's and of the language model's tokens.
        side: of the grid of pooled tokens; None leaves all patches.
    """

    def __init__(self, width: int, out: int, side: int | None) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Linear(width, out)

    def pool(self, tokens: Tensor) -> Tensor:
        """(batch, patches, width) -> (batch, side x side, width), or as they are where there are no more of them.

        Where a tower has dropped or merged patches, so that no square grid of them is left, the means are over as many
        groups of neighbours in raster order. A number that is a square counts as a grid.
        """
        if self.side is None or tokens.shape[1] <= self.side**2:
            return tokens
        if math.isqrt(tokens.shape[1]) ** 2 != tokens.shape[1]:
            return F.adaptive_avg_pool1d(tokens.transpose(1, 2), self.side**2).transpose(1, 2)
        return smaller_grid(tokens, self.side)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pooled tokens (batch, tokens, width) -> (batch, tokens, out)."""
        return self.proj(tokens)


class Patches(nn.Module):
    """A connector that learns on all patches."""

    def pool(self, tokens: Tensor) -> Tensor:
        return tokens


class Mlp(Patches):
    """Two linear layers on each patch, GELU between them (LLaVA-1.5, arXiv 2310.03744)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, patches, width) -> (batch, patches, out)."""
        return self.layers(tokens)


class AttentionPool(Patches):
    """Learned queries, each of which takes a mean over all patches by attention (MM1, arXiv 2403.09611).

    The queries are learned as they enter the product: to project them would be work that no image has a part in.
    """

    def __init__(self, width: int, out: int, tokens: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads(width)
        self.latent_len = tokens
        self.queries = nn.Parameter(torch.randn(tokens, width))
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, out)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, patches, width) -> (batch, tokens, out)."""
        return self.proj(attend(self.queries.expand(len(tokens), -1, -1), self.kv(tokens), self.num_heads))


class Perceiver(Patches):
    """Learned latents that attend, layer by layer, to the patches and to themselves (Flamingo, arXiv 2204.14198)."""

    def __init__(self, width: int, out: int, tokens: int, depth: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.ModuleList(PerceiverLayer(width, tokens) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, out)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, patches, width) -> (batch, latents, out)."""
        latents = self.latents.expand(len(tokens), -1, -1)
        for layer in self.layers:
            latents = layer(tokens, latents)
        return self.proj(self.norm(latents))


class PerceiverLayer(nn.Module):
    """Attention of the latents to [patches, latents], then an MLP of four times their width."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm_patches = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.attention = LatentAttention(width, tokens)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        normed = self.norm_latents(latents)
        latents = latents + self.attention(torch.cat([self.norm_patches(tokens), normed], dim=1), normed)
        return latents + self.mlp(latents)


class LatentAttention(nn.Module):
    """Attention of latents (batch, latents, width) to tokens (batch, tokens, width)."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads(width)
        self.latent_len = latents
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        return self.proj(attend(self.q(latents), self.kv(tokens), self.num_heads))


class Abstractor(Patches):
    """C-Abstractor: convolutions, a mean over squares, convolutions, two linear layers (Honeybee, arXiv 2312.06742).

    The stages are RegNet's bottlenecks (depthwise 3 x 3, squeeze and excitation) with layer norms, as wide as the
    tower. Honeybee adds learned positions to the patches; here there are none, so that it takes any grid.

    Args:
        side: of the grid of tokens that it hands over; depth: bottlenecks in a stage.
    """

    def __init__(self, width: int, out: int, side: int, depth: int) -> None:
        super().__init__()
        from timm.layers import LayerNorm2d
        from timm.models.regnet import RegStage

        stage = partial(RegStage, depth, width, width, 1, 1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
        self.side = side
        self.before, self.after = stage(), stage()
        self.mlp = nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, patches, width) -> (batch, side x side, out).

        Raises:
            UsageError: the patches are no square grid, or fewer than the tokens.
        """
        patches = grid_side(tokens.shape[1], "c_abstractor")
        if patches < self.side:
            raise UsageError(
                f"connector c_abstractor: {self.side**2} image tokens are more than the {patches**2} patches that the "
                "image tower hands over",
                f"use tokens={patches**2} or fewer",
            )
        x = self.before(tokens.transpose(1, 2).unflatten(2, (patches, patches)))
        x = self.after(F.adaptive_avg_pool2d(x, self.side))
        return self.mlp(x.flatten(2).transpose(1, 2))


class Shuffle(nn.Module):
    """The patches of a square become the channels of one token, then an MLP (VILA's mlp_downsample; NVILA, 2412.04468).

    Args:
        along: patches along the side of a square. Of 2 the MLP has two linear layers, of 3 another before them, to a
            third of the channels.
    """

    def __init__(self, width: int, out: int, along: int) -> None:
        super().__init__()
        self.along = along
        layers, inner = [], along**2 * width
        if along == 3:
            layers, inner = [nn.LayerNorm(inner), nn.Linear(inner, along * width), nn.GELU()], along * width
        self.mlp = nn.Sequential(*layers, nn.LayerNorm(inner), nn.Linear(inner, out), nn.GELU(), nn.Linear(out, out))

    def pool(self, tokens: Tensor) -> Tensor:
        """(batch, patches, width) -> (batch, squares, width of all their patches); it has no parameters.

        Raises:
            UsageError: the patches are no square grid, or the squares do not cover it.
        """
        name = f"shuffle{self.along}"
        patches = grid_side(tokens.shape[1], name)
        if patches % self.along:
            raise uneven(name, patches, self.along)
        squares = tokens.unflatten(1, (patches // self.along, self.along, patches // self.along, self.along))
        return squares.transpose(2, 3).flatten(3).flatten(1, 2)

    def forward(self, squares: Tensor) -> Tensor:
        """(batch, squares, width of all their patches) -> (batch, squares, out)."""
        return self.mlp(squares)


def smaller_grid(tokens: Tensor, side: int) -> Tensor:
    """Means over squares: the tokens (batch, n, width) of a square grid as (batch, side x side, width)."""
    along = math.isqrt(tokens.shape[1])
    grid = tokens.transpose(1, 2).unflatten(2, (along, along))
    return F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)


def heads(width: int) -> tuple[int, int]:
    """Number of heads and channels of each; one head where 64 channels do not divide the width."""
    return (width // HEAD, HEAD) if width % HEAD == 0 else (1, width)


def attend(queries: Tensor, keys_values: Tensor, heads: int) -> Tensor:
    """Fused attention of queries (batch, M, width) to keys and values side by side (batch, N, 2 x width)."""
    q = queries.unflatten(2, (heads, -1)).transpose(1, 2)
    k, v = keys_values.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q.to(k.dtype), k, v).transpose(1, 2).flatten(2)


def grid_side(tokens: int, name: str) -> int:
    """Patches along the side of a square grid.

    Raises:
        UsageError: so many are none.
    """
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise UsageError(
            f"connector {name} needs a square grid of patches, and the image tower hands {tokens} over",
            "use type=pool, attention or perceiver, or leave out what drops or merges patches",
        )
    return side


def uneven(name: str, patches: int, along: int) -> UsageError:
    """What is wrong with a grid that squares do not cover."""
    fits = [str(n) for n in (2, 3) if patches % n == 0 and n != along]
    return UsageError(
        f"connector {name}: squares of {along} x {along} do not cover a grid of {patches} x {patches} patches",
        (f"use type=shuffle{fits[0]}, or " if fits else "")
        + f"resize the images to {max(1, patches // along) * along} x {max(1, patches // along) * along} patches",
    )
