"""From raw samples to a record: every arm's figures with their intervals, and whether the run is valid."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from effbench import calibrate, decode_figures, quality, records, speeds, versus
from effbench.arms import judges, owner
from effbench.budget import is_rung, saves
from effbench.economics import economics
from effbench.examine import eases, examine, memory
from effbench.interaction import interaction
from effbench.measure.environment import device_model
from effbench.measure.structure import masked_tokens
from effbench.spec import canonical
from effbench.task import Items

if TYPE_CHECKING:
    from effbench.arms import ArmPlan
    from effbench.experiment import Experiment
    from effbench.journal import Journal
    from effbench.lockstep import Arm, Partial

CERTAIN = 0.998  # level at which noop makes a run INVALID: of 500 honest runs one is lost, where 95 % would lose 25


def record(
    experiment: Experiment,
    arms: list[Arm],
    trained: dict[int, Partial],
    items: dict[int, Partial],
    errors: dict[str, str],
    journal: Journal,
    provenance: records.Provenance,
) -> records.Record:
    """The record of a finished experiment."""
    from effbench.experiment import run_id

    live, setting, protocol = experiment.live, experiment.setting, experiment.protocol
    rows = speeds.complete(setting.rows)
    live.stage("FLOPs, kernels and memory of each arm", len(arms), "arms")
    training = {arm.name: arm for arm in experiment.training_arms(protocol.seeds[0])} if trained else {}
    found: list[records.Arm] = []
    parts: dict[str, Any] = {}
    for place, arm in enumerate(arms):
        facts: dict[str, Any] = dict(
            name=arm.name,
            spec=arm.plan.spec,
            kind=arm.plan.kind,
            control=arm.plan.control,
            controls_for=arm.plan.controls_for,
            phase=arm.plan.phase,
            source="; ".join(dict.fromkeys(method.source for method in arm.plan.methods if method.source)),
        )
        error = errors.get(arm.name, arm.error)
        if error:
            facts |= dict(status="FAILED", error=error)
        else:
            own = training.get(arm.name)
            if trained and own is None:
                facts["trained_by"] = owner(experiment.plan(arm.name), experiment.plans, training)
            seen, parts[arm.name] = examine(experiment, arm, own)
            probed, notes = memory(experiment, arm.plan, own)
            facts |= seen | probed
            if not facts["no_quality"]:
                facts |= _quality(experiment, arm.name, items, facts.get("trained_by") != "baseline" and bool(trained))
            facts["answers"] = items[protocol.seeds[0]].get("answers", {}).get(arm.name, ())
            for field in ("losses", "dev") if own is not None else ():
                facts[field] = {str(seed): tuple(part["arms"][arm.name][field]) for seed, part in trained.items()}
            # against identity where a method edits the towers: a kernel change is not what the method takes away
            plain = parts.get("identity", parts["baseline"]) if arm.plan.methods else parts["baseline"]
            changed = {part for part, now in parts[arm.name].items() if arm.plan.methods and eases(now, plain[part])}
            base = found[0] if found else None
            facts |= _times(experiment, arm.name, rows, own is not None, changed)
            facts["decoding"] = decode_figures.timed(facts["decoding"], rows, arm.name)
            facts |= _promise(facts, base)
            masked = _masked(arm.plan, facts, base)
            facts["structure"] = facts["structure"].model_copy(update=dict(masked_tokens=bool(masked)))
            if (whose := facts.get("trained_by", "baseline")) != "baseline":
                notes.append(f"has the weights that {whose} trained")
            facts["notes"] = (*facts["notes"], *notes, *([masked] if masked else []))
        found.append(records.Arm(**facts))
        live.advance(place + 1)
    found = [_method_effect(arm, found, rows, experiment.batches) for arm in found]
    found = _judged(experiment, found, rows, items)
    found = [_costed(experiment, arm, found[0], rows) for arm in found]
    created = datetime.now(UTC)
    seconds = setting.seconds
    outside = seconds["loop"] - seconds["data"] - seconds["compute"]
    noop = next(arm for arm in found if arm.control == "noop")
    why = _noise(noop, rows, experiment.batches) or _not_deterministic(items)
    on_scores = [note for part in items.values() for note in part.get("notes", ())]
    more = dict(
        resumed=journal.resumed,
        data_origin=experiment.data.origin,
        until=experiment.stopping.until,
        budget=experiment.stopping.budget,
    )
    return records.Record(
        id=run_id(created, experiment.name, experiment.digest()),
        created=created,
        status="INVALID" if why else "ok",
        why_invalid=why,
        lockstep_overhead=outside / seconds["compute"] if seconds["compute"] else 0.0,
        energy=experiment.energy_source,
        calibration=calibrate.load(device_model(protocol.device), protocol.threads),
        primary_metric=experiment.task.primary_metric(experiment.prepared, "test").name,
        envelope=experiment.envelope(),
        provenance=provenance.model_copy(update=more),
        arms=tuple(found),
        notes=tuple(dict.fromkeys([*experiment.data.notes, *on_scores])),
    )


def _noise(noop: records.Arm, rows: pd.DataFrame, batches: list[int]) -> str:
    """Why the run is INVALID: the second, untouched baseline differs from the first, beyond what chance brings."""
    found = {}
    if noop.test_speedup is not None:
        both = (speeds.timed(rows, name, batches[0]) for name in ("baseline", noop.name))
        found["test"] = speeds.speedup(*both, "seconds", level=CERTAIN)
    if noop.train_speedup is not None:
        found["training"] = speeds.training_speedup(rows, noop.name, level=CERTAIN)
    for what, figure in found.items():
        if figure is not None and figure.verdict in ("FASTER", "SLOWER"):
            return f"noop, an untouched second baseline, came out {figure.verdict} in {what}: {figure.value:.3f}x"
    return ""


def _not_deterministic(items: dict[int, Partial]) -> str:
    """Why the run is INVALID: on the same weights and batches noop came to other results than the baseline."""
    for seed, part in items.items():
        for name, score in part["items"]["baseline"].items():
            other = part["items"].get("noop", {}).get(name)
            if other is not None and not torch.equal(score["values"], other["values"]):
                return f"noop, an untouched second baseline, came to another {name} (seed {seed}): not deterministic"
    return ""


def _times(experiment: Experiment, arm: str, rows: pd.DataFrame, trains: bool, changed: set[str]) -> dict[str, Any]:
    """Every figure of time of one arm."""
    own = rows[rows["arm"] == arm]
    facts: dict[str, Any] = dict(test_time=speeds.split(own[own["phase"] == "quality"]))
    if trains:
        facts["train_time"] = speeds.split(own[own["phase"].isin(["settle", "features", "train"])])
    if experiment.batches:
        batch = experiment.batches[0]
        baseline, mine = (speeds.timed(rows, name, batch) for name in ("baseline", arm))
        first = own.loc[own["phase"] == f"timing {batch}", "seconds"].iloc[0]
        facts |= dict(
            step_time=speeds.split(speeds.middle(mine), first),
            by_batch=speeds.by_batch(rows, arm, experiment.batches),
            energy=speeds.energy(mine, experiment.energy_source),
        )
        if arm != "baseline":
            facts |= dict(
                test_speedup=speeds.speedup(baseline, mine, "seconds"),
                image_speedup=speeds.speedup(baseline, mine, "image_seconds", "overhead_seconds"),
                text_speedup=speeds.speedup(baseline, mine, "text_seconds"),
                end_to_end_speedup=speeds.speedup(baseline, mine, "seconds", "data_wait", "transfer"),
                pays_from=speeds.pays_from(facts["by_batch"]),
                ceiling=speeds.ceiling(baseline, changed) if changed else None,
            )
    if trains and arm != "baseline":
        facts["train_speedup"] = speeds.training_speedup(rows, arm)
    return facts


def _promise(facts: dict[str, Any], baseline: records.Arm | None) -> dict[str, Any]:
    """The speed-up that the FLOPs promise, and how much of it was realised."""
    if baseline is None or not facts["test_flops"].work:
        return {}
    promised = baseline.test_flops.work / facts["test_flops"].work
    measured = facts.get("test_speedup")
    return dict(promised=promised, realised=measured.value / promised if measured else None)


def _masked(plan: ArmPlan, facts: dict[str, Any], baseline: records.Arm | None) -> str:
    """A sentence where the arm's tokens are hidden but still there."""
    if baseline is None:
        return ""
    claims = {claim for method in plan.during("test", "both") for claim in method.claims}
    return masked_tokens(facts["tokens"], baseline.tokens, claims, facts["test_flops"], baseline.test_flops)


