// Element types by code and their conversions to and from float32, rounding to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

#include "philox.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace csam {

enum DType : int { kF32 = 0, kF64 = 1, kBF16 = 2, kF16 = 3, kBool = 4, kInt8 = 5 };

CSAM_HOST_DEVICE static inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
CSAM_HOST_DEVICE static inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

CSAM_HOST_DEVICE static inline float from_bf16(uint16_t h) { return bits_float(uint32_t(h) << 16); }

// The device has an instruction for what the host does on integers; NaN stays NaN in both.
CSAM_HOST_DEVICE static inline uint16_t to_bf16(float x) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = float_bits(x);
  if (x != x) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
#endif
}

CSAM_HOST_DEVICE static inline float from_f16(uint16_t h) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(h));
#else
  _Float16 f;
  memcpy(&f, &h, sizeof f);
  return float(f);
#endif
}

CSAM_HOST_DEVICE static inline uint16_t to_f16(float x) {
#if defined(__CUDACC__)
  return __half_as_ushort(__float2half_rn(x));
#else
  const _Float16 f = _Float16(x);
  uint16_t h;
  memcpy(&h, &f, sizeof h);
  return h;
#endif
}

}  // namespace csam
