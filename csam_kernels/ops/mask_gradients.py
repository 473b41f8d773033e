"""The mask-perturbation gradient: everything that follows from G = dL/dW in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csam_kernels import backend, checks
from csam_kernels.layout import fake_like, fake_mask_gradient


def mask_gradients(
    grad_weights: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    block_size: int | None = None,
    need_weight: bool = True,
    need_mask: bool = True,
) -> tuple[list[Tensor] | None, list[Tensor] | None, Tensor]:
    """dL/dtheta = G * M, dL/dM = G * theta (summed over the broadcast) and ||dL/dM||^2, for W = theta * M.

    Args:
        grad_weights: G = dL/dW, one a layer, of the weight's shape; float32, float64, bfloat16 or float16.
        weights: theta, float32 or float64.
        masks: M, as in `effective_weights`.
        block_size: as in `effective_weights`.
        need_weight, need_mask: leave out a result that nobody reads; its place holds None.

    Returns:
        (dtheta, dmask, norm_sq): lists in the weights' dtype, and the float64 sum of squares over all layers. The sum
        is taken over fixed chunks in a fixed order, so it has the same bits for any number of threads.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not go together, by name.
    """
    weights = checks.tensors("weights", weights, dtypes=(torch.float32, torch.float64))
    grad_weights = checks.tensors("grad_weights", grad_weights)
    masks = checks.tensors("masks", masks, dtypes=(torch.bool, *checks.FLOATS))
    checks.same_length(grad_weights=grad_weights, weights=weights, masks=masks)
    block = checks.block_size(block_size)
    masks = [checks.mask_for(f"masks[{i}]", m, weights[i], block) for i, m in enumerate(masks)]
    for i, (g, w) in enumerate(zip(grad_weights, weights, strict=True)):
        if g.shape != w.shape:
            raise ValueError(f"grad_weights[{i}] must have shape {tuple(w.shape)}, got {tuple(g.shape)}")
    checks.flag("need_weight", need_weight)
    checks.flag("need_mask", need_mask)
    checks.same_device(grad_weights=grad_weights, weights=weights, masks=masks)
    dtheta, dmask, norm = _op(grad_weights, weights, masks, block, need_weight, need_mask)
    return (dtheta if need_weight else None), (dmask if need_mask else None), norm


@torch.library.custom_op("csam::mask_gradients", mutates_args=())
def _op(
    grad_weights: list[Tensor],
    weights: list[Tensor],
    masks: list[Tensor],
    block_size: int,
    need_weight: bool,
    need_mask: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    if not weights:
        return [], [], torch.zeros((), dtype=torch.float64)
    serve = backend.serve("mask_gradients", weights[0].device)
    return serve(grad_weights, weights, masks, block_size, need_weight, need_mask)


@_op.register_fake
def _(
    grad_weights: list[Tensor],
    weights: list[Tensor],
    masks: list[Tensor],
    block_size: int,
    need_weight: bool,
    need_mask: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    dtheta = [fake_like(w) for w in weights] if need_weight else []
    pairs = zip(weights, masks, strict=need_mask)
    dmask = [fake_mask_gradient(m, w, w.dtype) for w, m in pairs] if need_mask else []
    device = weights[0].device if weights else None
    return dtheta, dmask, torch.empty((), dtype=torch.float64, device=device)
