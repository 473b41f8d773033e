"""Uniform and Laplace noise from the radius to the command line: closed forms, soundness, records, norms."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import csam_kernels as ck
from csam import evaluation, records, sampling, sequential, training
from csam.laws import LAWS
from csam.runs import Journal, RunError
from csam.sequential import METHODS
from csam.settings import PRESETS, override
from csam.smoothing import Smooth, certified_radius, lower_confidence_bound

SIGMA = 0.5
LAMBDA = {"uniform": math.sqrt(3) * SIGMA, "laplace": SIGMA / math.sqrt(2)}
DISTRIBUTION = {
    "gaussian": stats.norm(scale=SIGMA),
    "uniform": stats.uniform(-LAMBDA["uniform"], 2 * LAMBDA["uniform"]),
    "laplace": stats.laplace(scale=LAMBDA["laplace"]),
}
OTHERS = pytest.mark.parametrize("noise", LAMBDA)
ALL = pytest.mark.parametrize("noise", LAWS)


class Threshold(nn.Module):
    """Class 1 where the first pixel is above 0: at a first pixel r > 0 its probability is F(r), its true radius r."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([-x[:, 0, 0, 0], x[:, 0, 0, 0]], 1)


def at(r: float) -> Tensor:
    x = torch.zeros(1, 2, 2)
    x[0, 0, 0] = r
    return x


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[4].weight.mul_(20)
        model[4].bias -= model(picture() + SIGMA * torch.randn(200, 3, 8, 8)).mean(0)
    return model


def picture() -> Tensor:
    return torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(3)) / 255


# The radii


def test_radii_are_the_published_formulas() -> None:
    for p in (0.5, 0.51, 0.75, 0.99, 1 - 1e-9):
        radius = {noise: SIGMA * float(law.radius(p)) for noise, law in LAWS.items()}
        assert radius["gaussian"] == pytest.approx(SIGMA * stats.norm.ppf(p), abs=1e-15)
        assert radius["uniform"] == pytest.approx(2 * LAMBDA["uniform"] * (p - 0.5), rel=1e-12, abs=1e-15)
        assert radius["laplace"] == pytest.approx(-LAMBDA["laplace"] * math.log(2 * (1 - p)), rel=1e-12, abs=1e-15)
        assert p > 0.5 or str([*radius.values()]) == "[0.0, 0.0, 0.0]"  # no -0.0: a record shows it
    assert [law.norm for law in LAWS.values()] == ["l2", "l1", "l1"]
    assert LAWS["laplace"].radius(1.0) == math.inf
    assert SIGMA * LAWS["uniform"].radius(1.0) == pytest.approx(LAMBDA["uniform"], rel=1e-15)


@ALL
def test_a_radius_and_its_probability_are_inverse_and_rise(noise: str) -> None:
    law = LAWS[noise]
    p = np.concatenate([np.linspace(0.5, 0.999, 1000), 1 - np.logspace(-3.1, -9, 100)])
    radii = law.radius(p)
    assert radii[0] == 0
    assert (np.diff(radii) > 0).all()
    np.testing.assert_allclose(law.probability(radii), p, rtol=1e-14)


@ALL
def test_the_radius_of_a_threshold_is_its_distance(noise: str) -> None:
    """F(r), the probability at distance r, gives back r: the bounds are tight."""
    for r in (0.01, 0.3, 0.8):
        assert SIGMA * LAWS[noise].radius(DISTRIBUTION[noise].cdf(r)) == pytest.approx(r, rel=1e-12)


