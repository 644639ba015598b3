"""Which blocks of a stack are chosen, by their place in it or by scores."""

from __future__ import annotations

from collections.abc import Sequence

PLACES = ("uniform", "full", "top", "mid_top", "middle", "mid_bottom", "bottom", "hybrid")


def by_place(strategy: str, layers: int, k: int) -> tuple[int, ...]:
    """Indices of k of the layers 0 (bottom) to layers - 1 (top), in order.

    uniform: spread evenly over every second layer, the first and the last of these included; over all layers where
    every second is not enough. arXiv 2412.12785 gives its choice of 8 of 32 layers (0 4 8 12 18 22 26 30) and no rule;
    this is a rule that yields it. One layer is the first.
    top, middle, bottom: consecutive layers. mid_bottom, mid_top: consecutive too, from a quarter and from half of the
    depth on (of 32 layers the 8 from 8 and from 16), or the last k where fewer are left. full: all of them, whatever k.
    hybrid: the lower half of the k (one more if k is odd) are the first layers, the upper half the last ones. The name
    is the paper's; the definition is effbench's own.

    Args:
        strategy: one of `PLACES`.
        k: 1 to `layers`.
    """
    if not 1 <= k <= layers:
        raise ValueError(f"{k} of {layers} layers")
    match strategy:
        case "uniform":
            among = range(0, layers, 2) if k <= (layers + 1) // 2 else range(layers)
            steps = max(k - 1, 1)
            return tuple(among[(2 * i * (len(among) - 1) + steps) // (2 * steps)] for i in range(k))  # rounded half up
        case "full":
            return tuple(range(layers))
        case "top":
            return tuple(range(layers - k, layers))
        case "middle" | "mid_bottom" | "mid_top":
            first = {"middle": (layers - k) // 2, "mid_bottom": layers // 4, "mid_top": layers // 2}[strategy]
            first = min(first, layers - k)
            return tuple(range(first, first + k))
        case "bottom":
            return tuple(range(k))
        case "hybrid":
            return (*range((k + 1) // 2), *range(layers - k // 2, layers))
    raise ValueError(strategy)


def best(scores: Sequence[float], k: int) -> tuple[int, ...]:
    """Indices of the k highest scores, in the order of the layers; of equal scores the lower layer's counts more."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:k]))
