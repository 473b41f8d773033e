// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), scalar form.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define CSAM_HOST_DEVICE __host__ __device__
#else
#define CSAM_HOST_DEVICE
#endif

namespace csam {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Key tweaks that keep the four uses of one seed apart; smoothing noise has none (design contract).
constexpr uint32_t kPerturbDomain = 0x6D61736Bu;  // "mask"
constexpr uint32_t kUniformDomain = 0x756E6966u;  // "unif"
constexpr uint32_t kCellDomain = 0x63656C6Cu;     // "cell"

struct Words {
  uint32_t v[4];
};

// static: each instruction set compiles its own copy.
CSAM_HOST_DEVICE static inline Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * c.v[0];
    const uint64_t p1 = uint64_t(kPhiloxM1) * c.v[2];
    c = Words{{uint32_t(p1 >> 32) ^ c.v[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.v[3] ^ k1, uint32_t(p0)}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

}  // namespace csam
