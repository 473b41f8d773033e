"""Mask perturbation, both arms of C-SAM, over all layers in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csam_kernels import backend, checks

KINDS = ("uniform", "adversarial")
NORMS = ("global", "layer")


def perturb_masks(
    masks: Sequence[Tensor],
    *,
    kind: str,
    radius: float = 0.1,
    rho: float = 0.05,
    grads: Sequence[Tensor] | None = None,
    norm: str = "global",
    seed: int = 0,
    step: int = 0,
) -> list[Tensor]:
    """Perturbed soft masks C~, clipped to [0, 1], for a list of layers.

    uniform [P: C is a random variable with uniform noise; r = 0.1 R]: C~ = clip(C + u, 0, 1), u ~ U(-r, r),
    u = r * int32(word) / 2^31 with Philox words of key `seed` and counter (element//4, step low, step high, layer).
    adversarial [R: one SAM-style ascent step in mask space]: C~ = clip(C + rho * g / ||g||, 0, 1), the norm over
    all layers (`global`) or each layer's own (`layer`); a zero gradient leaves C as it is.

    Args:
        masks: float32 or float64 tensors of any shape.
        kind: "uniform" or "adversarial".
        radius: half-width r of the uniform noise, >= 0.
        rho: length of the ascent step, >= 0.
        grads: g = dL/dC, one a mask and of its shape; needed by "adversarial".
        norm: "global" or "layer".
        seed, step: of the uniform noise.

    Returns:
        New tensors of the masks' shapes and dtypes.

    Raises:
        TypeError, ValueError: unequal lists or shapes, several devices, an unknown kind, a negative radius or rho.
    """
    masks = checks.tensors("masks", masks, dtypes=(torch.float32, torch.float64))
    checks.choice("kind", kind, KINDS)
    checks.same_device(masks=masks)
    grads = check_perturbation(kind, masks, radius, rho, grads, norm)
    step = checks.integer("step", step, low=0)
    result: list[Tensor] = _op(masks, kind, float(radius), float(rho), grads, norm, checks.signed(seed), step)
    return result


def check_perturbation(
    kind: str, masks: list[Tensor], radius: float, rho: float, grads: Sequence[Tensor] | None, norm: str
) -> list[Tensor]:
    checks.real("radius", radius, least=0)
    checks.real("rho", rho, least=0)
    checks.choice("norm", norm, NORMS)
    if kind != "adversarial":
        return []
    if grads is None:
        raise ValueError("grads must be given for kind='adversarial': dL/dC, one tensor a mask")
    grads = checks.tensors("grads", grads, dtypes=(torch.float32, torch.float64))
    checks.same_length(masks=masks, grads=grads)
    for i, (m, g) in enumerate(zip(masks, grads, strict=True)):
        if m.shape != g.shape:
            raise ValueError(f"grads[{i}] must have its mask's shape {tuple(m.shape)}, got {tuple(g.shape)}")
    checks.same_device(masks=masks, grads=grads)
    return grads


@torch.library.custom_op("csam::perturb_masks", mutates_args=())
def _op(
    masks: list[Tensor],
    kind: str,
    radius: float,
    rho: float,
    grads: list[Tensor],
    norm: str,
    seed: int,
    step: int,
) -> list[Tensor]:
    if not masks:
        return []
    serve = backend.serve("perturb_masks", masks[0].device)
    return serve(masks, kind, radius, rho, grads, norm, seed, step)


@_op.register_fake
def _(
    masks: list[Tensor],
    kind: str,
    radius: float,
    rho: float,
    grads: list[Tensor],
    norm: str,
    seed: int,
    step: int,
) -> list[Tensor]:
    return [torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in masks]
