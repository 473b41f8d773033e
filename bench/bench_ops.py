"""Every operation against its plain-torch twin: what a user would write with torch operators alone.

Bounds, for the operations that stream the 11.2 million weights of ResNet-18 (float32 unless said), in bytes a weight:
effective_weights reads theta and C and writes bf16 W: 10; mask_gradients reads G, theta and M and writes two: 20;
binarize reads a score and writes a byte: 5.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import csam_kernels as ck
from conftest import versus

RESNET18_LAYERS = [
    *[(64, 3, 3, 3)],
    *[(64, 64, 3, 3)] * 4,
    *[(128, 64, 3, 3), (128, 128, 3, 3), (128, 64, 1, 1), (128, 128, 3, 3), (128, 128, 3, 3)],
    *[(256, 128, 3, 3), (256, 256, 3, 3), (256, 128, 1, 1), (256, 256, 3, 3), (256, 256, 3, 3)],
    *[(512, 256, 3, 3), (512, 512, 3, 3), (512, 256, 1, 1), (512, 512, 3, 3), (512, 512, 3, 3)],
    *[(10, 512)],
]


@pytest.fixture(scope="module")
def layers() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """theta, C and G of every layer."""
    generator = torch.Generator().manual_seed(0)
    theta = [torch.randn(s, generator=generator) for s in RESNET18_LAYERS]
    grads = [torch.randn(t.shape, generator=generator) for t in theta]
    return theta, [torch.rand(t.shape, generator=generator) for t in theta], grads


def test_smoothing_noise(benchmark: Any) -> None:
    """400 noisy copies of a 3x32x32 image in bf16 channels_last."""
    x = torch.rand(3, 32, 32)

    def twin() -> Tensor:
        batch = x.repeat((400, 1, 1, 1))
        noisy = batch + torch.randn_like(batch) * 0.25
        return noisy.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)

    options = {"seed": 0, "dtype": torch.bfloat16, "memory_format": torch.channels_last}
    versus(benchmark, lambda: ck.smoothing_noise(x, 400, 0.25, **options), twin, rounds=101)


@pytest.mark.parametrize("law", ["uniform", "laplace"])
def test_smoothing_noise_of_law(benchmark: Any, law: str) -> None:
    """The first row under another law of the same standard deviation."""
    x = torch.rand(3, 32, 32)

    def twin() -> Tensor:
        batch = x.repeat((400, 1, 1, 1))
        if law == "uniform":
            noise = torch.empty_like(batch).uniform_(-(3**0.5) * 0.25, 3**0.5 * 0.25)
        else:
            noise = torch.distributions.Laplace(0.0, 0.25 / 2**0.5).sample(batch.shape)
        return (batch + noise).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)

    options = {"seed": 0, "dtype": torch.bfloat16, "memory_format": torch.channels_last, "law": law}
    versus(benchmark, lambda: ck.smoothing_noise(x, 400, 0.25, **options), twin, rounds=101)


def test_smoothing_noise_float32(benchmark: Any) -> None:
    x = torch.rand(3, 32, 32)

    def twin() -> Tensor:
        batch = x.repeat((400, 1, 1, 1))
        return batch + torch.randn_like(batch) * 0.25

    versus(benchmark, lambda: ck.smoothing_noise(x, 400, 0.25, seed=0), twin, rounds=101)


def test_effective_weights_uniform(benchmark: Any, layers: Any) -> None:
    """Uniform perturbation, clip, multiply and cast to bf16."""
    theta, masks, _ = layers

    def twin() -> list[Tensor]:
        noisy = ((m + torch.empty_like(m).uniform_(-0.1, 0.1)).clamp(0, 1) for m in masks)
        return [(t * m).to(torch.bfloat16) for t, m in zip(theta, noisy, strict=True)]

    options = {"kind": "uniform", "radius": 0.1, "seed": 0, "dtype": torch.bfloat16}
    versus(benchmark, lambda: ck.effective_weights(theta, masks, **options), twin)


def test_effective_weights_adversarial(benchmark: Any, layers: Any) -> None:
    theta, masks, grads = layers

    def twin() -> list[Tensor]:
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        moved = ((m + (0.5 / norm) * g).clamp(0, 1) for m, g in zip(masks, grads, strict=True))
        return [(t * m).to(torch.bfloat16) for t, m in zip(theta, moved, strict=True)]

    options = {"kind": "adversarial", "rho": 0.5, "grads": grads, "dtype": torch.bfloat16}
    versus(benchmark, lambda: ck.effective_weights(theta, masks, **options), twin)


def test_effective_weights_plain(benchmark: Any, layers: Any) -> None:
    theta, masks, _ = layers

    def twin() -> list[Tensor]:
        return [(t * m).to(torch.bfloat16) for t, m in zip(theta, masks, strict=True)]

    versus(benchmark, lambda: ck.effective_weights(theta, masks, dtype=torch.bfloat16), twin)


def test_perturb_masks(benchmark: Any, layers: Any) -> None:
    _, masks, _ = layers

    def twin() -> list[Tensor]:
        return [(m + torch.empty_like(m).uniform_(-0.1, 0.1)).clamp(0, 1) for m in masks]

    versus(benchmark, lambda: ck.perturb_masks(masks, kind="uniform", radius=0.1, seed=0), twin)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_mask_gradients(benchmark: Any, layers: Any, grad_dtype: torch.dtype) -> None:
    theta, masks, grads = layers
    grads = [g.to(grad_dtype) for g in grads]

    def twin() -> tuple[list[Tensor], list[Tensor], Tensor]:
        wide = [g.float() for g in grads]
        dtheta = [g * m for g, m in zip(wide, masks, strict=True)]
        dmask = [g * t for g, t in zip(wide, theta, strict=True)]
        return dtheta, dmask, torch.stack([d.square().sum() for d in dmask]).sum()

    versus(benchmark, lambda: ck.mask_gradients(grads, theta, masks), twin)


def test_binarize_global(benchmark: Any, layers: Any) -> None:
    _, masks, _ = layers

    def twin() -> list[Tensor]:
        flat = torch.cat([m.flatten() for m in masks])
        threshold = torch.kthvalue(flat, int(0.7 * flat.numel())).values
        return [m > threshold for m in masks]

    versus(benchmark, lambda: ck.binarize(masks, 0.7), twin, rounds=11)


def test_percentile_init(benchmark: Any, layers: Any) -> None:
    theta, _, _ = layers

    def twin() -> list[Tensor]:
        return [(t.abs() / torch.quantile(t.abs(), 0.9)).clamp(0, 1) for t in theta]

    versus(benchmark, lambda: ck.percentile_init(theta, 0.9), twin, rounds=5, warmup=1)


def test_count_votes(benchmark: Any) -> None:
    """Cohen's published loop counts in Python; this twin is already vectorised."""
    logits = torch.randn(100_000, 10)
    versus(benchmark, lambda: ck.count_votes(logits), lambda: torch.bincount(logits.argmax(1), minlength=10))


