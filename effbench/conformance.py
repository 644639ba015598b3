"""What `effbench check` asks of a method: one function for each promise, on tiny models with random weights.

A check takes a `Case` and returns in words what it saw; it raises `Fault`, or `NotChecked` where it does not apply.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effbench import randomness
from effbench.conformance_declared import documentation, names_that_it_gives, parameter_ranges
from effbench.conformance_model import IDENTITY, Bed, Trained, plan_of, seeded
from effbench.errors import UsageError
from effbench.examine import tokens_per_layer
from effbench.measure.flops import flops_of
from effbench.measure.structure import masked_tokens
from effbench.method import Method
from effbench.models.tower import view
from effbench.outcomes import Fault, NotChecked
from effbench.process_settings import process_settings, restored
from effbench.records import Flops
from effbench.registry import Entry
from effbench.spec import canonical

SAME = 1e-5  # largest difference of what is the same, in float32; in half precision `NEAR`
NEAR = 3e-2


class Case:
    """A method on a model.

    Args:
        entry: the plugin as its distribution announces it.
        method: with its parameters.
        bed: what it is put on.
    """

    def __init__(self, entry: Entry, method: Method, bed: Bed) -> None:
        self.entry = entry
        self.method = method
        self.bed = bed

    @property
    def trains(self) -> bool:
        return self.method.phase != "test"

    @cached_property
    def training(self) -> Trained:
        """After two steps of training with the method."""
        return self.bed.trained(plan_of(self.method))

    def build(self, seed: int = 0, half: bool = False) -> nn.Module:
        """The method's model as a run tests it: trained first, where it acts in training."""
        if not self.trains:
            return self.bed.tested(plan_of(self.method), seed=seed, half=half)
        return self.bed.tested(self.training.arm, self.training.state, seed, half)

    @cached_property
    def model(self) -> nn.Module:
        """One such model, which no check changes."""
        return self.build()

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return self.bed.outputs(self.model)

    @property
    def tolerance(self) -> float:
        """Below which two results are the same: rounding in the precision that the model computes in."""
        low = any(t.is_floating_point() and t.itemsize < 4 for t in self.model.state_dict().values() if _is_plain(t))
        return NEAR if low else SAME


# --- what it does to a model


def applied(case: Case) -> str:
    """It is applied, and trained where it acts in training; one pass runs."""
    shapes = {key: tuple(value.shape) for key, value in case.outputs.items()}
    plain = {key: tuple(value.shape) for key, value in case.bed.outputs(case.bed.tested(IDENTITY)).items()}
    if shapes != plain:
        raise Fault(
            f"the outputs are {shapes}, without the method {plain}", "give outputs of the shape that the model has"
        )
    return "outputs " + ", ".join(f"{key} {shape}" for key, shape in shapes.items())


def does_not_fit(case: Case) -> str:
    """A model without towers is refused by name and with a next step, not by an accident inside."""

    class Bare(nn.Module):
        has_towers = False

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    try:
        with seeded(0):
            case.method.edit_model(view(Bare()))
    except UsageError as refused:
        return f"refused: {refused}"
    except Exception as error:
        raise Fault(
            f"a model without towers ends in {type(error).__name__}: {error}",
            "ask first: effbench.models.tower.image_tower(model, NAME), or raise UsageError(what is missing, a hint)",
        ) from error
    return "edit_model changes nothing of a model without towers"


def nothing_at_neutral_parameters(case: Case) -> str:
    """With the parameters that `neutral` names, the model computes what it does without the method."""
    neutral = case.method.neutral
    if neutral is None:
        raise NotChecked("not stated: `neutral` names no parameters with which the method changes nothing")
    method = replace(case.method, **neutral)
    spec = canonical((method,))
    todo = f"mend it, or state other parameters than neutral = {neutral}"
    seen = []
    if method.phase != "train":
        plain = case.bed.outputs(case.bed.tested(IDENTITY))
        seen.append(difference(plain, case.bed.outputs(case.bed.tested(plan_of(method)))))
    if method.phase != "test":
        plain, edited = (case.bed.trained(arm, steps=1).losses for arm in (IDENTITY, plan_of(method)))
        seen.append(difference({"loss": torch.tensor(plain)}, {"loss": torch.tensor(edited)}))
    if max(seen) > SAME:
        raise Fault(f"{spec} changes the result by {max(seen):.1e}", todo)
    return f"{spec}: largest difference {max(seen):.1e}"


