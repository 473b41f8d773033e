"""Triton philox_uniform and smoothing_noise in the interpreter: the bits of the CPU's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from conftest import assert_close
from csam_kernels import backend, cpu, reference

if not backend.INTERPRETED:
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter

import csam_kernels as ck
from csam_kernels.cells import cells
from csam_kernels.laws import LAWS
from csam_kernels.triton import tuning
from csam_kernels.triton.kernels import philox, rounding
from csam_kernels.triton.launch import record
from csam_kernels.triton.launchers.philox_uniform import philox_uniform
from csam_kernels.triton.launchers.smoothing_noise import grid_noise, smoothing_noise

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NCHW, NHWC = torch.contiguous_format, torch.channels_last
SEED, FIRST, STREAM = 2**64 - 5, 2**32 - 2, 2**32 - 1  # samples whose high word changes on the way
DEVIATES = Path(__file__).resolve().parents[1] / "csrc/common/deviates.h"


def fused(_: Any, x: Any, y: Any, z: Any) -> Any:
    """x*y + z with one rounding, as on a GPU: the product is exact in float64, the sum is rounded to odd there."""
    a, b = x.data.astype(np.float64) * y.data.astype(np.float64), z.data.astype(np.float64)
    total = a + b
    part = total - a
    lost = (a - (total - part)) + (b - part)
    bits = np.atleast_1d(total).view(np.int64)
    away = np.where((lost > 0) == (total > 0), 1, -1)
    odd = np.where((lost != 0) & (bits & 1 == 0), bits + away, bits).view(np.float64)
    return interpreter.TensorHandle(odd.astype(np.float32), z.dtype.scalar)


@pytest.fixture
def fma(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's own tl.fma rounds twice."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, and programs that make three samples: many programs in a small test."""
    row = {"QUADS": 16, "num_warps": 4, "programs": 1, "samples": 3}
    for table in ("SMOOTHING_NOISE", "GRID_NOISE"):
        monkeypatch.setattr(tuning, table, dict.fromkeys(tuning.CLASSES.values(), row))


SHAPES = {
    "3x16x16": (3, 16, 16),
    "1x8x8": (1, 8, 8),
    "3x5x7": (3, 5, 7),
    "2x1x1": (2, 1, 1),
    "5x3x3": (5, 3, 3),
    "37x4x4": (37, 4, 4),
    "0x3x3": (0, 3, 3),
}
# Every shape, and of one every dtype of every law.
CASES = [pytest.param(shape, F32, "gaussian", id=f"{name}-f32-gaussian") for name, shape in SHAPES.items()]
CASES += [
    pytest.param(SHAPES["3x5x7"], dtype, law, id=f"3x5x7-{name}-{law}")
    for name, dtype in {"f32": F32, "bf16": BF16, "f16": F16}.items()
    for law in LAWS
    if (name, law) != ("f32", "gaussian")
]


@pytest.mark.parametrize(("shape", "dtype", "law"), CASES)
@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_noise_has_the_bits_of_the_cpu(
    fma: None, small: None, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, law: str
) -> None:
    x = torch.rand(shape)
    arguments = (x, 5, 0.3, SEED, FIRST, STREAM, dtype, memory_format, law)
    out = smoothing_noise(*arguments)
    assert out.is_contiguous(memory_format=memory_format)
    assert torch.equal(out, cpu.smoothing_noise(*arguments))


@pytest.mark.parametrize(("shape", "dtype", "law"), CASES)
@pytest.mark.parametrize("memory_format", [NCHW, NHWC], ids=["nchw", "nhwc"])
def test_noise_on_a_grid_has_the_bits_of_the_cpu(
    small: None, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, law: str
) -> None:
    numbers = torch.randint(0, 256, shape).float()
    arguments = (numbers, 5, 0.3, 255, SEED, FIRST, STREAM, dtype, memory_format, law)
    out = grid_noise(*arguments)
    assert out.is_contiguous(memory_format=memory_format)
    assert torch.equal(out, cpu.grid_noise(*arguments))


