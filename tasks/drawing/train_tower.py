"""Train the small vision transformer that ships with effbench.

    python -m effbench_tasks.drawing.train_tower --out scenes_vit.safetensors

It learns, from scenes drawn on the way, to name what it sees: the class token tells the shape, place and size of the
thing of every colour (or that there is none) and the background; every patch token tells the same of what covers it.
Shapes are learned within a cell of the grid, from crowded scenes and by few blocks: there this takes a tenth of the
images. Then the windows, in which tokens see each other, and the depth grow to their full size, and the scenes become
those of the data set. Last comes `finish`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from effbench_tasks.drawing.scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RADII,
    SHAPES,
    SIZE,
    TEXTURES,
    Scene,
    draw,
    generator,
    sample,
)

ARCHITECTURE = dict(
    img_size=SIZE,
    patch_size=8,
    embed_dim=96,
    depth=12,
    num_heads=3,
    num_classes=0,
    class_token=True,
    global_pool="token",
)
MEAN = STD = (0.5, 0.5, 0.5)
SEED = 1
SIDE = SIZE // ARCHITECTURE["patch_size"]  # patches


@dataclass(frozen=True)
class Stage:
    """A part of the training: its share of the steps, blocks in use, windows per side that attention stays within,
    and the numbers of things in its scenes."""

    share: float
    depth: int
    windows: int
    counts: tuple[int, ...]


STAGES = (
    Stage(0.25, 4, 3, (6, 8)),
    Stage(0.3, 8, 1, (4, 6, 8)),
    Stage(0.45, 12, 1, (2, 3, 3, 4)),
)
_NAMES = [place for row in PLACES for place in row]
_FACTS = (len(SHAPES), len(_NAMES), len(RADII))  # what there is to tell of a thing of given colour
_SLOT = tuple(count + 1 for count in _FACTS)  # the same of a whole scene, where 0 is "there is none"
_PATCH = tuple(len(COLOURS) * count + 1 for count in _FACTS)  # of a patch, colour included; 0 is background
_GROUND = (len(BACKGROUNDS), len(TEXTURES))


def targets(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the tower shall tell: slots (colours, 3), background (2,), patches (patches, 3), all int64."""
    slots = np.zeros((len(COLOURS), 3), np.int64)
    patches = np.zeros((SIDE, SIDE, 3), np.int64)
    middle = (np.arange(SIDE) + 0.5) * ARCHITECTURE["patch_size"]
    for thing in scene.things:
        shape, size = SHAPES.index(thing.shape) + 1, list(RADII).index(thing.size) + 1
        colour = list(COLOURS).index(thing.colour)
        slots[colour] = shape, _NAMES.index(thing.place) + 1, size
        x, y = thing.centre
        reach = RADII[thing.size]
        here = np.ix_(abs(middle - y) < reach, abs(middle - x) < reach)
        patches[here] = slots[colour] + colour * np.array(_FACTS)
    ground = list(BACKGROUNDS).index(scene.background), TEXTURES.index(scene.texture)
    return slots, np.array(ground), patches.reshape(-1, 3)


