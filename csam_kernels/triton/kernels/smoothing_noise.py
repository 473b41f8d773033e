"""smoothing_noise, grid_noise: a program keeps one tile of the image in registers and writes it, noisy, for several
samples.

Noise is drawn in the order of the image, channels outermost. For a channels_last result a tile is a run of pixels in
all channels, and its values change places on the way out. A channel's run may begin inside a quad, so it takes as many
quads as it can touch, and what they hold beyond the run is dropped.

NORMALIZED: a factor and a summand a channel follow, before the one rounding. CELLS: the image is whole numbers,
`scale` of them to 1, and the noise others.
"""

import triton
import triton.language as tl

from csam_kernels.triton.kernels.philox import CELLS, deviates, grid_steps, split_word
from csam_kernels.triton.kernels.rounding import narrow


@triton.jit(do_not_specialize=["n", "tile_quads", "tiles", "samples", "bits", "first_sample", "seed", "stream_word"])
def smoothing_noise(
    x_ptr,
    first_ptr,
    second_ptr,
    out_ptr,
    n,
    channels,
    pixels,
    plane,
    tile_pixels,
    tile_quads,
    tiles,
    samples,
    bits: tl.uint32,
    scale: tl.float32,
    first_sample: tl.uint64,
    seed: tl.uint64,
    stream_word: tl.uint32,
    LAW: tl.constexpr,
    QUADS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """out[i] = x + scale * deviates_i of the law, or (x + steps_i) / scale, for one tile and `samples` values of i.

    x: [channels, pixels], `plane` of them a channel of the image; out: [n, channels, pixels], or [n, pixels, channels]
    where CHANNELS_LAST: a tile is then tile_pixels of all channels, tile_quads quads each, otherwise 4 * QUADS values.
    The first and the second table: factors and summands where NORMALIZED, those of 2^bits CELLS.
    """
    tile = tl.program_id(0) % tiles
    begin = tl.program_id(0) // tiles * samples
    elements = channels * pixels
    lane, place = tl.arange(0, QUADS), tl.arange(0, 4 * QUADS)
    if CHANNELS_LAST:
        pixel = tile * tile_pixels
        quad = (lane // tile_quads * pixels + pixel) // 4 + lane % tile_quads
        element = (place // (4 * tile_quads) * pixels + pixel) // 4 * 4 + place % (4 * tile_quads)
        target = pixel * channels + place
        inside = (place < tile_pixels * channels) & (target < elements)
        c, p = place % channels, place // channels
        source = tl.where(inside, 4 * c * tile_quads + (c * pixels + pixel) % 4 + p, 0)
    else:
        quad = tile * QUADS + lane
        element = tile * (4 * QUADS) + place
        target = element
        inside = element < elements
    x = tl.load(x_ptr + element, mask=element < elements, other=0.0).to(tl.float32)
    if NORMALIZED:
        input_scale = tl.load(first_ptr + element // plane, mask=element < elements, other=0.0)
        input_shift = tl.load(second_ptr + element // plane, mask=element < elements, other=0.0)

    k0, k1 = split_word(seed)
    sample = first_sample.to(tl.uint64) + begin
    row_ptr = out_ptr + begin.to(tl.int64) * elements + target
    for _ in range(begin, tl.minimum(begin + samples, n)):
        low, high = split_word(sample)
        n0, n1, n2, n3 = deviates(quad, low, high, stream_word, k0, k1, LAW)
        noise = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
        if LAW == CELLS:
            noise = grid_steps(noise, element, low, high, stream_word, k0, k1, first_ptr, second_ptr, bits)
            noisy = tl.div_rn(x + noise, scale)
        else:
            noisy = tl.fma(noise, scale, x)
        if NORMALIZED:
            noisy = tl.fma(noisy, input_scale, input_shift)
        noisy = narrow(noisy, out_ptr.dtype.element_ty)
        if CHANNELS_LAST:
            noisy = tl.gather(noisy, source, 0)
        tl.store(row_ptr, noisy, mask=inside)
        sample += 1
        row_ptr += elements
