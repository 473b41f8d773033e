"""Rounding to the dtype of a result."""

import triton
import triton.language as tl

from csam_kernels import backend

INTERPRETED = tl.constexpr(backend.INTERPRETED)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 to DTYPE, nearest even; on integer bits where Triton's interpreter would truncate to bfloat16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        word = tl.where(x == x, rounded, (bits >> 16) | 0x40)
        return word.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)
