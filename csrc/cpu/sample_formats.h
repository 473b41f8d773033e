// How samples of a dtype lie in memory and in registers, on each instruction set, and the register tiles that multiply
// them.
#pragma once
#include "sample_block.h"

namespace csam {
namespace CSAM_ISA {

// The register tiles of formats whose sums are a vector of floats.
template <class Format>
struct Floats {
#if defined(__AVX512F__)
  static constexpr int kFilters = 4;
  static constexpr Micro kSparse[] = {{4, 4, add_taps<Format, 4, 4>}, {2, 8, add_taps<Format, 2, 8>},
                                      {2, 7, add_taps<Format, 2, 7>}, {1, 16, add_taps<Format, 1, 16>},
                                      {1, 4, add_taps<Format, 1, 4>}, {1, 1, add_taps<Format, 1, 1>}};
  static constexpr Micro kDense[] = {{1, 4, add_rows<Format, 4, 4>}, {1, 1, add_rows<Format, 4, 1>}};
#else
  static constexpr int kFilters = 3;
  static constexpr Micro kSparse[] = {{2, 4, add_taps<Format, 2, 4>},
                                      {2, 7, add_taps<Format, 2, 7>},
                                      {1, 8, add_taps<Format, 1, 8>},
                                      {1, 4, add_taps<Format, 1, 4>},
                                      {1, 1, add_taps<Format, 1, 1>}};
  static constexpr Micro kDense[] = {{1, 4, add_rows<Format, 3, 4>}, {1, 1, add_rows<Format, 3, 1>}};
#endif
};

// How samples lie: kLanes of them make a packed vector, and kSums vectors of sums; kWork vectors of Work where they are
// transformed (sample_winograd.h).
struct Float32 : Floats<Float32> {
  using Element = float;
  using Sum = vf;
  using Work = vf;
  static constexpr const char* kName = "float32";
  static constexpr int kLanes = W, kSums = 1, kWork = 1, kTogether = 1;  // channels of a unit
  using Image = float;
  using Logit = float;
  static uint32_t weight(float w) { return float_bits(w); }
  static uint32_t unit_weight(const float* w) { return float_bits(w[0]); }
  static vf pack(const float* in) { return load<vf>(in); }
  static void pack_unit(const float* const* in, float* out) { store(out, load<vf>(in[0])); }
  static void unpack(const float* in, vs* out) { *out = load<vf>(in); }
  static void pack_sums(const vf* in, float* out) { store(out, in[0]); }
  static void finish(const vs* sums, const float* other, const Ending& e, float* out) {
    store(out, finished(other ? sums[0] + load<vf>(other) : sums[0], e.low, e.high));
  }
  static float widen(Element v) { return v; }
  static vf rounded(vf v) { return v; }
  static vf start(float bias) { return splat(bias); }
  static void put(vf v, Element* out) { store(out, v); }
};

struct Bfloat16 : Floats<Bfloat16> {  // widened when it is packed
  using Element = uint16_t;
  using Sum = vf;
  using Work = vf;
  static constexpr const char* kName = "bfloat16";
  static constexpr int kLanes = W, kSums = 1, kWork = 1, kTogether = 1;
  using Image = uint16_t;
  using Logit = uint16_t;
  static uint32_t weight(float w) { return uint32_t(csam::to_bf16(w)) << 16; }
  static uint32_t unit_weight(const float* w) { return weight(w[0]); }
  static vf pack(const uint16_t* in) { return from_bf16(load<vh>(in)); }
  static void pack_unit(const uint16_t* const* in, float* out) { store(out, pack(in[0])); }
  static void unpack(const uint16_t* in, vs* out) { *out = pack(in); }
  static void pack_sums(const vf* in, float* out) { store(out, rounded(in[0])); }
  static void finish(const vs* sums, const uint16_t* other, const Ending& e, uint16_t* out) {
    store(out, to_bf16(finished(other ? sums[0] + from_bf16(load<vh>(other)) : sums[0], e.low, e.high)));
  }
  static float widen(Element v) { return csam::from_bf16(v); }
  static Element narrow(float v) { return csam::to_bf16(v); }
  static vf rounded(vf v) { return from_bf16(to_bf16(v)); }
  static vf start(float bias) { return splat(bias); }
  static void put(vf v, Element* out) { store(out, to_bf16(v)); }
};

#if defined(__AVX512F__)
#define CSAM_PAIRS __attribute__((target("avx512bf16"))) static
#else
#define CSAM_PAIRS static
#endif

// Whether values are integers of a unit of their own each time they are packed, and sums are left as floats.
template <class Format>
constexpr bool kFixed = false;

constexpr int64_t kFixedUnits = 32;  // whose sums stay in 32 bits

// F filters at a time, C pixels side by side; the channels of a pair lie interleaved.
template <class Format, int F, int C>
CSAM_PAIRS void add_row_pairs(const Block& b, int64_t filters, float* sums) {
  using V = std::conditional_t<kFixed<Format>, vi, vf>;
  constexpr int K = Format::kSums, N = K * C;
  const int64_t share = tiles(b.fetches, tiles(filters, F)), pixels = b.pixels;
  for (int64_t o = 0; o < filters; o += F, sums += F * K * pixels * W) {
    fetch(b, share);
    const uint32_t* weights = b.weights + o * b.products;
    for (int64_t row = 0; row < b.rows; ++row)
      for (int64_t column = 0; column < b.columns; column += C) {
        float* sum = sums + K * (row * b.columns + column) * W;
        const float* packed = b.packed + row * b.pitch + K * column * W;
        const uint32_t* w = weights;
        int64_t done = 0;
        do {
          const int64_t end = kFixed<Format> && done + kFixedUnits < b.products ? done + kFixedUnits : b.products;
          const bool fresh = b.bias && !done;
          const auto before = [&](int f, int i) __attribute__((always_inline)) {
            return fresh ? Format::start(b.bias[o + f]) : load<vf>(sum + (K * f * pixels + i) * W);
          };
          V v[F][N];
#pragma GCC unroll 32
          for (int f = 0; f < F; ++f)
#pragma GCC unroll 32
            for (int i = 0; i < N; ++i) v[f][i] = once(kFixed<Format> ? V{} : (V)before(f, i));
          for (; done < end; ++done, w += F) {
            const float* in = packed + b.offsets[done];
            vi x[N];
#pragma GCC unroll 32
            for (int i = 0; i < N; ++i) x[i] = load<vi>(in + i * W);
#pragma GCC unroll 32
            for (int f = 0; f < F; ++f) {
              const vi each = spread<vi>(w[f]);
#pragma GCC unroll 32
              for (int i = 0; i < N; ++i) v[f][i] = Format::dot(v[f][i], x[i], each);
            }
          }
          if (!kFixed<Format> && b.outputs) {
            finish<Format, F, 1, C>(b, filters, o, row, column, (const vs*)v);
            continue;
          }
#pragma GCC unroll 32
          for (int f = 0; f < F; ++f)
#pragma GCC unroll 32
            for (int i = 0; i < N; ++i) {
              const vf found = kFixed<Format> ? before(f, i) + to_float((vi)v[f][i]) : (vf)v[f][i];
              store(sum + (K * f * pixels + i) * W, found);
            }
        } while (done < b.products);
      }
  }
}

// Sums of products of 16-bit integers, two in each lane, modulo 2^32.
CSAM_INLINE vi add_words(vi sum, vi x, vi w) {
#if defined(__AVX512F__)
  return (vi)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16((__m512i)x, (__m512i)w));
#elif defined(__AVX2__)
  vi products;  // as assembly, in this order: with intrinsics the sums of a tile move between registers and memory
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(x), "x"(w));
  return sum;
#else
  const vi low = ((x << 16) >> 16) * ((w << 16) >> 16), high = (x >> 16) * (w >> 16);
  return (vi)((vu)sum + (vu)low + (vu)high);
#endif
}
CSAM_INLINE uint32_t word_pair(const float* w) { return uint16_t(int32_t(w[0])) | uint32_t(int32_t(w[1])) << 16; }

