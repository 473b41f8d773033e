"""Smoothing that is proved for floating point: the law of the noise, exact sums, and certificates that hold."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import csam_kernels as ck
from conftest import ISAS
from csam import data, evaluation, records, sampling, sound
from csam.runs import RunError
from csam.smoothing import Smooth
from csam_kernels import _C, reference
from csam_kernels.cells import WEIGHT, Cells, cells, steps
from csam_kernels.laws import LAWS

F32, NCHW = torch.float32, torch.contiguous_format


def picture(*shape: int) -> Tensor:
    """Pixels as an image file gives them."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3)) / 255


# The law


def unpacked(law: Cells) -> list[int]:
    """2^96 times the probability of each column's number, out of the table."""
    full, found = 1 << (WEIGHT - law.bits), [0] * 2**law.bits
    for column, (entry, rest) in enumerate(zip(law.columns.tolist(), law.rest.tolist(), strict=True)):
        threshold = ((entry % 2**32) >> law.bits) << 64 | rest % 2**64
        found[column] += threshold
        found[entry % 2**law.bits] += full - threshold
    return found


@pytest.mark.parametrize(
    ("sigma", "grid"), [(0.25, 255), (0.12, 255), (1.0, 255), (0.01, 255), (0.002, 255), (1e-9, 255), (0.1, 1)]
)
@pytest.mark.parametrize("name", LAWS)
def test_the_table_is_the_rounded_noise_within_its_distance(sigma: float, grid: int, name: str) -> None:
    law = cells(sigma, grid, name)
    weights, half = unpacked(law), 2 ** (law.bits - 1)
    assert weights == list(law.weights)
    assert sum(weights) == 2**WEIGHT
    assert weights[1:half] == weights[:half:-1]
    away = Fraction(0)
    with mpmath.workprec(400):
        s = mpmath.mpf(sigma) * grid
        tail = {
            "gaussian": lambda z: mpmath.erfc(z / mpmath.sqrt(2)) / 2,
            "uniform": lambda z: max(1 - z / mpmath.sqrt(3), mpmath.mpf(0)) / 2,
            "laplace": lambda z: mpmath.exp(-mpmath.sqrt(2) * z) / 2,
        }[name]
        ends = [tail((k + mpmath.mpf(0.5)) / s) for k in range(half)]
        inside = [1 - 2 * ends[0], *(a - b for a, b in pairwise(ends))]
        for k, p in enumerate(inside):
            wanted = Fraction(int(mpmath.floor(p * 2**200)), 2**200)
            missing = wanted - Fraction(weights[half + k], 2**WEIGHT)
            assert k == 0 or Fraction(-1, 2**190) < missing < Fraction(1.01) / 2**WEIGHT
            away += abs(missing) * (1 if k == 0 else 2)
        away += Fraction(2 * float(ends[-1]))
    assert away / 2 <= law.distance < 2.0**-80


def test_a_sigma_too_wide_for_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sigma must be at most 11.1\d* on a grid of 255 steps, got 12"):
        cells(12.0, 255)
    with pytest.raises(ValueError, match=r"sigma must be at most 2.62\d* on a grid of 255 steps, got 3"):
        cells(3.0, 255, "laplace")


@pytest.mark.parametrize("sigma", [0.25, 0.004])
def test_numbers_follow_the_law(isa: str, sigma: float) -> None:
    law = cells(sigma, 255)
    noise = ck.grid_noise(torch.zeros(3, 64, 64), 100, sigma, seed=1)
    numbers = (noise * 255).round().long().flatten() + 2 ** (law.bits - 1)
    counts, n = numbers.bincount(minlength=2**law.bits).tolist(), numbers.numel()
    found, expected, rest = [], [], [0, 0.0]
    for count, weight in zip(counts, law.weights, strict=True):
        if n * weight / 2**WEIGHT >= 10:
            found.append(count)
            expected.append(n * weight / 2**WEIGHT)
        else:
            rest = [rest[0] + count, rest[1] + n * weight / 2**WEIGHT]
    assert stats.chisquare([*found, rest[0]], [*expected, rest[1]]).pvalue > 1e-3


# The copies


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 5, 7), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("law", LAWS)
def test_same_bits_as_the_reference(
    isa: str, shape: tuple[int, int, int], dtype: torch.dtype, channels_last: bool, law: str
) -> None:
    form = torch.channels_last if channels_last else NCHW
    where = {"seed": 2**64 - 5, "first_sample": 2**32 - 20, "stream": 7}
    out = ck.grid_noise(picture(*shape), 50, 0.5, **where, dtype=dtype, memory_format=form, law=law)
    assert out.is_contiguous(memory_format=form)
    numbers = steps(picture(*shape), 255)
    expected = reference.grid_noise(numbers, 50, 0.5, 255, 2**64 - 5, 2**32 - 20, 7, dtype, form, law)
    assert out.dtype == dtype
    assert torch.equal(out, expected)


