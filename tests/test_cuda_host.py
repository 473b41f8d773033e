"""Every CUDA kernel body, compiled for the host and run block by block, against the reference and the CPU provider.

Grids are persistent over three multiprocessors, so blocks take several units; shapes leave ragged tails; and every case
runs with blocks and threads forwards and backwards (tests/cuda_shim), which no result may depend on.
"""

from __future__ import annotations

import importlib
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_host
from conftest import NO_FLOAT64, assert_close
from csam_kernels import cpu, reference
from csam_kernels.laws import LAWS
from csam_kernels.ops.binarize import kept
from csam_kernels.ops.semantic_batch import SEMANTIC_NEUTRAL
from test_masks_ops import BLOCK, GRANULARITIES, layers, mask_shape

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return cuda_host.load(cuda_host.build(tmp_path_factory.mktemp("cuda_host")))


@pytest.fixture(params=["forward", "reverse"])
def cuda(request: pytest.FixtureRequest, built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("CSAM_SHIM_ORDER", request.param)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN: nothing may be left unwritten
    yield built
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 5, 7), (2, 1, 1), (5, 3, 3), (4, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("law", LAWS)
def test_noise(
    cuda: Any, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, law: str
) -> None:
    args = (torch.rand(shape), 7, 0.5, -5, 2**32 - 3, 7, dtype, memory_format, law)
    out = cuda.smoothing_noise(*args)
    assert torch.equal(out, cpu.smoothing_noise(*args))
    assert out.is_contiguous(memory_format=memory_format)
    assert_close(out, reference.smoothing_noise(*args))


def test_noise_of_many_units_of_an_unaligned_image(cuda: Any) -> None:
    x = torch.rand(3 * 64 * 64 + 1)
    for image in (x[1:], x[:-1]):
        args = (image.view(3, 64, 64), 33, 0.25, 11, 2**40, 0, torch.float32, torch.contiguous_format)
        assert torch.equal(cuda.smoothing_noise(*args), cpu.smoothing_noise(*args))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (300, 7), (5, 4096), (0, 3), (3, 0)])
def test_philox_words(cuda: Any, n: int, k: int) -> None:
    out = torch.empty(n, k)
    cuda._run(cuda._CUDA.philox_uniform, out.device, out.data_ptr(), n, k, 2**64 - 9, 2**32 - 2, 2**32 - 1)
    assert torch.equal(out, cpu.philox_uniform(n, k, -9, 2**32 - 2, 2**32 - 1))


def views(rows: Tensor) -> Iterator[Tensor]:
    """The same rows dense, off any 16-byte boundary, and with gaps; NaN lies around them."""
    n, classes = rows.shape
    for offset, stride in ((0, classes), (1, classes), (0, classes + 16), (3, classes + 1)):
        memory = torch.full((offset + n * stride + 1,), torch.nan, dtype=rows.dtype)
        view = memory.as_strided((n, classes), (stride, 1), offset)
        yield view.copy_(rows)


