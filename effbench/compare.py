"""Two runs side by side, what differs in their envelopes first. Reads records, needs no torch.

Seconds of two processes are never compared: another moment or another machine explains them as well as another
method. What is compared are ratios that each run measured within itself, figures that are counted, and quality; and
ratios and quality are judged only where the envelopes are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from effbench import store
from effbench.errors import UsageError
from effbench.quality import LEAST_SEEDS, Sides
from effbench.records import Arm, Interval, MetricValue, Record, Speedup
from effbench.report.envelope_section import flat
from effbench.report.markdown import clean
from effbench.rescoring import Scores, reading
from effbench.stats import MARGIN
from effbench.task import Items, Metric

if TYPE_CHECKING:
    import pandas

NOT_SHOWN = "NO DIFFERENCE SHOWN"
#: provenance that explains no difference: what was typed, where the data lay, and what other fields say better
LEFT_OUT = ("command", "data_origin", "resumed", "machine.load", "machine.git branch")


@dataclass(frozen=True)
class Difference:
    """A field or a figure that is not the same in both; None is what one of them does not have."""

    name: str
    a: Any
    b: Any

    @property
    def percent(self) -> float | None:
        """b / a - 1 in per cent; None for what is no number."""
        numbers = type(self.a) is int and type(self.b) is int and self.a
        return 100 * (self.b / self.a - 1) if numbers else None


@dataclass(frozen=True)
class Ratio:
    """A speed-up of both runs, each against its own baseline; the verdict on b against a is empty where none is due."""

    name: str
    a: Speedup | None
    b: Speedup | None
    verdict: str = ""

    @property
    def change(self) -> float | None:
        """b / a."""
        return self.b.value / self.a.value if self.a and self.b and self.a.value else None


@dataclass(frozen=True)
class Quality:
    """The primary metric of both runs.

    Args:
        difference: b - a in the metric's unit, paired by item; None where that could not be computed.
        lossiness: lossy-ness of b - lossy-ness of a (positive: b loses more), paired likewise.
        verdict: of b against a, empty where none is due. note: what limits it.
    """

    metric: str
    a: MetricValue | None
    b: MetricValue | None
    difference: Interval | None = None
    lossiness: Interval | None = None
    verdict: str = ""
    note: str = ""


@dataclass(frozen=True)
class Both:
    """An arm that both runs have."""

    a: Arm
    b: Arm
    ratios: tuple[Ratio, ...]
    counts: tuple[Difference, ...]
    counted: int
    quality: Quality | None


@dataclass(frozen=True)
class Comparison:
    """What two runs have to do with each other; `judged` says whether ratios and quality may be."""

    a: Record
    b: Record
    envelope: tuple[Difference, ...]
    provenance: tuple[Difference, ...]
    arms: tuple[Both, ...]
    only_a: tuple[Arm, ...]
    only_b: tuple[Arm, ...]
    judged: bool
    notes: tuple[str, ...]


def compare(
    a: Record, b: Record, samples: tuple[pandas.DataFrame | None, pandas.DataFrame | None] = (None, None)
) -> Comparison:
    """Put two records side by side.

    FASTER and SLOWER (b against a) are said where the two 95 % intervals of a speed-up lie apart, and the medians by
    more than MARGIN; BETTER and WORSE where the interval of the paired difference of the primary metric excludes 0
    (without per-item scores: where the two intervals of the metric lie apart). SAME is said of a metric whose scores
    are equal item by item. Nothing is called better or worse of runs that trained with fewer than LEAST_SEEDS seeds:
    what they differ by is a training as well as a method.

    Args:
        samples: the raw samples of each record; None where they cannot be read.
    """
    envelope = _differing(a.envelope.model_dump(), b.envelope.model_dump())
    judged = not envelope and a.status == b.status == "ok"
    notes = []
    if a.id == b.id:
        notes.append("both are the same run")
    notes += [
        f"{side} is INVALID, so nothing that it measured is judged: {clean(record.why_invalid)}"
        for side, record in (("A", a), ("B", b))
        if record.status != "ok"
    ]
    notes += [
        f"{clean(arm.name)} FAILED in {side}: {clean(arm.error)}"
        for side, record in (("A", a), ("B", b))
        for arm in record.arms
        if arm.status == "FAILED"
    ]
    theirs = {_key(arm): arm for arm in b.arms}
    shared = [(arm, theirs[_key(arm)]) for arm in a.arms if _key(arm) in theirs]
    quality, why = _quality(a, b, shared, samples, judged)
    notes += [why] if why else []
    arms = tuple(
        Both(one, other, tuple(_ratios(one, other, judged)), *_counts(one, other), found)
        for (one, other), found in zip(shared, quality, strict=True)
    )
    known = {_key(arm) for arm in a.arms}
    return Comparison(
        a=a,
        b=b,
        envelope=envelope,
        provenance=_differing(a.provenance.model_dump(), b.provenance.model_dump(), LEFT_OUT),
        arms=arms,
        only_a=tuple(arm for arm in a.arms if _key(arm) not in theirs),
        only_b=tuple(arm for arm in b.arms if _key(arm) not in known),
        judged=judged,
        notes=tuple(notes),
    )


def choose(a: Sequence[Record], b: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Which records of two commits (or of a commit and a run) are compared.

    Of each envelope that both have: the two that share most arms, the newest of these. Where they share none, the
    two whose envelopes differ in the fewest fields.

    Raises:
        UsageError: they share no envelope, and two different pairs of envelopes are equally near.
    """
    of_a, of_b = _by_envelope(a), _by_envelope(b)
    pairs = [(digest, digest) for digest in of_a if digest in of_b]
    if not pairs:
        dumped = {digest: records[0].envelope.model_dump() for digest, records in (of_a | of_b).items()}
        apart = {(one, two): len(_differing(dumped[one], dumped[two])) for one in of_a for two in of_b}
        pairs = [pair for pair, fields in apart.items() if fields == min(apart.values())]
        if len(pairs) > 1:
            some = "; ".join(f"{of_a[one][-1].id} and {of_b[two][-1].id}" for one, two in pairs[:3])
            raise UsageError(
                f"no two records of them share an envelope, and {len(pairs)} pairs are equally near: {some}",
                "name the two runs instead",
            )
    return [_nearest(of_a[one], of_b[two]) for one, two in pairs]


