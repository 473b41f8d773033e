"""Percentile-scaled masks: two selections a layer for the quantile's neighbours, then one scaling launch."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from csam_kernels.checks import no_float64
from csam_kernels.triton import tables, tuning
from csam_kernels.triton.kernels.percentile_init import scale_by_quantile
from csam_kernels.triton.launch import launch
from csam_kernels.triton.launchers.mask_layers import aligned
from csam_kernels.triton.launchers.selection import select


def percentile_init(weights: list[Tensor], tau: float) -> list[Tensor]:
    no_float64(weights=weights)
    weights = [w.contiguous() for w in weights]
    outs = [torch.empty_like(w) for w in weights]
    pairs = [(w, out) for w, out in zip(weights, outs, strict=True) if w.numel()]
    if not pairs:
        return outs
    keep, rows = [], []
    for w, out in pairs:
        n = w.numel()
        position = tau * (n - 1)
        low = math.floor(position)
        keep += [n - low, n - min(low + 1, n - 1)]
        (share,) = struct.unpack("i", struct.pack("f", position - low))
        rows.append((w.data_ptr(), out.data_ptr(), n, share))
    chosen = select([w for w, _ in pairs for _ in range(2)], [], keep, "layer", magnitude=True)
    device = weights[0].device
    tune = tuning.MASKS[tuning.device_class(device)][True]
    table = tables.table(tuple(rows), device)
    chunks = tables.chunk_table(tuple(w.numel() for w, _ in pairs), tune["BLOCK"], device)
    launch(
        scale_by_quantile,
        (len(chunks),),
        reads=[*(w for w, _ in pairs), table, chunks],
        writes=[out for _, out in pairs],
        flops=2 * sum(w.numel() for w, _ in pairs),
        rows_ptr=table,
        chunks_ptr=chunks,
        state_ptr=chosen.state,
        ALIGNED=all(aligned(w.numel(), w, out) for w, out in pairs),
        enable_fp_fusion=False,
        **tune,
    )
    return outs
