"""Kernel parity: in what two arms compute differently, apart from what their methods do. Needs no torch."""

from __future__ import annotations

from effbench.records import Kernels


def differs(a: Kernels, b: Kernels) -> tuple[str, ...]:
    """What differs between two arms, in words, e.g. "attention library fast path vs sdpa:flash".

    How often a kernel ran is no difference: an arm with fewer layers calls it less often.
    """
    found = [
        f"{name} {_paths(mine)} vs {_paths(other)}"
        for name, mine, other in (("attention", a.attention, b.attention), ("precision", a.precision, b.precision))
        if set(mine) != set(other)
    ]
    for name, field in (("autocast", "autocast"), ("torch.compile", "compiled"), ("channels-last", "channels_last")):
        mine, other = getattr(a, field), getattr(b, field)
        if mine != other:
            found.append(f"{name} {'on' if mine else 'off'} vs {'on' if other else 'off'}")
    if a.threads != b.threads:
        found.append(f"threads {a.threads} vs {b.threads}")
    return tuple(found)


def _paths(counts: dict[str, int]) -> str:
    return " + ".join(sorted(counts)) or "none"
