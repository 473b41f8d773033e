"""Device code of the multi-tensor mask passes: a program finds its layer and chunk, its pointers, its mask values.

A layer's row in the table holds addresses, then how its mask lies over its weight (csam_kernels/layout.py): weight j in
memory is tap (j % cols) // inner of column group (j % cols) % inner, so that inner = cols, taps = 1 is contiguous and
inner = channels is channels_last.
"""

import triton
import triton.language as tl

WEIGHT, MASK, GRAD, OUT, OUT_MASK = (tl.constexpr(i) for i in range(5))  # addresses
SIZE, LAYER, COLS, ROW_STRIDE, COL_STRIDE, INNER, TAPS, IN_PLACE = (tl.constexpr(i) for i in range(5, 13))
BY_COLS, BY_INNER, BY_SPAN = (tl.constexpr(i) for i in (13, 15, 17))  # reciprocal and shift each
FIELDS = tl.constexpr(19)


@triton.jit
def my_chunk(chunks_ptr):
    """Layer and chunk within the layer of this program."""
    row_ptr = chunks_ptr + 2 * tl.program_id(0).to(tl.int64)
    return tl.load(row_ptr).to(tl.int64), tl.load(row_ptr + 1).to(tl.int64)


@triton.jit
def address(row_ptr, FIELD: tl.constexpr, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start`, a multiple of 16, of the tensor whose address is in a layer's row."""
    pointer = tl.load(row_ptr + FIELD).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def inside(row_ptr, FIELD: tl.constexpr, start, lane, ALIGNED: tl.constexpr):
    """Lanes before the end of a tensor whose size is in the row: whole vectors of them where ALIGNED."""
    rest = tl.load(row_ptr + FIELD) - start
    if ALIGNED:
        rest = tl.multiple_of(rest, 16)
    return lane < rest


@triton.jit
def divide(n, divisor_ptr):
    """n // d for int32 0 <= n < 2^31, without a division: d's reciprocal and shift are in the table."""
    reciprocal, shift = tl.load(divisor_ptr).to(tl.uint32), tl.load(divisor_ptr + 1).to(tl.uint32)
    return (tl.umulhi(n.to(tl.uint32) * 2, reciprocal) >> shift).to(tl.int32)


@triton.jit
def mask_element(row_ptr, start, lane):
    """Element of the contiguous mask that covers weight start + lane: an int64 base and an int32 offset."""
    cols, row_stride = tl.load(row_ptr + COLS), tl.load(row_ptr + ROW_STRIDE)
    first = start // cols
    at = (start - first * cols).to(tl.int32) + lane
    row = divide(at, row_ptr + BY_COLS)
    at -= row * cols.to(tl.int32)
    tap = divide(at, row_ptr + BY_INNER)
    column = (at - tap * tl.load(row_ptr + INNER).to(tl.int32)) * tl.load(row_ptr + TAPS).to(tl.int32) + tap
    group = divide(column, row_ptr + BY_SPAN)
    return first * row_stride, row * row_stride.to(tl.int32) + group * tl.load(row_ptr + COL_STRIDE).to(tl.int32)


@triton.jit
def in_memory(row_ptr, start, lane, base, offset):
    """Where those mask values lie: in the weight's own order, or where they logically are."""
    in_place = tl.load(row_ptr + IN_PLACE) != 0
    return tl.where(in_place, start, base), tl.where(in_place, lane, offset)


@triton.jit
def clip01(x):
    return tl.where(x < 0, 0.0, tl.where(x > 1, 1.0, x))


@triton.jit
def sum_of_squares(x):
    """Squares and sum in float64."""
    x = x.to(tl.float64)
    return tl.sum(x * x)


@triton.jit
def squares(rows_ptr, chunks_ptr, partial_ptr, BLOCK: tl.constexpr, GRAD_TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """partial[program] = sum of g^2 over one chunk of one layer."""
    layer, chunk = my_chunk(chunks_ptr)
    row_ptr = rows_ptr + layer * FIELDS
    lane = tl.arange(0, BLOCK)
    start = chunk * BLOCK
    known = inside(row_ptr, SIZE, start, lane, ALIGNED)
    g = tl.load(address(row_ptr, GRAD, start, GRAD_TYPE, ALIGNED) + lane, mask=known, other=0.0)
    tl.store(partial_ptr + tl.program_id(0), sum_of_squares(g.to(tl.float32)))


@triton.jit
def totals(partial_ptr, segments_ptr, out_ptr, rho: tl.float64, BLOCK: tl.constexpr, SCALE: tl.constexpr):
    """Sum s of each segment (first, count) of the partial sums, in a fixed order; rho / sqrt(s), or 0, where SCALE."""
    segment = tl.program_id(0)
    first, count = tl.load(segments_ptr + 2 * segment), tl.load(segments_ptr + 2 * segment + 1)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, count, BLOCK):
        total += tl.load(partial_ptr + first + i + lane, mask=i + lane < count, other=0.0)
    result = tl.sum(total)
    if SCALE:
        result = tl.where(result > 0, rho / tl.sqrt(tl.where(result > 0, result, 1.0)), 0.0)
    tl.store(out_ptr + segment, result.to(out_ptr.dtype.element_ty))
