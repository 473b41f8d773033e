"""Corruptions after Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019), as random transforms: what CIFAR-10-C fixes by a severity is drawn anew for every copy.

The order is fixed: defocus, motion blur, fog, shot noise, Gaussian noise, impulse noise, pixelation, JPEG: the way of
light, then sensor and file. Each gives pixels in [0, 1], not rounded to 8 bits. Definitions are ours where theirs needs
another program or pictures; the functions below say what differs.

Random numbers are Philox words of (seed, stream, sample) and of the kind, so no draw depends on the other copies of a
batch or on what it is composed with. Copies meet elementwise additions, products, divisions and square roots alone, in
a fixed order, which torch rounds correctly: batch size and threads change no bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import csam_kernels
from csam.smoothing import sent

# In the order in which they are applied; each but the angle (degrees, counter-clockwise) is the strength of a kind.
COLUMNS = (
    "defocus_blur",
    "motion_blur",
    "motion_angle",
    "fog",
    "shot_noise",
    "gaussian_noise",
    "impulse_noise",
    "pixelate",
    "jpeg_compression",
)
TINY = torch.finfo(torch.float32).tiny


def corrupted(x: Tensor, drawn: Mapping[str, Tensor], *, seed: int, first_sample: int = 0, stream: int = 0) -> Tensor:
    """Copies with corruptions of the drawn strengths; copy i is sample first_sample + i of (seed, stream).

    Args:
        x: [n, C, H, W] in [0, 1], float32.
        drawn: column of `COLUMNS` -> strength of each copy, float32 [n] on the CPU; missing kinds are left out.

    Returns:
        float32 [n, C, H, W] in [0, 1].

    Raises:
        TypeError, ValueError: a seed, sample or stream out of range; jpeg_compression of other than 1 or 3 channels.
    """
    n, *shape = x.shape

    def strength(kind: str) -> Tensor:
        return sent(drawn[kind].view(n, 1, 1, 1), x.device)

    def own(kind: str) -> int:  # a seed for each kind
        return seed ^ int.from_bytes(kind.encode()[:8])

    def normal(kind: str) -> Tensor:
        black = torch.zeros(shape, dtype=torch.float32, device=x.device)
        return csam_kernels.smoothing_noise(black, n, 1.0, seed=own(kind), first_sample=first_sample, stream=stream)

    def uniform(kind: str, k: int) -> Tensor:
        u = csam_kernels.philox_uniform(n, k, seed=own(kind), first_sample=first_sample, stream=stream)
        return sent(u, x.device)

    if "defocus_blur" in drawn:
        x = _spread(x, _disk(drawn["defocus_blur"]))
    if "motion_blur" in drawn:
        x = _spread(x, _segment(drawn["motion_blur"], drawn["motion_angle"]))
    if "fog" in drawn:
        x = _fog(x, strength("fog"), uniform("fog", _corners(max(shape[1:]))))
    if "shot_noise" in drawn:
        x = (x + (x * strength("shot_noise")).sqrt() * normal("shot_noise")).clamp(0, 1)
    if "gaussian_noise" in drawn:
        x = (x + strength("gaussian_noise") * normal("gaussian_noise")).clamp(0, 1)
    if "impulse_noise" in drawn:
        half, u = strength("impulse_noise") / 2, uniform("impulse_noise", math.prod(shape)).view_as(x)
        x = torch.where(u < half, 0.0, torch.where(u >= 1 - half, 1.0, x))
    if "pixelate" in drawn:
        for dim in (2, 3):
            x = _cell_means(x, drawn["pixelate"], dim)
    if "jpeg_compression" in drawn:
        x = _jpeg(x, drawn["jpeg_compression"])
    return x


def _offsets(reach: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the offsets in [-reach, reach]^2, float32 [2 reach + 1] squared."""
    steps = torch.arange(-reach, reach + 1, dtype=torch.float32, device="cpu")
    down, right = torch.meshgrid(steps, steps, indexing="ij")
    return down, right


