"""sample_network against the reference, its votes against the noise and the counting that they stand for."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import csam_kernels as ck
from conftest import ISAS, TOLERANCE, assert_close
from csam.quantization import _values as values
from csam.quantization import quantize
from csam_kernels import _C, reference
from csam_kernels.layout import conv2d_size
from csam_kernels.ops import sample_network
from csam_kernels.ops.sample_network import (
    ENGINES,
    Program,
    SampleNetwork,
    Step,
    Value,
    step_costs,
    transformable,
    winograd_tile,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
KINDS = pytest.mark.parametrize("engine", ENGINES)
SIGMA = 0.5


def convolution(
    x: Value,
    filters: int,
    kernel: tuple[int, int] = (1, 1),
    density: float = 1.0,
    out: Value | None = None,
    **options: Any,
) -> Step:
    """Of random weights, whose outputs are about as large as its inputs."""
    weight = torch.randn(filters, x.channels, *kernel) / math.sqrt(density * x.channels * kernel[0] * kernel[1])
    weight[torch.rand(weight.shape) >= density] = 0
    step = Step(x, x, weight=ck.compress(weight), kernel=kernel, bias=torch.randn(filters), **options)
    size = conv2d_size((x.height, x.width), kernel, step.stride, step.padding, step.dilation)
    step.out = out or Value(filters, *size)
    return step


def maximum(x: Value, kernel: tuple[int, int], size: tuple[int, int], **options: Any) -> Step:
    return Step(x, Value(x.channels, *size), kernel=kernel, **options)


def flattened(x: Value) -> Value:
    return Value(x.size, 1, 1, (x, 0))


def network(
    body: Callable[[Value], list[Step]], scaled: bool = False, image: tuple[int, int, int] = (3, 9, 7)
) -> Program:
    """A program of five classes, which look at all that the body's last step gives."""
    x = Value(*image)
    steps = body(x)
    head = convolution(flattened(steps[-1].out.root), 5)
    mean, std = (torch.rand(image[0]), 0.5 + torch.rand(image[0])) if scaled else (None, None)
    return Program(x, head.out, [*steps, head], mean, std)


def of_kind(program: Program, engine: str) -> Program:
    """Dense where Winograd's is not offered."""
    for step in program.steps:
        step.engine = engine if engine != "winograd" or transformable(step) else "dense"
    return program


def padded(x: Value, filters: int, **options: Any) -> Step:
    return convolution(x, filters, (3, 3), 0.4, padding=(1, 1), **options)


def residual(x: Value) -> list[Step]:
    first = padded(x, 6, low=0.0)
    second = padded(first.out, 6)
    return [first, second, padded(second.out, 6, other=first.out, low=0.0, high=1.5)]


def residual_with_itself(x: Value) -> list[Step]:
    first = padded(x, 6)
    return [first, convolution(first.out, 6, other=first.out)]


def concatenation(x: Value) -> list[Step]:
    whole = Value(11, 9, 7)
    parts = [padded(x, 4, out=Value(4, 9, 7, (whole, 0))), convolution(x, 7, out=Value(7, 9, 7, (whole, 4)))]
    return [*parts, padded(whole, 6), padded(parts[1].out, 6)]


def nested_concatenation(x: Value) -> list[Step]:
    whole = Value(9, 9, 7)
    inner = Value(5, 9, 7, (whole, 4))
    last = padded(x, 2, out=Value(2, 9, 7, (inner, 3)))
    first = padded(x, 3, out=Value(3, 9, 7, (inner, 0)), other=None)
    outer = convolution(inner, 4)
    return [last, first, outer, convolution(outer.out, 4, out=Value(4, 9, 7, (whole, 0))), padded(whole, 3)]


def beside_what_is_read(x: Value) -> list[Step]:
    """Each step adds to the channels that the next reads, as in a DenseNet."""
    whole = Value(9, 9, 7)
    seen = [Value(n, 9, 7, (whole, 0)) for n in (3, 5, 7)]
    steps = [padded(x, 3, out=seen[0])]
    return steps + [padded(v, 2, out=Value(2, 9, 7, (whole, v.channels)), low=0.0) for v in seen]


def residual_of_parts(x: Value) -> list[Step]:
    whole, target = Value(8, 9, 7), Value(8, 9, 7)
    left, right = Value(4, 9, 7, (whole, 0)), Value(4, 9, 7, (whole, 4))
    sums = [padded(right, 4, out=Value(4, 9, 7, (target, 4)), other=left)]
    sums += [padded(left, 4, out=Value(4, 9, 7, (target, 0)), other=right)]
    return [padded(x, 4, out=left), padded(x, 4, out=right), *sums]


BODIES: dict[str, Callable[[Value], list[Step]]] = {
    "padded": lambda x: [padded(x, 7)],
    "strided": lambda x: [convolution(x, 6, (3, 3), 0.5, stride=(2, 3), padding=(1, 0))],
    "dilated": lambda x: [convolution(x, 6, (3, 2), stride=(1, 2), padding=(2, 3), dilation=(2, 3))],
    "1x1": lambda x: [convolution(x, 9, low=-0.5, high=0.25)],
    "all-of-the-image": lambda x: [convolution(x, 6, (9, 7))],
    "no-weight-at-all": lambda x: [convolution(x, 5, density=1e-9)],
    "residual": residual,
    "residual-with-itself": residual_with_itself,
    "residual-of-parts": residual_of_parts,
    "concatenation": concatenation,
    "nested-concatenation": nested_concatenation,
    "beside-what-is-read": beside_what_is_read,
    "maximum": lambda x: [padded(x, 5), maximum(Value(5, 9, 7), (2, 2), (4, 3), stride=(2, 2))],
    "maximum-padded": lambda x: [maximum(x, (3, 3), (5, 4), stride=(2, 2), padding=(1, 1))],
    "maximum-ceil": lambda x: [maximum(x, (2, 2), (5, 4), stride=(2, 2))],
    "maximum-high": lambda x: [maximum(x, (5, 3), (5, 7), padding=(0, 1))],
    "maximum-higher": lambda x: [maximum(x, (7, 2), (5, 6), stride=(2, 1), padding=(3, 0))],
    "maximum-dilated": lambda x: [maximum(x, (3, 2), (5, 2), dilation=(2, 5))],
}


def built(name: str, engine: str = "sparse", scaled: bool = False) -> Program:
    program = network(BODIES[name], scaled)
    for before, after in itertools.pairwise(program.steps):  # "maximum" names its input's shape alone
        if after.weight is None:
            after.input = before.out
    return of_kind(program, engine)


def fixed(step: Step, dtype: torch.dtype) -> bool:
    """Whether a step multiplies in fixed point."""
    return step.engine == "winograd" and dtype is torch.bfloat16 and winograd_tile(step, dtype) == 4


