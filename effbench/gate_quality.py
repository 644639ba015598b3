"""What the gate says of an arm's outputs and quality, which are exact on one platform and nearly so on another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from effbench.records import FROZEN_TOWER, Arm, Fingerprint, MetricValue, Provenance, Record, kind_of_device
from effbench.report.markdown import clean

#: relative distance of outputs that two platforms' rounding may make; measured on scenes: 7e-8 between 1 and 2 threads,
#: 9e-7 between AVX-512 and no vector instructions, 5e-7 after 24 training steps. Other devices round more coarsely
ROUNDING = 1e-3
#: share of the test images that rounding may give another result, on weights that are the same and on trained ones;
#: measured likewise: 0.2 % of the images changed a rank, and none after 24 steps. A long training multiplies that
FLIPPED = 0.01
FLIPPED_TRAINED = 0.1

Row = tuple[str, Any, Any, str, str]
Projections = dict[str, tuple[float, ...]]


def computed(reference: Record, run: Record, old: Arm, new: Arm) -> Iterator[Row]:
    """The outputs on the frozen test images: to the bit on the same platform, within ROUNDING on another."""
    was, now = old.fingerprint, new.fingerprint
    if was is None:
        if now is not None:
            yield "outputs", None, now.sha256[:12], "the reference does not have it, so it is not compared", "NOTE"
        return
    if now is None:
        yield "outputs", was.sha256[:12], None, "", "CHANGED"
        return
    names = was.sha256[:12], now.sha256[:12]
    if was.sha256 == now.sha256:
        yield "outputs", *names, "to the bit", "PASS"
        return
    apart = distance(was.vectors, now.vectors)
    said = _amount(apart)
    other = elsewhere(reference, run)
    if not other:
        yield "outputs", *names, f"{said}; on the same platform they must be equal to the bit", "CHANGED"
    elif apart is not None and apart <= ROUNDING:
        yield "outputs", *names, f"{said}; {other}: {100 * ROUNDING:g} % are allowed", "PASS"
    elif trained(reference):
        said += f"; {other}, and training multiplies what rounding makes: only quality is judged"
        yield "outputs", *names, said, "NOTE"
        yield from _frozen(was, now, other)
    else:
        yield "outputs", *names, f"{said}; {other}: {100 * ROUNDING:g} % are allowed", "CHANGED"


def _frozen(was: Fingerprint, now: Fingerprint, other: str) -> Iterator[Row]:
    """What a frozen tower gives, which no training changes; nothing where the reference does not have it."""
    vectors = [{name: found for name, found in each.vectors.items() if name == FROZEN_TOWER} for each in (was, now)]
    if not vectors[0]:
        return
    apart = distance(*vectors)
    same = apart is not None and apart <= ROUNDING
    said = f"{_amount(apart)}; {other}: {100 * ROUNDING:g} % are allowed"
    yield "outputs of the frozen tower", None, None, said, "PASS" if same else "CHANGED"


def _amount(apart: float | None) -> str:
    """How far outputs are from each other, by `distance`."""
    return "differ by more than can be said" if apart is None else f"differ by {100 * apart:.2g} %"


def quality(reference: Record, run: Record, old: Arm, new: Arm) -> Iterator[Row]:
    """Each metric of the test split: exact on the same platform and weights, within `tolerance` otherwise."""
    other, own = elsewhere(reference, run), trained(reference)
    if not other and old.fingerprint and new.fingerprint and old.fingerprint.sha256 == new.fingerprint.sha256:
        own = False  # trained to the same bits: what differs is how it was scored
    for name in dict.fromkeys([*old.metrics, *new.metrics]):
        was, now = old.metrics.get(name), new.metrics.get(name)
        if was is None:
            yield name, None, now.value, "the reference does not have it, so it is not compared", "NOTE"
        elif now is None and name not in reference.envelope.metrics:
            yield name, was.value, None, "the run's machine lacks what it needs, so it is not compared", "NOTE"
        elif now is None:
            yield name, was.value, None, clean(new.no_quality), "CHANGED"
        elif (was.value, was.by_seed) == (now.value, now.by_seed):
            yield name, was.value, now.value, "exactly", "PASS"
        else:
            yield _judged(name, was, now, reference, other, own)


def _judged(name: str, was: MetricValue, now: MetricValue, reference: Record, other: str, own: bool) -> Row:
    """A metric that is not exactly as it was."""
    better = (now.value > was.value) == was.higher_is_better
    said = "better" if better else "worse"
    if not other and not own:
        return name, was.value, now.value, f"{said}; on the same platform and weights it must be equal", "CHANGED"
    why = other or "it was trained"
    allowed = tolerance(
        was, FLIPPED_TRAINED if own else FLIPPED, reference.envelope.images.get(reference.envelope.split, 0)
    )
    if allowed is None:
        return name, was.value, now.value, f"{said}; {why}, and it has no interval to judge that by", "NOTE"
    if abs(now.value - was.value) <= allowed:
        return name, was.value, now.value, f"{why}: a difference of {allowed:.3g} is allowed", "PASS"
    return name, was.value, now.value, f"{said}; {why}: a difference of {allowed:.3g} is allowed", "CHANGED"


def tolerance(metric: MetricValue, flipped: float, images: int) -> float | None:
    """By how much a metric may differ where rounding gives a share of the test images another result.

    The interval's half-width h is 1.96 standard deviations of a mean over n images. If a share f of them is drawn anew,
    the mean moves by a difference of two such draws: 1.96 of its standard deviations are h sqrt(2 f). At least one
    image's worth is allowed, which is what an interval without width (all images alike) cannot show.

    Args:
        metric: of the reference. flipped: the share f.
        images: of the test split.

    Returns:
        in the metric's unit; None where there is no interval.
    """
    if metric.low is None or metric.high is None:
        return None
    least = (
        abs(metric.ceiling - metric.chance) / images if images and None not in (metric.ceiling, metric.chance) else 0
    )
    return max((metric.high - metric.low) / 2 * math.sqrt(2 * flipped), least)


def trained(record: Record) -> bool:
    """Whether an arm's weights come from a training on its machine: its own, that of another arm, or of a base."""
    protocol = record.envelope.protocol
    if protocol.captioning is not None:  # even where no arm is trained, what all start from is
        return protocol.epochs > 0 or bool(protocol.captioning.stages)
    return protocol.train != "none" and protocol.epochs > 0


