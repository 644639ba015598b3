"""Strengths from paired comparisons with ties: a Bradley-Terry model, with intervals by a bootstrap over clusters.

Davidson's extension to ties (R. R. Davidson, "On extending the Bradley-Terry model to accommodate ties in paired
comparison experiments", JASA 65, 1970): with d the difference of two arms' log-strengths,

    P(first wins) : P(tie) : P(second wins)  =  exp(d / 2) : exp(delta) : exp(-d / 2)

so that ties are likeliest between equals, and d is the log-odds of a win where there is no tie. One delta holds for all
pairs. The logarithm of the likelihood is concave, so there is one maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse, stats
from scipy.sparse.csgraph import connected_components

#: Standard deviation of the normal prior of every log-strength around the mean of all, the anchor's among them, and of
#: delta around 0. Around the mean, so that no arm is special: another anchor moves all values alike. It keeps an arm
#: finite that never lost: two arms are 1.2 (3 : 1) apart after one win, 3.0 after ten.
PRIOR = 2**0.5
LEAST_CLUSTERS = 2  # an arm in fewer gets no interval
DRAWS = 1000
CHUNK = 4_000_000  # numbers per array that are held at once (32 MiB)
SMALL = 1e-7  # of a gradient
STEPS = 40


@dataclass(frozen=True)
class Strengths:
    """What came out, each `(arms,)`; arm 0 is the anchor, at 0.

    Args:
        value: natural log-odds of a win over the anchor, ties left out; NaN for arms that are not connected.
        low, high: its 95 % interval; NaN where the arm is in fewer than LEAST_CLUSTERS clusters, infinite where the
            data give no end.
        connected: whether an arm was compared with the anchor, directly or through others.
        clusters: how many clusters hold a comparison of the arm.
        delta: of the ties.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    connected: np.ndarray
    clusters: np.ndarray
    delta: float