#if defined(__AVX2__)

// One tap, or two whose products enter the sums in one instruction. The one alone is paired with zeros times zero,
// which spread no NaN.
template <class Format, int R, int C, int Taps>
CSAM_PAIRS inline __attribute__((always_inline)) void add_pair(const float* packed, int64_t pitch, const Tap* t,
                                                               vf (*sum)[2]) {
  const auto w = Taps > 1 ? Format::weights(t[0], t[1]) : Format::weights(t[0]);
  const float *p = packed + t->offset, *q = Taps > 1 ? packed + t[1].offset : p;
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r, p += pitch, q += pitch)
#pragma GCC unroll 32
    for (int c = 0; c < C; ++c, ++sum) {
      const vi x = once(load<vi>(p + c * W)), y = once(Taps > 1 ? load<vi>(q + c * W) : vi{});
      (*sum)[0] = Format::dot((*sum)[0], low_pairs(x, y), w);
      (*sum)[1] = Format::dot((*sum)[1], high_pairs(x, y), w);
    }
}

template <class Format, int R, int C>
CSAM_PAIRS void add_pairs(const Block& b, int64_t filters, float* sums) {
  const int64_t share = tiles(b.fetches, filters), pixels = b.rows * b.columns;
  for (int64_t o = 0; o < filters; ++o, sums += 2 * pixels * W) {
    const Tap *first = b.taps + b.cuts[o], *end = b.taps + b.cuts[o + 1];
    fetch(b, share);
    if (!b.bias && first == end && !b.outputs) continue;
    const vf initial = Format::start(b.bias ? b.bias[o] : 0);
    for (int64_t row = 0; row < b.rows; row += R)
      for (int64_t column = 0; column < b.columns; column += C) {
        float* sum = sums + 2 * (row * b.columns + column) * W;
        const float* packed = b.packed + row * b.pitch + column * W;
        vf v[R * C][2];
#pragma GCC unroll 32
        for (int i = 0; i < 2 * R * C; ++i)
          v[i / 2][i % 2] = b.bias ? initial : load<vf>(sum + (2 * (i / 2 / C * b.columns + i / 2 % C) + i % 2) * W);
        const Tap* t = first;
        for (; end - t > 1; t += 2) add_pair<Format, R, C, 2>(packed, b.pitch, t, v);
        if (t < end) add_pair<Format, R, C, 1>(packed, b.pitch, t, v);
        if (b.outputs) {
          finish<Format, 1, R, C>(b, filters, o, row, column, (const vs*)v);
          continue;
        }
#pragma GCC unroll 32
        for (int i = 0; i < 2 * R * C; ++i)
          store(sum + (2 * (i / 2 / C * b.columns + i / 2 % C) + i % 2) * W, v[i / 2][i % 2]);
      }
  }
}
#endif

