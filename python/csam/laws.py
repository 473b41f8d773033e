"""How far a smoothed classifier holds under each law of noise: the radius of a probability, and back.

If the smoothed classifier's class has probability at least p > 1/2 under noise of a law, it is its class at every image
within the radius, of the law's norm. For a shift by d, with lambda as in `csam_kernels.laws`:

- gaussian, l2: the shift lowers p to Phi(Phi^-1(p) - |d|_2 / sigma) at worst (Cohen et al. 2019, Theorem 1), which is
  1/2 at |d|_2 = sigma Phi^-1(p).
- uniform, l1: the cubes about the two images have prod(1 - |d_i| / (2 lambda)) >= 1 - |d|_1 / (2 lambda) of their
  volume in common. The rest takes at most |d|_1 / (2 lambda) from p, which leaves 1/2 at |d|_1 = 2 lambda (p - 1/2)
  (Lee et al. 2019, "Tight Certificates of Adversarial Robustness for Randomly Smoothed Classifiers"): lambda at most.
- laplace, l1: the ratio of the two densities is at most exp(|d|_1 / lambda), so all other classes together have at most
  (1 - p) times that, which is 1/2 at |d|_1 = -lambda ln(2 (1 - p)) (Teng et al. 2019, "l1 Adversarial Robustness
  Certificates: a Randomized Smoothing Approach").

All three are tight (Yang et al. 2020, "Randomized Smoothing of All Shapes and Sizes"): of a linear classifier that
looks at one coordinate each is the true radius. They are open, that is they hold for shifts below them. Radii of two
norms say different things: |d|_2 <= |d|_1 <= sqrt(N) |d|_2 for images of N numbers.

Radii are in the unit of sigma and of the image. No range of pixels is asked for, and what noise makes of them is not
clipped: smoothing holds of images in any unit, a smoothed radius of 0.5 of those in [0, 1] is one of 127.5 of 0 .. 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

_ROOT2, _ROOT3 = math.sqrt(2), math.sqrt(3)
Numbers = Any  # a float, or an array of them


@dataclass(frozen=True)
class Law:
    """Attributes:
    norm: of its radii, "l2" or "l1".
    radius: p -> radius at sigma = 1, for floats and arrays; negative below 1/2.
    probability: its inverse, for radii from 0 to `largest`.
    largest: radius of p = 1.
    """

    norm: str
    radius: Callable[[Numbers], Numbers]
    probability: Callable[[Numbers], Numbers]
    largest: float = math.inf


LAWS = {
    "gaussian": Law("l2", special.ndtri, special.ndtr),
    "uniform": Law("l1", lambda p: 2 * _ROOT3 * (p - 0.5), lambda r: 0.5 + r / (2 * _ROOT3), _ROOT3),
    "laplace": Law("l1", lambda p: 0.0 - special.log1p(1 - 2 * p) / _ROOT2, lambda r: 1 - np.exp(-_ROOT2 * r) / 2),
}
