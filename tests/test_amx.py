"""The kernels for processors with AMX and AVX512-FP16, their instructions emulated (csrc/cpu/amx.h, sample_halves.h):
sums, bits, votes, the first check."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import amx_host
import csam_kernels as ck
from conftest import ISAS
from csam.quantization import quantize
from csam_kernels import _C, cpu, reference
from csam_kernels.ops.sample_network import Program, Value
from test_sample_conv2d import WINDOWS, both, sparse
from test_sample_network import BODIES, SIGMA, agrees, built, convolution, network, of_kind, padded, read_while_made

pytestmark = pytest.mark.skipif("avx512" not in ISAS, reason="the kernels around the tiles are AVX-512's")
ENGINES = pytest.mark.parametrize("engine", ["sparse", "dense"])
BOTH = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return amx_host.build(tmp_path_factory.mktemp("amx_host"))


@pytest.fixture(scope="session")
def loaded(emulated: Path) -> ModuleType:
    return amx_host.load(emulated)


@pytest.fixture
def amx(loaded: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if loaded.isa_supported("amx"):
        pytest.skip(loaded.isa_supported("amx"))
    loaded.set_isa("amx")
    monkeypatch.setattr(cpu, "_C", loaded)
    return


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_windows(amx: None, threads: int, window: dict[str, Any]) -> None:
    x = torch.randn(5, 11, 9, 35).bfloat16()
    packed = ck.compress(sparse(7, 5, window["kernel_size"], 0.4))
    other = torch.randn(ck.sample_conv2d(x, *packed, **window).shape).bfloat16()
    both(x, packed, torch.randn(7), other, relu=True, **window)


@pytest.mark.parametrize("filters", [1, 5, 16, 33, 70])
@pytest.mark.parametrize("channels", [1, 3, 16, 31, 70])
def test_filters_and_channels(amx: None, filters: int, channels: int) -> None:
    """Whole tiles and parts of them, several blocks among them."""
    for size, kernel in ((3, 3), (5, 1)):
        weight = sparse(filters, channels, kernel, 0.8)
        x = torch.randn(channels, size, size + 1, 21).bfloat16()
        both(x, ck.compress(weight), torch.randn(filters), kernel_size=kernel, padding=kernel // 2)


@pytest.mark.parametrize("samples", [0, 1, 31, 32, 33, 64])
def test_samples(amx: None, samples: int) -> None:
    x = torch.randn(6, 4, 3, samples).bfloat16()
    both(x, ck.compress(sparse(20, 6, 3, 0.5)), torch.randn(20), kernel_size=3, padding=1)


@ENGINES
def test_bits_do_not_depend_on_threads_or_samples(amx: None, engine: str) -> None:
    x, packed, dense = torch.randn(40, 4, 4, 50).bfloat16(), ck.compress(sparse(70, 40, 3, 0.3)), engine == "dense"
    call = lambda x: ck.sample_conv2d(x, *packed, torch.ones(70), kernel_size=3, padding=1, dense=dense)  # noqa: E731
    want, before = call(x), torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(call(x), want), count
        assert torch.equal(call(x[..., 3:20].contiguous()), want[..., 3:20]), count
    torch.set_num_threads(before)


@pytest.mark.parametrize("channels", [34, 40])
def test_what_is_not_finite_spreads_through_live_channels_alone(amx: None, channels: int) -> None:
    """They are padded to whole tiles: with zeros, which NaN and infinity beside them do not reach."""
    x = torch.randn(channels, 2, 2, 33).bfloat16()
    x[3, 0, 1, 5], x[-2, 1, 1, 7], x[-1] = float("nan"), float("inf"), float("nan")
    weight = torch.rand(18, channels, 1, 1) + 1
    weight[:, -1], weight[4] = 0, 0
    out = ck.sample_conv2d(x, *ck.compress(weight), kernel_size=1, dense=True)
    live = [f for f in range(18) if f != 4]
    assert torch.equal(out[live].isnan(), x[3].isnan().expand(17, 2, 2, 33))
    assert torch.equal(out[live].isinf(), x[-2].isinf().expand(17, 2, 2, 33))
    assert torch.equal(out[4], torch.zeros_like(out[4]))


def test_sums_are_in_the_processors_order(amx: None) -> None:
    """Of 32 channels the even and the odd are summed apart, each rounded as it goes; then both enter the sum.

    The odd ones are the even ones' negatives, backwards: what is left is the rounding alone.
    """
    x, weight = (torch.randn(32, 32) * 2.0 ** torch.randint(16, (32, 1))).bfloat16(), torch.randn(32, 16).bfloat16()
    x[1::2], weight[1::2] = x[::2].flip(0), -weight[::2].flip(0)
    step = convolution(Value(32, 1, 1), 16)
    step.weight, step.bias, step.engine = ck.compress(weight.float().t()[:, :, None, None]), None, "dense"
    found = ck.sample_network(Program(step.input, step.out, [step]), torch.bfloat16).logits(x.t()[:, :, None, None])
    sums = torch.zeros(2, 32, 16)
    for channel in range(32):
        product = x[channel, :, None].double() * weight[channel].double()
        sums[channel % 2] = (sums[channel % 2].double() + product).float()
    assert int((found != 0).sum()) > 200
    assert torch.equal(found, (sums[0] + sums[1]).bfloat16().float())


def test_the_bias_is_added_last(amx: None) -> None:
    """It is the negative of what two products come to, one after the other, and takes away all of that."""
    x, weight = (torch.randn(64) * 2.0 ** torch.randint(16, (64,))).bfloat16(), torch.randn(16, 64).bfloat16()
    parts = []
    for some in (range(32), range(32, 64)):
        sums = torch.zeros(2, 16)
        for channel in some:
            sums[channel % 2] = (sums[channel % 2].double() + x[channel].double() * weight[:, channel].double()).float()
        parts.append(sums[0] + sums[1])
    total = parts[0] + parts[1]
    assert bool((-total + parts[0] + parts[1] != 0).any())
    step = convolution(Value(64, 1, 1), 16)
    step.weight, step.bias, step.engine = ck.compress(weight.float()[:, :, None, None]), -total, "dense"
    program = Program(step.input, step.out, [step])
    found = ck.sample_network(program, torch.bfloat16).logits(x[None, :, None, None].expand(3, 64, 1, 1))
    assert torch.equal(found, torch.zeros(3, 16))


def once_rounded(x: torch.Tensor) -> torch.Tensor:
    """float64 of x in float16; torch's own conversion rounds to float32 before."""
    return torch.from_numpy(x.numpy().astype(np.float16).astype(np.float64))


