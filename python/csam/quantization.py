"""A program of the sampling engine in int8, calibrated on inputs with the noise that it will certify.

Values become whole numbers 0 .. 255, one scale and zero point for all that lies together (a concatenation is one),
weights -127 .. 127 with a scale a filter. The range of a value is the share of what calibration saw that loses least
to rounding and clipping together; what rounded weights add on the average is taken off the biases. Logits stay float32.

Calibration runs 64 images at a time, or so few, 16 at least, that the values needed at once take no more than 256 MiB,
and keeps some 2^18 numbers of each value of the network. It runs on the engine's kernels, which give every processor
the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from csam.lanes import filters
from csam_kernels import checks, sample_conv2d
from csam_kernels.ops.sample_network import Integers, Program, Step, Value

_LEVELS, _WEIGHTS = 255, 127
_SHARES = torch.linspace(1.0, 0.3, 15, dtype=torch.float32, device="cpu")  # of the observed range
_SEEN = 1 << 18  # numbers of a value that the choice among them looks at, evenly spaced; up to twice as many
_BATCH, _BYTES = 64, 1 << 28  # images that run together at most, and what their values take at once
_LANES = 16  # images that the kernels take at once
_DENSE = 0.4  # share of a layer's weights from which its filters should share what they load
_BINS = 1 << 12  # to which the numbers of a value are rounded for that choice, of their range
_SUM = 2.0**30  # of integers in 32 bits, rounding apart
_EXACT = 2.0**23  # below which a whole number is one as float32
_NOISY = 64  # images at least that a network is calibrated on
_APART = 2**62  # first sample of calibration, behind those of all certificates: on these no network may depend

Draw = Callable[[Tensor, int, int, int], Tensor]


class Calibration(NamedTuple):
    """Images [n, C, H, W] as they will be labelled, in words what each is, and how many copies of how many they are."""

    images: Tensor
    words: str
    number: str


class _Statistics(NamedTuple):
    """What calibration saw of a value: some of its numbers, and the mean of all images, float64 [C * H * W]."""

    numbers: Tensor
    mean: Tensor


def calibration(name: str, images: Tensor, draw: Draw, words: str) -> Calibration:
    """Copies of each image as `draw(x, copies, first_sample, stream)` gives them, at least 64 in all.

    Args:
        name: of the argument, for messages.
        images: pixels [N, C, H, W], floating point and finite; image i has stream i.
        words: what a copy is.

    Raises:
        TypeError, ValueError: other images.
    """
    images = checks.tensor(name, images).detach()
    if images.dim() != 4 or not images.numel():
        raise ValueError(f"{name} must be images [N, C, H, W], at least one, got shape {tuple(images.shape)}")
    images = images.to("cpu", torch.float32).contiguous()
    if bad := int((~images.isfinite()).sum()):
        raise ValueError(f"{name} must have finite pixels, got {bad} that are NaN or inf in float32")
    copies = -(-_NOISY // len(images))
    drawn = [draw(x, copies, _APART, stream) for stream, x in enumerate(images)]
    return Calibration(torch.cat(drawn), words, f"{len(images)} x {copies}")


def quantize(program: Program, noisy: Tensor) -> Program:
    """The program in int8; it shares the values of the old one.

    Args:
        noisy: images [n, C, H, W] as they will be labelled, noise included.

    Raises:
        ValueError: a bias that is not finite.
    """
    if not all(step.bias is None or bool(step.bias.isfinite().all()) for step in program.steps):
        raise ValueError("dtype int8 needs finite logits, got a bias of -inf; a large finite one does the same")
    seen = _seen(program, noisy)
    ranges = _ranges(program, seen)
    scale, zero = ranges[program.image.root]
    steps = [step if step.weight is None else _quantized(step, ranges, seen, program.logits) for step in program.steps]
    return replace(program, steps=steps, scale=1 / scale, shift=float(zero))


def _ranges(program: Program, seen: dict[Value, _Statistics]) -> dict[Value, tuple[float, int]]:
    """(scale, what stands for 0) of every root value; the same before and after a maximum over windows."""
    same = {root: root for root in seen}
    for step in program.steps:
        if step.weight is None:
            old, new = same[step.out.root], same[step.input.root]
            same = {root: new if group is old else group for root, group in same.items()}
    together: dict[Value, list[Tensor]] = {}
    for root, group in same.items():
        together.setdefault(group, []).append(seen[root].numbers)
    found = {group: _range(torch.cat(numbers)) for group, numbers in together.items()}
    return {root: found[group] for root, group in same.items()}


def _seen(program: Program, noisy: Tensor) -> dict[Value, _Statistics]:
    """What calibration sees of each root value, in batches."""
    spans = _spans(program)
    needed = max(
        sum(root.size for root, span in spans.items() if span.first <= i <= span.last)
        for i in range(-1, len(program.steps))
    )
    batch = max(_LANES, min(_BATCH, _BYTES // (4 * needed) // _LANES * _LANES))
    numbers: dict[Value, list[Tensor]] = {root: [] for root in spans}
    sums = {root: noisy.new_zeros(root.size, dtype=torch.float64) for root in spans}
    for images in noisy.split(batch):
        for root, values in _values(program, images):
            apart = root.size * len(noisy) // _SEEN | 1  # odd, or few images would be looked at
            numbers[root].append(values.flatten()[::apart].clone())
            sums[root] += values.sum(1, dtype=torch.float64)
    return {root: _Statistics(torch.cat(numbers[root]), sums[root] / len(noisy)) for root in spans}


class _Span(NamedTuple):
    """Steps that write a root value first and last, and that use it last; -1 of the image."""

    first: int
    whole: int
    last: int


def _spans(program: Program) -> dict[Value, _Span]:
    """Of what the values of a program lie in, in the order of its steps."""
    spans = {program.image.root: _Span(-1, -1, -1)}
    for i, step in enumerate(program.steps):
        for value in (step.input, step.other, step.out):
            if value is not None:
                before = spans.get(value.root, _Span(i, i, i))
                spans[value.root] = _Span(before.first, i if value is step.out else before.whole, i)
    return spans


def _values(program: Program, images: Tensor) -> Iterator[tuple[Value, Tensor]]:
    """The root values of a program in float32, [C * H * W, n], with the engine's bits: the same everywhere.

    Each comes when it is whole, and is dropped when no step needs it any more.
    """
    spans = _spans(program)
    wholes: dict[Value, Tensor] = {}

    def at(value: Value) -> Tensor:
        if value.root not in wholes:
            wholes[value.root] = images.new_zeros(value.root.size, len(images))
        numbers = wholes[value.root][value.offset : value.offset + value.size]
        return numbers.view(value.channels, value.height, value.width, len(images))

    def finished(i: int) -> Iterator[tuple[Value, Tensor]]:
        for root, span in spans.items():
            if span.whole == i:
                yield root, wholes[root]
            if span.last == i:
                del wholes[root]

    pixels = images.permute(1, 2, 3, 0)
    pixels = pixels if program.mean is None else pixels - program.mean.view(-1, 1, 1, 1)
    at(program.image).copy_(pixels if program.std is None else pixels / program.std.view(-1, 1, 1, 1))
    yield from finished(-1)
    for i, step in enumerate(program.steps):
        image, out = at(step.input), at(step.out)
        if step.weight is None:
            out.copy_(_maximum(image, step))
        else:
            dense = len(step.weight[0]) > _DENSE * len(out) * len(image) * math.prod(step.kernel)
            other = None if step.other is None else at(step.other)
            window: dict[str, Any] = {"kernel_size": step.kernel, "stride": step.stride, "padding": step.padding}
            window |= {"dilation": step.dilation, "dense": dense}
            sums = sample_conv2d(image, *step.weight, step.bias, other, **window)
            torch.clamp(sums, step.low, step.high, out=out)
        yield from finished(i)


def _maximum(image: Tensor, step: Step) -> Tensor:
    """Over windows of an image [C, H, W, n], along one axis after the other."""
    windows = zip(step.kernel, step.stride, step.padding, step.dilation, strict=True)
    sizes = (step.out.height, step.out.width)
    for axis, (size, (kernel, stride, padding, dilation)) in enumerate(zip(sizes, windows, strict=True), 1):
        reach = stride * (size - 1) + 1  # from the first window's place to the last one's
        behind = max(0, reach + dilation * (kernel - 1) - padding - image.shape[axis])
        image = F.pad(image, (*(0, 0) * (3 - axis), padding, behind), value=-math.inf)
        each = [slice(None)] * axis
        places = (image[*each, dilation * i : dilation * i + reach : stride] for i in range(kernel))
        image = functools.reduce(torch.maximum, places)
    return image


def _range(seen: Tensor) -> tuple[float, int]:
    """(scale, what stands for 0) of numbers that include 0, each rounded to a `_BINS`th of their range."""
    low, high = min(0.0, float(seen.min())), max(0.0, float(seen.max()))
    width = (high - low) / _BINS
    if not 0 < width < math.inf:
        return 1.0, 0
    bins = (seen.double() / width).round().long()
    first = int(bins.min())
    counts = torch.bincount(bins - first).double()
    numbers = torch.arange(first, first + len(counts), dtype=torch.float64, device="cpu") * width
    best, least = (1.0, 0), math.inf
    for share in _SHARES.tolist():
        scale = (high - low) * share / _LEVELS
        zero = round(-low * share / scale)
        again = ((numbers / scale + zero).round().clamp(0, _LEVELS) - zero) * scale
        error = float((counts * (again - numbers).square()).sum())
        if error < least:
            best, least = (scale, zero), error
    return best


def _quantized(
    step: Step, ranges: dict[Value, tuple[float, int]], seen: dict[Value, _Statistics], logits: Value
) -> Step:
    assert step.weight is not None
    values, taps, rows = step.weight
    of, zeros = filters(rows), values.new_zeros(len(rows) - 1)
    bias = zeros if step.bias is None else step.bias
    scale_in, zero_in = ranges[step.input.root]
    largest = zeros.scatter_reduce(0, of, values.abs(), "amax")
    most = (_LEVELS + zero_in) * zeros.index_add(0, of, values.abs()) + bias.abs() / scale_in  # that a sum may come to
    unit = torch.maximum(largest / _WEIGHTS, bias.abs() / (scale_in * _EXACT))  # of a filter's weights
    unit = torch.maximum(unit, most / _SUM).clamp(min=1e-30)
    whole = (values / unit[of]).round()
    bias = bias - _drift(step, whole * unit[of] - values, seen[step.input.root].mean)
    start = (bias / (scale_in * unit)).round() - zero_in * zeros.index_add(0, of, whole)
    real = step.out.root is logits.root
    scale, zero = (1.0, 0) if real else ranges[step.out.root]
    other_scale, shift = 0.0, float(zero)
    if step.other is not None:
        scale_other, zero_other = ranges[step.other.root]
        other_scale = scale_other / scale
        shift -= zero_other * other_scale
    low, high = step.low, step.high
    if not real:
        low, high = max(0.0, low / scale + zero), min(float(_LEVELS), high / scale + zero)
    integers = Integers(scale_in * unit / scale, shift, other_scale, zero_in, real)
    return replace(step, weight=(whole, taps, rows), bias=start, low=low, high=high, integers=integers)


def _drift(step: Step, errors: Tensor, mean: Tensor) -> Tensor:
    """What errors of its weights add to each channel of a step on the average, given the mean of its input's root.

    Taken off the bias, it leaves rounded weights that move samples apart but not all alike: Nagel et al., "Data-Free
    Quantization Through Weight Equalization and Bias Correction" (ICCV 2019), section 4.2.
    """
    assert step.weight is not None
    x, (_, taps, rows) = step.input, step.weight
    image = mean[x.offset : x.offset + x.size].view(1, x.channels, x.height, x.width)
    windows = F.unfold(image, step.kernel, step.dilation, step.padding, step.stride)[0]
    added = errors.double() * windows.mean(1)[taps.long()]
    return added.new_zeros(len(rows) - 1).index_add_(0, filters(rows), added).float()