def tokens_are_removed(case: Case) -> str:
    """Of a method that claims "tokens": fewer reach the blocks at run time, and the FLOPs fall; none is only masked."""
    if "tokens" not in case.method.claims:
        raise NotChecked("it claims no fewer tokens")
    if case.method.phase == "train":
        models = [case.training.model.train(), case.bed.trained(IDENTITY, steps=1).model.train()]
        batch = case.bed.batch("train", range(4), drawn=True)
        steps = [lambda model=model: case.bed.task.loss(model, batch) for model in models]
    else:
        models = [case.model, case.bed.tested(IDENTITY)]
        batch = case.bed.batch("test", (0,))
        steps = [lambda model=model: case.bed.task.predict(model, batch) for model in models]
    tokens, counts = [], []
    for model, step in zip(models, steps, strict=True):
        with seeded(0), torch.no_grad():
            tokens.append(tokens_per_layer(model, step))
            counts.append(flops_of(step, model))
    todo = "drop tokens by the Reduce that your TokenEdit returns; a mask or zeros save nothing"
    kinds = [Flops(dense=count.dense_flops, useful=count.useful_flops, low_bit=0, overhead=0) for count in counts]
    if said := masked_tokens(*tokens, case.method.claims, *kinds):
        raise Fault(said, todo)
    mine, plain = (count.dense_flops for count in counts)
    if mine >= plain:
        raise Fault(f"fewer tokens reach the blocks, but dense FLOPs go from {plain:,} to {mine:,}", todo)
    fewer = [pair for pair in zip(*tokens, strict=False) if pair[0] < pair[1]]
    last = f"{fewer[-1][1]} tokens become {fewer[-1][0]}" if fewer else f"{max(tokens[1])} become {min(tokens[0])}"
    return f"{last}, dense FLOPs {mine / plain - 1:+.1%} (on a narrow model)"


def determinism(case: Case) -> str:
    """Applied twice under one seed, it gives the same outputs; so do two passes of one model."""
    again = difference(case.outputs, case.bed.outputs(case.model))
    if again > 0:
        raise Fault(
            f"two passes of one model differ by {again:.1e}",
            "keep no state between passes; draw with torch's generator",
        )
    other = difference(case.outputs, case.bed.outputs(case.build()))
    if other > case.tolerance:
        raise Fault(
            f"two models made under one seed differ by {other:.1e}",
            "draw with torch, numpy or random, which a run seeds; no clock, no hash(), no order of a set",
        )
    return f"largest difference {other:.1e}"


def train_and_eval_mode(case: Case) -> str:
    """Both modes run; eval() gives the outputs of before, whatever was trained in between, and leaves nothing on."""
    model = case.build()
    before = case.bed.outputs(model)
    model.train()
    case.bed.outputs(model)
    model.eval()
    left = [name for name, module in model.named_modules() if module.training]
    if left:
        raise Fault(
            f"after eval() {left[0]} is still in training mode", "let its train() set what the mode says, or inherit it"
        )
    changed = difference(before, case.bed.outputs(model))
    if changed > case.tolerance:
        raise Fault(
            f"a pass in training mode changes what eval mode gives, by {changed:.1e}",
            "keep no state that a pass changes",
        )
    drawn = difference(before, case.bed.outputs(model, seed=1))
    if drawn > case.tolerance and "random" not in case.method.claims:
        raise Fault(
            f"in eval mode the outputs depend on the random state, by {drawn:.1e}",
            'dropout left on? If it draws on purpose, add "random" to its claims',
        )
    return "the same before and after training mode" + (
        "; it draws at random, as it claims" if drawn > case.tolerance else ""
    )