#if defined(__AVX512F__)
// a and, behind it, b as bfloat16: to nearest even, subnormals to 0. As assembly, since an intrinsic would ask every
// caller to be compiled for AVX512-BF16.
CSAM_INLINE __m512i rounded(vf a, vf b) {
  __m512i both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(b), "v"(a));
  return both;
}

struct Bfloat16Pairs {  // for AVX512-BF16; unpacking a vector gives the sums' order, and packing undoes it
  using Element = uint16_t;
  using Work = vf;
  static constexpr const char* kName = "bfloat16 pairs";
  static constexpr int kLanes = 2 * W, kSums = 2, kWork = 2, kTogether = 2, kFilters = 4;
  static constexpr Micro kSparse[] = {{2, 4, add_pairs<Bfloat16Pairs, 2, 4>},
                                      {1, 8, add_pairs<Bfloat16Pairs, 1, 8>},
                                      {1, 7, add_pairs<Bfloat16Pairs, 1, 7>},
                                      {1, 4, add_pairs<Bfloat16Pairs, 1, 4>},
                                      {1, 1, add_pairs<Bfloat16Pairs, 1, 1>}};
  static constexpr Micro kDense[] = {{1, 2, add_row_pairs<Bfloat16Pairs, 4, 2>},
                                     {1, 1, add_row_pairs<Bfloat16Pairs, 4, 1>}};
  using Image = uint16_t;
  using Logit = uint16_t;
  static uint32_t weight(float w) { return Bfloat16::weight(w); }
  static uint32_t unit_weight(const float* w) { return weight(w[0]) >> 16 | weight(w[1]); }
  CSAM_PAIRS inline __attribute__((always_inline)) vf dot(vf sum, vi x, vi w) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
  CSAM_INLINE vi weights(const Tap& t) { return spread<vi>(t.weight >> 16); }
  CSAM_INLINE vi weights(const Tap& t, const Tap& u) { return spread<vi>(t.weight >> 16 | u.weight); }
  static vf pack(const uint16_t* in) { return load<vf>(in); }
  static void pack_unit(const uint16_t* const* in, float* out) {
    const __m512i x = _mm512_loadu_si512(in[0]), y = _mm512_loadu_si512(in[1]);
    _mm512_store_si512(out, _mm512_unpacklo_epi16(x, y));
    _mm512_store_si512(out + W, _mm512_unpackhi_epi16(x, y));
  }
  static void unpack(const uint16_t* in, vs* out) {
    const __m512i x = once(_mm512_loadu_si512(in)), zero = _mm512_setzero_si512();
    out[0] = (vf)_mm512_unpacklo_epi16(zero, x);
    out[1] = (vf)_mm512_unpackhi_epi16(zero, x);
  }
  static void pack_sums(const vf* in, float* out) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = csam::CSAM_ISA::rounded(in[0], in[1]);
    _mm512_store_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
  }
  static void finish(const vs* sums, const uint16_t* other, const Ending& e, uint16_t* out) {
    vf first = sums[0], second = sums[1];
    if (other) {
      const __m512i o = _mm512_loadu_si512(other), zero = _mm512_setzero_si512();
      first += (vf)_mm512_unpacklo_epi16(zero, o);
      second += (vf)_mm512_unpackhi_epi16(zero, o);
    }
    const __m512i both = csam::CSAM_ISA::rounded(finished(first, e.low, e.high), finished(second, e.low, e.high));
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 1, 2,  3,  16, 17, 18, 19, 4,  5,  6,  7,  20, 21, 22, 23,
                                                        8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
  }
  static float widen(Element v) { return csam::from_bf16(v); }
  static Element narrow(float v) { return csam::to_bf16(v); }
  static vf rounded(vf v) { return from_bf16(to_bf16(v)); }
  static vf start(float bias) { return splat(bias); }
  static void put(vf v, Element* out) { store(out, to_bf16(v)); }
};
#endif

