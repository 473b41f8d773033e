"""Convolution as a matrix product, for the layers where a training step is bound by the weight and not by the image.

conv2d(x, W) = columns(x) @ W': row n of columns(x) [N, kH*kW*I] is the window of output position n, N = B*Ho*Wo, and W'
is W with its filters flattened as [kH, kW, I], which channels_last weights already are in memory. oneDNN reorders a
weight into blocks in every call and its gradient back again; with few positions and many channels that costs more than
the arithmetic, and the matrix product needs none of it. dL/dW = (dL/dout)^T @ columns(x), and for stride 1 dL/dx is
the product of columns(dL/dout) with the flipped filters.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Pair: TypeAlias = tuple[int, int]


class _Limits(NamedTuple):
    """The product pays while N <= limit * channels that it makes."""

    image: int  # output and input gradient
    weight: int  # weight gradient


# Measured against oneDNN on the layers of ResNet-18 at batch 64, one CPU of each kind. Without AMX oneDNN runs at 90 %
# of the peak and more, but for the bfloat16 weight gradient of small images.
_WITH_AMX = {torch.float32: _Limits(2, 2), torch.bfloat16: _Limits(2, 16)}
_WITHOUT_AMX = {torch.bfloat16: _Limits(0, 2)}
_LIMITS = _WITH_AMX if torch.cpu.get_capabilities().get("amx_bf16") else _WITHOUT_AMX


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
    """F.conv2d(x, weight, bias, stride, padding) by whichever way is faster for each of its three products.

    Args:
        x: [B, I, H, W] on the CPU.
        weight: [O, I, kH, kW] of x's dtype; channels_last spares a copy.

    Returns:
        [B, O, Ho, Wo]; channels_last where it is a matrix product.
    """
    out: Tensor = _Conv2d.apply(x, weight, bias, stride, padding)
    return out


def pays(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> bool:
    """Whether `conv2d` serves the call and takes a matrix product for one of its three products at least."""
    if torch.compiler.is_compiling() or x.dim() != 4 or x.device.type != "cpu":
        return False
    if x.dtype != weight.dtype or x.dtype not in _LIMITS or not x.numel():
        return False
    if x.dtype == torch.float32 and not x.is_contiguous(memory_format=torch.channels_last):
        return False
    return _weight_gradient_pays(x, weight, stride, padding)


class _Scratch(threading.local):
    """One buffer a thread and dtype for columns, which never outlive a product: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}

    def get(self, numel: int, dtype: torch.dtype) -> Tensor:
        held = self.buffers.get(dtype)
        if held is None or held.numel() < numel:
            with torch.inference_mode(False):  # it serves calls outside of that mode too
                held = self.buffers[dtype] = torch.empty(numel, dtype=dtype, device="cpu")
        return held[:numel]


_scratch = _Scratch()


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.stride, ctx.padding = stride, padding
        bias = None if bias is None else bias.to(x.dtype)
        if _positions(x, weight, stride, padding) > _LIMITS[x.dtype].image * len(weight):
            return torch.conv2d(x, weight, bias, stride, padding)
        columns = _columns(x, weight.shape[2:], stride, padding)
        out = _product(_rows(weight), columns)
        out = out if bias is None else out + bias
        return _images(out, len(x), *_out_size(x, weight, stride, padding))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dweight = dbias = None
        if need_weight and _weight_gradient_pays(x, weight, stride, padding):
            flat = _positions_by_channel(grad).t() @ _columns(x, weight.shape[2:], stride, padding)
            dweight = _images(flat, len(weight), *weight.shape[2:])
        if need_x and _input_gradient_pays(x, weight, stride, padding):
            around = (weight.shape[2] - 1 - padding[0], weight.shape[3] - 1 - padding[1])
            flat = _product(_flipped(weight).t(), _columns(grad, weight.shape[2:], (1, 1), around))
            dx = _images(flat, len(x), *x.shape[2:])
        rest = [need_x and dx is None, need_weight and dweight is None, False]
        if any(rest):
            args = (x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, rest)
            by_onednn = torch.ops.aten.convolution_backward(grad, *args)
            dx, dweight = by_onednn[0] if rest[0] else dx, by_onednn[1] if rest[1] else dweight
        if need_bias:
            dbias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype)
        return dx, dweight, dbias, None, None


def _weight_gradient_pays(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> bool:
    return _positions(x, weight, stride, padding) <= _LIMITS[x.dtype].weight * len(weight)


def _input_gradient_pays(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> bool:
    """dL/dx is a convolution too, with the channels swapped; stride 1 and padding below the kernel are served."""
    fits = stride == (1, 1) and padding[0] < weight.shape[2] and padding[1] < weight.shape[3]
    return fits and len(x) * x.shape[2] * x.shape[3] <= _LIMITS[x.dtype].image * weight.shape[1]


def _out_size(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Pair:
    height, width = ((x.shape[d + 2] + 2 * padding[d] - weight.shape[d + 2]) // stride[d] + 1 for d in (0, 1))
    return height, width


def _positions(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> int:
    height, width = _out_size(x, weight, stride, padding)
    return len(x) * height * width


def _columns(x: Tensor, kernel: torch.Size, stride: Pair, padding: Pair) -> Tensor:
    """[B*Ho*Wo, kH*kW*C]: the window of every output position; a copy of rows of kW*C values."""
    image = x.permute(0, 2, 3, 1)
    if any(padding):
        image = F.pad(image, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    image = image.contiguous()
    batch, height, width, channels = image.shape
    (kh, kw), (sb, sh, sw, _) = kernel, image.stride()
    size = (batch, (height - kh) // stride[0] + 1, (width - kw) // stride[1] + 1, kh, kw * channels)
    windows = image.as_strided(size, (sb, sh * stride[0], sw * stride[1], sh, 1))
    columns = _scratch.get(windows.numel(), x.dtype).view(size)
    return columns.copy_(windows).view(-1, kh * kw * channels)


def _product(filters: Tensor, columns: Tensor) -> Tensor:
    """columns @ filters^T, as [N, O]; taken the other way round, which splits over threads along the filters."""
    return (filters @ columns.t()).t().contiguous()


def _rows(t: Tensor) -> Tensor:
    """[A, C, H, W] -> [A, H*W*C]."""
    return t.permute(0, 2, 3, 1).reshape(len(t), -1)


def _positions_by_channel(t: Tensor) -> Tensor:
    """[B, C, H, W] -> [B*H*W, C]."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _images(flat: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Rows that hold [height, width, channels] in this order -> [batch, channels, height, width], channels_last."""
    return flat.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def _flipped(weight: Tensor) -> Tensor:
    """[O, I, kH, kW] -> [kH*kW*O, I], the kernel turned by half a turn."""
    taps = weight.permute(2, 3, 0, 1).flatten(0, 1)
    return taps.flip(0).reshape(-1, weight.shape[1])
