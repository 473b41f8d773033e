"""A program of the sampling engine in int8, calibrated on inputs with the noise that it will certify.

Values become whole numbers 0 .. 255, one scale and zero point for all that lies together (a concatenation is one),
weights -127 .. 127 with a scale a filter. The range of a value is the share of what calibration saw that loses least
to rounding and clipping together. Logits stay float32.

Calibration runs 64 images at a time, or so few that their values take no more than 256 MiB, and keeps some 2^18 numbers
of each value of the network, those that it would keep if it ran all images at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from csam.lanes import filters
from csam_kernels import checks, reference
from csam_kernels.ops.sample_network import Integers, Program, Step, Value

_LEVELS, _WEIGHTS = 255, 127
_SHARES = torch.linspace(1.0, 0.3, 15, dtype=torch.float32, device="cpu")  # of the observed range
_SEEN = 1 << 18  # numbers of a value that the choice among them looks at, evenly spaced; up to twice as many
_BATCH, _BYTES = 64, 1 << 28  # images that run together at most, and what their values take
_EXACT = 2.0**23  # below which a whole number is one as float32
_NOISY = 64  # images at least that a network is calibrated on
_APART = 2**62  # first sample of calibration, behind those of all certificates: on these no network may depend

Draw = Callable[[Tensor, int, int, int], Tensor]


class Calibration(NamedTuple):
    """Images [n, C, H, W] as they will be labelled, and in words what they are."""

    images: Tensor
    words: str


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
    return Calibration(torch.cat(drawn), f"{len(images)} x {copies} {words}")


def quantize(program: Program, noisy: Tensor) -> Program:
    """The program in int8; it shares the values of the old one.

    Args:
        noisy: images [n, C, H, W] as they will be labelled, noise included.

    Raises:
        ValueError: a bias that is not finite.
    """
    if not all(step.bias is None or bool(step.bias.isfinite().all()) for step in program.steps):
        raise ValueError("dtype int8 needs finite logits, got a bias of -inf; a large finite one does the same")
    ranges = _ranges(program, noisy)
    scale, zero = ranges[program.image.root]
    steps = [step if step.weight is None else _quantized(step, ranges, program.logits) for step in program.steps]
    return replace(program, steps=steps, scale=1 / scale, shift=float(zero))


def _ranges(program: Program, noisy: Tensor) -> dict[Value, tuple[float, int]]:
    """(scale, what stands for 0) of every root value; the same before and after a maximum over windows."""
    same = {value.root: value.root for step in program.steps for value in (step.input, step.out)}
    for step in program.steps:
        if step.weight is None:
            old, new = same[step.out.root], same[step.input.root]
            same = {root: new if group is old else group for root, group in same.items()}
    kept = _kept(program, noisy, max(1, min(_BATCH, _BYTES // (4 * sum(root.size for root in same)))))
    seen: dict[Value, list[Tensor]] = {}
    for root, numbers in kept.items():
        seen.setdefault(same[root], []).append(numbers)
    found = {group: _range(torch.cat(numbers)) for group, numbers in seen.items()}
    return {root: found[group] for root, group in same.items()}


def _kept(program: Program, noisy: Tensor, batch: int) -> dict[Value, Tensor]:
    """Every so many of the numbers of each root value on all images, laid out [C, H, W, n], computed in batches."""
    kept: dict[Value, Tensor] = {}
    places: dict[int, tuple[Tensor, Tensor]] = {}  # of a value's size: where in an image, and in which image
    n = len(noisy)
    for first in range(0, n, batch):
        images = noisy[first : first + batch]
        values = reference.sample_values(program, images, torch.float32)
        for value, numbers in values.items():
            if value.part is not None:
                continue
            if value.size not in places:
                total = value.size * n
                flat = torch.arange(0, total, max(1, total // _SEEN), device="cpu")
                places[value.size] = flat // n, flat % n
            where, which = places[value.size]
            here = ((which >= first) & (which < first + len(images))).nonzero().flatten()
            into = kept.setdefault(value, numbers.new_empty(len(where)))
            into[here] = numbers.view(value.size, len(images))[where[here], which[here] - first]
        values.clear()  # its maker refers to itself, so that it would stay until the next collection
    return kept


def _range(seen: Tensor) -> tuple[float, int]:
    """(scale, what stands for 0) of numbers that include 0."""
    low, high = min(0.0, float(seen.min())), max(0.0, float(seen.max()))
    best, least = (1.0, 0), float("inf")
    for share in _SHARES.tolist():
        scale = (high - low) * share / _LEVELS
        if scale <= 0:
            break
        zero = round(-low * share / scale)
        again = ((seen / scale + zero).round().clamp(0, _LEVELS) - zero) * scale
        error = float((again - seen).square().mean())
        if error < least:
            best, least = (scale, zero), error
    return best


def _quantized(step: Step, ranges: dict[Value, tuple[float, int]], logits: Value) -> Step:
    assert step.weight is not None
    values, taps, rows = step.weight
    of, zeros = filters(rows), values.new_zeros(len(rows) - 1)
    bias = zeros if step.bias is None else step.bias
    scale_in, zero_in = ranges[step.input.root]
    largest = zeros.scatter_reduce(0, of, values.abs(), "amax")
    unit = torch.maximum(largest / _WEIGHTS, bias.abs() / (scale_in * _EXACT)).clamp(min=1e-30)  # of a filter's weights
    whole = (values / unit[of]).round()
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
