"""FLOPs of a layer from the shapes of its inputs and its configuration, for the analytic count.

A formula takes the layer, its inputs in the order of its forward's parameters (its tensors, and a cache of keys and
values last), and its output, and returns the products that it computes. Classes are looked up by name, so nothing is
imported that a model does not use.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Product(NamedTuple):
    """One product of tensors: its FLOPs, and for each factor whether a backward pass computes its gradient."""

    flops: int
    gradients: tuple[bool, ...]


Formula = Callable[[Any, list[Any], Any], list[Product]]


def _linear(module: Any, inputs: list[Tensor], output: Any) -> list[Product]:
    flops = 2 * (inputs[0].numel() // module.in_features) * module.in_features * module.out_features
    return [Product(flops, (_trains(module, "weight"), inputs[0].requires_grad))]


def _convolution(module: Any, inputs: list[Tensor], output: Tensor) -> list[Product]:
    """Each number of the output is a dot product with the kernel over the channels of its group."""
    flops = 2 * output.numel() * (module.in_channels // module.groups) * prod(module.kernel_size)
    return [Product(flops, (_trains(module, "weight"), inputs[0].requires_grad))]


def _transposed_convolution(module: Any, inputs: list[Tensor], output: Tensor) -> list[Product]:
    """Each number of the input is spread by the kernel over the channels of its group."""
    flops = 2 * inputs[0].numel() * (module.out_channels // module.groups) * prod(module.kernel_size)
    return [Product(flops, (_trains(module, "weight"), inputs[0].requires_grad))]


def _bilinear(module: Any, inputs: list[Tensor], output: Tensor) -> list[Product]:
    """x^T W y: the weight with one side, then the smallest product of two that is left; so do all three gradients."""
    o, i, j = module.out_features, module.in1_features, module.in2_features
    flops = 2 * (output.numel() // o) * (o * i * j + min(o * i, o * j, i * j))
    return [Product(flops, (_trains(module, "weight"), *(x.requires_grad for x in inputs[:2])))]


def _products(pairs: int, width: int, trains: bool) -> list[Product]:
    """q.k^T and its product with v of `pairs` pairs of tokens, all heads together `width` wide."""
    return 2 * [Product(2 * pairs * width, (trains, trains))]


def _self_attention(module: Any, inputs: list[Tensor], output: Any) -> list[Product]:
    """The two products alone; the projections are layers of their own that are called. x: (batch, tokens, width)."""
    batch, tokens = inputs[0].shape[:2]
    trains = inputs[0].requires_grad or any(
        p.requires_grad for name, p in module.named_parameters() if not name.startswith("proj.")
    )
    core = getattr(module, "core", None)  # a method's own attention
    pairs = tokens**2 if core is None else core.pairs(tokens)
    return _products(batch * pairs, module.proj.in_features, trains)


def _whole_self_attention(module: Any, inputs: list[Tensor], output: Any) -> list[Product]:
    """The two products and all projections, whose weights are used without calling them."""
    x, linears = inputs[0], [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    projections = [product for layer in linears for product in _linear(layer, [x], None)]
    first = any(_trains(layer, "weight") for layer in linears if layer is not module.proj) or x.requires_grad
    last = Product(_linear(module.proj, [x], None)[0].flops, (_trains(module.proj, "weight"), first))
    projections = [p for layer, p in zip(linears, projections, strict=True) if layer is not module.proj] + [last]
    return projections + _products(x.shape[0] * x.shape[1] ** 2, module.proj.in_features, first)


def _openclip_attention(module: Any, inputs: list[Tensor], output: Any) -> list[Product]:
    """OpenCLIP's own attention: the packed input projection and the two products; `out_proj` is called."""
    batch, tokens, width = inputs[0].shape
    trains = _trains(module, "in_proj_weight"), inputs[0].requires_grad
    return [Product(6 * batch * tokens * width**2, trains), *_products(batch * tokens**2, width, any(trains))]


