"""Sparse convolution with samples as vector lanes: its time is proportional to the weights that survived."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels import backend, checks
from csam_kernels.layout import conv2d_size
from csam_kernels.ops.masked_conv2d import Pair, check_reach, checked_groups, pair

DTYPES = (torch.float32, torch.bfloat16)
MOST_TAPS = 2**20  # of a window


def sample_conv2d(
    x: Tensor,
    values: Tensor,
    taps: Tensor,
    rows: Tensor,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    relu: bool = False,
    dense: bool = False,
) -> Tensor:
    """Convolution of S samples that lie innermost, with a weight in compressed rows (see `compress`).

    out[o, i, j, s] = act(bias[o] + sum over k in rows[o] .. rows[o+1]-1 of values[k] * x[c, i*stride + kh*dilation -
    padding, j*stride + kw*dilation - padding, s] + other[o, i, j, s]), where (c, kh, kw) = taps[k], x is 0 outside its
    borders, and act = max(., 0) with relu, else the identity. With bfloat16 x the values are rounded to bfloat16 first.
    Groups and depthwise need no argument, since taps name input channels. For inference: not differentiable.

    Summed in float32 (the bias, the taps in ascending order, other) and rounded once to x's dtype. The bits do not
    depend on the number of threads or on S, and in float32 not on the instruction set either; in bfloat16 AVX512-BF16
    adds two products an instruction (dense: of two channels) and takes subnormals for 0. With AMX sparse products of
    bfloat16 are float16's, 64 of a sum at a time: inputs beyond 8188 may give inf, and those below 6e-8 count as 0;
    where filters read one channel each they are float32's. Weights that are absent multiply nothing, but where filters
    read one channel each: there they are zeros, so that the NaN and inf of that channel spread.

    Callers that have checked a packed weight once call `torch.ops.csam.sample_conv2d`, which checks nothing and reads
    wherever taps and rows point.

    Args:
        x: [C, H, W, S]; float32 or bfloat16. Fastest where S is a multiple of 16, in bfloat16 of 32.
        values: float32 [nnz], the surviving weights.
        taps: int32 [nnz], (c * kH + kh) * kW + kw of each, ascending in a row.
        rows: int32 [O + 1], where each output channel starts in values and taps, from 0 to nnz.
        bias: float32 [O].
        other: as the result, of x's dtype: a residual.
        kernel_size, stride, padding, dilation: an integer or a pair.
        dense: let filters share what they load and multiply the zeros too, between the filters and the input channels
            that have a weight at all; faster from a density of about 0.4 on. In float32 the bits stay the same.

    Returns:
        [O, H', W', S] in x's dtype.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not go together, taps or rows out of order or out of
            range, by name.
    """
    checks.tensor("x", x, dtypes=DTYPES, ndim=4)
    checks.tensor("values", values, dtypes=(torch.float32,), ndim=1)
    checks.tensor("taps", taps, dtypes=(torch.int32,), ndim=1)
    checks.tensor("rows", rows, dtypes=(torch.int32,), ndim=1)
    if bias is not None:
        checks.tensor("bias", bias, dtypes=(torch.float32,))
    if other is not None:
        checks.tensor("other", other, dtypes=(x.dtype,))
    checks.flag("relu", relu)
    checks.flag("dense", dense)
    checks.same_device(x=x, values=values, taps=taps, rows=rows, bias=bias, other=other)
    kernel, stride = pair("kernel_size", kernel_size, 1), pair("stride", stride, 1)
    padding, dilation = pair("padding", padding, 0), pair("dilation", dilation, 1)
    if kernel[0] * kernel[1] > MOST_TAPS:
        raise ValueError(f"kernel_size must hold at most {MOST_TAPS} taps, got {kernel}")
    compressed_rows(values, taps, rows, x.shape[0] * kernel[0] * kernel[1])
    check_reach(x.shape[1:3], kernel, padding, dilation)
    filters = len(rows) - 1
    checks.vector("bias", bias, filters)
    shape = (filters, *conv2d_size(x.shape[1:3], kernel, stride, padding, dilation), x.shape[3])
    if other is not None and other.shape != shape:
        raise ValueError(f"other must have the result's shape {shape}, got {tuple(other.shape)}")
    result: Tensor = _op(x, values, taps, rows, bias, other, kernel, stride, padding, dilation, relu, dense)
    return result


def compressed_rows(values: Tensor, taps: Tensor, rows: Tensor, columns: int) -> None:
    """Refuse what is no weight in compressed rows of so many columns."""
    if taps.shape != values.shape:
        raise ValueError(f"taps must have one entry a value, {len(values)}, got {len(taps)}")
    if not len(rows) or int(rows[0]) != 0 or int(rows[-1]) != len(values) or bool((rows.diff() < 0).any()):
        raise ValueError(f"rows must ascend from 0 to the {len(values)} values")
    if not len(values):
        return
    low, high = (int(t) for t in taps.aminmax())
    if low < 0 or high >= columns:
        raise ValueError(f"taps must be in [0, {columns}) = [0, C * kH * kW), got {low if low < 0 else high}")
    falls = taps[1:] <= taps[:-1]
    starts = rows[1:-1].long()
    falls[starts[(starts > 0) & (starts < len(taps))] - 1] = False
    if bool(falls.any()):
        raise ValueError(f"taps must ascend in each row, got a fall after entry {int(falls.int().argmax())}")


def compress(weight: Tensor, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The non-zeros of a weight [O, C/groups, kH, kW] as (values, taps, rows) of `sample_conv2d`.

    Raises:
        TypeError, ValueError: a weight of another rank or dtype, or whose filters do not divide into groups.
    """
    checks.tensor("weight", weight, ndim=4)
    groups = checked_groups(groups, weight)
    flat = weight.detach().to(torch.float32).flatten(1)
    filters, columns = flat.nonzero(as_tuple=True)
    counts = torch.bincount(filters, minlength=len(weight))
    rows = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    taps = filters // max(1, len(weight) // groups) * flat.shape[1] + columns
    return flat[filters, columns], taps.to(torch.int32), rows.to(torch.int32)


@torch.library.custom_op("csam::sample_conv2d", mutates_args=())
def _op(
    x: Tensor,
    values: Tensor,
    taps: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    relu: bool,
    dense: bool,
) -> Tensor:
    serve = backend.serve("sample_conv2d", x.device)
    out: Tensor = serve(x, values, taps, rows, bias, other, kernel_size, stride, padding, dilation, relu, dense)
    return out


@_op.register_fake
def _(
    x: Tensor,
    values: Tensor,
    taps: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    relu: bool,
    dense: bool,
) -> Tensor:
    size = conv2d_size(x.shape[1:3], kernel_size, stride, padding, dilation)
    return x.new_empty((rows.shape[0] - 1, *size, x.shape[3]))