def _method_effect(arm: records.Arm, arms: list[records.Arm], rows: pd.DataFrame, batches: list[int]) -> records.Arm:
    """The speed-up of an arm with methods against identity, which has its kernels and none of its methods."""
    identity = next((each for each in arms if each.control == "identity" and each.status == "ok"), None)
    if arm.status != "ok" or not arm.spec or not batches or identity is None:
        return arm
    frames = (speeds.timed(rows, name, batches[0]) for name in (identity.name, arm.name))
    return arm.model_copy(update=dict(method_speedup=speeds.speedup(*frames, "seconds")))


def _costed(experiment: Experiment, arm: records.Arm, baseline: records.Arm, rows: pd.DataFrame) -> records.Arm:
    """An arm with what its training cost and brought."""
    if arm.no_quality:
        return arm
    metric = experiment.task.primary_metric(experiment.prepared, "dev")
    costs = economics(arm, baseline, rows, experiment.protocol, experiment.sizes, metric)
    return arm.model_copy(update=dict(economics=costs))


def _judged(
    experiment: Experiment, arms: list[records.Arm], rows: pd.DataFrame, items: dict[int, Partial]
) -> list[records.Arm]:
    """The arms, the methods with what they are judged by: controls at the same budget, and a stack's parts."""
    metric = experiment.task.primary_metric(experiment.prepared, "test")
    scores = {
        arm.name: [items_of(part["items"][arm.name][metric.items]) for part in items.values()]
        for arm in arms
        if arm.status == "ok" and all(arm.name in part["items"] for part in items.values())
    }
    losses = {arm.name: arm.metrics[metric.name].lossiness for arm in arms if metric.name in arm.metrics}
    plans = {plan.name: plan for plan in experiment.plans}
    rungs = [plan for plan in experiment.plans if is_rung(plan) and plan.name in experiment.image_work]

    def judged(arm: records.Arm) -> records.Arm:
        if arm.kind != "method" or arm.status != "ok" or arm.no_quality:
            return arm
        plan, facts = plans[arm.name], {}
        found = {control: [canonical(stack) for stack in stacks] for control, stacks in judges(plan.methods).items()}
        parts = found.pop("part", [])
        controls = {control: [name for name in names if name != arm.name] for control, names in found.items()}
        if saves(experiment.image_work, arm.name) and not is_rung(plan):
            controls["resize"] = ["baseline", *(rung.name for rung in rungs if rung.phase == arm.phase)]
        if losses[arm.name] is not None:  # where the baseline is at chance nothing beats anything
            work, trained = experiment.image_work, arm.phase != "test"
            facts["versus"] = versus.against(metric, arm.name, controls, scores, work, trained)
        if parts and experiment.batches:
            facts["interaction"] = interaction(rows, arm.name, parts, experiment.batches[0], metric, scores, losses)
        return arm.model_copy(update=facts)

    return [judged(arm) for arm in arms]


def _quality(experiment: Experiment, arm: str, items: dict[int, Partial], trains: bool) -> dict[str, Any]:
    """Metrics with their lossy-ness, and the agreement with the baseline."""
    metrics = {}
    for metric in experiment.task.metrics(experiment.prepared, "test"):
        scored = [part["items"][each] for part in items.values() for each in ("baseline", arm)]
        if metric.optional and any(metric.items not in found for found in scored):
            continue
        baseline = [items_of(part["items"]["baseline"][metric.items]) for part in items.values()]
        own = baseline
        if arm != "baseline":
            own = [items_of(part["items"][arm][metric.items]) for part in items.values()]
        metrics[metric.name] = quality.lossiness(metric, baseline, own, trained=trains)
    shared = dict.fromkeys(name for part in items.values() for name in part["agreement"].get(arm, {}))
    agreement = {
        name: quality.agreement([items_of(part["agreement"][arm][name]) for part in items.values()]) for name in shared
    }
    return dict(metrics=metrics, agreement=agreement)


def items_of(score: dict[str, torch.Tensor]) -> Items:
    """Items from the tensors that a phase stores."""
    return Items(score["values"].numpy(), score["group"].numpy())
