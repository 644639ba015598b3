"""Which stack of methods to use for a loss of quality that one accepts: records in, an answer with its evidence out.

A stack is one canonical spec, parameters included. Of every envelope its newest successful measurement counts, and it
has to hold in each of them: the slowest speed-up and the largest lossy-ness of its envelopes stand for it. Its loss is

- shown to be within the bound where the upper end of every interval is;
- likely to be where the figures themselves are, but an interval reaches beyond, or where it was trained apart with so
  few seeds that the interval lacks the noise of training.

Only stacks that are FASTER in each envelope are named, those with the higher lower end of the speed-up first. Real data
go before drawn ones: where any stack was measured on real data, drawn data are left aside.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from effbench import quantities
from effbench.errors import InvalidError, UsageError
from effbench.records import LEAST_SEEDS, Arm, Interval, MetricValue, Record, in_interval, kind_of_device
from effbench.registry import did_you_mean
from effbench.report import figures
from effbench.report.bouts import trained_apart
from effbench.report.markdown import clean
from effbench.report.standings import BLIND, Section, Standing, judged, sections
from effbench.store import created

NAMED = 8  # names that an error lists


@dataclass(frozen=True)
class Evidence:
    """A stack in one envelope."""

    arm: Arm
    record: Record
    digest: str
    below: tuple[str, ...] = ()  # blind controls that it is not shown to beat: the leaderboard has it below the line

    @property
    def metric(self) -> MetricValue:
        return self.arm.metrics[self.record.primary_metric]

    @property
    def loss(self) -> Interval:
        return self.metric.lossiness

    @property
    def sure(self) -> bool:
        """Whether the interval of lossy-ness holds all the noise there is."""
        return not trained_apart(self.arm) or len(self.record.envelope.protocol.seeds) >= LEAST_SEEDS

    def against(self) -> dict[str, str | None]:
        """By blind control: BETTER, WORSE, NO DIFFERENCE SHOWN, or None where it was not compared."""
        return {control: judged(self.arm, self.record, control) for control in BLIND}


@dataclass(frozen=True)
class Candidate:
    """A stack and all that is known of it, newest first."""

    spec: str
    evidence: tuple[Evidence, ...]

    @cached_property
    def slowest(self) -> Evidence:
        return min(self.evidence, key=lambda each: each.arm.test_speedup.low)

    @cached_property
    def lossiest(self) -> Evidence:
        return max(self.evidence, key=lambda each: each.loss.high)

    @property
    def below(self) -> list[str]:
        """Blind controls that it is not shown to beat somewhere."""
        return sorted({control for each in self.evidence for control in each.below})

    @property
    def faster(self) -> bool:
        return all(each.arm.test_speedup.verdict == "FASTER" for each in self.evidence)

    @property
    def sure(self) -> bool:
        return all(each.sure for each in self.evidence)

    @property
    def needs(self) -> float:
        """The bound that it is shown to be within."""
        return self.lossiest.loss.high

    def within(self, bound: float) -> str:
        """ "shown", "likely" or ""."""
        if self.needs <= bound and self.sure:
            return "shown"
        return "likely" if all(each.loss.value <= bound for each in self.evidence) else ""


@dataclass(frozen=True)
class Answer:
    """What to use.

    Args:
        shown, likely: faster stacks within the bound, the best first, those below the line last; the first that is
            shown is the answer.
        slow: stacks shown to be within the bound that are not shown to be faster.
        nearest: the faster stack that needs the lowest bound, where none is shown; None where no bound would help.
        synthetic: whether all this is of drawn data.
        aside: envelopes of drawn data that were left aside for real ones.
        envelopes: that hold evidence.
        left_out: why arms do not count: reason to number.
        better: what beats the answer, on which axis.
        cannot: what the evidence does not say.
    """

    bound: float
    device: str
    shown: tuple[Candidate, ...]
    likely: tuple[Candidate, ...]
    slow: tuple[Candidate, ...]
    nearest: Candidate | None
    synthetic: bool
    aside: int
    envelopes: int
    left_out: dict[str, int]
    better: tuple[str, ...]
    cannot: tuple[str, ...]

    @property
    def best(self) -> Candidate | None:
        return self.shown[0] if self.shown else None


def recommend(
    records: Iterable[Record], bound: float, device: str | None = None, task: str = "", backbone: str = ""
) -> Answer:
    """The stack to use.

    Args:
        bound: lossy-ness that is accepted, as a fraction.
        device: "cpu", "cuda", ...; None where the records are all of one kind.
        task, backbone: take only records of these; empty: of any.

    Raises:
        InvalidError: there is no valid record.
        UsageError: no record is of that device, task or backbone.
    """
    valid = [record for record in records if record.status == "ok"]
    if not valid:
        raise InvalidError("there is no valid run to recommend from", "make one: effbench run --method METHOD")
    valid, device = _of_device(valid, device)
    for name, wanted in (("task", task), ("backbone", backbone)):
        valid = _of(valid, name, wanted)
    left_out: Counter[str] = Counter()
    by_spec: dict[bool, dict[str, list[Evidence]]] = {False: defaultdict(list), True: defaultdict(list)}
    digests: dict[bool, set[str]] = {False: set(), True: set()}
    for section in sections(valid):
        synthetic = section.envelope.synthetic
        for row in section.rows:
            if row.arm.kind != "method":
                continue
            if reason := _useless(row, section):
                left_out[reason] += 1
                continue
            by_spec[synthetic][row.arm.spec].append(Evidence(row.arm, row.record, section.digest, row.below))
            digests[synthetic].add(section.digest)
    drawn_alone = all(record.envelope.synthetic for record in valid)
    synthetic = not by_spec[False] and (bool(by_spec[True]) or drawn_alone)
    found = [
        Candidate(spec, tuple(sorted(some, key=lambda each: created(each.record), reverse=True)))
        for spec, some in by_spec[synthetic].items()
    ]
    found.sort(key=lambda each: (bool(each.below), -each.slowest.arm.test_speedup.low, each.spec))
    faster = [each for each in found if each.faster]
    shown = [each for each in faster if each.within(bound) == "shown"]
    nearest = min((each for each in faster if each.sure), key=lambda each: each.needs, default=None)
    return Answer(
        bound=bound,
        device=device,
        shown=tuple(shown),
        likely=tuple(each for each in faster if each.within(bound) == "likely"),
        slow=tuple(each for each in found if not each.faster and each.within(bound) == "shown"),
        nearest=None if shown else nearest,
        synthetic=synthetic,
        aside=0 if synthetic else len(digests[True]),
        envelopes=len(digests[synthetic]),
        left_out=dict(left_out),
        better=tuple(_better(shown)) if shown else (),
        cannot=tuple(_cannot(shown[0], found)) if shown else (),
    )


def bound(text: str) -> float:
    """A lossy-ness that is accepted: "1%" and "0.01" are 0.01, "0" is 0.

    Raises:
        UsageError: it is none; a bare 1 could mean 1 % and all of it.
    """
    if re.fullmatch(r"\s*0+(\.0*)?\s*%?\s*", text):
        return 0.0
    try:
        return quantities.share(text)
    except UsageError:
        message = f"--max-lossiness {clean(text, 40)} is not a share from 0 to below 100 %"
        raise UsageError(message, "write 1% or 0.01") from None


def _of_device(records: list[Record], device: str | None) -> tuple[list[Record], str]:
    kinds = sorted({kind_of_device(record.envelope.protocol.device) for record in records})
    if device is None and len(kinds) > 1:
        raise UsageError(f"the runs are of several devices: {_names(kinds)}", f"name one: --device {clean(kinds[0])}")
    wanted = kinds[0] if device is None else kind_of_device(device)
    if wanted not in kinds:
        raise UsageError(
            f"no run is of device {clean(device or '')}; there are runs of {_names(kinds)}",
            f"--device {clean(kinds[0])}",
        )
    return [record for record in records if kind_of_device(record.envelope.protocol.device) == wanted], wanted


def _of(records: list[Record], name: str, wanted: str) -> list[Record]:
    """The records of one task or backbone."""
    there = sorted({getattr(record.envelope, name) for record in records})
    if wanted and wanted not in there:
        near = clean(did_you_mean(wanted, there))
        raise UsageError(f"no run is of {name} {clean(wanted)}{near}", f"there are runs of {_names(there)}")
    return [record for record in records if not wanted or getattr(record.envelope, name) == wanted]


def _names(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(clean(name, 60) for name in names[:NAMED]) + more


def _useless(row: Standing, section: Section) -> str:
    """Why an arm says nothing on speed and quality; empty where it does."""
    arm = row.arm
    metric = arm.metrics.get(row.record.primary_metric)
    if arm.status != "ok":
        return arm.status
    if arm.no_quality:
        return "its quality means nothing"
    if figures.untaught(section.envelope):
        return "random weights"
    if metric is None or metric.lossiness is None:
        return "no lossy-ness, as of a baseline at chance"
    if not in_interval(metric.lossiness):
        return "lossy-ness without an interval"
    if not in_interval(arm.test_speedup) or arm.test_speedup.low <= 0:
        return "speed-up without an interval"
    return ""


def _better(shown: list[Candidate]) -> list[str]:
    """What other stacks that are shown to be within the bound, and the baseline, do better in the same envelope."""
    own = shown[0].slowest
    rivals = [each for other in shown[1:] for each in other.evidence if each.digest == own.digest]
    methods = [each.arm for each in rivals]
    everyone = [*methods, own.record.baseline()]
    same_run = [each.arm for each in rivals if each.record is own.record]  # seconds of two runs do not compare

    def loss(arm: Arm) -> float | None:
        found = arm.metrics.get(own.record.primary_metric)
        return found.lossiness.value if found and found.lossiness else None

    def mebibytes(count: float) -> str:
        return f"{figures.mebibytes(int(count))} MiB"

    found = [
        _less("peak memory", own.arm, everyone, lambda arm: figures.peak(arm.memory), mebibytes),
        _less("weights", own.arm, everyone, lambda arm: arm.weight_bytes or None, mebibytes),
        _less(
            "FLOPs",
            own.arm,
            everyone,
            lambda arm: arm.test_flops.work if arm.test_flops else None,
            lambda count: f"{figures.billions(int(count))} GFLOPs",
        ),
        _less("lossy-ness", own.arm, methods, loss, lambda share: f"{100 * share:+.1f} %"),
        _less("training of its own", own.arm, same_run, _training, lambda s: f"{figures.number(s)} s" if s else "none"),
    ]
    return [each for each in found if each]


def _less(
    name: str,
    own: Arm,
    rivals: list[Arm],
    value: Callable[[Arm], float | None],
    text: Callable[[float], str],
) -> str:
    """The rival with the least of something, where that is less than the arm's own; else empty."""
    mine = value(own)
    there = [(theirs, rival) for rival in rivals if (theirs := value(rival)) is not None]
    if mine is None or not there:
        return ""
    least, rival = min(there, key=lambda pair: pair[0])
    if least >= mine or text(least) == text(mine):
        return ""
    return (
        f"{name}: {'the baseline' if rival.kind == 'baseline' else clean(rival.spec)} {text(least)}, this {text(mine)}"
    )


