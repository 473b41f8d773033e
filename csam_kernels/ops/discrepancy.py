"""How far a network's softmax moves: what CC-Cert measures of each drawn transform."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels import backend, checks


def discrepancy(clean: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Y[i] = max_c |softmax(logits[i])_c - softmax(clean)_c| in float64, and whether the prediction changes.

    Y is the discrepancy of CC-Cert (Pautov et al., AAAI 2022). Row i depends on `clean` and logits[i] only, so logits
    can be reduced a tile at a time. Logits are widened to float64 before the softmax; the lowest index wins ties.

    Args:
        clean: logits of the untouched image, [K].
        logits: of its transformed copies, [n, K].

    Returns:
        (Y float64 [n], bool [n]): a row whose probabilities are NaN, or all rows where those of `clean` are, has
        Y = NaN and False.

    Raises:
        TypeError, ValueError: clean not [K] or logits not [n, K] with K >= 1, or not on one device.
    """
    checks.tensor("clean", clean, ndim=1)
    checks.tensor("logits", logits, ndim=2)
    if logits.shape[1] < 1 or clean.shape[0] != logits.shape[1]:
        came = f"shapes {tuple(clean.shape)} and {tuple(logits.shape)}"
        raise ValueError(f"clean must be [K] and logits [n, K] with K >= 1, got {came}")
    checks.same_device(clean=clean, logits=logits)
    result: tuple[Tensor, Tensor] = _op(clean.detach(), logits.detach())
    return result


@torch.library.custom_op("csam::discrepancy", mutates_args=())
def _op(clean: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return backend.serve("discrepancy", logits.device)(clean, logits)


@_op.register_fake
def _(clean: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    rows = logits.new_empty(len(logits), dtype=torch.float64)
    return rows, torch.empty_like(rows, dtype=torch.bool)
