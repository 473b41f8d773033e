"""effective_weights, perturb_masks, mask_gradients, percentile_init against the reference, every granularity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import csam_kernels as ck
from conftest import ISAS, assert_close
from csam_kernels import _C, reference

SHAPES = [(8, 3, 3, 3), (16, 16, 1, 1), (5, 7, 3, 5), (64, 33), (1, 1, 1, 1), (130, 70, 3, 3)]
GRANULARITIES = ["weight", "filter", "channel", "kernel", "layer", "taps", "block"]
BLOCK = 4


def mask_shape(granularity: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    ones = (1,) * (len(shape) - 2)
    return {
        "weight": shape,
        "filter": (shape[0], 1, *ones),
        "channel": (1, shape[1], *ones),
        "kernel": (shape[0], shape[1], *ones),
        "layer": (1, 1, *ones),
        "taps": (1, 1, *shape[2:]),
        "block": (shape[0], math.ceil(math.prod(shape[1:]) / BLOCK)),
    }[granularity]


def layers(
    granularity: str, dtype: torch.dtype = torch.float32, mask_dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor], int | None]:
    weights = [torch.randn(s, dtype=torch.float64).to(dtype) for s in SHAPES]
    masks = [torch.rand(mask_shape(granularity, s), dtype=torch.float64) for s in SHAPES]
    masks = [m > 0.5 if mask_dtype is torch.bool else m.to(mask_dtype or torch.float32) for m in masks]
    return weights, masks, BLOCK if granularity == "block" else None


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_effective_weights(isa: str, granularity: str, mask_dtype: torch.dtype, dtype: torch.dtype) -> None:
    weights, masks, block = layers(granularity, dtype, mask_dtype)
    for out_dtype in (None, torch.bfloat16):
        out = ck.effective_weights(weights, masks, block_size=block, dtype=out_dtype)
        args = ("plain", 0, 0, [], "global", 0, 0, out_dtype, block or 0)
        expected = reference.effective_weights(weights, masks, *args)
        for a, b in zip(out, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["uniform", "adversarial"])
@pytest.mark.parametrize("norm", ["global", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_perturbation_is_the_same_in_both_operations(
    isa: str, granularity: str, kind: str, norm: str, dtype: torch.dtype
) -> None:
    weights, masks, block = layers(granularity, torch.float32, dtype)
    options = {"kind": kind, "norm": norm, "radius": 0.3, "rho": 2.0, "seed": 9, "step": 2**33 + 1}
    options["grads"] = [torch.randn_like(m) for m in masks] if kind == "adversarial" else None
    soft = ck.perturb_masks(masks, **options)
    expected = reference.perturb_masks(masks, kind, 0.3, 2.0, options["grads"] or [], norm, 9, 2**33 + 1)
    for a, b in zip(soft, expected, strict=True):
        assert torch.equal(a, b) if kind == "uniform" else assert_close(a, b) is None
        assert a.min() >= 0
        assert a.max() <= 1
    fused = ck.effective_weights(weights, masks, block_size=block, **options)
    two_steps = ck.effective_weights(weights, soft, block_size=block)
    for a, b in zip(fused, two_steps, strict=True):
        assert torch.equal(a, b)


def test_uniform_noise_is_uniform_and_clipped() -> None:
    from scipy import stats

    (soft,) = ck.perturb_masks([torch.full((200_000,), 0.5)], kind="uniform", radius=0.1, seed=1, step=3)
    assert stats.kstest(((soft - 0.4) / 0.2).numpy(), "uniform").pvalue > 1e-3
    (edge,) = ck.perturb_masks([torch.ones(1000)], kind="uniform", radius=0.1, seed=1)
    assert 0.3 < float((edge == 1).float().mean()) < 0.7


def test_adversarial_step_has_length_rho() -> None:
    masks = [torch.full((40, 30), 0.5), torch.full((7,), 0.5)]
    grads = [torch.randn(40, 30), torch.randn(7)]
    soft = ck.perturb_masks(masks, kind="adversarial", rho=0.25, grads=grads)
    assert math.sqrt(sum(float((s - m).square().sum()) for s, m in zip(soft, masks, strict=True))) == pytest.approx(
        0.25
    )
    layerwise = ck.perturb_masks(masks, kind="adversarial", rho=0.25, grads=grads, norm="layer")
    assert all(float((s - m).norm()) == pytest.approx(0.25) for s, m in zip(layerwise, masks, strict=True))
    still = ck.perturb_masks(masks, kind="adversarial", grads=[torch.zeros_like(g) for g in grads])
    assert all(torch.equal(s, m) for s, m in zip(still, masks, strict=True))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool], ids=str)
def test_mask_gradients(
    isa: str, granularity: str, grad_dtype: torch.dtype, dtype: torch.dtype, mask_dtype: torch.dtype
) -> None:
    weights, masks, block = layers(granularity, dtype, mask_dtype)
    grads = [torch.randn(w.shape).to(grad_dtype) for w in weights]
    dtheta, dmask, norm = ck.mask_gradients(grads, weights, masks, block_size=block)
    want_theta, want_mask, want_norm = reference.mask_gradients(
        [g.double() for g in grads], [w.double() for w in weights], masks, block or 0, True, True
    )
    assert dtheta is not None
    assert dmask is not None
    for got, want in zip(dtheta + dmask, want_theta + want_mask, strict=True):
        scale = max(1.0, float(want.abs().max()))
        assert_close(got / scale, (want / scale).to(got.dtype))
    assert float(norm) == pytest.approx(float(want_norm), rel=1e-5)
    only_mask = ck.mask_gradients(grads, weights, masks, block_size=block, need_weight=False)
    assert only_mask[0] is None
    assert all(torch.equal(a, b) for a, b in zip(only_mask[1] or [], dmask, strict=True))
    only_norm = ck.mask_gradients(grads, weights, masks, block_size=block, need_weight=False, need_mask=False)
    assert only_norm[1] is None
    assert float(only_norm[2]) == pytest.approx(float(norm), rel=1e-12)


def test_gradient_bits_do_not_depend_on_threads() -> None:
    weights, masks = [torch.randn(512, 300)], [torch.rand(1, 300)]
    grads = [torch.randn(512, 300)]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        full = ck.mask_gradients(grads, weights, [masks[0].expand(512, 300).contiguous()])
        results.append((full[2], ck.mask_gradients(grads, weights, masks)[1][0]))  # type: ignore[index]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", ISAS)
def test_large_layers_cross_chunks(name: str) -> None:
    _C.set_isa(name)
    w, m = torch.randn(300, 1001), torch.rand(300, 1001)
    out = ck.effective_weights([w, w], [m, m], kind="uniform", seed=4, step=1, dtype=torch.bfloat16)
    want = reference.effective_weights([w, w], [m, m], "uniform", 0.1, 0, [], "global", 4, 1, torch.bfloat16, 0)
    _C.set_isa("auto")
    assert torch.equal(out[0], want[0])
    assert torch.equal(out[1], want[1])
    assert not torch.equal(out[0], out[1])  # each layer draws its own noise


def test_channels_last_and_strided_inputs() -> None:
    w = torch.randn(8, 6, 3, 3)
    m = torch.rand(8, 6, 3, 3)
    g = torch.randn(8, 6, 3, 3)
    last = torch.channels_last
    for a, b, c in [
        (w.to(memory_format=last), m.to(memory_format=last), g.to(memory_format=last)),
        (w.to(memory_format=last), m, g),
        (w, m.to(memory_format=last), g.to(memory_format=last)),
        (w.transpose(2, 3).contiguous().transpose(2, 3), m, g),
    ]:
        (out,) = ck.effective_weights([a], [b])
        assert torch.equal(out, w * m)
        (noisy,) = ck.effective_weights([a], [b], kind="uniform", seed=1)
        assert torch.equal(noisy, ck.effective_weights([w], [m], kind="uniform", seed=1)[0])
        (moved,) = ck.effective_weights([a], [b], kind="adversarial", grads=[c])
        assert torch.equal(moved, ck.effective_weights([w], [m], kind="adversarial", grads=[g])[0])
        dtheta, dmask, _ = ck.mask_gradients([c], [a], [b])
        assert torch.equal(dtheta[0], g * m)  # type: ignore[index]
        assert torch.equal(dmask[0], g * w)  # type: ignore[index]
    stride0 = torch.ones(()).expand(8, 6, 3, 3)
    assert torch.equal(ck.mask_gradients([stride0], [w], [m])[1][0], w)  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [64, 75])  # whole vectors, and a tail
def test_nan_stays_nan(isa: str, dtype: torch.dtype, size: int) -> None:
    """A run that diverged must show it: a mask of NaN is not a pruned weight."""
    mask, grad = torch.full((size,), 0.5, dtype=dtype), torch.ones(size, dtype=dtype)
    mask[::5] = float("nan")
    for options in ({"kind": "uniform"}, {"kind": "adversarial", "grads": [grad]}):
        (soft,) = ck.perturb_masks([mask], **options)
        assert torch.equal(soft.isnan(), mask.isnan())
        for out_dtype in (dtype, torch.bfloat16):
            (out,) = ck.effective_weights([grad], [mask], dtype=out_dtype, **options)
            assert torch.equal(out.isnan(), mask.isnan())


@pytest.mark.parametrize("size", [1e-24, 1e20])
def test_norm_neither_underflows_nor_overflows(isa: str, size: float) -> None:
    grads, weights, masks = [torch.full((130, 70), size)], [torch.randn(130, 70)], [torch.rand(130, 70)]
    want = reference.mask_gradients(grads, weights, masks, 0, True, True)[2]
    assert float(ck.mask_gradients(grads, weights, masks)[2]) == pytest.approx(float(want), rel=1e-5, abs=0)


@pytest.mark.parametrize(
    ("weight", "mask", "block"),
    [
        ((4, 3, 0, 3), (1, 3, 1, 1), None),
        ((4, 3, 0, 3), (4, 3, 1, 1), None),
        ((0, 3, 3, 3), (1, 3, 1, 1), None),
        ((4, 0, 3, 3), (1, 1, 3, 3), None),
        ((4, 0), (4, 1), None),
        ((4, 0), (4, 0), 8),
        ((4, 5), (4, 1), 2**63 - 1),
        ((), (), None),
        ((3,), (1,), None),
    ],
    ids=str,
)
def test_layers_without_weights_and_blocks_beyond_a_filter(
    weight: tuple[int, ...], mask: tuple[int, ...], block: int | None
) -> None:
    w, m = torch.randn(weight), torch.rand(mask)
    (out,) = ck.effective_weights([w], [m], block_size=block)
    full = m.expand(weight)
    assert torch.equal(out, w * full)
    dtheta, dmask, norm = ck.mask_gradients([w], [w], [m], block_size=block)
    assert torch.equal(dtheta[0], w * full)  # type: ignore[index]
    assert_close(dmask[0], (w * w).sum_to_size(mask))  # type: ignore[index]
    assert float(norm) == pytest.approx(float((w * w).sum_to_size(mask).square().sum()), rel=1e-5)


@pytest.mark.parametrize("tau", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_percentile_init(tau: float, dtype: torch.dtype) -> None:
    weights = [torch.randn(s, dtype=dtype) for s in SHAPES] + [
        torch.zeros(4, dtype=dtype),
        torch.empty(0, 3, dtype=dtype),
    ]
    out = ck.percentile_init(weights, tau)
    for w, c, want in zip(weights, out, reference.percentile_init(weights, tau), strict=True):
        assert_close(c, want)
        if w.numel() > 1 and w.any():
            assert_close(c, (w.abs() / torch.quantile(w.abs(), tau)).clamp(0, 1))
    for bad in ("nan", "inf", "-inf"):
        with pytest.raises(ValueError, match=r"weights\[0\] must be finite"):
            ck.percentile_init([torch.tensor([1.0, float(bad)])])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, m: ck.effective_weights([w], [m[:, :2]]), r"masks\[0\] must broadcast"),
        (lambda w, m: ck.effective_weights([w], [m, m]), "equal length"),
        (lambda w, m: ck.effective_weights(w, [m]), "weights must be a list"),
        (lambda w, m: ck.effective_weights([w], None), "masks must be a list"),
        (lambda w, m: ck.mask_gradients([w], [w], m), "masks must be a list"),
        (lambda w, m: ck.effective_weights([w[0, 0, 0, 0]], [m[0, 0]], block_size=4), "must have shape"),
        (lambda w, m: ck.effective_weights([w], [m], kind="gaussian"), "kind must be one of"),
        (lambda w, m: ck.effective_weights([w], [m], kind="adversarial"), "grads must be given"),
        (lambda w, m: ck.effective_weights([w], [m], block_size=4), "must have shape"),
        (lambda w, m: ck.perturb_masks([m], kind="uniform", radius=-1), "radius must be >= 0"),
        (lambda w, m: ck.perturb_masks([m.to("meta"), m], kind="uniform"), "one device"),
        (lambda w, m: ck.mask_gradients([w[:1]], [w], [m]), r"grad_weights\[0\] must have shape"),
        (lambda w, m: ck.mask_gradients([w.long()], [w], [m]), r"grad_weights\[0\] must have dtype"),
        (lambda w, m: ck.mask_gradients([w.to("meta")], [w], [m]), "one device"),
        (lambda w, m: ck.mask_gradients([w], [w], [m], need_weight="no"), "need_weight must be True or False"),
        (lambda w, m: ck.percentile_init([w], 1.5), r"^tau must be in \(0, 1\], got 1.5$"),
    ],
)
def test_bad_arguments(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.randn(4, 3, 3, 3), torch.rand(4, 3, 3, 3))
