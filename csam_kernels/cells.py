"""Noise rounded to a grid, drawn from fair bits: the noise of sound smoothing (the theorem: `csam.sound`).

Pixels are whole numbers of steps, `grid` of them to 1. The noise of a pixel is the number of steps nearest to
sigma * grid * eps: with s = sigma * grid and F the distribution function of eps, the number k has the probability

    p_k = F((k + 1/2) / s) - F((k - 1/2) / s).

An image's whole numbers plus these are whole numbers, and a point of the grid is one float32, number / grid, rounded
once: what the network sees depends on that number and on nothing else of the image. Numbers below 2^24 are exact in
float32.

What is drawn are multiples q_k of 2^-96 in place of the p_k, by Walker's alias method (1977; tables as Vose's, 1991):
2^bits columns of equal weight, each shared by its own number and one other. The first bits of a coordinate's word are
the column; what is left of the word is compared with the column's threshold, and only if the two are equal, which
happens once in 2^(32 - bits) draws, 64 more bits of another generator decide. So a draw is a word and a look-up, and
its law is q to the last bit, if Philox's words are fair coins.

`distance` bounds the total variation between q and p. The p_k are computed in decimal arithmetic of 60 digits, whose
exp, square root and each operation are rounded correctly. F(z) - 1/2 is, for z >= 0,

- gaussian: phi(z) (z + z^3/3 + z^5/(3*5) + ...), all of whose terms are positive, so that nothing cancels: hundreds of
  operations, and the terms left out are a fraction of 10^-58. From z = 14 on it is 1/2, to 2^-146;
- uniform: z / (2 sqrt(3)), 1/2 from z = sqrt(3) on;
- laplace: (1 - exp(-sqrt(2) z)) / 2.

Each q_k is a multiple of 2^-96 below p_k by at most 2^-96 (1 + 2^-40), and what is then missing from 1 goes to k = 0.
So q is above p there alone, and their distance is at most what is missing: with the tails (2^bits + 1) 2^-96, as the
table ends at least REACH s from 0, beyond which a coordinate lies with probability below 2^-99.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

WEIGHT = 96  # bits of a probability
REACH = {"gaussian": 11.5, "uniform": math.sqrt(3), "laplace": 49.0}  # standard deviations on either side
MOST_BITS = 16  # of a table's columns; three seconds to make it, 768 KiB
LARGEST = 2**20  # number of a pixel: float32 keeps number / grid apart from its neighbours, with noise too
_DIGITS = 60
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


@dataclass(frozen=True)
class Cells:
    """The table of one law, sigma and grid.

    Attributes:
        columns: int32 [2^bits], the first 32 - bits bits of the threshold, then the other column.
        rest: int64 [2^bits], the threshold's next 64 bits.
        bits: of a column's index; column i is the number i - 2^(bits - 1).
        grid: steps to 1.
        weights: 2^96 q_k of each column's number.
        distance: at least the total variation between q and the rounded noise, of one coordinate.
    """

    columns: Tensor
    rest: Tensor
    bits: int
    grid: int
    weights: tuple[int, ...]
    distance: float

    @property
    def native(self) -> tuple[tuple[int, int, int], float]:
        """The table and the grid as C++ takes them."""
        return (self.columns.data_ptr(), self.rest.data_ptr(), self.bits), float(self.grid)


@lru_cache(maxsize=8)
def cells(sigma: float, grid: int, law: str = "gaussian") -> Cells:
    """The table for noise of sigma, in units of 1, on a grid of so many steps to 1.

    Raises:
        ValueError: sigma takes more steps than a table holds.
    """
    bits = max(4, math.ceil(math.log2(REACH[law] * sigma * grid + 1)) + 1)
    if bits > MOST_BITS:
        most = 2 ** (MOST_BITS - 1) / REACH[law] / grid
        raise ValueError(f"sigma must be at most {most:g} on a grid of {grid} steps, got {sigma:g}")
    half = 2 ** (bits - 1)
    right = _right_half(sigma, grid, half, law)
    weights = [0, *right[:0:-1], *right]  # of -half, which is never drawn, -(half - 1) .. half - 1
    weights[half] += (1 << WEIGHT) - sum(weights)
    return Cells(*_columns(weights, bits), bits, grid, tuple(weights), (2**bits + 2) * 2.0**-WEIGHT)


def _right_half(sigma: float, grid: int, count: int, law: str) -> list[int]:
    """2^96 p_k rounded down, k = 0 .. count - 1."""
    with localcontext() as context:
        context.prec = _DIGITS
        s = Decimal(sigma) * grid
        one, errors, beyond_half = Decimal(1 << WEIGHT), Decimal(2) ** -40, _beyond_half[law]()
        ends = [beyond_half((2 * k + 1) / (2 * s)) for k in range(count)]
        inside = [2 * ends[0], *(b - a for a, b in pairwise(ends))]
        return [int(max(p * one - errors, Decimal(0))) for p in inside]


def _gaussian() -> Callable[[Decimal], Decimal]:
    tiny, scale = Decimal(10) ** -_DIGITS, 1 / (2 * _PI).sqrt()

    def beyond_half(z: Decimal) -> Decimal:
        if z > 14:
            return Decimal("0.5")  # to 2^-146
        square = z * z
        term = total = z
        odd = 1
        while term > tiny * total or odd < square:
            odd += 2
            term = term * square / odd
            total += term
        return total * (-square / 2).exp() * scale

    return beyond_half


def _uniform() -> Callable[[Decimal], Decimal]:
    width = 2 * Decimal(3).sqrt()
    return lambda z: min(z / width, Decimal("0.5"))


def _laplace() -> Callable[[Decimal], Decimal]:
    root = Decimal(2).sqrt()
    return lambda z: (1 - (-root * z).exp()) / 2


_beyond_half = {"gaussian": _gaussian, "uniform": _uniform, "laplace": _laplace}  # F(z) - 1/2, in the digits at hand


def _columns(weights: list[int], bits: int) -> tuple[Tensor, Tensor]:
    """Thresholds and other numbers of the columns, whose weights are 2^(96 - bits) each; exact in integers."""
    full = 1 << (WEIGHT - bits)
    left, other, threshold = list(weights), list(range(len(weights))), [0] * len(weights)
    small = [i for i, w in enumerate(left) if w < full]
    large = [i for i, w in enumerate(left) if w > full]
    while small:
        i, j = small.pop(), large[-1]
        threshold[i], other[i] = left[i], j
        left[j] -= full - left[i]
        if left[j] <= full:
            large.pop()
            if left[j] < full:
                small.append(j)
    first = [(t >> 64) << bits | o for t, o in zip(threshold, other, strict=True)]
    rest = [t & (2**64 - 1) for t in threshold]
    return _signed(first, 32).to(torch.int32), _signed(rest, 64)


def _signed(words: list[int], bits: int) -> Tensor:
    return torch.tensor([w - (1 << bits) if w >> (bits - 1) else w for w in words], dtype=torch.int64, device="cpu")


def steps(x: Tensor, grid: int) -> Tensor:
    """The whole numbers of an image on the grid, float32.

    Raises:
        ValueError: a pixel that is not the float32 nearest to a whole number / grid.
    """
    x, numbers = x.to(torch.float32), unchecked_steps(x, grid)
    nearest = numbers / numbers.new_tensor(grid)  # by a plain number CUDA would multiply with its reciprocal
    wrong = ~((nearest == x) & (numbers.abs() <= LARGEST))  # NaN is wrong
    if bool(wrong.any()):
        first = float(x[wrong][0])
        raise ValueError(
            f"x must hold whole numbers / {grid} in float32, got {first:.9g} and {int(wrong.sum()) - 1} others of "
            f"{x.numel()} that are none; uint8 / {grid} or (x * {grid}).round() / {grid} would do"
        )
    return numbers


def unchecked_steps(x: Tensor, grid: int) -> Tensor:
    """`steps` of an image that is known to be on the grid: a GPU is not waited for."""
    return (x.to(torch.float32) * grid).round()


__all__ = ["Cells", "cells", "steps", "unchecked_steps"]