def computing(source: Provenance) -> dict[str, str]:
    """Versions of the libraries that compute what a model gives."""
    return {name: version for name, version in source.versions.items() if name not in ("pandas", "pyarrow", "scipy")}


def elsewhere(reference: Record, run: Record) -> str:
    """What of the platform differs, so that sums may be rounded otherwise; empty where nothing does."""
    facts = []
    for record in (reference, run):
        protocol, source = record.envelope.protocol, record.provenance
        facts.append(
            {
                "kind of device": kind_of_device(protocol.device),
                "device": record.envelope.device_model,
                "number of threads": protocol.threads,
                "processor's abilities": source.machine.get("cpu flags"),
                "system": source.platform.partition("-")[0],
                "set of library versions": computing(source),
            }
        )
    differ = [name for name, was in facts[0].items() if was != facts[1][name]]
    return f"another {differ[0]}" if differ else ""


def distance(one: Projections, other: Projections) -> float | None:
    """Largest relative distance of two models' outputs, estimated by their projections; None: not of one kind."""
    if not one or {name: len(v) for name, v in one.items()} != {name: len(v) for name, v in other.items()}:
        return None
    found = 0.0
    for name, vector in one.items():
        length, apart = math.hypot(*vector), math.dist(vector, other[name])
        found = max(found, apart / length if length else math.inf if apart else 0.0)
    return found