@pytest.mark.parametrize("classes", [10, 1000])
def test_discrepancy(benchmark: Any, classes: int) -> None:
    """1,000 rows, what CC-Cert draws of an image; bound: an exponential a logit."""
    clean, logits = torch.randn(classes), torch.randn(1000, classes)

    def twin() -> tuple[Tensor, Tensor]:
        p, q = clean.double().softmax(0), logits.double().softmax(1)
        return (q - p).abs().amax(1), q.argmax(1) != p.argmax()

    versus(benchmark, lambda: ck.discrepancy(clean, logits), twin)


def test_semantic_batch(benchmark: Any) -> None:
    """400 rotated and brightened copies of a 3x32x32 image against affine_grid + grid_sample; bound: 4.9 MB written."""
    x = torch.rand(3, 32, 32)
    params = torch.tensor([ck.SEMANTIC_NEUTRAL]).repeat(400, 1)
    params[:, 0] = torch.linspace(-10, 10, 400)
    params[:, 6] = torch.linspace(-0.2, 0.2, 400)

    def twin() -> Tensor:
        angle = torch.deg2rad(params[:, 0])
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(400)
        theta = torch.stack((torch.stack((cos, -sin, zero), 1), torch.stack((sin, cos, zero), 1)), 1)
        grid = F.affine_grid(theta, [400, 3, 32, 32], align_corners=False)
        copies = F.grid_sample(x.expand(400, 3, 32, 32), grid, align_corners=False)
        return (copies + params[:, 6].view(-1, 1, 1, 1)).clamp(0, 1)

    assert float((ck.semantic_batch(x, params) - twin()).abs().max()) < 1e-3
    versus(benchmark, lambda: ck.semantic_batch(x, params), twin)


