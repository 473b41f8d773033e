// smoothing_noise: a thread takes whole samples; the sample's noise is built in a scratch row that stays in cache,
// then rounded and written once in the layout the first convolution wants.
#include <stdlib.h>

#include "kernels.h"
#include "random.h"

namespace csam {
namespace CSAM_ISA {

struct Sample {
  const NoiseArgs& args;
  uint64_t index;
  Counter counter;

  Sample(const NoiseArgs& a, int64_t i) : args(a), index(a.first_sample + i) {
    csam::CSAM_ISA::counter(a.seed, index, a.stream, 0, counter);
  }
};

// The deviates of elements e .. e + 4*W - 1, that of value j of each quad in out[j].
template <Law law>
CSAM_INLINE void draw(const Quads& q, const Sample& s, int64_t e, vf out[4]) {
  const auto after = [&](int j, int lane) {
    return bits_after(s.args.seed, s.index, s.args.stream, uint64_t(e + 4 * lane + j));
  };
  deviates<law>(philox(q, s.counter), s.args.cells, after, out);
}

// x, table and out have room for whole groups of 4*W values.
template <Law law>
CSAM_INLINE void noisy_row(const float* x, const Quads* table, int64_t elements, const Sample& s, float* out) {
  const vf scale = splat(s.args.scale);
  for (int64_t e = 0; e < elements; e += 4 * W) {
    vf lanes[4], noise[4];
    draw<law>(*table++, s, e, lanes);
    interleave(lanes, noise);
    for (int j = 0; j < 4; ++j) store(out + e + j * W, noisy<law>(noise[j], load<vf>(x + e + j * W), scale));
  }
}

// The same rounded to bfloat16, for finite x that lies as the lanes do: value j of each quad of a group, j = 0..3.
template <Law law>
CSAM_INLINE void noisy_row_bf16(const float* x, const Quads* table, int64_t elements, const Sample& s, uint16_t* out) {
  const vf scale = splat(s.args.scale);
  vi low, high;
  for (int i = 0; i < W; ++i) low[i] = (i & 1) * W + i / 2, high[i] = low[i] + W / 2;
  for (int64_t e = 0; e < elements; e += 4 * W) {
    vf noise[4];
    vu rounded[4];
    draw<law>(*table++, s, e, noise);
    for (int j = 0; j < 4; ++j) {
      const vu bits = (vu)noisy<law>(noise[j], load<vf>(x + e + j * W), scale);
      rounded[j] = bits + 0x7FFFu + ((bits >> 16) & 1u);
    }
    const vu first = (rounded[1] & 0xFFFF0000u) | (rounded[0] >> 16);
    const vu second = (rounded[3] & 0xFFFF0000u) | (rounded[2] >> 16);
    store(out + e, __builtin_shuffle(first, second, low));
    store(out + e + 2 * W, __builtin_shuffle(first, second, high));
  }
}

template <int kind>
CSAM_INLINE vh narrow(vf v) {
  return kind == kBF16 ? to_bf16(v) : to_f16(v);
}

template <int kind>
CSAM_INLINE void narrow_row(const float* in, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, narrow<kind>(load<vf>(in + i)));
  if (i < n) {
    uint16_t last[W];
    store(last, narrow<kind>(load<vf>(in + i)));
    memcpy(out + i, last, 2 * (n - i));
  }
}

// [channels][pixels] -> [pixels][channels]
CSAM_INLINE void transpose(const float* in, int64_t channels, int64_t pixels, float* out) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; ++c) out[p * channels + c] = in[c * pixels + p];
}

CSAM_INLINE void transpose(const uint16_t* in, int64_t channels, int64_t pixels, uint16_t* out) {
  int64_t p = 0;
#if defined(__AVX512BW__)
  if (channels == 3) {  // 32 pixels a turn: two permutes for each of the three output vectors
    uint16_t first[3][32], second[3][32];
    for (int v = 0; v < 3; ++v)
      for (int i = 0; i < 32; ++i) {
        const int e = 32 * v + i, ch = e % 3, px = e / 3;
        first[v][i] = ch == 2 ? 0 : 32 * ch + px;
        second[v][i] = ch == 2 ? 32 + px : i;
      }
    __m512i f[3], s[3];
    for (int v = 0; v < 3; ++v) f[v] = _mm512_loadu_si512(first[v]), s[v] = _mm512_loadu_si512(second[v]);
    for (; p + 32 <= pixels; p += 32) {
      const __m512i a = _mm512_loadu_si512(in + p), b = _mm512_loadu_si512(in + pixels + p);
      const __m512i c = _mm512_loadu_si512(in + 2 * pixels + p);
      for (int v = 0; v < 3; ++v) {
        const __m512i ab = _mm512_permutex2var_epi16(a, f[v], b);
        _mm512_storeu_si512(out + 3 * p + 32 * v, _mm512_permutex2var_epi16(ab, s[v], c));
      }
    }
  }
#endif
  for (; p < pixels; ++p)
    for (int64_t c = 0; c < channels; ++c) out[p * channels + c] = in[c * pixels + p];
}