def check_votes(cuda: Any, logits: Tensor) -> None:
    for view in views(logits):
        out, expected = (torch.arange(logits.shape[1]) for _ in range(2))
        cuda.count_votes(view, out)
        cpu.count_votes(logits, expected)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("classes", [1, 2, 8, 10, 32, 33, 64, 100, 257, 1000, 5000])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_votes(cuda: Any, classes: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(70, classes) * 4).round().to(dtype)  # many ties
    logits[3] = -torch.inf
    logits[5, classes // 2], logits[6, 0], logits[9, -1] = torch.nan, torch.nan, torch.nan
    logits[7], logits[8] = 0.0, -0.0
    for part in (logits, logits[:1], logits[:0]):
        check_votes(cuda, part)


@pytest.mark.parametrize(("n", "classes"), [(2300, 10), (300, 100), (80, 1000)])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_votes_of_many_units(
    cuda: Any, n: int, classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_run", lambda f, where, *args: f(*args, 1, 0))  # more rows than the blocks of one hold
    logits = torch.randn(n, classes).to(dtype)
    logits[::5, classes // 2] = torch.nan
    logits[1::2, 3] = 9.0  # equal votes of a warp
    check_votes(cuda, logits)


def test_more_classes_than_32_bit_indices_are_refused(built: Any) -> None:
    logits = torch.empty(1, 2**31, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=r"logits must have at most 2\^31 - 2\^12 classes.*got 2147483648"):
        built.count_votes(logits, torch.empty(2**31, dtype=torch.int64, device="meta"))


def perturbation(masks: list[Tensor], kind: str, norm: str) -> tuple[Any, ...]:
    grads = [torch.randn_like(m) for m in masks] if kind == "adversarial" else []
    if len(grads) > 1 and grads[1].numel():
        grads[1].zero_()
    return kind, 0.3, 2.0, grads, norm, -9, 2**33 + 1


@pytest.mark.parametrize("kind", ["uniform", "adversarial"])
@pytest.mark.parametrize("norm", ["global", "layer"])
def test_perturbed_masks(cuda: Any, kind: str, norm: str) -> None:
    sizes = [(1,), (17,), (0,), (64, 33), (20_000,)]
    masks = [torch.rand(size) for size in sizes] + [torch.zeros(300), torch.ones(300), torch.rand(4097)[1:]]
    args = (masks, *perturbation(masks, kind, norm))
    for out, same, expected in zip(
        cuda.perturb_masks(*args), cpu.perturb_masks(*args), reference.perturb_masks(*args), strict=True
    ):
        assert_close(out, expected)
        assert kind != "uniform" or torch.equal(out, same)


@pytest.mark.parametrize("norm", ["global", "layer"])
def test_more_layers_than_a_table_holds(cuda: Any, norm: str) -> None:
    masks = [torch.rand(1 + i % 5) for i in range(300)]
    for kind in ("uniform", "adversarial"):
        args = (masks, *perturbation(masks, kind, norm))
        for out, expected in zip(cuda.perturb_masks(*args), cpu.perturb_masks(*args), strict=True):
            assert_close(out, expected)
    grads = [torch.randn_like(m) for m in masks]
    args = (grads, masks, masks, 0, True, True)
    check_gradients(cuda.mask_gradients(*args), reference.mask_gradients(*args))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_effective_weights(cuda: Any, granularity: str, mask_dtype: torch.dtype, dtype: torch.dtype) -> None:
    weights, masks, block = layers(granularity, dtype, mask_dtype)
    for out_dtype in (None, torch.bfloat16):
        args = (weights, masks, "plain", 0, 0, [], "global", 0, 0, out_dtype, block or 0)
        for out, expected in zip(cuda.effective_weights(*args), reference.effective_weights(*args), strict=True):
            assert torch.equal(out, expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["uniform", "adversarial"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_perturbed_effective_weights(cuda: Any, granularity: str, kind: str, dtype: torch.dtype) -> None:
    weights, masks, block = layers(granularity, dtype)
    args = (weights, masks, *perturbation(masks, kind, "global"), None, block or 0)
    for out, same, expected in zip(
        cuda.effective_weights(*args), cpu.effective_weights(*args), reference.effective_weights(*args), strict=True
    ):
        assert_close(out, expected)
        assert kind != "uniform" or torch.equal(out, same)


def test_effective_weights_keep_channels_last(cuda: Any) -> None:
    weight = torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last)
    for mask in (torch.rand_like(weight), torch.rand(16, 8, 3, 3), torch.rand(16, 1, 1, 1)):
        for kind in ("plain", "uniform", "adversarial"):
            args = ([weight], [mask], *perturbation([mask], kind, "layer"), torch.bfloat16, 0)
            (out,), (expected,) = cuda.effective_weights(*args), reference.effective_weights(*args)
            assert out.stride() == weight.stride()
            assert_close(out, expected)


def check_gradients(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for mine, theirs in zip(actual[:2], expected[:2], strict=True):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == b.dtype
            assert_close(a, b)
    assert actual[2].dtype is torch.float64
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
def test_mask_gradients(cuda: Any, granularity: str, mask_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    weights, masks, block = layers(granularity, torch.float32, mask_dtype)
    grads = [torch.randn_like(w).to(grad_dtype) for w in weights]
    for need_weight, need_mask in ((True, True), (True, False), (False, True)):
        args = (grads, weights, masks, block or 0, need_weight, need_mask)
        check_gradients(cuda.mask_gradients(*args), reference.mask_gradients(*args))


@pytest.mark.parametrize(
    ("shape", "mask_shape", "block"),
    [
        ((3, 4100), (3, 1), 0),  # a filter of three pieces
        ((40, 4100), (1, 4100), 0),  # one value a column, three bands of rows
        ((40, 4100), (1, 1), 0),
        ((20, 300, 3, 3), (1, 300, 1, 1), 0),
        ((5, 9001), (5, 3), 3001),  # blocks of two pieces, the last one short
        ((7, 1003), (7, 251), 4),  # blocks that end with the row
        ((40, 4104), (1, 4104), 0),  # bands in 16-byte accesses
        ((20, 304, 3, 3), (1, 304, 1, 1), 0),
        ((70, 24, 3, 3), (70, 1, 1, 1), 0),  # tiles of eight filters
        ((500, 1, 3, 3), (500, 1, 1, 1), 0),  # depthwise
        ((1, 6, 3, 3), (1, 6, 1, 1), 0),
        ((4, 0, 3, 3), (4, 1, 1, 1), 0),
        ((0, 4, 3, 3), (1, 4, 1, 1), 0),
        ((100_000,), (100_000,), 0),
    ],
    ids=str,
)
def test_mask_gradients_of_large_layers(
    cuda: Any, shape: tuple[int, ...], mask_shape: tuple[int, ...], block: int
) -> None:
    mask = torch.rand(mask_shape)
    for offsets in ((0, 0), (1, 0), (0, 1)):  # 1: off any 16-byte boundary
        weight, grad = (torch.randn(math.prod(shape) + offset)[offset:].view(shape) for offset in offsets)
        args = ([grad], [weight], [mask], block, True, True)
        check_gradients(cuda.mask_gradients(*args), reference.mask_gradients(*args))
        args = ([weight], [mask], "plain", 0, 0, [], "global", 0, 0, None, block)
        assert torch.equal(cuda.effective_weights(*args)[0], reference.effective_weights(*args)[0])


def test_gradient_norm_does_not_depend_on_the_grid(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, masks, _ = layers("channel")
    grads = [torch.randn_like(w) for w in weights]
    norms = []
    for multiprocessors in (1, 2, 132):
        monkeypatch.setattr(cuda, "_run", lambda f, where, *args, m=multiprocessors: f(*args, m, 0))
        norms.append(cuda.mask_gradients(grads, weights, masks, 0, False, False)[2])
    assert norms[0] == norms[1] == norms[2]


def scores_of(case: str, dtype: torch.dtype) -> list[Tensor]:
    sizes = [(5,), (0,), (130, 70), (64, 3, 3, 3), (20_001,)]
    scores = [torch.rand(s) for s in sizes] if case != "signed" else [torch.randn(s) for s in sizes]
    if case == "ties":
        scores = [(s * 3).round() for s in scores]
    if case == "equal":
        scores = [torch.ones(s) for s in sizes]
    if case == "zeros":
        scores = [torch.where(torch.rand(s) > 0.5, 0.0, -0.0) for s in sizes]
    if case == "infinite":
        scores = [torch.where(torch.rand(s) > 0.5, torch.inf, -torch.inf) for s in sizes]
    return [s.to(dtype) for s in scores]


@pytest.mark.parametrize("case", ["uniform", "signed", "ties", "equal", "zeros", "infinite"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_binarize(cuda: Any, case: str, dtype: torch.dtype, scope: str) -> None:
    scores = scores_of(case, dtype)
    sizes = [s.numel() for s in scores]
    for sparsity in (0.0, 0.3, 0.7, 0.999):
        keep = [kept(sparsity, sum(sizes))] if scope == "global" else [kept(sparsity, n) for n in sizes]
        for mask, expected in zip(
            cuda.binarize(scores, keep, scope), reference.binarize(scores, keep, scope), strict=True
        ):
            assert torch.equal(mask, expected)


def test_binarize_mixed_dtypes_unaligned_and_more_layers_than_a_table_holds(cuda: Any) -> None:
    scores = [(4 * torch.rand(9)[i % 2 :]).round().to(FLOATS[i % 3]) for i in range(270)] + [torch.rand(9001)[1:]]
    wide = [s.float() for s in scores]
    for scope, first, keep in (("global", 0, [1100]), ("layer", 130, [s.numel() // 3 for s in scores[130:]])):
        masks, expected = cuda.binarize(scores[first:], keep, scope), cpu.binarize(wide[first:], keep, scope)
        assert all(torch.equal(m, e) for m, e in zip(masks, expected, strict=True))
    assert not any(m.any() for m in cuda.binarize(scores[:3], [0], "global"))


def test_not_a_number_ranks_below_every_number(cuda: Any) -> None:
    scores = torch.randn(600)
    scores[::3] = torch.tensor([0x7FC00000, -0x400000, 0x7FFFFFFF]).repeat(67)[:200].int().view(torch.float32)
    scores[1::3] = -torch.inf
    (mask,) = cuda.binarize([scores], [400], "global")
    assert torch.equal(mask, ~scores.isnan())
    (mask,) = cuda.binarize([scores], [401], "global")
    assert bool(mask[0])
    assert int(mask.sum()) == 401
    assert not cuda.binarize([scores], [0], "global")[0].any()


def test_results_do_not_follow_torchs_default_dtype(cuda: Any) -> None:
    x, masks = torch.rand(1, 4, 4), [torch.rand(20)]
    torch.set_default_dtype(torch.float64)
    try:
        assert cuda.semantic_batch(x, torch.tensor([SEMANTIC_NEUTRAL])).dtype is torch.float32
        (out,) = cuda.perturb_masks(masks, *perturbation(masks, "adversarial", "global"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype is torch.float32


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 7, 5), (2, 3, 600), (1, 40, 1)], ids=str)
def test_semantic_batch(cuda: Any, shape: tuple[int, ...]) -> None:
    rows = [list(SEMANTIC_NEUTRAL) for _ in range(9)]
    for i, (column, value) in enumerate(
        [(0, 33.0), (1, 0.2), (2, -0.3), (3, 1.7), (4, 1.3), (5, 0.4), (6, 0.2), (7, 2.2)]
    ):
        rows[i][column] = value
    rows.append([-200.0, 0.1, 0.1, 0.5, 32.0, 1.5, -0.2, 0.7])
    args = (torch.rand(shape), torch.tensor(rows))
    out = cuda.semantic_batch(*args)
    assert_close(out, cpu.semantic_batch(*args))
    if shape[2] < 100:  # float32 coordinates of wider images are coarser than the table's tolerance
        assert_close(out, reference.semantic_batch(*args))
    assert cuda.semantic_batch(args[0], args[1][:0]).shape == (0, *shape)


def test_float64_is_refused_by_name(built: Any) -> None:
    wide = [torch.rand(3, dtype=torch.float64)]
    plain = ("plain", 0, 0, [], "global", 0, 0)
    with pytest.raises(TypeError, match=rf"^masks\[0\] {NO_FLOAT64}$"):
        built.perturb_masks(wide, "uniform", 0.1, 0, [], "global", 0, 0)
    with pytest.raises(TypeError, match=rf"^weights\[0\] {NO_FLOAT64}$"):
        built.effective_weights(wide, wide, *plain, None, 0)
    with pytest.raises(TypeError, match="dtype must not be float64"):
        built.effective_weights([wide[0].float()], wide, *plain, torch.float64, 0)
    with pytest.raises(TypeError, match=rf"^weights\[0\] {NO_FLOAT64}$"):
        built.mask_gradients(wide, wide, wide, 0, True, True)


# What nvcc must have made of the kernels' vector accesses, by the part of the mangled name; behind branches it splits
# plain vector stores into scalars.
WIDE = {
    "count_votes": {"votes_kernel": ("ld.global.v4",)},
    "masks": {
        "step_kernel": ("ld.global.v4", "st.global.wb.v4.f32", "st.global.wb.v4.u32"),
        "gradient_kernel": ("ld.global.v4", "st.global.wb.v4.f32"),
        "squares_kernel": ("ld.global.v4",),
    },
    "binarize": {"histogram_kernel": ("ld.global.v4",), "mask_kernel": ("ld.global.v4", "st.global.wb.v2.u32")},
    "smoothing_noise": {"12noise_kernel": ("ld.global.nc.v4", "st.global.wb.v4")},
    "semantic_batch": {"column_blur_kernelILi4": ("ld.global.nc.v4", "st.global.wb.v4.f32")},
}


@pytest.mark.parametrize("source", WIDE)
def test_wide_accesses_survive_the_compiler(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(cuda_host.ROOT / "bench")
    command = importlib.import_module("nvcc").nvcc()
    if command is None:
        pytest.skip("no nvcc: `make .venv/.nvcc` brings it")
    target = tmp_path / "kernels.ptx"
    flags = ["-std=c++17", "-ptx", "--ftz=false", "-fmad=false", "-arch=sm_90"]
    subprocess.run([*command, *flags, cuda_host.ROOT / f"csrc/cuda/{source}.cu", "-o", target], check=True)
    bodies = {body.split("(")[0]: body for body in target.read_text().split(".entry ")[1:]}
    for kernel, accesses in WIDE[source].items():
        named = [body for name, body in bodies.items() if kernel in name]
        assert named
        assert all(access in body for body in named for access in accesses)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolution_and_linear(cuda: Any, granularity: str, dtype: torch.dtype) -> None:
    """The kernels' part of them; the products are torch's."""
    w, m = torch.randn(6, 4, 3, 3), torch.rand(mask_shape(granularity, (6, 4, 3, 3)))
    block = BLOCK if granularity == "block" else 0
    x, bias, options = torch.randn(2, 8, 9, 9).to(dtype), torch.randn(6), ([2, 1], [1, 1], [1, 1], 2, block)
    out = cuda.masked_conv2d(x, w, m, bias, *options)
    assert_close(out, reference.masked_conv2d(x, w, m, bias, *options))
    grads = cuda.masked_conv2d_backward(out, x, w, m, *options, [True] * 3)
    for ours, want in zip(grads, reference.masked_conv2d_backward(out, x, w, m, *options, [True] * 3), strict=True):
        assert ours.dtype == want.dtype
        assert_close(ours / 64, want / 64)


def test_linear(cuda: Any) -> None:
    x, w, m, bias = torch.randn(5, 32), torch.randn(7, 32), torch.rand(7, 2), torch.randn(7)
    out = cuda.masked_linear(x, w, m, bias, 16)
    assert_close(out, reference.masked_linear(x, w, m, bias, 16))
    grads = cuda.masked_linear_backward(out, x, w, m, 16, [True] * 3)
    for ours, want in zip(grads, reference.masked_linear_backward(out, x, w, m, 16, [True] * 3), strict=True):
        assert_close(ours, want)
