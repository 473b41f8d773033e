"""Triton masked_conv2d and masked_linear in the interpreter against the reference: values and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import csam_kernels as ck
from conftest import NO_FLOAT64, assert_close
from csam_kernels import backend, cpu, reference
from csam_kernels.layout import expand_mask, fake_like, fake_mask_gradient
from test_masks_ops import mask_shape

if not backend.INTERPRETED:
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from csam_kernels.triton import tuning
from csam_kernels.triton.kernels import masked_conv2d as kernels
from csam_kernels.triton.launch import launch, record
from csam_kernels.triton.launchers import masked_conv2d as launchers
from csam_kernels.triton.launchers import masked_linear as linear

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NCHW, NHWC = torch.contiguous_format, torch.channels_last
BLOCK = 4

# x, weight, stride, padding, dilation, groups
GEOMETRIES: dict[
    str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int], tuple[int, int], tuple[int, int], int]
] = {
    "B2-C20-7x7-3x3": ((2, 20, 7, 7), (36, 20, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "B3-C3-7x5-5x3-s2": ((3, 3, 7, 5), (4, 3, 5, 3), (2, 1), (2, 1), (1, 1), 1),
    "B2-C8-8x9-3x3-g2": ((2, 8, 8, 9), (6, 4, 3, 3), (1, 1), (0, 0), (1, 1), 2),
    "B2-C4-8x7-3x3-depthwise": ((2, 4, 8, 7), (4, 1, 3, 3), (1, 2), (1, 1), (1, 1), 4),
    "B2-C3-8x7-3x2-depthwise2": ((2, 3, 8, 7), (6, 1, 3, 2), (1, 1), (0, 1), (1, 2), 3),
    "B1-C4-11x11-3x3-d2": ((1, 4, 11, 11), (5, 4, 3, 3), (1, 1), (2, 2), (2, 2), 1),
    "B2-C33-7x6-1x1-s2": ((2, 33, 7, 6), (12, 33, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "B2-C4-16x13-3x3-s3": ((2, 4, 16, 13), (6, 2, 3, 3), (3, 2), (1, 0), (1, 1), 2),
    "B0-C4-8x8-3x3": ((0, 4, 8, 8), (6, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1),
}
GRANULARITIES = ["weight", "filter", "channel", "kernel", "layer", "taps", "block"]
DENSITIES = {"all-masked": 0.0, "half": 0.5, "none-masked": 1.0}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables of live tiles and split reductions at test size."""
    monkeypatch.setattr(tuning, "SPLIT_PIXELS", 64)
    monkeypatch.setattr(tuning, "LISTED_FROM", 2)
    yield
    for plan in (launchers._forward_plan, launchers._input_plan, launchers._weight_plan):
        plan.cache_clear()


