// Box-Muller for one pair of words: the bits of the vector form in cpu/random.h, every fused multiply-add written out.
#pragma once
#include <cmath>

#include "deviates.h"
#include "dtype.h"
#include "philox.h"

namespace csam {

// The polynomial of -2 ln: doubling is exact, so its bits are those of the logarithm's.
template <int i>
constexpr float kMinus2Log = -2.0f * kLog[i];

// Two independent standard normal deviates from two words: u1 = (a+1)/2^32, angle = 2 pi b/2^32.
CSAM_HOST_DEVICE static inline void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  const uint32_t bits = float_bits(fmaf(float(a), 0x1p-32f, 0x1p-32f));
  const int32_t exponent = int32_t(bits - 0x3F3504F3u) >> 23;
  const float f = bits_float(bits - (uint32_t(exponent) << 23)) - 1.0f;
  float p = kMinus2Log<7>;
  p = fmaf(p, f, kMinus2Log<6>);
  p = fmaf(p, f, kMinus2Log<5>);
  p = fmaf(p, f, kMinus2Log<4>);
  p = fmaf(p, f, kMinus2Log<3>);
  p = fmaf(p, f, kMinus2Log<2>);
  p = fmaf(p, f, kMinus2Log<1>);
  p = fmaf(p, f, kMinus2Log<0>);
  const float f2 = f * f;
  const float square = fmaf(p, f2 * f, fmaf(f, -2.0f, f2));
  const float radius = sqrtf(fmaf(float(exponent), -2.0f * kLn2, square));

  // The two top bits of b, rounded, are the nearest quarter turn; the rest, signed, is what is left of the angle.
  const uint32_t quarter = b + 0x20000000u;
  const float t = float(int32_t(b << 2)) * 0x1p-34f;
  const float t2 = t * t;
  float s = fmaf(fmaf(fmaf(kSin[3], t2, kSin[2]), t2, kSin[1]), t2, kSin[0]);
  const float c = fmaf(fmaf(fmaf(fmaf(kCos[4], t2, kCos[3]), t2, kCos[2]), t2, kCos[1]), t2, kCos[0]);
  s = s * t;
  const bool odd = (quarter & 0x40000000u) != 0;
  first = radius * bits_float(float_bits(odd ? s : c) ^ ((quarter + 0x40000000u) & 0x80000000u));
  second = radius * bits_float(float_bits(odd ? c : s) ^ (quarter & 0x80000000u));
}

// The four deviates of a quad.
CSAM_HOST_DEVICE static inline void normals(const Words& w, float out[4]) {
  box_muller(w.v[0], w.v[1], out[0], out[1]);
  box_muller(w.v[2], w.v[3], out[2], out[3]);
}

}  // namespace csam