def test_ties_of_the_first_word_are_settled_by_the_next_bits(isa: str) -> None:
    x, wide, n = picture(3, 32, 32), 10.0, 1000  # a table of 2^16 columns: a tie in as many draws
    law = cells(wide, 255)
    words = reference.philox_words(x.numel(), torch.arange(n), seed=9, stream=4)
    entry = law.columns.long()[words >> (32 - law.bits)] % 2**32
    ties = (words << law.bits) % 2**32 == entry & ~(2**law.bits - 1)
    assert ties.sum() > 30
    expected = reference.grid_noise(steps(x, 255), n, wide, 255, 9, 0, 4, F32, NCHW)
    assert torch.equal(ck.grid_noise(x, n, wide, seed=9, stream=4), expected)
    numbers = (expected.double() * 255).round() - (x.double() * 255).round() + 2 ** (law.bits - 1)
    own = numbers.flatten(1)[ties] == (words >> (32 - law.bits))[ties]
    assert 0 < own.sum() < len(own)  # either way is taken


def test_same_bits_on_every_isa_thread_count_and_split() -> None:
    x, results = picture(3, 33, 31), []
    for name in ISAS:
        _C.set_isa(name)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            whole = ck.grid_noise(x, 64, 0.25, seed=11, first_sample=100)
            split = [ck.grid_noise(x, 16, 0.25, seed=11, first_sample=100 + 16 * i) for i in range(4)]
            results += [whole, torch.cat(split)]
    _C.set_isa("auto")
    assert all(torch.equal(r, results[0]) for r in results)


def test_sums_are_exact_and_the_noise_knows_nothing_of_the_image(isa: str) -> None:
    noise = steps(ck.grid_noise(torch.zeros(3, 16, 16), 60, 0.5, seed=2).view(-1), 255)
    for x in (picture(3, 16, 16), torch.ones(3, 16, 16), torch.full((3, 16, 16), 2.0**20 - 2000) / 255):
        out = ck.grid_noise(x, 60, 0.5, seed=2)
        assert torch.equal(steps(out.view(-1), 255), noise + steps(x, 255).repeat(60, 1, 1, 1).view(-1))


@pytest.mark.parametrize("value", [0.1, 1e-9, float("nan"), float("inf"), 2.0**30])
def test_pixels_off_the_grid_are_refused_by_name(value: float) -> None:
    x = picture(1, 4, 4)
    x[0, 1, 2] = value
    for call in (
        lambda: ck.grid_noise(x, 2, 0.5, seed=0),
        lambda: Smooth(Two(), 2, 0.5, sound_float=True).counts(x, 10),
    ):
        with pytest.raises(ValueError, match=r"x must .*(whole numbers / 255 in float32, got .* would do|finite)"):
            call()


def test_an_image_that_is_known_to_be_on_the_grid_is_not_looked_at() -> None:
    x = picture(3, 4, 4)
    assert torch.equal(ck.grid_noise(x, 2, 0.5, seed=0, on_grid=True), ck.grid_noise(x, 2, 0.5, seed=0))
    x[0, 1, 2] = float("nan")
    assert ck.grid_noise(x, 2, 0.5, seed=0, on_grid=True).isnan().sum() == 2
    with pytest.raises(TypeError, match=r"^on_grid must be True or False, got 'no'$"):
        ck.grid_noise(x, 2, 0.5, seed=0, on_grid="no")  # type: ignore[arg-type]


# Certificates


class Two(nn.Module):
    """Class 1 where the first pixel is above half of 255."""

    def forward(self, x: Tensor) -> Tensor:
        score = x[:, 0, 0, 0].float() - 127.5 / 255
        return torch.stack([-score, score], 1)


class LastBits(nn.Module):
    """Class 1 where a value near 0 is no multiple of 2^-32: what a sum with anything but 0 gives is one."""

    def forward(self, x: Tensor) -> Tensor:
        small = torch.where(x.abs() < 2.0**-10, x, 0).double() * 2.0**32
        told = (small != small.round()).flatten(1).any(1).float()
        return torch.stack([1 - told, told], 1)


def test_last_bits_break_the_plain_certificate_and_not_the_sound_one() -> None:
    black, near = torch.zeros(3, 32, 32), torch.ones(3, 32, 32) / 255
    distance = float((near - black).norm())
    plain, strict = Smooth(LastBits(), 2, 0.25), Smooth(LastBits(), 2, 0.25, sound_float=True)
    label, radius = plain.certify(black, n=1000)
    assert (label, radius > 2 * distance) == (1, True)
    assert plain.predict(near) == 0  # within a radius that was certified
    label, radius = strict.certify(black, n=1000)
    assert (label, radius > 2 * distance) == (0, True)
    assert strict.predict(near) == 0


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("noise", LAWS)
def test_certificates_of_a_linear_classifier_are_wrong_at_most_alpha_often(noise: str, adaptive: bool) -> None:
    """A threshold between two steps: g's radius at the number k is (k - 127.5) / 255, to the last digit."""
    smooth, alpha, wrong, trials = Smooth(Two(), 2, 0.25, noise=noise, sound_float=True), 0.1, 0, 300
    for stream in range(trials):
        k = 128 + 3 * (stream % 30)
        x = torch.full((1, 1, 1), k) / 255
        label, radius = smooth.certify(x, 10, 400, alpha, stream=stream, adaptive=adaptive)
        wrong += label == 0 or (label == 1 and radius > (k - 127.5) / 255)
    assert stats.binomtest(wrong, trials, alpha, alternative="greater").pvalue > 1e-3
    assert wrong > 0  # the bound is no looser than it need be


