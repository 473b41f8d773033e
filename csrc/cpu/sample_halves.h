// Sparse convolution in float16 (AVX512-FP16), of which a vector holds 32: twice the multiply-adds of float32. Products
// are summed in float16 kShort at a time; these short sums enter float32 ones. A filter's weights are scaled by a power
// of two to less than 1/8, so that no short sum of inputs up to 8188 leaves float16's range.
#pragma once
#include "sample_conv2d.h"

namespace csam {
namespace CSAM_ISA {

#if defined(__AVX512F__)

constexpr int kHeadroom = 3;  // binary orders between the largest scaled weight and 1

// sum + weight * x[0 .. 31] in float16, rounded once. As assembly, since an intrinsic would ask every caller to be
// compiled for AVX512-FP16.
#if !defined(CSAM_EMULATE_AMX)
CSAM_INLINE __m512i add_product(__m512i sum, __m512i weight, const float* x) {
  asm("vfmadd231ph %2, %1, %0" : "+v"(sum) : "v"(weight), "m"(*reinterpret_cast<const __m512i*>(x)));
  return sum;
}
#else
CSAM_INLINE __m512d eight(const void* halves) {
  return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(halves))));
}
static __m512i add_product(__m512i sum, __m512i weight, const float* x) {
  uint16_t s[32], w[32];
  memcpy(s, &sum, 64), memcpy(w, &weight, 64);
  for (int i = 0; i < 32; i += 8) {
    // A float64 holds the product; where it does not hold the sum, that is too far from halfway between two halves, or
    // beyond them all, for the first rounding to matter. To odd in float32, so that the second is the only one.
    const __m512d exact = _mm512_fmadd_pd(eight(w + i), eight(reinterpret_cast<const uint16_t*>(x) + i), eight(s + i));
    const __m256 down = _mm512_cvt_roundpd_ps(exact, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    const __mmask8 cut = _mm512_cmp_pd_mask(_mm512_cvtps_pd(down), exact, _CMP_NEQ_OQ);
    const __m256i bits = _mm256_castps_si256(down);
    const __m256i odd = _mm256_mask_or_epi32(bits, cut, bits, _mm256_set1_epi32(1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(s + i),
                     _mm256_cvtps_ph(_mm256_castsi256_ps(odd), _MM_FROUND_TO_NEAREST_INT));
  }
  memcpy(&sum, s, 64);
  return sum;
}
#endif

CSAM_INLINE vf low_half(__m512i v) { return from_f16((vh)_mm512_castsi512_si256(v)); }
CSAM_INLINE vf high_half(__m512i v) { return from_f16((vh)_mm512_extracti64x4_epi64(v, 1)); }

// A short sum that a block leaves unfinished is put down as it is.
template <class Format, int R, int C>
static void add_halves(const Block& b, int64_t filters, float* sums) {
  const int64_t share = tiles(b.fetches, filters), pixels = b.rows * b.columns;
  for (int64_t o = 0; o < filters; ++o) {
    const Tap *first = b.taps + b.cuts[o], *end = b.taps + b.cuts[o + 1];
    fetch(b, share);
    if (first == end && !b.last) continue;
    const vf initial = splat(b.bias[o]), scale = splat(b.powers[o]);
    for (int64_t row = 0; row < b.rows; row += R)
      for (int64_t column = 0; column < b.columns; column += C) {
        const int64_t pixel = o * pixels + row * b.columns + column;
        float *sum = sums + 2 * pixel * W, *put_down = b.halves + pixel * W;
        const float* packed = b.packed + row * b.pitch + column * W;
        alignas(64) float ended[2 * R * C * W];
        float* to = b.outputs ? ended : sum;
        const int64_t line = b.columns * W, to_line = b.outputs ? C * W : line;
        const Tap* t = first;
        int64_t done = b.before[o];  // products
        const bool taken_up = done % kShort;
        __m512i v[R * C];
#pragma GCC unroll 32
        for (int i = 0; i < R * C; ++i)
          v[i] = taken_up ? load<__m512i>(put_down + i / C * line + i % C * W) : _mm512_setzero_si512();
        for (bool entered = false;; entered = true) {
          const int64_t index = done / kShort, left = (index + 1) * kShort - done;
          const Tap* stop = end - t > left ? t + left : end;
          done += stop - t;
          for (; t < stop; ++t) {
            const __m512i w = _mm512_set1_epi32(int(t->weight));
            const float* in = packed + t->offset;
#pragma GCC unroll 32
            for (int r = 0; r < R; ++r, in += b.pitch)
#pragma GCC unroll 32
              for (int c = 0; c < C; ++c) v[r * C + c] = add_product(v[r * C + c], w, in + c * W);
          }
          if (t == end && !b.last && done % kShort) {
#pragma GCC unroll 32
            for (int i = 0; i < R * C; ++i) store(put_down + i / C * line + i % C * W, v[i]);
            break;
          }
          const auto enter = [&](const auto& before) __attribute__((always_inline)) {
#pragma GCC unroll 32
            for (int i = 0; i < R * C; ++i) {
              float* at = to + 2 * (i / C * to_line + i % C * W);
              store(at, fma(low_half(v[i]), scale, before(i, 0)));
              store(at + W, fma(high_half(v[i]), scale, before(i, W)));
            }
          };
          const float* from = entered ? to : sum;
          const int64_t from_line = entered ? to_line : line;
          if (!index) enter([&](int, int) { return initial; });
          else enter([&](int i, int half) { return load<vf>(from + 2 * (i / C * from_line + i % C * W) + half); });
          if (t == end) break;
#pragma GCC unroll 32
          for (int i = 0; i < R * C; ++i) v[i] = _mm512_setzero_si512();
        }
        if (b.outputs) finish<Format, 1, R, C>(b, filters, o, row, column, reinterpret_cast<const vs*>(ended));
      }
  }
}

struct Bfloat16Halves : Bfloat16Pairs {  // sparse layers only; the sums' order is that of pairs
  static constexpr Micro kSparse[] = {
      {4, 4, add_halves<Bfloat16Halves, 4, 4>}, {2, 8, add_halves<Bfloat16Halves, 2, 8>},
      {2, 7, add_halves<Bfloat16Halves, 2, 7>}, {1, 16, add_halves<Bfloat16Halves, 1, 16>},
      {1, 4, add_halves<Bfloat16Halves, 1, 4>}, {1, 1, add_halves<Bfloat16Halves, 1, 1>}};
  // The power of two by which a filter's weights are divided, and its short sums multiplied.
  static float power(const float* weights, int64_t n) {
    float most = 0;
    for (int64_t i = 0; i < n; ++i) most = fabsf(weights[i]) > most ? fabsf(weights[i]) : most;
    int exponent = 0;
    frexpf(most, &exponent);  // most < 2^exponent
    return ldexpf(1, (exponent < 120 ? exponent : 120) + kHeadroom);
  }
  static uint32_t tap(float weight) {  // for every two lanes; a bfloat16 as everywhere, which halves hold
    return csam::to_f16(csam::from_bf16(csam::to_bf16(weight))) * 0x10001u;
  }
  static vf pack(const uint16_t* in) {
    vf v[2];
    unpack(in, v);
    const __m512i low = _mm512_castsi256_si512((__m256i)to_f16(v[0]));
    return (vf)_mm512_inserti64x4(low, (__m256i)to_f16(v[1]), 1);
  }
};

#endif

}  // namespace CSAM_ISA
}  // namespace csam
