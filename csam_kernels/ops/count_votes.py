"""Vote counting for randomized smoothing."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels import backend, checks


def count_votes(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """Histogram of argmax over classes: out[c] += #{i : argmax(logits[i]) = c}.

    The lowest index wins ties. A row that holds NaN casts no vote, so that counts short of the number of samples
    expose a broken model.

    Args:
        logits: [n, K].
        out: int64 [K] to add to; default zeros.

    Returns:
        int64 [K]: `out` itself when given.

    Raises:
        TypeError, ValueError: logits not [n, K] with K >= 1, or out not a contiguous int64 [K] on its device.
    """
    checks.tensor("logits", logits, ndim=2)
    classes = logits.shape[1]
    if classes < 1:
        raise ValueError(f"logits must be [n, K] with K >= 1, got shape {tuple(logits.shape)}")
    if out is None:
        out = torch.zeros(classes, dtype=torch.int64, device=logits.device)
    checks.tensor("out", out, dtypes=(torch.int64,), ndim=1)
    if out.numel() != classes or not out.is_contiguous():
        came = f"shape {tuple(out.shape)}, stride {out.stride()}"
        raise ValueError(f"out must be a contiguous int64 [{classes}], got {came}")
    checks.same_device(logits=logits, out=out)
    _op(logits.detach(), out)
    return out


@torch.library.custom_op("csam::count_votes", mutates_args=("out",))
def _op(logits: Tensor, out: Tensor) -> None:
    backend.serve("count_votes", logits.device)(logits, out)


@_op.register_fake
def _(logits: Tensor, out: Tensor) -> None:
    return None