constexpr float kWhole =
    12582912;  // 1.5 * 2^23: added to it, a number is rounded, and the lowest bits are its integer's

// Two channels of a bfloat16 network in fixed point of 16 bits, finer than bfloat16 (sample_winograd.h).
template <class Base>
struct Bfloat16Words;
template <class Base>
constexpr bool kFixed<Bfloat16Words<Base>> = true;

template <class Base>
struct Bfloat16Words : Base {
  static constexpr int kTogether = 2, kFilters = W < 16 ? 2 : 4, kColumns = 4 / Base::kSums;
  static constexpr Micro kDense[] = {{1, kColumns, add_row_pairs<Bfloat16Words, kFilters, kColumns>},
                                     {1, 1, add_row_pairs<Bfloat16Words, kFilters, 1>}};
  // As assembly, for an intrinsic's sums, of another type, would move between registers.
  CSAM_INLINE vi dot(vi sum, vi x, vi w) {
#if defined(__AVX512F__)
    if constexpr (Base::kSums == 2) {
      asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
      return sum;
    }
#endif
    return add_words(sum, x, w);
  }
  static uint32_t unit_weight(const float* w) { return word_pair(w); }
  static void pack_words(const vf* in, float* out) {  // |in| < 2^15, to nearest
    store(out, ((vu)(in[0] + splat(kWhole)) & 0xFFFFu) | (vu)(in[1] + splat(kWhole)) << 16);
  }
};

