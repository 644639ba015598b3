import math

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import binom

from effbench import stats
from effbench.errors import InvalidError
from effbench.timing import Stopping


@pytest.mark.parametrize(
    "ratio, verdict",
    [(1.5, "FASTER"), (0.7, "SLOWER"), (1.0, "NO DIFFERENCE"), (1.02, "NO DIFFERENCE")],
)
def test_verdict_of_a_clear_ratio(ratio, verdict):
    noise = 1 + 0.004 * np.sin(np.arange(30))
    got = stats.speedup(noise * ratio, np.ones(30))
    assert got.verdict == verdict and got.low <= got.value <= got.high and got.n == 30


def test_a_wide_interval_is_ambiguous_even_when_the_median_is_large():
    assert stats.speedup([1.2, 0.7] * 10 + [1.2] * 4, np.ones(24)).verdict == "AMBIGUOUS"


def test_a_tiny_but_certain_gain_is_not_faster():
    got = stats.speedup(np.full(30, 1.01), np.ones(30))
    assert got.low > 1 and got.verdict == "NO DIFFERENCE"


def test_speedup_and_slowdown_are_symmetric():
    a, b = np.random.default_rng(0).lognormal(0, 0.1, (2, 31))
    forward, back = stats.speedup(1.5 * a, b), stats.speedup(b, 1.5 * a)
    assert forward.low == pytest.approx(1 / back.high) and (forward.verdict, back.verdict) == ("FASTER", "SLOWER")


def test_a_verdict_needs_more_certainty_than_the_interval():
    ratios = np.r_[np.full(9, 0.99), np.full(21, 1.2)]  # 9 of 30 below 1: within 95 %, not within 99 %
    got = stats.speedup(ratios, np.ones(30))
    assert got.low > 1 and got.verdict == "AMBIGUOUS"
    assert stats.speedup(np.r_[np.full(7, 0.99), np.full(23, 1.2)], np.ones(30)).verdict == "FASTER"
    assert stats.speedup(np.full(7, 2.0), np.ones(7)).verdict == "AMBIGUOUS"
    assert stats.speedup(np.full(8, 2.0), np.ones(8)).verdict == "FASTER"


def test_five_pairs_are_too_few_and_six_take_the_extremes():
    few = stats.speedup([2.0] * 5, [1.0] * 5)
    assert few.verdict == "TOO FEW SAMPLES" and few.low is None and few.value == 2
    six = stats.speedup([1, 2, 3, 4, 5, 6], [1.0] * 6)
    assert (six.low, six.high) == (1, 6)


@pytest.mark.parametrize("n", [6, 7, 20, 30, 101])
def test_interval_is_the_narrowest_that_covers(n):
    got = stats.speedup(np.arange(1, n + 1), np.ones(n))
    k = int(got.low)
    assert got.high == n + 1 - k
    assert 1 - 2 * binom.cdf(k - 1, n, 0.5) >= 0.95 > 1 - 2 * binom.cdf(k, n, 0.5)


def test_interval_covers_the_true_median():
    rng = np.random.default_rng(1)
    hits = [
        (s := stats.speedup(rng.lognormal(0.2, 0.1, 30), np.ones(30))).low <= math.exp(0.2) <= s.high
        for _ in range(400)
    ]
    assert np.mean(hits) >= 0.93


@pytest.mark.parametrize("times", [[], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]])
def test_impossible_times_are_refused(times):
    with pytest.raises(InvalidError):
        stats.speedup(times, np.ones(len(times)))
    with pytest.raises(InvalidError):
        stats.speedup([1.0], [1.0, 2.0])


# What shared machines do to step times (logarithms): ticks with heavy tails, a drift over seconds, load that comes in
# bursts of some eight steps, and a price for the place within a pair. Seeds here were not used to choose anything.
NOISE = {
    "quiet": dict(tick=0.01),
    "heavy tails": dict(tick=0.02),
    "drift": dict(tick=0.015, drift=0.2),
    "place": dict(tick=0.02, place=0.015),
    "bursts": dict(tick=0.02, bursts=0.1),
    "all": dict(tick=0.02, drift=0.1, place=0.01, bursts=0.1),
}
TRIALS = 1000


def simulated(rng, pairs, true, tick, drift=0.0, place=0.0, bursts=0.0):
    """Step seconds of baseline and arm in alternating order, each (TRIALS, pairs); `true` is the arm's speed-up."""
    steps = 2 * pairs
    log = tick * rng.standard_t(3, (TRIALS, steps))
    log += drift * lfilter([math.sqrt(1 - 0.99**2)], [1, -0.99], rng.standard_normal((TRIALS, steps)))
    starts = rng.random((TRIALS, steps)) < bursts / 8
    loaded = lfilter(np.ones(8), 1, starts) > 0
    log += loaded * np.abs(rng.normal(0.4, 0.2, (TRIALS, steps)))
    log = log.reshape(TRIALS, pairs, 2) + [0, place]
    log[:, 1::2] = log[:, 1::2, ::-1]
    seconds = 0.02 * np.exp(log)
    return seconds[..., 0], seconds[..., 1] / true


@pytest.mark.parametrize("noise", NOISE)
def test_intervals_of_thirty_pairs_cover_and_give_no_false_alarm(noise):
    baseline, arm = simulated(np.random.default_rng(101), 30, 1.0, **NOISE[noise])
    found = [stats.speedup(a, b) for a, b in zip(baseline, arm, strict=True)]
    assert 0.93 <= np.mean([each.low <= 1 <= each.high for each in found]) <= 0.98
    assert np.mean([each.verdict in ("FASTER", "SLOWER") for each in found]) <= 0.01


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("true", [1.0, 1 / 1.05])
def test_they_still_do_where_timing_goes_on_until_they_are_narrow(noise, true):
    stopping = Stopping(pairs=30, until=0.015, budget=1e9)
    baseline, arm = simulated(np.random.default_rng(202), 200, true, **NOISE[noise])
    found = []
    for a, b in zip(baseline, arm, strict=True):
        n = next((n for n in range(30, 200, 10) if stopping.over(n, 0.0, (a[:n], b[:n]))), 200)
        found.append(stats.speedup(a[:n], b[:n]))
    assert 0.93 <= np.mean([each.low <= true <= each.high for each in found]) <= 0.98
    called = np.mean([each.verdict == "SLOWER" for each in found])
    assert called <= 0.01 if true == 1 else called >= 0.95


def test_a_price_for_the_place_in_a_pair_widens_the_interval_and_never_misleads():
    baseline, arm = simulated(np.random.default_rng(303), 31, 1.0, tick=0.02, place=0.1)
    found = [stats.speedup(a, b) for a, b in zip(baseline, arm, strict=True)]
    assert {each.verdict for each in found} == {"AMBIGUOUS"}