@OTHERS
def test_no_shift_within_the_radius_takes_more_than_the_bound_says(noise: str) -> None:
    """Of a set that is a threshold on the likelihood ratio, the worst by Neyman and Pearson, in three pixels."""
    rng, n, p = np.random.default_rng(0), 400_000, 0.8
    eps = DISTRIBUTION[noise].rvs((n, 3), random_state=rng)
    radius = SIGMA * float(LAWS[noise].radius(p))
    for shares in ((1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.2, 0.3, 0.5)):
        shift = radius * np.array(shares)
        if noise == "laplace":
            scores, moved = ((np.abs(e - shift) - np.abs(e)).sum(1) for e in (eps, eps + shift))
        else:
            scores, moved = ((np.abs(e - shift) <= LAMBDA[noise]).all(1) * -1.0 for e in (eps, eps + shift))
            scores, moved = scores + 0.5 * rng.random(n), moved + 0.5 * rng.random(n)
        kept = moved >= np.quantile(scores, 1 - p)
        assert stats.binomtest(int(kept.sum()), n, 0.5, alternative="less").pvalue > 1e-4, (shares, kept.mean())


@OTHERS
def test_certified_radius_of_counts(noise: str) -> None:
    p = lower_confidence_bound(990, 1000, 0.001)
    assert certified_radius(990, 1000, SIGMA, 0.001, noise) == pytest.approx(DISTRIBUTION[noise].ppf(p), rel=1e-9)
    assert certified_radius(400, 1000, SIGMA, 0.001, noise) is None
    with pytest.raises(ValueError, match="noise must be one of 'gaussian', 'uniform', 'laplace', got 'cauchy'"):
        certified_radius(990, 1000, SIGMA, 0.001, "cauchy")


# Stopping early


@OTHERS
@pytest.mark.parametrize("method", METHODS)
def test_every_rule_certifies_in_the_radius_of_the_law(noise: str, method: str) -> None:
    """A wanted radius by a bound that gives it, and within the tolerance of the radius that n samples would give."""
    rng, most = np.random.default_rng(0), {}
    for mode in ({"target_radius": 0.2}, {"rtol": 0.1}, {}):
        made = sequential.rule(10_000, 0.001, SIGMA, noise=noise, method=method, **mode)
        votes = np.cumsum(rng.random(10_000) < 0.97)
        counts: list[int] = []
        found = None
        while found is None:
            counts.append(int(votes[made.looks[len(counts)] - 1]))
            found = made.decide(counts)
        assert found.radius == pytest.approx(max(DISTRIBUTION[noise].ppf(found.p_lower), mode.get("target_radius", 0)))
        if "target_radius" in mode:
            assert found.reason == "target"
            assert found.p_lower >= DISTRIBUTION[noise].cdf(0.2)
        most[tuple(mode)] = found
    if method in ("exact", "mixture", "spending"):
        assert most["target_radius",].samples < 2000
        assert most["rtol",].samples < 10_000
        assert most["rtol",].radius > 0.85 * most[()].radius


@OTHERS
@pytest.mark.parametrize("stop", [{}, {"target_radius": 0.2}, {"rtol": 0.2}], ids=["fixed", "target", "rtol"])
def test_certificates_of_a_linear_classifier_are_wrong_at_most_alpha_often(noise: str, stop: dict[str, Any]) -> None:
    smooth, alpha, wrong, trials = Smooth(Threshold(), 2, SIGMA, noise=noise), 0.1, 0, 400
    assert smooth.norm == "l1"
    for stream in range(trials):
        r = (0.02, 0.15, 0.2, 0.4)[stream % 4]
        label, radius = smooth.certify(at(r), 10, 400, alpha, stream=stream, adaptive=bool(stop), **stop)
        wrong += label == 0 or (label == 1 and radius > r)
    assert stats.binomtest(wrong, trials, alpha, alternative="greater").pvalue > 1e-3
    assert wrong > 0  # the bound is no looser than it need be


@ALL
def test_a_constant_classifier_has_the_largest_radius(noise: str) -> None:
    label, radius = Smooth(Threshold(), 2, SIGMA, noise=noise).certify(at(100.0), n=1000, alpha=0.001)
    assert (label, radius) == (1, pytest.approx(DISTRIBUTION[noise].ppf(0.001 ** (1 / 1000)), rel=1e-9))