CSAM_INLINE void store_bytes(vf v, uint8_t* out) {  // of whole numbers 0 .. 255
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32((__m512)v)));
#elif defined(__AVX2__)
  const __m256i n = _mm256_cvtps_epi32((__m256)v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(words, words));
#else
  for (int i = 0; i < W; ++i) out[i] = uint8_t(v[i]);
#endif
}
CSAM_INLINE vf nearest(vf v) {  // whole number, halves to even; for |v| < 2^22
  return (v + splat(kWhole)) - splat(kWhole);
}
CSAM_INLINE vf ended(vi sum, vf other, const Ending& e) {
  const vf y = fma(to_float(sum), splat(e.scale), fma(other, splat(e.other_scale), splat(e.shift)));
  return finished(y, e.low, e.high);
}

struct Integers {  // unsigned values times signed weights, summed in 32 bits: the same bits however they are multiplied
  using Element = uint8_t;
  using Image = float;
  using Logit = float;
  static constexpr const char* kName = "int8";
  static uint32_t weight(float w) { return uint32_t(int32_t(w)); }
  static float widen(float v) { return v; }
  static vf rounded(vf v) { return v; }
  static vf start(float bias) { return (vf)csam::CSAM_ISA::start(vi{}, bias); }
  static void put(vf v, uint8_t* out) { store_bytes(nearest(finished(v, 0, 255)), out); }
};

#if defined(__AVX2__)
struct Words {  // integers of 16 bits, of two channels together
  using Work = vw;
  static uint32_t unit_weight(const float* w) { return word_pair(w); }
  static void pack_sums(const vw* in, float* out) {
    store(out, low_pairs((vi)in[0], (vi)in[1]));
    store(out + W, high_pairs((vi)in[0], (vi)in[1]));
  }
};
#endif

struct Int8 : Integers {
  using Sum = vi;
  using Work = vi;
  static constexpr int kLanes = W, kSums = 1, kWork = 1, kTogether = 1, kFilters = Float32::kFilters;
#if defined(__AVX512F__)
  static constexpr Micro kSparse[] = {{4, 4, add_taps<Int8, 4, 4>},
                                      {1, 4, add_taps<Int8, 1, 4>},
                                      { 1,
                                        1,
                                        add_taps<Int8, 1, 1> }};
  static constexpr Micro kDense[] = {{1, 4, add_rows<Int8, 4, 4>}, { 1, 1, add_rows<Int8, 4, 1> }};
#else
  static constexpr Micro kSparse[] = {{2, 4, add_taps<Int8, 2, 4>},
                                      {1, 4, add_taps<Int8, 1, 4>},
                                      { 1,
                                        1,
                                        add_taps<Int8, 1, 1> }};
  static constexpr Micro kDense[] = {{1, 4, add_rows<Int8, 3, 4>}, { 1, 1, add_rows<Int8, 3, 1> }};
#endif
  static uint32_t unit_weight(const float* w) { return weight(w[0]); }
  static vf pack(const uint8_t* in) { return (vf) __builtin_convertvector(load<vb>(in), vi); }
  static void unpack(const uint8_t* in, vs* out) { *out = pack(in); }
  static void pack_sums(const vi* in, float* out) { store(out, in[0]); }
  static void pack_unit(const uint8_t* const* in, float* out) { store(out, pack(in[0])); }
  static void finish(const vs* sums, const uint8_t* other, const Ending& e, uint8_t* out) {
    const vf added = other ? __builtin_convertvector(load<vb>(other), vf) : vf{};
    const vf y = ended((vi)sums[0], added, e);
    if (e.real) store(out, y);
    else store_bytes(nearest(y), out);
  }
};

