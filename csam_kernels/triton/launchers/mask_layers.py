"""What the multi-tensor mask passes share: how layers lie in memory, their rows in the table, sums."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from csam_kernels.layout import MaskLayout, expand_mask, mask_layout
from csam_kernels.triton import tables, tuning
from csam_kernels.triton.kernels import masks_common as kernels
from csam_kernels.triton.launch import launch

TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.bool: tl.int8,
}
Key = TypeVar("Key")
_WIDEST = 2**30  # weights of a filter: offsets inside one are 32-bit


class Laid(NamedTuple):
    """A weight and its mask as dense memory, and how one lies over the other."""

    weight: Tensor
    mask: Tensor
    layout: MaskLayout
    channels: int  # of a channels_last weight, else 0
    in_place: bool  # the mask has the weight's memory order

    @property
    def flat(self) -> bool:
        """The index in memory of a weight is that of its mask value."""
        return self.in_place or (self.layout.elementwise and not self.channels)


def alone(t: Tensor) -> Laid:
    """A tensor over itself, in its own memory order."""
    return Laid(t, t, MaskLayout(1, t.numel(), 0, 1, 1), 0, False)


def channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def dense(t: Tensor) -> Tensor:
    return t if channels_last(t) else t.contiguous()


def _order(t: Tensor) -> list[int]:
    return [step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1]


def lay(weight: Tensor, mask: Tensor, block_size: int) -> Laid:
    """Contiguous and channels_last tensors are taken as they are, others copied; odd broadcasts are expanded."""
    weight = dense(weight)
    channels = weight.shape[1] if channels_last(weight) else 0
    layout = mask_layout(weight.shape, mask.shape, block_size)
    if layout is None:
        mask = expand_mask(mask, weight.shape)
        layout = mask_layout(weight.shape, weight.shape)
        assert layout is not None
    if layout.cols >= _WIDEST:
        raise ValueError(f"a filter must have fewer than 2^30 weights on the GPU, got shape {tuple(weight.shape)}")
    in_place = channels > 0 and not block_size and mask.shape == weight.shape and _order(mask) == _order(weight)
    return Laid(weight, mask if in_place else mask.contiguous(), layout, channels, in_place)


def like(t: Tensor, pattern: Tensor) -> Tensor:
    """t in the memory order of a dense pattern."""
    return t if _order(t) == _order(pattern) else torch.empty_like(pattern, dtype=t.dtype).copy_(t)


def row(laid: Laid, index: int, grad: Tensor | None, out: Tensor | None, out_mask: Tensor | None = None) -> tables.Row:
    """A layer's row: the fields of kernels/masks_common.py."""
    addresses = [0 if t is None else t.data_ptr() for t in (laid.weight, laid.mask, grad, out, out_mask)]
    return (*addresses, laid.weight.numel(), index, *_shape(laid.layout, laid.channels, laid.in_place))


@lru_cache(maxsize=1024)
def _shape(layout: MaskLayout, channels: int, in_place: bool) -> tables.Row:
    """The part of a row that depends on the layer's shape alone."""
    _, cols, row_stride, span, col_stride = layout
    cols, inner = max(cols, 1), channels or max(cols, 1)
    where = (cols, row_stride, col_stride, inner, cols // inner, int(in_place))
    return (*where, *_reciprocal(cols), *_reciprocal(inner), *_reciprocal(span))


def _reciprocal(d: int) -> tuple[int, int]:
    """(m, s) with n // d == (2 n m >> 32) >> s for 0 <= n < 2^31."""
    shift = (d - 1).bit_length()
    return -(-(2 ** (31 + shift)) // d), shift


def aligned(size: int, *tensors: Tensor | None) -> bool:
    """Whether a chunk of each can be read in vectors."""
    return size % 16 == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def grouped(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """Indices of the layers that one launch can take, by what its constants are."""
    groups: dict[Key, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return groups


class Chunked(NamedTuple):
    """A launch over layers: their table, the table of chunks, and how many programs that makes."""

    rows: Tensor
    chunks: Tensor
    programs: int


def chunked(rows: list[tables.Row], sizes: list[int], chunk: int, device: torch.device) -> Chunked:
    chunks = tables.chunk_table(tuple(sizes), chunk, device)
    return Chunked(tables.table(tuple(rows), device), chunks, len(chunks))


def total(partial: Tensor, segments: list[tuple[int, int]], rho: float | None, dtype: torch.dtype) -> Tensor:
    """Sums of (first, count) segments of the partial sums; rho / sqrt(sum), or 0, where rho is given."""
    out = torch.empty(len(segments), dtype=dtype, device=partial.device)
    table = tables.table(tuple(segments), partial.device)
    launch(
        kernels.totals,
        (len(segments),),
        reads=[partial, table],
        writes=[out],
        flops=partial.numel(),
        partial_ptr=partial,
        segments_ptr=table,
        out_ptr=out,
        rho=rho or 0.0,
        SCALE=rho is not None,
        **tuning.TOTALS,
    )
    return out


def ascent_scales(grads: list[Tensor], rho: float, norm: str) -> Tensor:
    """rho / ||g|| (0 for g = 0), float32: one, or one a layer; sums of squares in float64, chunk by chunk."""
    tune = tuning.MASKS[tuning.device_class(grads[0].device)][True]
    counts = tables.chunk_counts(tuple(g.numel() for g in grads), tune["BLOCK"])
    partial = torch.empty(sum(counts), dtype=torch.float64, device=grads[0].device)
    segments = [(0, 0)] * len(grads)
    first = 0
    for (dtype, even), members in grouped((g.dtype, aligned(g.numel(), g)) for g in grads).items():
        begin = first
        for i in members:
            segments[i] = (first, counts[i])
            first += counts[i]
        rows = [row(alone(grads[i]), i, grads[i], None) for i in members]
        work = chunked(rows, [grads[i].numel() for i in members], tune["BLOCK"], partial.device)
        launch(
            kernels.squares,
            (work.programs,),
            reads=[*(grads[i] for i in members), work.rows, work.chunks],
            writes=[partial[begin:first]],
            flops=2 * sum(grads[i].numel() for i in members),
            rows_ptr=work.rows,
            chunks_ptr=work.chunks,
            partial_ptr=partial[begin:first],
            GRAD_TYPE=TYPES[dtype],
            ALIGNED=even,
            **tune,
        )
    return total(partial, [(0, first)] if norm == "global" else segments, rho, torch.float32)
