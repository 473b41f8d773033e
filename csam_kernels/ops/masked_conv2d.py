"""Masked convolution: conv2d(x, weight * mask), differentiable in all four tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from csam_kernels import backend, checks
from csam_kernels.layout import fake_like, fake_mask_gradient

Pair = int | tuple[int, int] | list[int]


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    block_size: int | None = None,
) -> Tensor:
    """conv2d(x, weight * mask, bias, stride, padding, dilation, groups).

    The product is taken in the weight's dtype and rounded once to x's, so x may be bfloat16 while weight and mask stay
    float32; under torch.autocast x is cast to the autocast dtype first, unless it is float64. With W = weight * mask
    and G = dL/dW the gradients are dL/dweight = G * mask and dL/dmask = G * weight, summed over the mask's broadcast.
    Filters and input channels that a filter, channel or full bool mask switches off are left out where that pays.
    Transforms of torch.func and forward-mode AD go through torch's own operators; a second backward raises.

    Args:
        x: [B, C, H, W] or [C, H, W].
        weight: [O, C/groups, kH, kW].
        mask: [O, 1, 1, 1] (filter), [1, C/groups, 1, 1] (channel), [O, C/groups, kH, kW] (weight) or any other
            axis-by-axis broadcast, float or bool; with block_size=n [O, ceil(C/groups*kH*kW / n)].
        bias: [O].
        stride, padding, dilation, groups: as torch.nn.functional.conv2d, "same" and "valid" included.

    Returns:
        [B, O, H', W'] in x's dtype (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not go together, by name.
    """
    x, *options = checked_convolution(x, weight, mask, bias, stride, padding, dilation, groups, block_size)
    x = autocast(x)
    batched = x if x.dim() == 4 else x[None]
    compute = backend.plain("masked_conv2d") or _op
    out: Tensor = compute(batched, weight, mask, bias, *options)
    return out if x.dim() == 4 else out[0]


def checked_convolution(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
    block_size: int | None,
) -> tuple[Tensor, list[int], list[int], list[int], int, int]:
    """(x, stride, padding, dilation, groups, block size) as operators take them; x is padded where they cannot."""
    checks.tensor("x", x)
    checks.tensor("weight", weight, ndim=4)
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be [B, C, H, W] or [C, H, W], got shape {tuple(x.shape)}")
    groups = checked_groups(groups, weight)
    in_channels = weight.shape[1] * groups
    if x.shape[-3] != in_channels:
        raise ValueError(
            f"x must have {in_channels} channels (weight {tuple(weight.shape)}, groups={groups}), "
            f"got shape {tuple(x.shape)}"
        )
    block = checks.block_size(block_size)
    checks.mask_for("mask", mask, weight, block)
    checks.vector("bias", bias, len(weight))
    checks.same_device(x=x, weight=weight, mask=mask, bias=bias)
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    x, padding = _pad(x, padding, weight.shape[2:], stride, dilation)
    check_reach(x.shape[-2:], weight.shape[2:], padding, dilation)
    return x, stride, padding, dilation, groups, block


def autocast(x: Tensor) -> Tensor:
    """x as torch.autocast hands it to a convolution or a linear layer: float64 is left alone, and the meta device."""
    if x.dtype is torch.float64 or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def pair(name: str, value: Any, low: int) -> list[int]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    if len(values) not in (1, 2):
        raise ValueError(f"{name} must be an integer or a pair, got {value!r}")
    values = [checks.integer(name, v, low=low) for v in values]
    return values * 2 if len(values) == 1 else values


def checked_groups(groups: int, weight: Tensor) -> int:
    groups = checks.integer("groups", groups, low=1)
    if len(weight) % groups:
        raise ValueError(f"groups must divide the {len(weight)} filters of weight, got {groups}")
    return groups


def check_reach(size: Sequence[int], kernel: Sequence[int], padding: list[int], dilation: list[int]) -> None:
    """Refuse images on which not one window fits."""
    for axis, n, k, pad, step in zip("HW", size, kernel, padding, dilation, strict=True):
        reach = step * (k - 1) + 1
        if n + 2 * pad < reach:
            raise ValueError(f"x is too small along {axis}: {n} + 2*{pad} padding < kernel reach {reach}")


def _pad(
    x: Tensor, padding: Any, kernel: torch.Size, stride: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Numeric padding; for "same" with an even reach the odd column goes to the right, as in torch."""
    if not isinstance(padding, str):
        return x, pair("padding", padding, 0)
    if padding == "valid":
        return x, [0, 0]
    if padding != "same":
        raise ValueError(f"padding must be an integer, a pair, 'same' or 'valid', got {padding!r}")
    if stride != [1, 1]:
        raise ValueError(f"padding='same' needs stride 1, got stride={tuple(stride)}")
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(r % 2 for r in reach):
        x = F.pad(x, (0, reach[1] % 2, 0, reach[0] % 2))
    return x, [r // 2 for r in reach]


@torch.library.custom_op("csam::masked_conv2d", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block_size: int,
) -> Tensor:
    serve = backend.serve("masked_conv2d", x.device)
    return serve(x, weight, mask, bias, stride, padding, dilation, groups, block_size)


@_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block_size: int,
) -> Tensor:
    return torch.conv2d(x, torch.empty_like(weight, dtype=x.dtype), None, stride, padding, dilation, groups)


@torch.library.custom_op("csam::masked_conv2d_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block_size: int,
    need: list[bool],
) -> list[Tensor]:
    serve = backend.serve("masked_conv2d_backward", x.device)
    return serve(grad, x, weight, mask, stride, padding, dilation, groups, block_size, need)


@_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    block_size: int,
    need: list[bool],
) -> list[Tensor]:
    need_x, need_weight, need_mask = need
    effective = torch.empty_like(weight, dtype=x.dtype)
    grads = []
    if need_x:
        args = (stride, padding, dilation, False, [0, 0], groups, [True, False, False])
        grads.append(torch.ops.aten.convolution_backward(grad, x, effective, None, *args)[0])
    if need_weight:
        grads.append(fake_like(weight))
    if need_mask:
        grads.append(fake_mask_gradient(mask, weight, mask.dtype))
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, bias, *ctx.options = inputs
    ctx.save_for_backward(x, weight, mask)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight, need_mask, need_bias = ctx.needs_input_grad[:4]
    grads = iter(())
    if need_x or need_weight or need_mask:
        grads = iter(_backward_op(grad, *ctx.saved_tensors, *ctx.options, [need_x, need_weight, need_mask]))
    dx, dweight, dmask = (next(grads) if need else None for need in (need_x, need_weight, need_mask))
    dbias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype) if need_bias else None
    return dx, dweight, dmask, dbias, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