#if defined(__AVX512F__)
#define CSAM_VNNI __attribute__((target("avx512vnni"))) static

struct Quad {  // four vectors interleaved: of each sample its four values lie together
  __m512i v[4];
};
CSAM_INLINE Quad interleaved(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
  const __m512i ef = _mm512_unpackhi_epi8(a, b), gh = _mm512_unpackhi_epi8(c, d);
  return {{_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd), _mm512_unpacklo_epi16(ef, gh),
           _mm512_unpackhi_epi16(ef, gh)}};
}

template <class Format, int R, int C>
CSAM_VNNI void add_quads(const Block& b, int64_t filters, float* sums) {
  const int64_t share = tiles(b.fetches, filters), pixels = b.rows * b.columns;
  for (int64_t o = 0; o < filters; ++o, sums += 4 * pixels * W) {
    const Tap *first = b.taps + b.cuts[o], *end = b.taps + b.cuts[o + 1];
    fetch(b, share);
    if (!b.bias && first == end && !b.outputs) continue;
    const __m512i initial = _mm512_set1_epi32(b.bias ? int32_t(b.bias[o]) : 0);
    for (int64_t row = 0; row < b.rows; row += R)
      for (int64_t column = 0; column < b.columns; column += C) {
        float* sum = sums + 4 * (row * b.columns + column) * W;
        const float* packed = b.packed + row * b.pitch + column * W;
        __m512i v[R * C][4];
#pragma GCC unroll 32
        for (int i = 0; i < 4 * R * C; ++i)
          v[i / 4][i % 4] =
              b.bias ? initial : _mm512_load_si512(sum + (4 * (i / 4 / C * b.columns + i / 4 % C) + i % 4) * W);
        for (const Tap* t = first; t < end; t += 4) {
          const float* from[4];
          uint32_t weight = 0;
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {  // what is missing to four is multiplied by zero
            const Tap& tap = t + j < end ? t[j] : *t;
            from[j] = packed + tap.offset;
            weight |= (t + j < end ? tap.weight & 0xFFu : 0u) << (8 * j);
          }
          const __m512i w = _mm512_set1_epi32(int(weight));
#pragma GCC unroll 32
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
            for (int c = 0; c < C; ++c) {
              __m512i x[4];
#pragma GCC unroll 4
              for (int j = 0; j < 4; ++j) {
                x[j] = _mm512_load_si512(from[j] + r * b.pitch + c * W);
                asm("" : "+v"(x[j]));
              }
              const Quad q = interleaved(x[0], x[1], x[2], x[3]);
#pragma GCC unroll 4
              for (int j = 0; j < 4; ++j) v[r * C + c][j] = _mm512_dpbusd_epi32(v[r * C + c][j], q.v[j], w);
            }
        }
        if (b.outputs) {
          finish<Format, 1, R, C>(b, filters, o, row, column, (const vs*)v);
          continue;
        }
#pragma GCC unroll 32
        for (int i = 0; i < 4 * R * C; ++i)
          _mm512_store_si512(sum + (4 * (i / 4 / C * b.columns + i / 4 % C) + i % 4) * W, v[i / 4][i % 4]);
      }
  }
}