def test_what_the_law_may_err_by_is_taken_from_alpha() -> None:
    assert 0.001 * (1 - 2e-6) < sound.level(0.001, 10**5 * 3 * 224 * 224, cells(0.25, 255).distance) < 0.001
    assert sound.level(0.5, 100, 1e-3) == pytest.approx(0.4, rel=1e-5)
    with pytest.raises(ValueError, match=r"alpha must be above 0\.001, what 10 draws may err by, got 0.001"):
        sound.level(0.001, 10, 1e-4)
    with pytest.raises(ValueError, match=r"alpha must be above 2\.5e-50, what 1 draws may err by, got 2e-50"):
        sound.level(2e-50, 1, 1.5e-50)
    x = torch.ones(1, 4, 4)
    plain, strict = (Smooth(Two(), 2, 1.0, sound_float=s).certify(x, n=1) for s in (False, True))
    assert plain == strict == (-1, 0.0)
    plain, strict = (Smooth(nn.Sequential(Two(), nn.Threshold(9, 0)), 2, 1.0, sound_float=s) for s in (False, True))
    (_, most), (_, sure) = (s.certify(x, n=1000) for s in (plain, strict))
    assert most * (1 - 1e-5) < sure < most


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, "int8"], ids=str)
def test_votes_depend_on_neither_batch_size_nor_threads(dtype: torch.dtype | str | None, threads: int) -> None:
    x, model = picture(3, 8, 8), network()
    shown = None if dtype != "int8" else torch.stack([x, x.flip(1)])
    smooth = Smooth(model, 4, 0.25, dtype=dtype, sound_float=True, calibration=shown, seed=5)
    whole = smooth.counts(x, 300, 7, stream=3)
    parts = [smooth.counts(x, 100, 7 + 100 * i, batch_size=b, stream=3) for i, b in enumerate((1, 50, 1000))]
    assert torch.equal(whole, sum(parts))
    assert (whole > 0).sum() > 1
    assert not torch.equal(whole, Smooth(model, 4, 0.25, dtype=dtype, calibration=shown, seed=5).counts(x, 300, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("law", LAWS)
def test_the_engine_draws_the_same_noise(isa: str, dtype: torch.dtype, law: str) -> None:
    x = picture(3, 8, 8)
    sampler = sampling.plan(network(), x, dtype=dtype, choices="sparse").prepared.sampler
    assert sampler is not None
    for sigma, first in ((0.25, 2**32 - 33), (2.5, 0)):
        votes = sampler.votes(x, sigma, 70, seed=5, first_sample=first, stream=3, grid=255, law=law)
        noisy = ck.grid_noise(x, 70, sigma, seed=5, first_sample=first, stream=3, dtype=dtype, law=law)
        assert torch.equal(votes, ck.count_votes(sampler.logits(noisy)))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[4].weight.mul_(20)
        model[4].bias -= model(ck.grid_noise(picture(3, 8, 8), 200, 0.25, seed=1)).mean(0)
    return model


@pytest.mark.parametrize(
    "options",
    [{"choices": "module"}, {"dtype": torch.float32, "choices": "sparse"}],
    ids=["torch", "engine"],
)
def test_a_record_says_how_it_was_drawn_and_goes_on_in_no_other_way(tmp_path: Path, options: dict[str, Any]) -> None:
    x = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    for known, other in ((False, True), (True, False)):
        path = tmp_path / f"{known}.tsv"
        plain, strict = (Smooth(network(), 4, 0.25, sound_float=s, **options) for s in (known, other))
        rows = evaluation.certify_dataset(plain, x, [0, 1, 2], path, n=200)
        recipe, _ = records.read_votes(path)
        law = {"grid": 255, "distance": cells(0.25, 255).distance} if known else None
        assert (recipe.get("sound_float"), recipe["alpha"]) == (law, 0.001)
        assert [(r.predict, r.radius) for r in rows] == [
            plain.certify(data.to_unit(x[i]), n=200, stream=i) for i in range(3)
        ]
        with pytest.raises(RunError, match=r"made with other settings \(sound_float: "):
            evaluation.certify_dataset(strict, x, [0, 1, 2], path, n=200)