def batch_independence(case: Case) -> str:
    """What an image gets does not depend on its neighbours in the batch."""
    for claim, why in (("random", "it draws at random"), ("neighbours", "its docstring says how")):
        if claim in case.method.claims:
            raise NotChecked(f"it claims {claim!r}: {why}")
    worst = 0.0
    for rows in ((0,), (0, 2), (0, 3, 1)):
        found = case.bed.outputs(case.model, rows)
        mine = [
            {key: _first(value, count) for key, value in outputs.items()}
            for outputs, count in ((case.outputs, 4), (found, len(rows)))
        ]
        worst = max(worst, difference(*mine))
    if worst > case.tolerance:
        raise Fault(
            f"an image's output changes by {worst:.1e} with the images beside it",
            'choose for each image by itself; if it cannot be, say why in the docstring and claim "neighbours"',
        )
    return f"largest difference {worst:.1e}"


def _first(value: Tensor, images: int) -> Tensor:
    """The rows of the first of so many images."""
    return value[: len(value) // images]


def deepcopy(case: Case) -> str:
    """A deep copy gives the same outputs, and shares nothing with the model."""
    model = case.build()
    before = case.bed.outputs(model)
    twin = copy.deepcopy(model)
    apart = difference(before, case.bed.outputs(twin))
    if apart > case.tolerance:
        raise Fault(f"a deep copy's outputs differ by {apart:.1e}", "keep what belongs to the model in the model")
    for what, changed in (("the model", model), ("a copy of it", copy.deepcopy(twin))):
        with torch.no_grad():
            for tensor in (*changed.parameters(), *changed.buffers()):
                if tensor.is_floating_point():
                    tensor.zero_()
        shared = difference(before, case.bed.outputs(twin))
        if shared > case.tolerance:
            raise Fault(
                f"a deep copy changes by {shared:.1e} when {what} is changed",
                "keep no tensor or module in a closure, a list or a class: make it an attribute of a module",
            )
    return f"largest difference {apart:.1e}"


def dtype(case: Case) -> str:
    """In float32 and on a model in bfloat16 the outputs are finite; training under autocast too."""
    for name, value in case.outputs.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise Fault(f"float32: {name} is not finite", "look for a division by zero or a logarithm of zero")
    seen = ["float32"]
    refused = ""
    todo = (
        "make constants and buffers with the dtype of the tokens, e.g. x.new_zeros(...); the model has it when edited"
    )
    try:
        outputs = case.bed.outputs(case.build(half=True), half=True)
    except UsageError as error:
        refused = f"; bfloat16 is refused: {error}"
    except RuntimeError as error:
        raise Fault(f"bfloat16: {' '.join(str(error).split())[:200]}", todo) from error
    else:
        if any(value.is_floating_point() and not value.isfinite().all() for value in outputs.values()):
            raise Fault("bfloat16: an output is not finite", todo)
        seen.append("bfloat16")
    if case.trains:
        losses = case.bed.trained(plan_of(case.method), steps=1, autocast=True).losses
        if not all(map(math.isfinite, losses)):
            raise Fault("the training loss under bfloat16 autocast is not finite", todo)
        seen.append("autocast in training")
    return f"finite in {', '.join(seen)}{refused}"


def keys_of_the_state_dict(case: Case) -> str:
    """Weights keep the library's names; what is saved can be loaded."""
    plain = case.bed.tested(IDENTITY).state_dict()
    mine = case.model.state_dict()
    missing, new = plain.keys() - mine.keys(), mine.keys() - plain.keys()
    for key in sorted(new):
        value = mine[key]
        if not _is_plain(value) or value.numel() < 2:
            continue
        base = case.training.state if case.trains else {}
        for old in sorted(missing):
            was = base.get(old, plain[old])
            if was.shape == value.shape and torch.equal(was.to(value.dtype), value):
                raise Fault(
                    f"{old} is now called {key}",
                    "put nothing around the library's modules: use after_attention, around or attend of the tower",
                )
    with torch.no_grad():
        copy.deepcopy(case.model).load_state_dict(mine)  # raises what does not fit
    changed = f"; {len(missing)} gone" * bool(missing) + f"; {len(new)} of its own" * bool(new)
    return f"{len(plain.keys() & mine.keys())} keys are the library's{changed}"


def gradients_flow(case: Case) -> str:
    """Where it acts in training: losses and gradients are finite, and reach what the method brings to be trained."""
    method = case.method
    if not case.trains:
        both = [phase for phase in ("both", "train") if phase in method.phases]
        if not both:
            raise NotChecked("it acts only in testing")
        try:
            method = replace(method, phase=both[0])
            found = case.bed.trained(plan_of(method))
        except UsageError as refused:
            raise NotChecked(f"phase={both[0]} is refused: {refused}") from refused
    else:
        found = case.training
    if not all(map(math.isfinite, found.losses)):
        raise Fault(f"the training loss is {found.losses}", "look at what the method adds to the forward pass")
    trained = {name for name, parameter in found.model.named_parameters() if parameter.requires_grad}
    if bad := [name for name, largest in found.gradients.items() if not math.isfinite(largest)]:
        raise Fault(f"the gradient of {bad[0]} is not finite", "look at what the method adds to the forward pass")
    if not any(found.gradients.values()):
        raise Fault("every gradient is zero: nothing can train", "let the loss depend on the tokens without a cut")
    plain = {name for name, _ in case.bed.tested(IDENTITY).named_parameters()}
    own = sorted(name for name in trained if name not in plain)
    dead = [name for name in own if not found.gradients.get(name)]
    if own and len(dead) == len(own):
        raise Fault(
            f"no gradient reaches the {len(own)} parameters that the method brings, e.g. {own[0]}",
            "top-k passes none: use a straight-through gate, a weighting or a loss of its own (plan.losses)",
        )
    brought = f", {len(own) - len(dead)} of the {len(own)} that it brings" if own else ""
    return f"phase {method.phase}: {sum(map(bool, found.gradients.values()))} of {len(trained)} parameters{brought}"


def global_state(case: Case) -> str:
    """Applying and running it leaves torch's settings, random seeds and the process as they were."""
    before = process_settings()
    with seeded(1):
        plan = plan_of(case.method)
        if case.trains:
            case.bed.trained(plan, steps=1)
        else:
            case.bed.tested(plan)
    if changed := restored(before):
        raise Fault(
            f"it changes {'; '.join(changed)}", "other arms run in the same process: change your own model alone"
        )
    with seeded(1):
        one, other = (_random_after(case, seed) for seed in (1, 2))
    if fixed := [name for name in one if one[name] == other[name]]:
        raise Fault(
            f"it sets the seed of {' and '.join(fixed)}: the random state after it does not depend on that before it",
            "draw from a generator of your own: torch.Generator().manual_seed(0)",
        )
    return f"{len(before)} settings and the random state"


def _random_after(case: Case, seed: int) -> dict[str, str]:
    """The random states after the method's hooks and one pass, begun from a seed that the harness does not set again.

    By generator, as text.
    """
    bed, method = case.bed, case.method
    model = bed.tested(IDENTITY)
    seen = view(model)
    data = bed.calibration()
    randomness.seed_all(seed)
    method = method if method.phase == "test" else method.settle(seen, data)
    method.edit_model(seen)
    if method.phase == "test":
        method.finish(seen, data)
    with torch.no_grad():
        bed.task.predict(model, bed.batch("test", (0, 1)))
    states = dict(
        torch=torch.get_rng_state().tolist(), numpy=np.random.get_state(legacy=False), python=random.getstate()
    )
    return {name: repr(state) for name, state in states.items()}


CHECKS: tuple[Callable[[Case], str], ...] = (
    documentation,
    names_that_it_gives,
    parameter_ranges,
    does_not_fit,
    nothing_at_neutral_parameters,
    tokens_are_removed,
    determinism,
    train_and_eval_mode,
    batch_independence,
    deepcopy,
    dtype,
    keys_of_the_state_dict,
    gradients_flow,
    global_state,
)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two results, relative to the largest value where that is above 1; inf for other shapes."""
    worst = 0.0
    for key in one.keys() | other.keys():
        a, b = one.get(key), other.get(key)
        if a is None or b is None or a.shape != b.shape:
            return math.inf
        a, b = a.double(), b.double()
        apart = float((a - b).abs().max()) / max(1.0, float(a.abs().max())) if a.numel() else 0.0
        worst = max(worst, apart if apart == apart else math.inf)
    return worst


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_quantized
