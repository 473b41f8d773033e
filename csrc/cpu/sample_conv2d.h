// Convolution with the samples innermost, [C, H, W, S], of weights in compressed rows. A job is a tile of output pixels
// of one vector of samples. The input under it is packed a few channels at a time, padded and with strides undone, into
// a block that stays in the first-level cache; over that block every filter adds its taps, in ascending order, to the
// tile's sums. Sparse: each filter its own taps, the sums of a register tile of pixels at a time. Dense: kFilters
// filters share what they load; only live filters and channels take part.
#pragma once
#include <stdlib.h>

#include <new>
#include <type_traits>

#include "../common/dtype.h"
#include "kernels.h"
#include "simd.h"

namespace csam {
namespace CSAM_ISA {

// Bytes that a packed block may take, and what a multiply-add over it costs: in a first-level cache beside sums, all of
// it, or in a second-level cache. Few surviving weights are better off far away at once than near, some at a time, with
// sums put down in between. Measured on AMD EPYC family 26, ResNet-18 in bfloat16 at densities of 0.02 to 0.5.
struct Room {
  int64_t bytes;
  double cost;
};
#if defined(__AVX512F__)
constexpr Room kSparseRooms[] = {{20 << 10, 1}, {48 << 10, 1.09}, {96 << 10, 1.24}, {192 << 10, 1.28}};
constexpr Room kDenseRooms[] = {{40 << 10, 1}};
#else  // of 32 KB in the first level, AMD EPYC family 25 model 1
constexpr Room kSparseRooms[] = {{14 << 10, 1}, {28 << 10, 1.05}, {48 << 10, 1.2}, {96 << 10, 1.3}, {192 << 10, 1.4}};
constexpr Room kDenseRooms[] = {{28 << 10, 1}};
#endif
constexpr int64_t kNearBytes = 1 << 20;   // of input that needs no prefetch
constexpr int64_t kSumBytes = 512 << 10;  // of sums that a job keeps: half of a second-level cache
constexpr int64_t kMostTileRows = 32;
constexpr int64_t kTurn = 8;             // filters, at least, whose results are stored while their sums are near
constexpr int64_t kMostLines = 1 << 20;  // of a channel under a tile of more than one pixel
constexpr double kPackCost = 3;          // of one packed vector, in fused multiply-adds
constexpr double kTurnCost = 20;         // of one filter's turn over a block
constexpr double kSumCost = 2;           // of one sum put down and taken up again
constexpr double kEndCost = 6;           // of storing one vector of results
constexpr double kRunCost = 20;          // of a row of one filter's results, wherever it goes
constexpr double kJobCost = 100;         // of a tile, whatever it holds
// Sums that keep multiply-adds busy: two a cycle, of four cycles; of integers the product is not waited for.
template <class Format>
constexpr double kChains = std::is_same_v<typename Format::Element, uint8_t> && Format::kSums < 4 ? 2 : 8;

// Whether sums begin as short ones of half the width (sample_halves.h), of so many products. What that costs, reckoned
// for a Xeon (family 6, model 207) and not measured: packing a vector, a short sum that enters the long one, and blocks
// out of a first-level cache of 48 KB that gives two vectors a cycle, a second-level one less than one.
template <class Format>
constexpr bool kShortSums = false;
constexpr int64_t kShort = 64;
constexpr double kHalvesPackCost = 9, kEnterCost = 7;
constexpr Room kHalvesRooms[] = {{20 << 10, 1}, {40 << 10, 1.1}, {96 << 10, 2}, {192 << 10, 2.2}};

constexpr int64_t kPooledBytes = 1 << 20;

CSAM_INLINE int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

template <class T>
struct Array {  // zeroed memory, aligned to a vector; much of it lies on huge pages, for all of it is read in turn
  T* data = nullptr;
  int64_t block = 0;  // bytes, of one that goes back to `give_block`
  Array() = default;
  explicit Array(int64_t n) {
    const int64_t bytes = int64_t(sizeof(T)) * (n > 0 ? n : 1);
    if (bytes >= kPooledBytes) {
      data = static_cast<T*>(take_block(bytes));
      block = bytes;
    } else {
      data = static_cast<T*>(aligned_alloc(64, tiles(bytes, 64) * 64));
      if (!data) throw std::bad_alloc();
    }
    memset(static_cast<void*>(data), 0, bytes);
  }
  Array(const Array&) = delete;
  Array& operator=(Array&& from) {
    release();
    data = from.data;
    block = from.block;
    from.data = nullptr;
    from.block = 0;
    return *this;
  }
  Array(Array&& from) { *this = static_cast<Array&&>(from); }
  ~Array() { release(); }
  T& operator[](int64_t i) const { return data[i]; }

