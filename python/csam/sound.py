"""Smoothing whose proof survives floating point.

The proof of Cohen et al. (2019) takes a function of real numbers and Gaussian noise. A program has neither. Computed as
usual, x + sigma * eps is rounded, and how depends on x: its last bits can tell a network which x they came from, and
networks were built that way whose certificates are false (Jin, Ohrimenko and Rubinstein, "Getting a-Round Guarantees:
Floating-Point Attacks on Certified Robustness", 2022; Voracek and Hein, "Sound Randomized Smoothing in Floating-Point
Arithmetics", ICLR 2023; tests/test_sound.py has one). What follows is the latter's repair: pixels and noise on a grid.

What is certified. Let Q round each coordinate of a point of R^d to the nearest whole number / 255, and let f be the
network as it is executed: a function on the points of that grid, each coordinate stored as the float32 nearest to it.
Then f(Q(.)) is a function on R^d, and its smoothed classifier is

    g(x) = argmax_c P(f(Q(x + sigma eps)) = c),  eps ~ N(0, I) in real numbers.

Theorem 1 of Cohen et al. asks nothing of a base classifier: if g(x)'s class has probability p_A > 1/2, it is g's class
at all real x' with |x' - x| < sigma Phi^-1(p_A), on the grid or not. So it is with the other laws of noise and their
radii (`csam.laws`): what follows holds for eps of each.

What is computed. If x is on the grid, Q(x + sigma eps) = x + Q(sigma eps) but for ties, which have probability 0. So
the noise is a whole number of steps a coordinate, independent of x, and its sum with x is exact: `csam_kernels.cells`
draws it. Hence at all images, uint8 / 255 (any whole numbers / 255, in fact), g is what is evaluated here, and a radius
holds against every change of one image into another. Other x are refused. There g is defined, and within the radius
constant, but to evaluate it one would have to add the noise in real numbers.

What is drawn. Coordinates are independent and within `distance` of the law of Q(sigma eps) in total variation, below
2^-79. N of them can be drawn together with N ideal ones so that all are equal but with probability N * distance. What
errs with probability at most alpha' on ideal noise, choice of the class, early stops and PREDICT included, thus errs
with probability at most alpha' + N * distance on this. So bounds are made at alpha' = alpha - N * distance, less a
millionth of alpha for the rounding of the bound itself (a relative error of up to 10^-6 / n), and radii are made 10^-12
smaller for their own rounding.

What is left to trust:

- Philox's words are fair coins, independent of f: whoever made the network did not know the seed.
- f is a function: what the network answers depends on the noisy image alone. In the sampling engine it does, whatever
  lies beside the image. Where torch runs the network, in tiles of one shape, it does as far as torch treats all rows of
  a batch alike.
- float64 gives Clopper-Pearson's and the sequential bounds to 10^-6 / n.

In the plain mode noise is float32 from 32-bit words (Gaussian: Box-Muller, |eps| <= 6.66), x + sigma eps is rounded to
float32, and nothing is proved about either: the certificate is one for real arithmetic, and carries over to the program
only as far as the network makes nothing of last bits and of the missing tails. In both modes rounding to the network's
dtype, its own rounding and its quantisation are parts of f.
"""

from __future__ import annotations

from csam.sequential import LEAST

GRID = 255  # steps to 1, of an image's pixels
_BOUND, _RADIUS = 1e-6, 1e-12  # shares kept for the rounding of a bound and of a radius


def level(alpha: float, draws: int, distance: float) -> float:
    """alpha' for a procedure that draws so many coordinates, each within `distance` of the ideal law.

    Raises:
        ValueError: less than `csam.sequential.LEAST` is left of alpha.
    """
    left = alpha * (1 - _BOUND) - draws * distance
    if left < LEAST:
        raise ValueError(
            f"alpha must be above {draws * distance + LEAST:.2g}, what {draws} draws may err by, got {alpha:g}"
        )
    return left


def scale(sigma: float) -> float:
    """What the radius at sigma = 1 is multiplied by."""
    return sigma * (1 - _RADIUS)


__all__ = ["GRID", "level", "scale"]
