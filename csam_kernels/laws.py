"""The laws of smoothing noise: each coordinate independent, with mean 0 and standard deviation sigma.

| law | density of a coordinate | by sigma |
|---|---|---|
| gaussian | exp(-z^2 / (2 sigma^2)) / (sqrt(2 pi) sigma) | |
| uniform | 1 / (2 lambda) on [-lambda, lambda] | lambda = sqrt(3) sigma |
| laplace | exp(-abs(z) / lambda) / (2 lambda) | lambda = sigma / sqrt(2) |

One standard deviation for all, as in Yang et al., "Randomized Smoothing of All Shapes and Sizes" (ICML 2020), so that
results of different laws compare.

Gaussian deviates are Box-Muller's, of two words two. The others take a word each: its top bit is the sign and the other
31 bits m give u = (m + 1/2) / 2^31 in [2^-32, 1]. Uniform noise is +-lambda u, Laplace noise the inverse of its
distribution function, +-lambda ln(1/u): words that differ in the top bit alone give noise that differs in its sign
alone, to the last bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from csam_kernels import checks

FLOAT32 = torch.finfo(torch.float32)


class Law(NamedTuple):
    """Attributes:
    code: csrc/common/deviates.h, enum Law.
    unit: standard deviation 1 in units of the deviates that are drawn there: N(0, 1), U[-1, 1], Laplace of scale 2.
    """

    code: int
    unit: float


LAWS = {"gaussian": Law(0, 1.0), "uniform": Law(1, math.sqrt(3)), "laplace": Law(2, 1 / math.sqrt(8))}


def scaled(law: str, sigma: float) -> tuple[int, float]:
    """(enum Law, what its deviates are multiplied by), as kernels take them."""
    return LAWS[law].code, sigma * LAWS[law].unit


def checked_law(name: str, law: str) -> str:
    """The law's name. Raises ValueError if there is none such."""
    return str(checks.choice(name, law, tuple(LAWS)))


def checked_sigma(sigma: float, law: str) -> float:
    """The standard deviation. Raises TypeError or ValueError if it is none or float32 does not hold it."""
    sigma, unit = checks.real("sigma", sigma, above=0), LAWS[law].unit
    if not FLOAT32.tiny <= sigma * unit <= FLOAT32.max:
        low, high = FLOAT32.tiny / unit, FLOAT32.max / unit
        raise ValueError(f"sigma must be in float32's range [{low:g}, {high:g}], got {sigma:g}")
    return sigma