// F filters at a time at one pixel; the channels of a unit lie interleaved.
template <class Format, int F>
CSAM_VNNI void add_row_quads(const Block& b, int64_t filters, float* sums) {
  const int64_t share = tiles(b.fetches, tiles(filters, F)), pixels = b.pixels;
  for (int64_t o = 0; o < filters; o += F, sums += 4 * F * pixels * W) {
    fetch(b, share);
    const uint32_t* weights = b.weights + o * b.products;
    for (int64_t row = 0; row < b.rows; ++row)
      for (int64_t column = 0; column < b.columns; ++column) {
        float* sum = sums + 4 * (row * b.columns + column) * W;
        const float* packed = b.packed + row * b.pitch + 4 * column * W;
        __m512i v[F][4];
#pragma GCC unroll 32
        for (int f = 0; f < F; ++f)
#pragma GCC unroll 32
          for (int i = 0; i < 4; ++i)
            v[f][i] =
                b.bias ? _mm512_set1_epi32(int32_t(b.bias[o + f])) : _mm512_load_si512(sum + (4 * f * pixels + i) * W);
        const uint32_t* w = weights;
        for (int64_t p = 0; p < b.products; ++p, w += F) {
          const float* in = packed + b.offsets[p];
          __m512i x[4];
#pragma GCC unroll 32
          for (int i = 0; i < 4; ++i) x[i] = _mm512_load_si512(in + i * W);
#pragma GCC unroll 32
          for (int f = 0; f < F; ++f) {
            const __m512i each = _mm512_set1_epi32(int(w[f]));
#pragma GCC unroll 32
            for (int i = 0; i < 4; ++i) v[f][i] = Format::dot(v[f][i], x[i], each);
          }
        }
        if (b.outputs) {
          finish<Format, F, 1, 1>(b, filters, o, row, column, (const vs*)v);
          continue;
        }
#pragma GCC unroll 32
        for (int f = 0; f < F; ++f)
#pragma GCC unroll 32
          for (int i = 0; i < 4; ++i) _mm512_store_si512(sum + (4 * f * pixels + i) * W, v[f][i]);
      }
  }
}

struct Int8Quads : Integers {  // for AVX512-VNNI; interleaving gives the sums' order, and packing undoes it
  static constexpr int kLanes = 4 * W, kSums = 4, kTogether = 4, kFilters = 4;
  static constexpr Micro kSparse[] = {
      {2, 2, add_quads<Int8Quads, 2, 2>}, {1, 4, add_quads<Int8Quads, 1, 4>}, {1, 1, add_quads<Int8Quads, 1, 1>}};
  static constexpr Micro kDense[] = {{1, 1, add_row_quads<Int8Quads, 4>}};
  CSAM_VNNI inline __attribute__((always_inline)) __m512i dot(__m512i sum, __m512i x, __m512i w) {
    return _mm512_dpbusd_epi32(sum, x, w);
  }
  static uint32_t unit_weight(const float* w) {
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits |= (weight(w[i]) & 0xFFu) << (8 * i);
    return bits;
  }
  static vf pack(const uint8_t* in) { return load<vf>(in); }
  static void pack_unit(const uint8_t* const* in, float* out) {
    const Quad q = interleaved(_mm512_loadu_si512(in[0]), _mm512_loadu_si512(in[1]), _mm512_loadu_si512(in[2]),
                               _mm512_loadu_si512(in[3]));
    for (int i = 0; i < 4; ++i) _mm512_store_si512(out + i * W, q.v[i]);
  }
  static void finish(const vs* sums, const uint8_t* other, const Ending& e, uint8_t* out) {
    const __m512i zero = _mm512_setzero_si512();
    const vf scale = splat(e.scale), shift = splat(e.shift), high = splat(e.high);
    vf y[4];
    for (int i = 0; i < 4; ++i) y[i] = to_float((vi)sums[i]);
    if (other) {
      const Quad o = interleaved(_mm512_loadu_si512(other), zero, zero, zero);
      for (int i = 0; i < 4; ++i) y[i] = fma(y[i], scale, fma(to_float((vi)o.v[i]), splat(e.other_scale), shift));
    } else {
      for (int i = 0; i < 4; ++i) y[i] = fma(y[i], scale, shift);
    }
    if (e.real) {
      float real[4][W];  // y stays in registers where there is nothing to store of it
      for (int i = 0; i < 4; ++i) store(real[i], finished(y[i], e.low, e.high));
      for (int s = 0; s < kLanes; ++s) store(out + 4 * s, real[s % 16 / 4][s / 16 * 4 + s % 4]);
      return;
    }
    if (e.low > 0)
      for (int i = 0; i < 4; ++i) y[i] = (vf)_mm512_max_ps((__m512)y[i], (__m512)splat(e.low));
    __m512i n[4];  // what is below 0 packing makes 0
    for (int i = 0; i < 4; ++i) n[i] = _mm512_cvtps_epi32(_mm512_min_ps((__m512)y[i], (__m512)high));
    _mm512_storeu_si512(out, _mm512_packus_epi16(_mm512_packs_epi32(n[0], n[1]), _mm512_packs_epi32(n[2], n[3])));
  }
};

