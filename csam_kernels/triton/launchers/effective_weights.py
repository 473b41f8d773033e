"""Effective weights: one launch, three with the adversarial arm's norm; a broadcast mask is read where it applies."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels.checks import no_float64
from csam_kernels.layout import mask_layout
from csam_kernels.triton.launchers.mask_layers import lay, like
from csam_kernels.triton.launchers.mask_step import mask_step
from csam_kernels.triton.launchers.perturb_masks import perturb_masks


def effective_weights(
    weights: list[Tensor],
    masks: list[Tensor],
    kind: str,
    radius: float,
    rho: float,
    grads: list[Tensor],
    norm: str,
    seed: int,
    step: int,
    dtype: torch.dtype | None,
    block_size: int,
) -> list[Tensor]:
    no_float64(weights=weights)
    if kind != "plain":
        no_float64(masks=masks)
        if any(mask_layout(w.shape, m.shape, block_size) is None for w, m in zip(weights, masks, strict=True)):
            masks = perturb_masks(masks, kind, radius, rho, grads, norm, seed, step)
            kind, grads = "plain", []
    layers = [lay(w, m, block_size) for w, m in zip(weights, masks, strict=True)]
    grads = [like(g, layer.mask) for g, layer in zip(grads, layers, strict=bool(grads))]
    outs = [torch.empty_like(layer.weight, dtype=dtype or layer.weight.dtype) for layer in layers]
    mask_step(layers, outs, kind, radius, rho, grads, norm, seed, step, weighted=True)
    return outs