@pytest.mark.parametrize("phase", ["forward", "backward", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_masked_conv2d(benchmark: Any, phase: str, dtype: torch.dtype) -> None:
    """A 256-channel 3x3 layer at 8x8, batch 64, float32 weight and mask."""
    x = torch.randn(64, 256, 8, 8).to(dtype, memory_format=torch.channels_last).requires_grad_()
    weight, mask = (torch.rand(256, 256, 3, 3, requires_grad=True) for _ in range(2))

    def forward(masked: bool) -> Tensor:
        if masked:
            return ck.masked_conv2d(x, weight, mask, padding=1)
        return F.conv2d(x, (weight * mask).to(dtype), padding=1)

    versus(benchmark, *(_phase(phase, lambda m=m: forward(m)) for m in (True, False)))


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_masked_conv2d_filter_mask(benchmark: Any, share: float) -> None:
    """Half and three quarters of the filters masked out: their work is skipped."""
    x = torch.randn(64, 256, 8, 8).contiguous(memory_format=torch.channels_last)
    weight, mask = torch.randn(256, 256, 3, 3), (torch.rand(256, 1, 1, 1) < share)
    twin = lambda: F.conv2d(x, weight * mask, padding=1)  # noqa: E731
    versus(benchmark, lambda: ck.masked_conv2d(x, weight, mask, padding=1), twin)


@pytest.mark.parametrize("phase", ["forward", "whole"])
def test_masked_linear(benchmark: Any, phase: str) -> None:
    x = torch.randn(128, 1024, requires_grad=True)
    weight, mask = (torch.rand(1024, 1024, requires_grad=True) for _ in range(2))
    ours = _phase(phase, lambda: ck.masked_linear(x, weight, mask))
    versus(benchmark, ours, _phase(phase, lambda: F.linear(x, weight * mask)))


@pytest.mark.parametrize("density", [0.1, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("filters", "channels", "size", "stride"),
    [(64, 64, 32, 1), (128, 64, 32, 2), (128, 128, 16, 1), (256, 256, 8, 1), (512, 512, 4, 1)],
    ids=["64x64-32", "128x64-32s2", "128x128-16", "256x256-8", "512x512-4"],
)
def test_sample_conv2d(
    benchmark: Any, filters: int, channels: int, size: int, stride: int, dtype: torch.dtype, density: float
) -> None:
    """32 samples through a 3x3 layer of ResNet-18, against the dense convolution of the zeroed weight.

    Bound: one 64-byte load a cycle from the first-level cache, for 16 multiply-adds in float32 and 32 in bfloat16.
    """
    weight = torch.randn(filters, channels, 3, 3) * (torch.rand(filters, channels, 3, 3) < density)
    x = torch.randn(channels, size, size, 32).to(dtype)
    packed = ck.compress(weight)
    dense = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    batch = x.permute(3, 0, 1, 2).contiguous(memory_format=torch.channels_last)
    ours = lambda: ck.sample_conv2d(x, *packed, kernel_size=3, stride=stride, padding=1)  # noqa: E731
    benchmark.extra_info["gflop"] = 2e-9 * len(packed[0]) * ours()[0].numel()
    versus(benchmark, ours, lambda: F.conv2d(batch, dense, stride=stride, padding=1))


def _phase(phase: str, forward: Any) -> Any:
    """The forward pass alone, the backward pass alone (on a kept graph), or both."""
    if phase == "forward":
        return lambda: forward().detach()
    kept = forward()
    grad = torch.ones_like(kept)
    if phase == "backward":
        return lambda: kept.backward(grad, retain_graph=True)
    return lambda: forward().backward(grad)


def test_effective_weights_uniform_flat(benchmark: Any) -> None:
    """The same over one tensor of 11.2 million weights, whose temporaries the allocator maps anew in every call."""
    theta, mask = torch.randn(11_164_352), torch.rand(11_164_352)

    def twin() -> Tensor:
        noisy = (mask + torch.empty_like(mask).uniform_(-0.1, 0.1)).clamp(0, 1)
        return (theta * noisy).to(torch.bfloat16)

    options = {"kind": "uniform", "radius": 0.1, "seed": 0, "dtype": torch.bfloat16}
    versus(benchmark, lambda: ck.effective_weights([theta], [mask], **options), twin)