struct Int8Words : Int8Quads, Words {  // in the sums' order of Int8Quads
  static constexpr int kWork = 2, kTogether = 2;
  static constexpr Micro kDense[] = {{1, 1, add_row_quads<Int8Words, 4>}};
  using Words::unit_weight;
  CSAM_VNNI inline __attribute__((always_inline)) __m512i dot(__m512i sum, __m512i x, __m512i w) {
    return _mm512_dpwssd_epi32(sum, x, w);
  }
  static void unpack_words(const uint8_t* in, vw* out) {
    const __m512i x = once(_mm512_loadu_si512(in)), zero = _mm512_setzero_si512();
    out[0] = (vw)_mm512_unpacklo_epi8(x, zero), out[1] = (vw)_mm512_unpackhi_epi8(x, zero);
  }
};

#elif defined(__AVX2__)
struct Int8Pairs : Integers, Words {  // unpacking a vector gives the sums' order, and packing undoes it
  static constexpr int kLanes = 2 * W, kSums = 2, kWork = 1, kTogether = 2, kFilters = 2;
  static constexpr Micro kSparse[] = {{1, 4, add_pairs<Int8Pairs, 1, 4>}, {1, 1, add_pairs<Int8Pairs, 1, 1>}};
  static constexpr Micro kDense[] = {{1, 2, add_row_pairs<Int8Pairs, 2, 2>}, {1, 1, add_row_pairs<Int8Pairs, 2, 1>}};
  CSAM_INLINE vf dot(vf sum, vi x, vi w) { return (vf)add_words((vi)sum, x, w); }
  CSAM_INLINE vi weights(const Tap& t) { return spread<vi>(t.weight); }
  CSAM_INLINE vi weights(const Tap& t, const Tap& u) {
    return (vi)_mm256_blend_epi16((__m256i)spread<vi>(t.weight), (__m256i)(spread<vi>(u.weight) << 16), 0xAA);
  }
  CSAM_INLINE vi widened(const uint8_t* in) { return (vi)_mm256_cvtepu8_epi16(load<__m128i>(in)); }
  static vf pack(const uint8_t* in) { return (vf)widened(in); }
  static void pack_unit(const uint8_t* const* in, float* out) {
    const vi x = widened(in[0]), y = widened(in[1]);
    store(out, low_pairs(x, y));
    store(out + W, high_pairs(x, y));
  }
  static void unpack(const uint8_t* in, vs* out) {
    const vi x = widened(in);
    out[0] = (vf)low_pairs(x, vi{}), out[1] = (vf)high_pairs(x, vi{});
  }
  static void unpack_words(const uint8_t* in, vw* out) { *out = (vw)widened(in); }
  static void finish(const vs* sums, const uint8_t* other, const Ending& e, uint8_t* out) {
    const vi o = other ? widened(other) : vi{};
    const vf first = ended((vi)sums[0], to_float(low_pairs(o, vi{})), e);
    const vf second = ended((vi)sums[1], to_float(high_pairs(o, vi{})), e);
    if (e.real) {
      store(out, _mm256_permute2f128_ps((__m256)first, (__m256)second, 0x20));
      store(out + 4 * W, _mm256_permute2f128_ps((__m256)first, (__m256)second, 0x31));
      return;
    }
    const __m256i n = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)first), _mm256_cvtps_epi32((__m256)second));
    store(out, _mm_packus_epi16(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1)));
  }
};
#endif

}  // namespace CSAM_ISA
}  // namespace csam