def _training(arm: Arm) -> float:
    """Seconds of training beyond the baseline's."""
    return arm.train_time.total if arm.train_time and trained_apart(arm) else 0.0


def _cannot(best: Candidate, found: list[Candidate]) -> list[str]:
    """What the evidence does not say.

    Args:
        found: all that it was chosen from.
    """
    said = []
    if best.below:
        beaten = " nor ".join(best.below)
        said.append(f"not shown to beat {beaten} at the same budget: the leaderboard has it below the line")
    mixed = len({(e.record.envelope.task, e.record.envelope.backbone) for each in found for e in each.evidence})
    envelopes = [each.record.envelope for each in best.evidence]
    protocols = [envelope.protocol for envelope in envelopes]
    if envelopes[0].synthetic:
        said.append(
            f"the data are drawn by a program ({clean(envelopes[0].data)}): nothing about quality on real images"
        )
    if any(len(protocol.seeds) < LEAST_SEEDS and protocol.train != "none" for protocol in protocols):
        least = min(len(protocol.seeds) for protocol in protocols if protocol.train != "none")
        seeds = "one seed" if least == 1 else f"{least} seeds"
        said.append(f"trained with {seeds}: how much lossy-ness differs between trainings was not measured")
    where = {(envelope.task, envelope.backbone) for envelope in envelopes}
    if len(where) == 1:
        said.append(f"measured on one task and backbone ({' on '.join(map(clean, where.pop()))}): others may differ")
    if mixed > 1:
        said.append(f"{mixed} tasks and backbones are mixed here: name yours with --task and --backbone")
    machines = {
        f"{clean(each.device_model)}, batch {each.protocol.timing_batch}, {each.protocol.threads} threads, "
        f"{each.protocol.precision}"
        for each in envelopes
    }
    said.append(f"times are of {'; '.join(sorted(machines))}: another machine or batch may gain less, or nothing")
    if len(found) > 1:
        said.append(f"chosen as the fastest of {len(found)} stacks: no interval is corrected for that choice")
    return said
