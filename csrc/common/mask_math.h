// Mask arithmetic shared by every provider: clipping, how a mask lies over a weight, the order of scores.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace csam {

CSAM_HOST_DEVICE static inline float clip01(float x) { return x < 0 ? 0.0f : x > 1 ? 1.0f : x; }

// How a mask lies over a weight [rows, cols]: value of (o, r) at o*row_stride + (r/span)*col_stride.
struct MaskLayout {
  int64_t rows, cols, row_stride, span, col_stride;
};

// One mask value a weight: the index of a weight is the index of its mask value.
CSAM_HOST_DEVICE static inline bool elementwise(const MaskLayout& l) {
  return l.span == 1 && l.col_stride == 1 && (l.row_stride == l.cols || l.rows == 1);
}

// Runs of consecutive weights under one mask value: `runs` in each row, `span` long but for the row's last.
CSAM_HOST_DEVICE static inline int64_t runs(const MaskLayout& l) { return (l.cols + l.span - 1) / l.span; }

// Unsigned keys in the order of the floats; -0 and +0 share one.
CSAM_HOST_DEVICE static inline uint32_t ordered_key(float x) {
  const uint32_t bits = float_bits(x + 0.0f);
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}

}  // namespace csam