def test_sparse_sums_are_float16_for_64_products(amx: None) -> None:
    """Each is rounded as it grows; then it enters a float32 one, which began with the bias. Weights of any size do."""
    x = (torch.randn(150, 40) * 2.0 ** torch.randint(-6, 6, (150, 1))).bfloat16()
    weight = torch.randn(16, 150) * (torch.rand(16, 150) < 0.9) * 2.0 ** torch.arange(-40, 40, 5)[:, None]
    bias = torch.randn(16) * weight.abs().amax(1)
    packed = ck.compress(weight[:, :, None, None])
    found = ck.sample_conv2d(x[:, None, None], *packed, bias, kernel_size=1).squeeze()
    power = 8 * torch.ldexp(torch.ones(16), torch.frexp(weight.abs().amax(1)).exponent)
    halves, wanted = once_rounded((weight.bfloat16() / power[:, None]).double()), torch.empty(16, 40)
    for f in range(16):
        taps, total = weight[f].nonzero().squeeze(), bias[f].expand(40)
        for some in taps.split(64):
            short = torch.zeros(40).double()
            for c in some:
                short = once_rounded(short + halves[f, c] * x[c].double())
            total = (total.double() + short * power[f].double()).float()
        wanted[f] = total
    assert len(taps) > 128
    assert torch.equal(found, wanted.bfloat16())


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_sparse_bits_depend_neither_on_tiles_nor_on_blocks(amx: None, density: float) -> None:
    """One pixel or many, of all channels in one block or some at a time."""
    x, packed = torch.randn(600, 9, 17, 33).bfloat16(), ck.compress(sparse(20, 600, 1, density))
    call = lambda x: ck.sample_conv2d(x.contiguous(), *packed, torch.ones(20), kernel_size=1)  # noqa: E731
    whole = call(x)
    for rows, columns in ((1, 1), (2, 3), (4, 4), (8, 16)):
        assert torch.equal(call(x[:, :rows, :columns]), whole[:, :rows, :columns])


