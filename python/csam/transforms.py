"""Random transforms of images: geometry, blur and light, and corruptions in the manner of CIFAR-10-C.

A transform is a set of intervals, one a parameter; a draw is uniform in each. Transforms compose with `|`:

    Rotation(10) | Brightness(0.2) | GaussianNoise(0.04)

draws all parameters for every copy. The order of composition does not matter: `csam_kernels.semantic_batch`
applies geometry, blur, contrast, brightness and gamma in that order, then `csam.corruptions` defocus, motion blur, fog,
shot, Gaussian and impulse noise, pixelation and JPEG; the fixed order is ours. The intervals of the former are those of
CC-Cert's public command line (Pautov et al., AAAI 2022). The strength of a corruption is drawn from none to the one
named; what CIFAR-10-C takes at severities 1 to 5 stands at each (Hendrycks and Dietterich, ICLR 2019; their code).

All take pixels in [0, 1] and give such, clipped: a model that wants others normalises them itself.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import csam_kernels
from csam import corruptions
from csam_kernels import SEMANTIC_COLUMNS, SEMANTIC_NEUTRAL, checks

_BEYOND = 0.5 / 255


class Transform:
    """A distribution over transforms of an image; build one with the functions below or `parse`.

    Attributes:
        ranges: column of `csam_kernels.SEMANTIC_COLUMNS` or `csam.corruptions.COLUMNS` -> (low, high); the other
            columns stay neutral.

    `str(transform)` is what `parse` reads. Two transforms are equal if they draw the same parameters.
    """

    def __init__(self, text: str, ranges: Mapping[str, tuple[float, float]]) -> None:
        self._text = text
        self.ranges = dict(ranges)

    def __or__(self, other: Transform) -> Transform:
        if not isinstance(other, Transform):
            return NotImplemented
        twice = [name for name in self.ranges if name in other.ranges]
        if twice:
            raise ValueError(f"transforms composed with | must be of different kinds, got {', '.join(twice)} twice")
        return Transform(f"{self},{other}", self.ranges | other.ranges)

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        ranges = ", ".join(f"{name} in [{low:g}, {high:g}]" for name, (low, high) in self.ranges.items())
        return f"Transform({self._text!r}: {ranges})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Transform) and self.ranges == other.ranges

    def __hash__(self) -> int:
        return hash(frozenset(self.ranges.items()))

    def parameters(self, n: int, *, seed: int, first_sample: int = 0, stream: int = 0) -> Tensor:
        """n rows of parameters for `csam_kernels.semantic_batch`, float32 [n, 8].

        Row i depends on (seed, stream, first_sample + i) only, and each parameter's draw is the same whatever
        it is composed with. Errors as in `csam_kernels.philox_uniform`.
        """
        u = csam_kernels.philox_uniform(n, len(SEMANTIC_COLUMNS), seed=seed, first_sample=first_sample, stream=stream)
        pairs = zip(SEMANTIC_COLUMNS, SEMANTIC_NEUTRAL, strict=True)
        intervals = [self.ranges.get(name, (neutral, neutral)) for name, neutral in pairs]
        low, high = torch.tensor(intervals, dtype=torch.float32, device=u.device).unbind(1)
        return torch.minimum(low + (high - low) * u, high)

    def corrupted(self, copies: Tensor, *, seed: int, first_sample: int = 0, stream: int = 0) -> Tensor:
        """Copies that `csam_kernels.semantic_batch` made, with their corruptions; themselves if there are none.

        Strengths and noise of copy i depend on (seed, stream, first_sample + i) only, and the same holds for what they
        are composed with as in `parameters`. Arguments and errors as in `csam.corruptions.corrupted`.
        """
        kinds = [name for name in corruptions.COLUMNS if name in self.ranges]
        if not kinds:
            return copies
        where = {"seed": seed, "first_sample": first_sample, "stream": stream}
        first, last = len(SEMANTIC_COLUMNS), len(SEMANTIC_COLUMNS) + len(corruptions.COLUMNS)
        u = csam_kernels.philox_uniform(len(copies), last, **where)[:, first:]
        drawn = {}
        for name in kinds:
            low, high = torch.tensor(self.ranges[name], dtype=torch.float32, device="cpu")
            drawn[name] = torch.minimum(low + (high - low) * u[:, corruptions.COLUMNS.index(name)], high)
        return corruptions.corrupted(copies, drawn, **where)

    def __call__(self, x: Tensor, *, seed: int, first_sample: int = 0, stream: int = 0) -> Tensor:
        """Every image transformed by a draw of its own: image b takes row first_sample + b.

        Args:
            x: [B, C, H, W], or one image [C, H, W]; pixels in [0, 1], floating point. Half an 8-bit step beyond, as
                resampling may leave, is clipped.
            seed, first_sample, stream: as in `parameters`.

        Returns:
            float32 in x's shape, in [0, 1].

        Raises:
            TypeError, ValueError: wrong shape or dtype; pixels, seed, sample or stream out of range.
        """
        checks.tensor("x", x)
        if x.numel():
            low, high = torch.stack(x.detach().aminmax()).cpu().tolist()  # the one wait for the device
            if not (low >= -_BEYOND and high <= 1 + _BEYOND):
                raise ValueError(
                    f"x must have pixels in [0, 1], got {low:g} .. {high:g}; normalise inside the model, as in "
                    "nn.Sequential(normalisation, network), and give it pixels; of noisy pixels, take transform.clipped"
                )
        return self.clipped(x, seed=seed, first_sample=first_sample, stream=stream)

    def clipped(self, x: Tensor, *, seed: int, first_sample: int = 0, stream: int = 0) -> Tensor:
        """The same of any values, such as pixels with noise: what lies outside [0, 1] in the end is clipped."""
        checks.tensor("x", x)
        if x.dim() not in (3, 4):
            raise ValueError(f"x must be [B, C, H, W] or [C, H, W], got shape {tuple(x.shape)}")
        if x.dim() == 3:
            return self.clipped(x[None], seed=seed, first_sample=first_sample, stream=stream)[0]
        rows = self.parameters(len(x), seed=seed, first_sample=first_sample, stream=stream).to(x.device)
        pixels = x.detach().to(torch.float32)
        out = torch.empty_like(pixels)
        for i, one in enumerate(pixels):
            out[i] = torch.ops.csam.semantic_batch(one, rows[i : i + 1])[0]
        return self.corrupted(out, seed=seed, first_sample=first_sample, stream=stream)


def Rotation(degrees: float) -> Transform:
    """About the image centre, by an angle in [-degrees, degrees]; degrees in (0, 180]."""
    d = checks.real("rotation", degrees, above=0, most=180)
    return Transform(_text("rotation", d), {"rotation": (-d, d)})


def Translation(fraction: float) -> Transform:
    """By up to `fraction` of the width and of the height, each either way; fraction in (0, 1]."""
    f = checks.real("translation", fraction, above=0, most=1)
    return Transform(_text("translation", f), {"translate_x": (-f, f), "translate_y": (-f, f)})


def Scale(factor: float) -> Transform:
    """Enlarged by a factor in 1 ± |1 - factor|: 0.9 and 1.1 are the same. factor in (0, 2), not 1."""
    v = checks.real("scale", factor, above=0, below=2)
    low, high = _around_one("scale", v)
    if low == 0:
        raise ValueError(f"scale must be farther from 2: 1 ± |1 - {v!r}| would hold 0")
    return Transform(_text("scale", v), {"scale": (low, high)})


def Contrast(factor: float) -> Transform:
    """Pixels times a factor in 1 ± |1 - factor|, clipped to [0, 1]; factor in (0, 2], not 1."""
    v = checks.real("contrast", factor, above=0, most=2)
    return Transform(_text("contrast", v), {"contrast": _around_one("contrast", v)})


def Brightness(shift: float) -> Transform:
    """A shift in [-shift, shift] added to every pixel, clipped to [0, 1]; shift in (0, 1]."""
    b = checks.real("brightness", shift, above=0, most=1)
    return Transform(_text("brightness", b), {"brightness": (-b, b)})


def Gamma(gamma: float) -> Transform:
    """Pixels to a power between gamma and 1/gamma; gamma > 0, not 1."""
    g = checks.real("gamma", gamma, above=0)
    if g == 1:
        raise ValueError("gamma must not be 1: that leaves the image as it is")
    return Transform(_text("gamma", g), {"gamma": (min(g, 1 / g), max(g, 1 / g))})


def Blur(sigma: float) -> Transform:
    """Gaussian blur with a standard deviation in [0, sigma] pixels; sigma in (0, 32]."""
    s = checks.real("blur", sigma, above=0, most=32)
    return Transform(_text("blur", s), {"blur": (0.0, s)})


def GaussianNoise(sigma: float) -> Transform:
    """Normal noise with a standard deviation in [0, sigma]; sigma in (0, 1]. CIFAR-10-C: .04 .06 .08 .09 .10."""
    s = checks.real("gaussian_noise", sigma, above=0, most=1)
    return Transform(_text("gaussian_noise", s), {"gaussian_noise": (0.0, s)})


def ShotNoise(photons: float) -> Transform:
    """Noise of counting at least `photons` photons at white, 1/photons drawn from [0, 1/photons]; photons > 0.

    Normal of variance pixel / photons, the limit of Poisson's. CIFAR-10-C, by Poisson's: 500 250 100 75 50.
    """
    p = checks.real("shot_noise", photons, above=0)
    return Transform(_text("shot_noise", p), {"shot_noise": (0.0, 1 / p)})


def ImpulseNoise(share: float) -> Transform:
    """A share in [0, share] of the values made 0 or 1, as many of each; in (0, 1]. CIFAR-10-C: .01 .02 .03 .05 .07."""
    s = checks.real("impulse_noise", share, above=0, most=1)
    return Transform(_text("impulse_noise", s), {"impulse_noise": (0.0, s)})


def DefocusBlur(radius: float) -> Transform:
    """Spread over a disk of a radius in [0, radius] pixels, smooth over a pixel at its edge; radius in (0, 32].

    CIFAR-10-C: .3 .4 .5 1 1.5, its edges smoothed by a Gaussian of .4 .5 .6 .2 .1.
    """
    r = checks.real("defocus_blur", radius, above=0, most=32)
    return Transform(_text("defocus_blur", r), {"defocus_blur": (0.0, r)})


def MotionBlur(length: float) -> Transform:
    """Spread evenly along a segment of a length in [0, length] pixels, at an angle in ±45 degrees; in (0, 64].

    CIFAR-10-C draws the same angles, but spreads to one side by a Gaussian of 1 1.5 2 2 2.5 pixels.
    """
    v = checks.real("motion_blur", length, above=0, most=64)
    return Transform(_text("motion_blur", v), {"motion_blur": (0.0, v), "motion_angle": (-45.0, 45.0)})


def Fog(thickness: float) -> Transform:
    """(x + t p) m / (m + t), p a random field from 0 to 1, m the brightest value, t in [0, thickness]; in (0, 10].

    CIFAR-10-C: .2 .5 .75 1 1.5, with a field by midpoint displacement, whose detail grows with the severity.
    """
    t = checks.real("fog", thickness, above=0, most=10)
    return Transform(_text("fog", t), {"fog": (0.0, t)})


def Pixelate(kept: float) -> Transform:
    """Painted with the means of cells, a share in [kept, 1] of the pixels each way; kept in (0, 1).

    CIFAR-10-C: .95 .9 .85 .75 .65, resampling by boxes down and up again.
    """
    k = checks.real("pixelate", kept, above=0, below=1)
    return Transform(_text("pixelate", k), {"pixelate": (k, 1.0)})


def JpegCompression(quality: float) -> Transform:
    """JPEG at a quality in [quality, 100], rounded to whole numbers, 1 at least; in (0, 100].

    For 1 or 3 channels; colours keep their resolution. CIFAR-10-C: 80 65 58 50 40, with half of it each way.
    """
    q = checks.real("jpeg_compression", quality, above=0, most=100)
    return Transform(_text("jpeg_compression", q), {"jpeg_compression": (q, 100.0)})


KINDS: dict[str, Callable[[float], Transform]] = {
    "rotation": Rotation,
    "translation": Translation,
    "scale": Scale,
    "brightness": Brightness,
    "contrast": Contrast,
    "gamma": Gamma,
    "blur": Blur,
    "gaussian_noise": GaussianNoise,
    "shot_noise": ShotNoise,
    "impulse_noise": ImpulseNoise,
    "defocus_blur": DefocusBlur,
    "motion_blur": MotionBlur,
    "fog": Fog,
    "pixelate": Pixelate,
    "jpeg_compression": JpegCompression,
}


def parse(text: str) -> Transform:
    """The transform written as `kind:value` pairs joined by commas, as in "rotation:10,brightness:0.2".

    Raises:
        TypeError: `text` is not a string.
        ValueError: an unknown kind, a value that is not a number or out of range, or a kind given twice.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string of kind:value pairs, got {type(text).__name__}")
    transforms = []
    for part in text.split(","):
        kind, _, value = (piece.strip() for piece in part.partition(":"))
        if kind not in KINDS:
            raise ValueError(f"transform must be one of {', '.join(KINDS)} as kind:value, got {part.strip()!r}")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"transform {kind} must have a number, as {kind}:0.5, got {value!r}") from None
        transforms.append(KINDS[kind](number))
    return functools.reduce(operator.or_, transforms)


def _around_one(name: str, value: float) -> tuple[float, float]:
    reach = round(abs(1 - value), 12)  # so that 0.9 and 1.1 give one interval
    if reach == 0:
        raise ValueError(f"{name} must not be 1: that leaves the image as it is")
    return 1 - reach, 1 + reach


def _text(kind: str, value: float) -> str:
    return f"{kind}:{value!r}".removesuffix(".0")


__all__ = [
    "KINDS",
    "Blur",
    "Brightness",
    "Contrast",
    "DefocusBlur",
    "Fog",
    "Gamma",
    "GaussianNoise",
    "ImpulseNoise",
    "JpegCompression",
    "MotionBlur",
    "Pixelate",
    "Rotation",
    "Scale",
    "ShotNoise",
    "Transform",
    "Translation",
    "parse",
]
