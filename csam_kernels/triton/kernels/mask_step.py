"""perturb_masks and effective_weights: a program perturbs, clips, multiplies and casts one chunk of one layer.

Mask times noise must round twice as on the CPU: launched with enable_fp_fusion=False.
"""

import triton
import triton.language as tl

from csam_kernels.triton.kernels.masks_common import (
    FIELDS,
    GRAD,
    LAYER,
    MASK,
    OUT,
    SIZE,
    WEIGHT,
    address,
    clip01,
    in_memory,
    inside,
    mask_element,
    my_chunk,
)
from csam_kernels.triton.kernels.philox import PERTURB_DOMAIN, philox_words, split_word
from csam_kernels.triton.kernels.rounding import narrow


@triton.jit
def signed_words(quad, step, stream, seed):
    """The four words of each quad of a layer's mask noise."""
    low, high = split_word(step)
    k0, k1 = split_word(seed)
    return philox_words(quad, low, high, stream, k0, k1 ^ PERTURB_DOMAIN)


@triton.jit(do_not_specialize=["seed", "step"])
def mask_step(
    rows_ptr,
    chunks_ptr,
    scales_ptr,
    noise: tl.float32,
    seed: tl.uint64,
    step: tl.uint64,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAT: tl.constexpr,
    PER_LAYER: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    MASK_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    OUT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """out = clip(mask + push, 0, 1) * weight, BLOCK values of it.

    push = noise * word, a Philox quad for four mask values where mask and weight lie alike (FLAT), else one a value;
    or scales[layer] * grad; or none.
    """
    layer, chunk = my_chunk(chunks_ptr)
    row_ptr = rows_ptr + layer * FIELDS
    start = chunk * BLOCK
    lane = tl.arange(0, BLOCK)
    known = inside(row_ptr, SIZE, start, lane, ALIGNED)
    if FLAT:
        mask_start, mask_lane = start, lane
    else:
        base, offset = mask_element(row_ptr, start, lane)
        mask_start, mask_lane = in_memory(row_ptr, start, lane, base, offset)
    mask_ptr = address(row_ptr, MASK, mask_start, MASK_TYPE, ALIGNED and FLAT)
    value = tl.load(mask_ptr + mask_lane, mask=known, other=0).to(tl.float32)

    if KIND == "uniform":
        stream = tl.load(row_ptr + LAYER).to(tl.uint32)
        if FLAT:
            quad = (start // 4).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
            w0, w1, w2, w3 = signed_words(quad, step, stream, seed)
            word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        else:
            element = base + offset
            w0, w1, w2, w3 = signed_words((element >> 2).to(tl.uint32), step, stream, seed)
            even, odd = tl.where((element & 2) != 0, w2, w0), tl.where((element & 2) != 0, w3, w1)
            word = tl.where((element & 1) != 0, odd, even)
        value = clip01(value + word.to(tl.int32, bitcast=True).to(tl.float32) * noise)
    elif KIND == "adversarial":
        scale = tl.load(scales_ptr + (tl.load(row_ptr + LAYER) if PER_LAYER else 0))
        grad_ptr = address(row_ptr, GRAD, mask_start, GRAD_TYPE, ALIGNED and FLAT)
        value = clip01(value + scale * tl.load(grad_ptr + mask_lane, mask=known, other=0).to(tl.float32))

    if WEIGHT_TYPE is not None:
        weight_ptr = address(row_ptr, WEIGHT, start, WEIGHT_TYPE, ALIGNED)
        value = tl.load(weight_ptr + lane, mask=known, other=0).to(tl.float32) * value
    tl.store(address(row_ptr, OUT, start, OUT_TYPE, ALIGNED) + lane, narrow(value, OUT_TYPE), mask=known)
