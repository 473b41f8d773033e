"""Sequential certification: exact error probabilities of every rule, what stops when, and what it saves."""

from __future__ import annotations

import importlib
import itertools
import math
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import special, stats

from conftest import shared_data
from csam import sequential
from csam.sequential import METHODS, Exact, Pilot, Prediction, Rule, geometric_looks, rule
from csam.smoothing import certified_radius, lower_confidence_bound

SEQUENTIAL = [m for m in METHODS if m != "fixed"]
MODES = [{}, {"rtol": 0.2}, {"target_radius": 0.25}, {"target_radius": 0.1, "rtol": 0.2}]
TIGHT = {"fixed": 0.9, "exact": 0.9, "pilot": 0.5, "spending": 0.1, "mixture": 0.002}  # shares of alpha that are used
N, SIGMA = 250, 0.25


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "bench")
    yield importlib.import_module("bench_sequential")
    sys.modules.pop("bench_sequential")


def outcomes(made: Rule, p: float) -> list[tuple[int, int, int, float]]:
    """(look, count at the first look, count, probability) of the ways to stop, by the plainest recursion.

    Paths are told apart by their first count only for the pilot, the one rule that remembers it.
    """
    found = []
    for start in range(made.looks[0] + 1) if isinstance(made, Pilot) else [-1]:
        alive = stats.binom.pmf(np.arange(made.looks[0] + 1), made.looks[0], p)
        if start >= 0:
            alive = np.where(np.arange(len(alive)) == start, alive, 0)
        for k, look in enumerate(made.looks):
            if k:
                step = look - made.looks[k - 1]
                alive = np.convolve(alive, stats.binom.pmf(np.arange(step + 1), step, p))
            counts = np.arange(look + 1)
            history = np.stack([np.full(look + 1, start), *[counts] * k], 1) if start >= 0 and k else counts[:, None]
            history = history if history.shape[1] == k + 1 else np.stack([counts] * (k + 1), 1)
            stop = made.settled(k, history) if k < len(made.looks) - 1 else np.ones(look + 1, bool)
            found += [(k, start, int(c), float(alive[c])) for c in np.flatnonzero(stop & (alive > 1e-12))]
            alive = np.where(stop, 0, alive)
    return found


def bound(made: Rule, k: int, start: int, count: int) -> float:
    return made.bound([start if start >= 0 else count, *[count] * k] if k else [count])


def error(made: Rule, p: float) -> float:
    """Probability that the bound at the stop lies above p, but for outcomes of probability 1e-12 or less."""
    return math.fsum(chance for *where, chance in outcomes(made, p) if bound(made, *where) > p)


@cache
def small(method: str, mode: int, alpha: float) -> Rule:
    return rule(N, alpha, SIGMA, method=method, **MODES[mode])


