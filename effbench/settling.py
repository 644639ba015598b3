"""The choices that methods make before training by a look at training data: once per seed, each in its arm's time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from effbench import randomness
from effbench.arms import ArmPlan, settled
from effbench.method import Method
from effbench.spec import canonical, parse

if TYPE_CHECKING:
    from effbench.experiment import Experiment
    from effbench.journal import Journal
    from effbench.lockstep import Partial


def settle(experiment: Experiment, seed: int, journal: Journal | None = None) -> None:
    """Fill `experiment.settled` for a seed (see `effbench.method.Method.settle`); what the journal holds is not asked.

    The seconds become a sample of the phase "settle".
    """
    choosing = [plan for plan in experiment.training_plans() if chooses(plan)]
    if choosing:
        experiment.live.stage(f"choices before training, seed {seed}", len(choosing), "arms")
    for number, plan in enumerate(choosing, 1):

        def choose(partial: Partial | None = None, save: Any = None, plan: ArmPlan = plan) -> Partial:
            return dict(spec=_chosen(experiment, plan, seed), errors={})

        found = journal.phase(f"settle {seed} {plan.name}", choose) if journal else choose()
        experiment.settled[plan.name, seed] = replace(plan, methods=parse(found["spec"]))
        experiment.live.advance(number)


def chooses(plan: ArmPlan) -> bool:
    """Whether a method of the arm may choose something by a look at training data."""
    return any(type(method).settle is not Method.settle for method in plan.during("train", "both"))


def _chosen(experiment: Experiment, plan: ArmPlan, seed: int) -> str:
    """The spec of an arm with its choices made."""
    setting, spent = experiment.setting, 0.0

    def charged(choose: Callable[[], Method]) -> Method:
        nonlocal spent
        method, seconds = setting.clock.timed(choose)
        spent += seconds
        return method

    randomness.seed_all(seed)
    build = (experiment.task, experiment.recipe, experiment.backbone, experiment.protocol)
    found = settled(plan, *build, experiment.calibration(), charged)
    row = dict(kind="step", seed=seed, phase="settle", index=0, arm=plan.name, seconds=spent, head_seconds=spent)
    setting.rows.append(row | dict(data_wait=0.0, transfer=0.0))
    return canonical(found.methods)
