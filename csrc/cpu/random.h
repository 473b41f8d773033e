// Vector Philox and deviates: W quads at a time, the bits of common/philox.h and common/normal.h in every lane.
#pragma once
#include "../common/deviates.h"
#include "../common/philox.h"
#include "kernels.h"
#include "simd.h"

namespace csam {
namespace CSAM_ISA {

// Everything of the counter but the quad index, and the keys of all rounds. What the first two rounds do to the words
// that are equal in all quads is done here once.
struct Counter {
  uint64_t key0[kPhiloxRounds], key1[kPhiloxRounds];
  uint64_t spread0, spread1;  // word 2 before round 2 and word 0 after it, but for the quad's part
  uint64_t fold2, word3;      // words 2 and 3 after round 2, but for the quad's part
};

// Out of line, so that the keys are in memory and each round broadcasts its own on a load port, which is idle.
__attribute__((noinline, unused)) static void counter(uint64_t seed, uint64_t sample, uint32_t stream, uint32_t domain,
                                                      Counter& c) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32) ^ domain;
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    c.key0[round] = k0;
    c.key1[round] = k1;
  }
  const uint64_t high = (sample >> 32) * kPhiloxM1;  // round 1: words 0 and 1 are alike in all quads
  const uint64_t low = (uint32_t(high >> 32) ^ uint32_t(sample) ^ c.key0[0]) * kPhiloxM0;
  c.spread0 = stream ^ c.key1[0];
  c.spread1 = uint32_t(high) ^ c.key0[1];
  c.fold2 = (low >> 32) ^ c.key1[1];
  c.word3 = uint32_t(low);
}

// The part of the first three rounds that depends on the quad alone, and not on the low half of the sample index: the
// same for 2^32 samples of one image. Even and odd quads lie apart, in 64-bit lanes.
struct Quads {
  vq word2[2], word0[2], word1[2], product[2];
};

CSAM_INLINE Quads quads(uint32_t first_quad, const Counter& c) {
  vq even = {};
  for (int i = 0; i < W / 2; ++i) even[i] = 2 * i;
  even = even + uint64_t(first_quad);
  const vq m0 = vq{} + uint64_t(kPhiloxM0), m1 = vq{} + uint64_t(kPhiloxM1);
  Quads q;
  for (int h = 0; h < 2; ++h) {
    const vq p0 = multiply_low(even + uint64_t(h), m0);
    const vq p1 = multiply_low((p0 >> 32) ^ c.spread0, m1);
    q.word2[h] = p0;
    q.word0[h] = (p1 >> 32) ^ c.spread1;
    q.word1[h] = p1 ^ c.key0[2];
    q.product[h] = multiply_low(q.word0[h], m0);
  }
  return q;
}

struct WordVectors {
  vu v[4];  // v[j] lane i = word j of quad (first + i)
};

// Even and odd quads go through the rounds in 64-bit lanes: one multiply gives both halves of a product, and the upper
// half of a lane may hold rubbish in between because the multiply never reads it.
CSAM_INLINE WordVectors philox(const Quads& q, const Counter& c) {
  const vq m0 = vq{} + uint64_t(kPhiloxM0), m1 = vq{} + uint64_t(kPhiloxM1);
  const vq fold = vq{} + c.fold2, third = vq{} + (c.word3 ^ c.key1[2]);
  vq x[2][4];
  for (int h = 0; h < 2; ++h) {  // round 3
    const vq p1 = multiply_low(q.word2[h] ^ fold, m1);
    x[h][0] = (p1 >> 32) ^ q.word1[h];
    x[h][1] = p1;
    x[h][2] = (q.product[h] >> 32) ^ third;
    x[h][3] = q.product[h];
  }
  for (int round = 3; round < kPhiloxRounds - 1; ++round) {
    const vq key0 = vq{} + c.key0[round], key1 = vq{} + c.key1[round];
    for (int h = 0; h < 2; ++h) {
      const vq p0 = multiply_low(x[h][0], m0), p1 = multiply_low(x[h][2], m1);
      x[h][0] = (p1 >> 32) ^ x[h][1] ^ key0;
      x[h][2] = (p0 >> 32) ^ x[h][3] ^ key1;
      x[h][1] = p1;
      x[h][3] = p0;
    }
  }
  // The last round puts even and odd quads together before the exclusive ors, which halves them.
  vq p0[2], p1[2];
  for (int h = 0; h < 2; ++h) p0[h] = multiply_low(x[h][0], m0), p1[h] = multiply_low(x[h][2], m1);
  const vu key0 = vu{} + uint32_t(c.key0[kPhiloxRounds - 1]), key1 = vu{} + uint32_t(c.key1[kPhiloxRounds - 1]);
  return {{join_high(p1[0], p1[1]) ^ join_low(x[0][1], x[1][1]) ^ key0, join_low(p1[0], p1[1]),
           join_high(p0[0], p0[1]) ^ join_low(x[0][3], x[1][3]) ^ key1, join_low(p0[0], p0[1])}};
}
CSAM_INLINE WordVectors philox(uint32_t first_quad, const Counter& c) { return philox(quads(first_quad, c), c); }