# Soundness


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("mode", range(len(MODES)), ids=str)
@pytest.mark.parametrize("method", list(METHODS))
def test_the_bound_is_too_high_with_probability_at_most_alpha(method: str, mode: int, alpha: float) -> None:
    """Exact, at probabilities just below a bound, where the error is largest."""
    made = small(method, mode, alpha)
    bounds = sorted({bound(made, *where) for p in (0.5, 0.9) for *where, chance in outcomes(made, p) if chance > 1e-4})
    points = [b - 1e-12 for b in bounds if b > 0.1]
    errors = [error(made, p) for p in points[:: max(1, len(points) // 8)] + points[-1:]]
    assert max(errors) <= alpha
    assert max(errors) > alpha * TIGHT[method]


def errors(bench: ModuleType, made: Rule, distances: Sequence[float], trials: int = 2000) -> float:
    """p-value, under errors with probability alpha, of those made by certifying a linear classifier on drawn votes.

    10 votes choose the class; p_A = Phi(distance / sigma) in closed form. An error is another class, or a radius beyond
    the distance.
    """
    wrong, rng = 0, np.random.default_rng(0)
    for distance in distances:
        p = stats.norm.cdf(distance / SIGMA)
        right = rng.binomial(10, p, trials) >= 5
        steps = rng.binomial(np.diff((0, *made.looks)), np.where(right, p, 1 - p)[:, None])
        counts = np.cumsum(steps, 1)
        at = bench.stopped(made, counts)
        radii = bench.radii(made, counts, at)
        wrong += int(((radii > 0) & (~right | (radii > distance))).sum())
    return stats.binomtest(wrong, len(distances) * trials, made.alpha, alternative="greater").pvalue


@pytest.mark.parametrize("mode", range(len(MODES)), ids=str)
@pytest.mark.parametrize("method", list(METHODS))
def test_linear_classifier_is_certified_within_its_distance(bench: ModuleType, method: str, mode: int) -> None:
    made = rule(500, 0.05, SIGMA, method=method, **MODES[mode])
    assert errors(bench, made, (0.0, 0.02, 0.0999, 0.2, 0.2499)) > 1e-3


def test_repetitions_convict_naive_peeking(bench: ModuleType) -> None:
    assert errors(bench, Peeking(500, 0.05, SIGMA, target_radius=0.25), [0.2499]) < 1e-12


def certify(made: Rule, counts: Sequence[int]) -> sequential.Decision:
    for k in range(len(counts)):
        decision = made.decide(counts[: k + 1])
        if decision is not None:
            return decision
    raise AssertionError("the last look must decide")


class Peeking(sequential.Spending):
    """What is not sound: the fixed bound at every look, as if it were the only one."""

    growth = sequential.GROWTH

    def _level(self, k: int) -> float:
        return self.alpha


class Reuse(Pilot):
    """What is not sound: the pilot's votes in the bound, as if their number had not been chosen by them."""

    def bound(self, counts: Sequence[int]) -> float:
        return sequential.clopper_pearson(counts[-1], self.looks[len(counts) - 1], self.alpha)


def test_naive_peeking_errs_five_times_as_often() -> None:
    made = Peeking(2000, 0.001, SIGMA, target_radius=0.25)
    assert error(made, made._p_wanted - 1e-12) > 5 * made.alpha


def test_counting_the_pilot_would_err_too_often() -> None:
    for p in (0.55, 0.6):
        assert error(Reuse(1000, 0.05, SIGMA, rtol=0.2), p) > 0.05 * 1.05
        assert error(Pilot(1000, 0.05, SIGMA, rtol=0.2), p) <= 0.05


@pytest.mark.parametrize("method", list(METHODS))
def test_the_least_alpha_has_bounds(method: str) -> None:
    made = rule(N, sequential.LEAST, SIGMA, method=method, rtol=None if method == "fixed" else 0.2)
    decision = certify(made, made.looks)
    assert decision.p_lower == pytest.approx(sequential.LEAST ** (1 / decision.samples), rel=0.05)


@pytest.mark.parametrize("n", [10**8, 10**9, 10**10])
@pytest.mark.parametrize("alpha", [1e-3, 1e-12])
def test_bounds_of_few_votes_are_those_of_a_poisson_count(n: int, alpha: float) -> None:
    """Where the quantiles of a beta distribution are hard to compute."""
    assert lower_confidence_bound(1000, n, alpha) == pytest.approx(special.gammaincinv(1000, alpha) / n, rel=2e-5)
    with pytest.raises(ValueError, match=r"n must be .*10000000000"):
        rule(10**10 + 1, alpha, 0.25, adaptive=False)


def test_a_bound_that_is_no_number_abstains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "clopper_pearson", lambda *_: math.nan)
    assert rule(5, 0.1, SIGMA, adaptive=False).decide([5]).radius is None
    assert certified_radius(5, 5, SIGMA, 0.1) is None


# The exact rule


@pytest.mark.parametrize("count", [0, 1, 30, 80, 99])
def test_one_look_gives_clopper_and_pearson(count: int) -> None:
    made = Exact(99, 0.01, SIGMA)
    assert made.looks == (99,)
    assert made.bound([count]) == pytest.approx(lower_confidence_bound(count, 99, 0.01), rel=1e-6)
    assert made.bound([count]) <= lower_confidence_bound(count, 99, 0.01)


@pytest.mark.parametrize("mode", range(len(MODES)), ids=str)
def test_the_exact_bound_is_the_root_of_its_p_value(mode: int) -> None:
    made = small("exact", mode, 0.05)
    for k, _, count, chance in outcomes(made, 0.8):
        if chance > 2e-2:
            root, look = made.bound([count] * (k + 1)), made.looks[k]

            def p_value(q: float, count: int = count, look: int = look) -> float:
                return math.fsum(w for j, _, c, w in outcomes(made, q) if c * look >= count * made.looks[j])

            at = p_value(root)
            assert at <= 0.05
            if not (made.target_radius and root == made._p_wanted):
                assert at == pytest.approx(0.05, rel=1e-4)
            assert p_value(root - 0.01) < at < p_value(root + 0.01)


def test_votes_only_lose_nothing_to_the_looks() -> None:
    made = rule(100_000, 0.001, SIGMA, rtol=0.05)
    decision = certify(made, made.looks)
    assert decision.p_lower == pytest.approx(0.001 ** (1 / decision.samples), rel=1e-9)
    assert decision.radius >= 0.95 * certified_radius(100_000, 100_000, SIGMA, 0.001)
    assert decision.samples < 60_000


# Rules


def test_a_pilot_that_is_all_there_is_counts() -> None:
    made = rule(1000, 0.001, SIGMA, method="pilot", tile=1000)
    assert made.looks == (1000,)
    for count in (0, 700, 1000):
        assert made.decide([count]) == rule(1000, 0.001, SIGMA, method="fixed").decide([count])


def test_the_fixed_rule_is_cohens() -> None:
    for count in (0, 40, 70, 100):
        decision = rule(100, 0.001, SIGMA, method="fixed").decide([count])
        assert (decision.radius, decision.samples, decision.reason) == (
            certified_radius(count, 100, SIGMA, 0.001),
            100,
            "n",
        )


def test_looks_are_geometric_and_at_the_ends_of_tiles() -> None:
    looks = geometric_looks(100_000, 1.15)
    assert (looks[0], looks[-1]) == (100, 100_000)
    assert all(1 < b / a < 1.17 for a, b in itertools.pairwise(looks))
    tiled = geometric_looks(10_001, 1.15, tile=50, skip=30)
    assert all((30 + look) % 50 == 0 for look in tiled[:-1])
    assert tiled[-1] == 10_001
    assert geometric_looks(60, 1.15) == (60,)


@pytest.mark.parametrize("method", SEQUENTIAL)
def test_what_stops_an_image(method: str) -> None:
    def run(share: float, **mode: float) -> sequential.Decision:
        made = rule(100_000, 0.001, SIGMA, method=method, **mode)
        return certify(made, [round(share * look) for look in made.looks])

    lost = run(0.3)
    assert (lost.radius, lost.reason) == (None, "abstain")
    assert lost.samples <= 2000
    reached = run(0.95, target_radius=0.25)
    assert reached.reason == "target"
    assert reached.radius >= 0.25
    assert reached.samples < 5000
    missed = run(0.8, target_radius=0.25)
    assert missed.reason == "below target"
    assert (missed.radius or 0) < 0.25
    assert missed.samples < 5000
    close = run(0.95, rtol=0.1)
    fixed = certified_radius(95_000, 100_000, SIGMA, 0.001)
    assert close.reason == "rtol"
    assert 0.88 * fixed < close.radius <= fixed
    assert close.samples < 20_000
    assert run(0.95).reason == "n"
    assert run(0.95).samples == 100_000


@pytest.mark.parametrize("method", SEQUENTIAL)
@pytest.mark.parametrize("n", [1, 7, 100, 101, 1000])
def test_every_path_ends_for_any_n(method: str, n: int) -> None:
    for mode in (*MODES, {"target_radius": 50.0}, {"target_radius": 1e-9}, {"rtol": 1e-6}, {"rtol": 0.999}):
        made = rule(n, 0.001, SIGMA, method=method, tile=8, skip=3, **mode)
        assert made.looks[-1] == n
        for share in (0, 0.5, 0.9, 1):
            decision = certify(made, [math.floor(share * look) for look in made.looks])
            assert 0 <= decision.p_lower <= share
            assert (decision.radius is None) == (decision.p_lower < 0.5)


@pytest.mark.parametrize("method", SEQUENTIAL)
def test_no_tolerance_stops_what_has_none(method: str) -> None:
    made = rule(231, 0.01, SIGMA, method=method, target_radius=0.05)
    shares = [k / 20 for k in range(21)]
    for first, then in itertools.product(shares, shares):  # a pilot may promise what is missed
        counts = [math.floor(first * made.looks[0] + then * (look - made.looks[0])) for look in made.looks]
        assert certify(made, counts).reason in ("target", "below target", "n")


def test_a_wanted_radius_is_certified_by_a_bound_that_gives_it() -> None:
    made = rule(100_000, 0.001, SIGMA, target_radius=0.5)
    for k, look in enumerate(made.looks[:-1]):
        least = next((c for c in range(int(made._reached[k]), look + 1)), None)
        if least is not None:
            decision = made.decide([min(least, other) for other in made.looks[: k + 1]])
            assert decision.reason == "target"
            assert decision.radius >= 0.5
            assert stats.norm.cdf(0.5 / SIGMA) <= decision.p_lower


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n must be in"),
        ({"n": 10**9}, "n must be in"),
        ({"alpha": 1.0}, r"alpha must be in \(0, 1\), got 1"),
        ({"alpha": 1e-130}, "alpha must be at least 1e-50, .*, got 1e-130"),
        ({"sigma": 0.0}, "sigma must be > 0"),
        ({"target_radius": 0.0}, "target_radius must be > 0"),
        ({"rtol": 1.0}, r"rtol must be in \(0, 1\)"),
        ({"method": "peek"}, "method must be one of 'fixed', 'mixture'"),
        ({"tile": 0}, "tile must be >= 1"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(**({"n": 100, "alpha": 0.001, "sigma": SIGMA} | change))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([], "counts must have an entry for each look so far, 1 to"),
        ([101], r"counts\[0\] must be in \[0, 100\], got 101"),
        ([90, 80], r"counts\[1\] must be in \[90, 105\], got 80"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(1000, 0.001, SIGMA).decide(counts)


# What it saves


def saved(bench: ModuleType, sigma: float, **mode: float) -> dict[str, float]:
    path = shared_data(f"cohen-cifar10-sigma_{sigma:.2f}.tsv")
    return bench.measure("exact", sigma, bench.published_p(path, sigma), mode)


@pytest.mark.parametrize(("rtol", "fewer"), [(0.05, 3.9), (0.1, 8.0)])
def test_a_radius_within_a_tolerance_takes_fewer_samples(bench: ModuleType, rtol: float, fewer: float) -> None:
    got = saved(bench, 0.25, rtol=rtol)
    assert float(got["samples_ratio"]) >= fewer
    assert float(got["radius_ratio"]) >= 1 - rtol
    assert float(got["within"]) >= 0.85
    assert float(got["differ_clear"]) <= 0.004


@pytest.mark.parametrize(("target", "fewer"), [(0.25, 80), (0.5, 60), (0.75, 18)])
def test_a_wanted_radius_takes_fewer_samples(bench: ModuleType, target: float, fewer: float) -> None:
    got = saved(bench, 0.25, target=target)
    assert fewer <= float(got["samples_ratio"]) <= float(got["bound"])
    assert float(got["differ_clear"]) <= 0.004


# Prediction


def predict(made: Prediction, votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(answers, samples), [trials] each, for votes [trials, looks, classes]."""
    answers, used = np.full(len(votes), sequential.GO_ON), np.zeros(len(votes), int)
    for k, seen in enumerate(made.looks):
        going = np.flatnonzero(answers == sequential.GO_ON)
        if len(going):
            answers[going], used[going] = made.answers(votes[going, k], seen), seen
    assert (answers != sequential.GO_ON).all()
    return answers, used


def draws(made: Prediction, p: Sequence[float], trials: int) -> np.ndarray:
    steps = np.diff((0, *made.looks))
    return np.random.default_rng(0).multinomial(steps, p, size=(trials, len(steps))).cumsum(1)


@pytest.mark.parametrize("p", [(0.5, 0.5), (0.36, 0.34, 0.3), (0.26, 0.25, 0.25, 0.24)], ids=str)
def test_predict_is_wrong_less_often_than_alpha(p: tuple[float, ...]) -> None:
    """Of two tied classes, the one that is named is the wrong one."""
    made, trials, alpha = Prediction(400, 0.05, len(p)), 4000, 0.05
    answers, _ = predict(made, draws(made, p, trials))
    wrong = int((answers == 1).sum() if p[0] == p[1] else (answers > 0).sum())
    assert stats.binomtest(wrong, trials, alpha, alternative="greater").pvalue > 1e-3


def test_the_wealth_against_the_top_class_is_a_supermartingale() -> None:
    """Its exact mean over all counts of t votes: 1 for two equal classes, less against the likelier one."""
    t, a = 60, np.arange(61)
    wealth = np.exp(sequential._log_duel(a, t - a))
    assert stats.binom.pmf(a, t, 0.5) @ wealth == pytest.approx(1, rel=1e-9)
    assert stats.binom.pmf(a, t, 0.45) @ wealth < 1


def test_predict_stops_early_and_answers_as_the_fixed_test() -> None:
    made = Prediction(1000, 0.001, 10)
    for p, answer, fewest in ((0.95, 0, 40), (0.7, 0, 200), (0.5, -1, 700)):
        answers, used = predict(made, draws(made, (p, 1 - p, *[0.0] * 8), 200))
        assert np.mean(answers == answer) > 0.98
        assert used.mean() < fewest
        assert made.decide([20, *[0] * 9], 20) == 0


def test_predict_refuses_votes_that_cannot_be() -> None:
    made = Prediction(1000, 0.001, 3)
    for votes, seen, message in (
        ([10, 10, 0], 21, "seen must be one of"),
        ([10, 10], 20, "num_classes = 3 entries, got 2"),
        ([10, 5, 0], 20, "must sum to seen = 20, got 15"),
    ):
        with pytest.raises(ValueError, match=message):
            made.decide(votes, seen)
    with pytest.raises(ValueError, match="alpha must be at least 1e-50"):
        Prediction(1000, 1e-51, 3)


@pytest.mark.parametrize("stop", [{"rtol": 0.05}, {"target_radius": 0.3}, {}], ids=["rtol", "target", "abstain"])
def test_ten_million_samples_take_no_table_of_their_counts(stop: dict[str, float]) -> None:
    rule(100_000, 0.001, 0.25, **stop)  # what is kept for all rules
    tracemalloc.start()
    try:
        made = rule(10**7, 0.001, 0.25, **stop)
        decision = next(
            found
            for k in range(1, len(made.looks) + 1)
            if (found := made.decide([round(0.9 * look) for look in made.looks[:k]]))
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert decision.p_lower < 0.9
    assert peak < 5e7, peak  # a byte for each count would be 8e7


def test_blocks_of_counts_are_the_counts() -> None:
    made = Exact(30_000, 0.001, 0.25, rtol=0.1)
    for k, look in enumerate(made.looks):
        whole = made._settled(k, np.arange(look + 1)) if look < made.n else np.ones(look + 1, bool)
        low = look // 3
        assert (made._stopping(k, 0, look) == whole).all()
        assert (made._stopping(k, low, look - low) == whole[low : look - low + 1]).all()
        counts = np.repeat(np.array([[low], [look]]), k + 1, 1)
        assert made.settled(k, counts).tolist() == [made.stops([low] * (k + 1)), made.stops([look] * (k + 1))]
