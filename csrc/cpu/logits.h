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

// Class of the first largest logit, or -1 when the row holds NaN. Of many classes the largest is found first, in lanes.
template <class T>
CSAM_INLINE int64_t winner(const T* row, int64_t classes) {
  using Value = decltype(value(row[0]));
  constexpr int64_t kLanes = 16;
  Value best = value(row[0]);
  int64_t arg = 0, c = 1;
  bool nan = best != best;
  if (classes >= 4 * kLanes) {
    Value most[kLanes];
    int32_t wrong[kLanes] = {};
    for (int64_t i = 0; i < kLanes; ++i) most[i] = best;
    for (c = 0; c + kLanes <= classes; c += kLanes)
      for (int64_t i = 0; i < kLanes; ++i) {
        const Value v = value(row[c + i]);
        wrong[i] |= v != v;
        most[i] = v > most[i] ? v : most[i];
      }
    for (int64_t i = 0; i < kLanes; ++i) {
      nan |= wrong[i] != 0;
      best = most[i] > best ? most[i] : best;
    }
    while (!nan && value(row[arg]) != best) ++arg;
  }
  for (; c < classes; ++c) {
    const Value v = value(row[c]);
    nan |= v != v;
    if (v > best) best = v, arg = c;
  }
  return nan ? -1 : arg;
}

}  // namespace CSAM_ISA
}  // namespace csam
