"""Percentile-scaled initial masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csam_kernels import backend, checks


def percentile_init(weights: Sequence[Tensor], tau: float = 0.9) -> list[Tensor]:
    """C_l = clip(|theta_l| / Q(|theta_l|, tau), 0, 1) for every layer [P; tau = 0.9 E].

    Q is the tau-quantile of the layer's magnitudes with linear interpolation, as torch.quantile's (which refuses
    more than 16 million values). A layer whose quantile is zero gets 1 where its weight is non-zero.

    Args:
        weights: float32 or float64 tensors of any shape.
        tau: in (0, 1].

    Returns:
        Soft masks of the weights' shapes and dtypes, in [0, 1].

    Raises:
        TypeError, ValueError: tau outside (0, 1], NaN or infinite weights.
    """
    weights = checks.tensors("weights", weights, dtypes=(torch.float32, torch.float64))
    tau = checks.real("tau", tau, above=0, most=1)
    checks.same_device(weights=weights)
    result: list[Tensor] = _op([w.detach() for w in weights], tau)
    return result


@torch.library.custom_op("csam::percentile_init", mutates_args=())
def _op(weights: list[Tensor], tau: float) -> list[Tensor]:
    if not weights:
        return []
    finite = [torch.linalg.vector_norm(w, torch.inf).isfinite() for w in weights if w.numel()]
    if finite and not bool(torch.stack(finite).all()):  # the one wait for the device
        i = next(i for i, w in enumerate(weights) if not bool(w.isfinite().all()))
        raise ValueError(f"weights[{i}] must be finite, got NaN or inf")
    return backend.serve("percentile_init", weights[0].device)(weights, tau)


@_op.register_fake
def _(weights: list[Tensor], tau: float) -> list[Tensor]:
    return [torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in weights]
