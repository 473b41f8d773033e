"""What sequential certification saves, in simulation on the p_A that a real model was published with.

    .venv/bin/python bench/bench_sequential.py

Counts are drawn for the images of ../shared/data/cohen-cifar10-sigma_*.tsv, and each method stops on the same path of
votes whose end is the fixed run's count. Written to bench/results/sequential.csv, a row a method and mode:

- samples_ratio: n = 100,000 over the mean number of samples (of the certificate; n0 comes on top of both);
- radius_ratio: mean of radius / the fixed run's radius, over images that the fixed run certifies;
- within: share of those images whose radius is at least (1 - tolerance) times the fixed run's (rtol, 5 % without);
- differ: share of images for which the decision, radius >= target or abstain, is not the fixed run's;
- differ_clear: the same, counting only images which the fixed run decides alike in 99 of a hundred runs;
- bound: no test with the fixed run's power and error can have a larger samples_ratio (target radii; Wald 1945), even
  one that spends no sample on an image below the target;
- ms: time of a decision, everything included.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import numpy as np
from scipy import special, stats

from csam import records, sequential
from csam.smoothing import ABSTAIN

N, ALPHA, REPEATS = 100_000, 0.001, 4
DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
RESULTS = Path(__file__).parent / "results" / "sequential.csv"


def published_p(path: Path, sigma: float, repeats: int = 1) -> np.ndarray:
    """Probabilities of the chosen class, [repeats * images], from the radii of a run with N and ALPHA.

    The share of votes is recovered from the radius, which fixes it up to rounding. Two kinds of images leave p open
    and get it at random, from a fixed seed: with at most 3 failures p is 1 - 10^-u, u uniform from 4.5 to 7; where the
    run abstained p is uniform from 0.2 to 0.505.
    """
    rows = records.read_tsv(path)
    radius = np.repeat([row.radius for row in rows], repeats)
    abstained = np.repeat([row.predict == ABSTAIN for row in rows], repeats)
    votes = np.arange(N // 2, N + 1)
    bounds = special.betaincinv(votes, N - votes + 1, ALPHA)
    p = votes[np.searchsorted(bounds[:-1], special.ndtr(radius / sigma))] / N
    rng = np.random.default_rng(1)
    p = np.where(special.ndtr((radius + 5e-4) / sigma) >= bounds[-4], 1 - 10 ** -rng.uniform(4.5, 7, len(p)), p)
    return np.where(abstained, rng.uniform(0.2, 0.505, len(p)), p)


def paths(rule: sequential.Rule, p: np.ndarray, seed: int = 0) -> np.ndarray:
    """Counts [images, looks] for probabilities p."""
    steps = np.diff((0, *rule.looks))
    return np.cumsum(np.random.default_rng(seed).binomial(steps, p[:, None]), axis=1)


def stopped(rule: sequential.Rule, counts: np.ndarray) -> np.ndarray:
    """Look at which each image stops, [images]."""
    at, going = np.full(len(counts), len(rule.looks) - 1), np.arange(len(counts))
    for k in range(len(rule.looks) - 1):
        stop = rule.settled(k, counts[going, : k + 1])
        at[going[stop]] = k
        going = going[~stop]
    return at


def radii(rule: sequential.Rule, counts: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Certified radii [images], 0 where the rule abstains."""
    bounds = np.array([rule.bound([int(v) for v in row[: k + 1]]) for row, k in zip(counts, at, strict=True)])
    return np.maximum(rule.sigma * special.ndtri(np.maximum(bounds, 0.5)), 0)


def fixed_radii(counts: np.ndarray, sigma: float) -> np.ndarray:
    bound = special.betaincinv(np.maximum(counts[:, -1], 1), N - counts[:, -1] + 1, ALPHA)
    return sigma * special.ndtri(np.maximum(bound, 0.5))


def power(p: np.ndarray, wanted: float) -> np.ndarray:
    """Probability that the fixed run certifies p >= wanted."""
    votes = np.arange(N + 1)
    least = int(np.argmax(stats.binom.sf(votes - 1, N, wanted) <= ALPHA))
    return stats.binom.sf(least - 1, N, p)


def wald(p: np.ndarray, wanted: float) -> float:
    """Bound on the ratio of samples: E_p[T] >= kl(power, alpha) / kl(p, wanted) for p > wanted, at most N."""

    def kl(a: np.ndarray, b: float) -> np.ndarray:
        return special.rel_entr(a, b) + special.rel_entr(1 - a, 1 - b)

    above = p > wanted
    chance = np.maximum(power(p[above], wanted), ALPHA)
    return N * len(p) / np.minimum(N, kl(chance, ALPHA) / kl(p[above], wanted)).sum()


def measure(method: str, sigma: float, p: np.ndarray, mode: dict[str, float]) -> dict[str, object]:
    start = time.perf_counter()
    rule = sequential.rule(N, ALPHA, sigma, method=method, target_radius=mode.get("target"), rtol=mode.get("rtol"))
    counts = paths(rule, p)
    at = stopped(rule, counts)
    radius, fixed = radii(rule, counts, at), fixed_radii(counts, sigma)
    seconds = time.perf_counter() - start
    target = mode.get("target", 0.0)
    differ = (radius > 0) != (fixed > 0) if not target else (radius >= target) != (fixed >= target)
    wanted = float(special.ndtr(target / sigma))
    chance = power(p, wanted)
    certified = fixed > 0
    ratio = radius[certified] / fixed[certified]
    return {
        "sigma": sigma,
        "mode": " ".join(f"{k}={v:g}" for k, v in mode.items()) or "abstain",
        "method": method,
        "samples_ratio": f"{N / np.array(rule.looks)[at].mean():.3g}",
        "radius_ratio": f"{ratio.mean():.3f}",
        "within": f"{np.mean(ratio >= 1 - mode.get('rtol', 0.05)):.3f}",
        "differ": f"{differ.mean():.4f}",
        "differ_clear": f"{(differ & ((chance < 0.01) | (chance > 0.99))).mean():.4f}",
        "bound": f"{wald(p, wanted):.3g}" if target else "",
        "ms": f"{1e3 * seconds / len(p):.2g}",
    }


def main() -> None:
    rows = []
    for sigma in (0.25, 0.5):
        path = DATA / f"cohen-cifar10-sigma_{sigma:.2f}.tsv"
        if not path.exists():
            sys.exit(f"data not found: {path}")
        p = published_p(path, sigma, REPEATS)
        modes = [{"rtol": 0.05}, {"rtol": 0.1}, *({"target": t} for t in (0.25, 0.5, 0.75)), {}]
        for mode in modes:
            for method in ("mixture", "spending", "pilot", "exact"):
                rows.append(measure(method, sigma, p, mode))
                print("  ".join(f"{k} {v}" for k, v in rows[-1].items() if v != ""), flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
