"""philox_uniform and smoothing_noise: known answers, distribution, independence of how the work is cut."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

import csam_kernels as ck
from conftest import ISAS, assert_close
from csam_kernels import _C, reference
from csam_kernels.laws import LAWS

# Random123 1.09, kat_vectors: philox4x32 10 rounds.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    assert list(_C.philox4x32(counter, key)) == words
    assert reference.philox4x32(torch.tensor(counter), (key[0], key[1])).tolist() == words


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 5, 7), (2, 1, 1), (5, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("law", LAWS)
def test_matches_reference(
    isa: str, shape: tuple[int, int, int], dtype: torch.dtype, channels_last: bool, law: str
) -> None:
    x = torch.rand(shape)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    options = {"seed": 2**64 - 5, "first_sample": 2**32 - 2, "stream": 7, "law": law}
    out = ck.smoothing_noise(x, 5, 0.5, dtype=dtype, memory_format=memory_format, **options)
    expected = reference.smoothing_noise(x, 5, 0.5, 2**64 - 5, 2**32 - 2, 7, dtype, memory_format, law)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    assert_close(out, expected)


@pytest.mark.parametrize("law", LAWS)
def test_same_bits_on_every_isa_thread_count_and_split(law: str) -> None:
    x = torch.rand(3, 33, 31)
    results = []
    for name in ISAS:
        _C.set_isa(name)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            whole = ck.smoothing_noise(x, 64, 0.25, seed=11, first_sample=100, law=law)
            split = [ck.smoothing_noise(x, 16, 0.25, seed=11, first_sample=100 + 16 * i, law=law) for i in range(4)]
            results += [whole, torch.cat(split)]
    _C.set_isa("auto")
    assert all(torch.equal(r, results[0]) for r in results)


def test_bfloat16_is_the_rounded_float32_even_where_pixels_are_not_finite(isa: str) -> None:
    x = torch.rand(3, 11, 13)
    for pixels in ((), (float("nan"), float("inf"), -float("inf"), 3.39e38, 1e-40, -0.0)):
        x.view(-1)[: len(pixels)] = torch.tensor(pixels)
        wide, narrow = (ck.smoothing_noise(x, 33, 1e36, seed=4, dtype=d) for d in (torch.float32, torch.bfloat16))
        torch.testing.assert_close(narrow, wide.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_large_results_do_not_share_memory_while_they_live() -> None:
    x = torch.rand(3, 32, 32)
    kept = [ck.smoothing_noise(x, 400, 0.5, seed=s) for s in range(3)]  # 4.9 MB each: pooled memory
    copies = [k.clone() for k in kept]
    spans = sorted((k.data_ptr(), k.data_ptr() + k.nbytes) for k in kept)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    freed = kept.pop().data_ptr()
    again = ck.smoothing_noise(x, 400, 0.5, seed=9)
    assert again.data_ptr() == freed
    assert all(torch.equal(k, c) for k, c in zip(kept, copies, strict=False))
    assert torch.equal(pickle.loads(pickle.dumps(again)), again)


def test_seed_sample_and_stream_all_matter() -> None:
    x = torch.zeros(3, 8, 8)
    base = ck.smoothing_noise(x, 1, 1.0, seed=1)
    others = [
        ck.smoothing_noise(x, 1, 1.0, seed=2),
        ck.smoothing_noise(x, 1, 1.0, seed=1 + 2**32),
        ck.smoothing_noise(x, 1, 1.0, seed=1, first_sample=1),
        ck.smoothing_noise(x, 1, 1.0, seed=1, first_sample=2**32),
        ck.smoothing_noise(x, 1, 1.0, seed=1, stream=1),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack((base.flatten(), other.flatten())))[0, 1])) < 0.3


def test_normal_deviates_pass_kolmogorov_smirnov(isa: str) -> None:
    noise = ck.smoothing_noise(torch.zeros(3, 64, 64), 40, 1.0, seed=123).flatten().numpy()
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert abs(noise.mean()) < 5 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / noise.size)


LAMBDA = {"uniform": math.sqrt(3), "laplace": 1 / math.sqrt(2)}  # of standard deviation 1


@pytest.mark.parametrize("law", LAMBDA)
def test_other_laws_pass_kolmogorov_smirnov(isa: str, law: str) -> None:
    noise = ck.smoothing_noise(torch.zeros(3, 64, 64), 40, 1.0, seed=123, law=law).double().flatten().numpy()
    wanted = stats.uniform(-LAMBDA[law], 2 * LAMBDA[law]) if law == "uniform" else stats.laplace(scale=LAMBDA[law])
    assert stats.kstest(noise, wanted.cdf).pvalue > 1e-3
    assert abs(noise.mean()) < 5 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 5 * math.sqrt((wanted.stats("k") + 2) / noise.size)


def test_laplace_noise_has_the_right_tails() -> None:
    """As for normal deviates; sizes are exponential, so counts beyond t are binomial with exp(-t / lambda)."""
    noise = ck.smoothing_noise(torch.zeros(3, 64, 64), 2000, 1.0, seed=5, law="laplace").abs()
    for t in (4.0, 7.0, 9.0):
        count = int((noise > t).sum())
        assert stats.binomtest(count, noise.numel(), math.exp(-t / LAMBDA["laplace"])).pvalue > 1e-4, (t, count)
    assert 11 < noise.max() <= 32 * math.log(2) * LAMBDA["laplace"] + 1e-5


@pytest.mark.parametrize("sigma", [1.0, 0.25, 0.1, 1e-3])
def test_uniform_noise_is_its_words_and_never_leaves_its_interval(isa: str, sigma: float) -> None:
    """To the last bit: sign and size of a word, so that the law is symmetric; lambda itself is the most."""
    noise = ck.smoothing_noise(torch.zeros(3, 64, 64), 40, sigma, seed=9, law="uniform").flatten(1)
    words = reference.philox_words(noise.shape[1], torch.arange(40), seed=9, stream=0)
    size = ((words % 2**31).float().double() * 2.0**-31 + 2.0**-32).float()
    bound = torch.tensor(math.sqrt(3) * sigma, dtype=torch.float32)
    assert torch.equal(noise, torch.where(words >= 2**31, -1.0, 1.0) * (bound.double() * size.double()).float())
    assert noise.abs().max() <= bound


def test_laplace_noise_is_symmetric_in_its_words(isa: str) -> None:
    """Its sign is the top bit, and its size falls with the other bits."""
    noise = ck.smoothing_noise(torch.zeros(3, 64, 64), 40, 1.0, seed=9, law="laplace").flatten()
    words = reference.philox_words(3 * 64 * 64, torch.arange(40), seed=9, stream=0).flatten()
    assert torch.equal(noise < 0, (words >= 2**31) & (noise != 0))
    assert (noise.abs()[(words % 2**31).argsort()].diff() <= 1e-6).all()


@pytest.mark.parametrize("law", LAMBDA)
def test_bfloat16_of_other_laws_is_the_rounded_float32(isa: str, law: str) -> None:
    x = torch.rand(3, 11, 13)
    wide, narrow = (ck.smoothing_noise(x, 33, 0.5, seed=4, law=law, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert torch.equal(narrow, wide.to(torch.bfloat16))


def test_normal_deviates_have_the_right_tails() -> None:
    """Counts beyond 3, 4 and 4.5 sigma in 30 million draws against the exact binomial law, both sides."""
    beyond = {3.0: 0, 4.0: 0, 4.5: 0}
    draws = 0
    largest = 0.0
    for first in range(0, 2500, 500):
        noise = ck.smoothing_noise(torch.zeros(3, 64, 64), 500, 1.0, seed=5, first_sample=first)
        draws += noise.numel()
        largest = max(largest, float(noise.abs().max()))
        for t in beyond:
            beyond[t] += int((noise.abs() > t).sum())
    for t, count in beyond.items():
        assert stats.binomtest(count, draws, 2 * stats.norm.sf(t)).pvalue > 1e-4, (t, count)
    assert 5.0 < largest <= math.sqrt(2 * 32 * math.log(2)) + 1e-5


@pytest.mark.parametrize(
    ("sample", "word", "radius"), [(1477427040, 0, math.sqrt(64 * math.log(2))), (12543781886, 2**32 - 1, 0)]
)
def test_extreme_words_stay_finite_and_reach_the_stated_tail(isa: str, sample: int, word: int, radius: float) -> None:
    """The first sample of seed 0 whose first word is 0, and the first with all bits set."""
    assert _C.philox4x32([0, sample & 0xFFFFFFFF, sample >> 32, 0], [0, 0])[0] == word
    x = torch.zeros(1, 1, 2)
    for noise in (
        ck.smoothing_noise(x, 1, 1.0, seed=0, first_sample=sample),
        reference.smoothing_noise(x, 1, 1.0, 0, sample, 0, torch.float32, torch.contiguous_format),
    ):
        assert math.hypot(*noise.flatten().tolist()) == pytest.approx(radius, rel=1e-6)


@pytest.mark.parametrize(
    ("sample", "uniform", "laplace"),
    [(1477427040, math.sqrt(3) * 2.0**-32, 32 * math.log(2) / math.sqrt(2)), (12543781886, -math.sqrt(3), 0)],
)
def test_extreme_words_of_other_laws(isa: str, sample: int, uniform: float, laplace: float) -> None:
    """The same two words: sign + and the smallest size, sign - and the largest."""
    for law, wanted in (("uniform", uniform), ("laplace", laplace)):
        noise = ck.smoothing_noise(torch.zeros(1, 1, 1), 1, 1.0, seed=0, first_sample=sample, law=law)
        assert float(noise) == pytest.approx(wanted, rel=1e-6, abs=0)


def test_uniform_matches_reference_and_range() -> None:
    u = ck.philox_uniform(2000, 7, seed=3, first_sample=2**33, stream=4)
    assert torch.equal(u, reference.philox_uniform(2000, 7, 3, 2**33, 4))
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(u[100:], ck.philox_uniform(1900, 7, seed=3, first_sample=2**33 + 100, stream=4))


def test_uniform_does_not_follow_the_default_dtype() -> None:
    want = ck.philox_uniform(5, 3, seed=1)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(ck.philox_uniform(5, 3, seed=1), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_empty_batch_and_non_contiguous_image() -> None:
    x = torch.rand(32, 32, 3).permute(2, 0, 1)
    assert ck.smoothing_noise(x, 0, 0.1, seed=0).shape == (0, 3, 32, 32)
    same = ck.smoothing_noise(x.contiguous(), 2, 0.1, seed=0)
    assert torch.equal(ck.smoothing_noise(x, 2, 0.1, seed=0), same)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma must be > 0"),
        ({"sigma": float("nan")}, "sigma must be finite"),
        ({"sigma": 1e-46}, "sigma must be in float32's range"),
        ({"sigma": 1e39}, "sigma must be in float32's range"),
        ({"sigma": 2e38, "law": "uniform"}, r"sigma must be in float32's range .*, 1\.96462e\+38\]"),
        ({"law": "cauchy"}, "law must be one of 'gaussian', 'uniform', 'laplace', got 'cauchy'"),
        ({"sigma": "0.5"}, "sigma must be a number"),
        ({"sigma": True}, "sigma must be a number"),
        ({"sigma": np.True_}, "sigma must be a number"),
        ({"sigma": torch.tensor(True)}, r"sigma must be a number, got tensor\(True\)"),
        ({"sigma": torch.ones((), device="meta")}, "sigma must be a number"),
        ({"sigma": 10**400}, "sigma must be finite in float64"),
        ({"n": torch.tensor(True)}, r"n must be an integer, got tensor\(True\)"),
        ({"n": -1}, "n must be >= 0"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**64}, "seed must be in"),
        ({"stream": 2**32}, "stream must be in"),
        ({"x": torch.zeros(1, 3, 8, 8)}, "x must have 3 dimensions"),
        ({"dtype": torch.int64}, "dtype must be one of"),
        ({"memory_format": torch.preserve_format}, "memory_format must be one of"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(3, 8, 8), "n": 2, "sigma": 0.5, "seed": 0} | change
    x, n, sigma = (arguments.pop(k) for k in ("x", "n", "sigma"))
    with pytest.raises((TypeError, ValueError), match=message):
        ck.smoothing_noise(x, n, sigma, **arguments)
