"""The CUDA C++ provider: hands the device addresses of a call, the number of multiprocessors and the stream to `_CUDA`.

No function waits for the device or reads a value from it, so every call can be captured in a CUDA graph. Lists of
layers travel in the kernels' parameters, so a pass is one set of launches for every 280 layers (128 of binarize).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from csam_kernels import _CUDA
from csam_kernels.checks import WORD, no_float64
from csam_kernels.laws import scaled
from csam_kernels.layout import MaskLayout, expand_mask, mask_layout, reduce_to_mask
from csam_kernels.native import DTYPE, KIND, Products, dense, flat, fusible, like, restride

_Layer = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@cache
def _multiprocessors(where: torch.device) -> int:
    return torch.cuda.get_device_properties(where).multi_processor_count


def _run(function: Callable[..., None], where: torch.device, *args: Any) -> None:
    """Launch on the device's current stream."""
    with torch.cuda.device(where):
        function(*args, _multiprocessors(where), torch.cuda.current_stream(where).cuda_stream)


def _narrow(t: Tensor) -> Tensor:
    return t.to(torch.float32) if t.dtype is torch.float64 else t


def _layer(layout: MaskLayout, *tensors: Tensor | None) -> _Layer:
    """Addresses and dtypes of (weight, mask, grad, out, out_mask); None where the pass has no such tensor."""
    padded = (*tensors, *(None,) * (5 - len(tensors)))
    codes = tuple(0 if t is None else DTYPE[t.dtype] for t in padded[:4])
    return tuple(0 if t is None else t.data_ptr() for t in padded), layout, codes


def _lay(weight: Tensor, mask: Tensor, block_size: int) -> tuple[Tensor, Tensor, MaskLayout]:
    """Weight and mask as dense memory and the layout of one over the other, as `csam_kernels.cpu` lays them."""
    mask = _narrow(mask)
    if weight.shape == mask.shape and not block_size and weight.stride() == mask.stride() and dense(weight):
        return weight, mask, MaskLayout(*flat(weight.numel()))
    layout = mask_layout(weight.shape, mask.shape, block_size)
    if layout is None:
        mask, layout = expand_mask(mask, weight.shape), MaskLayout(*flat(weight.numel()))
    return weight.contiguous(), mask.contiguous(), layout


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
) -> Tensor:
    channels, height, width = x.shape
    image = x.to(torch.float32).contiguous()
    out = torch.empty((n, *x.shape), dtype=dtype, device=x.device, memory_format=memory_format)
    channels_last = memory_format is torch.channels_last
    what = (image.data_ptr(), n, channels, height * width, *scaled(law, sigma), seed & WORD, first_sample, stream)
    _run(_CUDA.smoothing_noise, x.device, *what, out.data_ptr(), DTYPE[dtype], channels_last)
    return out


def count_votes(logits: Tensor, out: Tensor) -> None:
    if logits.shape[1] > 2**31 - 2**12:
        raise ValueError(
            f"logits must have at most 2^31 - 2^12 classes on a GPU, got {logits.shape[1]}: move them to the CPU, "
            "or set CSAM_BACKEND=reference"
        )
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows = (logits.data_ptr(), *logits.shape, logits.stride(0), DTYPE[logits.dtype])
    _run(_CUDA.count_votes, logits.device, *rows, out.data_ptr())


def semantic_batch(x: Tensor, params: Tensor) -> Tensor:
    x, params = x.contiguous(), params.to(torch.float32).contiguous()
    out = torch.empty((len(params), *x.shape), dtype=torch.float32, device=x.device)
    scratch = torch.empty(_CUDA.semantic_room(len(params), x.numel()), dtype=torch.uint8, device=x.device)
    where = (x.data_ptr(), len(params), *x.shape, params.data_ptr(), out.data_ptr(), scratch.data_ptr())
    _run(_CUDA.semantic_batch, x.device, *where)
    return out


def binarize(scores: list[Tensor], keep: list[int], scope: str) -> list[Tensor]:
    scores = [s.contiguous() for s in scores]
    masks = [torch.empty(s.shape, dtype=torch.bool, device=s.device) for s in scores]
    whole = scope == "global"
    layers = [
        (s.data_ptr(), m.data_ptr(), s.numel(), 0 if whole else keep[i], DTYPE[s.dtype])
        for i, (s, m) in enumerate(zip(scores, masks, strict=True))
    ]
    where = scores[0].device
    scratch = torch.empty(_CUDA.selection_room([s.numel() for s in scores], whole), dtype=torch.uint8, device=where)
    _run(_CUDA.binarize, where, layers, whole, keep[0] if whole else 0, scratch.data_ptr())
    return masks


def perturb_masks(
    masks: list[Tensor],
    kind: str,
    radius: float,
    rho: float,
    grads: list[Tensor],
    norm: str,
    seed: int,
    step: int,
) -> list[Tensor]:
    no_float64(masks=masks)
    masks = [m.contiguous() for m in masks]
    sources: list[Tensor | None] = [_narrow(g).contiguous() for g in grads]
    sources = sources or [None] * len(masks)
    outs = [torch.empty_like(m) for m in masks]
    layers = [
        _layer(MaskLayout(*flat(m.numel())), None, m, g, out) for m, g, out in zip(masks, sources, outs, strict=True)
    ]
    _mask_step(layers, masks[0].device, kind, radius, rho, norm, seed, step)
    return outs


