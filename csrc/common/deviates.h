// Laws of noise, and the polynomials of their deviates, shared by every provider so that their bits agree.
//
// Minimax fits (Remez) made for this library; largest error on the interval, before rounding:
//   sin(2 pi t) / t in t^2, |t| <= 1/8: 2e-8          cos(2 pi t) in t^2, |t| <= 1/8: 5e-11
//   (ln(1+f) - f + f^2/2) / f^3, f in [sqrt(1/2)-1, sqrt(2)-1]: 1e-8 of ln(1+f)
#pragma once

namespace csam {

// Deviates of these laws are drawn in the unit that is the least work; the caller's scale makes up for it
// (csam_kernels/laws.py).
enum class Law : int {
  kGaussian = 0,  // of standard deviation 1
  kUniform = 1,   // on [-1, 1]
  kLaplace = 2,   // of scale 2
  kCells = 3,     // whole numbers by a table (csam_kernels/cells.py), not of CUDA C++
};

constexpr float kSin[4] = {0x1.921fb6p+2f, -0x1.4abbbap+5f, 0x1.465ec6p+6f, -0x1.2d9bb8p+6f};
constexpr float kCos[5] = {0x1.0p+0f, -0x1.3bd3ccp+4f, 0x1.03c1dcp+6f, -0x1.55c57cp+6f, 0x1.d9c364p+5f};
constexpr float kLog[8] = {0x1.55554cp-2f, -0x1.000196p-2f, 0x1.99a49ap-3f, -0x1.549970p-3f,
                           0x1.22893cp-3f, -0x1.0bcdf4p-3f, 0x1.06e766p-3f, -0x1.456438p-4f};
constexpr float kLn2 = 0x1.62e430p-1f;

}  // namespace csam
