"""semantic_batch: one bilinear gather with the photometric map on its way out; copies that blur take two more passes.

All three kernels run over all copies. A copy says by its own parameters whether it blurs: where it does not, the gather
finishes it and the blur passes end at once; so nothing is read back to the host.
"""

import triton
import triton.language as tl

from csam_kernels.triton.kernels.philox import sin_cos_turns


@triton.jit
def _parameter(row_ptr, COLUMN: tl.constexpr):
    return tl.load(row_ptr + COLUMN).to(tl.float32)


@triton.jit
def _sin_cos_degrees(degrees):
    """sin and cos; the nearest quarter turn is taken off exactly, and what is left is at most an eighth of a turn."""
    degrees = degrees.to(tl.float64)
    quarter = tl.floor(degrees / 90 + 0.5)
    s, c = sin_cos_turns(((degrees - 90 * quarter) / 360).to(tl.float32))
    turn = quarter - 4 * tl.floor(quarter / 4)
    odd = (turn == 1) | (turn == 3)
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where(turn >= 2, -sine, sine), tl.where((turn == 1) | (turn == 2), -cosine, cosine)


@triton.jit
def _photometric(v, row_ptr):
    """clip(contrast * v + brightness, 0, 1) ** gamma."""
    v = _parameter(row_ptr, 5) * v + _parameter(row_ptr, 6)
    v = tl.minimum(tl.maximum(v, 0.0), 1.0)
    gamma = _parameter(row_ptr, 7)
    if gamma != 1:
        v = tl.where(v > 0, tl.exp2(gamma * tl.log2(tl.where(v > 0, v, 1.0))), 0.0)
    return v


@triton.jit
def transform(x_ptr, params_ptr, out_ptr, channels, height, width, tiles, BLOCK: tl.constexpr):
    """out[i] = T(x), and its photometric map unless copy i blurs; a program takes a run of pixels in all channels.

    Output pixel p reads input R(angle) (p - centre - t) / scale + centre: four taps, zero outside the image.
    x: [channels, height, width]; params: [n, 8]; out: [n, channels, height, width].
    """
    copy, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row_ptr = params_ptr + copy.to(tl.int64) * 8
    pixels = height * width
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    v, u = pixel // width, pixel % width

    scale = _parameter(row_ptr, 3)
    sine, cosine = _sin_cos_degrees(_parameter(row_ptr, 0))
    sine, cosine = sine / scale, cosine / scale
    cx, cy = 0.5 * (width - 1), 0.5 * (height - 1)
    dx = u.to(tl.float32) - cx - _parameter(row_ptr, 1) * width
    dy = v.to(tl.float32) - cy - _parameter(row_ptr, 2) * height
    sx, sy = cosine * dx - sine * dy + cx, sine * dx + cosine * dy + cy
    reached = (sx > -1) & (sx < width) & (sy > -1) & (sy < height) & (pixel < pixels)
    sx, sy = tl.where(reached, sx, 0.0), tl.where(reached, sy, 0.0)
    left, top = tl.floor(sx), tl.floor(sy)
    fx, fy = sx - left, sy - top
    x0, y0 = left.to(tl.int32), top.to(tl.int32)
    in_left, in_right = reached & (x0 >= 0), reached & (x0 + 1 < width)
    in_top, in_bottom = y0 >= 0, y0 + 1 < height
    at = y0 * width + x0

    blurs = _parameter(row_ptr, 4) > 0
    plane = out_ptr + copy.to(tl.int64) * channels * pixels
    for c in range(0, channels):
        taps = x_ptr + c * pixels + at
        a = tl.load(taps, mask=in_left & in_top, other=0.0)
        b = tl.load(taps + 1, mask=in_right & in_top, other=0.0)
        d = tl.load(taps + width, mask=in_left & in_bottom, other=0.0)
        e = tl.load(taps + width + 1, mask=in_right & in_bottom, other=0.0)
        value = (1 - fy) * ((1 - fx) * a + fx * b) + fy * ((1 - fx) * d + fx * e)
        if not blurs:
            value = _photometric(value, row_ptr)
        tl.store(plane + c * pixels + pixel, value, mask=pixel < pixels)


@triton.jit
def blur(in_ptr, params_ptr, out_ptr, channels, height, width, tiles, BLOCK: tl.constexpr, VERTICAL: tl.constexpr):
    """One direction of the Gaussian of the copies that blur, edges replicated; the photometric map when VERTICAL.

    in, out: [n, channels, height, width]; a program takes a run of pixels in all channels.
    """
    copy, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row_ptr = params_ptr + copy.to(tl.int64) * 8
    sigma = _parameter(row_ptr, 4)
    if sigma <= 0:
        return
    pixels = height * width
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    if VERTICAL:
        position, length, step = pixel // width, height, width
    else:
        position, length, step = pixel % width, width, 1
    first = pixel - position * step
    radius = tl.ceil(3.0 * sigma).to(tl.int32)
    slope = -0.5 / (sigma * sigma)
    plane = copy.to(tl.int64) * channels * pixels
    for _ in range(0, channels):
        weights = 0.0
        total = tl.zeros([BLOCK], tl.float32)
        for k in range(-radius, radius + 1):
            weight = tl.exp(slope * (k * k))
            at = first + tl.minimum(tl.maximum(position + k, 0), length - 1) * step
            total += weight * tl.load(in_ptr + plane + at, mask=inside, other=0.0)
            weights += weight
        total = total / weights
        if VERTICAL:
            total = _photometric(total, row_ptr)
        tl.store(out_ptr + plane + pixel, total, mask=inside)
        plane += pixels
