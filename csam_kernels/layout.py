"""How a mask lies over a weight: one description for every granularity.

A weight [O, ...] is seen as `rows` filters of `cols` flattened weights. The mask value of weight (o, r) is
`mask.flatten()[o * row_stride + (r // span) * col_stride]`:

| granularity | mask shape | row_stride | span | col_stride |
|---|---|---|---|---|
| weight | [O, I, kH, kW] | cols | 1 | 1 |
| filter | [O, 1, 1, 1] | 1 | cols | 0 |
| channel | [1, I, 1, 1] | 0 | kH*kW | 1 |
| kernel | [O, I, 1, 1] | I | kH*kW | 1 |
| block of n | [O, ceil(cols/n)] | ceil(cols/n) | n | 1 |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MaskLayout(NamedTuple):
    rows: int
    cols: int
    row_stride: int
    span: int
    col_stride: int

    @property
    def elementwise(self) -> bool:
        """The mask has a value for each weight, in the same order."""
        return self.span == 1 and self.col_stride == 1 and (self.row_stride == self.cols or self.rows == 1)


def mask_layout(weight_shape: torch.Size, mask_shape: torch.Size, block_size: int = 0) -> MaskLayout | None:
    """The strides above; None for a broadcast that has no such form (it is then expanded first)."""
    rows = weight_shape[0] if weight_shape else 1
    cols = math.prod(weight_shape[1:])
    if block_size:
        return MaskLayout(rows, cols, math.ceil(cols / block_size), max(1, min(block_size, cols)), 1)
    # An axis of length one is broadcast and kept at once, so it counts as kept wherever that helps.
    own = [m == w for m, w in zip(mask_shape, weight_shape, strict=True)]
    tail = math.prod(mask_shape[1:])
    row_stride = tail if mask_shape[0] == rows else 0
    if tail == 1:
        return MaskLayout(rows, cols, row_stride, max(cols, 1), 0)
    if all(own[1:]):
        return MaskLayout(rows, cols, row_stride, 1, 1)
    if cols and own[1] and math.prod(mask_shape[2:]) == 1:
        return MaskLayout(rows, cols, row_stride, math.prod(weight_shape[2:]), 1)
    return None


def memory_format(t: Tensor) -> torch.memory_format:
    """In which format the results made like `t` lie: channels_last where it does, contiguous for any other order."""
    last = t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def conv2d_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Height and width of a convolution's result."""
    window = zip(size, kernel, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in window]


def fake_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The fake of a result made like `t`."""
    return torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device, memory_format=memory_format(t))


def fake_mask_gradient(mask: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The fake of dL/dM: made like the mask where that lies as the weight does, contiguous elsewhere."""
    if mask.shape == weight.shape and mask.stride() == weight.stride():
        return fake_like(mask, dtype)
    return torch.empty(mask.shape, dtype=dtype, device=mask.device)


def expand_mask(mask: Tensor, weight_shape: torch.Size, block_size: int = 0) -> Tensor:
    """The mask at the weight's full shape (a view where broadcasting allows it)."""
    if not block_size:
        return mask.expand(weight_shape)
    cols = math.prod(weight_shape[1:])
    return mask.repeat_interleave(min(block_size, cols), dim=1)[:, :cols].reshape(weight_shape)


def reduce_to_mask(full: Tensor, mask_shape: torch.Size, block_size: int = 0) -> Tensor:
    """Sum a weight-shaped tensor over everything that one mask value covers."""
    if not block_size:
        return full.sum_to_size(mask_shape)
    rows, blocks = mask_shape
    flat = full.flatten(1)
    block_size = min(block_size, flat.shape[1])
    padded = torch.nn.functional.pad(flat, (0, blocks * block_size - flat.shape[1]))
    return padded.reshape(rows, blocks, block_size).sum(2)
