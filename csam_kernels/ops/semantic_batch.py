"""Semantic transforms of one image, one parameter row a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels import backend, checks

SEMANTIC_COLUMNS = (
    "rotation",
    "translate_x",
    "translate_y",
    "scale",
    "blur",
    "contrast",
    "brightness",
    "gamma",
)
SEMANTIC_NEUTRAL = (0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0)


def semantic_batch(x: Tensor, params: Tensor) -> Tensor:
    """Transformed copies of one image: geometry, blur, contrast, brightness, gamma, in that order.

    out[i] = clip(contrast * (G_blur * T(x)) + brightness, 0, 1) ** gamma, where T is one bilinear resampling about
    the image centre with zeros outside, and G_blur a separable Gaussian of radius ceil(3 * blur) pixels with
    replicated edges. The transforms are those of CC-Cert (Pautov et al., AAAI 2022); their order is ours.

    Callers whose parameters are known to be valid call `torch.ops.csam.semantic_batch`, which reads none of them back.

    Args:
        x: image [C, H, W], pixels in [0, 1]; float32.
        params: [n, 8], columns as in `SEMANTIC_COLUMNS`: rotation (degrees, counter-clockwise), translate_x and
            translate_y (fractions of the width and the height; the content moves right and down), scale (> 0,
            above 1 enlarges), blur (standard deviation in pixels, 0 for none, at most 32), contrast (factor),
            brightness (added), gamma (exponent, > 0).

    Returns:
        float32 [n, C, H, W] in [0, 1].

    Raises:
        TypeError, ValueError: wrong shapes or dtypes, a non-finite parameter, a scale or gamma <= 0, a blur outside
            [0, 32].
    """
    checks.tensor("x", x, dtypes=(torch.float32,), ndim=3)
    checks.tensor("params", params, dtypes=(torch.float32, torch.float64), ndim=2)
    if params.shape[1] != len(SEMANTIC_COLUMNS):
        raise ValueError(
            f"params must be [n, {len(SEMANTIC_COLUMNS)}] with columns {', '.join(SEMANTIC_COLUMNS)}, "
            f"got shape {tuple(params.shape)}"
        )
    checks.same_device(x=x, params=params)
    params = params.to(torch.float32)  # what the kernels read
    _, _, _, scale, blur, _, _, gamma = params.unbind(1)
    wrong = torch.stack((scale <= 0, (blur < 0) | (blur > 32), gamma <= 0))
    if bool((wrong.any(0) | ~torch.isfinite(params).all(1)).any()):  # the one wait for the device
        raise ValueError(_fault(params, wrong))
    result: Tensor = _op(x, params)
    return result


def _fault(params: Tensor, wrong: Tensor) -> str:
    """What is wrong with the parameters; `wrong` [3, n] for scale, blur and gamma."""
    if not bool(torch.isfinite(params).all()):
        return "params must be finite, got NaN or inf"
    limits = (("scale", "> 0"), ("blur", "in [0, 32]"), ("gamma", "> 0"))
    (name, want), bad = next((limit, bad) for limit, bad in zip(limits, wrong, strict=True) if bool(bad.any()))
    row = int(bad.int().argmax())
    value = float(params[row, SEMANTIC_COLUMNS.index(name)])
    return f"params column {name} must be {want}, got {value:g} in row {row}"


@torch.library.custom_op("csam::semantic_batch", mutates_args=())
def _op(x: Tensor, params: Tensor) -> Tensor:
    return backend.serve("semantic_batch", x.device)(x, params)


@_op.register_fake
def _(x: Tensor, params: Tensor) -> Tensor:
    return torch.empty((params.shape[0], *x.shape), dtype=torch.float32, device=x.device)