// Words of one quad for samples first .. first + W - 1, one a lane.
CSAM_INLINE WordVectors philox_samples(uint32_t quad, uint64_t first, uint32_t stream, uint64_t seed) {
  const vq m0 = vq{} + uint64_t(kPhiloxM0), m1 = vq{} + uint64_t(kPhiloxM1);
  vq x[2][4];
  for (int h = 0; h < 2; ++h) {
    vq sample = {};
    for (int i = 0; i < W / 2; ++i) sample[i] = 2 * i + h;
    sample = sample + first;
    x[h][0] = vq{} + uint64_t(quad);
    x[h][1] = sample;
    x[h][2] = sample >> 32;
    x[h][3] = vq{} + uint64_t(stream);
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1)
    for (int h = 0; h < 2; ++h) {
      const vq p0 = multiply_low(x[h][0], m0), p1 = multiply_low(x[h][2], m1);
      x[h][0] = (p1 >> 32) ^ x[h][1] ^ uint64_t(k0);
      x[h][2] = (p0 >> 32) ^ x[h][3] ^ uint64_t(k1);
      x[h][1] = p1;
      x[h][3] = p0;
    }
  WordVectors words;
  for (int j = 0; j < 4; ++j) words.v[j] = join_low(x[0][j], x[1][j]);
  return words;
}

// -2 ln u for u in [2^-32, 1].
CSAM_INLINE vf minus_2_log(vf u) {
  const vi bits = (vi)u;
  const vi exponent = (bits - 0x3F3504F3) >> 23;
  const vf f = (vf)(bits - (exponent << 23)) - 1.0f;
  // The polynomial of -2 ln: doubling is exact, so its bits are those of the logarithm's.
  vf p = splat(-2.0f * kLog[7]);
  for (int i = 6; i >= 0; --i) p = fma(p, f, splat(-2.0f * kLog[i]));
  const vf f2 = f * f;
  const vf square = fma(p, f2 * f, fma(f, splat(-2.0f), f2));  // +0 at u = 1, above 0 elsewhere
  return fma(to_float(exponent), splat(-2.0f * kLn2), square);
}

// Two independent standard normal deviates a lane from two words: u1 = (a+1)/2^32, angle = 2 pi b/2^32.
CSAM_INLINE void box_muller(vu a, vu b, vf& first, vf& second) {
  const vf tiny = splat(0x1p-32f);
  const vf radius = square_root(minus_2_log(fma(to_float(a), tiny, tiny)));

  // Range reduction on integers is exact: the two top bits of b, rounded, are the nearest quarter turn, and the rest
  // as a signed number is what is left of the angle.
  const vu quarter = b + 0x20000000u;
  const vf t = to_float((vi)(b << 2)) * 0x1p-34f;
  const vf t2 = t * t;
  vf s = splat(kSin[3]), c = splat(kCos[4]);
  for (int i = 2; i >= 0; --i) s = fma(s, t2, splat(kSin[i]));
  for (int i = 3; i >= 0; --i) c = fma(c, t2, splat(kCos[i]));
  s = s * t;
  const vi odd = (vi)(quarter & 0x40000000u) != 0;
  first = radius * flip_sign(odd ? s : c, quarter + 0x40000000u);
  second = radius * flip_sign(odd ? c : s, quarter);
}

