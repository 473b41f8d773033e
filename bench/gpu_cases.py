"""The calls that the GPU ledger counts and that `make gpu-check` runs and times: one table for both.

A case is an operation and the arguments of its provider function, so that Triton, CUDA C++ and the reference take the
same call; `twin` is what a user would write with torch's own operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RESNET18 = [
    *[(64, 3, 3, 3)],
    *[(64, 64, 3, 3)] * 4,
    *[(128, 64, 3, 3), (128, 128, 3, 3), (128, 64, 1, 1), (128, 128, 3, 3), (128, 128, 3, 3)],
    *[(256, 128, 3, 3), (256, 256, 3, 3), (256, 128, 1, 1), (256, 256, 3, 3), (256, 256, 3, 3)],
    *[(512, 256, 3, 3), (512, 512, 3, 3), (512, 256, 1, 1), (512, 512, 3, 3), (512, 512, 3, 3)],
    *[(10, 512)],
]


class Case(NamedTuple):
    op: str
    name: str
    arguments: tuple[Any, ...]
    twin: Callable[..., Any] | None = None
    peak: str = "float32"  # what multiplies: float32, tf32 or half

    def inputs(self) -> list[Tensor]:
        return tensors(self.arguments)


def allow_tf32(allowed: bool) -> None:
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for v in values for t in tensors(v)] if isinstance(values, (list, tuple)) else []


def cases(device: torch.device) -> Iterator[Case]:
    """All calls, one at a time so that their tensors need not be held together."""
    yield from noise_cases(device)
    yield from mask_cases(device)
    yield from convolution_cases(device)
    yield from other_forms(device)


def _rand(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, device=device).to(dtype)


def noise_cases(device: torch.device) -> Iterator[Case]:
    def noisy(x: Tensor, n: int, sigma: float, *rest: Any) -> Tensor:
        dtype, memory_format = rest[-2:]
        batch = x.repeat((n, 1, 1, 1))
        return (batch + torch.randn_like(batch) * sigma).to(dtype).contiguous(memory_format=memory_format)

    for name, size, n, dtype, layout in (
        ("400x3x32x32 bf16 channels_last", 32, 400, torch.bfloat16, torch.channels_last),
        ("400x3x32x32 float32", 32, 400, torch.float32, torch.contiguous_format),
        ("4000x3x32x32 fp16 channels_last", 32, 4000, torch.float16, torch.channels_last),
        ("64x3x224x224 bf16", 224, 64, torch.bfloat16, torch.contiguous_format),
    ):
        x = _rand(3, size, size, device=device)
        yield Case("smoothing_noise", name, (x, n, 0.25, 7, 0, 0, dtype, layout), noisy)
    x = _rand(3, 32, 32, device=device)
    for law in ("uniform", "laplace"):
        noise = (x, 400, 0.25, 7, 0, 0, torch.bfloat16, torch.channels_last, law)
        yield Case("smoothing_noise", f"400x3x32x32 bf16 channels_last {law}", noise)
    numbers = (255 * x).round()
    for name, dtype, layout in (
        ("400x3x32x32 bf16 channels_last", torch.bfloat16, torch.channels_last),
        ("400x3x32x32 float32", torch.float32, torch.contiguous_format),
    ):
        yield Case("grid_noise", name, (numbers, 400, 0.25, 255, 7, 0, 0, dtype, layout))

    def votes(logits: Tensor, out: Tensor) -> None:
        out += torch.bincount(logits.argmax(1), minlength=len(out))

    for rows, classes, dtype in ((400, 10, torch.bfloat16), (100_000, 10, torch.float32), (4096, 1000, torch.bfloat16)):
        logits = _rand(rows, classes, device=device, dtype=dtype)
        out = torch.zeros(classes, dtype=torch.int64, device=device)
        yield Case("count_votes", f"{rows}x{classes} {str(dtype)[6:]}", (logits, out), votes)

    def rotated(x: Tensor, params: Tensor) -> Tensor:
        angle = params[:, 0].deg2rad()
        cosine, sine, zero = angle.cos() / params[:, 3], angle.sin() / params[:, 3], torch.zeros_like(angle)
        theta = torch.stack((cosine, -sine, zero, sine, cosine, zero), 1).view(-1, 2, 3)
        grid = F.affine_grid(theta, [len(params), *x.shape], align_corners=False)
        moved = F.grid_sample(x.expand(len(params), -1, -1, -1), grid, align_corners=False)
        return (params[:, 5].view(-1, 1, 1, 1) * moved + params[:, 6].view(-1, 1, 1, 1)).clamp(0, 1)

    for name, blur in (("400x3x32x32 rotation, contrast", 0.0), ("400x3x32x32 blur", 1.0)):
        params = torch.tensor([0.0, 0, 0, 1, blur, 1, 0, 1], device=device).repeat(400, 1)
        params[:, 0] = 20 * _rand(400, device=device) - 10
        params[:, 5] = 0.8 + 0.4 * _rand(400, device=device)
        x = _rand(3, 32, 32, device=device)
        yield Case("semantic_batch", name, (x, params), None if blur else rotated)
    yield Case("philox_uniform", "4000x8", (4000, 8, 7, 0, 0))


def mask_cases(device: torch.device) -> Iterator[Case]:
    theta = [torch.randn(s, device=device) for s in RESNET18]
    masks = [_rand(*s, device=device) for s in RESNET18]
    grads = [torch.randn(s, device=device) for s in RESNET18]

    def moved(masks: list[Tensor], kind: str, radius: float, rho: float, grads: list[Tensor]) -> list[Tensor]:
        if kind == "plain":
            return masks
        if kind == "uniform":
            return [(m + torch.empty_like(m).uniform_(-radius, radius)).clamp_(0, 1) for m in masks]
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        return [(m + rho / norm * g).clamp_(0, 1) for m, g in zip(masks, grads, strict=True)]

    def perturbed(masks: list[Tensor], kind: str, radius: float, rho: float, grads: list[Tensor], *_: Any) -> Any:
        return moved(masks, kind, radius, rho, grads)

    def effective(w: list[Tensor], masks: list[Tensor], kind: str, radius: float, rho: float, *rest: Any) -> Any:
        noisy = moved(masks, kind, radius, rho, rest[0])
        return [(t * m).to(rest[-2]) for t, m in zip(w, noisy, strict=True)]

    for kind in ("uniform", "adversarial"):
        given = grads if kind == "adversarial" else []
        yield Case("perturb_masks", f"ResNet-18 {kind}", (masks, kind, 0.1, 0.05, given, "global", 7, 3), perturbed)
    for kind in ("plain", "uniform", "adversarial"):
        given = grads if kind == "adversarial" else []
        arguments = (theta, masks, kind, 0.1, 0.05, given, "global", 7, 3, torch.bfloat16, 0)
        yield Case("effective_weights", f"ResNet-18 {kind} to bf16", arguments, effective)

    def triple(grads: list[Tensor], weights: list[Tensor], masks: list[Tensor], *_: Any) -> Any:
        dtheta = [g * m for g, m in zip(grads, masks, strict=True)]
        dmask = [g * w for g, w in zip(grads, weights, strict=True)]
        return dtheta, dmask, torch.stack([d.double().square().sum() for d in dmask]).sum()

    for dtype in (torch.float32, torch.bfloat16):
        given = [g.to(dtype) for g in grads]
        yield Case("mask_gradients", f"ResNet-18 G {str(dtype)[6:]}", (given, theta, masks, 0, True, True), triple)

    filters = [_rand(s[0], *[1] * (len(s) - 1), device=device) for s in RESNET18]
    kernels = [_rand(*s[:2], *[1] * (len(s) - 2), device=device) for s in RESNET18]
    plain = ("plain", 0.0, 0.0, [], "global", 0, 0, torch.bfloat16, 0)
    yield Case("effective_weights", "ResNet-18 filter masks to bf16", (theta, filters, *plain), effective)
    yield Case("mask_gradients", "ResNet-18 filter masks", (grads, theta, filters, 0, True, True))
    yield Case("mask_gradients", "ResNet-18 kernel masks", (grads, theta, kernels, 0, True, True))

    def scaled(weights: list[Tensor], tau: float) -> list[Tensor]:
        magnitudes = [w.abs() for w in weights]
        return [(m / m.flatten().kthvalue(math.ceil(tau * m.numel())).values).clamp(0, 1) for m in magnitudes]

    yield Case("percentile_init", "ResNet-18 tau 0.9", (theta, 0.9), scaled)

    def largest(scores: list[Tensor], keep: list[int], scope: str) -> list[Tensor]:
        flat = torch.cat([s.flatten() for s in scores])
        threshold = flat.kthvalue(flat.numel() - keep[0] + 1).values
        return [s >= threshold for s in scores]

    total = sum(m.numel() for m in masks)
    yield Case("binarize", "ResNet-18 global 70 %", (masks, [-(-3 * total // 10)], "global"), largest)


def convolution_cases(device: torch.device) -> Iterator[Case]:
    """Layers of ResNet-18 on CIFAR, batch 64, 70 % of the weights pruned; dense and grouped, forward and backward."""

    def convolution(x: Tensor, w: Tensor, m: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        return F.conv2d(x, (w * m).to(x.dtype), bias, *rest[:4])

    def backward(grad: Tensor, x: Tensor, w: Tensor, m: Tensor, *rest: Any) -> Any:
        stride, padding, dilation, groups, _, need = rest
        arguments = (stride, padding, dilation, False, [0, 0], groups, [need[0], True, False])
        dx, dw, _ = torch.ops.aten.convolution_backward(grad, x, (w * m).to(x.dtype), None, *arguments)
        return dx, dw * m, dw * w

    layers = (
        ("3->64 3x3 32x32", 3, 64, 3, 1, 32, 1),
        ("64->64 3x3 32x32", 64, 64, 3, 1, 32, 1),
        ("128->128 3x3 16x16", 128, 128, 3, 1, 16, 1),
        ("256->512 3x3/2 8x8", 256, 512, 3, 2, 8, 1),
        ("512->512 3x3 4x4", 512, 512, 3, 1, 4, 1),
        ("64->128 1x1/2 32x32", 64, 128, 1, 2, 32, 1),
        ("256 depthwise 3x3 16x16", 256, 256, 3, 1, 16, 256),
    )
    for name, channels, filters, kernel, stride, size, groups in layers:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.randn(64, channels, size, size, device=device).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            weight = torch.randn(filters, channels // groups, kernel, kernel, device=device)
            mask = _rand(*weight.shape, device=device) < 0.3
            options = ([stride] * 2, [kernel // 2] * 2, [1, 1], groups, 0)
            label = f"{name} {str(dtype)[6:]}"
            peak = "float32" if dtype is torch.float32 else "half"
            yield Case("masked_conv2d", label, (x, weight, mask, None, *options), convolution, peak)
            if dtype is torch.float16:
                continue
            out = -(-size // stride)
            grad = torch.randn(64, filters, out, out, device=device).to(dtype)
            grad = grad.contiguous(memory_format=torch.channels_last)
            soft = dtype is torch.bfloat16  # a bool mask has no gradient
            given = _rand(*weight.shape, device=device) if soft else mask
            arguments = (grad, x, weight, given, *options, [True, True, soft])
            yield Case("masked_conv2d_backward", label, arguments, backward, peak)
    yield from _fed_by_noise(device)
    yield from _few_channels(device, backward)
    yield from _other_layouts(device, convolution, backward)
    x, weight = torch.randn(128, 512, device=device).to(torch.bfloat16), torch.randn(1000, 512, device=device)
    mask = _rand(1000, 512, device=device) < 0.3
    yield Case(
        "masked_linear",
        "128x512->1000 bf16",
        (x, weight, mask, None, 0),
        lambda x, w, m, *_: F.linear(x, (w * m).to(x.dtype)),
        "half",
    )

    def linear_backward(grad: Tensor, x: Tensor, w: Tensor, m: Tensor, block: int, need: list[bool]) -> Any:
        full, dw = m.repeat_interleave(block, 1), grad.t() @ x
        return grad @ (w * full), dw * full, (dw * w).view(*m.shape, block).sum(2)

    grad, x, weight = (torch.randn(s, device=device) for s in ((256, 10), (256, 512), (10, 512)))
    arguments = (grad, x, weight, _rand(10, 32, device=device), 16, [True] * 3)
    yield Case("masked_linear_backward", "256x512->10 blocks of 16 float32", arguments, linear_backward)


def _fed_by_noise(device: torch.device) -> Iterator[Case]:
    """The first layer of ResNet-18 on noise drawn in its load path; one twice as wide, which also normalises it there,
    with an epilogue."""

    def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        return x if scale is None or shift is None else x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    def noisy_convolution(x: Tensor, n: int, sigma: float, *rest: Any) -> Tensor:
        w, m, bias, *options = rest[3:11]
        batch = x.repeat((n, 1, 1, 1))
        batch = affine(batch + torch.randn_like(batch) * sigma, *rest[11:13]).to(x.dtype)
        y = affine(F.conv2d(batch, (w * m).to(x.dtype), bias, *options[:4]), *rest[13:15])
        return (y.relu() if rest[15] else y).to(x.dtype)

    for filters in (64, 128):
        for dtype in (torch.bfloat16, torch.float32):
            weight, mask = torch.randn(filters, 3, 3, 3, device=device), _rand(filters, 3, 3, 3, device=device)
            x = _rand(3, 32, 32, device=device, dtype=dtype)
            sizes = (3, 3, filters, filters) if filters > 64 else ()
            scaling = [_rand(size, device=device) for size in sizes] or [None] * 4
            arguments = (x, 400, 0.25, 7, 0, 0, weight, mask, None, [1, 1], [1, 1], [1, 1], 1, 0)
            peak = "float32" if dtype is torch.float32 else "half"
            name = f"400x3x32x32->{filters} 3x3 {str(dtype)[6:]}"
            arguments = (*arguments, *scaling, filters > 64, dtype, None)
            yield Case("smoothing_conv2d", name, arguments, noisy_convolution, peak)


def _few_channels(device: torch.device, backward: Callable[..., Any]) -> Iterator[Case]:
    """Layers of ResNet-20: the epilogue's form of the first, and channel masks in the backward pass of the next;
    filter masks in the backward pass of the first, as it is and as wide as ResNet-18's."""

    def inference(x: Tensor, w: Tensor, m: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, *rest: Any) -> Tensor:
        y = F.conv2d(x, (w * m).to(x.dtype), bias.to(x.dtype), *rest[1:5])
        return (y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) + rest[6]).relu().to(x.dtype)

    options = ([1, 1], [1, 1], [1, 1], 1, 0)
    for dtype, peak in ((torch.bfloat16, "half"), (torch.float32, "float32")):
        x = torch.randn(400, 3, 32, 32, device=device).to(dtype)
        weight, mask = torch.randn(16, 3, 3, 3, device=device), _rand(16, 3, 3, 3, device=device)
        epilogue = (*(torch.randn(16, device=device) for _ in range(3)), True)
        other = torch.randn(400, 16, 32, 32, device=device).to(dtype)
        name = f"3->16 3x3 32x32 and a sum {str(dtype)[6:]}"
        arguments = (x, weight, mask, *epilogue, *options, other, None)
        yield Case("masked_conv2d_inference", name, arguments, inference, peak)
        layout = torch.channels_last if dtype is torch.bfloat16 else torch.contiguous_format
        for channels, filters, kind in ((16, 16, "channel"), (3, 16, "filter"), (3, 64, "filter")):
            x, grad = (torch.randn(64, c, 32, 32, device=device).to(dtype) for c in (channels, filters))
            x, grad = (t.contiguous(memory_format=layout) for t in (x, grad))
            weight = torch.randn(filters, channels, 3, 3, device=device)
            mask = _rand(*((filters, 1) if kind == "filter" else (1, channels)), 1, 1, device=device)
            name = f"{channels}->{filters} 3x3 32x32 {kind} masks {str(dtype)[6:]}"
            arguments = (grad, x, weight, mask, *options, [channels > 3, True, True])
            yield Case("masked_conv2d_backward", name, arguments, backward, peak)


