// What the loops of a convolution run over: some channels of the input under a tile of output pixels, packed. Every
// filter adds its taps, in ascending order, to the sums of a register tile of pixels, which end in results or are put
// down for the next block.
#pragma once
#include <stdlib.h>

#include <new>
#include <type_traits>

#include "../common/dtype.h"
#include "kernels.h"
#include "simd.h"

namespace csam {
namespace CSAM_ISA {

constexpr int64_t kPooledBytes = 1 << 20;

CSAM_INLINE int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

template <class T>
struct Array {  // zeroed memory, aligned to a vector; much of it lies on huge pages, for all of it is read in turn
  T* data = nullptr;
  int64_t block = 0;  // bytes, of one that goes back to `give_block`
  Array() = default;
  explicit Array(int64_t n) {
    const int64_t bytes = taken(n);
    if (bytes >= kPooledBytes) {
      data = static_cast<T*>(take_block(bytes));
      block = bytes;
    } else {
      data = static_cast<T*>(aligned_alloc(64, bytes));
      if (!data) throw std::bad_alloc();
    }
    memset(static_cast<void*>(data), 0, int64_t(sizeof(T)) * (n > 0 ? n : 1));
  }
  static int64_t taken(int64_t n) {  // bytes
    const int64_t bytes = tiles(int64_t(sizeof(T)) * (n > 0 ? n : 1), 64) * 64;
    return bytes >= kPooledBytes ? block_size(bytes) : bytes;
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

struct Tap {
  uint32_t weight;  // bits of a float or an integer, as the format multiplies
  int32_t offset;   // of the first output's input in the packed block, in floats
};

// From sums to what is stored: clamp(sum + other), or of integers clamp(sum * scale + shift + other * other_scale).
struct Ending {
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

}  // namespace CSAM_ISA
}  // namespace csam