def test_what_leaves_float16_is_infinite_or_nan(amx: None) -> None:
    x = torch.tensor([1.0, 65504, 65536, -1e30, float("inf"), float("nan")])[None, None, None].bfloat16()
    one = ck.compress(torch.ones(1, 1, 1, 1))
    inf, nan = float("inf"), float("nan")
    wanted = torch.tensor([1.0, inf, inf, -inf, inf, nan]).bfloat16()  # 65504 is no bfloat16: 65536 is the nearest
    assert torch.equal(ck.sample_conv2d(x, *one, kernel_size=1)[0, 0, 0].nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize("name", BODIES)
@ENGINES
@BOTH
def test_networks(amx: None, name: str, dtype: torch.dtype, engine: str) -> None:
    program, x = of_kind(built(name, scaled=True), engine), torch.rand(37, 3, 9, 7)
    if dtype is torch.int8:
        program = quantize(program, x)
    made = ck.sample_network(program, dtype)
    if dtype is torch.int8:
        assert torch.equal(made.logits(x), reference.sample_logits(program, x, dtype))
    else:
        agrees(made, program, x)


def wide(filters: int, channels: int, kernel: int, stride: int = 1) -> Program:
    def body(x: Value) -> list[Any]:
        first = padded(x, channels, low=0.0)
        window = {"padding": (kernel // 2, kernel // 2), "stride": (stride, stride)}
        return [first, convolution(first.out, filters, (kernel, kernel), other=None, low=0.0, **window)]

    return of_kind(network(body, image=(3, 4, 3)), "dense")


WIDE = [(1, 70, 3, 1), (33, 31, 1, 1), (33, 96, 3, 1), (33, 96, 3, 2), (70, 130, 3, 1), (16, 64, 5, 1), (16, 3, 7, 2)]


@pytest.mark.parametrize(("filters", "channels", "kernel", "stride"), WIDE)
def test_int8_bits_are_those_without_tiles(
    amx: None, loaded: ModuleType, filters: int, channels: int, kernel: int, stride: int
) -> None:
    x = torch.rand(70, 3, 4, 3)
    program = quantize(wide(filters, channels, kernel, stride), x)
    made = ck.sample_network(program, torch.int8)
    found, votes = made.logits(x), made.votes(x[0], SIGMA, 100, seed=3)
    loaded.set_isa("avx512")
    without = ck.sample_network(program, torch.int8)
    assert torch.equal(found, without.logits(x))
    assert torch.equal(votes, without.votes(x[0], SIGMA, 100, seed=3))
    assert made.fingerprint == without.fingerprint


@ENGINES
@BOTH
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=str)
def test_values_that_are_read_while_they_are_made(
    amx: None, dtype: torch.dtype, engine: str, stride: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_while_made(dtype, engine, stride, monkeypatch)


def test_bfloat16_votes(amx: None, loaded: ModuleType) -> None:
    """Those of the logits of the noise; another format than without tiles, since sums are in another order."""
    program, x = wide(40, 40, 3), torch.rand(3, 4, 3)
    made = ck.sample_network(program, torch.bfloat16)
    votes = made.votes(x, SIGMA, 75, seed=5)
    noise = ck.smoothing_noise(x, 75, SIGMA, seed=5, dtype=torch.bfloat16)
    assert torch.equal(votes, ck.count_votes(made.logits(noise)))
    assert int((votes > 0).sum()) > 1
    assert all(t > 0 for t in made.times(1))
    loaded.set_isa("avx512")
    assert ck.sample_network(program, torch.bfloat16).fingerprint != made.fingerprint


@pytest.mark.skipif("amx" not in ISAS, reason="needs a processor with AMX")
@ENGINES
@BOTH
def test_the_processor_computes_what_is_emulated(
    amx: None, loaded: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, engine: str
) -> None:
    program, x = of_kind(wide(40, 70, 3), engine), torch.rand(70, 3, 4, 3)
    if dtype is torch.int8:
        program = quantize(program, x)
    emulated = ck.sample_network(program, dtype)
    monkeypatch.setattr(cpu, "_C", _C)
    before = _C.isa()
    _C.set_isa("amx")
    try:
        real = ck.sample_network(program, dtype)
    finally:
        _C.set_isa(before)
    assert torch.equal(real.logits(x), emulated.logits(x))
    assert real.fingerprint == emulated.fingerprint


# Whether the processor is trusted


def auto(module: Path, **environment: str) -> tuple[str, str]:
    code = f"import torch, amx_host; print(amx_host.load({str(module)!r}).isa())"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_tiles_are_taken_unasked_where_they_compute_what_avx512_does(amx: None, emulated: Path) -> None:
    assert auto(emulated) == ("amx", "")
    isa, warning = auto(emulated, CSAM_AMX_FAULT="1")
    assert isa == "avx512"
    assert "AMX computes otherwise than AVX-512" in warning
    assert auto(emulated, CSAM_AMX_FAULT="1", CSAM_ISA="amx") == ("amx", "")


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs objdump and x86-64")
def test_the_instructions_are_in_the_extension() -> None:
    listing = subprocess.run(["objdump", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    for name in (
        "ldtilecfg",
        "tilezero",
        "tileloaddt1",
        "tdpbf16ps",
        "tdpbsud",
        "tilestored",
        "tilerelease",
        "vfmadd231ph",
    ):
        assert name in listing