 private:
  void release() {
    if (block) give_block(data, block);
    else free(data);
  }
};

// The input lines under a tile's rows or columns, ordered so that outputs side by side read lines side by side.
struct Axis {
  int64_t lines = 0;
  Array<int64_t> source;  // line -> input position, counted from the first output's first tap
  Array<int64_t> first;   // tap -> line that the first output reads
  Axis(int64_t kernel, int64_t stride, int64_t dilation, int64_t outputs) : source(kernel * outputs), first(kernel) {
    for (int64_t k = 0; k < kernel; ++k) first[k] = -1;
    for (int64_t start = 0; start < kernel; ++start) {
      if (first[start] >= 0) continue;
      int64_t end = 0;
      for (int64_t k = start; k < kernel; ++k) {  // the taps whose positions differ by whole strides share lines
        if ((k - start) * dilation % stride) continue;
        const int64_t at = (k - start) * dilation / stride, fresh = at > end ? at : end;
        first[k] = lines - (fresh - at);
        end = at + outputs;
        for (int64_t i = fresh; i < end; ++i) source[lines++] = start * dilation + i * stride;
      }
    }
  }
};

struct Tap {
  uint32_t weight;  // bits of a float or an integer, as the format multiplies
  int32_t offset;   // of the first output's input in the packed block, in floats
};

struct Ending {  // from sums to what is stored: clamp(sum + other), or of integers clamp(sum * scale + shift + other *
                 // ...)
  float low, high, scale, shift, other_scale;
  bool real;  // integers: stored as float
};

struct Outputs {      // where the results of a tile lie whose samples fill a vector
  const void* other;  // what is added, or null
  void* out;
  const int64_t* row_at;  // of each row, from `out` on, in values
  int64_t rows, columns;  // of the tile that are inside the image
  int64_t plane, step;    // values from one filter's to the next's, and from one column's
  int64_t width;          // of a stored value, in elements
  const int32_t* filter;  // which each filter of the block is
  const float* scales;
  Ending ending;
};

struct Input {  // the lines under a tile, of one channel after another
  const char* in;
  const int64_t* offsets;  // of each line in a channel, in bytes; -1 outside the image
  int64_t lines, plane;    // of a channel: lines under the tile, bytes
  const int32_t* channel;  // which each channel that is read is
  int64_t next, end;       // channels to fetch
  int64_t line;            // of channel `next`
};

struct Block {  // some channels of the input under one tile, and what the filters take from them
  const float* packed;
  int64_t pitch;          // floats from row to row
  int64_t rows, columns;  // of the tile
  int64_t pixels;         // from one filter's sums to the next's
  const Tap* taps;
  const int32_t* cuts;               // sparse: where the taps of each filter begin; they end at the cut after it
  const float* powers;               // short sums: what each filter's are multiplied by
  const int32_t* before;             // short sums: products of each filter in the blocks before
  float* halves;                     // short sums: those that are put down
  bool last;                         // of the blocks
  const uint32_t* weights;           // dense: [filters / kFilters][products][kFilters]
  const int32_t* offsets;            // dense: of what each product reads of the first output's input, in floats
  int64_t products;                  // dense: of a filter
  const float* bias;                 // what the sums start from; null after the first block, but for short sums
  Input* ahead;                      // the block after it, to fetch meanwhile
  int64_t fetches;                   // so many lines
  const Outputs* outputs = nullptr;  // where results go straight from the sums; after the last block
};

CSAM_INLINE void fetch(const Block& b, int64_t lines) {
  if (!b.fetches) return;
  Input& from = *b.ahead;
  for (; lines > 0 && from.next < from.end; --lines) {
    const int64_t offset = from.offsets[from.line];
    if (offset >= 0) __builtin_prefetch(from.in + from.channel[from.next] * from.plane + offset, 0, 2);
    if (++from.line == from.lines) from.line = 0, ++from.next;
  }
}

CSAM_INLINE vf finished(vf sum, float low, float high) {  // NaN stays NaN
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)splat(high), _mm512_max_ps((__m512)splat(low), (__m512)sum));
#endif
  sum = sum < splat(low) ? splat(low) : sum;
  return sum > splat(high) ? splat(high) : sum;
}

CSAM_INLINE vf product_sum(vf a, vf b, vf c) { return fma(a, b, c); }
CSAM_INLINE vi product_sum(vi a, vi b, vi c) { return a * b + c; }
template <class V>
CSAM_INLINE V spread(uint32_t bits) {
  return (V)(vu{} + bits);
}
CSAM_INLINE vf start(vf, float bias) { return splat(bias); }
CSAM_INLINE vi start(vi, float bias) { return vi{} + int32_t(bias); }

// What the sums of a register tile come to, of F filters at R x C pixels. The outputs are read now, and all of them
// before the first result is stored: over the loop before, and over the stores, they would take registers or be read
// again.
template <class Format, int F, int R, int C>
CSAM_INLINE void finish(const Block& b, int64_t filters, int64_t o, int64_t row, int64_t column, const vs* sums) {
  using Element = typename Format::Element;
  const Outputs* outputs = b.outputs;
  asm volatile("" : "+r"(outputs));
  const auto* other = static_cast<const Element*>(outputs->other);
  auto* out = static_cast<Element*>(outputs->out);
  const int64_t rows = outputs->rows - row, columns = outputs->columns - column, step = outputs->step;
  const int64_t width = sizeof(Element) == 1 ? outputs->width : 1;
  Ending ending = outputs->ending;
  int64_t places[F][R];
  float scales[F];
#pragma GCC unroll 4
  for (int f = 0; f < F; ++f) {
    scales[f] = outputs->scales[o + f];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      places[f][r] = outputs->filter[o + f] * outputs->plane + outputs->row_at[row + r] + column * step;
  }
  const auto store_all = [&](auto plain) __attribute__((always_inline)) {  // of a tile inside the image, nothing to add
#pragma GCC unroll 4
    for (int f = 0; f < F; ++f)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) {
          if (!plain.value && (o + f >= filters || r >= rows || c >= columns)) continue;
          const int64_t at = places[f][r] + c * step;
          ending.scale = scales[f];
          Format::finish(sums + ((f * R + r) * C + c) * Format::kSums, !plain.value && other ? other + at : nullptr,
                         ending, out + at * width);
        }
  };
  if (!other && o + F <= filters && rows >= R && columns >= C) store_all(std::true_type{});
  else store_all(std::false_type{});
}

