"""The arms of an experiment: the stacks that were asked for, and the controls that every comparison carries."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from effbench.errors import UsageError
from effbench.method import Method, TrainingPlan
from effbench.spec import canonical

if TYPE_CHECKING:
    from torch import Tensor, nn

    from effbench.calibration_set import CalibrationSet
    from effbench.models.backbones import Backbone
    from effbench.records import Protocol
    from effbench.task import Task


@dataclass(frozen=True)
class ArmPlan:
    """One model under test: a stack of methods, possibly empty.

    Args:
        name: unique within the experiment.
        methods: applied in order.
        kind: "baseline", "control" or "method".
        control: which control it is: noop, identity, one that a method named (random, grid, norm), resize, or part.
        controls_for: names of the arms that it is a control of; empty for all.
    """

    name: str
    methods: tuple[Method, ...] = ()
    kind: str = "method"
    control: str = ""
    controls_for: tuple[str, ...] = ()

    @property
    def spec(self) -> str:
        return self.name if self.methods else ""

    @property
    def phase(self) -> str:
        """The phase of the whole stack: "test" if no method acts while training."""
        phases = {method.phase for method in self.methods} or {"test"}
        return phases.pop() if len(phases) == 1 else "both"

    def during(self, *phases: str) -> list[Method]:
        """The methods that act in one of the phases."""
        return [method for method in self.methods if method.phase in phases]


CONTROLS = ("random", "grid", "norm", "resize", "part")


def plan_arms(stacks: Sequence[tuple[Method, ...]], wanted: Sequence[str] = ("random", "part")) -> list[ArmPlan]:
    """Baseline, noop, identity, the stacks asked for, and their controls, none twice.

    Args:
        wanted: the controls to add, of `CONTROLS`: blind stand-ins of the same token budget that the methods name, one
            per distinct budget; "part": each method of a stack alone. "resize" is `budget.resize_arms`'s. A control of
            another name is always added.
    """
    asked = {canonical(stack): stack for stack in stacks if stack}
    arms = [
        ArmPlan("baseline", kind="baseline"),
        ArmPlan("noop", kind="control", control="noop"),
        ArmPlan("identity", kind="control", control="identity"),
    ]
    arms += [ArmPlan(spec, stack) for spec, stack in asked.items()]
    controls: dict[str, ArmPlan] = {}

    for spec, stack in asked.items():
        for control, others in judges(stack).items():
            for other in others if control in wanted or control not in CONTROLS else ():
                name = canonical(other)
                if name not in asked:
                    known = controls.get(name, ArmPlan(name, other, "control", control))
                    controls[name] = replace(known, controls_for=(*known.controls_for, spec))
    return arms + list(controls.values())


def judges(stack: tuple[Method, ...]) -> dict[str, list[tuple[Method, ...]]]:
    """The stacks that a stack is compared with, by control: its methods' blind stand-ins, and each method alone."""
    found: dict[str, list[tuple[Method, ...]]] = {}
    for place, method in enumerate(stack):
        for control, blind in method.controls().items():
            found.setdefault(control, []).append(stack[:place] + (blind,) + stack[place + 1 :])
    if len(stack) > 1:
        found["part"] = [(method,) for method in stack]
    return found


def trainer(plan: ArmPlan, plans: Sequence[ArmPlan]) -> ArmPlan:
    """The arm that trains the weights which an arm is tested with: itself, or one whose training is the very same.

    Nothing is trained twice: `layer_tune+quantize` is tested with the weights of `layer_tune`, where that is an arm.
    """
    acting = canonical(tuple(plan.during("train", "both")))
    if not acting:
        return plan
    same = [each for each in plans if canonical(tuple(each.during("train", "both"))) == acting]
    return next((each for each in same if each.name == acting), same[0])


def owner(plan: ArmPlan, plans: Sequence[ArmPlan], trained: Collection[str]) -> str:
    """Name of the arm whose weights an arm is tested with: its trainer's, the baseline's where that trained none.

    Args:
        trained: names of the arms that trained.
    """
    name = trainer(plan, plans).name
    return name if name in trained else "baseline"