def agrees(made: SampleNetwork, program: Program, x: Tensor) -> None:
    """The logits of images are the reference's; of sparse layers that sum in float16 as near to float32's as those, of
    layers in fixed point as near as those of direct sums."""
    found = made.logits(x)
    in_fixed_point = any(fixed(step, made.dtype) for step in program.steps)
    direct = of_kind(copy.deepcopy(program), "dense") if in_fixed_point else program
    wanted = reference.sample_logits(direct, x, made.dtype)
    halves = "float16 sparse" in made._native.format and any(step.engine == "sparse" for step in program.steps)
    if halves or in_fixed_point:
        exact = reference.sample_logits(program, x, torch.float32)
        assert (found - exact).norm() <= 1.15 * (wanted - exact).norm()
    else:
        assert_close(found, wanted, made.dtype)


@DTYPES
@KINDS
@pytest.mark.parametrize("name", BODIES)
def test_logits_are_the_references(isa: str, name: str, engine: str, dtype: torch.dtype) -> None:
    program, x = built(name, engine, scaled=True), torch.rand(37, 3, 9, 7)
    made = ck.sample_network(program, dtype)
    if (isa, engine, dtype) == ("amx", "winograd", torch.bfloat16):  # tiles multiply what would be transformed
        program = of_kind(program, "dense")
    agrees(made, program, x)


@DTYPES
def test_logits_of_any_number_of_samples(isa: str, dtype: torch.dtype) -> None:
    program, x = built("residual"), torch.rand(70, 3, 9, 7)
    made = ck.sample_network(program, dtype)
    agrees(made, program, x)
    wanted = made.logits(x)
    for n in (0, 1, made.lanes - 1, made.lanes, made.lanes + 1):
        assert torch.equal(made.logits(x[:n]), wanted[:n])
    assert torch.equal(made.logits(x.double().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), wanted)


def test_float32_bits_depend_neither_on_the_kind_nor_on_the_instruction_set() -> None:
    program, x = built("concatenation"), torch.rand(20, 3, 9, 7)
    results = []
    for isa in ISAS:
        _C.set_isa(isa)
        results += [ck.sample_network(of_kind(program, e), torch.float32).logits(x) for e in ("sparse", "dense")]
    _C.set_isa("auto")
    assert all(torch.equal(r, results[0]) for r in results)


def test_float32_bits_of_winograd_do_not_depend_on_the_instruction_set() -> None:
    program, x = built("residual", "winograd"), torch.rand(20, 3, 9, 7)
    results = []
    for isa in ISAS:
        _C.set_isa(isa)
        results.append(ck.sample_network(program, torch.float32).logits(x))
    _C.set_isa("auto")
    assert all(torch.equal(r, results[0]) for r in results)
    assert not torch.equal(results[0], ck.sample_network(of_kind(program, "dense"), torch.float32).logits(x))


