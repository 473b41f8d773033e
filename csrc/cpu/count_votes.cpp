// count_votes: a thread takes whole rows and counts into its own histogram; integer sums are exact in any order.
#include <math.h>
#include <stdlib.h>

#include "kernels.h"
#include "simd.h"

namespace csam {
namespace CSAM_ISA {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

CSAM_INLINE float value(float v) { return v; }
CSAM_INLINE double value(double v) { return v; }
CSAM_INLINE float value(Bf16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
CSAM_INLINE float value(F16 v) {
  _Float16 h;
  memcpy(&h, &v.bits, 2);
  return float(h);
}

// Class of the first largest logit, or -1 when the row holds NaN.
template <class T>
CSAM_INLINE int64_t winner(const T* row, int64_t classes) {
  auto best = value(row[0]);
  int64_t arg = 0;
  bool nan = best != best;
  for (int64_t c = 1; c < classes; ++c) {
    const auto v = value(row[c]);
    nan |= v != v;
    if (v > best) best = v, arg = c;
  }
  return nan ? -1 : arg;
}

template <class T>
void count(const VoteArgs& a, int threads) {
  const T* logits = static_cast<const T*>(a.logits);
#pragma omp parallel num_threads(threads)
  {
    int64_t* own = static_cast<int64_t*>(calloc(a.classes, sizeof(int64_t)));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.n; ++i) {
      const int64_t w = winner(logits + i * a.row_stride, a.classes);
      if (w >= 0) ++own[w];
    }
#pragma omp critical(csam_votes)
    for (int64_t c = 0; c < a.classes; ++c) a.out[c] += own[c];
    free(own);
  }
}

void count_votes(const VoteArgs& a, int threads) {
  switch (a.dtype) {
    case kF32: return count<float>(a, threads);
    case kF64: return count<double>(a, threads);
    case kBF16: return count<Bf16>(a, threads);
    default: return count<F16>(a, threads);
  }
}

}  // namespace CSAM_ISA
}  // namespace csam
