"""What a model computes, as few numbers: a checksum of its outputs, and projections where bits may differ."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from effbench.records import Fingerprint

PROJECTIONS = 16


def fingerprint(outputs: dict[str, Tensor], images: int) -> Fingerprint:
    """Of a model's outputs on a fixed batch (embeddings, or losses of texts).

    The checksum is of the exact bits. Projections on random directions keep lengths and distances (Johnson and
    Lindenstrauss 1984): |vector - other| / |vector| estimates by how much, relatively, the outputs differ; with 16
    of them to within a quarter (each length has a standard deviation of 1 / sqrt(2 * 16)). An output of whole numbers
    is in the checksum alone.

    Args:
        outputs: by name, tensors of any shape.
        images: how many the batch holds.
    """
    digest = hashlib.sha256()
    vectors = {}
    for name, output in sorted(outputs.items()):
        output = output.detach().cpu().contiguous()
        digest.update(f"{name} {output.dtype} {tuple(output.shape)}\n".encode())
        digest.update(output.flatten().view(torch.uint8).numpy().tobytes())
        if output.is_floating_point() and output.numel():
            generator = torch.Generator().manual_seed(output.numel())
            directions = torch.randn(PROJECTIONS, output.numel(), generator=generator, dtype=torch.float64)
            values = output.flatten().double().nan_to_num(0.0, 0.0, 0.0)
            projected = (directions @ values / output.numel() ** 0.5).tolist()
            vectors[name] = tuple(float(f"{value:.7g}") for value in projected)  # short in the record
    return Fingerprint(sha256=digest.hexdigest(), vectors=vectors, images=images)