def _disk(radius: Tensor) -> Tensor:
    """Weights [n, K, K] of a disk whose edge falls off over a pixel; nothing is spread up to a radius of 1/2."""
    down, right = _offsets(math.ceil(float(radius.max()) + 0.5) if len(radius) else 0)
    return (radius.view(-1, 1, 1) + 0.5 - (down * down + right * right).sqrt()).clamp(0, 1)


def _segment(length: Tensor, angle: Tensor) -> Tensor:
    """Weights [n, K, K] of a segment through the middle, a pixel wide to either side of which they fall to 0."""
    down, right = _offsets(math.ceil(float(length.max()) / 2 + 1) if len(length) else 0)
    turns = [math.radians(a) for a in angle.tolist()]
    cosine, sine = (length.new_tensor([f(t) for t in turns]).view(-1, 1, 1) for f in (math.cos, math.sin))
    along, across = right * cosine - down * sine, right * sine + down * cosine
    beyond = (along.abs() - length.view(-1, 1, 1) / 2).clamp(min=0)
    return (1 - (beyond * beyond + across * across).sqrt()).clamp(min=0)


def _spread(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted means of each copy's neighbourhoods, edges replicated; weights [n, K, K] on the CPU, K odd."""
    reach = weights.shape[1] // 2
    used = weights.flatten(1).any(0).nonzero().flatten().tolist()
    columns = [weights.flatten(1)[:, k] for k in used]
    total = sum(columns, weights.new_zeros(len(x)))
    shares = [column / total for column in columns]
    sums, edged = torch.zeros_like(x), F.pad(x, (reach, reach, reach, reach), mode="replicate")
    for k, share in zip(used, sent(torch.stack(shares), x.device) if shares else (), strict=True):
        i, j = divmod(k, weights.shape[2])
        sums = sums + share.view(-1, 1, 1, 1) * edged[:, :, i : i + x.shape[2], j : j + x.shape[3]]
    return sums.clamp(0, 1)  # the shares add up to 1 but for rounding


def _octaves(size: int) -> range:
    return range(max(1, (size - 1).bit_length()))


def _corners(size: int) -> int:
    """Uniform numbers that `_plasma` takes for an image of this size."""
    return sum((2**k + 1) ** 2 for k in _octaves(size))


def _plasma(corners: Tensor, height: int, width: int) -> Tensor:
    """Random fields [n, 1, height, width] from 0 to 1: grids of 2^k cells a side, each half as strong as the last."""
    field, used = corners.new_zeros(len(corners), height, width), 0

    def between(size: int, cells: int) -> tuple[Tensor, Tensor]:
        at = torch.arange(size, dtype=torch.float32, device=corners.device) * cells / max(1, size - 1)
        first = at.floor().clamp(max=cells - 1)
        return first.long(), at - first

    for k in _octaves(max(height, width)):
        cells = 2**k
        grid = corners[:, used : used + (cells + 1) ** 2].view(-1, cells + 1, cells + 1)
        used += (cells + 1) ** 2
        (row, down), (column, right) = between(height, cells), between(width, cells)
        lines = grid[:, row] * (1 - down)[:, None] + grid[:, row + 1] * down[:, None]
        field = field + (lines[:, :, column] * (1 - right) + lines[:, :, column + 1] * right) / cells
    low, high = field.amin((1, 2), keepdim=True), field.amax((1, 2), keepdim=True)
    return ((field - low) / (high - low).clamp(min=TINY))[:, None]


def _fog(x: Tensor, thickness: Tensor, corners: Tensor) -> Tensor:
    brightest = x.amax((1, 2, 3), keepdim=True)
    lit = x + thickness * _plasma(corners, *x.shape[2:])
    return (lit * brightest / (brightest + thickness).clamp(min=TINY)).clamp(0, 1)


def _cell_means(x: Tensor, kept: Tensor, dim: int) -> Tensor:
    """Each pixel the mean of its cell along `dim`: floor(kept * size) cells, at least one, as equal as can be."""
    size = x.shape[dim]
    cells = (kept * size).long().clamp(1, size)[:, None]
    cell = torch.arange(size, device="cpu") * cells // size
    first, end = ((cell * size + cells - 1) // cells), (((cell + 1) * size + cells - 1) // cells)
    shape = [len(x), 1, 1, 1]
    shape[dim] = size
    total = torch.zeros_like(x)
    for step in range(int((end - first).max()) if len(x) else 0):
        at = sent((first + step).clamp(max=size - 1).view(shape), x.device)
        inside = sent((first + step < end).to(torch.float32).view(shape), x.device)
        total = total + x.gather(dim, at.expand_as(x)) * inside
    return (total / sent((end - first).to(torch.float32).view(shape), x.device)).clamp(0, 1)


# Quantisation of luminance and chrominance at quality 50: ITU-T T.81, tables K.1 and K.2.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99,) * 8] * 4,
)


def _jpeg(x: Tensor, quality: Tensor) -> Tensor:
    """Through JPEG's transform and quantisation at the quality of libjpeg, rounded to whole numbers in 1 .. 100."""
    n, channels, height, width = x.shape
    if channels not in (1, 3):
        raise ValueError(f"jpeg_compression needs images of 1 or 3 channels, got {channels}")
    levels = (x * 255).round()
    planes = levels if channels == 1 else _to_ycc(levels)
    padded = F.pad(planes, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = padded.reshape(n, channels, padded.shape[2] // 8, 8, padded.shape[3] // 8, 8) - 128

    q = quality.round().long().clamp(1, 100).view(-1, 1, 1, 1)
    scale = torch.where(q < 50, 5000 // q, 200 - 2 * q)
    base = torch.tensor([_LUMINANCE, _CHROMINANCE, _CHROMINANCE][:channels], device="cpu")
    table = ((base * scale + 50) // 100).clamp(1, 255).to(torch.float32).view(n, channels, 1, 8, 1, 8)
    table = sent(table, x.device)

    halves = [[math.cos((2 * j + 1) * k * math.pi / 16) / (2 if k else 8**0.5) for j in range(8)] for k in range(8)]
    basis = sent(torch.tensor(halves, dtype=torch.float32, device="cpu"), x.device)
    cosines = _along(_along(blocks, basis, 3), basis, 5)
    kept = (cosines / table).round() * table
    back = _along(_along(kept, basis.T, 3), basis.T, 5) + 128
    planes = back.round().clamp(0, 255).reshape(padded.shape)[:, :, :height, :width]
    return (planes if channels == 1 else _to_rgb(planes)) / 255


def _along(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """The matrix [8, 8] times each line of 8 along `dim`, summed in order."""
    shape = [1] * x.dim()
    shape[dim] = 8
    total = torch.zeros_like(x)
    for j in range(8):
        total = total + x.narrow(dim, j, 1) * matrix[:, j].reshape(shape)
    return total


def _to_ycc(levels: Tensor) -> Tensor:
    """Levels 0 .. 255 of RGB as those of YCbCr (JFIF)."""
    r, g, b = levels.unbind(1)
    y = r * 0.299 + g * 0.587 + b * 0.114
    cb = b * 0.5 - r * 0.168736 - g * 0.331264 + 128
    cr = r * 0.5 - g * 0.418688 - b * 0.081312 + 128
    return torch.stack((y, cb, cr), 1).round().clamp(0, 255)


def _to_rgb(planes: Tensor) -> Tensor:
    y, cb, cr = planes[:, 0], planes[:, 1] - 128, planes[:, 2] - 128
    rgb = (y + cr * 1.402, y - cb * 0.344136 - cr * 0.714136, y + cb * 1.772)
    return torch.stack(rgb, 1).round().clamp(0, 255)


__all__ = ["COLUMNS", "corrupted"]
