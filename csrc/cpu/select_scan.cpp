// select_scan: one read of the scores and one write of the mask. Scores above the bracket are kept, those below are
// not, those inside go to the candidate list, a few per cent of all; binarize.cpp settles them.
#include "kernels.h"
#include "simd.h"

namespace csam {
namespace CSAM_ISA {

// Unsigned keys in the order of the floats; -0 and +0 share one.
CSAM_INLINE vu ordered(vf x) {
  const vi bits = (vi)(x + 0.0f);
  return (vu)(bits ^ ((bits >> 31) | (vi)(vi{} + INT32_MIN)));
}

CSAM_INLINE vf scores_at(const SelectScan& s, int64_t i) {
  if (s.dtype == kF32) return load<vf>(static_cast<const float*>(s.scores) + i);
  const vh h = load<vh>(static_cast<const uint16_t*>(s.scores) + i);
  return s.dtype == kBF16 ? from_bf16(h) : from_f16(h);
}

// W scores of which the first `valid` count.
CSAM_INLINE void scan(SelectScan& s, vu key, int64_t i, int valid) {
#if defined(__AVX512F__)
  const __mmask16 live = valid == W ? 0xFFFF : __mmask16((1u << valid) - 1);
  const __m512i k = (__m512i)key;
  const __mmask16 above = _mm512_mask_cmpgt_epu32_mask(live, k, _mm512_set1_epi32(int(s.high)));
  const __mmask16 inside = _mm512_mask_cmpge_epu32_mask(live, k, _mm512_set1_epi32(int(s.low))) & ~above;
  _mm_mask_storeu_epi8(s.mask + i, live, _mm_maskz_set1_epi8(above, 1));
  s.above += __builtin_popcount(above);
  for (unsigned rest = inside; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    s.candidates[s.found++] = uint64_t(key[lane]) << 32 | uint32_t(~(s.first_index + uint32_t(i + lane)));
  }
#else
  for (int lane = 0; lane < valid; ++lane) {
    const uint32_t k = key[lane];
    s.mask[i + lane] = k > s.high;
    s.above += k > s.high;
    s.candidates[s.found] = uint64_t(k) << 32 | uint32_t(~(s.first_index + uint32_t(i + lane)));
    s.found += k >= s.low && k <= s.high;
  }
#endif
}

void select_scan(SelectScan& s) {
  int64_t i = 0;
  for (; i + W <= s.n; i += W) scan(s, ordered(scores_at(s, i)), i, W);
  if (i < s.n) {
    float last[W] = {};
    for (int64_t j = i; j < s.n; ++j) {
      SelectScan one = s;
      if (s.dtype == kF32) last[j - i] = static_cast<const float*>(s.scores)[j];
      else {
        uint16_t h[W] = {static_cast<const uint16_t*>(s.scores)[j]};
        one.scores = h;
        last[j - i] = scores_at(one, 0)[0];
      }
    }
    scan(s, ordered(load<vf>(last)), i, int(s.n - i));
  }
}

}  // namespace CSAM_ISA
}  // namespace csam
