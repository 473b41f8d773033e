"""The gradient triple: one launch for full masks, two for broadcast ones (each set of dtypes), one for the norm."""

from __future__ import annotations

import torch
from torch import Tensor

from csam_kernels.checks import no_float64
from csam_kernels.layout import reduce_to_mask
from csam_kernels.triton import tables, tuning
from csam_kernels.triton.kernels import mask_gradients as kernels
from csam_kernels.triton.launch import launch
from csam_kernels.triton.launchers.mask_layers import (
    TYPES,
    Laid,
    aligned,
    channels_last,
    chunked,
    grouped,
    lay,
    like,
    row,
    total,
)


def mask_gradients(
    grad_weights: list[Tensor],
    weights: list[Tensor],
    masks: list[Tensor],
    block_size: int,
    need_weight: bool,
    need_mask: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    no_float64(weights=weights)
    layers = [_lay(w, m, block_size) for w, m in zip(weights, masks, strict=True)]
    odd = [layer.mask.shape != m.shape for layer, m in zip(layers, masks, strict=True)]  # expanded by lay
    grads = [like(g, layer.weight) for g, layer in zip(grad_weights, layers, strict=True)]
    dtheta = [torch.empty_like(layer.weight) for layer in layers] if need_weight else []
    dmask = [
        torch.empty_like(layer.mask, dtype=layer.weight.dtype) if need_mask or expanded else None
        for layer, expanded in zip(layers, odd, strict=True)
    ]
    keys = [
        (
            _cover_class(layer),
            layer.flat,
            layer.layout.elementwise and aligned(g.numel(), layer.weight, layer.mask, g),
            layer.weight.dtype,
            layer.mask.dtype,
            g.dtype,
            expanded,
        )
        for layer, g, expanded in zip(layers, grads, odd, strict=True)
    ]
    partial = []
    for (cover, *_, expanded), members in grouped(keys).items():
        work = [(layers[i], grads[i], dtheta[i] if need_weight else None, dmask[i]) for i in members]
        sums = _broadcast(work, cover) if cover else _full(work)
        if not expanded:
            partial.append(sums)
    for i, d in enumerate(dmask):
        if odd[i] and d is not None:
            dmask[i] = reduced = reduce_to_mask(d, masks[i].shape)
            partial.append(reduced.double().square().sum().view(1))
    sums = torch.cat(partial) if len(partial) > 1 else partial[0]
    norm = total(sums, [(0, len(sums))], None, torch.float64)[0]
    dtheta = [_restored(d, w) for d, w in zip(dtheta, weights, strict=need_weight)]
    return dtheta, [d for d in dmask if d is not None] if need_mask else [], norm


_Work = tuple[Laid, Tensor, Tensor | None, Tensor | None]  # with G, dL/dtheta, dL/dM


def _lay(weight: Tensor, mask: Tensor, block_size: int) -> Laid:
    """Where a mask value covers columns that a channels_last weight holds apart, the weight is copied."""
    laid = lay(weight, mask, block_size)
    _, cols, _, span, col_stride = laid.layout
    apart = laid.channels and not laid.layout.elementwise and col_stride and span * laid.channels != cols
    return lay(weight.contiguous(), mask, block_size) if apart else laid


def _restored(t: Tensor, weight: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if channels_last(weight) else t


def _cover(laid: Laid) -> tuple[int, int, int, int]:
    """Values of a broadcast mask, values a row of it, and what each covers: repeats of rows x span."""
    rows, cols, row_stride, span, col_stride = laid.layout
    groups, span = (-(-cols // span), span) if col_stride else (1, cols)
    return (rows * groups, groups, 1, span) if row_stride else (groups, groups, rows, span)


def _cover_class(laid: Laid) -> int:
    """0 for a full mask, else the tile's length over what a value covers."""
    if laid.layout.elementwise:
        return 0
    *_, repeats, span = _cover(laid)
    return next(c for c in tuning.COVER if c >= repeats * span or c == max(tuning.COVER))


def _tensors(work: list[_Work]) -> tuple[list[Tensor], list[Tensor], int]:
    """What a pass reads and writes, and its floating-point operations."""
    reads = [t for laid, g, dtheta, _ in work for t in (laid.weight, g, None if dtheta is None else laid.mask)]
    writes = [t for *_, dtheta, dmask in work for t in (dtheta, dmask) if t is not None]
    flops = sum(5 * g.numel() for _, g, *_ in work)
    return [t for t in reads if t is not None], writes, flops


def _full(work: list[_Work]) -> Tensor:
    laid, g, dtheta, dmask = work[0]
    tune = tuning.MASKS[tuning.device_class(g.device)][laid.flat]
    rows = [row(layer, 0, g, dtheta, dmask) for layer, g, dtheta, dmask in work]
    chunks = chunked(rows, [g.numel() for _, g, *_ in work], tune["BLOCK"], g.device)
    partial = torch.empty(chunks.programs, dtype=torch.float64, device=g.device)
    reads, writes, flops = _tensors(work)
    launch(
        kernels.full_gradients,
        (chunks.programs,),
        reads=[*reads, chunks.rows, chunks.chunks],
        writes=[*writes, partial],
        flops=flops,
        rows_ptr=chunks.rows,
        chunks_ptr=chunks.chunks,
        partial_ptr=partial,
        NEED_WEIGHT=dtheta is not None,
        NEED_MASK=dmask is not None,
        FLAT=laid.flat,
        WEIGHT_TYPE=TYPES[laid.weight.dtype],
        MASK_TYPE=TYPES[laid.mask.dtype],
        GRAD_TYPE=TYPES[g.dtype],
        ALIGNED=aligned(g.numel(), laid.weight, laid.mask, g),
        **tune,
    )
    return partial


def _broadcast(work: list[_Work], cover: int) -> Tensor:
    laid, g, dtheta, dmask = work[0]
    tune = tuning.BROADCAST[tuning.device_class(g.device)]
    values_block = tune["TILE"] // cover
    rows, values, units, room = [], [], [], 0
    for layer, grad, *results in work:
        count, groups, repeats, span = _cover(layer)
        parts = max(1, -(-repeats * span // tune["PART"]))
        steps = (1, layer.channels) if layer.channels and layer.layout.col_stride else (span, 1)
        addresses = [0 if t is None else t.data_ptr() for t in (layer.weight, layer.mask, grad, *results)]
        cols = layer.layout.cols
        rows.append((*addresses, count, groups, repeats, span, cols, cols, cols, *steps, parts, room))
        values.append(count)
        units.append(-(-count // values_block) * parts)
        room += count * parts
    sums = torch.empty(room, dtype=torch.float64, device=g.device)
    chunks = chunked(rows, units, 1, g.device)
    reads, _, flops = _tensors(work)
    outs = [d for *_, d in work if d is not None]
    launch(
        kernels.broadcast_gradients,
        (chunks.programs,),
        reads=[*reads, chunks.rows, chunks.chunks],
        writes=[*(d for _, _, d, _ in work if d is not None), sums],
        flops=flops,
        rows_ptr=chunks.rows,
        chunks_ptr=chunks.chunks,
        sums_ptr=sums,
        NEED_WEIGHT=dtheta is not None,
        VALUES_BLOCK=values_block,
        COVER_BLOCK=cover,
        PART=tune["PART"],
        WEIGHT_TYPE=TYPES[laid.weight.dtype],
        MASK_TYPE=TYPES[laid.mask.dtype],
        GRAD_TYPE=TYPES[g.dtype],
        num_warps=tune["num_warps"],
    )
    adding = tuning.ADD_PARTS
    table = tables.chunk_table(tuple(values), adding["BLOCK"], g.device)
    partial = torch.empty(len(table), dtype=torch.float64, device=g.device)
    launch(
        kernels.add_parts,
        (len(table),),
        reads=[sums, chunks.rows, table],
        writes=[*outs, partial],
        flops=room,
        rows_ptr=chunks.rows,
        chunks_ptr=table,
        sums_ptr=sums,
        partial_ptr=partial,
        NEED_MASK=dmask is not None,
        WEIGHT_TYPE=TYPES[laid.weight.dtype],
        **adding,
    )
    return partial
