"""The dual encoder: an image tower and a text tower that meet in one embedding space, and its three heads.

InfoNCE: CLIP, arXiv 2103.00020. Sigmoid: SigLIP, arXiv 2303.15343.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbench.models.token_state import BlockLoop, mean_by_size


class TimmFeatures(nn.Module):
    """Features of a timm tower: class token and mean of the patch tokens, or its own pooling without a class token.

    Attributes:
        trunk: the timm model.
        width: length of the feature vector.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.with_class_token = getattr(trunk, "global_pool", "") == "token"
        self.width = trunk.num_features * (2 if self.with_class_token else 1)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, width)."""
        tokens = self.trunk.forward_features(images)
        if not self.with_class_token:
            return self.trunk.forward_head(tokens, pre_logits=True)
        prefix = self.trunk.num_prefix_tokens
        blocks = getattr(self.trunk, "blocks", None)
        sizes = blocks.take_sizes() if isinstance(blocks, BlockLoop) else None
        mean = mean_by_size(tokens[:, prefix:], None if sizes is None else sizes[:, prefix:])
        return torch.cat([tokens[:, 0], mean], dim=1)


class DualEncoder(nn.Module):
    """Image and text embeddings and the loss that aligns them.

    Args:
        image_encoder: images (batch, 3, height, width) -> features (batch, feature width).
        text_encoder: token ids (batch, tokens) -> (batch, embedding width).
        projection: features -> (batch, embedding width); identity where the image encoder projects by itself.
        head: "cosine" (InfoNCE), "sigmoid" (SigLIP) or "bilinear" (InfoNCE on x^T W y).
        width: embedding width, needed by the bilinear head.
        logit_scale: initial log of the temperature's inverse; None for the head's default.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        text_encoder: nn.Module,
        projection: nn.Module,
        head: str,
        width: int,
        logit_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.projection = projection
        self.head = head
        default = math.log(10) if head == "sigmoid" else math.log(1 / 0.07)
        self.logit_scale = nn.Parameter(torch.tensor(default if logit_scale is None else logit_scale))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if head == "sigmoid" else None
        self.bilinear = nn.Linear(width, width, bias=False) if head == "bilinear" else None
        if self.bilinear is not None:
            nn.init.eye_(self.bilinear.weight)  # starts as the cosine head

    def embed_features(self, features: Tensor) -> Tensor:
        """Image features (batch, feature width) -> unit vectors (batch, embedding width), in float32 throughout."""
        x = F.normalize(self.projection(features.float()), dim=-1)
        return x if self.bilinear is None else self.bilinear(x)

    def embed_images(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, embedding width)."""
        return self.embed_features(self.image_encoder(images))

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """Token ids (batch, tokens) -> unit vectors (batch, embedding width)."""
        return F.normalize(self.text_encoder(tokens).float(), dim=-1)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """Contrastive loss of a batch of pairs, image and text (batch, embedding width) each, matching by row."""
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        logits = scale * image @ text.T
        if self.head == "sigmoid":
            sign = 2 * torch.eye(len(logits), device=logits.device) - 1
            return -F.logsigmoid(sign * (logits + self.logit_bias)).sum() / len(logits)
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One embedding per image and per text: what one test step computes."""
        return self.embed_images(images), self.embed_texts(tokens)