using Add = void (*)(const Block&, int64_t filters, float* sums);

template <class Format, int R, int C>
static void add_taps(const Block& b, int64_t filters, float* sums) {
  using V = typename Format::Sum;
  const int64_t share = tiles(b.fetches, filters), pixels = b.rows * b.columns;
  for (int64_t o = 0; o < filters; ++o, sums += pixels * W) {
    const Tap *first = b.taps + b.cuts[o], *end = b.taps + b.cuts[o + 1];
    fetch(b, share);
    if (!b.bias && first == end && !b.outputs) continue;
    const V initial = start(V{}, b.bias ? b.bias[o] : 0);
    for (int64_t row = 0; row < b.rows; row += R)
      for (int64_t column = 0; column < b.columns; column += C) {
        float* sum = sums + (row * b.columns + column) * W;
        const float* packed = b.packed + row * b.pitch + column * W;
        V v[R][C];
#pragma GCC unroll 32
        for (int i = 0; i < R * C; ++i)
          v[i / C][i % C] = b.bias ? initial : load<V>(sum + (i / C * b.columns + i % C) * W);
        for (const Tap* t = first; t < end; ++t) {
          const V w = spread<V>(t->weight);
          const float* in = packed + t->offset;
#pragma GCC unroll 32
          for (int r = 0; r < R; ++r, in += b.pitch)
#pragma GCC unroll 32
            for (int c = 0; c < C; ++c) v[r][c] = product_sum(w, load<V>(in + c * W), v[r][c]);
        }
        if (b.outputs) {
          finish<Format, 1, R, C>(b, filters, o, row, column, (const vs*)v);
          continue;
        }
#pragma GCC unroll 32
        for (int i = 0; i < R * C; ++i) store(sum + (i / C * b.columns + i % C) * W, v[i / C][i % C]);
      }
  }
}

// F filters at a time, C pixels side by side: what is fewer is held in registers, the others come one by one.
template <class Format, int F, int C>
static void add_rows(const Block& b, int64_t filters, float* sums) {
  using V = typename Format::Sum;
  const int64_t share = tiles(b.fetches, tiles(filters, F)), pixels = b.pixels;
  for (int64_t o = 0; o < filters; o += F, sums += F * pixels * W) {
    fetch(b, share);
    const uint32_t* weights = b.weights + o * b.products;
    for (int64_t row = 0; row < b.rows; ++row)
      for (int64_t column = 0; column < b.columns; column += C) {
        float* sum = sums + (row * b.columns + column) * W;
        const float* packed = b.packed + row * b.pitch + column * W;
        V v[F][C];
#pragma GCC unroll 32
        for (int i = 0; i < F * C; ++i)
          v[i / C][i % C] = b.bias ? start(V{}, b.bias[o + i / C]) : load<V>(sum + (i / C * pixels + i % C) * W);
        const uint32_t* w = weights;
        for (int64_t p = 0; p < b.products; ++p, w += F) {
          const float* in = packed + b.offsets[p];
          if constexpr (F < C) {
            V each[F];
#pragma GCC unroll 32
            for (int f = 0; f < F; ++f) each[f] = spread<V>(w[f]);
#pragma GCC unroll 32
            for (int c = 0; c < C; ++c) {
              const V x = load<V>(in + c * W);
#pragma GCC unroll 32
              for (int f = 0; f < F; ++f) v[f][c] = product_sum(each[f], x, v[f][c]);
            }
          } else {
            V x[C];
#pragma GCC unroll 32
            for (int c = 0; c < C; ++c) x[c] = load<V>(in + c * W);
#pragma GCC unroll 32
            for (int f = 0; f < F; ++f) {
              const V each = spread<V>(w[f]);
#pragma GCC unroll 32
              for (int c = 0; c < C; ++c) v[f][c] = product_sum(each, x[c], v[f][c]);
            }
          }
        }
        if (b.outputs) {
          finish<Format, F, 1, C>(b, filters, o, row, column, (const vs*)v);
          continue;
        }
#pragma GCC unroll 32
        for (int i = 0; i < F * C; ++i) store(sum + (i / C * pixels + i % C) * W, v[i / C][i % C]);
      }
  }
}

struct Micro {  // a register tile
  int64_t rows, columns;
  Add add;
};

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
  static Element narrow(float v) { return v; }
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

#if defined(__AVX2__)
#if defined(__AVX512F__)
#define CSAM_PAIRS __attribute__((target("avx512bf16"))) static
#else
#define CSAM_PAIRS static
#endif

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

