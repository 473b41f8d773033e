"""What the C++ providers share: the kernels' codes, and tensors as the dense memory that they read and write."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels.layout import memory_format

DTYPE = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
    torch.int8: 5,
}  # csrc/common/dtype.h
KIND = {"plain": 0, "uniform": 1, "adversarial": 2}  # enum Perturbation
WORD = 2**64 - 1  # a seed as the unsigned number that the kernels take


def flat(n: int) -> tuple[int, ...]:
    return (1, n, n, 1, 1)


def dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def like(t: Tensor, pattern: Tensor) -> Tensor:
    """t in the memory order of a dense pattern."""
    return t if t.stride() == pattern.stride() else torch.empty_like(pattern, dtype=t.dtype).copy_(t)


def fusible(kind: str, weights: list[Tensor], masks: list[Tensor]) -> bool:
    """Full float32 masks in the weights' memory order; uniform noise is drawn by the contiguous index."""
    return all(
        m.dtype is torch.float32
        and w.dtype is not torch.float64
        and m.shape == w.shape
        and m.stride() == w.stride()
        and (w.is_contiguous() or (kind == "adversarial" and dense(w)))
        for w, m in zip(weights, masks, strict=True)
    )


def restride(out: Tensor, weight: Tensor) -> Tensor:
    """The weight's memory format, so that the convolution takes the path it takes with the dense weight."""
    return out.contiguous(memory_format=memory_format(weight))