// Four vectors with one quad a lane -> 4*W values in memory order.
template <class V>
CSAM_INLINE void interleave(const V in[4], V out[4]) {
  vi low, high;
  for (int i = 0; i < W; ++i) {
    low[i] = (i & 1) * W + i / 2;
    high[i] = low[i] + W / 2;
  }
  vi pair_low, pair_high;
  for (int i = 0; i < W; ++i) {
    pair_low[i] = ((i >> 1) & 1) * W + (i >> 2) * 2 + (i & 1);
    pair_high[i] = pair_low[i] + W / 2;
  }
  const V a0 = __builtin_shuffle(in[0], in[1], low), a1 = __builtin_shuffle(in[0], in[1], high);
  const V b0 = __builtin_shuffle(in[2], in[3], low), b1 = __builtin_shuffle(in[2], in[3], high);
  out[0] = __builtin_shuffle(a0, b0, pair_low);
  out[1] = __builtin_shuffle(a0, b0, pair_high);
  out[2] = __builtin_shuffle(a1, b1, pair_low);
  out[3] = __builtin_shuffle(a1, b1, pair_high);
}

// The 64 bits that come after an element's word where that does not decide: of a generator of its own.
__attribute__((noinline, cold, unused)) static uint64_t bits_after(uint64_t seed, uint64_t sample, uint32_t stream,
                                                                   uint64_t element) {
  const Words start = {{uint32_t(element), uint32_t(sample), uint32_t(sample >> 32), stream}};
  const Words w = philox4x32(start, uint32_t(seed), uint32_t(seed >> 32) ^ kCellDomain);
  return uint64_t(w.v[0]) << 32 | w.v[1];
}

// Steps of the grid drawn by a word a lane; `after(lane)` gives the 64 bits that follow it.
template <class After>
CSAM_INLINE vf steps(const Cells& cells, vu word, const After& after) {
  const int bits = cells.bits;
  const uint32_t low = (1u << bits) - 1;
  const vu column = word >> (32 - bits), fraction = word << bits;
  const vu entry = gather(cells.columns, column);
  const vu threshold = entry & ~low;
  vu number = fraction < threshold ? column : entry & low;
  if (__builtin_expect(any_equal(fraction, threshold), 0))
    for (int lane = 0; lane < W; ++lane)
      if (fraction[lane] == threshold[lane] && after(lane) < cells.rest[column[lane]]) number[lane] = column[lane];
  return to_float((vi)number - int32_t(1u << (bits - 1)));
}

// The deviates of W quads: out[j] lane i = deviate j of quad i, whose word is w.v[j] lane i. Those of `cells` take 64
// more bits where a word does not decide: after(j, lane).
template <Law law, class After>
CSAM_INLINE void deviates(const WordVectors& w, const Cells* cells, const After& after, vf out[4]) {
  if constexpr (law == Law::kGaussian) {
    box_muller(w.v[0], w.v[1], out[0], out[1]);
    box_muller(w.v[2], w.v[3], out[2], out[3]);
  } else {
    for (int j = 0; j < 4; ++j) {
      if constexpr (law == Law::kCells) {
        out[j] = steps(*cells, w.v[j], [&](int lane) { return after(j, lane); });
      } else {
        const vf u = fma(to_float((vi)(w.v[j] & 0x7FFFFFFFu)), splat(0x1p-31f), splat(0x1p-32f));
        out[j] = flip_sign(law == Law::kUniform ? u : minus_2_log(u), w.v[j]);
      }
    }
  }
}

// x + scale * deviate; or the point of a grid of `scale` steps to 1 that is so many steps from x, whose number is
// exact.
template <Law law>
CSAM_INLINE vf noisy(vf deviate, vf x, vf scale) {
  return law == Law::kCells ? (x + deviate) / scale : fma(scale, deviate, x);
}

}  // namespace CSAM_ISA
}  // namespace csam
