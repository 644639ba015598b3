"""The layers of a tower that one channel runs through, as groups of torch-pruning (DepGraph, arXiv 2301.12900).

A pre-norm tower has three kinds of groups: its width, that all blocks share; the queries, keys and values of each
block; the hidden units of each MLP. They are written down here and not traced: torch-pruning's tracer takes OpenCLIP's
`x @ proj` for an elementwise product and cuts the joint space with the width, it maps only half of the channels where
class token and mean stand side by side, and it follows token edits. On a ViT that it traces right the groups are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch_pruning as tp
from open_clip.timm_model import TimmModel
from torch import Tensor, nn
from torch_pruning.dependency import Dependency, Group, Node
from torch_pruning.pruner.function import ParameterPruner

from effbench.errors import UsageError
from effbench.models.attention import Attention
from effbench.models.dual_encoder import DualEncoder, TimmFeatures
from effbench.models.tower import ModelView, Tower

NARROWER = "leave the width as it is: what=head_dims/mlp"


@dataclass
class Layer:
    """A layer of a group, or a parameter that is no layer's.

    Args:
        module: the layer, or the module that holds the parameter.
        prune: torch-pruning's function; None for a parameter.
        copies: channel c of a group of n is found at c, c + n, ... (three times in `qkv`).
        parameter, axis: name of the parameter, and its axis that the channels lie on.
    """

    module: nn.Module
    prune: Callable | None
    copies: int = 1
    parameter: str = ""
    axis: int = -1


@dataclass
class Channels:
    """A group of layers that share `size` channels."""

    size: int
    layers: list[Layer] = field(default_factory=list)

    def writes(self, layer: nn.Module | None) -> None:
        """Add what has the channels as its output: a linear layer, a convolution, an embedding or a norm."""
        prune = None
        if isinstance(layer, nn.Linear):
            prune = tp.prune_linear_out_channels
        elif isinstance(layer, nn.Conv2d):
            prune = tp.prune_conv_out_channels
        elif isinstance(layer, nn.Embedding):
            prune = tp.prune_embedding_out_channels
        elif isinstance(layer, nn.LayerNorm):
            prune = tp.prune_layernorm_out_channels
        elif layer is not None and next(layer.parameters(), None) is not None:
            hint = "choose what= without it, or a plain ViT"
            raise UsageError(f"channel_prune: a layer of type {type(layer).__name__} is not known", hint)
        if prune is not None:
            copies = layer.out_features // self.size if isinstance(layer, nn.Linear) else 1
            self.layers.append(Layer(layer, prune, copies))

    def reads(self, linear: nn.Linear) -> None:
        self.layers.append(Layer(linear, tp.prune_linear_in_channels, linear.in_features // self.size))

    def holds(self, module: nn.Module, parameter: str, axis: int = -1) -> None:
        """Add a parameter of a module that is no layer, if the module has it."""
        if isinstance(getattr(module, parameter, None), nn.Parameter):
            self.layers.append(Layer(module, None, 1, parameter, axis))

    def parameters(self) -> Iterable[nn.Parameter]:
        for layer in self.layers:
            own = layer.module.parameters(recurse=False)
            yield from [getattr(layer.module, layer.parameter)] if layer.parameter else own

    def scores(self, importance: tp.importance.Importance) -> Tensor:
        """Importance of each channel, (size,), in float32: torch-pruning's mean over the layers of the group."""
        group = Group()
        layers = [layer for layer in self.layers if layer.prune is not None]
        for layer in sorted(
            layers, key=lambda layer: layer.copies
        ):  # torch-pruning gives as many scores as the first has
            node = Node(layer.module, None)
            channels = list(range(self.size))
            group.add_dep(Dependency(layer.prune, layer.prune, node, node), list(range(self.size * layer.copies)))
            group[-1].root_idxs = channels * layer.copies
        return importance(group).float().cpu()

    def remove(self, gone: Sequence[int]) -> None:
        """Take channels out of every layer, in place."""
        for layer in self.layers if len(gone) else ():
            _narrow(layer, [c + k * self.size for k in range(layer.copies) for c in gone])