def test_ties_on_a_grid_are_settled_by_the_next_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of 2^16 columns: a word in as many leaves a tie, so these samples were looked for."""
    numbers, n, first, wide = torch.randint(0, 256, (3, 32, 32)).float(), 9, 59, 10.0
    law = cells(wide, 255, "gaussian")
    words = reference.philox_words(numbers.numel(), torch.arange(first, first + n), seed=9, stream=4)
    entry = law.columns.long()[words >> (32 - law.bits)] % 2**32
    assert ((words << law.bits) % 2**32 == entry & ~(2**law.bits - 1)).sum() == 3
    monkeypatch.setenv("CSAM_BACKEND", "triton")
    arguments = (numbers, n, wide, 255, 9, first, 4, F32, NCHW)
    found = ck.grid_noise(numbers / 255, n, wide, seed=9, stream=4, first_sample=first)
    assert torch.equal(found, cpu.grid_noise(*arguments))


def test_noise_of_the_table_s_tiles(fma: None) -> None:
    x = torch.rand(3, 33, 31)
    for memory_format in (NCHW, NHWC):
        arguments = (x, 2, 1.0, 1, 0, 0, F32, memory_format)
        assert torch.equal(smoothing_noise(*arguments), cpu.smoothing_noise(*arguments))


@pytest.mark.parametrize("law", LAWS)
def test_noise_without_fused_multiply_adds_is_within_tolerance(law: str) -> None:
    x = torch.rand(3, 16, 16)
    arguments = (x, 3, 0.5, SEED, FIRST, STREAM, F32, NCHW, law)
    assert_close(smoothing_noise(*arguments), reference.smoothing_noise(*arguments))


def test_noise_of_every_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half images, strided images, no samples, NaN; through the public function."""
    monkeypatch.setenv("CSAM_BACKEND", "triton")
    x = torch.rand(8, 8, 3).permute(2, 0, 1)
    assert ck.smoothing_noise(x, 0, 0.1, seed=0).shape == (0, 3, 8, 8)
    same = ck.smoothing_noise(x.contiguous(), 2, 0.1, seed=0)
    assert torch.equal(ck.smoothing_noise(x, 2, 0.1, seed=0), same)
    for dtype in (BF16, F16):
        out = ck.smoothing_noise(x.to(dtype), 2, 0.1, seed=0)
        assert out.dtype == dtype
        assert_close(out, cpu.smoothing_noise(x.to(dtype), 2, 0.1, 0, 0, 0, dtype, NCHW))
    x = x.contiguous()
    x[1, 2, 3] = float("nan")
    for dtype in (F32, BF16, F16):
        nan = ck.smoothing_noise(x, 2, 0.1, seed=0, dtype=dtype).isnan()
        assert torch.equal(nan, x.isnan().expand(2, 3, 8, 8))


def test_split_of_the_samples_changes_nothing(small: None) -> None:
    x = torch.rand(3, 8, 8)
    whole = smoothing_noise(x, 8, 0.25, 11, 100, 0, F32, NCHW)
    parts = [smoothing_noise(x, 2, 0.25, 11, 100 + 2 * i, 0, F32, NCHW) for i in range(4)]
    assert torch.equal(torch.cat(parts), whole)


@triton.jit
def narrowed(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane, lane < n, 0.0)
    tl.store(out_ptr + lane, rounding.narrow(x, out_ptr.dtype.element_ty), lane < n)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
def test_rounding_is_to_nearest_even(dtype: torch.dtype) -> None:
    ties = 1 + torch.arange(64) * 2.0**-11  # halfway between neighbours in float16, and beyond in bfloat16
    x = torch.cat((ties, -ties, torch.randn(100), torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])))
    out = torch.empty(len(x), dtype=dtype)
    narrowed[(1,)](x, out, len(x), 256)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("n", "k"), [(37, 7), (5, 4), (300, 1), (2, 1500), (0, 3), (3, 0)])
def test_uniform_has_the_bits_of_the_cpu(n: int, k: int) -> None:
    for seed, first, stream in ((3, 2**33 - 20, 4), (SEED, FIRST, STREAM), (1, 0, 0)):
        arguments = (n, k, seed, first, stream)
        assert torch.equal(philox_uniform(*arguments), cpu.philox_uniform(*arguments))


def test_constants_are_those_of_the_header() -> None:
    header = DEVIATES.read_text()

    def of(name: str) -> list[float]:
        values = re.search(rf"{name}[^=]*= ([^;]*);", header)
        assert values
        return [float.fromhex(v) for v in re.findall(r"-?0x[\d.a-f]+p[+-]\d+", values[1])]

    for name, scale in (("Sin", 1), ("Cos", 1), ("Log", -2)):
        constants = of(f"k{name}")
        assert [getattr(philox, f"{name.upper()}{i}").value for i in range(len(constants))] == [
            scale * c for c in constants
        ]
    assert [philox.LN2.value] == [-2 * c for c in of("kLn2")]
    codes = {name.upper(): int(code) for name, code in re.findall(r"k(\w+) = (\d),", header)}
    for law, (code, _) in LAWS.items():
        assert getattr(philox, law.upper()).value == codes[law.upper()] == code


@pytest.mark.parametrize("name", tuning.CLASSES.values())
def test_one_launch_writes_each_value_once(name: str) -> None:
    x = torch.empty(3, 224, 224, device="meta")
    with record() as launches, tuning.forced(name):
        out = smoothing_noise(x, 1000, 0.5, 0, 0, 0, BF16, NHWC)
    assert len(launches) == 1
    assert launches[0].bytes_read == x.nbytes
    assert launches[0].bytes_written == out.nbytes


def test_an_image_beyond_32_bit_indices_is_refused() -> None:
    wide, dot = torch.empty(1, 1, 2**31 - 1, device="meta"), torch.empty(1, 1, 1, device="meta")
    for x, n in ((wide, 1), (dot, 2**31)):  # the last tile would reach past 2^31
        with pytest.raises(ValueError, match=r"x and n must be at most 2\^31 - 2\^22"):
            smoothing_noise(x, n, 0.5, 0, 0, 0, F32, NCHW)