// F filters at a time, C pixels side by side; the channels of a pair lie interleaved.
template <class Format, int F, int C>
CSAM_PAIRS void add_row_pairs(const Block& b, int64_t filters, float* sums) {
  const int64_t share = tiles(b.fetches, tiles(filters, F)), pixels = b.pixels;
  for (int64_t o = 0; o < filters; o += F, sums += 2 * F * pixels * W) {
    fetch(b, share);
    const uint32_t* weights = b.weights + o * b.products;
    for (int64_t row = 0; row < b.rows; ++row)
      for (int64_t column = 0; column < b.columns; column += C) {
        float* sum = sums + 2 * (row * b.columns + column) * W;
        const float* packed = b.packed + row * b.pitch + 2 * column * W;
        vf v[F][2 * C];
#pragma GCC unroll 32
        for (int f = 0; f < F; ++f)
#pragma GCC unroll 32
          for (int i = 0; i < 2 * C; ++i)
            v[f][i] = b.bias ? Format::start(b.bias[o + f]) : load<vf>(sum + (2 * f * pixels + i) * W);
        const uint32_t* w = weights;
        for (int64_t p = 0; p < b.products; ++p, w += F) {
          const float* in = packed + b.offsets[p];
          vi x[2 * C];
#pragma GCC unroll 32
          for (int i = 0; i < 2 * C; ++i) x[i] = load<vi>(in + i * W);
#pragma GCC unroll 32
          for (int f = 0; f < F; ++f) {
            const vi each = spread<vi>(w[f]);
#pragma GCC unroll 32
            for (int i = 0; i < 2 * C; ++i) v[f][i] = Format::dot(v[f][i], x[i], each);
          }
        }
        if (b.outputs) {
          finish<Format, F, 1, C>(b, filters, o, row, column, (const vs*)v);
          continue;
        }
#pragma GCC unroll 32
        for (int f = 0; f < F; ++f)
#pragma GCC unroll 32
          for (int i = 0; i < 2 * C; ++i) store(sum + (2 * f * pixels + i) * W, v[f][i]);
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
  const vf magic = splat(12582912.0f);
  return (v + magic) - magic;
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
  static float widen(uint8_t v) { return v; }
  static float widen(float v) { return v; }
  static uint8_t narrow(float v) { return uint8_t(v); }
  static vf rounded(vf v) { return v; }
  static vf start(float bias) { return (vf)csam::CSAM_ISA::start(vi{}, bias); }
  static void put(vf v, uint8_t* out) { store_bytes(nearest(finished(v, 0, 255)), out); }
};

#if defined(__AVX2__)
struct Words {  // integers of 16 bits, of two channels together
  using Work = vw;
  static uint32_t unit_weight(const float* w) {
    return (Integers::weight(w[0]) & 0xFFFFu) | Integers::weight(w[1]) << 16;
  }
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
    const Quad o = other ? interleaved(_mm512_loadu_si512(other), zero, zero, zero) : Quad{{zero, zero, zero, zero}};
    vf y[4];
    for (int i = 0; i < 4; ++i) y[i] = ended((vi)sums[i], to_float((vi)o.v[i]), e);
    if (e.real) {
      for (int s = 0; s < kLanes; ++s) store(out + 4 * s, y[s % 16 / 4][s / 16 * 4 + s % 4]);
      return;
    }
    __m512i n[4];
    for (int i = 0; i < 4; ++i) n[i] = _mm512_cvtps_epi32((__m512)nearest(y[i]));
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
  // As assembly, in this order: with intrinsics the sums of a tile move between registers and memory.
  CSAM_INLINE vf dot(vf sum, vi x, vi w) {
    vi products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(x), "x"(w));
    return sum;
  }
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

struct Shape {  // of a tile of output pixels, and the register tile that fills it
  int64_t rows, columns;
  Micro micro;
};

// What of a layer is alive, and how its results are stored.
template <class Format>
struct Layer {
  using Element = typename Format::Element;
  SampleConvArgs a;
  bool dense;
  int64_t channels = 0, slots = 0, live = 0;  // channels that are read; filters, the live ones of a dense layer first
  int64_t area, padded;                       // taps; live filters, filled up to whole turns of a dense loop
  int64_t in_rows, out_rows;                  // that are kept of a channel of the input, and of a filter's results
  Array<int32_t> channel, filter;             // which they are
  Array<int32_t> place;                       // of each channel among those that are read
  Array<float> bias, scales;
  Array<Element> border;  // what lies outside the image

  explicit Layer(const SampleConvArgs& args)
      : a(args),
        dense(args.engine != kSparse),
        area(a.kernel[0] * a.kernel[1]),
        in_rows(a.in_rows ? a.in_rows : a.height),
        out_rows(a.out_rows ? a.out_rows : a.out_height),
        channel(a.channels + 1),
        filter(a.filters + Format::kFilters),
        place(a.channels),
        border(Format::kLanes) {
    int64_t found = 0;
    for (int64_t k = 0; k < a.rows[a.filters] && found < a.channels; ++k) {
      int32_t& there = place[uint32_t(a.taps[k]) / uint32_t(area)];  // half of the time of a division of 64 bits
      found += !there;
      there = 1;
    }
    for (int64_t c = 0; c < a.channels; ++c)
      if (place[c]) channel[channels] = int32_t(c), place[c] = int32_t(channels++);
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t o = 0; o < a.filters; ++o)
        if ((dense && a.rows[o] == a.rows[o + 1]) == bool(pass)) filter[slots++] = int32_t(o), live += !pass;
    padded = tiles(live, Format::kFilters) * Format::kFilters;
    bias = Array<float>(slots + Format::kFilters);
    for (int64_t s = 0; a.bias && s < slots; ++s) bias[s] = a.bias[filter[s]];
    scales = Array<float>(slots + Format::kFilters);
    for (int64_t s = 0; s < slots; ++s) scales[s] = a.scales ? a.scales[filter[s]] : 1;
    for (int i = 0; i < Format::kLanes; ++i) border[i] = Element(a.zero);
  }

  // Rows of a tile, at most. Between steps that run together as many are kept as the reader needs for one of its own,
  // and what makes them is never ahead.
  int64_t most_rows() const { return in_rows < a.height || out_rows < a.out_height ? 1 : kMostLines; }
  // Rows of the input that results from row `top` on, so many, are made of: up to this one.
  int64_t reach(int64_t top, int64_t rows) const {
    const int64_t end = (top + rows - 1) * a.stride[0] - a.padding[0] + (a.kernel[0] - 1) * a.dilation[0] + 1;
    return end < a.height ? end : a.height;
  }

  // The weight with its zeros: [padded, channels of whole units, area].
  Array<float> full() const {
    const int64_t inner = tiles(channels, Format::kTogether) * Format::kTogether * area;
    Array<float> out(padded * inner);
    for (int64_t s = 0; s < live; ++s)
      for (int64_t o = filter[s], k = a.rows[o]; k < a.rows[o + 1]; ++k)
        out[s * inner + place[a.taps[k] / area] * area + a.taps[k] % area] = a.values[k];
    return out;
  }

  // For a dense loop over `units` units from unit `from` on: [padded / kFilters][units][taps][kFilters], of w [padded,
  // channels, taps].
  uint32_t* lay_units(const float* w, int64_t taps, int64_t from, int64_t units, uint32_t* out) const {
    const int64_t there = tiles(channels, Format::kTogether) * Format::kTogether;
    for (int64_t s = 0; s < padded; s += Format::kFilters)
      for (int64_t u = from; u < from + units; ++u)
        for (int64_t k = 0; k < taps; ++k)
          for (int64_t f = 0; f < Format::kFilters; ++f) {
            float unit[Format::kTogether];
            for (int64_t i = 0; i < Format::kTogether; ++i)
              unit[i] = w[((s + f) * there + u * Format::kTogether + i) * taps + k];
            *out++ = Format::unit_weight(unit);
          }
    return out;
  }

  static Array<int64_t> copied(const int64_t* from, int64_t n) {
    Array<int64_t> to(n);
    memcpy(to.data, from, 8 * n);
    return to;
  }

  // Sums [rows, columns] of one filter, `pitch` floats apart and their vectors `gap`, to the outputs from (top, left)
  // on that are inside.
  void write(int64_t slot, int64_t top, int64_t left, int64_t rows, int64_t columns, int64_t sample, int64_t n,
             const float* sums, int64_t pitch, const Element* other, Element* out, int64_t samples,
             int64_t gap = W) const {
    const Ending ending = this->ending(scales[slot]);
    const int64_t width = a.real ? sizeof(float) / sizeof(Element) : 1;  // of a stored value, in elements
    const int64_t ahead = 2 * a.out_height * a.out_width * samples;      // the filter after the next one's
    const int64_t end = columns < a.out_width - left ? columns : a.out_width - left;
    for (int64_t r = 0; r < rows && top + r < a.out_height; ++r) {
      const int64_t row = filter[slot] * out_rows + (top + r) % out_rows;
      const int64_t i = (row * a.out_width + left) * samples + sample;
      const float* sum = sums + r * columns * pitch;
      const Element* added = other ? other + i : nullptr;
      Element* to = out + width * i;
      if (n < Format::kLanes) write_some(n, end, sum, pitch, gap, added, ending, to, samples);
      else if (added)
        for (int64_t c = 0; c < end; ++c, sum += pitch, added += samples, to += width * samples) {
          __builtin_prefetch(added + ahead);
          __builtin_prefetch(to + ahead, 1);
          finish_at(sum, gap, added, ending, to);
        }
      else
        for (int64_t c = 0; c < end; ++c, sum += pitch, to += width * samples) {
          __builtin_prefetch(to + ahead, 1);
          finish_at(sum, gap, nullptr, ending, to);
        }
    }
  }

  CSAM_INLINE void finish_at(const float* sums, int64_t gap, const Element* other, const Ending& ending, Element* out) {
    vf v[Format::kSums];
    for (int i = 0; i < Format::kSums; ++i) v[i] = load<vf>(sums + i * gap);
    Format::finish(v, other, ending, out);
  }

  void write_some(int64_t n, int64_t end, const float* sum, int64_t pitch, int64_t gap, const Element* added,
                  const Ending& ending, Element* to, int64_t samples) const {
    const int64_t width = a.real ? sizeof(float) / sizeof(Element) : 1;
    for (int64_t c = 0; c < end; ++c, sum += pitch, to += width * samples) {
      Element some[Format::kLanes * 4] = {};
      if (added) memcpy(some, added + c * samples, n * sizeof *some);
      finish_at(sum, gap, added ? some : nullptr, ending, some);
      memcpy(to, some, n * width * sizeof *some);
    }
  }

  Ending ending(float scale) const { return {a.low, a.high, scale, a.shift, a.other_scale, a.real}; }

  // The filters without a weight, over the same outputs.
  void write_dead(int64_t top, int64_t left, int64_t rows, int64_t columns, int64_t sample, int64_t n,
                  const Element* other, Element* out, int64_t samples) const {
    for (int64_t o = live; o < slots; ++o) {
      vf constant[Format::kSums];
      for (vf& v : constant) v = Format::start(bias[o]);
      write(o, top, left, rows, columns, sample, n, reinterpret_cast<float*>(constant), 0, other, out, samples);
    }
  }
};

struct Scratch {  // of one thread; serves every layer that it was made large enough for
  Array<float> packed, sums;
  Array<int64_t> offsets;
};
struct Sizes {
  int64_t packed = 0, sums = 0, offsets = 0;
  static void raise(int64_t& size, int64_t to) { size = size < to ? to : size; }
  int64_t bytes() const { return 4 * (packed + sums) + 8 * offsets; }
  Scratch make() const { return {Array<float>(packed), Array<float>(sums), Array<int64_t>(offsets)}; }
};

// A convolution readied: its weight laid out for the tile that leaves the least to do.
template <class Format>
struct Convolution : Layer<Format> {
  using Base = Layer<Format>;
  using Base::a, Base::area, Base::bias, Base::border, Base::channel, Base::channels, Base::dense, Base::filter;
  using Base::in_rows, Base::live, Base::padded, Base::place, Base::slots;
  using typename Base::Element;
  Shape tile;
  int64_t room;     // of a packed block, in bytes
  double cost = 0;  // of kLanes samples
  int64_t lines, across_lines, unit, together, blocks, down, across, group;
  Array<int64_t> row_source, column_source;
  Array<Tap> taps;
  Array<int32_t> cuts, offsets, before;
  Array<float> powers;
  Array<uint32_t> weights;

  void claim(Sizes& sizes) const {
    Sizes::raise(sizes.packed, together / step() * unit);
    Sizes::raise(sizes.sums, group * tile.rows * tile.columns * sum_vectors() * W);
    Sizes::raise(sizes.offsets, lines);
  }

  int64_t sum_vectors() const { return Format::kSums + (kShortSums<Format> ? 1 : 0); }
  int64_t step() const { return dense ? Format::kTogether : 1; }  // channels of a unit

  explicit Convolution(const SampleConvArgs& args, int64_t shares = 1) : Base(args) {
    if (dense) choose(kDenseRooms, Format::kDense);
    else if (kShortSums<Format>) choose(kHalvesRooms, Format::kSparse);
    else choose(kSparseRooms, Format::kSparse);
    const Axis y(a.kernel[0], a.stride[0], a.dilation[0], tile.rows);
    const Axis x(a.kernel[1], a.stride[1], a.dilation[1], tile.columns);
    across_lines = x.lines;
    lines = y.lines * x.lines;
    unit = dense ? lines * W * Format::kSums : lines * W;
    row_source = Base::copied(y.source.data, y.lines);
    column_source = Base::copied(x.source.data, x.lines);
    const int64_t fitting = room / (4 * unit), most = (fitting < 1 ? 1 : fitting) * step();
    blocks = channels ? tiles(channels, most) : 1;
    together = tiles(tiles(channels, blocks), step()) * step();
    blocks = channels ? tiles(channels, together) : 1;
    down = tiles(a.out_height, tile.rows);
    across = tiles(a.out_width, tile.columns);
    const int64_t sums = 4 * W * sum_vectors() * tile.rows * tile.columns;
    const int64_t fit = kSumBytes / sums, parts = tiles(live, fit < Format::kFilters ? Format::kFilters : fit);
    group = tiles(tiles(live, parts > shares ? parts : shares), Format::kFilters) * Format::kFilters;
    if (group < Format::kFilters) group = Format::kFilters;
  }

  void lay() {
    const Axis y(a.kernel[0], a.stride[0], a.dilation[0], tile.rows);
    const Axis x(a.kernel[1], a.stride[1], a.dilation[1], tile.columns);
    if (dense) lay_dense(x, y);
    else lay_sparse(x, y);
  }

  // The tile and the block that leave the least to do, in multiply-adds of a vector: those of pixels past the edge
  // included, packed vectors, sums that are put down and taken up again between blocks, and turns of the loops.
  template <class Rooms, class Micros>
  void choose(const Rooms& rooms, const Micros& micros) {
    const int64_t filters = dense ? Format::kFilters : 1, rows = tiles(live, filters);
    const double products =
        dense ? double(rows * filters * tiles(channels, step()) * Format::kSums * area) : double(a.rows[a.filters]);
    constexpr bool halves = kShortSums<Format>;  // dense layers of such formats are no Convolution
    bool found = false;
    int64_t known[2][129] = {};  // lines under so many rows, and columns, of a tile
    const auto lines_under = [&](int axis, int64_t outputs) {
      int64_t& count = known[axis][outputs];
      if (!count) count = Axis(a.kernel[axis], a.stride[axis], a.dilation[axis], outputs).lines;
      return count;
    };
    const auto consider = [&](const Room& r, const Micro& m, int64_t down_times, int64_t across_times) {
      const Shape s = {m.rows * down_times, m.columns * across_times, m};
      if (s.rows > Base::most_rows()) return;
      const int64_t under = lines_under(0, s.rows) * lines_under(1, s.columns);
      if (under > kMostLines && s.rows * s.columns > 1) return;
      const int64_t each = 4 * W * under * (dense ? Format::kSums : 1) / step();  // bytes of a channel
      const int64_t fitting = r.bytes / each;
      const int64_t turns = tiles(channels, fitting < step() ? step() : fitting);
      const double pixels = double(s.rows * s.columns), micros = double(down_times * across_times);
      const double chains = double(m.rows * m.columns * Format::kSums);
      const double narrow = dense                      ? (m.columns == 1 ? 1.5 : 1)
                            : chains < kChains<Format> ? kChains<Format> / chains
                                                       : 1;
      const double pack = halves ? kHalvesPackCost : kPackCost;
      const double put_down = double(turns - 1) * filters * pixels * (dense || halves ? 1 : Format::kSums) * kSumCost;
      const double enter = halves ? (products / kShort + double(rows)) * pixels * kEnterCost : 0;
      const double work = products * pixels * narrow * r.cost + enter + pack * channels * under +
                          rows * (turns * micros * kTurnCost + put_down) +
                          live * (pixels * Format::kSums * kEndCost + s.rows * kRunCost) + kJobCost;
      const double total = work * tiles(a.out_height, s.rows) * tiles(a.out_width, s.columns);
      if (!found || total < cost) tile = s, room = r.bytes, cost = total, found = true;
    };
    for (const Room& room : rooms)
      for (const Micro& m : micros)
        for (int64_t i = 1; i <= 8; i *= 2)
          for (int64_t j = 1; j <= 8; j *= 2) consider(room, m, i, j);
  }

  int32_t offset(const Axis& x, const Axis& y, int64_t tap) const {  // in a channel, in vectors
    return int32_t(y.first[tap / a.kernel[1]] * x.lines + x.first[tap % a.kernel[1]]);
  }

  void lay_sparse(const Axis& x, const Axis& y) {
    taps = Array<Tap>(a.rows[a.filters]);
    cuts = Array<int32_t>(blocks * (live + 1));
    if constexpr (kShortSums<Format>) {
      before = Array<int32_t>(blocks * live);
      powers = Array<float>(live);
      for (int64_t o = 0; o < live; ++o) powers[o] = Format::power(a.values + a.rows[o], a.rows[o + 1] - a.rows[o]);
    }
    Array<int32_t> next(live);    // tap of each filter
    Array<int32_t> offset(area);  // in a channel, of each place of the kernel
    for (int64_t o = 0; o < live; ++o) next[o] = a.rows[o];
    for (int64_t k = 0; k < area; ++k) offset[k] = this->offset(x, y, k) * W;
    int32_t laid = 0;
    for (int64_t b = 0; b < blocks; ++b) {  // as they are read
      int32_t* cut = cuts.data + b * (live + 1);
      for (int64_t o = 0; o < live; ++o) {
        *cut++ = laid;
        if (kShortSums<Format>) before[b * live + o] = next[o] - a.rows[o];
        for (int32_t& k = next[o]; k < a.rows[o + 1]; ++k) {
          const uint32_t tap = a.taps[k], c = tap / uint32_t(area);
          const int64_t at = place[c] - b * together;
          if (at >= together) break;
          uint32_t weight;
          if constexpr (kShortSums<Format>) weight = Format::tap(a.values[k] / powers[o]);
          else weight = Format::weight(a.values[k]);
          taps[laid++] = {weight, int32_t(at * lines * W) + offset[tap - c * uint32_t(area)]};
        }
      }
      *cut = laid;
    }
  }

  void lay_dense(const Axis& x, const Axis& y) {
    offsets = Array<int32_t>(together / step() * area);
    for (int64_t p = 0; p < together / step() * area; ++p)
      offsets[p] = int32_t(p / area * unit + offset(x, y, p % area) * W * Format::kSums);
    const Array<float> full = Base::full();
    weights = Array<uint32_t>(padded * padded_channels() * area / Format::kTogether);
    uint32_t* out = weights.data;
    for (int64_t b = 0; b < blocks; ++b)
      out = Base::lay_units(full.data, area, b * together / Format::kTogether, units(b), out);
  }

  int64_t padded_channels() const { return tiles(channels, step()) * step(); }
  int64_t units(int64_t b) const {
    const int64_t left = padded_channels() - b * together;
    return (left < together ? left : together) / step();
  }
  int64_t groups() const { return live ? tiles(live, group) : 1; }
  int64_t jobs(int64_t samples) const { return down * across * tiles(samples, Format::kLanes) * groups(); }
  int64_t together_rows() const { return tile.rows; }  // that jobs / down jobs make

  void run(int64_t job, const Element* in, const Element* other, Element* out, int64_t samples,
           const Scratch& s) const {
    const int64_t depth = tiles(samples, Format::kLanes);
    const int64_t part = job % groups(), first = part * group, place = job / groups();
    const int64_t mine = live - first < group ? live - first : group;
    const int64_t sample = place % depth * Format::kLanes, n = samples - sample;
    const int64_t left = place / depth % across * tile.columns, top = place / depth / across * tile.rows;
    const bool far = channels * a.height * a.width * samples * int64_t(sizeof(Element)) > kNearBytes;
    int64_t* found = s.offsets.data;
    for (int64_t i = 0; i < lines / across_lines; ++i) {
      const int64_t row = top * a.stride[0] - a.padding[0] + row_source[i];
      const int64_t start = row >= 0 && row < a.height ? row % in_rows * a.width * samples + sample : -1;
      for (int64_t j = 0; j < across_lines; ++j) {
        const int64_t column = left * a.stride[1] - a.padding[1] + column_source[j];
        const bool inside = start >= 0 && column >= 0 && column < a.width;
        *found++ = inside ? (start + column * samples) * int64_t(sizeof(Element)) : -1;
      }
    }
    Input ahead = {reinterpret_cast<const char*>(in), s.offsets.data, lines, 0, channel.data, 0, 0, 0};
    ahead.plane = in_rows * a.width * samples * int64_t(sizeof(Element));
    int64_t row_at[kMostTileRows];
    Outputs outputs = {};
    outputs.width = a.real ? sizeof(float) / sizeof(Element) : 1;
    outputs.other = other ? other + sample : nullptr;
    outputs.out = out + sample * outputs.width;
    outputs.row_at = row_at;
    outputs.rows = tile.rows < a.out_height - top ? tile.rows : a.out_height - top;
    outputs.columns = tile.columns < a.out_width - left ? tile.columns : a.out_width - left;
    for (int64_t r = 0; r < tile.rows; ++r) row_at[r] = ((top + r) % Base::out_rows * a.out_width + left) * samples;
    outputs.plane = Base::out_rows * a.out_width * samples;
    outputs.step = samples;
    outputs.filter = filter.data + first;
    outputs.scales = Base::scales.data + first;
    outputs.ending = Base::ending(1);
    for (int64_t b = 0; b < blocks && mine > 0; ++b) {
      pack(ahead, b, n, s.packed.data);
      const int64_t packed_units = units(b);
      ahead.next = (b + 1) * together, ahead.line = 0;
      ahead.end = ahead.next + together < channels ? ahead.next + together : channels;
      // Filters end in the last block, some at a time while their sums are near.
      const bool last = b + 1 == blocks, straight = last && n >= Format::kLanes;
      const int64_t some = tiles(kTurn, Format::kFilters) * Format::kFilters;
      const int64_t turn = last && !straight ? some : mine, pixels = tile.rows * tile.columns;
      for (int64_t o = 0; o < mine; o += turn) {
        const int64_t here = mine - o < turn ? mine - o : turn, slot = first + o;
        float* sums = s.sums.data + (blocks > 1 ? o : 0) * pixels * Format::kSums * W;
        Block block = {s.packed.data, across_lines * W * (dense ? Format::kSums : 1), tile.rows, tile.columns, pixels};
        block.bias = b && !kShortSums<Format> ? nullptr : bias.data + slot;
        block.ahead = &ahead;
        block.fetches = far && ahead.next < ahead.end ? (ahead.end - ahead.next) * lines : 0;
        if (dense) {
          block.weights = weights.data + (b * together / Format::kTogether * padded + slot * packed_units) * area;
          block.offsets = offsets.data;
          block.products = packed_units * area;
        } else {
          block.taps = taps.data;
          block.cuts = cuts.data + b * (live + 1) + slot;
          if constexpr (kShortSums<Format>) {
            block.powers = powers.data + slot;
            block.before = before.data + b * live + slot;
            block.halves = s.sums.data + (2 * group + (blocks > 1 ? o : 0)) * pixels * W;
            block.last = last;
          }
        }
        if (straight) block.outputs = &outputs;
        tile.micro.add(block, here, sums);
        for (int64_t i = 0; i < here && last && !straight; ++i)
          Base::write(slot + i, top, left, tile.rows, tile.columns, sample, n, sums + i * pixels * Format::kSums * W,
                      Format::kSums * W, other, out, samples);
      }
    }
    if (!part) Base::write_dead(top, left, tile.rows, tile.columns, sample, n, other, out, samples);
  }

  // The first n samples of the lines of a block's channels, the lanes past them 0.
  void pack(const Input& from, int64_t b, int64_t n, float* out) const {
    constexpr int64_t T = Format::kTogether;
    const char* nothing = reinterpret_cast<const char*>(border.data);
    const int64_t first = b * together, last = first + units(b) * step();
    Element some[T][Format::kLanes] = {};
    for (int64_t c = first; c < last; c += step()) {
      const char* base[T];
      int64_t mask[T];  // 0 of a channel past the last
      for (int64_t j = 0; j < step(); ++j) {
        mask[j] = c + j < channels ? -1 : 0;
        base[j] = mask[j] ? from.in + channel[c + j] * from.plane : nothing;
      }
      for (int64_t i = 0; i < lines; ++i, out += W * (dense ? Format::kSums : 1)) {
        const int64_t offset = from.offsets[i];
        const Element* in[T];
        for (int64_t j = 0; j < step(); ++j) {
          in[j] = reinterpret_cast<const Element*>(offset >= 0 ? base[j] + (offset & mask[j]) : nothing);
          if (n < Format::kLanes) in[j] = static_cast<Element*>(memcpy(some[j], in[j], n * sizeof(Element)));
        }
        if (dense) Format::pack_unit(in, out);
        else store(out, Format::pack(in[0]));
      }
    }
  }
};

}  // namespace CSAM_ISA
}  // namespace csam
