"""Tiny random models and data, made in the test."""

from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
from PIL import Image

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
COLOURS = ("red", "green", "blue", "yellow")


def vit(**options):
    torch.manual_seed(0)
    size = dict(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=5)
    return timm.models.vision_transformer.VisionTransformer(**size | options).eval()


def clip():
    torch.manual_seed(0)
    text = dict(context_length=12, vocab_size=50, width=24, heads=3, layers=2)
    vision = dict(image_size=32, patch_size=8, width=24, head_width=8, layers=4)
    return open_clip.CLIP(16, vision, text).eval()


def flickr8k(folder: Path, train: int = 24, dev: int = 6, test: int = 8) -> Path:
    """A data set in the official layout, 32 px images of two colours each; returns the folder for EFFBENCH_DATA."""
    root = folder / "flickr8k"
    texts, photos = root / "Flickr8k_text", root / "Flicker8k_Dataset"
    texts.mkdir(parents=True)
    photos.mkdir()
    lines, start = [], 0
    for split, count in (("train", train), ("dev", dev), ("test", test)):
        names = [f"{i:04d}.jpg" for i in range(start, start + count)]
        for i, name in enumerate(names, start):
            left, right = COLOURS[i % 4], COLOURS[i // 4 % 4]
            picture = Image.new("RGB", (32, 32), left)
            picture.paste(Image.new("RGB", (16, 32), right), (16, 0))
            Image.fromarray(np.asarray(picture) // 2 + i).save(photos / name)
            lines += [f"{name}#{k}\t{left} beside {right} , number {i} , take {k} .\n" for k in range(5)]
        (texts / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{name}\n" for name in names))
        start += count
    (texts / "Flickr8k.token.txt").write_text("".join(lines))
    return folder
