"""Exact top-k selection of mask scores without a sort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from csam_kernels import backend, checks

SCOPES = ("global", "layer")


def kept(sparsity: float, total: int) -> int:
    """ceil((1 - s) * N), computed on the decimal value of s that was written: 0.7 of 10 keeps exactly 3."""
    return math.ceil((1 - Fraction(repr(float(sparsity)))) * total)


def binarize(scores: Sequence[Tensor], sparsity: float, scope: str = "global") -> list[Tensor]:
    """Hard masks that keep the ceil((1 - s) * N) largest scores; the lowest index wins ties.

    scope "global": N counts the scores of all layers together, and the order of the list breaks ties between layers;
    "layer": every layer keeps its own share. Exact selection (no sort, no sampling error).

    Args:
        scores: float32, bfloat16 or float16 tensors of any shape.
        sparsity: share to remove, in [0, 1).
        scope: "global" or "layer".

    Returns:
        bool masks of the scores' shapes; the number of True is exactly `kept(sparsity, N)`.

    Raises:
        TypeError, ValueError: sparsity outside [0, 1), unknown scope, 2^32 scores or more, NaN scores on the CPU. On a
            GPU nothing waits for the scores' values: NaN ranks lowest there and is kept only after every number.
    """
    scores = checks.tensors("scores", scores, dtypes=(torch.float32, torch.bfloat16, torch.float16))
    sparsity = checks.sparsity(sparsity)
    checks.choice("scope", scope, SCOPES)
    checks.same_device(scores=scores)
    sizes = [s.numel() for s in scores]
    total = sum(sizes)
    if total >= 2**32:
        raise ValueError(f"scores must hold fewer than 2^32 values together, got {total}")
    keep = [kept(sparsity, total)] if scope == "global" else [kept(sparsity, size) for size in sizes]
    result: list[Tensor] = _op([s.detach() for s in scores], keep, scope)
    return result


@torch.library.custom_op("csam::binarize", mutates_args=())
def _op(scores: list[Tensor], keep: list[int], scope: str) -> list[Tensor]:
    if not scores:
        return []
    for i, s in enumerate(scores):
        if s.device.type == "cpu" and s.numel() and bool(torch.isnan(s.amax())):
            raise ValueError(f"scores[{i}] must hold no NaN")
    return backend.serve("binarize", scores[0].device)(scores, keep, scope)


@_op.register_fake
def _(scores: list[Tensor], keep: list[int], scope: str) -> list[Tensor]:
    return [torch.empty(s.shape, dtype=torch.bool, device=s.device) for s in scores]