def with_choices(plan: ArmPlan, trained: ArmPlan) -> ArmPlan:
    """An arm with the choices that the arm which trains its weights has made (see `settled`)."""
    chosen = iter(trained.during("train", "both"))
    methods = [next(chosen) if method.phase != "test" else method for method in plan.methods]
    return replace(plan, methods=tuple(methods))


def training_model(
    arm: ArmPlan, task: Task, recipe: Any, backbone: Backbone, protocol: Protocol
) -> tuple[nn.Module, TrainingPlan]:
    """The model that an arm trains, and what of it is trained; gradients are set accordingly."""
    from effbench.models.tower import ModelView, view

    model = task.build(recipe, backbone, protocol)
    seen = view(model) if arm.methods or arm.control == "identity" else ModelView(model, None, None)
    methods = arm.during("train", "both")
    for method in methods:
        method.edit_model(seen)
    plan = TrainingPlan(seen, task.locked(model) if protocol.train == "locked" else [], [])
    for method in methods:
        method.edit_training(plan)
    if plan.plain_engine and protocol.engine != "plain":
        raise UsageError(f"--engine {protocol.engine} cannot train {plan.plain_engine}", "use --engine plain")
    plan.set_gradients()
    return model, plan


def settled(
    arm: ArmPlan,
    task: Task,
    recipe: Any,
    backbone: Backbone,
    protocol: Protocol,
    calibration: CalibrationSet,
    charged: Callable[[Callable[[], Method]], Method] = lambda choose: choose(),
) -> ArmPlan:
    """The arm with every choice made that its methods make before training (see `Method.settle`).

    Args:
        charged: calls what it is given, and takes its time.
    """
    from effbench.models.tower import view

    acting = arm.during("train", "both")
    if all(type(method).settle is Method.settle for method in acting):
        return arm
    seen = view(task.build(recipe, backbone, protocol).to(protocol.device))
    chosen = []
    for method in arm.methods:
        if method in acting:
            method = charged(partial(method.settle, seen, calibration))
            method.edit_model(seen)
        chosen.append(method)
    return replace(arm, methods=tuple(chosen))


def testing_model(
    arm: ArmPlan,
    task: Task,
    recipe: Any,
    backbone: Backbone,
    protocol: Protocol,
    state: dict[str, Tensor],
    calibration: CalibrationSet,
) -> nn.Module:
    """The model that an arm is tested with: trained weights, then the structure that only testing has.

    Args:
        state: what training changed, under the library's keys; keys of edits that testing lacks are left out.
        calibration: training data, handed to `Method.finish`.
    """
    from torch import nn

    from effbench.models.tower import ModelView, view

    model = task.build(recipe, backbone, protocol).to(protocol.device)
    seen = view(model) if arm.methods or arm.control == "identity" else ModelView(model, None, None)
    for method in arm.during("both"):
        method.edit_model(seen)
    known = model.state_dict(keep_vars=True)
    seen.trained = frozenset(k for k, v in known.items() if k in state and isinstance(v, nn.Parameter)) or None
    seen.left = {key: value for key, value in state.items() if key not in known}
    model.load_state_dict({key: value for key, value in state.items() if key in known}, strict=False)
    for method in arm.during("test"):
        method.edit_model(seen)
    for method in arm.methods:
        method.finish(seen, calibration)
    return model.eval().requires_grad_(False)


def try_out(
    arm: ArmPlan, task: Task, recipe: Any, backbone: Backbone, protocol: Protocol, rehearsal: CalibrationSet
) -> None:
    """Build an arm once, as it trains and as it is tested, and throw it away: what does not fit is refused.

    Raises:
        UsageError: as the methods say.
    """
    arm = settled(arm, task, recipe, backbone, protocol, rehearsal)
    state = {}
    if arm.kind == "baseline" or arm.during("train", "both"):
        model, _ = training_model(arm, task, recipe, backbone, protocol)
        # methods of the testing model may look at what was trained
        state = {k: v.detach() for k, v in model.state_dict(keep_vars=True).items() if v.requires_grad}
    if arm.during("test"):
        testing_model(arm, task, recipe, backbone, protocol, state, rehearsal)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what training changes: parameters with gradients, and buffers, under the library's keys."""
    state = model.state_dict(keep_vars=True)
    buffers = {id(buffer) for buffer in model.buffers()}
    return {k: v.detach().clone() for k, v in state.items() if v.requires_grad or id(v) in buffers}
