"""How much each block of a tower matters, measured on training data.

Block influence: ShortGPT, arXiv 2403.03853. Angular distance: The Unreasonable Ineffectiveness of the Deeper Layers,
arXiv 2403.17887. Gradient norm and parameter change as criteria for layers: arXiv 2412.12785.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effbench.errors import UsageError
from effbench.models.decoder import Decoder
from effbench_methods.algorithms.loss_gradients import evaluating, loss_gradients

if TYPE_CHECKING:
    from effbench.calibration_set import CalibrationSet
    from effbench.models.tower import Tower

See = Callable[[int, Tensor, "Tensor | None"], None]


def turned(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos of states (..., width) -> (...): 0 where they point the same way.

    From the distance of the unit vectors, which unlike 1 - cos loses no digits in float32 where a state hardly turns.
    """
    apart = F.normalize(before.float(), dim=-1) - F.normalize(after.float(), dim=-1)
    return apart.square().sum(dim=-1) / 2


def angle(before: Tensor, after: Tensor) -> Tensor:
    """arccos(cos) / pi of states (..., width) -> (...), in [0, 1]; a right angle is 0.5."""
    return (turned(before, after).double() / 2).clamp(0, 1).sqrt().asin() * 2 / torch.pi


def hidden_states(tower: Tower, model: nn.Module, calibration: CalibrationSet, images: int, see: See) -> None:
    """Show the states before, between and behind the blocks to `see`, in the order in which they arise.

    None is kept here. The tower runs in evaluation mode, without dropout, and with all tokens: what drops, merges or
    bypasses tokens in a block, or lays texts out in other rows, is taken off meanwhile, since states of other tokens
    cannot be compared. A method's attention stays.

    Args:
        see: called with the depth (0: before the first block), the tokens (batch, tokens, width), and of texts that
            are pooled at their end in a causal tower the positions (batch,) of it, else None.

    Raises:
        UsageError: the tower is not part of what the calibration data is run through, e.g. a text tower without texts.
    """
    if isinstance(tower, Decoder):
        _decoder_states(tower, model, calibration, images, see)
        return
    loop, index = tower.loop, {id(block): i for i, block in enumerate(tower.blocks)}
    through, ends, shown = loop._through, [None], []

    def watched(block: nn.Module, state: Any) -> Any:
        depth = index[id(block)]
        see(depth, state.tokens, ends[0])
        state = through(block, state)
        if depth == len(index) - 1:
            see(depth + 1, state.tokens, ends[0])
            shown.append(True)
        return state

    with ExitStack() as undo:
        undo.enter_context(evaluating(model))
        undo.enter_context(_all_tokens(tower))
        if has_ends(tower):
            hook = tower.module.token_embedding.register_forward_pre_hook(
                lambda _, inputs: ends.__setitem__(0, tower.module.ends(inputs[0]))
            )
            undo.callback(hook.remove)
        loop._through = watched  # the loop calls parts of blocks, never a block, so that no hook of theirs would fire
        undo.callback(delattr, loop, "_through")
        calibration.run(model, images)
    if not shown:
        raise UsageError(
            f"the calibration data never reaches the {tower.name}",
            "calibrate with what it takes: for a text tower a list of tuples (images, texts)",
        )


def _decoder_states(decoder: Decoder, model: nn.Module, calibration: CalibrationSet, images: int, see: See) -> None:
    """`hidden_states` of a captioner's decoder, its texts given."""

    def shown(depth: int, tokens: Tensor) -> None:
        see(depth, tokens, decoder.language.span.ends)

    with unpacked(model), decoder.seeing(shown):
        calibration.run(model, images)


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """A captioner in evaluation mode, with each text in a row of its own: then its spans say where things stand."""
    layout = getattr(model, "layout", None)
    try:
        if layout is not None:
            model.layout = None
        with evaluating(model):
            yield
    finally:
        if layout is not None:
            model.layout = layout


def block_influence(tower: Tower, model: nn.Module, calibration: CalibrationSet, images: int) -> Tensor:
    """(blocks,) 1 - mean over tokens of cos(h_l, h_l+1), the states before and behind each block (ShortGPT).

    All tokens count; of a text those up to its end.
    """
    sums, count = torch.zeros(len(tower), dtype=torch.float64), 0
    last: Tensor | None = None

    def see(depth: int, tokens: Tensor, ends: Tensor | None) -> None:
        nonlocal last, count
        states = tokens.flatten(0, 1) if ends is None else tokens[_up_to(ends, tokens.shape[1])]
        if depth:
            sums[depth - 1] += turned(last, states).sum(dtype=torch.float64).item()
        else:
            count += len(states)
        last = states

    hidden_states(tower, model, calibration, images, see)
    return sums / count