def _other_layouts(
    device: torch.device, convolution: Callable[..., Any], backward: Callable[..., Any]
) -> Iterator[Case]:
    """Depthwise with pixels side by side; float32 that may multiply as TF32, weights and masks channels_last too."""
    for name, channels, groups, size, peak in (
        ("256 depthwise 3x3 16x16 NCHW float32", 256, 256, 16, "float32"),
        ("128->128 3x3 16x16 tf32", 128, 1, 16, "tf32"),
    ):
        x, grad = (torch.randn(64, channels, size, size, device=device) for _ in range(2))
        weight, mask = (_rand(channels, channels // groups, 3, 3, device=device) for _ in range(2))
        if groups == 1:
            x, grad, weight, mask = (t.to(memory_format=torch.channels_last) for t in (x, grad, weight, mask))
        options = ([1, 1], [1, 1], [1, 1], groups, 0)
        yield Case("masked_conv2d", name, (x, weight, mask, None, *options), convolution, peak)
        yield Case("masked_conv2d_backward", name, (grad, x, weight, mask, *options, [True] * 3), backward, peak)


def other_forms(device: torch.device) -> Iterator[Case]:
    """What the calls above leave out of the kernels' switches: layers of odd sizes, each with its own threshold and
    norm, one gradient without the other, float64; float16 throughout, masks by block, filter and layer."""
    logits, out = torch.randn(20_000, 10, device=device).double(), torch.zeros(10, dtype=torch.int64, device=device)
    yield Case("count_votes", "20000x10 float64", (logits, out))

    shapes = [(513, 129, 3, 3), (255, 257, 3, 3), (511, 1023)]
    theta, grads = ([torch.randn(s, device=device) for s in shapes] for _ in range(2))
    masks = [_rand(*s, device=device) for s in shapes]
    sizes = [t.numel() for t in theta]
    arguments = (masks, "adversarial", 0.1, 0.05, grads, "layer", 7, 3)
    yield Case("perturb_masks", "odd layers, adversarial, a norm each", arguments)
    scores = [m.to(torch.bfloat16) for m in masks]
    yield Case("binarize", "odd layers, 70 % of each, bfloat16", (scores, [-(-3 * n // 10) for n in sizes], "layer"))
    yield Case("percentile_init", "odd layers, tau 0.9", (theta, 0.9))
    theta[0] = theta[0].to(memory_format=torch.channels_last)
    masks[1] = masks[1][:, :1, :1, :1].contiguous()
    for part, need in (("dL/dtheta", (True, False)), ("dL/dM", (False, True))):
        arguments = (grads, theta, masks, 0, *need)
        yield Case("mask_gradients", f"odd layers, channels_last, filters, {part}", arguments)

    options, half = ([1, 1], [1, 1], [1, 1]), torch.float16
    x, grad = (torch.randn(64, 256, 16, 16, device=device).to(half) for _ in range(2))
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    weight = torch.randn(256, 1, 3, 3, device=device)
    name = "256 depthwise 3x3 16x16"
    by_block = _rand(256, 3, device=device)
    epilogue = (*(_rand(256, device=device) for _ in range(3)), True, *options, 256, 4, None, None)
    yield Case("masked_conv2d_inference", f"{name} blocks of 4 float16", (x, weight, by_block, *epilogue), peak="half")
    for kind, mask, need in (
        ("blocks of 4", by_block, [True] * 3),
        ("filter masks", _rand(256, 1, 1, 1, device=device), [True, False, True]),
        ("one mask", _rand(1, 1, 1, 1, device=device), [False, True, True]),
    ):
        arguments = (grad, x, weight, mask, *options, 256, 4 if mask is by_block else 0, need)
        yield Case("masked_conv2d_backward", f"{name} {kind} float16", arguments, peak="half")

    x, grad = (torch.randn(64, 64, 32, 32, device=device).to(half) for _ in range(2))
    weight, mask = torch.randn(64, 64, 3, 3, device=device).to(half), _rand(64, 36, device=device, dtype=half)
    arguments = (x, weight, mask, _rand(64, device=device, dtype=half), *options, 1, 16)
    name = "64->64 3x3 32x32 blocks of 16, all float16"
    yield Case("masked_conv2d", name, arguments, peak="half")
    arguments = (grad, x, weight, mask, *options, 1, 16, [True, False, True])
    yield Case("masked_conv2d_backward", name, arguments, peak="half")
    grad, x, weight = (torch.randn(s, device=device) for s in ((128, 1000), (128, 512), (1000, 512)))
    arguments = (grad, x, weight, _rand(1000, 1, device=device), 0, [True] * 3)
    yield Case("masked_linear_backward", "128x512->1000 filter masks float32", arguments)
