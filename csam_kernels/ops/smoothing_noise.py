"""Noise batching for randomized smoothing."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels import backend, checks
from csam_kernels.laws import checked_law, checked_sigma

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def smoothing_noise(
    x: Tensor,
    n: int,
    sigma: float,
    *,
    seed: int,
    first_sample: int = 0,
    stream: int = 0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    law: str = "gaussian",
) -> Tensor:
    """n noisy copies of one image: out[i] = x + sigma * eps_i, the coordinates of eps_i independent, of variance 1.

    The noise batch of Cohen, Rosenfeld and Kolter (2019), drawn without materialising eps: Philox-4x32-10 with
    key `seed` and counter (element//4, sample low, sample high, stream), deviates in float32 (Box-Muller, or as
    `csam_kernels.laws` says), added in float32, then rounded to `dtype`. Copy i depends on (seed, stream,
    first_sample + i) alone, so counts over any split of the samples add up.

    The tails are those that 32-bit words reach: |eps| <= sqrt(2 ln 2^32) = 6.66 in a Gaussian, 32 ln(2) / sqrt(2) =
    15.7 in a Laplace law. Uniform sigma * eps is never outside [-lambda, lambda], lambda the float32 nearest to
    sqrt(3) sigma; its sum with x is rounded.

    Args:
        x: image [C, H, W] in float32, bfloat16 or float16.
        n: number of copies; 0 gives an empty batch.
        sigma: standard deviation in pixel units, > 0 in float32 too.
        seed: 0 .. 2^64-1.
        first_sample: index of the first copy.
        stream: 0 .. 2^32-1; the image's index in its data set.
        dtype: of the result; default x's.
        memory_format: torch.contiguous_format (default) or torch.channels_last.
        law: "gaussian", "uniform" or "laplace".

    Returns:
        [n, C, H, W].

    Raises:
        TypeError, ValueError: a wrong shape, dtype or range, by name.
    """
    noise = checked_noise(x, n, sigma, seed, first_sample, stream, law)
    result: Tensor = _op(x, *noise, *checked_form(x, dtype, memory_format), law)
    return result


def checked_noise(
    x: Tensor, n: int, sigma: float, seed: int, first_sample: int, stream: int, law: str = "gaussian"
) -> tuple[int, float, int, int, int]:
    """(n, sigma, seed, first_sample, stream) as operators take them."""
    checked_law("law", law)
    checks.tensor("x", x, dtypes=DTYPES, ndim=3)
    n, first_sample, stream = checked_range(n, first_sample, stream)
    return n, checked_sigma(sigma, law), checks.signed(seed), first_sample, stream


def checked_range(n: int, first_sample: int, stream: int) -> tuple[int, int, int]:
    """The same of samples."""
    n = checks.integer("n", n, low=0)
    first_sample = checks.integer("first_sample", first_sample, low=0, high=2**63 - 1 - n)
    return n, first_sample, checks.integer("stream", stream, low=0, high=2**32 - 1)


def checked_form(
    x: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format | None
) -> tuple[torch.dtype, bool]:
    """(dtype, channels_last) of noisy copies as operators take them."""
    dtype = checks.choice("dtype", dtype or x.dtype, DTYPES)
    memory_format = memory_format or torch.contiguous_format
    checks.choice("memory_format", memory_format, (torch.contiguous_format, torch.channels_last))
    return dtype, memory_format is torch.channels_last


@torch.library.custom_op("csam::smoothing_noise", mutates_args=())
def _op(
    x: Tensor,
    n: int,
    sigma: float,
    seed: int,
    first_sample: int,
    stream: int,
    dtype: torch.dtype,
    channels_last: bool,
    law: str = "gaussian",
) -> Tensor:
    serve = backend.serve("smoothing_noise", x.device)
    return serve(x, n, sigma, seed, first_sample, stream, dtype, format_of(channels_last), law)


@_op.register_fake
def _(
    x: Tensor,
    n: int,
    sigma: float,
    seed: int,
    first_sample: int,
    stream: int,
    dtype: torch.dtype,
    channels_last: bool,
    law: str = "gaussian",
) -> Tensor:
    memory_format = format_of(channels_last)
    return torch.empty((n, *x.shape), dtype=dtype, device=x.device, memory_format=memory_format)


def format_of(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