def _by_envelope(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.envelope.digest, []).append(record)
    return found


def _nearest(a: list[Record], b: list[Record]) -> tuple[Record, Record]:
    """The two that share most arms; of equals the newest."""

    def rank(pair: tuple[Record, Record]) -> tuple:
        one, other = pair
        arms = {_key(arm) for arm in one.arms} & {_key(arm) for arm in other.arms}
        return len(arms), store.created(one), store.created(other)

    return max(((one, other) for one in a for other in b), key=rank)


def _differing(a: dict[str, Any], b: dict[str, Any], left_out: Sequence[str] = ()) -> tuple[Difference, ...]:
    one, other = flat(a), flat(b)
    names = [name for name in dict.fromkeys((*one, *other)) if name not in left_out]
    return tuple(Difference(name, one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name))


def _key(arm: Arm) -> tuple[str, ...]:
    return arm.kind, arm.control, arm.spec, arm.phase


def _ratios(a: Arm, b: Arm, judged: bool) -> Iterator[Ratio]:
    for name, field in (("test", "test_speedup"), ("train", "train_speedup")):
        one, other = getattr(a, field), getattr(b, field)
        if one is None and other is None:
            continue
        verdict = ""
        if judged and one and other and None not in (one.low, one.high, other.low, other.high):
            faster = other.low > one.high and other.value > one.value * (1 + MARGIN)
            slower = other.high < one.low and other.value < one.value / (1 + MARGIN)
            verdict = "FASTER" if faster else "SLOWER" if slower else NOT_SHOWN
        yield Ratio(name, one, other, verdict)


def _counts(a: Arm, b: Arm) -> tuple[tuple[Difference, ...], int]:
    """The counted figures that differ, and how many there are that both have."""
    pairs = [(name, one, other) for (name, one), (_, other) in zip(_counted(a), _counted(b), strict=True)]
    pairs = [pair for pair in pairs if pair[1:] != (None, None)]
    return tuple(Difference(*pair) for pair in pairs if pair[1] != pair[2]), len(pairs)


def _counted(arm: Arm) -> Iterator[tuple[str, Any]]:
    for phase, flops in (("test", arm.test_flops), ("train", arm.train_flops)):
        for name, field in (("FLOPs", "dense"), ("useful FLOPs", "useful"), ("overhead FLOPs", "overhead")):
            yield f"{phase} {name}", getattr(flops, field) if flops else None
        yield f"{phase} low-bit operations", flops.low_bit if flops else None
    yield "tokens", arm.tokens or None
    yield "parameters", arm.parameters or None
    yield "trained parameters", arm.trained_parameters or None
    yield "weight bytes", arm.weight_bytes or None
    yield "disk bytes", arm.disk_bytes or None


def _quality(
    a: Record,
    b: Record,
    shared: list[tuple[Arm, Arm]],
    samples: tuple[pandas.DataFrame | None, pandas.DataFrame | None],
    judged: bool,
) -> tuple[list[Quality | None], str]:
    """The primary metric of each pair of arms, and why they are not paired by item; empty where they are."""
    if a.primary_metric != b.primary_metric:
        said = f"the primary metrics differ, {clean(a.primary_metric)} and {clean(b.primary_metric)}"
        return [None] * len(shared), f"{said}: no quality is compared"
    name = a.primary_metric
    found: list[Quality | None] = [
        Quality(name, one.metrics.get(name), other.metrics.get(name))
        if name in one.metrics or name in other.metrics
        else None
        for one, other in shared
    ]
    if not judged:
        return found, ""
    trains = a.envelope.protocol.train != "none" and a.envelope.protocol.epochs > 0
    few = trains and len(a.envelope.protocol.seeds) < LEAST_SEEDS
    known = [i for i, each in enumerate(found) if each and each.a and each.b]
    if not known:
        return found, ""
    sides, why = _sides(name, a, b, samples)
    for i in known:
        one, other = shared[i]
        paired = sides.get(_key(one)) if sides else None
        found[i] = _apart(found[i], few) if paired is None else paired.judge(found[i], few)
    if not why and any(_key(shared[i][0]) not in sides for i in known):
        why = "some arms were not tested on the same items: their metrics' intervals are compared, not paired"
    return found, why