def _mask_step(
    layers: list[_Layer], where: torch.device, kind: str, radius: float, rho: float, norm: str, seed: int, step: int
) -> None:
    table = _CUDA.Layers(layers)
    adversarial = kind == "adversarial"
    partial = torch.empty(table.units() if adversarial else 0, dtype=torch.float64, device=where)
    scales = torch.empty(len(layers) if adversarial else 0, dtype=torch.float32, device=where)
    options = (KIND[kind], norm == "global", radius, rho, seed & WORD, step)
    _run(_CUDA.mask_step, where, table, *options, partial.data_ptr(), scales.data_ptr())


def effective_weights(
    weights: list[Tensor],
    masks: list[Tensor],
    kind: str,
    radius: float,
    rho: float,
    grads: list[Tensor],
    norm: str,
    seed: int,
    step: int,
    dtype: torch.dtype | None,
    block_size: int,
) -> list[Tensor]:
    no_float64(weights=weights)
    if dtype is torch.float64:
        raise TypeError("dtype must not be float64 on a GPU: use float32, or set CSAM_BACKEND=reference")
    if kind != "plain" and not fusible(kind, weights, masks):
        masks = perturb_masks(masks, kind, radius, rho, grads, norm, seed, step)
        kind, grads = "plain", []
    laid = [_lay(w, m, block_size) for w, m in zip(weights, masks, strict=True)]
    sources: list[Tensor | None] = [like(_narrow(g), m) for g, (_, m, _) in zip(grads, laid, strict=bool(grads))]
    sources = sources or [None] * len(laid)
    outs = [torch.empty_like(w, dtype=dtype or w.dtype) for w, _, _ in laid]
    layers = [_layer(y, w, m, g, out) for (w, m, y), g, out in zip(laid, sources, outs, strict=True)]
    _mask_step(layers, weights[0].device, kind, radius, rho, norm, seed, step)
    return [restride(out, w) for out, w in zip(outs, weights, strict=True)]


def mask_gradients(
    grad_weights: list[Tensor],
    weights: list[Tensor],
    masks: list[Tensor],
    block_size: int,
    need_weight: bool,
    need_mask: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    no_float64(weights=weights)
    where = weights[0].device
    laid = [_lay(w, m, block_size) for w, m in zip(weights, masks, strict=True)]
    grads = [like(_narrow(g), w) for g, (w, _, _) in zip(grad_weights, laid, strict=True)]
    dtheta = [torch.empty_like(w) for w, _, _ in laid] if need_weight else []
    dmask: list[Tensor | None] = []
    plain: list[_Layer] = []
    expanded: list[_Layer] = []  # their mask gradient is reduced afterwards
    for i, (w, m, layout) in enumerate(laid):
        odd = m.shape != masks[i].shape
        broadcast = odd or layout.span > 1 or m.numel() != w.numel()  # its gradient is summed, so it must have a place
        empty = torch.empty_like if w.numel() else torch.zeros_like
        dmask.append(empty(m, dtype=w.dtype) if need_mask or broadcast else None)
        layer = _layer(layout, w, m, grads[i], dtheta[i] if need_weight else None, dmask[i])
        (expanded if odd else plain).append(layer)
    norm = _gradient_pass(plain, where)
    if expanded:
        _gradient_pass(expanded, where)
        for i, (w, m, _) in enumerate(laid):
            full = dmask[i]
            if full is not None and m.shape != masks[i].shape:
                dm = dmask[i] = reduce_to_mask(full.view(w.shape), masks[i].shape)
                norm = norm + dm.double().square().sum()
    dtheta = [restride(d, w) for d, w in zip(dtheta, weights, strict=need_weight)]
    return dtheta, [d for d in dmask if d is not None] if need_mask else [], norm


def _gradient_pass(layers: list[_Layer], where: torch.device) -> Tensor:
    """Runs the pass; ||dL/dM||^2 of its layers."""
    table = _CUDA.Layers(layers)
    partial = torch.empty(table.gradient_room(), dtype=torch.float64, device=where)
    norm = torch.empty((), dtype=torch.float64, device=where)
    _run(_CUDA.mask_gradients, where, table, partial.data_ptr(), norm.data_ptr())
    return norm


_products = Products(effective_weights, mask_gradients)
masked_linear, masked_linear_backward = _products.masked_linear, _products.masked_linear_backward


def masked_conv2d(
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
    """weight * mask by this provider's kernel, then cuDNN, which Triton's fused kernels do not beat in training."""
    w = _products.effective(weight, mask, x.dtype, block_size)
    return torch.conv2d(x, w, None if bias is None else bias.to(x.dtype), stride, padding, dilation, groups)


def masked_conv2d_backward(
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
    effective = _products.effective(weight, mask, x.dtype, block_size)
    args = (stride, padding, dilation, False, [0, 0], groups, [need_x, need_weight or need_mask, False])
    dx, dw, _ = torch.ops.aten.convolution_backward(grad, x, effective, None, *args)
    return ([dx] if need_x else []) + _products.gradients(dw, weight, mask, block_size, need_weight, need_mask)
