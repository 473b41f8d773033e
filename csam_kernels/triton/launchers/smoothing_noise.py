"""Noise batching: grid = tiles of the image times groups of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from csam_kernels.checks import WORD
from csam_kernels.laws import scaled
from csam_kernels.triton import tables, tuning
from csam_kernels.triton.kernels.philox import CELLS
from csam_kernels.triton.kernels.smoothing_noise import smoothing_noise as kernel
from csam_kernels.triton.launch import LIMIT, launch

_CELLS = CELLS.value
# A deviate, and x + scale * that: 25, 4, 20 and 9; 15 integer ones of Philox take the same slots.
_FLOPS = (40, 19, 35, 24)


def smoothing_noise(
    x: Tensor,
    n: int,
    sigma: float,
    seed: int,
    first_sample: int,
    stream: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    law: str = "gaussian",
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
) -> Tensor:
    code, scale = scaled(law, sigma)
    affine = None if input_scale is None or input_shift is None else (input_scale.float(), input_shift.float())
    return _noisy(x, n, code, scale, seed, first_sample, stream, dtype, memory_format, affine)


def grid_noise(
    numbers: Tensor,
    n: int,
    sigma: float,
    grid: int,
    seed: int,
    first_sample: int,
    stream: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    law: str = "gaussian",
) -> Tensor:
    *table, bits = tables.cell_tables(sigma, grid, law, numbers.device)
    return _noisy(numbers, n, _CELLS, float(grid), seed, first_sample, stream, dtype, memory_format, table, bits)


def _noisy(
    x: Tensor,
    n: int,
    code: int,
    scale: float,
    seed: int,
    first_sample: int,
    stream: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    pair: Sequence[Tensor] | None,
    bits: int = 0,
) -> Tensor:
    """`pair` is a factor and a summand a channel, or those of CELLS."""
    channels, height, width = x.shape
    pixels, elements = height * width, x.numel()
    if max(elements, n) > LIMIT:
        raise ValueError(f"x and n must be at most 2^31 - 2^22 on a GPU, got {elements} elements and n={n}")
    out = torch.empty((n, *x.shape), dtype=dtype, device=x.device, memory_format=memory_format)
    row = (tuning.GRID_NOISE if code == _CELLS else tuning.SMOOTHING_NOISE)[tuning.device_class(x.device)]
    quads = row["QUADS"]
    channels_last = memory_format is torch.channels_last and channels > 1 and pixels > 1
    if channels_last:
        quads = max(quads, triton.next_power_of_2(8 * channels))
        tile_quads = quads // channels
        tile_pixels = tile_quads // 4 * 16 if pixels % 4 == 0 else 4 * tile_quads - 3
        tiles = triton.cdiv(pixels, tile_pixels)
    else:
        channels, pixels = 1, elements
        tile_quads, tile_pixels = quads, 4 * quads
        tiles = triton.cdiv(elements, tile_pixels)
    samples = min(max(1, n * tiles // row["programs"]), row["samples"])
    launch(
        kernel,
        (tiles * triton.cdiv(n, samples),),
        reads=[x, *(pair or ())],  # again for each group of samples, but then from the cache
        writes=[out],
        flops=_FLOPS[code] * out.numel(),
        num_warps=row["num_warps"],
        x_ptr=x.contiguous(),
        first_ptr=pair[0] if pair else x,
        second_ptr=pair[1] if pair else x,
        out_ptr=out,
        n=n,
        channels=channels,
        pixels=pixels,
        plane=height * width,
        tile_pixels=tile_pixels,
        tile_quads=tile_quads,
        tiles=tiles,
        samples=samples,
        bits=bits,
        scale=scale,
        first_sample=first_sample,
        seed=seed & WORD,
        stream_word=stream,
        LAW=code,
        QUADS=quads,
        CHANNELS_LAST=channels_last,
        NORMALIZED=pair is not None and code != _CELLS,
    )
    return out
