"""Masked linear layer: x @ (weight * mask).T + bias, differentiable in all four tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from csam_kernels import backend, checks
from csam_kernels.ops.masked_conv2d import autocast


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    block_size: int | None = None,
) -> Tensor:
    """linear(x, weight * mask, bias); the conventions are those of `masked_conv2d`.

    Args:
        x: [..., I].
        weight: [O, I].
        mask: [O, 1], [1, I] or [O, I], float or bool; with block_size=n [O, ceil(I/n)].
        bias: [O].

    Returns:
        [..., O] in x's dtype (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not go together, by name.
    """
    checks.tensor("x", x)
    checks.tensor("weight", weight, ndim=2)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., {weight.shape[1]}] (weight {tuple(weight.shape)}), got {tuple(x.shape)}")
    block = checks.block_size(block_size)
    checks.mask_for("mask", mask, weight, block)
    checks.vector("bias", bias, weight.shape[0])
    checks.same_device(x=x, weight=weight, mask=mask, bias=bias)
    x = autocast(x)
    compute = backend.plain("masked_linear") or _op
    # to the last bit as torch.nn.functional.linear: of strided x the bias is added to the rounded product
    fused, apart = (bias, None) if x.dim() == 2 or x.is_contiguous() else (None, bias)
    rows: Tensor = compute(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight, mask, fused, block)
    out = rows.reshape(*x.shape[:-1], weight.shape[0])
    return out if apart is None else out + apart.to(out.dtype)


@torch.library.custom_op("csam::masked_linear", mutates_args=())
def _op(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, block_size: int) -> Tensor:
    return backend.serve("masked_linear", x.device)(x, weight, mask, bias, block_size)


@_op.register_fake
def _(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, block_size: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("csam::masked_linear_backward", mutates_args=())
def _backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, block_size: int, need: list[bool]
) -> list[Tensor]:
    return backend.serve("masked_linear_backward", x.device)(grad, x, weight, mask, block_size, need)


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, block_size: int, need: list[bool]) -> list[Tensor]:
    shapes = (x, weight, mask)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, n in zip(shapes, need, strict=True) if n]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, bias, ctx.block_size = inputs
    ctx.save_for_backward(x, weight, mask)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need = list(ctx.needs_input_grad[:3])
    grads = iter(_backward_op(grad, *ctx.saved_tensors, ctx.block_size, need) if any(need) else ())
    dx, dweight, dmask = (next(grads) if n else None for n in need)
    dbias = grad.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, dweight, dmask, dbias, None


_op.register_autograd(_backward, setup_context=_setup_context)
