"""Ratings across tasks and backbones, with the dense baseline at 0: of quality, and of quality at an equal latency.

What makes two arms of two envelopes the same is their canonical spec, parameters included. `bouts` says who beats whom
within an envelope, `effbench.bradley_terry` makes strengths of it. They are shown on Elo's scale, 400 log10 of the odds
of a win over the baseline where it is no tie: +100 are odds of 1.8 : 1, +400 of 10 : 1.

The m (m - 1) / 2 pairs of an envelope of m arms hold no more than about m - 1 independent comparisons, so each counts
2 / m; where several envelopes of one cluster (the same task, data and backbone) hold a pair, they share its weight, so
that what was run again with other settings does not count as another task.

Only arms that were compared in two clusters or more are rated: what is known of one task and backbone stands in that
envelope's own table. Drawn data are never rated with real ones, nor one kind of device with another.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effbench.report import figures
from effbench.report.bouts import BASELINE, NONE, Bout, bout
from effbench.report.markdown import escape, table
from effbench.report.standings import Section

if TYPE_CHECKING:
    import numpy as np

ELO = 400 / 2.302585092994046  # points of one unit of natural log-odds
LEAST = 2  # clusters that an arm is rated from
MOST = 50  # arms that are rated, those in most clusters
DRAWS = 400  # of the bootstrap; the standard deviation of so many is known to 3.5 %
LONG = 12  # rows beyond which controls are folded away
AXES = ("quality", "latency")


@dataclass(frozen=True)
class Rating:
    """A rating in points of Elo's scale; None where there is none, infinite ends where the data give none.

    Args:
        won, tied, lost: comparisons, one per envelope and opponent.
        clusters: that hold one of them.
        why: why there is no rating.
    """

    value: float | None
    low: float | None
    high: float | None
    won: int = 0
    tied: int = 0
    lost: int = 0
    clusters: int = 0
    why: str = ""


@dataclass(frozen=True)
class Rated:
    """An arm: its spec, what kind of control it is ("" of a method), and its two ratings."""

    spec: str
    control: str
    quality: Rating
    latency: Rating


@dataclass(frozen=True)
class Ratings:
    """Of one kind of data and device.

    Args:
        rated: the baseline and the arms in two clusters or more, the best first: at an equal latency, then in quality.
        single: how many arms were compared in one cluster only.
        left_out: how many more there were than are rated.
        clusters: task, data and backbone of each.
        envelopes: how many there are.
    """

    synthetic: bool
    device: str
    rated: tuple[Rated, ...]
    single: int
    left_out: int
    clusters: tuple[tuple[str, str, str], ...]
    envelopes: int


class Collected:
    """Envelopes, put together while they pass by: only their outcomes are kept."""

    def __init__(self) -> None:
        self.groups: dict[tuple[bool, str], list[Bout]] = defaultdict(list)

    def add(self, section: Section) -> None:
        if found := bout(section):
            self.groups[found.synthetic, found.device].append(found)

    def ratings(self) -> list[Ratings]:
        """Real data before drawn ones."""
        return [_ratings(synthetic, device, bouts) for (synthetic, device), bouts in sorted(self.groups.items())]

    def markdown(self) -> str:
        """The leaderboard's section; nothing where no arm was compared in two clusters."""
        found = self.ratings()
        if not any(each.rated for each in found):
            return ""
        return "\n\n".join(["## Ratings across tasks and backbones", READING, *map(_text, found)]) + "\n"


READING = (
    "Odds of a win over the dense baseline, which stands at 0: +100 are 1.8 : 1, +400 are 10 : 1 (Bradley-Terry with "
    "Davidson's ties). **Quality**: who is shown to lose less, at whatever speed. **At equal latency**: who is shown "
    "to be better in quality or speed and in neither worse; against the baseline on an image so small that it is as "
    "fast. Ties are what could not be told apart. [95 % interval]: over tasks and backbones; of two or three of them "
    "it says little."
)


def _ratings(synthetic: bool, device: str, bouts: list[Bout]) -> Ratings:
    clusters: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    for each in bouts:
        for spec in each.arms:
            clusters[spec].add(each.cluster)
    several = [spec for spec, found in clusters.items() if spec != BASELINE and len(found) >= LEAST]
    several.sort(key=lambda spec: (-len(clusters[spec]), spec))
    arms = {spec: k for k, spec in enumerate([BASELINE, *sorted(several[:MOST])])}
    found = {axis: _rate(bouts, axis, arms) for axis in AXES} if len(arms) > 1 else {}
    method = {spec for each in bouts for spec in each.arms if spec not in each.controls}
    control = {spec: kind for each in bouts for spec, kind in each.controls.items() if spec not in method}
    rated = [
        Rated(spec, control.get(spec, ""), found["quality"][k], found["latency"][k])
        for spec, k in arms.items()
        if found
    ]
    return Ratings(
        synthetic=synthetic,
        device=device,
        rated=tuple(sorted(rated, key=_place)),
        single=len(clusters) - 1 - len(several),
        left_out=len(several[MOST:]) + sum(each.left_out for each in bouts),
        clusters=tuple(sorted({each.cluster for each in bouts})),
        envelopes=len(bouts),
    )


def _place(rated: Rated) -> tuple:
    values = [rated.latency.value, rated.quality.value]
    return *((value is None, -(value or 0)) for value in values), rated.spec