@OTHERS
def test_predictions_are_of_the_law(noise: str) -> None:
    smooth = Smooth(Threshold(), 2, SIGMA, noise=noise)
    votes = smooth.counts(at(0.2), 4000)
    assert stats.binomtest(int(votes[1]), 4000, DISTRIBUTION[noise].cdf(0.2)).pvalue > 1e-3
    assert smooth.predict(at(0.2), 1000) == smooth.predict(at(0.2), 1000, adaptive=True) == 1
    assert smooth.predict(at(0.0), 1000) == -1


def test_a_target_that_uniform_noise_cannot_reach_is_refused() -> None:
    message = r"target_radius must be below 0\.866025, got 0\.9 under uniform noise of sigma 0\.5"
    asked = {"train": {"sigma": SIGMA, "noise": "uniform"}, "certify": {"adaptive": True, "target_radius": 0.9}}
    with pytest.raises(ValueError, match=message):  # before any training
        override(PRESETS["digits"], asked)
    with pytest.raises(ValueError, match=message):
        Smooth(Threshold(), 2, SIGMA, noise="uniform").certify(at(0.1), adaptive=True, target_radius=0.9)
    with pytest.raises(ValueError, match="noise must be one of"):
        Smooth(Threshold(), 2, SIGMA, noise="normal")


# The networks


@OTHERS
@pytest.mark.parametrize("sound_float", [False, True], ids=["plain", "sound"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, "int8"], ids=str)
def test_votes_depend_on_neither_batch_size_nor_threads(
    noise: str, dtype: torch.dtype | str | None, sound_float: bool, threads: int
) -> None:
    x, model = picture(), network()
    shown = torch.stack([x, x.flip(1)]) if dtype == "int8" else None
    smooth = Smooth(model, 4, SIGMA, noise=noise, dtype=dtype, calibration=shown, seed=5, sound_float=sound_float)
    whole = smooth.counts(x, 300, 7, stream=3)
    parts = [smooth.counts(x, 100, 7 + 100 * i, batch_size=b, stream=3) for i, b in enumerate((1, 50, 1000))]
    assert torch.equal(whole, sum(parts))
    assert (whole > 0).sum() > 1


@OTHERS
@pytest.mark.parametrize("choices", ["sparse", "module"])
def test_votes_are_those_of_the_noise(noise: str, choices: str) -> None:
    """In the engine and in torch's own layers, whose head draws Gaussian noise alone."""
    x = picture()
    smooth = Smooth(network(), 4, SIGMA, noise=noise, dtype=torch.float32, choices=choices, seed=5)
    prepared = smooth.prepare(x)
    assert (prepared.sampler is None) == (choices == "module")
    noisy = ck.smoothing_noise(x, 100, SIGMA, seed=5, stream=2, law=noise)
    wanted = ck.count_votes((prepared.sampler.logits if prepared.sampler else prepared.module)(noisy))
    assert torch.equal(smooth.counts(x, 100, stream=2), wanted)
    assert torch.equal(
        sampling.plan(network(), x, dtype=torch.float32, choices=choices).votes(
            x, SIGMA, 100, seed=5, stream=2, noise=noise
        ),
        wanted,
    )


@OTHERS
def test_a_head_that_draws_gaussian_noise_is_left_aside(noise: str) -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("drew Gaussian noise")

    x = picture()
    prepared = sampling.plan(network(), x, choices="module").prepared
    found = [
        Smooth(p, 4, SIGMA, noise=noise).counts(x, 100)
        for p in (prepared, replace(prepared, head=never))  # type: ignore[arg-type]
    ]
    assert torch.equal(*found)


