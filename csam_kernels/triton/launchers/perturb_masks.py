"""Mask perturbation: one launch, three with the adversarial arm's norm."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels.checks import no_float64
from csam_kernels.triton.launchers.mask_layers import alone
from csam_kernels.triton.launchers.mask_step import mask_step


def perturb_masks(
    masks: list[Tensor],
    kind: str,
    radius: float,
    rho: float,
    grads: list[Tensor],
    norm: str,
    seed: int,
    step: int,
) -> list[Tensor]:
    no_float64(masks=masks)
    masks = [m.contiguous() for m in masks]
    grads = [g.contiguous() for g in grads]
    outs = [torch.empty_like(m) for m in masks]
    mask_step([alone(m) for m in masks], outs, kind, radius, rho, grads, norm, seed, step, weighted=False)
    return outs
