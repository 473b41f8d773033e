"""Vote counting on the device: nothing is read back, so votes of many batches gather in one `out`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csam_kernels.triton import tuning
from csam_kernels.triton.kernels.count_votes import count_votes as kernel
from csam_kernels.triton.launch import LIMIT, launch


def count_votes(logits: Tensor, out: Tensor) -> None:
    n, classes = logits.shape
    if n > LIMIT:
        raise ValueError(f"logits must have at most 2^31 - 2^22 rows on a GPU, got {n}; count them in parts")
    table = tuning.COUNT_VOTES[tuning.device_class(logits.device)]
    row = next(row for most, row in table.items() if classes <= most)
    block = min(triton.next_power_of_2(classes), row["BLOCK"])
    rows = row["values"] // block
    launch(
        kernel,
        (min(triton.cdiv(n, rows), row["programs"]),),
        reads=[logits, out],
        writes=[out],
        num_warps=row["num_warps"],
        logits_ptr=logits,
        out_ptr=out,
        n=n,
        classes=classes,
        row_stride=logits.stride(0),
        col_stride=logits.stride(1),
        COMPUTE=tl.float64 if logits.dtype is torch.float64 else tl.float32,
        ROWS=rows,
        BLOCK=block,
        BINS=triton.next_power_of_2(classes) if row["histogram"] else 0,
    )