// What all samples share: the image, padded with zeros to whole groups and in the order in which it is read, and the
// quads' part of the generator.
struct Shared {
  float* x;
  Quads* table;
  bool by_lane;  // x lies as the lanes of a group do

  Shared(const NoiseArgs& a, int64_t elements, int64_t padded) : by_lane(a.dtype == kBF16) {
    x = static_cast<float*>(aligned_alloc(64, padded * sizeof(float)));
    table = static_cast<Quads*>(aligned_alloc(64, padded / (4 * W) * sizeof(Quads)));
    for (int64_t e = 0; e < elements; ++e) by_lane &= a.x[e] - a.x[e] == 0;  // NaN and inf take the careful road
    for (int64_t e = 0; e < padded; ++e) {
      const int64_t group = e / (4 * W) * (4 * W), quad = e % (4 * W) / 4;
      x[by_lane ? group + e % 4 * W + quad : e] = e < elements ? a.x[e] : 0;
    }
    Counter c;
    counter(a.seed, a.first_sample, a.stream, 0, c);
    for (int64_t g = 0; g < padded / (4 * W); ++g) table[g] = quads(uint32_t(g * W), c);
  }
  ~Shared() {
    free(x);
    free(table);
  }
};

template <Law law>
static void smoothing_noise(const NoiseArgs& a, int threads) {
  const int64_t to_turn = int64_t((uint64_t(1) << 32) - uint32_t(a.first_sample));
  if (a.n > to_turn) {  // the shared part of the generator is that of one high half of the sample index
    NoiseArgs head = a, tail = a;
    head.n = to_turn;
    tail.n = a.n - to_turn;
    tail.first_sample += to_turn;
    tail.out = static_cast<char*>(a.out) + to_turn * a.channels * a.pixels * element_size(a.dtype);
    smoothing_noise<law>(head, threads);
    smoothing_noise<law>(tail, threads);
    return;
  }
  const int64_t elements = a.channels * a.pixels, group = 4 * W;
  const int64_t padded = (elements + group - 1) / group * group;
  const bool transposed = a.channels_last && a.channels > 1 && a.pixels > 1;
  const bool direct = !transposed && padded == elements;
  const Shared shared(a, elements, padded);
#pragma omp parallel num_threads(threads)
  {
    float* scratch = static_cast<float*>(aligned_alloc(64, padded * sizeof(float)));
    // More than it holds, but a multiple of the alignment, which aligned_alloc asks for.
    uint16_t* half = static_cast<uint16_t*>(aligned_alloc(64, padded * sizeof(float)));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.n; ++i) {
      const Sample sample(a, i);
      float* out32 = static_cast<float*>(a.out) + i * elements;
      uint16_t* out16 = static_cast<uint16_t*>(a.out) + i * elements;
      if (shared.by_lane) {
        uint16_t* noisy = direct ? out16 : half;
        noisy_row_bf16<law>(shared.x, shared.table, elements, sample, noisy);
        if (transposed) transpose(noisy, a.channels, a.pixels, out16);
        else if (!direct) memcpy(out16, noisy, elements * sizeof(uint16_t));
        continue;
      }
      float* noisy = a.dtype == kF32 && direct ? out32 : scratch;
      noisy_row<law>(shared.x, shared.table, elements, sample, noisy);
      if (a.dtype == kF32) {
        if (transposed) transpose(noisy, a.channels, a.pixels, out32);
        else if (!direct) memcpy(out32, noisy, elements * sizeof(float));
      } else {
        uint16_t* narrowed = transposed ? half : out16;
        if (a.dtype == kBF16) narrow_row<kBF16>(noisy, elements, narrowed);
        else narrow_row<kF16>(noisy, elements, narrowed);
        if (transposed) transpose(narrowed, a.channels, a.pixels, out16);
      }
    }
    free(scratch);
    free(half);
  }
}

void smoothing_noise(const NoiseArgs& a, int threads) {
  switch (a.law) {
    case Law::kUniform: return smoothing_noise<Law::kUniform>(a, threads);
    case Law::kLaplace: return smoothing_noise<Law::kLaplace>(a, threads);
    case Law::kCells: return smoothing_noise<Law::kCells>(a, threads);
    default: return smoothing_noise<Law::kGaussian>(a, threads);
  }
}

void philox_uniform(float* out, int64_t n, int64_t k, uint64_t seed, uint64_t first, uint32_t stream) {
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t sample = first + i;
    const uint32_t low = uint32_t(sample), high = uint32_t(sample >> 32);
    for (int64_t j = 0; j < k; ++j) {
      const Words start = {{uint32_t(j / 4), low, high, stream}};
      const Words w = philox4x32(start, uint32_t(seed), uint32_t(seed >> 32) ^ kUniformDomain);
      out[i * k + j] = float(w.v[j % 4] >> 8) * 0x1p-24f;
    }
  }
}

}  // namespace CSAM_ISA
}  // namespace csam
