"""Random numbers in kernels: the words of csrc/common/philox.h, the deviates of csrc/cpu/random.h, bit for bit.

Every multiply-add is written out (`tl.fma`) and no other product feeds a sum, so the bits depend on no compiler option.
All words are uint32 and any of them may be a scalar: what is equal in all lanes is then computed once.
"""

import triton
import triton.language as tl

PERTURB_DOMAIN = tl.constexpr(0x6D61736B)  # xor into the high key word, as in csrc/common/philox.h
UNIFORM_DOMAIN = tl.constexpr(0x756E6966)
CELL_DOMAIN = tl.constexpr(0x63656C6C)

# csrc/common/deviates.h: the laws, and their polynomials; the logarithm's are times -2, which is exact.
GAUSSIAN, UNIFORM, LAPLACE, CELLS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SIN0, SIN1 = tl.constexpr(float.fromhex("0x1.921fb6p+2")), tl.constexpr(float.fromhex("-0x1.4abbbap+5"))
SIN2, SIN3 = tl.constexpr(float.fromhex("0x1.465ec6p+6")), tl.constexpr(float.fromhex("-0x1.2d9bb8p+6"))
COS0, COS1 = tl.constexpr(1.0), tl.constexpr(float.fromhex("-0x1.3bd3ccp+4"))
COS2, COS3 = tl.constexpr(float.fromhex("0x1.03c1dcp+6")), tl.constexpr(float.fromhex("-0x1.55c57cp+6"))
COS4 = tl.constexpr(float.fromhex("0x1.d9c364p+5"))
LOG0, LOG1 = tl.constexpr(-2 * float.fromhex("0x1.55554cp-2")), tl.constexpr(-2 * float.fromhex("-0x1.000196p-2"))
LOG2, LOG3 = tl.constexpr(-2 * float.fromhex("0x1.99a49ap-3")), tl.constexpr(-2 * float.fromhex("-0x1.549970p-3"))
LOG4, LOG5 = tl.constexpr(-2 * float.fromhex("0x1.22893cp-3")), tl.constexpr(-2 * float.fromhex("-0x1.0bcdf4p-3"))
LOG6, LOG7 = tl.constexpr(-2 * float.fromhex("0x1.06e766p-3")), tl.constexpr(-2 * float.fromhex("-0x1.456438p-4"))
LN2 = tl.constexpr(-2 * float.fromhex("0x1.62e430p-1"))
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
TINY = tl.constexpr(2.0**-32)
TURN = tl.constexpr(2.0**-34)


@triton.jit
def philox_words(quad, sample_low, sample_high, stream, k0, k1):
    """The four words of Philox-4x32-10 with counter (quad, sample low, sample high, stream) and key (k0, k1)."""
    c0, c1, c2, c3 = quad.to(tl.uint32), sample_low.to(tl.uint32), sample_high.to(tl.uint32), stream.to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57  # one wide multiply each
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def split_word(word):
    """Low and high 32 bits of a 64-bit integer."""
    word = word.to(tl.uint64)
    return (word & 0xFFFFFFFF).to(tl.uint32), (word >> 32).to(tl.uint32)


@triton.jit
def sin_cos_turns(t):
    """sin and cos of 2 pi t for |t| <= 1/8."""
    t2 = t * t
    s = tl.fma(tl.fma(tl.fma(t2, SIN3, SIN2), t2, SIN1), t2, SIN0) * t
    c = tl.fma(tl.fma(tl.fma(tl.fma(t2, COS4, COS3), t2, COS2), t2, COS1), t2, COS0)
    return s, c


@triton.jit
def flip_sign(x, word):
    """x with its sign changed where the top bit of the word is set."""
    return (x.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def minus_2_log(u):
    """-2 ln u for u in [2^-32, 1]."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(tl.fma(tl.fma(f, LOG7, LOG6), f, LOG5), f, LOG4)
    p = tl.fma(tl.fma(tl.fma(tl.fma(p, f, LOG3), f, LOG2), f, LOG1), f, LOG0)
    f2 = f * f
    square = tl.fma(p, f2 * f, tl.fma(f, -2.0, f2))
    return tl.fma(exponent.to(tl.float32), LN2, square)


@triton.jit
def box_muller(a, b):
    """Two independent standard normal deviates from two words: u1 = (a+1)/2^32, angle = 2 pi b/2^32."""
    radius = tl.sqrt_rn(minus_2_log(tl.fma(a.to(tl.float32), TINY, TINY)))

    quarter = b + 0x20000000
    s, c = sin_cos_turns((b << 2).to(tl.int32, bitcast=True).to(tl.float32) * TURN)
    odd = (quarter & 0x40000000) != 0
    first = radius * flip_sign(tl.where(odd, s, c), quarter + 0x40000000)
    second = radius * flip_sign(tl.where(odd, c, s), quarter)
    return first, second


@triton.jit
def signed(word, LAW: tl.constexpr):
    """A uniform or Laplace deviate of a word: its top bit is the sign, the others are u = (m + 1/2) / 2^31."""
    u = tl.fma((word & 0x7FFFFFFF).to(tl.int32, bitcast=True).to(tl.float32), 2 * TINY, TINY)
    return flip_sign(u if LAW == UNIFORM else minus_2_log(u), word)


@triton.jit
def deviates(quad, sample_low, sample_high, stream, k0, k1, LAW: tl.constexpr):
    """Deviates 0, 1, 2, 3 of every quad: element e of a sample has deviate e % 4 of quad e // 4. Of CELLS the words."""
    w0, w1, w2, w3 = philox_words(quad, sample_low, sample_high, stream, k0, k1)
    if LAW == GAUSSIAN:
        n0, n1 = box_muller(w0, w1)
        n2, n3 = box_muller(w2, w3)
        return n0, n1, n2, n3
    elif LAW == CELLS:
        return w0, w1, w2, w3
    else:
        return signed(w0, LAW), signed(w1, LAW), signed(w2, LAW), signed(w3, LAW)


@triton.jit
def grid_steps(word, element, sample_low, sample_high, stream, k0, k1, columns_ptr, rest_ptr, bits):
    """Whole numbers drawn by the words of the elements from a table of 2^bits columns (csam_kernels/cells.py)."""
    column, fraction = word >> (32 - bits), word << bits
    entry = tl.load(columns_ptr + column).to(tl.uint32, bitcast=True)
    other = entry & ((tl.full((), 1, tl.uint32) << bits) - 1)
    threshold = entry ^ other
    own = fraction < threshold
    tied = fraction == threshold
    if tl.max(tied.to(tl.int32), 0) > 0:  # 64 more bits decide
        high, rest, _, _ = philox_words(element, sample_low, sample_high, stream, k0, k1 ^ CELL_DOMAIN)
        after = (high.to(tl.uint64) << 32) | rest.to(tl.uint64)
        own |= tied & (after < tl.load(rest_ptr + column).to(tl.uint64, bitcast=True))
    number = tl.where(own, column, other).to(tl.int32) - (1 << (bits.to(tl.int32) - 1))
    return number.to(tl.float32)
