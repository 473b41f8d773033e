// Rows of logits in any floating dtype.
#pragma once
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

}  // namespace CSAM_ISA
}  // namespace csam
