"""Triton perturb_masks, effective_weights, mask_gradients, percentile_init in the interpreter: the bits of the CPU."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

import csam_kernels as ck
from conftest import NO_FLOAT64, assert_close
from csam_kernels import backend, cpu, reference
from test_masks_ops import BLOCK, GRANULARITIES, mask_shape

if not backend.INTERPRETED:
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from csam_kernels import triton as provider
from csam_kernels.triton import tuning
from csam_kernels.triton.launch import launch, record

SHAPES = [(8, 3, 3, 3), (16, 16, 1, 1), (5, 7, 3, 5), (24, 33), (1, 1, 1, 1), (13, 12, 3, 3), (0, 4, 3, 3)]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STEP = 2**33 + 1
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one chunk a layer and more than one part a mask value at test size."""
    small = {"BLOCK": 512, "num_warps": 4}
    monkeypatch.setitem(tuning.MASKS, "sm80", {True: small, False: small})
    monkeypatch.setitem(tuning.BROADCAST, "sm80", {"TILE": 1024, "PART": 1024, "num_warps": 4})
    monkeypatch.setattr(tuning, "TOTALS", {"BLOCK": 4, "num_warps": 4})


def layers(granularity: str, layout: str = "contiguous", mask_dtype: torch.dtype = F32) -> tuple[list, list, int]:
    """Weights, masks and block size; channels_last full masks lie as their weights do, but for the last."""

    def placed(t: Tensor) -> Tensor:
        return t.to(memory_format=FORMATS[layout]) if t.dim() == 4 else t

    weights = [placed(torch.randn(s)) for s in SHAPES]
    masks = [torch.rand(mask_shape(granularity, s)) for s in SHAPES]
    masks = [m > 0.5 if mask_dtype is torch.bool else m.to(mask_dtype) for m in masks]
    if granularity == "weight":
        masks[:-2] = [placed(m) for m in masks[:-2]]
    return weights, masks, BLOCK if granularity == "block" else 0


