"""mask_gradients: G and theta are read once for dL/dtheta, dL/dM and the norm, whatever the mask's granularity.

Full masks go by chunks. Broadcast masks go by mask values: a program sums what a few values cover, in fixed parts whose
sums a second launch adds in order.
"""

import triton
import triton.language as tl

from csam_kernels.triton.kernels.masks_common import (
    FIELDS,
    GRAD,
    MASK,
    OUT,
    OUT_MASK,
    SIZE,
    WEIGHT,
    address,
    in_memory,
    inside,
    mask_element,
    my_chunk,
    sum_of_squares,
)
from csam_kernels.triton.kernels.rounding import narrow

# Fields of a broadcast layer after its addresses: values of the mask, values a row of it, what each covers (repeats of
# rows x span), steps in memory (row of values, repeat, group, within a span), columns, parts, first partial sum.
VALUES, GROUPS, REPEATS, SPAN, COLUMNS = (tl.constexpr(i) for i in range(5, 10))
ROW_STEP, REPEAT_STEP, GROUP_STEP, SPAN_STEP, PARTS, FIRST = (tl.constexpr(i) for i in range(10, 16))
BROADCAST_FIELDS = tl.constexpr(16)


@triton.jit
def full_gradients(
    rows_ptr,
    chunks_ptr,
    partial_ptr,
    NEED_WEIGHT: tl.constexpr,
    NEED_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    MASK_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """dtheta = G * M, dM = G * theta, partial[program] = sum of dM^2, for one chunk of one layer."""
    layer, chunk = my_chunk(chunks_ptr)
    row_ptr = rows_ptr + layer * FIELDS
    start = chunk * BLOCK
    lane = tl.arange(0, BLOCK)
    known = inside(row_ptr, SIZE, start, lane, ALIGNED)
    g = tl.load(address(row_ptr, GRAD, start, GRAD_TYPE, ALIGNED) + lane, mask=known, other=0).to(tl.float32)
    weight = tl.load(address(row_ptr, WEIGHT, start, WEIGHT_TYPE, ALIGNED) + lane, mask=known, other=0)
    dmask = g * weight.to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), sum_of_squares(dmask))
    if FLAT:
        mask_start, mask_lane = start, lane
    else:
        base, offset = mask_element(row_ptr, start, lane)
        mask_start, mask_lane = in_memory(row_ptr, start, lane, base, offset)
    if NEED_MASK:
        dmask_ptr = address(row_ptr, OUT_MASK, mask_start, WEIGHT_TYPE, ALIGNED and FLAT)
        tl.store(dmask_ptr + mask_lane, narrow(dmask, WEIGHT_TYPE), mask=known)
    if NEED_WEIGHT:
        mask_ptr = address(row_ptr, MASK, mask_start, MASK_TYPE, ALIGNED and FLAT)
        mask = tl.load(mask_ptr + mask_lane, mask=known, other=0).to(tl.float32)
        dtheta_ptr = address(row_ptr, OUT, start, WEIGHT_TYPE, ALIGNED)
        tl.store(dtheta_ptr + lane, narrow(g * mask, WEIGHT_TYPE), mask=known)


@triton.jit
def broadcast_gradients(
    rows_ptr,
    chunks_ptr,
    sums_ptr,
    NEED_WEIGHT: tl.constexpr,
    VALUES_BLOCK: tl.constexpr,
    COVER_BLOCK: tl.constexpr,
    PART: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    MASK_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
):
    """sums[value, part] = sum of G * theta over PART of what a mask value covers, and dtheta = G * M there.

    float32 a lane, float64 across lanes and parts.
    """
    layer, unit = my_chunk(chunks_ptr)
    row_ptr = rows_ptr + layer * BROADCAST_FIELDS
    parts, span = tl.load(row_ptr + PARTS), tl.load(row_ptr + SPAN)
    value = unit // parts * VALUES_BLOCK + tl.arange(0, VALUES_BLOCK)
    part = unit % parts
    known = value < tl.load(row_ptr + VALUES)
    groups = tl.load(row_ptr + GROUPS)
    row, group = value // groups, value % groups
    corner = row * tl.load(row_ptr + ROW_STEP) + group * tl.load(row_ptr + GROUP_STEP)
    room = tl.load(row_ptr + COLUMNS) - group * span  # the last span of a row may be cut short
    mask = tl.load(address(row_ptr, MASK, 0, MASK_TYPE, False) + value, mask=known, other=0).to(tl.float32)
    grad_ptr = address(row_ptr, GRAD, 0, GRAD_TYPE, False)
    weight_ptr = address(row_ptr, WEIGHT, 0, WEIGHT_TYPE, False)
    dtheta_ptr = address(row_ptr, OUT, 0, WEIGHT_TYPE, False)
    end = tl.minimum((part + 1) * PART, tl.load(row_ptr + REPEATS) * span)
    lane = tl.arange(0, COVER_BLOCK)
    total = tl.zeros([VALUES_BLOCK, COVER_BLOCK], tl.float32)
    for first in range(part * PART, end, COVER_BLOCK):
        skipped = first // span
        cover = (first - skipped * span).to(tl.int32) + lane
        repeat, within = cover // span.to(tl.int32), cover % span.to(tl.int32)
        inner = (skipped + repeat) * tl.load(row_ptr + REPEAT_STEP) + within * tl.load(row_ptr + SPAN_STEP)
        at = corner[:, None] + inner[None, :]
        covered = known[:, None] & (lane < end - first)[None, :] & (within[None, :] < room[:, None])
        g = tl.load(grad_ptr + at, mask=covered, other=0).to(tl.float32)
        total += g * tl.load(weight_ptr + at, mask=covered, other=0).to(tl.float32)
        if NEED_WEIGHT:
            tl.store(dtheta_ptr + at, narrow(g * mask[:, None], WEIGHT_TYPE), mask=covered)
    place = tl.load(row_ptr + FIRST) + value * parts + part
    tl.store(sums_ptr + place, tl.sum(total.to(tl.float64), 1), mask=known)


@triton.jit
def add_parts(
    rows_ptr,
    chunks_ptr,
    sums_ptr,
    partial_ptr,
    NEED_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
):
    """dM = sum of a mask value's parts, and partial[program] = sum of dM^2."""
    layer, chunk = my_chunk(chunks_ptr)
    row_ptr = rows_ptr + layer * BROADCAST_FIELDS
    value = chunk * BLOCK + tl.arange(0, BLOCK)
    known = value < tl.load(row_ptr + VALUES)
    parts = tl.load(row_ptr + PARTS)
    sum_ptr = sums_ptr + tl.load(row_ptr + FIRST) + value * parts
    total = tl.zeros([BLOCK], tl.float64)
    for part in range(0, parts):
        total += tl.load(sum_ptr + part, mask=known, other=0.0)
    dmask = narrow(total.to(tl.float32), WEIGHT_TYPE)
    if NEED_MASK:
        tl.store(address(row_ptr, OUT_MASK, 0, WEIGHT_TYPE, False) + value, dmask, mask=known)
    tl.store(partial_ptr + tl.program_id(0), sum_of_squares(dmask.to(tl.float32)))