def problem(
    name: str,
    granularity: str,
    dtype: torch.dtype = F32,
    weight_dtype: torch.dtype = F32,
    density: float = 0.5,
    memory_format: torch.memory_format = NCHW,
) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
    x_shape, w_shape, *options = GEOMETRIES[name]
    shape = mask_shape(granularity, w_shape)
    x = torch.randn(x_shape).to(dtype, memory_format=memory_format)
    w = (torch.randn(w_shape) / 8).to(weight_dtype, memory_format=memory_format)
    mask = torch.rand(shape) * (torch.rand(shape) < density)
    if granularity == "weight":
        mask[: w_shape[0] // 2, : w_shape[1] // 2] = 0  # whole tiles of it
        mask = mask.to(memory_format=memory_format)
    return [x, w, mask, torch.randn(w_shape[0])], (*options, BLOCK if granularity == "block" else 0)


def check_backward(tensors: list[torch.Tensor], options: tuple[Any, ...], out: torch.Tensor) -> None:
    """All gradients in the memory format of torch's, and each flag alone the same bits."""
    x, w, m, _ = tensors
    grad = torch.randn(out.shape).to(out.dtype, memory_format=NHWC) / 4
    args = (grad, x, w, m, *options)
    ours = launchers.masked_conv2d_backward(*args, [True] * 3)
    exact = [t.float() for t in (grad, x)]  # G is not rounded to x's dtype here, so neither in what is expected
    rounded = (w.float() * expand_mask(m, w.shape, options[-1]).float()).to(x.dtype).float()
    dx = reference.masked_conv2d_backward(
        exact[0], exact[1], rounded, torch.ones(1, 1, 1, 1), *options[:-1], 0, [True, False, False]
    )
    want = dx + reference.masked_conv2d_backward(*exact, w, m, *options, [False, True, True])
    for a, b, t in zip(ours, want, (x, w, m), strict=True):
        assert a.dtype == t.dtype
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        assert_close(a / scale, (b / scale).to(a.dtype), a.dtype)
    assert (
        ours[0].stride() == torch.empty_like(reference.masked_conv2d_backward(*args, [True, False, False])[0]).stride()
    )
    assert ours[1].stride() == fake_like(w).stride()
    assert ours[2].stride() == fake_mask_gradient(m, w, m.dtype).stride()


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["NCHW", "NHWC"])
def test_geometries(name: str, memory_format: torch.memory_format) -> None:
    tensors, options = problem(name, "weight", memory_format=memory_format)
    out = launchers.masked_conv2d(*tensors, *options)
    want = reference.masked_conv2d(*tensors, *options)
    assert_close(out, want)
    assert out.stride() == want.stride()
    check_backward(tensors, options, out)


MIXED = [("B3-C3-7x5-5x3-s2", g) for g in GRANULARITIES]
MIXED += [("B2-C8-8x9-3x3-g2", g) for g in ("filter", "channel", "block")]
MIXED += [("B2-C3-8x7-3x2-depthwise2", g) for g in ("filter", "block")]


@pytest.mark.parametrize(("name", "granularity"), MIXED)
def test_granularities(name: str, granularity: str) -> None:
    tensors, options = problem(name, granularity)
    out = launchers.masked_conv2d(*tensors, *options)
    assert_close(out, reference.masked_conv2d(*tensors, *options))
    check_backward(tensors, options, out)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("granularity", ["filter", "channel", "block"])
def test_bool_masks(granularity: str, density: str) -> None:
    (x, w, m, b), options = problem("B1-C4-11x11-3x3-d2", granularity, density=DENSITIES[density])
    out = launchers.masked_conv2d(x, w, m > 0, b, *options)
    assert_close(out, reference.masked_conv2d(x, w, m > 0, b, *options))
    grad = torch.randn_like(out)
    args = (grad, x, w, m > 0, *options, [True, True, False])
    for a, e in zip(launchers.masked_conv2d_backward(*args), reference.masked_conv2d_backward(*args), strict=True):
        assert_close(a / 8, e / 8)