@OTHERS
def test_int8_is_calibrated_under_the_law(noise: str) -> None:
    x = picture()
    plans = [sampling.plan(network(), x, dtype="int8", sigma=0.25, noise=law) for law in ("gaussian", noise)]
    assert f"noisy images of sigma 0.25, {noise}" in plans[1].explain()
    first, second = (plan.prepared.sampler for plan in plans)
    assert first is not None
    assert second is not None
    assert first.fingerprint != second.fingerprint
    with pytest.raises(ValueError, match="noise must be one of"):
        sampling.plan(network(), x, noise="normal")


# Records


@ALL
@pytest.mark.parametrize(
    "options",
    [{"choices": "module"}, {"dtype": torch.float32, "choices": "sparse"}],
    ids=["torch", "engine"],
)
def test_a_record_names_its_law_and_goes_on_under_no_other(tmp_path: Path, noise: str, options: dict[str, Any]) -> None:
    x, path = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8), tmp_path / "r.tsv"
    stop = {"n": 2000, "adaptive": True, "rtol": 0.2}
    smooth = {law: Smooth(network(), 4, SIGMA, noise=law, **options) for law in LAWS}
    rows = evaluation.certify_dataset(smooth[noise], x, [0, 1, 2], path, **stop)
    recipe, _ = records.read_votes(path)
    assert (recipe["noise"], recipe["norm"]) == (noise, "l2" if noise == "gaussian" else "l1")
    for i, row in enumerate(rows):
        assert (row.predict, row.radius) == smooth[noise].certify(x[i] / 255, stream=i, **stop)
    whole = path.read_text().splitlines()
    path.write_text("\n".join(whole[:2]) + "\n")
    for other in LAWS.keys() - {noise}:
        message = rf"made with other settings \(noise: '{noise}' there, '{other}' now"
        with pytest.raises(RunError, match=message):
            evaluation.certify_dataset(smooth[other], x, [0, 1, 2], path, **stop)
    again = evaluation.certify_dataset(smooth[noise], x, [0, 1, 2], path, **stop)
    assert [str(r).split()[:5] for r in again] == [str(r).split()[:5] for r in rows]


def test_a_record_from_before_there_were_laws_is_gaussian(tmp_path: Path) -> None:
    x, path = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), tmp_path / "r.tsv"
    evaluation.certify_dataset(Smooth(network(), 4, SIGMA), x, [0, 1], path, n=100, indices=[0])
    votes = records.votes_path(path)
    first, *rest = Journal.read(votes)
    votes.unlink()
    journal = Journal(votes)
    journal.append({"recipe": {k: v for k, v in first["recipe"].items() if k not in ("noise", "norm")}})
    for record in rest:
        journal.append(record)
    with pytest.raises(RunError, match="noise: 'gaussian' there, 'uniform' now; norm: 'l2' there, 'l1' now"):
        evaluation.certify_dataset(Smooth(network(), 4, SIGMA, noise="uniform"), x, [0, 1], path, n=100)
    assert len(evaluation.certify_dataset(Smooth(network(), 4, SIGMA), x, [0, 1], path, n=100)) == 2


# Training


@OTHERS
def test_training_noise_is_of_the_law_and_shared_by_processes(noise: str) -> None:
    images, labels = torch.zeros(64, 3, 16, 16, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64)
    feed = training.Feed(1, batch_size=32, sigma=SIGMA, noise=noise, seed=3)
    whole = [x for x, _ in training.batches(images, labels, feed, 0)]
    assert stats.kstest(torch.stack(whole).flatten().numpy(), DISTRIBUTION[noise].cdf).pvalue > 1e-3
    assert all(not torch.equal(a, b) for a, b in pairwise([*whole, next(training.batches(images, labels, feed, 1))[0]]))
    parts = [[x for x, _ in training.batches(images, labels, feed, 0, rank=r, size=2)] for r in range(2)]
    assert all(torch.equal(torch.cat(pair), x) for pair, x in zip(zip(*parts, strict=True), whole, strict=True))
    with pytest.raises(ValueError, match="noise must be one of"):
        training.Feed(1, noise="normal")