def perturbation(kind: str, masks: list[Tensor], norm: str = "global") -> tuple[Any, ...]:
    grads = [torch.randn(m.shape) for m in masks] if kind == "adversarial" else []
    return kind, 0.3, 2.0, grads, norm, 9, STEP


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(actual) == len(expected) and all(
        a.dtype == e.dtype and a.stride() == e.stride() and torch.equal(a, e)
        for a, e in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("norm", ["global", "layer"])
@pytest.mark.parametrize("kind", ["uniform", "adversarial"])
def test_perturbed_masks_are_the_cpus(kind: str, norm: str) -> None:
    masks = [torch.rand(1301), torch.rand(5, 4, 3, 3), torch.rand(8, 6, 3, 3).to(memory_format=torch.channels_last)]
    masks += [torch.rand(0, 3), torch.ones(1), torch.rand(40)[3:]]  # the last is not aligned
    arguments = perturbation(kind, masks, norm)
    out = provider.perturb_masks(masks, *arguments)
    assert same(out, cpu.perturb_masks(masks, *arguments))
    for a, b in zip(out, reference.perturb_masks(masks, *arguments), strict=True):
        assert_close(a, b)


def test_zero_gradient_leaves_masks_alone() -> None:
    masks = [torch.rand(600), torch.rand(7)]
    grads = [torch.zeros(600), torch.ones(7)]
    out = provider.perturb_masks(masks, "adversarial", 0.1, 0.5, grads, "layer", 0, 0)
    assert torch.equal(out[0], masks[0])
    assert not torch.equal(out[1], masks[1])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("kind", ["plain", "uniform", "adversarial"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_effective_weights_are_the_cpus(granularity: str, kind: str, layout: str) -> None:
    weights, masks, block = layers(granularity, layout)
    arguments = (*perturbation(kind, masks, "layer"), BF16, block)
    out = provider.effective_weights(weights, masks, *arguments)
    assert same(out, cpu.effective_weights(weights, masks, *arguments))
    for a, b in zip(out, reference.effective_weights(weights, masks, *arguments), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float64, BF16], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_effective_weights_of_every_dtype(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    weights, masks, _ = layers("weight", mask_dtype=mask_dtype)
    weights = [w.to(dtype if i % 2 else F32) for i, w in enumerate(weights)]  # several dtypes in one call
    arguments = ("plain", 0.0, 0.0, [], "global", 0, 0, None, 0)
    assert same(
        provider.effective_weights(weights, masks, *arguments), cpu.effective_weights(weights, masks, *arguments)
    )


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("grad_dtype", "mask_dtype"), [(F32, F32), (BF16, torch.bool), (F16, F32)], ids=str)
def test_mask_gradients(granularity: str, layout: str, grad_dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    weights, masks, block = layers(granularity, layout, mask_dtype)
    grads = [torch.randn(w.shape).to(grad_dtype) for w in weights]
    dtheta, dmask, norm = provider.mask_gradients(grads, weights, masks, block, True, True)
    want_theta, want_mask, want_norm = cpu.mask_gradients(grads, weights, masks, block, True, True)
    assert same(dtheta, want_theta)
    for got, want in zip(dmask, want_mask, strict=True):
        scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        assert_close(got / scale, want / scale)
    assert norm.dtype is torch.float64
    assert norm.shape == ()
    assert float(norm) == pytest.approx(float(want_norm), rel=1e-6)
    exact = [d.double() for d in reference.mask_gradients(grads, weights, masks, block, False, True)[1]]
    assert float(norm) == pytest.approx(sum(float(d.square().sum()) for d in exact), rel=1e-5)


def test_results_that_nobody_reads_are_left_out() -> None:
    for granularity in ("weight", "filter", "taps"):
        weights, masks, block = layers(granularity)
        grads = [torch.randn(w.shape) for w in weights]
        dtheta, dmask, norm = provider.mask_gradients(grads, weights, masks, block, True, True)
        for need_weight, need_mask in ((True, False), (False, True), (False, False)):
            part = provider.mask_gradients(grads, weights, masks, block, need_weight, need_mask)
            assert same(part[0], dtheta if need_weight else [])
            assert same(part[1], dmask if need_mask else [])
            assert torch.equal(part[2], norm)


def test_large_mask_values_are_summed_in_parts() -> None:
    weight, mask, grad = torch.randn(6, 70, 3, 3), torch.rand(1, 1, 1, 1), torch.randn(6, 70, 3, 3)
    _, (dmask,), _ = provider.mask_gradients([grad], [weight], [mask], 0, True, True)
    assert_close(dmask / 60, (grad.double() * weight.double()).sum().float().reshape(1, 1, 1, 1) / 60)


@pytest.mark.parametrize("tau", [0.3, 0.9, 1.0])
def test_percentile_init_is_the_cpus(tau: float) -> None:
    weights = [torch.randn(700), torch.randn(5, 7, 3, 3), torch.zeros(4), torch.randn(1), torch.empty(0, 3)]
    weights += [torch.randint(0, 3, (50,)).float(), torch.randn(600) * 1e-40]
    out = provider.percentile_init(weights, tau)
    assert same(out, cpu.percentile_init(weights, tau))
    for a, b in zip(out, reference.percentile_init(weights, tau), strict=True):
        assert_close(a, b)


def test_public_functions_reach_this_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, masks = [torch.randn(4, 3, 3, 3)], [torch.rand(4, 3, 3, 3)]

    def results() -> list[Tensor]:
        soft = ck.perturb_masks(masks, kind="uniform", seed=2**64 - 1)
        effective = ck.effective_weights(weights, masks, kind="adversarial", grads=weights)
        dtheta, dmask, _ = ck.mask_gradients(weights, weights, masks)
        return soft + effective + (dtheta or []) + (dmask or []) + ck.percentile_init(weights)

    expected = results()
    monkeypatch.setenv("CSAM_BACKEND", "triton")
    assert same(results(), expected)


@pytest.mark.parametrize(
    ("call", "launches"),
    [
        (lambda w, m: provider.perturb_masks(m, *perturbation("uniform", m)), 1),
        (lambda w, m: provider.perturb_masks(m, "adversarial", 0.1, 0.1, m, "layer", 0, 0), 3),
        (lambda w, m: provider.effective_weights(w, m, *perturbation("uniform", m), BF16, 0), 1),
        (lambda w, m: provider.mask_gradients(w, w, m, 0, True, True), 2),
        (lambda w, m: provider.mask_gradients(w, w, [t[:, :1, :1, :1] for t in m], 0, True, True), 3),
        (lambda w, m: provider.percentile_init(w, 0.9), 10),
    ],
    ids=["uniform", "adversarial", "effective", "gradients", "filter-gradients", "percentile"],
)
def test_launches_do_not_grow_with_layers(call: Callable[..., Any], launches: int) -> None:
    for count in (1, 20):
        weights = [torch.empty(8, 5, 3, 3, device="meta") for _ in range(count)]
        with record() as recorded:
            call(weights, weights)
        assert len(recorded) == launches


def test_bytes_are_those_of_inputs_and_outputs_once() -> None:
    """At most 5 % above; the adversarial arm has to read its gradients once more, for the norm."""
    full = [torch.empty(512, 512, 3, 3, device="meta")]

    def moved(call: Callable[[], Any]) -> int:
        with record() as recorded:
            call()
        return sum(launch.bytes_read + launch.bytes_written for launch in recorded)

    n = full[0].numel()
    assert moved(lambda: provider.perturb_masks(full, *perturbation("uniform", full))) <= 1.05 * 8 * n
    assert moved(lambda: provider.effective_weights(full, full, "plain", 0, 0, [], "", 0, 0, BF16, 0)) <= 1.05 * 10 * n
    assert moved(lambda: provider.mask_gradients(full, full, full, 0, True, True)) <= 1.05 * 20 * n
    filters = [torch.empty(512, 1, 1, 1, device="meta")]
    assert moved(lambda: provider.mask_gradients(full, full, filters, 0, True, True)) <= 1.05 * 12 * n
    adversarial = moved(lambda: provider.perturb_masks(full, "adversarial", 0, 0.1, full, "global", 0, 0))
    assert adversarial <= 1.05 * (12 + 4) * n


def test_float64_is_refused_by_name() -> None:
    wide, mask = torch.rand(3, 3, dtype=torch.float64), torch.rand(3, 3)
    plain = ("plain", 0.0, 0.0, [], "global", 0, 0, None, 0)
    for call, name in (
        (lambda: provider.perturb_masks([mask, wide], *perturbation("uniform", [])), r"masks\[1\]"),
        (lambda: provider.effective_weights([wide], [mask], *plain), r"weights\[0\]"),
        (lambda: provider.mask_gradients([mask], [wide], [mask], 0, True, True), r"weights\[0\]"),
        (lambda: provider.percentile_init([wide], 0.9), r"weights\[0\]"),
    ):
        with pytest.raises(TypeError, match=f"^{name} {NO_FLOAT64}$"):
            call()


def test_reciprocals_divide_exactly() -> None:
    from csam_kernels.triton.launchers.mask_layers import _reciprocal

    for d in [*range(1, 300), 576, 4608, 2**20 - 1, 2**29 + 1, 2**30 - 1]:
        m, shift = _reciprocal(d)
        assert m < 2**32
        for n in (0, 1, d - 1, d, d + 1, 7 * d - 1, 7 * d, 2**31 // d * d - 1, 2**31 - 1):
            if 0 <= n < 2**31:
                assert ((2 * n * m) >> 32) >> shift == n // d, (n, d)


def test_tables_are_built_once_a_content() -> None:
    from csam_kernels.triton import tables

    cpu_device = torch.device("cpu")
    first = tables.chunk_table((1000, 0, 300), 256, cpu_device)
    assert first.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [2, 0], [2, 1]]
    assert tables.chunk_table((1000, 0, 300), 256, cpu_device) is first
    assert tables.chunk_table((1000, 0, 301), 256, cpu_device) is not first
    assert tables.table(((1, 2**40), (3, 4)), cpu_device).tolist() == [[1, 2**40], [3, 4]]
    assert sum(math.ceil(n / 256) for n in (1000, 0, 300)) == len(first)


def test_tables_and_scratch_do_not_follow_torchs_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    from csam_kernels.triton import tables

    with torch.device("meta"):
        assert tables.chunk_table((1000, 301), 128, torch.device("cpu")).device.type == "cpu"
        assert tables.table(((5, 2**41),), torch.device("cpu")).tolist() == [[5, 2**41]]
    monkeypatch.setenv("CSAM_BACKEND", "triton")
    x, w, m = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.rand(4, 1, 1, 1)
    arguments = (torch.randn(2, 4, 3, 3), x, w, m, (1, 1), (0, 0), (1, 1), 1, 0, [True] * 3)
    expected = provider.masked_conv2d_backward(*arguments)
    torch.set_default_dtype(torch.float64)
    try:
        assert ck.philox_uniform(3, 2, seed=0).dtype is F32
        assert same(provider.masked_conv2d_backward(*arguments), expected)
    finally:
        torch.set_default_dtype(F32)


def test_a_launch_goes_to_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the current one, on which Triton would launch."""
    entered, launched = [], []
    monkeypatch.setattr(torch.cuda, "device", lambda where: contextlib.nullcontext(entered.append(where)))

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **arguments: launched.append((grid, entered[-1]))

    with FakeTensorMode():
        x = torch.empty(4, device="cuda:1")
    launch(Kernel(), (3,), reads=[x], writes=[], n=4, x_ptr=x)
    launch(Kernel(), (0,), reads=[x], writes=[], x_ptr=x)
    assert launched == [((3,), torch.device("cuda:1"))]


def test_kernels_compile_without_spills() -> None:
    """For sm_80, sm_90 and sm_100, in a process without the interpreter."""
    script = Path(__file__).with_name("triton_mask_calls.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ops = ["perturb_masks", "effective_weights", "mask_gradients", "percentile_init"]
    done = subprocess.run([sys.executable, script, *ops], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {(row[0], row[2]) for row in rows} == {(op, arch) for op in ops for arch in ("sm_80", "sm_90", "sm_100")}
    assert [row for row in rows if row[4] != "0"] == []