def drawn(indices: range, counts: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """Normalised images (batch, 3, SIZE, SIZE) and their targets, each stacked."""
    scenes = [sample(generator(SEED, "tower", index), counts) for index in indices]
    pixels = np.stack([np.asarray(draw(scene)) for scene in scenes])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return images, [torch.from_numpy(np.stack(t)) for t in zip(*map(targets, scenes), strict=True)]


class Probes(nn.Module):
    """Linear readouts: of what sums up the scene (class token, mean of the patch tokens) and of each patch token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        told = len(COLOURS) * sum(_SLOT) + sum(_GROUND)
        self.class_token, self.mean = nn.Linear(width, told), nn.Linear(width, told)
        self.patch = nn.Linear(width, sum(_PATCH))


def scene_loss(logits: Tensor, slots: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of a readout of the scene; shares of things whose shape, place and size are told rightly (3,)."""
    told, field = logits.split([len(COLOURS) * sum(_SLOT), sum(_GROUND)], dim=1)
    told = told.unflatten(1, (len(COLOURS), -1))
    there = slots[..., 0] > 0
    loss = _entropy(told, _SLOT, slots) + _entropy(told[there], _SLOT, slots[there])
    return loss + 0.3 * _entropy(field, _GROUND, ground), _right(told[there], _SLOT, slots[there])


def patch_loss(logits: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of the readouts of patches; shares of covered ones told rightly (3,)."""
    covered = patches[..., 0] > 0
    loss = _entropy(logits, _PATCH, patches) + _entropy(logits[covered], _PATCH, patches[covered])
    return loss, _right(logits[covered], _PATCH, patches[covered])


def _entropy(logits: Tensor, sizes: tuple[int, ...], wanted: Tensor) -> Tensor:
    parts = zip(logits.split(sizes, dim=-1), wanted.unbind(dim=-1), strict=True)
    return sum(F.cross_entropy(part.flatten(0, -2), target.flatten()) for part, target in parts)


def _right(logits: Tensor, sizes: tuple[int, ...], wanted: Tensor) -> Tensor:
    parts = zip(logits.split(sizes, dim=-1), wanted.unbind(dim=-1), strict=True)
    return torch.stack([(part.argmax(dim=-1) == target).float().mean() for part, target in parts])


def forward(tower: VisionTransformer, images: Tensor, stage: Stage) -> Tensor:
    """Tokens (batch, 1 + patches, width) after the stage's blocks and the final norm.

    Each window has a class token of its own; their mean is returned.
    """
    x = tower._pos_embed(tower.patch_embed(images))
    n, side = stage.windows, SIDE // stage.windows
    grid = x[:, 1:].unflatten(1, (n, side, n, side)).transpose(2, 3)
    windows = grid.flatten(3, 4).flatten(0, 2)  # (batch x windows, patches of one, width)
    first = x[:, :1].repeat_interleave(n * n, dim=0)
    y = tower.norm(tower.blocks[: stage.depth](torch.cat([first, windows], dim=1)))
    classes = y[:, 0].unflatten(0, (-1, n * n)).mean(dim=1, keepdim=True)
    grid = y[:, 1:].unflatten(0, (-1, n, n)).unflatten(3, (side, side)).transpose(2, 3)
    return torch.cat([classes, grid.flatten(1, 4)], dim=1)


def fresh() -> VisionTransformer:
    """An untrained tower that learns fast: it knows where patches lie, and a block that is added changes nothing."""
    tower = VisionTransformer(**ARCHITECTURE, weight_init="jax")
    position = build_sincos2d_pos_embed(
        [SIDE, SIDE], ARCHITECTURE["embed_dim"], temperature=100.0, interleave_sin_cos=True
    )
    with torch.no_grad():
        tower.pos_embed[0, 1:] = 0.5 * position
        for block in tower.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()
    return tower


def train(steps: int, batch: int, lr: float, say: Callable[[str], None]) -> VisionTransformer:
    """A trained tower: `STAGES`, then a fifth of the steps more by `finish`. `say` gets a line every 20 steps."""
    torch.manual_seed(SEED)
    tower, probes = fresh(), Probes(ARCHITECTURE["embed_dim"])
    ends = np.cumsum([stage.share for stage in STAGES]) * steps

    def step(index: int) -> tuple[Tensor, list[Tensor]]:
        stage = STAGES[min(int(np.searchsorted(ends, index, "right")), len(STAGES) - 1)]
        images, (slots, ground, patches) = drawn(range(index * batch, (index + 1) * batch), stage.counts)
        tokens = forward(tower, images, stage)
        of_patches, patches_right = patch_loss(probes.patch(tokens[:, 1:]), patches)
        of_class, class_right = scene_loss(probes.class_token(tokens[:, 0]), slots, ground)
        return of_patches + of_class, [patches_right, class_right]

    descend(step, range(steps), {lr: [tower, probes]}, say)
    finish(tower, range(steps, steps + steps // 5), batch, lr, say)
    return tower.eval()


def finish(tower: VisionTransformer, steps: range, batch: int, lr: float, say: Callable[[str], None]) -> None:
    """Train the class token to attend to things at blocks 3, 6 and 9, and every token to sum up the scene.

    After `STAGES` alone, class attention at block 3 kept fewer of the things' tokens than chance, so pruning by it told
    nothing. In three of four steps some tokens, the background's first, are left out from one of the blocks on. So this
    tower is made for class attention: what pruning costs on it says nothing about other towers.
    """
    probes = Probes(ARCHITECTURE["embed_dim"])
    rng = np.random.default_rng(SEED)

    def step(index: int) -> tuple[Tensor, list[Tensor]]:
        images, (slots, ground, patches) = drawn(range(index * batch, (index + 1) * batch), (2, 3, 3))
        x = tower._pos_embed(tower.patch_embed(images))
        last, kept = int(rng.integers(3, 10)), int(rng.integers(SIDE**2 // 8, SIDE**2))
        total = 0.0
        for depth, block in enumerate(tower.blocks):
            covered = patches[..., 0] > 0
            if depth == last and index % 4:
                chosen = (covered + torch.rand(covered.shape)).topk(kept, dim=1).indices.unsqueeze(-1)
                x = torch.cat([x[:, :1], x[:, 1:].take_along_dim(chosen, dim=1)], dim=1)
                patches = patches.take_along_dim(chosen, dim=1)
                covered = patches[..., 0] > 0
            if depth in (3, 6, 9):
                on_things = (class_attention(block, x) * covered).sum(dim=1)
                total = total - 0.5 * on_things.clamp_min(1e-6).log().mean()
            x = block(x)
            if depth == 8:
                total = total + patch_loss(probes.patch(tower.norm(x)[:, 1:]), patches)[0]
        x = tower.norm(x)
        of_class, class_right = scene_loss(probes.class_token(x[:, 0]), slots, ground)
        of_mean, mean_right = scene_loss(probes.mean(x[:, 1:].mean(dim=1)), slots, ground)
        return total + of_class + of_mean, [class_right, mean_right]

    descend(step, steps, {lr / 3: [tower], 2 * lr: [probes]}, say)


def class_attention(block: nn.Module, x: Tensor) -> Tensor:
    """How the class token's attention is shared among the patches (batch, patches), mean of the heads."""
    attention = block.attn
    heads = (3, attention.num_heads, attention.head_dim)
    query, key, _ = attention.qkv(block.norm1(x)).unflatten(2, heads).permute(2, 0, 3, 1, 4).unbind(0)
    scores = query[:, :, :1] @ key[:, :, 1:].transpose(-2, -1) * attention.scale
    return scores.softmax(dim=-1)[:, :, 0].mean(dim=1)


def descend(
    step: Callable[[int], tuple[Tensor, list[Tensor]]],
    steps: range,
    modules: dict[float, list[nn.Module]],
    say: Callable[[str], None],
) -> None:
    """AdamW with a one-cycle schedule over `step(index) -> (loss, shares of what is right)`; modules by peak rate."""
    groups = [{"params": [p for m in listed for p in m.parameters()], "lr": lr} for lr, listed in modules.items()]
    weights = [p for group in groups for p in group["params"]]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.03)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, list(modules), total_steps=len(steps), pct_start=0.08)
    start, seen = time.time(), []
    for index in steps:
        loss, right = step(index)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        seen.append([loss.item(), *torch.cat(right).tolist()])
        if len(seen) == 20:
            mean, *shares = np.mean(seen, axis=0)
            seen.clear()
            told = " ".join(f"{share:.2f}" for share in shares)
            say(f"step {index + 1}/{steps.stop} {time.time() - start:.0f} s loss {mean:.3f} right {told}")


def save(tower: VisionTransformer, path: Path, command: str, trained_on: str) -> None:
    """Write the weights as float16 safetensors, with all that is needed to use them in the metadata."""
    from safetensors.torch import save_file

    facts = dict(
        architecture=json.dumps(ARCHITECTURE),
        mean=json.dumps(MEAN),
        std=json.dumps(STD),
        trained_on=trained_on,
        command=command,
    )
    save_file({key: value.half().contiguous() for key, value in tower.state_dict().items()}, path, facts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m effbench_tasks.drawing.train_tower")
    parser.add_argument("--out", type=Path, required=True, help="where the weights go (.safetensors)")
    parser.add_argument("--steps", type=int, default=1200, help="at least 100; a fifth more follow")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tower = train(given.steps, given.batch, given.lr, lambda line: print(line, flush=True))
    options = f"--steps {given.steps} --batch {given.batch} --lr {given.lr} --threads {given.threads}"
    command = f"{parser.prog} --out {given.out.name} {options}"
    images = (given.steps + given.steps // 5) * given.batch
    save(tower, given.out, command, f"{images} drawn scenes (seed {SEED}, split tower)")


if __name__ == "__main__":
    sys.exit(main())
