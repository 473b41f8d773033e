"""Semantic transforms: three launches whatever the parameters, the last two empty where no copy blurs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from csam_kernels.triton import tuning
from csam_kernels.triton.kernels import semantic_batch as kernels
from csam_kernels.triton.launch import LIMIT, launch


def semantic_batch(x: Tensor, params: Tensor) -> Tensor:
    channels, height, width = x.shape
    if x.numel() > LIMIT:
        raise ValueError(f"x must have at most 2^31 - 2^22 elements on a GPU, got shape {tuple(x.shape)}")
    n = len(params)
    x, params = x.contiguous(), params.contiguous()
    out = torch.empty((n, *x.shape), dtype=torch.float32, device=x.device)
    scratch = torch.empty_like(out)  # touched for the copies that blur, and for no others
    row = tuning.SEMANTIC_BATCH[tuning.device_class(x.device)]
    tiles = triton.cdiv(height * width, row["BLOCK"])
    sizes = {"params_ptr": params, "channels": channels, "height": height, "width": width, "tiles": tiles, **row}
    launch(
        kernels.transform,
        (n * tiles,),
        reads=[x, params],
        writes=[out],
        flops=20 * n * height * width + 12 * out.numel(),
        x_ptr=x,
        out_ptr=out,
        **sizes,
    )
    for source, target, vertical in ((out, scratch, False), (scratch, out, True)):
        launch(
            kernels.blur,
            (n * tiles,),
            reads=[params],
            writes=[],
            in_ptr=source,
            out_ptr=target,
            VERTICAL=vertical,
            **sizes,
        )
    return out
