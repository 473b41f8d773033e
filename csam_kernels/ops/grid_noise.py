"""Noise on a grid: sums with it are exact, and its law is the one that is written down."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels import backend, checks
from csam_kernels.cells import steps, unchecked_steps
from csam_kernels.ops.smoothing_noise import checked_form, checked_noise, format_of

MOST = 2**16  # steps to 1


def grid_noise(
    x: Tensor,
    n: int,
    sigma: float,
    *,
    seed: int,
    first_sample: int = 0,
    stream: int = 0,
    grid: int = 255,
    on_grid: bool = False,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    law: str = "gaussian",
) -> Tensor:
    """n noisy copies of one image whose pixels are whole numbers / grid: out[i] = (x * grid + k_i) / grid.

    k_i is sigma * grid * eps rounded to whole numbers, eps as in `smoothing_noise`, within 2^-79 in total variation a
    coordinate (`csam_kernels.cells`). It is drawn from the same words, by (seed, stream, first_sample + i) alone. The
    sum is exact, the quotient rounded to float32, then to `dtype`: equal numbers have equal bits, whatever image
    and noise they came from.

    Args:
        x: image [C, H, W] in float32, bfloat16 or float16, each value the float32 nearest to a whole number / grid,
            such as uint8 / 255.
        grid: steps to 1, 1 .. 2^16.
        on_grid: x is known to be on the grid and is not looked at, for which a GPU would be waited for.
        n, sigma, seed, first_sample, stream, dtype, memory_format, law: as in `smoothing_noise`; sigma in x's unit.

    Returns:
        [n, C, H, W].

    Raises:
        TypeError, ValueError: a wrong shape, dtype or range, by name; x off the grid; sigma too large for a table.
    """
    n, sigma, *where = checked_noise(x, n, sigma, seed, first_sample, stream, law)
    form = checked_form(x, dtype, memory_format)
    numbers = (unchecked_steps if checks.flag("on_grid", on_grid) else steps)(x, checked_grid(grid))
    result: Tensor = _op(numbers, n, sigma, grid, *where, *form, law)
    return result


def checked_grid(grid: int) -> int:
    return checks.integer("grid", grid, low=1, high=MOST)


@torch.library.custom_op("csam::grid_noise", mutates_args=())
def _op(
    numbers: Tensor,
    n: int,
    sigma: float,
    grid: int,
    seed: int,
    first_sample: int,
    stream: int,
    dtype: torch.dtype,
    channels_last: bool,
    law: str = "gaussian",
) -> Tensor:
    """Of the whole numbers of an image, float32, which are not looked at: on a GPU that would wait for it."""
    serve = backend.serve("grid_noise", numbers.device)
    return serve(numbers, n, sigma, grid, seed, first_sample, stream, dtype, format_of(channels_last), law)


@_op.register_fake
def _(
    numbers: Tensor,
    n: int,
    sigma: float,
    grid: int,
    seed: int,
    first_sample: int,
    stream: int,
    dtype: torch.dtype,
    channels_last: bool,
    law: str = "gaussian",
) -> Tensor:
    memory_format = format_of(channels_last)
    return torch.empty((n, *numbers.shape), dtype=dtype, device=numbers.device, memory_format=memory_format)