@torch.no_grad()
def _narrow(layer: Layer, gone: list[int]) -> None:
    module = layer.module
    trained = {name: p.requires_grad for name, p in module.named_parameters(recurse=False)}
    if layer.prune is None:
        cut = ParameterPruner(layer.axis).prune_out_channels(getattr(module, layer.parameter), gone)
        setattr(module, layer.parameter, cut)
    elif isinstance(
        module, nn.LayerNorm
    ):  # torch-pruning 1.6.1 mixes up its channels: it does not sort those that stay
        for name in trained:
            setattr(module, name, ParameterPruner(0).prune_out_channels(getattr(module, name), gone))
        module.normalized_shape = (module.normalized_shape[0] - len(gone),)
    else:
        layer.prune(module, gone)
    for name, requires in trained.items():  # torch-pruning lets all that it cuts require gradients
        getattr(module, name).requires_grad_(requires)


def attention_channels(attention: Attention) -> Channels:
    """Queries, keys and values of one block: heads x head width channels, head by head.

    Raises:
        UsageError: a part of it is not known here.
    """
    known = ("qkv", "q_norm", "k_norm", "norm", "gate", "proj")
    strange = [name for name, _ in attention.named_parameters() if name.split(".")[0] not in known]
    if strange:
        raise UsageError(f"channel_prune does not know {strange[0]} of an attention", "prune what=mlp/width")
    group = Channels(attention.proj.in_features)
    group.writes(attention.qkv)
    group.writes(attention.norm)
    group.writes(attention.gate)
    group.reads(attention.proj)
    return group