@pytest.mark.parametrize("name", ["B1-C4-11x11-3x3-d2", "B2-C4-8x7-3x3-depthwise"])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(BF16, F32), (F16, F32), (BF16, BF16), (F32, BF16)], ids=str)
def test_dtypes(name: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """theta * M is rounded once to x's dtype: the sums are those of the rounded product."""
    tensors, options = problem(name, "kernel", dtype, weight_dtype)
    x, w, m, b = tensors
    out = launchers.masked_conv2d(*tensors, *options)
    rounded = (w.float() * m).to(dtype).float()
    exact = F.conv2d(x.float(), rounded, b.to(dtype).float(), *options[:-1])
    assert out.dtype == dtype
    if dtype is not F32:  # the order of the sums shows only where a result lies between two neighbours
        assert float((out != exact.to(dtype)).float().mean()) < 0.01
    assert_close(out, exact.to(dtype))
    check_backward(tensors, options, out)


def test_need_flags() -> None:
    (x, w, m, _), options = problem("B1-C4-11x11-3x3-d2", "weight")
    grad = torch.randn(1, 5, 11, 11)
    every = launchers.masked_conv2d_backward(grad, x, w, m, *options, [True] * 3)
    for need in ([True, False, False], [False, True, False], [False, False, True], [True, True, False]):
        some = launchers.masked_conv2d_backward(grad, x, w, m, *options, need)
        for a, b in zip(some, [t for t, n in zip(every, need, strict=True) if n], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_squared_norm_of_the_mask_gradient(granularity: str) -> None:
    (x, w, m, _), options = problem("B3-C3-7x5-5x3-s2", granularity)
    grad = torch.randn(3, 4, 4, 5)
    *grads, parts = launchers.masked_conv2d_weight_gradients(grad, x, w, m, options, True, True)
    assert_close(parts.double().sum() / 100, grads[1].double().square().sum() / 100, F32)


def test_filter_masks_over_many_tiles() -> None:
    """Two blocks of filters, each with more tiles than are added up in one step."""
    x, w, m = torch.randn(1, 130, 2, 2).to(memory_format=NHWC), torch.randn(70, 130, 3, 3), torch.rand(70, 1, 1, 1)
    options, grad = ((1, 1), (1, 1), (1, 1), 1, 0), torch.randn(1, 70, 2, 2)
    *ours, parts = launchers.masked_conv2d_weight_gradients(grad, x, w, m, options, True, True)
    want = reference.masked_conv2d_backward(grad, x, w, m, *options, [False, True, True])
    for a, b in zip(ours, want, strict=True):
        assert_close(a / b.abs().max(), b / b.abs().max())
    assert_close(parts.double().sum() / want[1].double().square().sum(), torch.ones((), dtype=torch.float64), F32)


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("B2-C20-7x7-3x3", "filter"), ("B2-C8-8x9-3x3-g2", "channel"), ("B2-C4-8x7-3x3-depthwise", "filter")],
)
def test_gradients_do_not_depend_on_the_order_of_programs(
    name: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts and tiles in other orders, so that others come last and go on: the same bits."""
    from triton.runtime.interpreter import interpreter_builder as builder

    monkeypatch.setattr(tuning, "SPLIT_PIXELS", 16)
    (x, w, m, _), options = problem(name, granularity, memory_format=NHWC)
    grad = torch.randn_like(reference.masked_conv2d(x, w, m, None, *options))
    set_grid_idx, last_parts = builder.set_grid_idx, set()

    def results(turn: int, step: int) -> tuple[torch.Tensor, ...]:
        def at(tile: int, part: int, z: int) -> None:
            tiles, parts, _ = builder.grid_dim
            if part == parts - 1 and parts > 1:
                last_parts.add((turn + step * part) % parts)
            set_grid_idx((turn + step * tile) % tiles, (turn + step * part) % parts, z)

        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", at)
            return launchers.masked_conv2d_weight_gradients(grad, x, w, m, options, True, True)

    first = results(0, 1)
    for order in ((-1, -1), (2, 1)):
        assert all(map(torch.equal, results(*order), first))
    assert len(last_parts) == 3


def test_dead_tiles_are_never_read() -> None:
    """NaN weights under a dead tile leave no trace, so the tile was skipped; forward and both gradients."""
    x, w = torch.randn(2, 32, 7, 7), torch.randn(70, 32, 3, 3)
    m = torch.ones(70, 32, 3, 3)
    m[:, :16] = 0
    m[64:] = 0
    poisoned = torch.where(m == 0, torch.nan, w)
    options = ((1, 1), (1, 1), (1, 1), 1, 0)
    out = launchers.masked_conv2d(x.to(memory_format=NHWC), poisoned, m, None, *options)
    assert_close(out, reference.masked_conv2d(x, w, m, None, *options))
    grad = torch.randn_like(out)
    dx, dw = launchers.masked_conv2d_backward(grad, x, w * m, m > 0, *options, [True, True, False])
    want = reference.masked_conv2d_backward(grad, x, w, m, *options, [True, True, False])
    assert_close(dx / 8, want[0] / 8)
    assert_close(dw / 8, want[1] / 8)
    grad[:, 64:] = torch.nan  # of dead filters
    alone = launchers.masked_conv2d_backward(grad, x, w, m, *options, [False, True, False])[0]
    assert not alone[64:].any()


def test_list_of_live_tiles() -> None:
    """More tiles than the list kernel looks at in one step; rows that are full and empty."""
    flags = (torch.rand(4, 2500) < 0.4).int()
    flags[1], flags[2] = 0, 1
    tiles, counts = torch.full((4, 2500), -1, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    arguments = {"flags_ptr": flags, "tiles_ptr": tiles, "counts_ptr": counts, "tiles": 2500, "CHUNK": launchers._CHUNK}
    launch(kernels.tile_list_kernel, (4,), reads=[], writes=[], **arguments)
    assert counts.tolist() == flags.sum(1).tolist()
    for row, count, flag in zip(tiles, counts, flags, strict=True):
        assert torch.equal(row[:count], flag.nonzero()[:, 0].int())
        assert (row[count:] == -1).all()


def test_public_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the dispatcher and autograd, forced to this provider and to the reference."""
    grads = []
    tensors = [torch.randn(2, 4, 6, 6), torch.randn(6, 4, 3, 3), torch.rand(6, 1, 1, 1), torch.randn(6)]
    for provider in ("triton", "reference"):
        monkeypatch.setenv("CSAM_BACKEND", provider)
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = ck.masked_conv2d(*leaves, padding="same")
        ck.masked_linear(out.flatten(1), torch.ones(5, 216), torch.ones(1, 216)).square().mean().backward()
        grads.append([t.grad / t.grad.abs().max() for t in leaves])  # type: ignore[union-attr, operator]
    for ours, want in zip(*grads, strict=True):
        assert_close(ours, want)


def test_unusual_strides() -> None:
    w, m = torch.randn(6, 4, 3, 3), torch.rand(6, 4, 3, 3)
    x = torch.randn(8, 8, 4, 2).permute(3, 2, 0, 1)
    options = ((1, 1), (1, 1), (1, 1), 1, 0)
    assert_close(launchers.masked_conv2d(x, w, m, None, *options), F.conv2d(x, w * m, padding=1))
    grad = torch.ones(()).expand(2, 6, 8, 8)
    turned = w.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    expanded = torch.rand(6, 1, 1, 3).expand(6, 1, 3, 3)
    for mask in (m, m.transpose(2, 3), expanded):
        ours = launchers.masked_conv2d_backward(grad, x, turned, mask, *options, [True] * 3)
        want = reference.masked_conv2d_backward(grad, x, turned, mask, *options, [True] * 3)
        for a, b in zip(ours, want, strict=True):
            assert_close(a / 8, b / 8)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ["B1-C4-11x11-3x3-d2", "B2-C4-8x7-3x3-depthwise"])
