"""The launch behind perturb_masks and effective_weights: one a combination of dtypes, however many layers."""

from __future__ import annotations

from torch import Tensor

from csam_kernels.checks import WORD
from csam_kernels.triton import tuning
from csam_kernels.triton.kernels.mask_step import mask_step as kernel
from csam_kernels.triton.launch import launch
from csam_kernels.triton.launchers.mask_layers import TYPES, Laid, aligned, ascent_scales, chunked, grouped, row

_FLOPS = {"plain": 1, "uniform": 5, "adversarial": 5}


def mask_step(
    layers: list[Laid],
    outs: list[Tensor],
    kind: str,
    radius: float,
    rho: float,
    grads: list[Tensor],
    norm: str,
    seed: int,
    step: int,
    weighted: bool,
) -> None:
    """outs = clip(mask + push, 0, 1), times the weight where `weighted`; grads in their masks' memory order."""
    scales = ascent_scales(grads, rho, norm) if kind == "adversarial" else None
    given = [grads[i] if grads else None for i in range(len(layers))]
    keys = [
        (
            lay.weight.dtype if weighted else None,
            lay.mask.dtype,
            None if grad is None else grad.dtype,
            out.dtype,
            lay.flat and not (kind == "uniform" and lay.in_place),  # noise is drawn by the logical index
            aligned(out.numel(), lay.weight, lay.mask, grad, out),
        )
        for lay, grad, out in zip(layers, given, outs, strict=True)
    ]
    for (weight_type, mask_type, grad_type, out_type, flat, even), members in grouped(keys).items():
        tune = tuning.MASKS[tuning.device_class(outs[0].device)][flat]
        rows = [row(layers[i], i, given[i], outs[i]) for i in members]
        sizes = [outs[i].numel() for i in members]
        work = chunked(rows, sizes, tune["BLOCK"], outs[0].device)
        tensors = [t for i in members for t in (layers[i].mask, given[i], layers[i].weight if weighted else None)]
        launch(
            kernel,
            (work.programs,),
            reads=[t for t in (*tensors, work.rows, work.chunks, scales) if t is not None],
            writes=[outs[i] for i in members],
            flops=_FLOPS[kind] * sum(sizes),
            rows_ptr=work.rows,
            chunks_ptr=work.chunks,
            scales_ptr=work.rows if scales is None else scales,
            noise=radius * 2.0**-31,
            seed=seed & WORD,
            step=step,
            KIND=kind,
            FLAT=flat,
            PER_LAYER=norm == "layer",
            WEIGHT_TYPE=weight_type and TYPES[weight_type],
            MASK_TYPE=TYPES[mask_type],
            GRAD_TYPE=grad_type and TYPES[grad_type],
            OUT_TYPE=TYPES[out_type],
            ALIGNED=even,
            enable_fp_fusion=False,
            **tune,
        )