def _transformers_attention(module: Any, inputs: list[Any], output: Any) -> list[Product]:
    """Attention in a model of transformers: the two products alone, all pairs, those that a causal mask hides too.

    Each head of the queries has products of its own, however many share a key. x: (batch, tokens, width), or (tokens,
    width) of several sequences behind one another with the place where each of them ends.
    """
    *batch, tokens, _ = inputs[0].shape
    tensors, cache = ([x for x in inputs if isinstance(x, Tensor) == wanted] for wanted in (True, False))
    ends = next((x for x in tensors[1:] if x.ndim == 1 and not x.is_floating_point()), None)
    if batch or ends is None:
        earlier = _keys_before(cache[0], module.layer_idx, tokens) if cache else 0
        pairs = prod(batch) * tokens * (earlier + tokens)
    else:
        pairs = int(ends.diff().square().sum())
    trains = inputs[0].requires_grad or any(
        p.requires_grad for name, p in module.named_parameters() if name.partition(".")[0] not in OUTPUTS
    )
    heads, width = _heads(module)
    return _products(pairs, heads * width, trains)


def _keys_before(cache: Any, layer: int, tokens: int) -> int:
    """Keys in a layer's cache that its last `tokens`, which are in it too by now, were added to."""
    before = cache.get_seq_length(layer) - tokens
    window = getattr(cache.layers[layer], "sliding_window", None)
    return min(before, window - 1) if window else before


OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "proj")  # what comes after attention's products
HEADS = ("num_heads", "num_attention_heads")
WIDTHS = ("head_dim", "head_size")


def _heads(module: Any) -> tuple[int, int] | None:
    """Number of heads of the queries and their width, as the classes of transformers name them; None where unknown."""
    config = getattr(module, "config", None)
    heads = next((getattr(at, name) for at in (module, config) for name in HEADS if hasattr(at, name)), None)
    width = next((getattr(module, name) for name in WIDTHS if hasattr(module, name)), None)
    return (heads, width) if isinstance(heads, int) and isinstance(width, int) else None


def _is_of_transformers(module: nn.Module) -> bool:
    """An attention of transformers, of a decoder or of an image tower."""
    kind = type(module)
    named = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("Attention")
    inner = any(type(part).__name__.endswith("Attention") for part in module.modules() if part is not module)
    return named and not inner and _heads(module) is not None


def _transformers_experts(module: Any, inputs: list[Any], output: Any) -> list[Product]:
    """The experts of transformers: x (tokens, width), and of each token the experts that it takes (tokens, active).

    Weights are (experts, in, out) or (experts, out, in); the first, gated or not, makes what the last one takes.
    """
    x, chosen = inputs[:2]
    first = next(name for name in ("gate_up_proj", "up_proj") if hasattr(module, name))
    found, reached = [], x.requires_grad
    for name in (first, "down_proj"):
        weight = getattr(module, name)
        found.append(Product(2 * chosen.numel() * weight[0].numel(), (weight.requires_grad, reached)))
        reached = reached or weight.requires_grad
    return found


def are_experts(module: nn.Module) -> bool:
    """Experts of transformers that hold their weights in one tensor each."""
    kind = type(module)
    named = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("Experts")
    return named and getattr(getattr(module, "down_proj", None), "ndim", 0) == 3


def _transposed_linear(module: Any, inputs: list[Any], output: Any) -> list[Product]:
    """GPT-2's linear layer, whose weight is (in, out)."""
    flops = 2 * inputs[0].numel() * module.weight.shape[1]
    return [Product(flops, (_trains(module, "weight"), inputs[0].requires_grad))]


def _latent_pooling(module: Any, inputs: list[Tensor], output: Any) -> list[Product]:
    """A few learned queries attend to all tokens; the projections are called."""
    batch, tokens = inputs[0].shape[:2]
    trains = inputs[0].requires_grad or any(p.requires_grad for p in module.parameters())
    return _products(batch * module.latent_len * tokens, module.num_heads * module.head_dim, trains)


def _multihead_attention(module: Any, inputs: list[Tensor], output: Any) -> list[Product]:
    """nn.MultiheadAttention: four projections and the two products, batched or not, batch first or not."""
    query, key, value = inputs[:3]
    width = module.embed_dim
    axis = 0 if query.ndim == 2 or not module.batch_first else 1
    batch = query.numel() // (query.shape[axis] * query.shape[-1])
    keys = key.shape[axis] + (module.bias_k is not None) + bool(module.add_zero_attn)
    names = (
        3 * ("in_proj_weight",) if module._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    )
    found = [
        Product(2 * x.numel() * width, (_trains(module, name), x.requires_grad))
        for x, name in zip((query, key, value), names, strict=True)
    ]
    trains = any(any(projection.gradients) for projection in found)
    found += _products(batch * query.shape[axis] * keys, width, trains)
    out = Product(2 * batch * query.shape[axis] * width**2, (_trains(module.out_proj, "weight"), trains))
    return [*found, out]


