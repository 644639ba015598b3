"""An arm's quality beside that of a blind control at the same budget: the same tokens or blocks, or the same FLOPs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from effbench.quality import LEAST_SEEDS, RESAMPLES, Sides
from effbench.records import Versus
from effbench.task import Items, Metric


def against(
    metric: Metric,
    arm: str,
    controls: Mapping[str, Sequence[str]],
    items: Mapping[str, list[Items]],
    work: Mapping[str, int],
    trained: bool = False,
) -> tuple[Versus, ...]:
    """An arm against each of its controls, in their order; a control of which no arm has items is left out.

    Args:
        controls: names of the arms of each control, e.g. {"random": [...], "resize": [...]}. Of `resize` they are all
            sizes that were run, the baseline (the native size) among them where it is one; of any other control each
            name is compared on its own.
        items: per-item scores of each arm that did not fail, one entry per seed.
        work: FLOPs of each arm (`Flops.work`); of a control other than `resize` they are not asked for.
        trained: see `versus`.
    """
    found = []
    for control, names in controls.items():
        there = [name for name in names if name in items]
        pairs: Iterable[tuple[tuple[str, ...], float]] = [((name,), 1.0) for name in there]
        if control == "resize" and there:
            pairs = [bracket(work[arm], [(name, work[name]) for name in there])]
        for chosen, share in pairs:
            theirs = {name: items[name] for name in chosen}
            found.append(versus(metric, items[arm], control, theirs, share, trained))
    return tuple(found)


def versus(
    metric: Metric,
    arm: list[Items],
    control: str,
    theirs: Mapping[str, list[Items]],
    share: float = 1.0,
    trained: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Versus:
    """The metric of an arm and of a control that lies at, or between, other arms.

    Of two arms the control's metric is (1 - share) x the first + share x the last, in every resample too. The advantage
    is arm - control in the metric's unit, turned so that positive is better, with the 95 % interval of a bootstrap
    that draws the same images (with all their captions) and the same seeds for all sides. BETTER and WORSE are said
    where that interval excludes 0: of twenty controls that are as good as the arm, about one is called so.

    Args:
        arm: per-item scores, one entry per seed.
        control: its kind, e.g. "random".
        theirs: names and per-item scores of the control's one or two arms.
        share: weight of the last of `theirs`; 1 where there is one.
        trained: whether the arm or the control was trained apart from the baseline: with fewer than LEAST_SEEDS seeds
            the interval lacks the noise of training, so that no difference is claimed.

    Raises:
        InvalidError: the sides were not tested on the same images and seeds, or a score is not finite.
    """
    sides = Sides(metric, [arm, *theirs.values()], seed, resamples)
    turned = 1 if metric.higher_is_better else -1
    (own, other), (own_draws, other_draws) = (
        (of[0], (1 - share) * of[1] + share * of[-1]) for of in (sides.values, sides.draws)
    )
    advantage = sides.figure(turned * (own - other), turned * (own_draws - other_draws))
    verdict = "NO DIFFERENCE SHOWN"
    if advantage.low is not None and advantage.high is not None and (not trained or len(arm) >= LEAST_SEEDS):
        verdict = "BETTER" if advantage.low > 0 else "WORSE" if advantage.high < 0 else verdict
    return Versus(control=control, arms=tuple(theirs), share=share, value=other, advantage=advantage, verdict=verdict)


def bracket(work: float, ladder: Iterable[tuple[str, float]]) -> tuple[tuple[str, ...], float]:
    """The two steps of a ladder of FLOPs between which `work` lies, and how far it is on the way to the upper one.

    On a step, below the lowest and above the highest it is that one step alone, with a share of 1. Below the lowest
    the control has more FLOPs than the arm, above the highest fewer: then it is no control at equal FLOPs, and whoever
    shows it says so.

    Args:
        work: FLOPs of the arm.
        ladder: at least one name with its FLOPs.

    Returns:
        One or two names, the cheaper first, and the weight of the last.
    """
    steps = sorted(ladder, key=lambda step: step[1])
    place = bisect_left([flops for _, flops in steps], work)
    if place == len(steps):
        return (steps[-1][0],), 1.0
    (name, flops), below = steps[place], steps[place - 1]
    if place == 0 or flops == work:
        return (name,), 1.0
    return (below[0], name), (work - below[1]) / (flops - below[1])
