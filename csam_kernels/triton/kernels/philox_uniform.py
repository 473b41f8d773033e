"""philox_uniform: a program fills a block of the flat result, one word a lane."""

import triton
import triton.language as tl

from csam_kernels.triton.kernels.philox import UNIFORM_DOMAIN, philox_words, split_word


@triton.jit(do_not_specialize=["first_sample", "seed", "stream_word"])
def philox_uniform(
    out_ptr, n, k, first_sample: tl.uint64, seed: tl.uint64, stream_word: tl.uint32, QUADS: tl.constexpr
):
    """out[i, j] = top 24 bits of word j % 4 of quad j // 4 of sample first_sample + i; out: [n, k]."""
    quads = tl.cdiv(k, 4)
    lane = tl.program_id(0).to(tl.int64) * QUADS + tl.arange(0, QUADS)
    i, quad = lane // quads, lane % quads
    low, high = split_word(first_sample.to(tl.uint64) + i.to(tl.uint64))
    k0, k1 = split_word(seed)
    w0, w1, w2, w3 = philox_words(quad, low, high, stream_word, k0, k1 ^ UNIFORM_DOMAIN)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [QUADS, 4])
    j = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out_ptr + i[:, None] * k + j, (words >> 8).to(tl.float32) * (2.0**-24), mask=(i < n)[:, None] & (j < k))