@DTYPES
@pytest.mark.parametrize("padding", [(0, 0), (1, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("size", [(3, 3), (4, 11), (8, 8), (33, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_winograd_covers_every_output(
    isa: str, stride: int, size: tuple[int, int], padding: tuple[int, int], dtype: torch.dtype
) -> None:
    """One block or many, whole or cut off; channels and filters that fill no register tile, dead ones among them."""
    if size[1] + 2 * padding[1] < 3:
        return
    for channels, filters in ((1, 1), (5, 9), (40, 24)):
        weight = torch.randn(filters, channels, 3, 3) / (3 * channels**0.5)
        weight[filters // 2 + 1 :: 3] = 0
        weight[:, channels // 2 + 1 :: 4] = 0
        high, wide = (stride * s for s in size)
        x, images = Value(channels, high, wide), torch.rand(35, channels, high, wide)
        out = Value(filters, *conv2d_size((high, wide), (3, 3), (stride, stride), padding, (1, 1)))
        step = Step(x, out, weight=ck.compress(weight), bias=torch.randn(filters), kernel=(3, 3), padding=padding)
        step.stride = (stride, stride)
        head = convolution(flattened(out), 5)
        program = of_kind(Program(x, head.out, [step, head]), "winograd")
        assert step.engine == "winograd"
        found = ck.sample_network(program, dtype).logits(images)
        assert_close(found, reference.sample_logits(program, images, dtype), dtype)


def roundings(images: Tensor, stride: int, dtype: torch.dtype) -> tuple[float, float]:
    """Root mean squares of what a layer of random weights loses by direct sums, and by Winograd's transform."""
    _, channels, size, _ = images.shape
    weight = torch.randn(16, channels, 3, 3) / 48
    x, out = Value(channels, size, size), Value(16, size // stride, size // stride)
    step = Step(x, out, weight=ck.compress(weight), kernel=(3, 3), padding=(1, 1), stride=(stride, stride))
    program = Program(x, flattened(step.out), [step])
    exact = F.conv2d(images.double(), weight.double(), padding=1, stride=stride).flatten(1)
    found = [ck.sample_network(of_kind(program, e), dtype).logits(images) for e in ("dense", "winograd")]
    direct, transformed = (float((logits - exact).square().mean().sqrt()) for logits in found)
    return direct, transformed


def test_float32_loses_little_more_by_winograd_than_by_direct_sums() -> None:
    """1.9 times the rounding by F(4x4, 3x3), 1.3 with a stride; .7 by F(2x2, 3x3), which the smallest image takes."""
    for size, stride, factor in ((8, 1, 2.5), (16, 2, 1.5), (4, 1, 1.0)):
        direct, transformed = roundings(torch.randn(32, 256, size, size), stride, torch.float32)
        assert transformed < factor * direct


@pytest.mark.parametrize(("size", "stride", "factor"), [(8, 1, 1.0), (16, 2, 1.0), (4, 1, 1.1)])
def test_bfloat16_loses_no_more_by_winograd_than_by_direct_sums(
    isa: str, size: int, stride: int, factor: float
) -> None:
    """Integers of 16 bits are finer than bfloat16 weights; results are rounded to bfloat16 by both. Most of 4x4 outputs
    have fewer taps, whose direct sums round less."""
    images = torch.randn(32, 256, size, size).relu().bfloat16().float()
    direct, transformed = roundings(images, stride, torch.bfloat16)
    assert transformed <= factor * direct


# B^T and G of 4x4 outputs with a stride of 2: F(4, 2) at +-1/2, +-1 and infinity of every other input.
STRIDED = (
    (
        (-0.5, 0, -1, 0, 0.5, 0, 1, 0, 0),
        (0.5, 0, -1, 0, -0.5, 0, 1, 0, 0),
        (-0.25, 0, -0.25, 0, 1, 0, 1, 0, 0),
        (0.25, 0, -0.25, 0, -1, 0, 1, 0, 0),
        (0.25, 0, 0, 0, -1.25, 0, 0, 0, 1),
        *(tuple(float(i == j) for i in range(9)) for j in (1, 3, 5, 7)),
    ),
    (
        (-4 / 3, 0, -2 / 3),
        (4 / 3, 0, -2 / 3),
        (2 / 3, 0, 2 / 3),
        (-2 / 3, 0, 2 / 3),
        (0, 0, 1),
        *(4 * [(0.0, 1.0, 0.0)]),
    ),
)


@pytest.mark.parametrize("channels", [2, 70, 300])
@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_winograd_of_the_largest_sums(isa: str, stride: int, channels: int) -> None:
    """Every sample gives its filter the largest sum that inputs within [-1, 1] can at its place."""
    kind = STRIDED if stride == 2 else reference._F4
    of_input, of_weight = (torch.tensor(t, dtype=torch.float64) for t in kind[:2])
    side = len(of_input)
    weight = torch.randn(side**2, channels, 3, 3)
    places = (of_weight @ weight.double() @ of_weight.t()).flatten(2)  # [filters, channels, places]
    signs = torch.stack([torch.outer(a, b).sign() for a in of_input for b in of_input])  # [places, side, side]
    worst = torch.stack([places[p, :, p].sign().view(-1, 1, 1) * signs[p] for p in range(side**2)]).float()
    x = Value(channels, side, side)
    step = Step(x, Value(side**2, 4, 4), weight=ck.compress(weight), kernel=(3, 3), stride=(stride, stride))
    program = of_kind(Program(x, flattened(step.out), [step]), "winograd")
    exact = F.conv2d(worst, weight, stride=stride).flatten(1)
    found = ck.sample_network(program, torch.bfloat16).logits(worst)
    assert float((found - exact).norm() / exact.norm()) < 4e-3


@pytest.mark.parametrize("channels", [24, 64])
@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_winograd_of_weights_of_one_sign(isa: str, stride: int, channels: int) -> None:
    """Of an even image: the centre, a Gaussian and a mean, whose sums are largest where windows are least changed."""
    weight = torch.zeros(3, channels, 3, 3)
    weight[0, :, 1, 1] = 0.1
    weight[1] = 0.1 * torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
    weight[2] = 0.1 / 9
    images = torch.tensor([1.0, -1, 0.3]).view(3, 1, 1, 1).bfloat16().float().expand(3, channels, 9, 9)
    out = Value(3, *conv2d_size((9, 9), (3, 3), (stride, stride), (0, 0), (1, 1)))
    step = Step(Value(channels, 9, 9), out, weight=ck.compress(weight), kernel=(3, 3), stride=(stride, stride))
    program = of_kind(Program(step.input, flattened(out), [step]), "winograd")
    exact = F.conv2d(images, weight, stride=stride).flatten(1)
    torch.testing.assert_close(ck.sample_network(program, torch.bfloat16).logits(images), exact, rtol=8e-3, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_winograd_hides_no_weight_that_is_no_number(isa: str, stride: int, value: float) -> None:
    weight = torch.randn(3, 5, 3, 3)
    weight[1, 2, 1, 1] = value
    out = Value(3, *conv2d_size((9, 9), (3, 3), (stride, stride), (0, 0), (1, 1)))
    step = Step(Value(5, 9, 9), out, weight=ck.compress(weight), kernel=(3, 3), stride=(stride, stride))
    program = of_kind(Program(step.input, flattened(out), [step]), "winograd")
    found = ck.sample_network(program, torch.bfloat16).logits(torch.rand(4, 5, 9, 9)).view(4, 3, -1)
    assert not found[:, 1].isfinite().any()
    assert found[:, ::2].isfinite().all()


def test_bfloat16_winograd_of_samples_of_any_size(isa: str) -> None:
    """Each in its own unit: zeros, the smallest and the largest numbers, infinity and NaN leave the others alone."""
    x, images = Value(5, 8, 8), torch.rand(70, 5, 8, 8).bfloat16().float()
    weight = torch.randn(7, 5, 3, 3)
    step = Step(x, Value(7, 8, 8), weight=ck.compress(weight), bias=torch.randn(7), kernel=(3, 3), padding=(1, 1))
    program = of_kind(Program(x, flattened(step.out), [step]), "winograd")
    made = ck.sample_network(program, torch.bfloat16)
    plain = made.logits(images)
    sizes = {3: 0.0, 17: 1e-38, 18: 1e-20, 40: 1e30, 41: math.inf, 42: math.nan}
    for sample, size in sizes.items():
        images[sample] *= size
    images[41] = torch.zeros(5, 8, 8)
    images[41, 2, 3, 3] = math.inf
    found = made.logits(images)
    others = [i for i in range(70) if i not in sizes]
    assert torch.equal(found[others], plain[others])
    bias = step.bias.view(-1, 1).expand(7, 64).flatten()
    for sample in (3, 17, 18):
        torch.testing.assert_close(found[sample], bias.bfloat16().float())
    exact = F.conv2d(images[40:41].double(), weight.double(), padding=1).flatten()
    assert float((found[40] - exact).norm() / exact.norm()) < 4e-3
    assert not found[41].view(7, 8, 8)[:, 3, 3].isfinite().any()
    assert found[42].isnan().all()


@DTYPES
@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_without_weights(isa: str, engine: str, dtype: torch.dtype) -> None:
    """Nothing is left of a layer when pruning collapses it: its results are the bias."""
    x, images = Value(6, 9, 7), torch.rand(35, 6, 9, 7)
    empty = ck.compress(torch.zeros(8, 6, 3, 3))
    step = Step(x, Value(8, 9, 7), weight=empty, bias=torch.randn(8), kernel=(3, 3), padding=(1, 1))
    head = convolution(flattened(step.out), 5)
    program = of_kind(Program(x, head.out, [step, head]), engine)
    assert step.engine == engine
    found = ck.sample_network(program, dtype).logits(images)
    assert_close(found, reference.sample_logits(program, images, dtype), dtype)
    assert len(step_costs(program, dtype)) == 2


@pytest.mark.parametrize("name", BODIES)
def test_what_int8_is_calibrated_on_has_the_bits_of_float32(isa: str, name: str) -> None:
    program, x = built(name, scaled=True), torch.rand(37, 3, 9, 7)
    found, wanted = dict(values(program, x)), reference.sample_values(program, x, torch.float32)
    assert found.keys() == {value for value in wanted if value.part is None}
    for value in found:
        torch.testing.assert_close(found[value], wanted[value].flatten(0, 2))
    assert torch.equal(found[program.logits].t(), ck.sample_network(program, torch.float32).logits(x))


@pytest.mark.parametrize("name", BODIES)
def test_int8_bits_depend_neither_on_the_engine_nor_on_the_instruction_set(name: str) -> None:
    program, x = built(name, scaled=True), torch.rand(70, 3, 9, 7)
    program = quantize(program, x)
    wanted = reference.sample_logits(program, x, torch.int8)
    for isa in ISAS:
        _C.set_isa(isa)
        for engine in ENGINES:
            found = ck.sample_network(of_kind(program, engine), torch.int8).logits(x)
            assert torch.equal(found, wanted), (isa, engine)
    _C.set_isa("auto")


@pytest.mark.parametrize("channels", [1, 3, 40, 115, 116, 500])
def test_winograd_of_the_largest_integers(isa: str, channels: int) -> None:
    """Inputs of 255, weights of 127, of one sign at all or at some taps; transformed as long as sums are below 2^25."""
    weight = torch.ones(4, channels, 3, 3)
    weight[1], weight[2, :, 1], weight[3, :, :, ::2] = -1, -1, -1
    x, images = Value(channels, 5, 4), torch.ones(35, channels, 5, 4)
    images[:, :, 2:4, 1] = torch.rand(35, 1, 2)
    step = Step(x, Value(4, 5, 4), weight=ck.compress(weight), kernel=(3, 3), padding=(1, 1))
    head = convolution(flattened(step.out), 5)
    program = quantize(Program(x, head.out, [step, head]), images)
    assert float(step.weight[0].abs().max()) == 1
    assert float(program.steps[0].weight[0].abs().max()) == 127
    found = ck.sample_network(of_kind(program, "winograd"), torch.int8).logits(images)
    assert program.steps[0].engine == "winograd"
    transformed = step_costs(program, torch.int8)[0]
    assert torch.equal(found, ck.sample_network(of_kind(program, "dense"), torch.int8).logits(images))
    if isa != "amx":
        assert (transformed != step_costs(program, torch.int8)[0]) == (channels * 9 * 127 * 255 < 2**25)
    assert torch.equal(found, reference.sample_logits(program, images, torch.int8))


@DTYPES
def test_a_maximum_of_padding_alone_is_minus_infinity(isa: str, dtype: torch.dtype) -> None:
    """The two rows of the only window lie above the image and below it."""
    x = Value(2, 1, 3)
    step = Step(x, Value(2, 1, 3), kernel=(2, 1), padding=(1, 0), dilation=(2, 1))
    each = Step(flattened(step.out), Value(6, 1, 1), weight=ck.compress(torch.eye(6)[:, :, None, None]))
    found = ck.sample_network(Program(x, each.out, [step, each]), dtype).logits(torch.rand(5, 2, 1, 3))
    assert bool((found == -math.inf).all())


@DTYPES
@KINDS
def test_what_is_not_finite_spreads_as_in_the_reference(isa: str, engine: str, dtype: torch.dtype) -> None:
    """Through full weights and maxima; every value of the last step is a logit."""
    x = torch.rand(20, 3, 9, 7)
    x[3, 1, 4, 4], x[5, 0, 0, 0], x[6, 2, 8, 6] = math.nan, math.inf, -math.inf
    first = convolution(Value(3, 9, 7), 4, (2, 2))
    steps = [first, maximum(first.out, (3, 3), (4, 3), stride=(2, 2), padding=(1, 1))]
    every = flattened(steps[-1].out)
    steps.append(Step(every, Value(48, 1, 1), weight=ck.compress(torch.eye(48)[:, :, None, None])))
    program = of_kind(Program(first.input, steps[-1].out, steps), engine)
    found = ck.sample_network(program, dtype).logits(x)
    images = x.to(dtype).float().permute(1, 2, 3, 0)
    taken = reference.sample_conv2d(images, *first.weight, first.bias, None, [2, 2], [1, 1], [0, 0], [1, 1], False)
    wanted = F.max_pool2d(taken.permute(3, 0, 1, 2), 3, 2, 1).flatten(1)
    assert bool(wanted[5].isinf().any())
    assert 0 < int(wanted[3].isnan().sum()) < 48
    if engine != "sparse":  # which multiplies the zeros too
        wanted = wanted @ torch.eye(48)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[wanted.isinf()], wanted[wanted.isinf()])


# Votes


def noisy(x: Tensor, n: int, dtype: torch.dtype, **options: Any) -> Tensor:
    return ck.smoothing_noise(x, n, SIGMA, dtype=dtype, **options)


DRAWS = pytest.mark.parametrize(
    "draw",
    [
        {"seed": 0},
        {"seed": 2**64 - 1, "first_sample": 2**32 - 19, "stream": 2**32 - 1},
        {"seed": 12345678901234567890, "first_sample": 2**61 + 3, "stream": 7},
        {"seed": 5, "first_sample": 2**32 - 19, "law": "uniform"},
        {"seed": 5, "first_sample": 2**32 - 19, "law": "laplace"},
    ],
    ids=["from-0", "across-2^32", "far", "uniform", "laplace"],
)


@DTYPES
@DRAWS
@pytest.mark.parametrize("image", [(3, 5, 5), (1, 1, 2), (2, 3, 3)], ids=str)
def test_votes_count_the_logits_of_the_noise(
    isa: str, draw: dict[str, int], image: tuple[int, int, int], dtype: torch.dtype
) -> None:
    program, x = network(lambda x: [convolution(x, 6, low=0.0)], True, image), torch.rand(image)
    program.steps[-1].bias = None
    made = ck.sample_network(program, dtype)
    votes = made.votes(x, SIGMA, 75, **draw)
    assert int(votes.sum()) == 75
    assert int((votes > 0).sum()) > 1
    assert torch.equal(votes, ck.count_votes(made.logits(noisy(x, 75, dtype, **draw))))


@DTYPES
@DRAWS
def test_votes_see_the_bits_of_the_noise(isa: str, draw: dict[str, int], dtype: torch.dtype) -> None:
    """A pixel beats the very value that it should have at no sample, and the number below it at each."""
    image, x = Value(1, 7, 1), torch.rand(1, 7, 1)
    batch, first = noisy(x, 40, dtype, **draw), draw.get("first_sample", 0)
    for sample, pixel in ((0, 0), (18, 6), (19, 3), (39, 5)):
        value = batch[sample, 0, pixel, 0]
        below = torch.nextafter(value, torch.tensor(-math.inf, dtype=dtype))
        for bound, wanted in ((value, [1, 0]), (below, [0, 1])):
            weight = torch.zeros(2, 7, 1, 1)
            weight[1, pixel] = 1
            head = Step(
                flattened(image),
                Value(2, 1, 1),
                weight=ck.compress(weight),
                bias=torch.stack([bound.float(), torch.tensor(0.0)]),
            )
            made = ck.sample_network(Program(image, head.out, [head]), dtype)
            assert made.votes(x, SIGMA, 1, **draw | {"first_sample": first + sample}).tolist() == wanted


@DTYPES
def test_votes_of_adjacent_ranges_add_up_on_any_thread(dtype: torch.dtype) -> None:
    made, x = ck.sample_network(built("residual"), dtype), torch.rand(3, 9, 7)
    wanted = made.votes(x, SIGMA, 300, seed=5, first_sample=11)
    bounds = [11, 12, 43, 44, 100, 228, 311]
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda a, b: made.votes(x, SIGMA, b - a, seed=5, first_sample=a), bounds, bounds[1:])
        assert torch.equal(sum(parts), wanted)
    assert made.votes(x, SIGMA, 0, seed=5).tolist() == [0] * 5
    assert not torch.equal(made.votes(x, SIGMA, 300, seed=6, first_sample=11), wanted)


@pytest.mark.parametrize("grid", [None, 255])
def test_ranges_of_several_images_vote_as_each_alone(grid: int | None) -> None:
    made, images = ck.sample_network(built("residual"), torch.float32), torch.randint(256, (3, 3, 7, 9)) / 255
    ranges = [(images[i].mT, n, first, i) for i, n, first in ((0, 100, 5), (2, 0, 0), (1, 33, 2**40), (0, 1, 105))]
    found = made.votes_of(ranges, SIGMA, seed=5, grid=grid)
    for (x, n, first, stream), votes in zip(ranges, found, strict=True):
        assert torch.equal(votes, made.votes(x, SIGMA, n, seed=5, first_sample=first, stream=stream, grid=grid))
        assert int(votes.sum()) == n
    assert made.votes_of([], SIGMA, seed=5, grid=grid).shape == (0, 5)
    with pytest.raises(ValueError, match=r"x must be \[3, 9, 7\] on the CPU"):
        made.votes_of([*ranges, (images[0], 1, 0, 0)], SIGMA, seed=5)


@DTYPES
def test_a_sample_with_nan_logits_casts_no_vote(dtype: torch.dtype) -> None:
    made, x = ck.sample_network(built("1x1"), dtype), torch.rand(3, 9, 7)
    x[1, 2, 3] = math.nan
    assert int(made.votes(x, SIGMA, 50, seed=1).sum()) == 0


def test_integers_refuse_pixels_without_a_value() -> None:
    program = built("1x1")
    made = ck.sample_network(quantize(program, torch.rand(8, 3, 9, 7)), torch.int8)
    for value in (math.nan, math.inf):
        x = torch.rand(3, 9, 7)
        x[1, 2, 3] = value
        for use in (lambda x: made.votes(x, SIGMA, 50, seed=1), lambda x: made.logits(x[None])):
            with pytest.raises(ValueError, match=r"x must be finite in torch\.int8, got NaN or infinite values"):
                use(x)


def test_sums_of_many_integers_stay_in_32_bits() -> None:
    """The mean of 300 x 300 pixels, whose weights are all alike."""
    x, out = Value(1, 300, 300), Value(1, 1, 1)
    mean = Step(x, out, weight=ck.compress(torch.full((1, 1, 300, 300), 1 / 90_000)), kernel=(300, 300))
    images = 1 + 0.1 * torch.rand(4, 1, 300, 300)
    logits = ck.sample_network(quantize(Program(x, out, [mean]), images), torch.int8).logits(images)
    torch.testing.assert_close(logits, images.mean((2, 3)), rtol=0, atol=0.005)
    program = quantize(Program(x, out, [mean]), images)
    values, taps, rows = program.steps[0].weight  # type: ignore[misc]
    program.steps[0].weight = (torch.full_like(values, 127), taps, rows)
    with pytest.raises(ValueError, match=r"values must keep every sum of a filter below 2\*\*31 in torch\.int8"):
        ck.sample_network(program, torch.int8)


def test_ties_go_to_the_lowest_class() -> None:
    head = Step(
        Value(3, 1, 1), Value(4, 1, 1), weight=ck.compress(torch.zeros(4, 3, 1, 1)), bias=torch.tensor([0.0, 2, 2, 1])
    )
    made = ck.sample_network(Program(head.input, head.out, [head]), torch.float32)
    assert made.votes(torch.rand(3, 1, 1), SIGMA, 20, seed=0).tolist() == [0, 20, 0, 0]


# Memory


def any_program(choose: random.Random) -> Program:
    """Steps that read what some step before them gave, a sum, a concatenation or a maximum now and then."""
    image = Value(choose.randint(1, 4), 4, 3)
    values, steps = [image], []
    for _ in range(choose.randint(1, 9)):
        x = choose.choice(values)
        kind = choose.choice(["convolution", "sum", "concatenation", "maximum"])
        alike = [v for v in values if v.height == x.height]
        if kind == "maximum":
            steps.append(maximum(x, (2, 2), (x.height, x.width), padding=(1, 1)))
            steps[-1].out = Value(x.channels, x.height + 1, x.width + 1)
            values.append(steps[-1].out)
        elif kind == "concatenation":
            widths = [choose.randint(1, 4) for _ in range(choose.randint(2, 3))]
            whole, start = Value(sum(widths), x.height, x.width), 0
            for width in widths:
                part = Value(width, x.height, x.width, (whole, start))
                steps.append(convolution(choose.choice(alike), width, out=part))
                start += width
                values.append(part)
            values.append(whole)
        else:
            other = choose.choice(alike) if kind == "sum" else None
            steps.append(convolution(x, other.channels if other else choose.randint(1, 5), other=other))
            values.append(steps[-1].out)
    steps.append(convolution(flattened(choose.choice(values)), 3))
    return Program(image, steps[-1].out, steps)


@pytest.mark.parametrize("seed", range(12))
def test_values_that_are_needed_at_the_same_time_do_not_overlap(seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(20):
        program = any_program(choose)
        places, arena = program.places()
        there = {program.image.root}
        for i, step in enumerate(program.steps):
            there.add(step.out.root)
            later = {v.root for s in program.steps[i + 1 :] for v in (s.input, s.out, s.other) if v is not None}
            reading = {v.root for v in (step.input, step.other, step.out) if v is not None}
            needed = [r for r in there if r in later | reading | {program.logits.root}]
            ends = sorted((places[r], places[r] + r.size) for r in needed)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
            assert ends[0][0] >= 0
            assert ends[-1][1] <= arena
    x = torch.rand(5, program.image.channels, 4, 3)
    found = ck.sample_network(program, torch.float32).logits(x)
    rtol, atol = TOLERANCE[torch.float32]
    wanted = reference.sample_logits(program, x, torch.float32)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol * max(1.0, float(wanted.abs().max())))


def depthwise(x: Value, **options: Any) -> Step:
    step = convolution(x, x.channels, (3, 3), padding=(1, 1), **options)
    weight = torch.randn(x.channels, 1, 3, 3) / 3
    return replace(step, weight=ck.compress(weight, x.channels))


def separable(x: Value, stride: tuple[int, int], filters: int) -> list[Step]:
    """An inverted residual block (Sandler et al., CVPR 2018), its ends added where they are of one shape."""
    wide = convolution(x, 20, low=0.0)
    alone = depthwise(wide.out, stride=stride, low=0.0, high=6.0)
    same = stride == (1, 1) and filters == x.channels
    return [wide, alone, convolution(alone.out, filters, other=x if same else None)]


@pytest.mark.parametrize("stride", list(itertools.product((1, 2), (1, 2))), ids=str)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_depthwise_integers(isa: str, stride: tuple[int, int], padding: int) -> None:
    """At every width, of images whose 0 is not the integer 0, with a dead filter and one of few taps."""
    torch.manual_seed(padding)
    for width in range(1, 8):
        if width + 2 * padding < 3:
            continue
        x, pad = Value(5, 4, width), (1, padding)
        weight = torch.randn(5, 1, 3, 3)
        weight[2], weight[3, :, 0, 1:] = 0, 0
        out = Value(5, *conv2d_size((4, width), (3, 3), stride, pad, (1, 1)))
        alone = Step(x, out, weight=ck.compress(weight, 5), kernel=(3, 3), stride=stride, padding=pad)
        head, images = convolution(flattened(out), 5), torch.randn(70, 5, 4, width)
        program = quantize(Program(x, head.out, [alone, head]), images)
        assert program.steps[0].integers is not None
        assert program.steps[0].integers.zero > 0
        found = ck.sample_network(program, torch.int8).logits(images)
        assert torch.equal(found, reference.sample_logits(program, images, torch.int8))


def read_while_made(dtype: torch.dtype, engine: str, stride: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as when each step waits for all of the one before it, in less memory."""
    torch.manual_seed(1)
    x = Value(6, 21, 10)
    steps = separable(x, (1, 1), 6)
    steps += separable(steps[-1].out, stride, 8)
    steps += separable(steps[-1].out, (1, 1), 8)
    for step in steps[0::3] + steps[2::3]:
        step.engine = engine
    head = convolution(flattened(steps[-1].out), 5)
    program, images = Program(x, head.out, [*steps, head]), torch.rand(37, 6, 21, 10)
    if dtype is torch.int8:
        program = quantize(program, images[:8])
    assert program.streams() == {}
    want = ck.sample_network(program, dtype)
    monkeypatch.setattr(sample_network, "STREAMED", 1)
    taken = {i: (3, 1)[i % 3] for i in range(9) if i % 3 < 2}
    assert program.streams() == taken
    found = ck.sample_network(program, dtype)
    assert found.memory < want.memory
    batch = images if dtype is torch.int8 else images.to(dtype)
    assert torch.equal(found.logits(batch), want.logits(batch))
    assert torch.equal(found.votes(images[0], 0.5, 100, seed=3), want.votes(images[0], 0.5, 100, seed=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["f32", "bf16", "int8"])
@pytest.mark.parametrize("engine", ["sparse", "dense"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 2)], ids=str)
def test_values_that_are_read_while_they_are_made(
    isa: str, dtype: torch.dtype, engine: str, stride: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_while_made(dtype, engine, stride, monkeypatch)


def test_only_the_next_step_reads_what_is_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_network, "STREAMED", 1)
    x = Value(4, 12, 12)
    wide, other = convolution(x, 6), convolution(x, 6)
    alone = depthwise(wide.out)
    again = convolution(alone.out, 6, other=wide.out)
    for body, taken in (([wide, alone, again], {1: 1}), ([other, wide, alone], {1: 3}), ([wide, other, alone], {})):
        head = convolution(flattened(body[-1].out), 5)
        assert Program(x, head.out, [*body, head]).streams() == taken


def test_what_is_also_added_is_made_as_a_whole(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """x + depthwise(x): its window of x is not all that the step reads of it."""
    monkeypatch.setattr(sample_network, "STREAMED", 1)
    wide = convolution(Value(4, 12, 12), 6)
    alone = replace(depthwise(wide.out), other=wide.out)
    head = convolution(flattened(alone.out), 5)
    program, x = Program(wide.input, head.out, [wide, alone, head]), torch.rand(37, 4, 12, 12)
    assert program.streams() == {}
    agrees(ck.sample_network(program, torch.float32), program, x)


def test_a_long_chain_takes_the_memory_of_two_values() -> None:
    steps = [convolution(Value(4, 3, 3), 4)]
    for _ in range(9):
        steps.append(convolution(steps[-1].out, 4))
    program = Program(steps[0].input, Value(1, 1, 1), steps)
    program.logits = steps[-1].out
    assert program.places()[1] == 2 * steps[0].out.size


def test_what_becomes_of_the_program_does_not_reach_the_network() -> None:
    program = built("residual")
    made = ck.sample_network(program, torch.float32)
    x, fingerprint = torch.rand(5, 3, 9, 7), made.fingerprint
    wanted = made.logits(x)
    for step in program.steps:
        step.engine, step.low = "dense", 0.0
    del program.steps[1:]
    assert torch.equal(made.logits(x), wanted)
    assert len(made.times(1)) == 4
    assert made.fingerprint == fingerprint


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["copy", "pickle"])
def test_copies_vote_alike(copied: Any) -> None:
    made, x = ck.sample_network(built("concatenation"), torch.bfloat16), torch.rand(3, 9, 7)
    again = copied(made)
    assert again.fingerprint == made.fingerprint
    assert torch.equal(again.votes(x, SIGMA, 100, seed=2), made.votes(x, SIGMA, 100, seed=2))


def test_costs_fall_with_the_weights_and_times_are_measured() -> None:
    few, many = (network(lambda x, d=d: [convolution(x, 32, (3, 3), d)], image=(16, 9, 9)) for d in (0.1, 0.6))
    for dtype in (torch.float32, torch.bfloat16):
        programs = (few, many, *(of_kind(copy.deepcopy(few), engine) for engine in ("winograd", "dense")))
        costs = [step_costs(p, dtype)[0] for p in programs]
        assert 0 < costs[0] < costs[1]
        made = ck.sample_network(few, dtype)
        assert "tiles" in made._native.format or costs[0] < min(costs[2:])  # those of tiles are in another unit
        assert all(t > 0 for t in made.times(2))
        assert made.memory > 0


# Fingerprint

CHANGES: dict[str, Callable[[Program], object]] = {
    "weight": lambda p: p.steps[0].weight[0].mul_(1 + 1e-6),
    "tap": lambda p: p.steps[0].weight[1].copy_(p.steps[0].weight[1].flip(0)),
    "rows": lambda p: p.steps[0].weight[2][1:-1].add_(1),
    "bias": lambda p: p.steps[1].bias.add_(1e-6),
    "no bias": lambda p: setattr(p.steps[1], "bias", None),
    "engine": lambda p: setattr(p.steps[1], "engine", "dense"),
    "winograd": lambda p: setattr(p.steps[1], "engine", "winograd"),
    "bounds": lambda p: setattr(p.steps[1], "high", 9.0),
    "window": lambda p: setattr(p.steps[0], "dilation", (1, 2)),
    "other": lambda p: setattr(p.steps[2], "other", None),
    "mean": lambda p: p.mean.add_(1e-6),
    "no std": lambda p: setattr(p, "std", None),
    "mean and std": lambda p: (setattr(p, "mean", p.std), setattr(p, "std", p.mean)),
}


def fingerprint(program: Program, dtype: torch.dtype = torch.float32) -> str:
    """Of a network whose program may be changed behind its back."""
    made = ck.sample_network(built("residual", scaled=True), dtype)
    made.program = program
    return made.fingerprint


def test_fingerprints_are_of_what_decides_a_vote() -> None:
    torch.manual_seed(1)
    program = built("residual", scaled=True)
    wanted = fingerprint(program)
    torch.manual_seed(1)
    again = built("residual", scaled=True)
    for i, step in enumerate(again.steps):
        step.name, step.kernel = f"layer {i}", list(step.kernel)  # type: ignore[assignment]
    assert fingerprint(again) == wanted
    seen = {wanted, fingerprint(program, torch.bfloat16)}
    for name, change in CHANGES.items():
        changed = copy.deepcopy(program)
        change(changed)
        assert fingerprint(changed) not in seen, name
        seen.add(fingerprint(changed))


def test_fingerprints_tell_images_of_another_shape_apart() -> None:
    step = convolution(Value(2, 2, 8), 3)
    square = Step(Value(2, 4, 4), Value(3, 4, 4), weight=step.weight, bias=step.bias)
    head = convolution(flattened(step.out), 3)
    programs = []
    for body in (step, square):
        last = Step(flattened(body.out), Value(3, 1, 1), weight=head.weight, bias=head.bias)
        programs.append(Program(body.input, last.out, [body, last]))
    first, second = (ck.sample_network(p, torch.float32).fingerprint for p in programs)
    assert first != second


# Refusals


def good() -> Program:
    image, whole = Value(3, 6, 6), Value(5, 6, 6)
    steps = [padded(image, 2, out=Value(2, 6, 6, (whole, 0)), name="left")]
    steps += [padded(image, 3, out=Value(3, 6, 6, (whole, 2)), name="right")]
    steps += [maximum(whole, (2, 2), (3, 3), stride=(2, 2), name="pool")]
    steps += [padded(steps[-1].out, 4, name="body")]
    steps += [convolution(steps[-1].out, 4, other=steps[-1].out, name="sum")]
    steps += [convolution(flattened(steps[-1].out), 7, name="head")]
    return Program(image, steps[-1].out, steps, torch.zeros(3), torch.ones(3))


def put(at: int | None, **attributes: Any) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        for name, value in attributes.items():
            setattr(program if at is None else program.steps[at], name, value)

    return change


def weight(at: int, **tensors: Any) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        names = ("values", "taps", "rows")
        old = dict(zip(names, program.steps[at].weight, strict=True))
        new = {name: make(old[name]) for name, make in tensors.items()}
        program.steps[at].weight = tuple((old | new).values())

    return change


def moved(name: str, **attributes: int) -> Callable[[Program], None]:
    """Change a value itself, wherever it stands."""
    return lambda p: [setattr(getattr(p, name), k, v) for k, v in attributes.items()] and None


def within(step: int, name: str, whole: Value, first: int) -> Callable[[Program], None]:
    return lambda p: setattr(getattr(p.steps[step], name), "part", (whole, first))


def part_of_itself(program: Program) -> None:
    program.steps[4].out.part = (program.steps[4].out, 0)


def half_given(program: Program) -> None:
    whole, _ = program.steps[0].out.part
    program.logits, program.steps = Value(1, 1, 1, (whole, 4)), program.steps[:1]


def without(step: int) -> Callable[[Program], None]:
    return lambda p: p.steps.pop(step) and None


REFUSED: list[tuple[str, Callable[[Program], Any], type[Exception], str]] = [
    ("logits-are-images", put(None, logits=Value(7, 2, 1)), ValueError, r"program.logits must be \[K, 1, 1\], got"),
    ("logits-of-nothing", put(None, logits=Value(7, 1, 1)), ValueError, "program.logits must be given by the steps"),
    ("logits-outside", put(None, logits=Value(7, 1, 1, (Value(8, 1, 1), 2))), ValueError, "program.logits: .* inside"),
    ("logits-before", put(None, logits=Value(7, 1, 1, (Value(8, 1, 1), -1))), ValueError, "program.logits: .* inside"),
    (
        "logits-half-given",
        half_given,
        ValueError,
        "program.logits must be given",
    ),
    (
        "logits-are-the-image",
        lambda p: put(None, logits=Value(1, 1, 1, (p.image, 0)))(p),
        ValueError,
        "program.logits must be given",
    ),
    ("no-classes", moved("logits", channels=0), ValueError, "program.logits: channels must be in"),
    ("image-outside", lambda p: setattr(p.image, "part", (Value(3, 6, 5), 0)), ValueError, "program.image: .* inside"),
    ("image-of-no-size", moved("image", height=0), ValueError, "program.image: height must be in"),
    ("image-of-half-a-pixel", moved("image", width=5.5), TypeError, "program.image: width must be an integer"),
    ("image-is-none", put(None, image=None), TypeError, "program.image must be a Value, got NoneType"),
    ("image-too-large", moved("image", height=2**20, width=2**20), ValueError, "program.image must hold at most"),
    ("mean-of-another-size", put(None, mean=torch.zeros(2)), ValueError, "program.mean must hold 3 values"),
    ("std-of-another-dtype", put(None, std=torch.ones(3).double()), TypeError, "program.std must have dtype float32"),
    ("std-elsewhere", put(None, std=torch.ones(3, device="meta")), ValueError, "program.std must be on the CPU"),
    ("no-step", put(None, steps=[]), ValueError, "program.logits must be given"),
    ("unread", without(3), ValueError, "step sum: input must be given by the image or steps before it"),
    ("half-given", without(0), ValueError, "step pool: input must be given"),
    ("other-not-given", put(4, other=Value(4, 3, 3)), ValueError, "step sum: other must be given"),
    (
        "other-of-another-shape",
        lambda p: setattr(p.steps[4], "other", p.steps[2].out),
        ValueError,
        r"step sum: other must have out's shape \(4, 3, 3\)",
    ),
    (
        "in-place",
        lambda p: setattr(p.steps[4], "out", p.steps[4].input),
        ValueError,
        "step sum: out must not lie in what is read",
    ),
    (
        "in-place-in-a-part",
        lambda p: setattr(p.steps[4], "out", Value(4, 3, 3, (p.steps[4].input, 0))),
        ValueError,
        "out must not lie in what is read",
    ),
    (
        "into-the-image",
        lambda p: setattr(p.steps[4], "out", Value(2, 6, 3, (p.image, 0))) or setattr(p.steps[4], "weight", None),
        ValueError,
        "step sum:",
    ),
    (
        "given-twice",
        lambda p: p.steps.insert(2, padded(p.image, 5, out=p.steps[0].out.root, name="again")),
        ValueError,
        "step again: out must not be given by steps before it",
    ),
    (
        "given-twice-in-part",
        lambda p: setattr(p.steps[1].out, "part", (p.steps[0].out.root, 1)),
        ValueError,
        "step right: out must not be given by steps before it",
    ),
    (
        "part-outside",
        within(1, "out", Value(4, 6, 6), 2),
        ValueError,
        r"step right: out: \(3, 6, 6\) must lie inside \(4, 6, 6\) from channel 2 on",
    ),
    ("part-before", within(1, "out", Value(4, 6, 6), -1), ValueError, "step right: out: .* from channel -1 on"),
    ("part-of-less", within(1, "out", Value(5, 6, 1), 0), ValueError, "step right: out: .* must lie inside"),
    (
        "input-outside",
        lambda p: setattr(p.steps[5], "input", Value(36, 1, 1, (p.steps[4].out, 1))),
        ValueError,
        "step head: input: .* inside",
    ),
    ("part-of-itself", part_of_itself, ValueError, "step sum: out must not be a part of itself"),
    ("part-of-nothing", within(1, "out", None, 0), TypeError, "step right: out must be a Value"),  # type: ignore[arg-type]
    ("no-out", put(3, out=None), TypeError, "step body: out must be a Value"),
    ("stride-0", put(3, stride=(0, 1)), ValueError, r"step body: stride must be in \[1"),
    ("padding-negative", put(3, padding=(1, -1)), ValueError, r"step body: padding must be in \[0"),
    ("dilation-0", put(3, dilation=(1, 0)), ValueError, "step body: dilation must be in"),
    ("kernel-of-one-number", put(3, kernel=3), ValueError, "step body: kernel must be a pair, got 3"),
    ("kernel-of-three", put(3, kernel=(3, 3, 3)), ValueError, "step body: kernel must be a pair"),
    ("kernel-of-halves", put(3, kernel=(1.5, 3)), TypeError, "step body: kernel must be an integer"),
    (
        "kernel-too-large",
        put(2, kernel=(2**11, 2**11), padding=(2**10, 2**10)),
        ValueError,
        "step pool: kernel must hold at most",
    ),
    ("bounds-crossed", put(3, low=1.0, high=0.0), ValueError, "step body: low must be <= high"),
    ("bounds-nan", put(3, low=math.nan), ValueError, "step body: low must be <= high"),
    (
        "output-too-large",
        lambda p: setattr(p.steps[3], "out", Value(4, 4, 3)),
        ValueError,
        r"step body: out must be \[4, 3, 3\], got \(4, 4, 3\)",
    ),
    (
        "filters-of-another-number",
        lambda p: setattr(p.steps[3], "out", Value(5, 3, 3)),
        ValueError,
        "step body: out must be",
    ),
    (
        "image-smaller-than-the-window",
        put(3, padding=(0, 0), kernel=(3, 3), dilation=(2, 2)),
        ValueError,
        "step body: out must be",
    ),
    (
        "pool-of-another-size",
        lambda p: setattr(p.steps[2], "out", Value(5, 4, 3)),
        ValueError,
        "step pool: out must be",
    ),
    (
        "pool-of-other-channels",
        lambda p: setattr(p.steps[2], "out", Value(6, 3, 3)),
        ValueError,
        "step pool: out must be",
    ),
    ("pool-of-the-padding", put(2, padding=(2, 2)), ValueError, "step pool: padding of a maximum must be at most half"),
    (
        "pool-with-a-bias",
        put(2, bias=torch.zeros(5)),
        ValueError,
        "step pool: a maximum takes no other, bias or bounds",
    ),
    ("pool-with-bounds", put(2, low=0.0), ValueError, "step pool: a maximum takes no"),
    ("bias-of-another-size", put(3, bias=torch.zeros(5)), ValueError, r"step body: bias must have shape \(4,\)"),
    ("bias-of-another-dtype", put(3, bias=torch.zeros(4).half()), TypeError, "step body: bias must have dtype float32"),
    ("bias-elsewhere", put(3, bias=torch.zeros(4, device="meta")), ValueError, "step body: bias must be on the CPU"),
    (
        "values-of-another-dtype",
        weight(3, values=Tensor.double),
        TypeError,
        "step body: values must have dtype float32",
    ),
    ("values-elsewhere", weight(3, values=lambda v: v.to("meta")), ValueError, "step body: values must be on the CPU"),
    ("values-too-few", weight(3, values=lambda v: v[1:]), ValueError, "step body: taps must have one entry a value"),
    ("values-as-a-matrix", weight(3, values=lambda v: v[None]), ValueError, "step body: values must have 1 dimension"),
    ("taps-of-another-dtype", weight(3, taps=Tensor.long), TypeError, "step body: taps must have dtype int32"),
    ("taps-outside", weight(3, taps=lambda t: t + 45), ValueError, r"step body: taps must be in \[0, 45\)"),
    ("taps-before", weight(3, taps=lambda t: t - 45), ValueError, r"step body: taps must be in \[0, 45\)"),
    ("taps-unordered", weight(3, taps=lambda t: t.flip(0)), ValueError, "step body: taps must ascend"),
    ("rows-of-another-dtype", weight(3, rows=Tensor.long), TypeError, "step body: rows must have dtype int32"),
    ("rows-past-the-end", weight(3, rows=lambda r: r + 1), ValueError, "step body: rows must ascend"),
    ("rows-descending", weight(3, rows=lambda r: r[[0, 3, 2, 1, 4]]), ValueError, "step body: rows must ascend"),
    ("rows-missing", weight(3, rows=lambda r: r[:0]), ValueError, "step body: rows must ascend"),
]


@pytest.mark.parametrize(("change", "error", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refuses_what_would_read_or_write_elsewhere(
    change: Callable[[Program], Any], error: type[Exception], message: str
) -> None:
    program = good()
    assert ck.sample_network(program, torch.float32).logits(torch.rand(2, 3, 6, 6)).shape == (2, 7)
    change(program)
    with pytest.raises(error, match=message):
        ck.sample_network(program, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(3, low=-math.inf), r"step body: low and high must be in \[0, 255\]"),
        (put(3, high=255.5), r"step body: low and high must be in \[0, 255\]"),
        (lambda p: put(3, integers=replace(p.steps[3].integers, zero=256))(p), "step body: zero must be in"),
        (weight(3, values=lambda v: v + 0.5), "step body: values must be whole numbers below 128"),
        (weight(3, values=lambda v: 128 * v.sign()), "step body: values must be whole numbers below 128"),
        (put(3, bias=torch.full((4,), 2.0**31)), "step body: bias must be whole numbers below"),
        (put(3, bias=torch.full((4,), math.nan)), "step body: bias must be whole numbers below"),
    ],
)
def test_refuses_what_is_no_byte(change: Callable[[Program], Any], message: str) -> None:
    """Instruction sets would cut it off each in its own way."""
    program = quantize(good(), torch.rand(8, 3, 6, 6))
    assert ck.sample_network(program, torch.int8).logits(torch.rand(2, 3, 6, 6)).shape == (2, 7)
    change(program)
    with pytest.raises(ValueError, match=message):
        ck.sample_network(program, torch.int8)


def test_bad_arguments() -> None:
    program = good()
    for dtype in (torch.int32, torch.float16, torch.float64):
        with pytest.raises(ValueError, match="dtype must be one of"):
            ck.sample_network(program, dtype)
    made, x = ck.sample_network(program, torch.float32), torch.rand(3, 6, 6)
    for wrong, error, message in (
        (x, ValueError, "x must have 4 dimensions"),
        (torch.rand(2, 3, 6, 5), ValueError, r"x must be \[n, 3, 6, 6\] on the CPU"),
        (torch.rand(2, 3, 6, 6, device="meta"), ValueError, "x must be .* on the CPU, got .* on meta"),
        (torch.zeros(2, 3, 6, 6, dtype=torch.uint8), TypeError, "x must have dtype"),
    ):
        with pytest.raises(error, match=message):
            made.logits(wrong)
    for changes, error, message in (
        ({"x": x[None]}, ValueError, "x must have 3 dimensions"),
        ({"x": x[:2]}, ValueError, r"x must be \[3, 6, 6\] on the CPU"),
        ({"x": x.double()}, TypeError, "x must have dtype float32"),
        ({"sigma": 0.0}, ValueError, "sigma must be > 0"),
        ({"sigma": math.inf}, ValueError, "sigma must be finite"),
        ({"sigma": 1e39}, ValueError, "sigma must be in float32's range"),
        ({"n": -1}, ValueError, "n must be >= 0"),
        ({"n": 1.0}, TypeError, "n must be an integer"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"first_sample": -1}, ValueError, "first_sample must be in"),
        ({"first_sample": 2**63 - 1}, ValueError, "first_sample must be in"),
        ({"stream": 2**32}, ValueError, "stream must be in"),
    ):
        arguments: dict[str, Any] = {"x": x, "sigma": SIGMA, "n": 4, "seed": 0} | changes
        with pytest.raises(error, match=message):
            made.votes(**arguments)
    with pytest.raises(ValueError, match="rounds must be >= 1"):
        made.times(0)