def _rate(bouts: list[Bout], axis: str, arms: dict[str, int]) -> list[Rating]:
    """The ratings of some arms, in their order."""
    import numpy as np

    from effbench.bradley_terry import strengths

    places = {cluster: k for k, cluster in enumerate(sorted({each.cluster for each in bouts}))}
    parts = [_pairs(each, getattr(each, axis), arms, places[each.cluster]) for each in bouts]
    first, second, outcome, cluster, weight = (np.concatenate([part[k] for part in parts]) for k in range(5))
    pair = (cluster * len(arms) + first) * len(arms) + second
    _, back, shared = np.unique(pair, return_inverse=True, return_counts=True)
    found = strengths(first, second, outcome, cluster, weight / shared[back.ravel()], len(arms), DRAWS)
    count = {
        result: np.bincount(
            np.r_[first[outcome == result], second[outcome == -result]].astype(int), minlength=len(arms)
        )
        for result in (1, 0, -1)
    }
    reference = {arms[spec] for each in bouts for spec in each.reference if spec in arms}
    ratings = []
    for k in range(len(arms)):
        enough = k == 0 or found.clusters[k] >= LEAST
        three = found.value[k], found.low[k], found.high[k]
        value, low, high = (float(ELO * x) if enough and not np.isnan(x) else None for x in three)
        counts = [int(count[result][k]) for result in (1, 0, -1)]
        why = ""
        if value is None:
            why = "is the reference" if axis == "latency" and k in reference else "compared with nothing"
            if any(counts):
                one = "compared in one combination of task, data and backbone only"
                why = "never compared with the baseline, directly or through others" if enough else one
        ratings.append(Rating(value, low, high, *counts, int(found.clusters[k]), why))
    return ratings


def _pairs(bout: Bout, outcome: np.ndarray, arms: dict[str, int], cluster: int) -> tuple[np.ndarray, ...]:
    """First arm, second arm, outcome, cluster and weight of each pair of an envelope that is compared."""
    import numpy as np

    place = np.array([arms.get(spec, -1) for spec in bout.arms])
    held = np.flatnonzero(place >= 0)
    held = held[np.argsort(place[held])]
    outcome = outcome[np.ix_(held, held)]
    first, second = np.nonzero(np.triu(outcome != NONE, 1))
    weight = np.full(len(first), 2 / max(2, len(held)))
    place = place[held]
    return place[first], place[second], outcome[first, second].astype(int), np.full(len(first), cluster), weight


def _text(ratings: Ratings) -> str:
    """One table under what it is of."""
    data = "drawn data" if ratings.synthetic else "real data"
    of = f"{_count(len(ratings.clusters), 'combination')} of task, data and backbone"
    heading = f"**On {data}, {escape(ratings.device)}**: {_count(ratings.envelopes, 'envelope')}, {of}"
    single = f"{_count(ratings.single, 'arm')} of one combination only stand in its table above and are not rated."
    notes = [single] if ratings.single else []
    if ratings.left_out:
        notes.append(f"{_count(ratings.left_out, 'arm')} more were left out: at most {MOST} are rated.")
    if not ratings.rated:
        return f"{heading}. No rating: no arm was compared in two of them. {' '.join(notes)}".rstrip()
    shown = [each for each in ratings.rated if not each.control]
    others = [each for each in ratings.rated if each.control]
    if len(ratings.rated) <= LONG:
        shown, others = list(ratings.rated), []
    parts = [heading, _table(shown)]
    if others:
        title = f"Ratings of {_count(len(others), 'control')}"
        parts.append(f"<details><summary>{title}</summary>\n\n{_table(others)}\n\n</details>")
    if any("reference" in each.latency.why for each in ratings.rated):
        notes.insert(0, "The sizes of `resize` are the reference at equal latency.")
    return "\n\n".join([*parts, " ".join(notes)]).rstrip()


def _table(rated: list[Rated]) -> str:
    header = ["arm", "at equal latency", "won-tied-lost", "quality", "won-tied-lost", "combinations"]
    return table(header, [_cells(each) for each in rated])


def _cells(each: Rated) -> list[str]:
    if each.spec == BASELINE:
        name = "**dense baseline**"
    else:
        role = figures.CONTROLS.get(each.control) or each.control
        name = escape(f"control ({role}) · {each.spec}" if each.control else each.spec)
    most = max(each.quality.clusters, each.latency.clusters)
    cells = [cell for rating in (each.latency, each.quality) for cell in (points(rating), record(rating))]
    return [name, *cells, str(most)]


def points(rating: Rating) -> str:
    """`+120 [+40, +200]`; `∞` where the data give no end."""
    if rating.value is None:
        return figures.NONE
    text = f"{round(rating.value):+d}" if round(rating.value) else "0"
    if rating.low is None or rating.high is None or rating.low == rating.high:
        return text
    low, high = ("∞" if abs(x) == float("inf") else f"{x:+.0f}" for x in (rating.low, rating.high))
    return f"{text} [{'-' * (low == '∞')}{low}, {high}]"


def record(rating: Rating) -> str:
    """`3-10-2`: comparisons won, tied and lost."""
    return f"{rating.won}-{rating.tied}-{rating.lost}" if rating.won + rating.tied + rating.lost else figures.NONE


def _count(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"
