"""A masked convolution of noisy copies of one image."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels import backend, checks
from csam_kernels.ops.masked_conv2d import Pair, checked_convolution
from csam_kernels.ops.masked_conv2d_inference import checked_scaling, checked_tiles
from csam_kernels.ops.smoothing_noise import DTYPES, checked_noise


def smoothing_conv2d(
    x: Tensor,
    n: int,
    sigma: float,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    seed: int,
    first_sample: int = 0,
    stream: int = 0,
    dtype: torch.dtype | None = None,
    input_scale: Tensor | None = None,
    input_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    block_size: int | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """masked_conv2d_inference of smoothing_noise(x, n, sigma) * input_scale + input_shift.

    The deviates are those of `smoothing_noise`, bit for bit; the normalisation, one factor and one summand a channel,
    is done in float32, and its result rounded once to `dtype`. The convolution's padding is zeros after it.

    Args:
        x: image [C, H, W] in float32, bfloat16 or float16.
        n, sigma, seed, first_sample, stream, dtype: as in `smoothing_noise`.
        weight, mask, bias, stride, ..., block_size: as in `masked_conv2d`.
        input_scale, input_shift: [C], such as 1 / std and -mean / std; both or none.
        scale, shift, relu: as in `masked_conv2d_inference`.
        tiles: what `live_tiles` gave for this weight, mask and dtype.

    Returns:
        [n, O, H', W'] in `dtype`.

    Raises:
        TypeError, ValueError: a wrong shape, dtype, device or range, by name; padding="same" that pads one side more.
    """
    noise = checked_noise(x, n, sigma, seed, first_sample, stream)
    dtype = checks.choice("dtype", dtype or x.dtype, DTYPES)
    padded, *options = checked_convolution(x, weight, mask, bias, stride, padding, dilation, groups, block_size)
    if padded is not x:
        raise ValueError("padding must be numbers where 'same' would pad one side of the noisy copies more")
    normalization = checked_scaling("input_scale", input_scale, "input_shift", input_shift, len(x))
    scaling = checked_scaling("scale", scale, "shift", shift, len(weight))
    extra = {"input_scale": input_scale, "input_shift": input_shift, "scale": scale, "shift": shift, "tiles": tiles}
    checked_tiles(tiles)
    checks.flag("relu", relu)
    checks.same_device(x=x, **extra)
    result: Tensor = _op(x, *noise, weight, mask, bias, *options, *normalization, *scaling, relu, dtype, tiles)
    return result


@torch.library.custom_op("csam::smoothing_conv2d", mutates_args=())
def _op(
    x: Tensor,
    n: int,
    sigma: float,
    seed: int,
    first_sample: int,
    stream: int,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block_size: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    dtype: torch.dtype,
    tiles: Tensor | None,
) -> Tensor:
    serve = backend.serve("smoothing_conv2d", x.device)
    noise, options = (n, sigma, seed, first_sample, stream), (stride, padding, dilation, groups, block_size)
    normalization, epilogue = (input_scale, input_shift), (scale, shift, relu)
    return serve(x, *noise, weight, mask, bias, *options, *normalization, *epilogue, dtype, tiles)


@_op.register_fake
def _(
    x: Tensor,
    n: int,
    sigma: float,
    seed: int,
    first_sample: int,
    stream: int,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block_size: int,
    input_scale: Tensor | None,
    input_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    dtype: torch.dtype,
    tiles: Tensor | None,
) -> Tensor:
    batch = torch.empty((n, *x.shape), dtype=dtype, device=x.device)
    return torch.conv2d(batch, torch.empty_like(weight, dtype=dtype), None, stride, padding, dilation, groups)
