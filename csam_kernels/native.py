"""What the C++ providers share: the kernels' codes, tensors as the dense memory that they read and write, and what they
leave to torch."""

from __future__ import annotations

from collections.abc import Callable

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


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Products:
    """Torch's products with the weights that a provider's kernels make, and the gradients that they make of those."""

    def __init__(
        self,
        effective_weights: Callable[..., list[Tensor]],
        mask_gradients: Callable[..., tuple[list[Tensor], list[Tensor], Tensor]],
    ) -> None:
        self._effective_weights, self._mask_gradients = effective_weights, mask_gradients

    def effective(self, weight: Tensor, mask: Tensor, dtype: torch.dtype, block_size: int) -> Tensor:
        """weight * mask, rounded once."""
        return self._effective_weights([weight], [mask], "plain", 0.0, 0.0, [], "global", 0, 0, dtype, block_size)[0]

    def gradients(
        self, dw: Tensor | None, weight: Tensor, mask: Tensor, block_size: int, need_weight: bool, need_mask: bool
    ) -> list[Tensor]:
        """dL/dtheta and dL/dM from G in one pass, in the dtypes of theta and M."""
        if not (need_weight or need_mask) or dw is None:
            return []
        full = weight.to(wide(weight.dtype))
        dtheta, dmask, _ = self._mask_gradients([dw], [full], [mask], block_size, need_weight, need_mask)
        return [d.to(weight.dtype) for d in dtheta] + [d.to(mask.dtype) for d in dmask]

    def masked_linear(self, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, block_size: int) -> Tensor:
        w = self.effective(weight, mask, x.dtype, block_size)
        return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))

    def masked_linear_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, block_size: int, need: list[bool]
    ) -> list[Tensor]:
        need_x, need_weight, need_mask = need
        grads = [grad @ self.effective(weight, mask, x.dtype, block_size)] if need_x else []
        dw = grad.T @ x if need_weight or need_mask else None
        return grads + self.gradients(dw, weight, mask, block_size, need_weight, need_mask)
