// Deviates of one quad of words: the bits of the vector form in cpu/random.h, every fused multiply-add written out.
#pragma once
#include <cmath>

#include "deviates.h"
#include "dtype.h"
#include "philox.h"

namespace csam {

// The polynomial of -2 ln: doubling is exact, so its bits are those of the logarithm's.
template <int i>
constexpr float kMinus2Log = -2.0f * kLog[i];

// -2 ln u for u in [2^-32, 1].
CSAM_HOST_DEVICE static inline float minus_2_log(float u) {
  const uint32_t bits = float_bits(u);
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
  return fmaf(float(exponent), -2.0f * kLn2, square);
}

// Two independent standard normal deviates from two words: u1 = (a+1)/2^32, angle = 2 pi b/2^32.
CSAM_HOST_DEVICE static inline void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  const float radius = sqrtf(minus_2_log(fmaf(float(a), 0x1p-32f, 0x1p-32f)));

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

// The four deviates of a quad. A word of a uniform or Laplace one is a sign and 31 bits m: u = (m + 1/2) / 2^31 is the
// size of the one, -2 ln u that of the other.
template <Law law>
CSAM_HOST_DEVICE static inline void deviates(const Words& w, float out[4]) {
  if constexpr (law == Law::kGaussian) {
    box_muller(w.v[0], w.v[1], out[0], out[1]);
    box_muller(w.v[2], w.v[3], out[2], out[3]);
  } else {
    for (int j = 0; j < 4; ++j) {
      const float u = fmaf(float(int32_t(w.v[j] & 0x7FFFFFFFu)), 0x1p-31f, 0x1p-32f);
      out[j] = bits_float(float_bits(law == Law::kUniform ? u : minus_2_log(u)) ^ (w.v[j] & 0x80000000u));
    }
  }
}

}  // namespace csam
