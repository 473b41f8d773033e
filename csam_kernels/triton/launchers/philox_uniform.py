"""Uniform numbers, on the CPU as the operation promises: drawn on the GPU where there is one."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from csam_kernels import backend
from csam_kernels.checks import WORD
from csam_kernels.triton import tuning
from csam_kernels.triton.kernels.philox_uniform import philox_uniform as kernel
from csam_kernels.triton.launch import launch


def philox_uniform(n: int, k: int, seed: int, first_sample: int, stream: int) -> Tensor:
    on_gpu = torch.cuda.is_available() and not backend.INTERPRETED
    out = torch.empty(n, k, dtype=torch.float32, device="cuda" if on_gpu else "cpu")
    row = tuning.PHILOX_UNIFORM[tuning.device_class(out.device)]
    launch(
        kernel,
        (triton.cdiv(n * triton.cdiv(k, 4), row["QUADS"]),),
        reads=[],
        writes=[out],
        out_ptr=out,
        n=n,
        k=k,
        first_sample=first_sample,
        seed=seed & WORD,
        stream_word=stream,
        **row,
    )
    return out.cpu()
