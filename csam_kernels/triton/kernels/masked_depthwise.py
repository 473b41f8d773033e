"""Depthwise masked convolution (one input channel a filter), done directly: there is no inner dimension to tile.

Channels lie in rows and pixels in columns, one tap a step; strides and mask addressing as in masked_conv2d.py. Filter
o reads channel o // multiplier. What lies under a dead weight counts as zero.
"""

import triton
import triton.language as tl

from csam_kernels.triton.kernels.masked_conv2d import _epilogue, _finish_gradients, _join_parts, _mask_at, _product
from csam_kernels.triton.kernels.rounding import narrow


@triton.jit
def depthwise_kernel(
    x_ptr,
    weight_ptr,
    mask_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    pixels,
    height,
    width,
    filters,
    multiplier,
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
    rows,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out[b, o, oh, ow] = epilogue(sum over (kh, kw) of (weight * mask)[o, 0, kh, kw] * x[b, o // multiplier, ih, iw]).

    A program: BLOCK_R filters x BLOCK_P output pixels.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    o = tl.program_id(0) % rows * BLOCK_R + tl.arange(0, BLOCK_R)
    p = tl.program_id(0) // rows * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (p // (out_height * out_width)).to(tl.int64)
    oh = p // out_width % out_height
    ow = p % out_width
    exists = o < filters
    here = exists[:, None] & (p < pixels)[None, :]
    base = (b * x_b)[None, :] + (o // multiplier * x_c)[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    for tap in range(TAPS):
        kh = tap // KERNEL_W
        kw = tap % KERNEL_W
        mask_at = o * m_o + _mask_at(0, tap, m_c, m_h, m_w, block, TAPS, KERNEL_W, BLOCKED)
        weight_at = o * w_o + kh * w_h + kw * w_w
        weight = _product(weight_ptr, weight_at, mask_ptr, mask_at, exists, DTYPE).to(tl.float32)
        ih = oh * STRIDE_H - PAD_H + kh * DILATION_H
        iw = ow * STRIDE_W - PAD_W + kw * DILATION_W
        inside = (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
        x = tl.load(x_ptr + base + (ih * x_h + iw * x_w)[None, :], here & inside[None, :], 0.0)
        acc += tl.where((weight != 0)[:, None], weight[:, None] * x.to(tl.float32), 0.0)
    acc = _epilogue(acc, bias_ptr, scale_ptr, shift_ptr, o, exists, HAS_BIAS, HAS_SCALE, RELU, DTYPE)
    out = out_ptr + (b * out_b + oh * out_h + ow * out_w)[None, :] + (o * out_c)[:, None]
    tl.store(out, narrow(acc, DTYPE), here)


@triton.jit
def depthwise_input_gradient_kernel(
    grad_ptr,
    weight_ptr,
    mask_ptr,
    out_ptr,
    pixels,
    height,
    width,
    channels,
    multiplier,
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
    rows,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCKED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dx[b, c, ih, iw] = sum over the filters o of channel c and (kh, kw) of (weight * mask)[o, 0, kh, kw] *
    grad[b, o, oh, ow]; a program: BLOCK_R channels x BLOCK_P pixels."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    DTYPE: tl.constexpr = grad_ptr.dtype.element_ty
    c = tl.program_id(0) % rows * BLOCK_R + tl.arange(0, BLOCK_R)
    p = tl.program_id(0) // rows * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (p // (height * width)).to(tl.int64)
    ih = p // width % height
    iw = p % width
    exists = c < channels
    here = exists[:, None] & (p < pixels)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    for i in range(multiplier * TAPS):
        o = c * multiplier + i // TAPS
        tap = i % TAPS
        kh = tap // KERNEL_W
        kw = tap % KERNEL_W
        mask_at = o * m_o + _mask_at(0, tap, m_c, m_h, m_w, block, TAPS, KERNEL_W, BLOCKED)
        weight_at = o * w_o + kh * w_h + kw * w_w
        weight = _product(weight_ptr, weight_at, mask_ptr, mask_at, exists, DTYPE).to(tl.float32)
        away_h = ih + PAD_H - kh * DILATION_H
        away_w = iw + PAD_W - kw * DILATION_W
        oh = away_h // STRIDE_H
        ow = away_w // STRIDE_W
        inside = (away_h >= 0) & (away_h % STRIDE_H == 0) & (oh < out_height)
        inside &= (away_w >= 0) & (away_w % STRIDE_W == 0) & (ow < out_width)
        grad_at = (b * g_b + oh * g_h + ow * g_w)[None, :] + (o * g_c)[:, None]
        grad = tl.load(grad_ptr + grad_at, here & inside[None, :], 0.0)
        acc += tl.where((weight != 0)[:, None], weight[:, None] * grad.to(tl.float32), 0.0)
    out = out_ptr + (b * out_b + ih * out_h + iw * out_w)[None, :] + (c * out_c)[:, None]
    tl.store(out, narrow(acc, DTYPE), here)


@triton.jit
def depthwise_weight_gradient_kernel(
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
    height,
    width,
    filters,
    multiplier,
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
    split_pixels,
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
    SPLIT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_MASK: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """G[o, tap] = sum over the pixels of grad[b, o, oh, ow] * x[b, o // multiplier, ih, iw], and from it both gradients
    as in masked_conv2d_weight_gradient_kernel, with the same workspaces.

    A program: BLOCK_R filters x one tap x one part of the pixels.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    tile = tl.program_id(0)
    tap = tile % TAPS
    kh = tap // KERNEL_W
    kw = tap % KERNEL_W
    o = tile // TAPS * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = o < filters
    first = tl.program_id(1) * split_pixels
    last = tl.minimum(first + split_pixels, pixels)
    acc = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        b = (p // (OUT_HEIGHT * OUT_WIDTH)).to(tl.int64)
        oh = p // OUT_WIDTH % OUT_HEIGHT
        ow = p % OUT_WIDTH
        ih = oh * STRIDE_H - PAD_H + kh * DILATION_H
        iw = ow * STRIDE_W - PAD_W + kw * DILATION_W
        inside = (p < last) & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
        both = exists[:, None] & inside[None, :]
        grad_at = (b * g_b + oh * g_h + ow * g_w)[None, :] + (o * g_c)[:, None]
        x_at = (b * x_b + ih * x_h + iw * x_w)[None, :] + (o // multiplier * x_c)[:, None]
        grad = tl.load(grad_ptr + grad_at, both, 0.0).to(tl.float32)
        acc += grad * tl.load(x_ptr + x_at, both, 0.0).to(tl.float32)
    g = tl.sum(acc, 1)[:, None]
    if SPLIT:
        parts = tl.num_programs(1)
        partial_ptr += tile * parts * BLOCK_R
        counter_ptr = counters_ptr + tl.num_programs(0) // TAPS + tile
        g, is_last = _join_parts(g, partial_ptr, counter_ptr, tl.program_id(1), parts, exists[:, None], BLOCK_R, 1)
        if not is_last:
            return
    c = tl.arange(0, 1)
    mask_at = (o * m_o)[:, None] + _mask_at(c, tap, m_c, m_h, m_w, block, TAPS, KERNEL_W, BLOCKED)[None, :]
    _finish_gradients(
        g,
        o,
        c,
        tap,
        exists,
        c == 0,
        mask_at,
        tile,
        TAPS,
        weight_ptr,
        mask_ptr,
        dweight_ptr,
        dmask_ptr,
        squares_ptr,
        lines_ptr,
        counters_ptr,
        filters,
        TAPS,
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