def angular_distance(tower: Tower, model: nn.Module, calibration: CalibrationSet, images: int, n: int) -> Tensor:
    """(blocks - n + 1,) mean of arccos(cos(h_l, h_l+n)) / pi, the states before block l and before block l + n.

    In a causal tower at the last token, as published: the end of the text, where CLIP pools it. Elsewhere no token is
    the last one, and all of them count.
    """
    if not 1 <= n <= len(tower):
        raise ValueError(f"n={n} of {len(tower)} blocks")
    sums, count = torch.zeros(len(tower) - n + 1, dtype=torch.float64), 0
    recent: deque[Tensor] = deque(maxlen=n + 1)

    def see(depth: int, tokens: Tensor, ends: Tensor | None) -> None:
        nonlocal count
        states = _last(tokens, ends) if is_causal(tower) else tokens.flatten(0, 1)
        if not depth:
            recent.clear()
            count += len(states)
        recent.append(states)
        if depth >= n:
            sums[depth - n] += angle(recent[0], states).sum().item()

    hidden_states(tower, model, calibration, images, see)
    return sums / count


def gradient_norm(tower: Tower, model: nn.Module, calibration: CalibrationSet, images: int) -> Tensor:
    """(blocks,) norm of the gradient of the task's loss, summed over the batches, by all parameters of each block.

    The model runs in evaluation mode, without dropout; its gradients and what requires them are as before afterwards.

    Raises:
        UsageError: there is no loss: a bare model has no task.
    """
    parameters = [list(block.parameters()) for block in tower.blocks]
    with loss_gradients(model, [p for block in parameters for p in block], calibration, images):
        squares = [sum(p.grad.double().square().sum().item() for p in block) for block in parameters]
    return torch.tensor(squares, dtype=torch.float64).sqrt()


def parameter_change(before: Sequence[dict[str, Tensor]], after: Sequence[dict[str, Tensor]]) -> Tensor:
    """(blocks,) sum over a block's parameters of ||W' - W|| / ||W|| (arXiv 2412.12785); one that is zero counts 0.

    Args:
        before, after: of each block its parameters by name.
    """
    changes = torch.zeros(len(before), dtype=torch.float64)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        for name, weight in old.items():
            norm = weight.double().norm().item()
            if norm:
                changes[i] += (new[name].double() - weight.double()).norm().item() / norm
    return changes


def is_causal(tower: Tower) -> bool:
    """Whether each token of a tower sees only itself and those before it."""
    if isinstance(tower, Decoder):
        return True
    return tower.grid is None and getattr(tower.module, "attn_mask", None) is not None


def has_ends(tower: Tower) -> bool:
    """Whether it is a causal text tower that looks for the end of a text to pool it there."""
    text = tower.module
    if not is_causal(tower) or not hasattr(text, "ends") or getattr(text, "cls_emb", None) is not None:
        return False
    return text.pooling()[0] in ("argmax", "eos")


@contextmanager
def _all_tokens(tower: Tower) -> Iterator[None]:
    """A tower without what methods do to its tokens in a block, and with each text in a row of its own."""
    held = [(block, block.token_edit, block.token_bypass) for block in tower.blocks]
    layout = getattr(tower.module, "layout", None)
    try:
        for block in tower.blocks:
            block.token_edit = block.token_bypass = None
        if layout is not None:
            tower.module.layout = None
        yield
    finally:
        for block, edit, bypass in held:
            block.token_edit, block.token_bypass = edit, bypass
        if layout is not None:
            tower.module.layout = layout


def _up_to(ends: Tensor, tokens: int) -> Tensor:
    """(batch, tokens) whether a token stands at or before the end of its text."""
    return torch.arange(tokens, device=ends.device) <= ends[:, None]


def _last(tokens: Tensor, ends: Tensor | None) -> Tensor:
    """Tokens (batch, tokens, width) -> (batch, width) at the end of each text."""
    return tokens[:, -1] if ends is None else tokens[torch.arange(len(tokens), device=tokens.device), ends]