def strengths(
    first: np.ndarray,
    second: np.ndarray,
    outcome: np.ndarray,
    cluster: np.ndarray,
    weight: np.ndarray | None = None,
    arms: int = 0,
    draws: int = DRAWS,
    seed: int = 0,
) -> Strengths:
    """Fit the model, with a 95 % interval of every strength.

    Comparisons of one cluster (the same data and backbone) share their luck, so the bootstrap draws whole clusters,
    with replacement. The interval is value +- t sqrt(k / (k - 1)) x the standard deviation of the draws in which the
    arm is connected with the anchor, with k the number of clusters that hold the arm and t of k - 1 degrees of freedom:
    percentiles of few clusters are too narrow (T. Hesterberg, arXiv:1411.5279). It is never narrower than 1.96 of the
    model's own standard errors, so that two clusters that happen to agree give no certainty. In simulations of six arms
    whose luck in a cluster is shared by all their comparisons there, it covered 97 to 100 % with 2 to 12 clusters;
    percentiles covered 70 % with 3 and 93 % with 20. Where an arm won (or lost) every comparison, the data give no
    upper (or no lower) end.

    Args:
        first, second: indices of the two arms, `(n,)`; 0 is the anchor.
        outcome: 1 where the first won, 0 for a tie, -1 where the second won.
        cluster: index of the cluster of each comparison.
        weight: how much each counts; 1 where it is None.
        arms: how many there are; where it is 0, up to the largest index.
        draws, seed: of the bootstrap. The same seed gives the same intervals, whatever order comparisons come in.

    Raises:
        ValueError: an arm is compared with itself, an outcome is none of the three, or lengths differ.
    """
    first, second, outcome, cluster = (np.asarray(each, int).ravel() for each in (first, second, outcome, cluster))
    weight = np.ones(len(first)) if weight is None else np.asarray(weight, float).ravel()
    if len({len(each) for each in (first, second, outcome, cluster, weight)}) > 1:
        raise ValueError("every comparison needs two arms, an outcome, a cluster and a weight")
    if (first == second).any() or not np.isin(outcome, (-1, 0, 1)).all():
        raise ValueError("a comparison is of two different arms, and is won, tied or lost")
    arms = arms or int(max(first.max(initial=0), second.max(initial=0))) + 1
    if not len(first):
        nothing, anchor = np.full(arms, np.nan), np.arange(arms) == 0
        return Strengths(np.where(anchor, 0.0, np.nan), nothing, nothing, anchor, np.zeros(arms, int), 0.0)

    low, high = np.minimum(first, second), np.maximum(first, second)
    pairs, pair = np.unique(low * arms + high, return_inverse=True)
    ends = np.divmod(pairs, arms)
    result = 1 - outcome * np.where(first == low, 1, -1)  # 0: the lower index won, 1: a tie, 2: it lost
    _, cluster = np.unique(cluster, return_inverse=True)
    count = int(cluster.max()) + 1
    table = sparse.csr_array((weight, (cluster, result * len(pairs) + pair)), shape=(count, 3 * len(pairs)))
    held = np.zeros((count, arms), bool)
    held[cluster, first] = held[cluster, second] = True
    clusters = held.sum(axis=0)

    whole = np.ones((1, count)) @ table
    connected = _connected(whole, ends, arms)[0]
    best = _fit(whole, ends, arms)
    value = np.where(connected, np.r_[0.0, best[:-1]], np.nan)

    random = np.random.default_rng(seed)
    drawn = random.multinomial(count, np.full(count, 1 / count), size=draws)
    drawn, back = np.unique(drawn, axis=0, return_inverse=True)  # with few clusters there are few different draws
    rows = max(1, CHUNK // (3 * len(pairs) + arms * arms))
    parts = [_refit(drawn[k : k + rows] @ table, ends, arms, best) for k in range(0, len(drawn), rows)]
    found = np.concatenate(parts)[back.ravel()]
    curvature = _posterior(best[None], whole, ends)[2][0]
    error = np.r_[0.0, np.sqrt(np.diag(np.linalg.inv(-curvature)))[:-1]]
    width = np.maximum(_widths(found, clusters), stats.norm.ppf(0.975) * error)
    width[0] = 0.0
    won, lost = (_points(whole, ends, arms, places) for places in ((0, 2), (2, 0)))
    tied = _points(whole, ends, arms, (1, 1))
    some = np.isfinite(value) & np.isfinite(width) & (np.arange(arms) > 0)
    top = np.where(some & (lost + tied == 0), np.inf, value + width)
    bottom = np.where(some & (won + tied == 0), -np.inf, value - width)
    return Strengths(value, bottom, top, connected, clusters, float(best[-1]))


def _widths(draws: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Half the width of each arm's interval, `(arms,)`.

    Args:
        draws: `(draws, arms)`; NaN where an arm is not connected.
    """
    width = np.full(len(clusters), np.nan)
    for arm in np.flatnonzero(clusters >= LEAST_CLUSTERS):
        there, k = draws[~np.isnan(draws[:, arm]), arm], clusters[arm]
        if len(there):
            width[arm] = stats.t.ppf(0.975, k - 1) * np.sqrt(k / (k - 1)) * there.std()
    return width


def _points(counts: np.ndarray, ends: tuple[np.ndarray, np.ndarray], arms: int, places: tuple[int, int]) -> np.ndarray:
    """Sum of one outcome by arm, `(arms,)`.

    Args:
        counts: `(1, 3 x pairs)`. places: which third of it is that outcome for the lower and for the higher index.
    """
    thirds = counts.reshape(3, -1)
    return sum(np.bincount(end, thirds[place], arms) for end, place in zip(ends, places, strict=True))


def _connected(counts: np.ndarray, ends: tuple[np.ndarray, np.ndarray], arms: int) -> np.ndarray:
    """Which arms are connected with arm 0.

    Args:
        counts: `(draws, 3 x pairs)`.

    Returns:
        Truth values, `(draws, arms)`.
    """
    draw, pair = np.nonzero(counts.reshape(len(counts), 3, -1).sum(axis=1))
    nodes = len(counts) * arms  # of one graph that holds those of all draws
    one, other = (draw * arms + end[pair] for end in ends)
    graph = sparse.coo_array((np.ones(len(draw), np.int8), (one, other)), shape=(nodes, nodes))
    label = connected_components(graph, directed=False)[1].reshape(len(counts), arms)
    return label == label[:, :1]


def _fit(counts: np.ndarray, ends: tuple[np.ndarray, np.ndarray], arms: int) -> np.ndarray:
    """The maximum, `(arms,)`: log-strengths of all arms but the anchor, then delta."""

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient, _ = _posterior(x[None], counts, ends, hessian=False)
        return -value[0], -gradient[0]

    def curvature(x: np.ndarray) -> np.ndarray:
        return -_posterior(x[None], counts, ends)[2][0]

    options = dict(gtol=SMALL)
    return optimize.minimize(loss, np.zeros(arms), jac=True, hess=curvature, method="trust-exact", options=options).x


def _refit(counts: np.ndarray, ends: tuple[np.ndarray, np.ndarray], arms: int, start: np.ndarray) -> np.ndarray:
    """Log-strengths of many draws at once, `(draws, arms)`: Newton's steps from `start`; NaN where not connected."""
    x = np.repeat(start[None], len(counts), axis=0)
    open_ = np.arange(len(counts))
    for _ in range(STEPS):
        _, gradient, hessian = _posterior(x[open_], counts[open_], ends)
        step = np.linalg.solve(-hessian, gradient[..., None])[..., 0]
        x[open_] += step / np.maximum(1, np.abs(step).max(axis=1, keepdims=True) / 2)
        open_ = open_[np.abs(gradient).max(axis=1) > SMALL]
        if not len(open_):
            break
    for draw in open_:  # what the steps did not bring there
        x[draw] = _fit(counts[draw : draw + 1], ends, arms)
    found = np.concatenate([np.zeros((len(x), 1)), x[:, :-1]], axis=1)
    return np.where(_connected(counts, ends, arms), found, np.nan)


def _posterior(
    x: np.ndarray, counts: np.ndarray, ends: tuple[np.ndarray, np.ndarray], hessian: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Logarithm of the posterior, its gradient and second derivatives, for each draw.

    Args:
        x: `(draws, arms)`, as `_fit` gives it. counts: `(draws, 3 x pairs)`: wins, ties, losses of the lower index.

    Returns:
        `(draws,)`, `(draws, arms)` and `(draws, arms, arms)`.
    """
    one, other = ends
    draws, arms = x.shape
    wins, ties, losses = np.split(counts, 3, axis=1)
    total = wins + ties + losses
    theta = np.concatenate([np.zeros((draws, 1)), x[:, :-1]], axis=1)
    half = (theta[:, one] - theta[:, other]) / 2
    delta = np.broadcast_to(x[:, -1:], half.shape)
    log_sum = np.logaddexp(np.logaddexp(half, -half), delta)
    win, tie, loss = np.exp(half - log_sum), np.exp(delta - log_sum), np.exp(-half - log_sum)

    value = (wins * half - losses * half + ties * delta - total * log_sum).sum(axis=1)
    centred = theta - theta.mean(axis=1, keepdims=True)
    value -= ((centred**2).sum(axis=1) + x[:, -1] ** 2) / (2 * PRIOR**2)
    slope = (wins - losses - total * (win - loss)) / 2
    numbers = np.arange(len(one))
    incidence = sparse.csr_array(
        (np.r_[np.ones(len(one)), -np.ones(len(one))], (np.r_[numbers, numbers], np.r_[one, other])),
        shape=(len(one), arms),
    )
    gradient = np.empty_like(x)
    gradient[:, :-1] = (slope @ incidence)[:, 1:]
    gradient[:, -1] = (ties - total * tie).sum(axis=1)
    gradient -= np.concatenate([centred[:, 1:], x[:, -1:]], axis=1) / PRIOR**2
    if not hessian:
        return value, gradient, None

    bend = total * ((win + loss) - (win - loss) ** 2) / 4
    full = np.zeros((draws, arms, arms))
    full[:, one, other] = full[:, other, one] = bend
    diagonal = np.arange(arms)
    full[:, diagonal, diagonal] = -full.sum(axis=2)
    second = np.zeros((draws, arms, arms))
    second[:, :-1, :-1] = full[:, 1:, 1:]
    cross = (total * tie * (win - loss) / 2) @ incidence
    second[:, :-1, -1] = second[:, -1, :-1] = cross[:, 1:]
    second[:, -1, -1] = -(total * tie * (1 - tie)).sum(axis=1)
    second[:, diagonal, diagonal] -= 1 / PRIOR**2
    second[:, :-1, :-1] += 1 / (arms * PRIOR**2)  # of the mean, which every strength moves
    return value, gradient, second
