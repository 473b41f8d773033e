"""Masked convolution without gradients: what follows it in a network is done where its sums are."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels import backend, checks
from csam_kernels.layout import conv2d_size
from csam_kernels.ops.masked_conv2d import Pair, checked_convolution, checked_groups


def masked_conv2d_inference(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    other: Tensor | None = None,
    relu: bool = False,
    block_size: int | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """act((conv2d(x, weight * mask) + bias) * scale + shift + other), act = max(., 0) with relu, else the identity.

    On a GPU one kernel, which sums in float32 and rounds once to x's dtype (a depthwise layer adds `other` in another);
    on a CPU a composition of operators that rounds the convolution's result to x's dtype first. Not differentiable.

    Callers that have checked a layer once call `torch.ops.csam.masked_conv2d_inference`.

    Args:
        x: [B, C, H, W].
        weight, mask, bias, stride, ..., block_size: as in `masked_conv2d`.
        scale, shift: [O], such as those of a batch norm; both or none.
        other: as the result: a residual.
        tiles: what `live_tiles` gave for this weight, mask and x's dtype, so that no call makes it again.

    Returns:
        [B, O, H', W'] in x's dtype.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not go together, by name.
    """
    checks.tensor("x", x, ndim=4)
    x, *window, groups, block = checked_convolution(
        x, weight, mask, bias, stride, padding, dilation, groups, block_size
    )
    scaling = checked_scaling("scale", scale, "shift", shift, len(weight))
    checked_tiles(tiles)
    checks.flag("relu", relu)
    shape = (len(x), len(weight), *conv2d_size(x.shape[2:], weight.shape[2:], *window))
    if other is not None and checks.tensor("other", other, dtypes=(x.dtype,)).shape != shape:
        raise ValueError(f"other must have the result's shape {shape}, got {tuple(other.shape)}")
    checks.same_device(x=x, scale=scale, shift=shift, other=other, tiles=tiles)
    result: Tensor = _op(x, weight, mask, bias, *scaling, relu, *window, groups, block, other, tiles)
    return result


def checked_scaling(
    scale_name: str, scale: Tensor | None, shift_name: str, shift: Tensor | None, channels: int
) -> tuple[Tensor | None, Tensor | None]:
    """A factor and a summand for each of `channels`; both or none."""
    if (scale is None) != (shift is None):
        raise ValueError(f"{scale_name} and {shift_name} must be given together")
    for name, value in ((scale_name, scale), (shift_name, shift)):
        checks.vector(name, value, channels)
    return scale, shift


def checked_tiles(tiles: Tensor | None) -> None:
    """That it may be a table; the provider knows which size it must have."""
    if tiles is not None and not checks.tensor("tiles", tiles, dtypes=(torch.int32,), ndim=1).is_contiguous():
        raise ValueError(f"tiles must be contiguous, as live_tiles gives it, got strides {tiles.stride()}")


def live_tiles(
    weight: Tensor,
    mask: Tensor,
    *,
    dtype: torch.dtype,
    groups: int = 1,
    block_size: int | None = None,
) -> Tensor | None:
    """weight * mask as a GPU's kernels read it, and which of its tiles are not all zero, to be skipped; None where
    nothing reads such a table (a CPU, depthwise layers).

    Args:
        weight, mask, groups, block_size: of the convolution.
        dtype: of its images.

    Returns:
        int32 [*]; it is right as long as weight and mask keep their values.

    Raises:
        TypeError, ValueError: a mask that does not lie over the weight, another dtype, groups that do not fit.
    """
    checks.tensor("weight", weight, ndim=4)
    checks.choice("dtype", dtype, checks.FLOATS)
    groups = checked_groups(groups, weight)
    block = checks.block_size(block_size)
    checks.mask_for("mask", mask, weight, block)
    where = checks.same_device(weight=weight, mask=mask)
    table: Tensor | None = backend.serve("live_tiles", where)(weight, mask, dtype, groups, block)
    return table


@torch.library.custom_op("csam::masked_conv2d_inference", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block_size: int,
    other: Tensor | None,
    tiles: Tensor | None,
) -> Tensor:
    serve = backend.serve("masked_conv2d_inference", x.device)
    options = (stride, padding, dilation, groups, block_size)
    return serve(x, weight, mask, bias, scale, shift, relu, *options, other, tiles)


@_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block_size: int,
    other: Tensor | None,
    tiles: Tensor | None,
) -> Tensor:
    return torch.conv2d(x, torch.empty_like(weight, dtype=x.dtype), None, stride, padding, dilation, groups)
