// One vector type an instruction set: W lanes of 32 bits. Files that include this are compiled once an ISA, with
// CSAM_ISA naming the namespace; nothing here may pull in a standard-library template (its out-of-line copy could be
// shared between instruction sets by the linker).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define CSAM_INLINE static inline __attribute__((always_inline))

namespace csam {
namespace CSAM_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef float vs __attribute__((vector_size(4 * W), may_alias));  // the same, where integers' bits may lie
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint64_t vq __attribute__((vector_size(4 * W)));  // W/2 lanes of 64 bits
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef int16_t vw __attribute__((vector_size(4 * W)));  // 2W lanes of 16 bits
typedef uint8_t vb __attribute__((vector_size(W)));
typedef float vhalf __attribute__((vector_size(2 * W)));  // half the lanes of vf, and the same in double
typedef double vd __attribute__((vector_size(4 * W)));

template <class V, class T>
CSAM_INLINE V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
CSAM_INLINE void store(T* p, V v) {
  memcpy(p, &v, sizeof v);
}
// What was loaded, in a register: as an operand in memory of several instructions it would be loaded by each.
template <class Vector>
CSAM_INLINE Vector once(Vector x) {
#if defined(__AVX2__)
  asm("" : "+v"(x));
#endif
  return x;
}
#if defined(__AVX2__)
// Of every 128 bits the lower, or the upper, 16-bit values of x and y in turn.
CSAM_INLINE vi low_pairs(vi x, vi y) {
#if defined(__AVX512F__)
  return (vi)_mm512_unpacklo_epi16((__m512i)x, (__m512i)y);
#else
  return (vi)_mm256_unpacklo_epi16((__m256i)x, (__m256i)y);
#endif
}
CSAM_INLINE vi high_pairs(vi x, vi y) {
#if defined(__AVX512F__)
  return (vi)_mm512_unpackhi_epi16((__m512i)x, (__m512i)y);
#else
  return (vi)_mm256_unpackhi_epi16((__m256i)x, (__m256i)y);
#endif
}
#endif
CSAM_INLINE vf splat(float x) { return x - vf{}; }

CSAM_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  vf r;
  for (int i = 0; i < W; ++i) r[i] = fmaf(a[i], b[i], c[i]);
  return r;
#endif
}

CSAM_INLINE vf square_root(vf a) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)a);
#else
  vf r;
  for (int i = 0; i < W; ++i) r[i] = sqrtf(a[i]);
  return r;
#endif
}

// Full 64-bit products of the low halves of the 64-bit lanes.
CSAM_INLINE vq multiply_low(vq a, vq b) {
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// 64-bit lanes of even and odd elements -> the low (or high) halves of all elements in order.
CSAM_INLINE vu join_low(vq even, vq odd) {
#if defined(__AVX512F__)
  return (vu)_mm512_mask_moveldup_ps((__m512)even, 0xAAAA, (__m512)odd);
#else
  return (vu)((even & 0xFFFFFFFFull) | (odd << 32));
#endif
}
CSAM_INLINE vu join_high(vq even, vq odd) {
#if defined(__AVX512F__)
  return (vu)_mm512_mask_movehdup_ps((__m512)odd, 0x5555, (__m512)even);
#else
  return (vu)((even >> 32) | (odd & 0xFFFFFFFF00000000ull));
#endif
}

CSAM_INLINE vu gather(const uint32_t* table, vu index) {
#if defined(__AVX512F__)
  return (vu)_mm512_i32gather_epi32((__m512i)index, table, 4);
#elif defined(__AVX2__)
  return (vu)_mm256_i32gather_epi32(reinterpret_cast<const int*>(table), (__m256i)index, 4);
#else
  vu r;
  for (int i = 0; i < W; ++i) r[i] = table[index[i]];
  return r;
#endif
}
CSAM_INLINE bool any_equal(vu a, vu b) {
#if defined(__AVX512F__)
  return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)(a == b)) != 0;
#else
  bool any = false;
  for (int i = 0; i < W; ++i) any |= a[i] == b[i];
  return any;
#endif
}

// x with its sign changed where the top bit of the word is set.
CSAM_INLINE vf flip_sign(vf x, vu word) {
#if defined(__AVX512F__)
  const __m512i top = _mm512_set1_epi32(int(0x80000000u));
  return (vf)_mm512_ternarylogic_epi32((__m512i)x, (__m512i)word, top, 0x78);  // x ^ (word & top)
#else
  return (vf)((vu)x ^ (word & 0x80000000u));
#endif
}

// Nearest float of an unsigned word; both halves are exact, so the one rounding is the sum's.
CSAM_INLINE vf to_float(vu w) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepu32_ps((__m512i)w);
#else
  const vf high = __builtin_convertvector((vi)(w >> 16), vf);
  const vf low = __builtin_convertvector((vi)(w & 0xFFFFu), vf);
  return fma(high, splat(65536.0f), low);
#endif
}
CSAM_INLINE vf to_float(vi w) { return __builtin_convertvector(w, vf); }

CSAM_INLINE vf clip01(vf x) {  // NaN stays NaN
  const vf zero = {}, one = splat(1.0f);
  x = zero > x ? zero : x;
  return one < x ? one : x;
}

// bfloat16: round to nearest even on the integer form; NaN stays NaN.
CSAM_INLINE vu bf16_bits(vf x) {
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  return (x == x) ? rounded : quiet;
}
CSAM_INLINE vh to_bf16(vf x) {
  const vu out = bf16_bits(x);
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)out);
#else
  return __builtin_convertvector(out, vh);
#endif
}
CSAM_INLINE vf from_bf16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

CSAM_INLINE vh to_f16(vf x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vh r;
  for (int i = 0; i < W; ++i) {
    const _Float16 h = (_Float16)x[i];
    uint16_t bits;
    memcpy(&bits, &h, 2);
    r[i] = bits;
  }
  return r;
#endif
}
CSAM_INLINE vf from_f16(vh h) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  vf r;
  for (int i = 0; i < W; ++i) {
    const uint16_t bits = h[i];
    _Float16 v;
    memcpy(&v, &bits, 2);
    r[i] = (float)v;
  }
  return r;
#endif
}

CSAM_INLINE double sum(vd v) {
  double s = 0;
  for (int i = 0; i < W / 2; ++i) s += v[i];
  return s;
}

}  // namespace CSAM_ISA
}  // namespace csam
