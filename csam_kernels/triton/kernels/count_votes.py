"""count_votes: a program takes blocks of rows, counts their winners, and adds to the result with integer atomics."""

import triton
import triton.language as tl


@triton.jit
def _winners(logits_ptr, rows, n, classes, row_stride, col_stride, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Class of the first largest logit of each row, or -1 where a row holds NaN or lies beyond n."""
    lane = tl.arange(0, BLOCK)[None, :]
    inside = (rows < n)[:, None]
    row_ptr = logits_ptr + rows.to(tl.int64)[:, None] * row_stride
    best = tl.full([rows.shape[0], BLOCK], float("-inf"), COMPUTE)
    first = tl.zeros([rows.shape[0], BLOCK], tl.int32) + lane
    nan = tl.zeros([rows.shape[0], BLOCK], tl.int32)
    for start in range(0, classes, BLOCK):
        c = start + lane
        at = c.to(tl.int64) * col_stride
        v = tl.load(row_ptr + at, mask=inside & (c < classes), other=float("-inf")).to(COMPUTE)
        nan = nan | (v != v).to(tl.int32)
        first = tl.where(v > best, c, first)
        best = tl.where(v > best, v, best)
    winner = tl.min(tl.where(best == tl.max(best, 1)[:, None], first, classes), 1)
    return tl.where((rows < n) & (tl.max(nan, 1) == 0), winner, -1)


@triton.jit
def count_votes(
    logits_ptr,
    out_ptr,
    n,
    classes,
    row_stride,
    col_stride,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """out[c] += number of rows of logits [n, classes] whose winner is c; out: int64 [classes].

    With BINS a program keeps one histogram and adds it at its end; with BINS = 0, for many classes, rows are added one
    by one: reading such rows takes longer than their atomics.
    """
    step = tl.num_programs(0) * ROWS
    if BINS:
        counts = tl.zeros([BINS], tl.int32)
    for start in range(tl.program_id(0) * ROWS, n, step):
        rows = start + tl.arange(0, ROWS)
        winner = _winners(logits_ptr, rows, n, classes, row_stride, col_stride, COMPUTE, BLOCK)
        if BINS:
            counts += tl.histogram(tl.maximum(winner, 0), BINS, mask=winner >= 0)
        else:
            one = tl.full([ROWS], 1, tl.int64)
            tl.atomic_add(out_ptr + winner, one, mask=winner >= 0, sem="relaxed")
    if BINS:
        c = tl.arange(0, BINS)
        tl.atomic_add(out_ptr + c, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
