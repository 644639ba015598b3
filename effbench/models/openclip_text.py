"""Adapter: OpenCLIP's causal text towers on rows of tokens that a method lays out. Source: open_clip.transformer (MIT).

In a causal tower that pools at the end-of-text token nothing behind that token matters, so a text may stand in a row
as short as itself, or beside other texts that a mask hides from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from effbench.errors import UsageError
from effbench.models.text_rows import TextLayout, TextRows, one_text_per_row


class TextsInRows:
    """Mixed into a library's text tower in place: same attributes, same keys.

    Attributes:
        layout: how a method lays the texts out; None for the library's own padded rows.
    """

    layout: TextLayout | None

    def pooling(self) -> tuple[str, int | None]:
        """The library's name of the place that is pooled, and the id of the end-of-text token where it looks for it."""
        raise NotImplementedError

    def lay_out(self, layout: TextLayout) -> None:
        """Let a method lay the texts out from now on.

        Raises:
            UsageError: what stands behind the end of a text changes its features here, or another method lays them out.
        """
        other = self.layout
        if other is not None:
            raise UsageError(f"{other.name} and {layout.name} conflict: both lay out the texts", "name one of them")
        if obstacle := self._obstacle():
            raise UsageError(
                f"{layout.name} needs a causal text tower pooled at the end-of-text token, but this one {obstacle}",
                "choose a model whose text tower is CLIP's, e.g. openclip:ViT-B-32",
            )
        self.layout = layout.train(self.training)

    def _obstacle(self) -> str:
        if self.attn_mask is None:
            return "is bidirectional (no_causal_mask)"
        if getattr(self, "cls_emb", None) is not None:
            return "pools a class token behind the padding (embed_cls)"
        if getattr(self, "output_tokens", False):
            return "hands out the features of all tokens (output_tokens)"
        pool, _ = self.pooling()
        return "" if pool in ("argmax", "eos") else f"pools otherwise (pool_type={pool})"

    def ends(self, ids: Tensor) -> Tensor:
        """(batch,) position of the token that each text of ids (batch, context) is pooled at."""
        pool, end = self.pooling()
        return ids.argmax(dim=-1) if pool == "argmax" else (ids == end).int().argmax(dim=-1)

    def features(self, ids: Tensor) -> Tensor:
        """Token ids (batch, context) -> (batch, embedding width), in rows as the layout says."""
        ends, context = self.ends(ids), ids.shape[1]
        if self.layout is None:
            return self._pooled(ids, one_text_per_row(ends, context, context))
        groups, order = self.layout(ends, context)
        found = [self._pooled(ids, rows) for rows in groups]
        return found[0] if order is None else torch.cat(found)[order.argsort()]

    def _pooled(self, ids: Tensor, rows: TextRows) -> Tensor:
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(ids.flatten()[rows.source]).to(dtype)
        x = x + F.embedding(rows.positions, self.positional_embedding).to(dtype)
        mask = rows.mask()
        x = self.transformer(x, mask, is_causal=mask is None)
        x = self.ln_final(x.flatten(0, 1)[rows.last])
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(x)
        return x if self.text_projection is None else x @ self.text_projection


class RowsTextTransformer(TextsInRows, TextTransformer):
    """OpenCLIP's TextTransformer that lets a method lay out its texts."""

    def pooling(self) -> tuple[str, int | None]:
        return self.pool_type, getattr(self, "eos_id", None)

    def forward(self, text: Tensor) -> Tensor:
        return super().forward(text) if self.layout is None else self.features(text)


class RowsCLIP(TextsInRows, CLIP):
    """OpenCLIP's CLIP, whose text tower is the model itself; it also takes texts shorter than the context length."""

    def pooling(self) -> tuple[str, int | None]:
        return self.text_pool_type, getattr(self, "text_eos_id", None)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        if self.layout is None and (text.shape[1] == self.context_length or self._obstacle()):
            return super().encode_text(text, normalize)
        features = self.features(text)
        return F.normalize(features, dim=-1) if normalize else features


_CLASSES = {TextTransformer: RowsTextTransformer, CLIP: RowsCLIP}


def open_to_layouts(text: nn.Module) -> None:
    """Let a method lay out the texts of a tower, if it is of a kind that can."""
    if type(text) in _CLASSES:
        text.__class__ = _CLASSES[type(text)]  # keeps every attribute and key that the library reads
        text.register_module("layout", None)
