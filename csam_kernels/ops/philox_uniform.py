"""Counter-based uniform numbers, one row a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels import backend, checks
from csam_kernels.ops.smoothing_noise import checked_range


def philox_uniform(n: int, k: int, *, seed: int, first_sample: int = 0, stream: int = 0) -> Tensor:
    """Uniform float32 numbers [n, k] in [0, 1) with 24 random bits, on the CPU.

    Row i holds the top 24 bits of Philox-4x32-10 words with key `seed` and counter (j//4, sample low, sample
    high, stream), sample = first_sample + i (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
    It depends on (seed, stream, first_sample + i) and on nothing else.

    Raises:
        TypeError, ValueError: n or k < 0, a seed outside [0, 2^64), a stream outside [0, 2^32), or a sample
            index beyond 2^63.
    """
    n, first_sample, stream = checked_range(n, first_sample, stream)
    result: Tensor = _op(n, checks.integer("k", k, low=0), checks.signed(seed), first_sample, stream)
    return result


@torch.library.custom_op("csam::philox_uniform", mutates_args=())
def _op(n: int, k: int, seed: int, first_sample: int, stream: int) -> Tensor:
    where = torch.device("cpu")
    return backend.serve("philox_uniform", where)(n, k, seed, first_sample, stream)


@_op.register_fake
def _(n: int, k: int, seed: int, first_sample: int, stream: int) -> Tensor:
    return torch.empty(n, k, dtype=torch.float32)