def test_inference_epilogue(name: str, dtype: torch.dtype) -> None:
    (x, w, m, b), options = problem(name, "weight", dtype)
    scale, shift = torch.rand(len(w)) + 0.5, torch.randn(len(w))
    exact = F.conv2d(x.float(), (w * m).to(dtype).float(), b.to(dtype).float(), *options[:-1])
    want = (exact * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).relu().to(dtype)
    tiles = launchers.live_tiles(w, m, dtype, *options[-2:])
    assert_close(launchers.masked_conv2d_inference(x, w, m, b, scale, shift, True, *options), want)
    assert_close(launchers.masked_conv2d_inference(x, w, m, b, scale, shift, True, *options, tiles=tiles), want)
    assert_close(
        launchers.masked_conv2d_inference(x, w, m, None, None, None, True, *options),
        F.conv2d(x.float(), (w * m).to(dtype).float(), None, *options[:-1]).relu().to(dtype),
    )


@pytest.mark.parametrize("granularity", ["weight", "filter", "channel", "block"])
@pytest.mark.parametrize(("rows", "dtype"), [(7, F32), (150, F32), (7, BF16), (0, F32)], ids=str)
def test_linear(granularity: str, rows: int, dtype: torch.dtype) -> None:
    x, w, b = torch.randn(rows, 45).to(dtype), torch.randn(37, 45) / 4, torch.randn(37)
    shape = mask_shape(granularity, (37, 45))
    m = torch.rand(shape) * (torch.rand(shape) < 0.5)
    block = BLOCK if granularity == "block" else 0
    out = linear.masked_linear(x, w, m, b, block)
    rounded = (w * expand_mask(m, w.shape, block)).to(dtype).float()
    assert_close(out, F.linear(x.float(), rounded, b.to(dtype).float()).to(dtype))
    grad = torch.randn(rows, 37).to(dtype) / 8
    ours = linear.masked_linear_backward(grad, x, w, m, block, [True] * 3)
    want = [
        grad.float() @ rounded,
        *reference.masked_linear_backward(grad.float(), x.float(), w, m, block, [False, True, True]),
    ]
    for a, e, t in zip(ours, want, (x, w, m), strict=True):
        assert a.dtype == t.dtype
        assert a.shape == t.shape
        assert_close(a, e.to(a.dtype))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["NCHW", "NHWC"])
