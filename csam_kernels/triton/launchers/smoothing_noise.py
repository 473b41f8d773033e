"""Noise batching: grid = tiles of the image times groups of samples."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from csam_kernels.laws import scaled
from csam_kernels.triton import tuning
from csam_kernels.triton.kernels.smoothing_noise import smoothing_noise as kernel
from csam_kernels.triton.launch import LIMIT, launch

_WORD = 2**64 - 1
# A deviate, and x + scale * that: 25, 4 and 20; 15 integer ones of Philox take the same slots.
_FLOPS = {"gaussian": 40, "uniform": 19, "laplace": 35}


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
    channels, height, width = x.shape
    pixels, elements = height * width, x.numel()
    if max(elements, n) > LIMIT:
        raise ValueError(f"x and n must be at most 2^31 - 2^22 on a GPU, got {elements} elements and n={n}")
    out = torch.empty((n, *x.shape), dtype=dtype, device=x.device, memory_format=memory_format)
    code, scale = scaled(law, sigma)
    row = tuning.SMOOTHING_NOISE[tuning.device_class(x.device)]
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
        reads=[x],  # again for each group of samples, but then from the cache
        writes=[out],
        flops=_FLOPS[law] * out.numel(),
        num_warps=row["num_warps"],
        x_ptr=x.contiguous(),
        input_scale_ptr=x if input_scale is None else input_scale.float(),
        input_shift_ptr=x if input_shift is None else input_shift.float(),
        out_ptr=out,
        n=n,
        channels=channels,
        pixels=pixels,
        plane=height * width,
        tile_pixels=tile_pixels,
        tile_quads=tile_quads,
        tiles=tiles,
        samples=samples,
        scale=scale,
        first_sample=first_sample,
        seed=seed & _WORD,
        stream_word=stream,
        LAW=code,
        QUADS=quads,
        CHANNELS_LAST=channels_last,
        NORMALIZED=input_scale is not None,
    )
    return out