def _recurrent(module: Any, inputs: list[Tensor], output: Any) -> list[Product]:
    """LSTM, GRU or RNN: every weight matrix once per step and sequence."""
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    ways, projected = 2 if module.bidirectional else 1, getattr(module, "proj_size", 0)
    state = projected or module.hidden_size
    steps = inputs[0].numel() // module.input_size
    trains = any(p.requires_grad for p in module.parameters())
    found = []
    for layer in range(module.num_layers):
        width = module.input_size if layer == 0 else ways * state
        macs = ways * module.hidden_size * (gates * (width + state) + projected)
        found.append(Product(2 * steps * macs, (trains, trains or inputs[0].requires_grad)))
    return found


def _openclip_projection(module: Any, inputs: list[Tensor], output: Any) -> list[Product]:
    """The projection that an OpenCLIP tower holds as a bare Parameter: pooled (batch, width) -> (batch, embedding)."""
    weight = getattr(module, "proj", None) if hasattr(module, "proj") else module.text_projection
    if not isinstance(weight, nn.Parameter):
        return []
    pooled = tree_leaves(output)[0]
    tower = any(p.requires_grad for p in module.parameters() if p is not weight)
    return [Product(2 * pooled.numel() * weight.shape[0], (weight.requires_grad, tower))]


def _nothing(module: Any, inputs: list[Tensor], output: Any) -> list[Product]:
    return []


#: by a class's full name, or by the package's and the class's; a subclass has its parent's
FORMULAS: dict[str, Formula] = {
    "torch.Linear": _linear,
    **{f"torch.Conv{axes}d": _convolution for axes in (1, 2, 3)},
    **{f"torch.ConvTranspose{axes}d": _transposed_convolution for axes in (1, 2, 3)},
    "torch.Bilinear": _bilinear,
    "torch.MultiheadAttention": _multihead_attention,
    "torch.RNNBase": _recurrent,
    **{f"torch.{name}": _nothing for name in ("Embedding", "EmbeddingBag", "LayerNorm", "RMSNorm", "PReLU")},
    "timm.layers.attention.Attention": _self_attention,
    "timm.models.vision_transformer.Attention": _self_attention,
    "timm.layers.attention.AttentionRope": _self_attention,
    "effbench.models.attention.Attention": _self_attention,
    "timm.models.eva.EvaAttention": _whole_self_attention,
    "timm.models.beit.Attention": _whole_self_attention,
    "timm.AttentionPoolLatent": _latent_pooling,
    "effbench.models.connectors.AttentionPool": _latent_pooling,
    "effbench.models.connectors.LatentAttention": _latent_pooling,
    "open_clip.transformer.Attention": _openclip_attention,
    "open_clip.transformer.VisionTransformer": _openclip_projection,
    "open_clip.transformer.TextTransformer": _openclip_projection,
    "transformers.Conv1D": _transposed_linear,
}


def formula_of(module: nn.Module) -> Formula | None:
    """The formula of a layer, from its class or the nearest of its parents that has one."""
    for kind in type(module).__mro__:
        for place in (kind.__module__, kind.__module__.partition(".")[0]):
            if (key := f"{place}.{kind.__name__}") in FORMULAS:
                return FORMULAS[key]
    if are_experts(module):
        return _transformers_experts
    return _transformers_attention if _is_of_transformers(module) else None


def speaks_for_its_parts(formula: Formula | None) -> bool:
    """Whether a formula covers the layers inside its own, so that they must not be counted again."""
    return formula in (_multihead_attention, _recurrent, _whole_self_attention)


def may_hide_a_product(module: nn.Module) -> bool:
    """A layer without parts that has a matrix; what has but vectors (norms, scales) does elementwise work."""
    matrices = (sum(size > 1 for size in p.shape) > 1 for p in module.parameters(recurse=False))
    return not any(module.children()) and any(matrices)


def _trains(module: nn.Module, weight: str) -> bool:
    """Whether a layer's weight requires a gradient; a quantised one, which is a method, never does."""
    return bool(getattr(getattr(module, weight, None), "requires_grad", False))