def norms_per_head(attention: Attention) -> Channels:
    """The norms of queries and keys, whose channels are those of one head."""
    group = Channels(attention.proj.in_features // attention.num_heads)
    group.writes(attention.q_norm)
    group.writes(attention.k_norm)
    return group


def remove_from_attention(attention: Attention, heads: Sequence[int], dims: Sequence[int]) -> None:
    """Take out heads, and the same channels of every head that stays. The softmax scale stays."""
    width = attention.proj.in_features // attention.num_heads
    gone = {head * width + dim for head in heads for dim in range(width)}
    gone |= {head * width + dim for head in range(attention.num_heads) for dim in dims}
    if dims:
        norms_per_head(attention).remove(dims)
    attention_channels(attention).remove(sorted(gone))
    attention.num_heads -= len(heads)


def linears(mlp: nn.Module) -> list[nn.Linear]:
    """The linear layers of an MLP; the last one reads its hidden units."""
    return [layer for layer in mlp.modules() if isinstance(layer, nn.Linear)]


def hidden_channels(mlp: nn.Module) -> Channels:
    """Hidden units of one MLP; with a gate (GLU) a unit has a row in each half of the first layer."""
    found = linears(mlp)
    if len(found) < 2 or any(layer.out_features % found[-1].in_features for layer in found[:-1]):
        raise UsageError(f"channel_prune: an MLP of type {type(mlp).__name__} is not known", "leave mlp out of what=")
    *first, last = found
    group = Channels(last.in_features)
    for layer in (*first, *(part for part in mlp.children() if not isinstance(part, nn.Linear))):
        group.writes(layer)
    group.reads(last)
    return group


def width_channels(model: ModelView, tower: Tower) -> Channels:
    """The channels that all blocks of a tower share, with the layers before and behind it that hold or read them.

    Raises:
        UsageError: something else of the model has that width; says what.
    """
    group = Channels(tower.width)
    for block in tower.blocks:
        first, second = (getattr(block, f"norm{i}", None) or getattr(block, f"ln_{i}") for i in (1, 2))
        *into, out = linears(block.mlp)
        for layer in (first, block.attn.proj, second, out):
            group.writes(layer)
        for layer in (block.attn.qkv, block.attn.gate, *into):
            if layer is not None:
                group.reads(layer)
        for scale in ("ls1", "ls2", "ls_1", "ls_2"):
            group.holds(getattr(block, scale, None), "gamma")
    module = tower.module
    if tower is model.text:
        _ends_of_openclip_text(group, module)
    elif hasattr(module, "class_embedding"):
        _ends_of_openclip_image(group, module)
    else:
        _ends_of_timm(group, module, model.model)
    known = {id(p) for p in group.parameters()}
    if tower is model.text and model.image is not None:
        known |= {id(p) for p in model.image.module.parameters()}  # open_clip.CLIP is its own text tower
    for name, parameter in module.named_parameters():
        if id(parameter) not in known and tower.width in parameter.shape and not _within(name):
            raise UsageError(
                f"channel_prune: {name} of the {tower.name} has its width, {tower.width}, and is not known", NARROWER
            )
    return group


def _within(name: str) -> bool:
    """Whether a parameter's width is that of the heads or of the hidden units, which may happen to be the tower's."""
    return any(part in name for part in (".q_norm.", ".k_norm.", ".attn.norm.", ".mlp.norm."))


def _ends_of_timm(group: Channels, vit: nn.Module, model: nn.Module) -> None:
    embed = vit.patch_embed
    group.writes(embed.proj)
    group.writes(getattr(embed, "norm", None))
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        group.holds(vit, name)
    group.writes(vit.norm_pre)
    group.writes(vit.norm)
    if vit.attn_pool is not None:
        raise UsageError("channel_prune: attention pooling (global_pool=map) reads the tower's width", NARROWER)
    group.writes(vit.fc_norm)
    for head in (vit.head, getattr(vit, "head_dist", None), *_readers_of_timm(vit, model)):
        if isinstance(head, nn.Linear):
            group.reads(head)


def _readers_of_timm(vit: nn.Module, model: nn.Module) -> list[nn.Linear]:
    """What reads a timm model's features outside of it."""
    if model is vit:
        return []
    encoder = getattr(model, "image_encoder", None) or getattr(model, "visual", None)
    if isinstance(model, DualEncoder) and isinstance(encoder, TimmFeatures):
        if isinstance(model.projection, nn.Linear):
            return [model.projection]
    elif isinstance(encoder, TimmModel) and not hasattr(encoder.head, "pool"):
        behind = [layer for layer in encoder.head.modules() if isinstance(layer, nn.Linear)]
        if behind or isinstance(vit.head, nn.Linear):
            return behind[:1]
    raise UsageError(f"channel_prune does not know what of {type(model).__name__} reads its features", NARROWER)


def _ends_of_openclip_image(group: Channels, visual: nn.Module) -> None:
    group.writes(visual.conv1)
    group.holds(visual, "class_embedding")
    group.holds(visual, "positional_embedding")
    group.writes(visual.ln_pre)
    if visual.attn_pool is not None or visual.proj is None or visual.output_tokens:
        raise UsageError("channel_prune: this OpenCLIP image tower has no plain projection behind it", NARROWER)
    group.writes(visual.ln_post)
    group.holds(visual, "proj", axis=0)


def _ends_of_openclip_text(group: Channels, text: nn.Module) -> None:
    group.writes(text.token_embedding)
    group.holds(text, "positional_embedding")
    group.holds(text, "cls_emb")
    group.writes(text.ln_final)
    if text.text_projection is None or getattr(text, "output_tokens", False):
        raise UsageError("channel_prune: this OpenCLIP text tower has no projection behind it", NARROWER)
    if isinstance(text.text_projection, nn.Linear):
        group.reads(text.text_projection)
    else:
        group.holds(text, "text_projection", axis=0)


def tell_width(model: ModelView, tower: Tower, width: int) -> None:
    """Set the attributes that the libraries and effbench read the width from."""
    module = tower.module
    tower.width = width
    if hasattr(tower.loop, "width"):
        tower.loop.width = width  # OpenCLIP's Transformer
    if tower is model.text and hasattr(module, "width"):
        module.width = width
    if hasattr(module, "embed_dim"):  # timm
        module.embed_dim = width
        for info in module.feature_info:
            info["num_chs"] = width
        module.num_features = module.head_hidden_size = width
    encoder = getattr(model.model, "image_encoder", None)
    if tower is model.image and isinstance(encoder, TimmFeatures):
        encoder.width = module.num_features * (2 if encoder.with_class_token else 1)