def test_noise_drawn_in_the_load_path(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    image, w, m = torch.rand(3, 7, 6), torch.randn(20, 3, 3, 3), torch.rand(20, 3, 3, 3)
    w, first = w.to(memory_format=memory_format), 2**32 - 2
    options = ((2, 1), (1, 1), (1, 1), 1, 0)
    noisy = cpu.smoothing_noise(image, 5, 0.5, -7, first, 3, dtype, memory_format)
    want = launchers.masked_conv2d(noisy, w, m, None, *options)
    out = launchers.smoothing_conv2d(image, 5, 0.5, -7, first, 3, w, m, None, *options, dtype=dtype)
    assert_close(out, want)
    eye = torch.eye(3).view(3, 3, 1, 1)
    ones = torch.ones(3, 1, 1, 1)
    same = launchers.smoothing_conv2d(image, 5, 0.5, -7, first, 3, eye, ones, dtype=dtype)
    assert_close(same, noisy.contiguous(), F32)


def test_recorded_on_meta() -> None:
    x, w, m = (torch.empty(s, device="meta") for s in ((256, 64, 56, 56), (128, 64, 3, 3), (128, 64, 3, 3)))
    options = ((1, 1), (1, 1), (1, 1), 1, 0)
    with record() as forward:
        out = launchers.masked_conv2d(x, w, m, None, *options)
    assert [launch.kernel.fn.__name__ for launch in forward] == [
        "pack_tiles_kernel",
        "tile_list_kernel",
        "masked_conv2d_kernel",
    ]
    ideal = x.nbytes + w.nbytes + m.nbytes + out.nbytes
    assert sum(launch.bytes_read + launch.bytes_written for launch in forward) < 1.05 * ideal
    with record() as backward:
        launchers.masked_conv2d_backward(out, x, w, m, *options, [True] * 3)
    ideal = 2 * out.nbytes + 2 * x.nbytes + 6 * w.nbytes
    assert sum(launch.bytes_read + launch.bytes_written for launch in backward) < 1.05 * ideal


COMPILE = """
import re, sys, torch, triton
from gpu_ledger import assemble, source_of
from csam_kernels.triton import tuning
from csam_kernels.triton.kernels import masked_conv2d as kernels
from csam_kernels.triton.launch import launch, record
from csam_kernels.triton.launchers import masked_conv2d as launchers

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)

x, grad = empty(64, 64, 14, 14, dtype=torch.bfloat16), empty(64, 128, 14, 14, dtype=torch.bfloat16)
w, m, options = empty(128, 64, 3, 3), empty(128, 64, 3, 3), ((1, 1), (1, 1), (1, 1), 1, 0)
one, o64 = empty(64, 1, 3, 3), empty(64, 64, 14, 14, dtype=torch.bfloat16)
ARRIVAL = "s+b+ab+l"  # stores, barrier, addition, barriers, loads
TOKENS = {"st.global": "s", "bar.sync": "b", "atom.global.gpu.acq_rel.add.u32": "a", "ld.global.cg": "l"}
for arch, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma")):
    with tuning.forced(tuning.CLASSES[arch // 10]), record() as launches:
        launchers.masked_conv2d(x, w, m, None, *options)
        launchers.masked_conv2d_backward(grad, x, w, m, *options, [True] * 3)
        launchers.masked_conv2d_backward(grad, x, w, m[:, :1, :1, :1], *options, [False, True, True])
        launchers.masked_conv2d_backward(o64, x, one, one[:, :, :1, :1], *options[:3], 64, 0, [False, True, True])
    orders = []
    for launch in launches:
        source, target, settings = source_of(launch, arch)
        compiled = triton.compile(source, target=target, options=settings)
        ptx, name = compiled.asm["ptx"], launch.kernel.__name__
        assert assemble(ptx, compiled.metadata.shared).spill_bytes == 0, (arch, name)
        assert (instruction in ptx) == name.startswith("masked_conv2d"), (arch, name)
        if name.endswith("weight_gradient_kernel"):
            found = re.findall("|".join(map(re.escape, TOKENS)) + "|atom|ld[.]global|membar|fence", ptx)
            orders.append("".join(TOKENS.get(token, ".") for token in found))
    assert [len(re.findall(ARRIVAL, order)) for order in orders] == [1, 2, 2], (arch, orders)
    assert [order.count("a") for order in orders] == [1, 2, 2], (arch, orders)
"""


def test_tensor_cores_and_no_spills() -> None:
    """bfloat16 ahead of time for all three architectures; the ledger covers every row of the tuning table. Where
    programs hand parts to one another, the order that the memory model asks for (kernels/masked_conv2d.py)."""
    root = Path(__file__).resolve().parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "bench"), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tf32_only_where_torch_allows_it() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        assert launchers._precision(F32, True) == launchers._precision(F32, False) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert launchers._precision(F32, True) == launchers._precision(F32, False) == "tf32"
        assert launchers._precision(BF16, True) == "ieee"
        torch.backends.cudnn.allow_tf32 = False
        assert launchers._precision(F32, True) == "ieee"
    finally:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision(before)


def test_refusals() -> None:
    x, w, m = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.rand(4, 4, 3, 3)
    options = ((1, 1), (1, 1), (1, 1), 1, 0)
    with pytest.raises(TypeError, match=f"^x {NO_FLOAT64}$"):
        launchers.masked_conv2d(x.double(), w, m, None, *options)
    for batch in (2**23, 2**23 - 1):  # the last tile would reach past 2^31
        with pytest.raises(ValueError, match=r"at most 2\^31 - 2\^22 pixels"):
            launchers.masked_conv2d(torch.empty(batch, 4, 16, 16, device="meta"), w, m, None, *options)
    wide = torch.empty(1, 4, 2**15, 2**15, device="meta")
    for image in (wide, torch.empty(1, 1, 1, 1, device="meta").expand(wide.shape)):  # dx would have 2^32 elements
        with pytest.raises(ValueError, match=r"x must hold and span fewer than 2\^31 elements"):
            launchers.masked_conv2d(image, w, m, None, *options)
    with pytest.raises(ValueError, match="scale and shift"):
        launchers.masked_conv2d_inference(x, w, m, scale=torch.ones(4))
