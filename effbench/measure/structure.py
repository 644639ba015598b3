"""Did a method really do something: in how many bits weights are stored, what is trained, what is only masked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from effbench.measure.flop_layer_formulas import are_experts
from effbench.measure.kernels import dtype_name
from effbench.measure.tensor_memory import plain, weights
from effbench.records import Flops, Structure

LINEAR = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.modules.conv._ConvNd)
TOLERANCE = 1e-3  # of the dense FLOPs


def structure(model: nn.Module, trained: nn.Module | None = None) -> Structure:
    """What of a model is there at run time.

    Args:
        model: as it is tested.
        trained: as it was trained, its parameters' `requires_grad` set; None where nothing was.

    Returns:
        `dtypes` add up to `weight_bytes(model)`; `quantised_share` is that of the weights (biases apart) of linear
        layers, attention projections and convolutions, by number; `masked_tokens` is for `masked_tokens` to find out.
    """
    return Structure(
        dtypes=_bytes(model),
        quantised_share=_quantised_share(model),
        trained_layers=trained_layers(trained) if trained is not None else (),
    )


def parameters(model: nn.Module) -> int:
    """Number of parameters; of a linear layer that packs its weight, the numbers that it stands for."""
    held = {id(p): p.numel() for p in model.parameters()}
    packed = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            whole = module.in_features * module.out_features
            if weight is None:
                packed += whole
            elif _low_bit(weight.dtype):
                held[id(weight)] = whole
    return sum(held.values()) + packed


def trained_layers(model: nn.Module) -> tuple[str, ...]:
    """The largest parts of a model that are trained as a whole; equal parts of several blocks are one entry.

    Example:
        >>> trained_layers(model)
        ("image_encoder.blocks.8-11", "image_encoder.blocks.3,6.token_edit.scorer", "text_encoder", "logit_scale")
    """
    named = dict(model.named_parameters())
    frozen = {prefix for name, p in named.items() if not p.requires_grad for prefix in _prefixes(name)}
    whole = {
        next(prefix for prefix in _prefixes(name) if prefix not in frozen): None
        for name, p in named.items()
        if p.requires_grad
    }
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in whole:
        numbered = re.fullmatch(r"(.*?\.)??(\d+)(\..*)?", name)
        head, number, tail = numbered.groups(default="") if numbered else (name, "", "")
        numbers.setdefault((head, tail), []).extend([int(number)] if number else [])
    return tuple(f"{head}{_ranges(found)}{tail}" for (head, tail), found in numbers.items())


def masked_tokens(
    tokens: Sequence[int],
    baseline_tokens: Sequence[int],
    claims: Collection[str],
    flops: Flops | None,
    baseline_flops: Flops | None,
) -> str:
    """Whether an arm masks tokens without removing any: a sentence that says so, or "".

    Args:
        tokens, baseline_tokens: tokens that enter each block's MLP, as the tensors were.
        claims: what the methods that act in this phase promise; "tokens" is fewer tokens.
        flops, baseline_flops: of the same step; what `useful` leaves of `dense` shows what attention's masks hide.
    """
    if not tokens or not baseline_tokens or _fewer(tokens, baseline_tokens):
        return ""
    hidden = _hidden(flops) - _hidden(baseline_flops)
    # an arm that computes more, e.g. on a longer prompt, has more behind the same masks
    longer = flops is not None and baseline_flops is not None and flops.dense > (1 + TOLERANCE) * baseline_flops.dense
    if flops is not None and not longer and hidden > TOLERANCE * flops.dense:
        return (
            f"masked, not removed: its masks hide {hidden / flops.dense:.1%} of the FLOPs, but every block still takes "
            f"{_span(tokens)} tokens and computes them"
        )
    if "tokens" in claims:
        return f"masked, not removed: fewer tokens are claimed, but every block still takes {_span(tokens)} tokens"
    return ""


def _fewer(tokens: Sequence[int], baseline: Sequence[int]) -> bool:
    if len(tokens) == len(baseline):
        return any(mine < other for mine, other in zip(tokens, baseline, strict=True))
    return min(tokens) < min(baseline)


def _hidden(flops: Flops | None) -> int:
    """FLOPs that a dense kernel does behind masks."""
    return flops.dense - flops.useful if flops is not None and flops.useful is not None else 0


def _span(tokens: Sequence[int]) -> str:
    low, high = min(tokens), max(tokens)
    return str(low) if low == high else f"{low} to {high}"


def _bytes(model: nn.Module) -> dict[str, int]:
    """Bytes by dtype of parameters, buffers and packed quantised weights; what shares storage counts once."""
    found: Counter[str] = Counter()
    seen = set()
    for tensor in (part for leaf in weights(model) if isinstance(leaf, Tensor) for part in plain(leaf)):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            found[dtype_name(tensor.dtype)] += storage.nbytes()
    return dict(sorted(found.items()))


def _quantised_share(model: nn.Module) -> float:
    low = total = 0
    seen = set()
    for weight, count in list(_weights(model)):  # all held, so that no storage's address is used twice
        storage = next(plain(weight)).untyped_storage()._cdata
        if storage not in seen:
            seen.add(storage)
            total += count
            low += count * any(_low_bit(part.dtype) for part in plain(weight))
    return low / total if total else 0.0


def _weights(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Weights of linear layers, attention projections and convolutions, and how many numbers each holds."""
    for module in model.modules():
        if isinstance(module, LINEAR):
            own = list(module.parameters(recurse=False))
            if isinstance(module, nn.Linear) and not any(p.ndim > 1 for p in own):
                own = tree_leaves(module.state_dict())  # it packs its weight, and unpacks it to be saved
            for weight in own:
                if isinstance(weight, Tensor) and weight.ndim > 1:
                    # several numbers of less than a byte may share one
                    packed = isinstance(module, nn.Linear) and _low_bit(weight.dtype)
                    yield weight, module.in_features * module.out_features if packed else weight.numel()
        elif are_experts(module):  # a tensor for the layers of all experts
            yield from ((weight, weight.numel()) for weight in module.parameters(recurse=False) if weight.ndim == 3)
    for leaf in tree_leaves(model.state_dict()):  # torch.ao's
        if isinstance(leaf, Tensor) and leaf.is_quantized and leaf.ndim > 1:
            yield leaf, leaf.numel()


def _low_bit(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 1 or not dtype.is_floating_point


def _prefixes(name: str) -> Iterator[str]:
    """a, a.b, a.b.c of a.b.c."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _ranges(numbers: list[int]) -> str:
    """0-3,6 of 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
