"""percentile_init: magnitudes over a quantile that lies between two selected ones. Launched with fp fusion off."""

import triton
import triton.language as tl

from csam_kernels.triton.kernels.binarize import RANGE_LOW, STATE, magnitude_of
from csam_kernels.triton.kernels.masks_common import address, inside, my_chunk

# A layer's row: weight, out, size, share of the way from the lower to the upper magnitude (float32 bits).
WEIGHT, OUT, SIZE, SHARE, FIELDS = (tl.constexpr(i) for i in range(5))


@triton.jit
def scale_by_quantile(rows_ptr, chunks_ptr, state_ptr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """out = min(|w| / q, 1), or |w| > 0 where q = 0; selections 2 layer and 2 layer + 1 hold q's neighbours."""
    layer, chunk = my_chunk(chunks_ptr)
    row_ptr = rows_ptr + layer * FIELDS
    lower = magnitude_of(tl.load(state_ptr + 2 * layer * STATE + RANGE_LOW))
    upper = magnitude_of(tl.load(state_ptr + (2 * layer + 1) * STATE + RANGE_LOW))
    quantile = lower + tl.load(row_ptr + SHARE).to(tl.int32).to(tl.float32, bitcast=True) * (upper - lower)
    lane = tl.arange(0, BLOCK)
    known = inside(row_ptr, SIZE, chunk * BLOCK, lane, ALIGNED)
    weight_ptr = address(row_ptr, WEIGHT, chunk * BLOCK, tl.float32, ALIGNED)
    magnitude = tl.abs(tl.load(weight_ptr + lane, mask=known, other=0.0))
    ratio = tl.div_rn(magnitude, tl.zeros_like(magnitude) + tl.where(quantile > 0, quantile, 1.0))
    value = tl.where(quantile > 0, tl.minimum(ratio, 1.0), (magnitude > 0).to(tl.float32))
    tl.store(address(row_ptr, OUT, chunk * BLOCK, tl.float32, ALIGNED) + lane, value, mask=known)
