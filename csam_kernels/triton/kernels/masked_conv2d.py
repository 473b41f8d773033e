"""Masked convolution as implicit GEMM.

All products put channels in rows and pixels in columns. A K-tile is a piece of the inner dimension: of the forward
pass BLOCK_K input channels at one tap (taps of one channel block follow one another), or, when FLAT, BLOCK_K
consecutive weights (c, kh, kw) of a filter; of the input's gradient BLOCK_K filters at one tap.

With LISTED a first kernel rounds weight * mask once, tile by tile in the order and dtype that the tensor cores want,
and says which tiles are not all zero; the convolution reads only those. Programs that shared a weight tile had each
gathered it from the weight's own order, a sector of memory a value: that took 3 to 6 times the rest (H200). Where few
programs share a tile, weight * mask is formed in registers.

Strides are in elements: x_b, x_c, x_h, x_w of x, and so on. The mask is addressed as a weight-shaped view (m_o, m_c,
m_h, m_w, zeros where it is broadcast) or, when BLOCKED, as [O, ceil(cols/block)] with strides m_o, m_c.
"""

import triton
import triton.language as tl

from csam_kernels.triton.kernels.rounding import INTERPRETED, narrow


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # half arithmetic is wrong there; the products of the upcast operands are the same
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _columns(tile, TAPS: tl.constexpr, FLAT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Channels [BLOCK_K] and taps ([BLOCK_K] when FLAT, else [1]) of a K-tile."""
    k = tl.arange(0, BLOCK_K)
    if FLAT:
        c = (tile * BLOCK_K + k) // TAPS
        tap = (tile * BLOCK_K + k) % TAPS
    else:
        c = tile // TAPS * BLOCK_K + k
        tap = tile % TAPS + tl.arange(0, 1)
    return c, tap


@triton.jit
def _mask_at(c, tap, m_c, m_h, m_w, block, TAPS: tl.constexpr, KERNEL_W: tl.constexpr, BLOCKED: tl.constexpr):
    if BLOCKED:
        return (c * TAPS + tap) // block * m_c
    return c * m_c + tap // KERNEL_W * m_h + tap % KERNEL_W * m_w


@triton.jit
def _product(weight_ptr, weight_at, mask_ptr, mask_at, valid, DTYPE: tl.constexpr):
    """weight * mask in float32, rounded once."""
    weight = tl.load(weight_ptr + weight_at, valid, 0.0).to(tl.float32)
    mask = tl.load(mask_ptr + mask_at, valid, 0).to(tl.float32)
    return narrow(weight * mask, DTYPE)


@triton.jit
def _packed(packed_ptr, row, tile, tiles, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """weight * mask of a tile, as pack_tiles_kernel left it."""
    at = (row.to(tl.int64) * tiles + tile) * (BLOCK_R * BLOCK_K)
    return tl.load(packed_ptr + at + tl.arange(0, BLOCK_R)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :])


@triton.jit
def _epilogue(
    acc,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    o,
    valid,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    RELU: tl.constexpr,
    DTYPE: tl.constexpr,
    other=None,
):
    """relu((acc + bias) * scale + shift + other), each part when asked for; acc is float32 [filters, pixels]."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o, valid, 0.0).to(tl.float32)
        acc += narrow(bias, DTYPE).to(tl.float32)[:, None]
    if HAS_SCALE:
        scale = tl.load(scale_ptr + o, valid, 0.0).to(tl.float32)
        shift = tl.load(shift_ptr + o, valid, 0.0).to(tl.float32)
        acc = acc * scale[:, None] + shift[:, None]
    if other is not None:
        acc += other
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return acc


@triton.jit
def pack_tiles_kernel(
    weight_ptr,
    mask_ptr,
    packed_ptr,
    flags_ptr,
    channels,
    filters,
    w_o,
    w_c,
    w_h,
    w_w,
    m_o,
    m_c,
    m_h,
    m_w,
    block,
    row_blocks,
    tiles,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCKED: tl.constexpr,
    FLAT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """packed[row block, tile] = weight * mask [BLOCK_R, BLOCK_K] and flags[row block, tile] = is any of it alive; a
    program takes a block of the inner dimension at all taps of one kernel row: they share sectors of memory, and more
    taps would follow one another for longer than other programs run.

    Rows are filters and the inner dimension channels; TRANSPOSED the other way round, and then there is a row of flags
    for each residue of the pixel modulo the stride, for which only the taps that reach an output pixel count.
    `channels` and `filters` are those of one group.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    STEPS: tl.constexpr = 1 if FLAT else KERNEL_W
    DTYPE: tl.constexpr = packed_ptr.dtype.element_ty
    first = tl.program_id(0) % (tiles // STEPS) * STEPS
    outer = tl.program_id(0) // (tiles // STEPS)
    group = outer // row_blocks
    r = tl.arange(0, BLOCK_R)
    rows = outer % row_blocks * BLOCK_R + r
    inside = r[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    for tile in range(first, first + STEPS):
        inner, tap = _columns(tile, TAPS, FLAT, BLOCK_K)
        kh = tap // KERNEL_W
        kw = tap % KERNEL_W
        if TRANSPOSED:
            o = (group * filters + inner)[None, :]
            weight_at = (rows * w_c)[:, None] + o * w_o + (kh * w_h + kw * w_w)[None, :]
            column = _mask_at(rows, tap, m_c, m_h, m_w, block, TAPS, KERNEL_W, BLOCKED)
            mask_at = column[:, None] + o * m_o
            valid = (rows < channels)[:, None] & (inner < filters)[None, :]
        else:
            o = (group * filters + rows)[:, None]
            weight_at = o * w_o + (inner * w_c + kh * w_h + kw * w_w)[None, :]
            column = _mask_at(inner, tap, m_c, m_h, m_w, block, TAPS, KERNEL_W, BLOCKED)
            mask_at = o * m_o + column[None, :]
            valid = (rows < filters)[:, None] & (inner < channels)[None, :]
        weight = tl.load(weight_ptr + weight_at, valid, 0.0).to(tl.float32)
        mask = tl.load(mask_ptr + mask_at, valid, 0)
        at = (outer.to(tl.int64) * tiles + tile) * (BLOCK_R * BLOCK_K)
        tl.store(packed_ptr + at + inside, narrow(weight * mask.to(tl.float32), DTYPE))
        alive = tl.max(((weight != 0) & (mask != 0)).to(tl.int32))
        if TRANSPOSED:
            for residue in tl.static_range(STRIDE_H * STRIDE_W):
                away_h = residue // STRIDE_W + PAD_H - tile % TAPS // KERNEL_W * DILATION_H
                away_w = residue % STRIDE_W + PAD_W - tile % TAPS % KERNEL_W * DILATION_W
                reached = (away_h % STRIDE_H == 0) & (away_w % STRIDE_W == 0)
                row = (group * (STRIDE_H * STRIDE_W) + residue) * row_blocks + outer % row_blocks
                tl.store(flags_ptr + row * tiles + tile, tl.where(reached, alive, 0))
        else:
            tl.store(flags_ptr + outer * tiles + tile, alive)


@triton.jit
def tile_list_kernel(flags_ptr, tiles_ptr, counts_ptr, tiles, CHUNK: tl.constexpr):
    """Live tiles of a row of flags in ascending order, and how many there are; a program a row."""
    row = tl.program_id(0).to(tl.int64) * tiles
    count = 0
    for start in range(0, tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        live = tl.load(flags_ptr + row + tile, tile < tiles, 0)
        tl.store(tiles_ptr + row + count + tl.cumsum(live, 0) - 1, tile, live != 0)
        count += tl.sum(live, 0)
    tl.store(counts_ptr + tl.program_id(0), count)


@triton.jit
def masked_conv2d_kernel(
    x_ptr,
    weight_ptr,
    mask_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    other_ptr,
    out_ptr,
    packed_ptr,
    tiles_ptr,
    counts_ptr,
    pixels,
    channels,
    height,
    width,
    filters,
    out_height,
    out_width,
    x_b,
    x_c,
    x_h,
    x_w,
    w_o,
    w_c,
    w_h,
    w_w,
    m_o,
    m_c,
    m_h,
    m_w,
    out_b,
    out_c,
    out_h,
    out_w,
    block,
    row_blocks,
    rows,
    tiles,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCKED: tl.constexpr,
    FLAT: tl.constexpr,
    LISTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[b, o, oh, ow] = epilogue(sum over (c, kh, kw) of (weight * mask)[o, c, kh, kw] * x[b, c, ih, iw]).

    A program: BLOCK_R filters of one group x BLOCK_P output pixels. The epilogue adds the bias, applies y * scale +
    shift a filter, adds `other`, which lies as out does, and clips at zero, each when asked for.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0) % rows
    group = row // row_blocks
    o = row % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    p = tl.program_id(0) // rows * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (p // (out_height * out_width)).to(tl.int64)
    oh = p // out_width % out_height
    ow = p % out_width
    here = p < pixels
    live_rows = o < filters
    o_all = group * filters + o
    x_base = x_ptr + (b * x_b + group * channels * x_c + (oh * STRIDE_H - PAD_H) * x_h + (ow * STRIDE_W - PAD_W) * x_w)

    count = tiles
    if LISTED:
        count = tl.load(counts_ptr + row)
    acc = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    for i in range(count):
        tile = i
        if LISTED:
            tile = tl.load(tiles_ptr + row.to(tl.int64) * tiles + i)
        c, tap = _columns(tile, TAPS, FLAT, BLOCK_K)
        kh = tap // KERNEL_W
        kw = tap % KERNEL_W
        if LISTED:
            weight = _packed(packed_ptr, row, tile, tiles, BLOCK_R, BLOCK_K)
        else:
            weight_at = (o_all * w_o)[:, None] + (c * w_c + kh * w_h + kw * w_w)[None, :]
            mask_at = (o_all * m_o)[:, None] + _mask_at(c, tap, m_c, m_h, m_w, block, TAPS, KERNEL_W, BLOCKED)[None, :]
            valid = live_rows[:, None] & (c < channels)[None, :]
            weight = _product(weight_ptr, weight_at, mask_ptr, mask_at, valid, DTYPE)
        ih = (oh * STRIDE_H - PAD_H)[None, :] + (kh * DILATION_H)[:, None]
        iw = (ow * STRIDE_W - PAD_W)[None, :] + (kw * DILATION_W)[:, None]
        inside = (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width) & here[None, :] & (c < channels)[:, None]
        x_at = c * x_c + kh * (DILATION_H * x_h) + kw * (DILATION_W * x_w)
        x = tl.load(x_base[None, :] + x_at[:, None], inside, 0.0)
        acc = _dot(weight, x, acc, PRECISION)

    at = (b * out_b + oh * out_h + ow * out_w)[None, :] + (o_all * out_c)[:, None]
    inside = live_rows[:, None] & here[None, :]
    other = None
    if HAS_OTHER:
        other = tl.load(other_ptr + at, inside, 0.0).to(tl.float32)
    acc = _epilogue(acc, bias_ptr, scale_ptr, shift_ptr, o_all, live_rows, HAS_BIAS, HAS_SCALE, RELU, DTYPE, other)
    tl.store(out_ptr + at, narrow(acc, DTYPE), inside)


@triton.jit
def masked_conv2d_input_gradient_kernel(
    grad_ptr,
    weight_ptr,
    mask_ptr,
    out_ptr,
    packed_ptr,
    tiles_ptr,
    counts_ptr,
    batch,
    channels,
    height,
    width,
    filters,
    out_height,
    out_width,
    g_b,
    g_c,
    g_h,
    g_w,
    w_o,
    w_c,
    w_h,
    w_w,
    m_o,
    m_c,
    m_h,
    m_w,
    out_b,
    out_c,
    out_h,
    out_w,
    block,
    row_blocks,
    rows,
    tiles,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCKED: tl.constexpr,
    LISTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx[b, c, ih, iw] = sum over (o, kh, kw) of (weight * mask)[o, c, kh, kw] * grad[b, o, oh, ow].

    A program: BLOCK_R channels of one group x BLOCK_P pixels that are alike modulo the stride, so that a tap serves
    all of them or none.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    row = tl.program_id(0) % rows
    residue = row // row_blocks % (STRIDE_H * STRIDE_W)
    group = row // row_blocks // (STRIDE_H * STRIDE_W)
    c = row % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    p = tl.program_id(0) // rows * BLOCK_P + tl.arange(0, BLOCK_P)
    few_h = (height + STRIDE_H - 1) // STRIDE_H
    few_w = (width + STRIDE_W - 1) // STRIDE_W
    b = (p // (few_h * few_w)).to(tl.int64)
    ih = p // few_w % few_h * STRIDE_H + residue // STRIDE_W
    iw = p % few_w * STRIDE_W + residue % STRIDE_W
    here = (b < batch) & (ih < height) & (iw < width)
    live_rows = c < channels
    grad_base = grad_ptr + (b * g_b + group * filters * g_c)

    count = tiles
    if LISTED:
        count = tl.load(counts_ptr + row)
    acc = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    for i in range(count):
        tile = i
        if LISTED:
            tile = tl.load(tiles_ptr + row.to(tl.int64) * tiles + i)
        o, tap = _columns(tile, TAPS, False, BLOCK_K)
        kh = tap // KERNEL_W
        kw = tap % KERNEL_W
        o_all = group * filters + o
        if LISTED:
            weight = _packed(packed_ptr, group * row_blocks + row % row_blocks, tile, tiles, BLOCK_R, BLOCK_K)
        else:
            weight_at = (c * w_c + kh * w_h + kw * w_w)[:, None] + (o_all * w_o)[None, :]
            mask_at = _mask_at(c, tap, m_c, m_h, m_w, block, TAPS, KERNEL_W, BLOCKED)[:, None] + (o_all * m_o)[None, :]
            valid = live_rows[:, None] & (o < filters)[None, :]
            weight = _product(weight_ptr, weight_at, mask_ptr, mask_at, valid, DTYPE)
        away_h = (ih + PAD_H)[None, :] - (kh * DILATION_H)[:, None]
        away_w = (iw + PAD_W)[None, :] - (kw * DILATION_W)[:, None]
        oh = away_h // STRIDE_H
        ow = away_w // STRIDE_W
        inside = (away_h >= 0) & (oh < out_height) & (away_w >= 0) & (ow < out_width)
        if not LISTED:
            inside &= (away_h % STRIDE_H == 0) & (away_w % STRIDE_W == 0)
        inside = inside & here[None, :] & (o < filters)[:, None]
        grad = tl.load(grad_base[None, :] + (o[:, None] * g_c + oh * g_h + ow * g_w), inside, 0.0)
        acc = _dot(weight, grad, acc, PRECISION)

    out = out_ptr + (b * out_b + ih * out_h + iw * out_w)[None, :] + ((group * channels + c) * out_c)[:, None]
    tl.store(out, narrow(acc, DTYPE), live_rows[:, None] & here[None, :])


@triton.jit
def _arrives_last(counter_ptr, arrivals):
    """Is this the last of `arrivals` programs at a counter that began at zero? It then sees all that they stored.

    PTX ISA, memory consistency model, causality order: the first barrier puts the stores of all threads before one
    thread's addition; acquire and release at gpu scope make it synchronize with the additions before it; the second
    barrier puts it before the loads of all threads. CUDA's sample threadFenceReduction does the same with fences.
    The loads bypass L1, which is not coherent.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return before == arrivals - 1


@triton.jit
def _join_parts(acc, partial_ptr, counter_ptr, part, parts, exists, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store one part of a tile; the program that is last gets True and the sum of all in their order, whoever it is."""
    at = tl.arange(0, BLOCK_R)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tl.store(partial_ptr + part * (BLOCK_R * BLOCK_C) + at, acc, exists)
    last = _arrives_last(counter_ptr, parts)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in tl.range(tl.where(last, parts, 0), loop_unroll_factor=4):
        total += tl.load(partial_ptr + i * (BLOCK_R * BLOCK_C) + at, exists, 0.0, cache_modifier=".cg")
    return total, last


@triton.jit
def _finish_gradients(
    g,
    o,
    c,
    tap,
    live_rows,
    live_columns,
    mask_at,
    tile,
    column_blocks,
    weight_ptr,
    mask_ptr,
    dweight_ptr,
    dmask_ptr,
    squares_ptr,
    lines_ptr,
    counters_ptr,
    filters,
    cols,
    w_o,
    w_c,
    w_h,
    w_w,
    dw_o,
    dw_c,
    dw_h,
    dw_w,
    dm_o,
    dm_c,
    dm_h,
    dm_w,
    TAPS: tl.constexpr,
    KERNEL_W: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_MASK: tl.constexpr,
    SUMS: tl.constexpr,
):
    """From a tile g of dL/dW, in registers: dweight = g * mask and what becomes of d = g * weight.

    SUMS "none": dmask = d and the tile's part of its squared norm. "rows": dmask[o] is the sum over a filter, which
    the last tile of a block of rows adds up from lines[column block, o]. "columns": only the tile's sums over filters,
    lines[block of rows, (c, kh, kw)]. `filters` and `o` are those of all groups.
    """
    exists = live_rows[:, None] & live_columns[None, :]
    kh = tap // KERNEL_W
    kw = tap % KERNEL_W
    row = tile // column_blocks
    if NEED_WEIGHT:
        mask = tl.load(mask_ptr + mask_at, exists, 0).to(tl.float32)
        at = (o * dw_o)[:, None] + (c * dw_c + kh * dw_h + kw * dw_w)[None, :]
        tl.store(dweight_ptr + at, narrow(g * mask, dweight_ptr.dtype.element_ty), exists)
    if NEED_MASK:
        at = (o * w_o)[:, None] + (c * w_c + kh * w_h + kw * w_w)[None, :]
        dmask = g * tl.load(weight_ptr + at, exists, 0.0).to(tl.float32)
        if SUMS == "none":
            at = (o * dm_o)[:, None] + (c * dm_c + kh * dm_h + kw * dm_w)[None, :]
            tl.store(dmask_ptr + at, narrow(dmask, dmask_ptr.dtype.element_ty), exists)
            tl.store(squares_ptr + tile, tl.sum(dmask * dmask))
        elif SUMS == "columns":
            tl.store(lines_ptr + row * cols + c * TAPS + tap, tl.sum(dmask, 0), live_columns)
        else:
            tl.store(lines_ptr + tile % column_blocks * filters + o, tl.sum(dmask, 1), live_rows)
            if _arrives_last(counters_ptr + row, column_blocks):
                line = tl.arange(0, 16)[:, None]
                total = tl.zeros((16, g.shape[0]), tl.float32)
                for start in range(0, column_blocks, 16):
                    valid = (start + line < column_blocks) & live_rows[None, :]
                    line_at = (start + line) * filters + o[None, :]
                    total += tl.load(lines_ptr + line_at, valid, 0.0, cache_modifier=".cg")
                sums = tl.sum(total, 0)
                tl.store(dmask_ptr + o, narrow(sums, dmask_ptr.dtype.element_ty), live_rows)
                tl.store(squares_ptr + row, tl.sum(sums * sums))


@triton.jit
def masked_conv2d_weight_gradient_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    mask_ptr,
    dweight_ptr,
    dmask_ptr,
    squares_ptr,
    lines_ptr,
    partial_ptr,
    counters_ptr,
    pixels,
    channels,
    height,
    width,
    filters,
    g_b,
    g_c,
    g_h,
    g_w,
    x_b,
    x_c,
    x_h,
    x_w,
    w_o,
    w_c,
    w_h,
    w_w,
    m_o,
    m_c,
    m_h,
    m_w,
    dw_o,
    dw_c,
    dw_h,
    dw_w,
    dm_o,
    dm_c,
    dm_h,
    dm_w,
    block,
    row_blocks,
    column_blocks,
    split_pixels,
    groups,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCKED: tl.constexpr,
    FLAT: tl.constexpr,
    SPLIT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_MASK: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """G[o, (c, kh, kw)] = sum over (b, oh, ow) of grad[b, o, oh, ow] * x[b, c, ih, iw], and from it, in registers,
    both gradients as in _finish_gradients; G is not written.

    A program: BLOCK_R filters of one group x BLOCK_C weights x one part of the pixels; it divides by the sizes of an
    image in every step, which are constants for that. SPLIT: parts go through
    partial[tile, part, BLOCK_R, BLOCK_C], and the last program of a tile goes on with their sum. counters: zeros, one
    a block of rows, then, when SPLIT, one a tile. Without the mask's gradient a tile of dead weights costs nothing.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    tile = tl.program_id(0)
    row = tile // column_blocks
    group = row // row_blocks
    o = row % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    o_all = group * filters + o
    c, tap = _columns(tile % column_blocks, TAPS, FLAT, BLOCK_C)
    kh = tap // KERNEL_W
    kw = tap % KERNEL_W
    live_rows = o < filters
    live_columns = c < channels
    exists = live_rows[:, None] & live_columns[None, :]
    mask_at = (o_all * m_o)[:, None] + _mask_at(c, tap, m_c, m_h, m_w, block, TAPS, KERNEL_W, BLOCKED)[None, :]

    first = tl.program_id(1) * split_pixels
    last = tl.minimum(first + split_pixels, pixels)
    if not NEED_MASK:
        live = tl.load(mask_ptr + mask_at, exists, 0) != 0
        last = tl.where(tl.max(tl.max(live.to(tl.int32), 1), 0) != 0, last, first)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_K):
        p = start + tl.arange(0, BLOCK_K)
        b = (p // (OUT_HEIGHT * OUT_WIDTH)).to(tl.int64)
        oh = p // OUT_WIDTH % OUT_HEIGHT
        ow = p % OUT_WIDTH
        here = p < last
        grad_at = (b * g_b + oh * g_h + ow * g_w)[None, :] + (o_all * g_c)[:, None]
        grad = tl.load(grad_ptr + grad_at, live_rows[:, None] & here[None, :], 0.0)
        ih = (oh * STRIDE_H - PAD_H)[:, None] + (kh * DILATION_H)[None, :]
        iw = (ow * STRIDE_W - PAD_W)[:, None] + (kw * DILATION_W)[None, :]
        inside = (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width) & here[:, None] & live_columns[None, :]
        x_base = (b * x_b + group * channels * x_c)[:, None]
        x = tl.load(x_ptr + x_base + (c[None, :] * x_c + ih * x_h + iw * x_w), inside, 0.0)
        acc = _dot(grad, x, acc, PRECISION)

    if SPLIT:
        parts = tl.num_programs(1)
        partial_ptr += tile * parts * (BLOCK_R * BLOCK_C)
        counter_ptr = counters_ptr + groups * row_blocks + tile
        acc, is_last = _join_parts(acc, partial_ptr, counter_ptr, tl.program_id(1), parts, exists, BLOCK_R, BLOCK_C)
        if not is_last:
            return
    _finish_gradients(
        acc,
        o_all,
        c,
        tap,
        live_rows,
        live_columns,
        mask_at,
        tile,
        column_blocks,
        weight_ptr,
        mask_ptr,
        dweight_ptr,
        dmask_ptr,
        squares_ptr,
        lines_ptr,
        counters_ptr,
        groups * filters,
        channels * TAPS,
        w_o,
        w_c,
        w_h,
        w_w,
        dw_o,
        dw_c,
        dw_h,
        dw_w,
        dm_o,
        dm_c,
        dm_h,
        dm_w,
        TAPS,
        KERNEL_W,
        NEED_WEIGHT,
        NEED_MASK,
        SUMS,
    )


@triton.jit
def sum_segments_kernel(
    values_ptr,
    out_ptr,
    squares_ptr,
    lines,
    cols,
    segments,
    segment_blocks,
    span,
    BLOCK_S: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """out[i, segment] = sum over the lines and over the `span` consecutive columns of a segment of a float32
    values[i, lines, cols], and the program's part of its squared norm; a program: BLOCK_S segments of one i."""
    i = tl.program_id(0) // segment_blocks
    segment = tl.program_id(0) % segment_blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_S, BLOCK_J), tl.float32)
    for line in range(i * lines, (i + 1) * lines):
        for start in range(0, span, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            r = segment[:, None] * span + j[None, :]
            valid = (segment < segments)[:, None] & (j < span)[None, :] & (r < cols)
            acc += tl.load(values_ptr + line * cols + r, valid, 0.0)
    sums = tl.sum(acc, 1)
    tl.store(out_ptr + i * segments + segment, narrow(sums, out_ptr.dtype.element_ty), segment < segments)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(sums * sums, 0))
