"""Effective weights of all masked layers in one pass: perturb, clip, multiply, cast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csam_kernels import backend, checks
from csam_kernels.layout import fake_like
from csam_kernels.ops.perturb_masks import KINDS, check_perturbation


def effective_weights(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    kind: str = "plain",
    radius: float = 0.1,
    rho: float = 0.05,
    grads: Sequence[Tensor] | None = None,
    norm: str = "global",
    seed: int = 0,
    step: int = 0,
    dtype: torch.dtype | None = None,
    block_size: int | None = None,
) -> list[Tensor]:
    """W_l = theta_l * M_l for a list of layers, rounded once to `dtype`; M is never written to memory.

    kind "plain": M = masks as they are (soft or hard). "uniform" and "adversarial": M = `perturb_masks(masks, ...)`,
    the same bits as that function gives. Not differentiable: make the results leaves and hand their gradients to
    `mask_gradients`, which applies the chain rule of csam.md in one pass.

    Args:
        weights: [O, ...] a layer, float32, float64, bfloat16 or float16.
        masks: one a layer, broadcastable axis by axis ([O,1,1,1] filter, [1,I,1,1] channel, full), float or bool;
            with block_size=n 2-D [O, ceil(cols/n)], one value for n consecutive weights of a flattened filter.
        kind: "plain", "uniform" or "adversarial"; the other options are those of `perturb_masks`.
        dtype: of the results; default each weight's.

    Returns:
        One tensor a layer, of the weight's shape; channels_last where the weight is, else contiguous.

    Raises:
        TypeError, ValueError: a mask that does not lie over its weight, unequal lists, unknown kind.
    """
    weights = checks.tensors("weights", weights)
    checks.choice("kind", kind, ("plain", *KINDS))
    masks = checks.tensors("masks", masks, dtypes=(torch.bool, *checks.FLOATS))
    checks.same_length(weights=weights, masks=masks)
    block = checks.block_size(block_size)
    masks = [checks.mask_for(f"masks[{i}]", m, weights[i], block) for i, m in enumerate(masks)]
    checks.same_device(weights=weights, masks=masks)
    if kind != "plain":
        checks.tensors("masks", masks, dtypes=(torch.float32, torch.float64))
    grads = check_perturbation(kind, masks, radius, rho, grads, norm)
    if dtype is not None:
        checks.choice("dtype", dtype, checks.FLOATS)
    step = checks.integer("step", step, low=0)
    args = (weights, masks, kind, float(radius), float(rho), grads, norm, checks.signed(seed), step, dtype, block)
    result: list[Tensor] = _op(*args)
    return result


@torch.library.custom_op("csam::effective_weights", mutates_args=())
def _op(
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
    if not weights:
        return []
    serve = backend.serve("effective_weights", weights[0].device)
    return serve(weights, masks, kind, radius, rho, grads, norm, seed, step, dtype, block_size)


@_op.register_fake
def _(
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
    return [fake_like(w, dtype) for w in weights]