@dataclass(frozen=True)
class _Paired:
    """Values and bootstrap draws of one arm's metric in both runs, and of their baselines."""

    sides: Sides
    a: int
    b: int
    bases: tuple[int, int]
    same: bool

    def judge(self, quality: Quality, few: bool) -> Quality:
        values, draws = self.sides.values, self.sides.draws
        difference = self.sides.figure(values[self.b] - values[self.a], draws[self.b] - draws[self.a])
        loss = None
        if quality.a.lossiness and quality.b.lossiness:
            with np.errstate(all="ignore"):
                value, drawn = (
                    self.sides.ratio(of, self.a, self.bases[0]) - self.sides.ratio(of, self.b, self.bases[1])
                    for of in (values, draws)
                )
            loss = self.sides.figure(value, drawn) if np.isfinite(drawn).all() and np.isfinite(value) else None
        turned = 1 if self.sides.metric.higher_is_better else -1
        verdict, note = NOT_SHOWN, ""
        if self.same:
            verdict = "SAME"
        elif difference.low is None or difference.high is None:
            note = f"{difference.n} images: too few"
        elif difference.low > 0 or difference.high < 0:
            verdict, note = _claim("BETTER" if difference.low * turned > 0 else "WORSE", few)
        return Quality(quality.metric, quality.a, quality.b, difference, loss, verdict, note)


def _claim(verdict: str, few: bool) -> tuple[str, str]:
    return (
        (NOT_SHOWN, f"fewer than {LEAST_SEEDS} seeds: the training's own variance is not measured")
        if few
        else (
            verdict,
            "",
        )
    )


def _apart(quality: Quality, few: bool) -> Quality:
    """Judge by the two intervals of the metric: too cautious for the same items, right for any."""
    a, b = quality.a, quality.b
    if None in (a.low, a.high, b.low, b.high):
        return quality
    up, down = b.low > a.high, b.high < a.low
    verdict, note = NOT_SHOWN, ""
    if up or down:
        verdict, note = _claim("BETTER" if up == a.higher_is_better else "WORSE", few)
    return Quality(quality.metric, a, b, verdict=verdict, note=note or "not paired by item")


def _sides(
    name: str, a: Record, b: Record, samples: tuple[pandas.DataFrame | None, pandas.DataFrame | None]
) -> tuple[dict[tuple[str, ...], _Paired], str]:
    """The arms whose items are the same in both runs, with the metric resampled over the same images."""
    if samples[0] is None or samples[1] is None:
        which = " and ".join(side for side, frame in zip("AB", samples, strict=True) if frame is None)
        return {}, f"the raw samples of {which} cannot be read: quality is compared by its intervals, not by item"
    one, other = Scores(a, samples[0]), Scores(b, samples[1])
    found = reading(name, [one, other])
    if found is None:
        return {}, f"{clean(name)} does not follow from the stored scores: its intervals are compared, not its items"
    metric, columns = found
    return _resampled(metric, _rows(one, columns), _rows(other, columns)), ""


def _rows(scores: Scores, columns: tuple[str, ...]) -> dict[tuple[str, ...], list[Items]]:
    found = {_key(arm): scores.items(arm.name, columns) for arm in scores.record.arms}
    return {key: items for key, items in found.items() if items is not None}


def _resampled(
    metric: Metric, a: dict[tuple[str, ...], list[Items]], b: dict[tuple[str, ...], list[Items]]
) -> dict[tuple[str, ...], _Paired]:
    base = next((key for key in a if key[0] == "baseline"), None)
    if base is None or base not in b:
        return {}

    def same_items(items: list[Items]) -> bool:
        return len(items) == len(a[base]) and all(
            np.array_equal(each.group, first.group) for each, first in zip(items, a[base], strict=True)
        )

    shared = [key for key in a if key in b and same_items(a[key]) and same_items(b[key])]
    if base not in shared:
        return {}
    sides = Sides(metric, [side[key] for key in shared for side in (a, b)])
    at = shared.index(base)
    return {
        key: _Paired(sides, 2 * i, 2 * i + 1, (2 * at, 2 * at + 1), _equal(a[key], b[key]))
        for i, key in enumerate(shared)
    }


def _equal(a: list[Items], b: list[Items]) -> bool:
    return all(np.array_equal(one.values, other.values) for one, other in zip(a, b, strict=True))
