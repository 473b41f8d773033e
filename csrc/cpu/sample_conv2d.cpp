// sample_conv2d: a thread takes a tile of output pixels of one vector of samples. The input under it is packed a few
// channels at a time, padded and with strides undone, into a block that stays in the first-level cache; over that block
// every filter adds its taps, in ascending order, to the tile's sums in registers.
#include <stdlib.h>

#include "../common/dtype.h"
#include "kernels.h"
#include "simd.h"

namespace csam {
namespace CSAM_ISA {

constexpr int64_t kBlockBytes = 32 << 10;  // of a packed block: about a first-level cache
constexpr int64_t kNearBytes = 4 << 20;    // of input that needs no prefetch
constexpr int64_t kFilters = 256;          // a thread takes at once: their sums stay in the second-level cache
constexpr int64_t kPackCost = 3;           // of one packed vector, in fused multiply-adds

// The input lines under a tile's rows or columns, ordered so that outputs side by side read lines side by side.
struct Axis {
  int64_t lines = 0;
  int64_t* source;  // line -> input position, counted from the first output's first tap
  int64_t* first;   // tap -> line that the first output reads
  Axis(int64_t kernel, int64_t stride, int64_t dilation, int64_t outputs)
      : source(static_cast<int64_t*>(malloc(8 * kernel * outputs))), first(static_cast<int64_t*>(malloc(8 * kernel))) {
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
  Axis(const Axis&) = delete;
  ~Axis() {
    free(source);
    free(first);
  }
};

struct Tap {
  float weight;
  int32_t offset;  // of the first output's input in the packed block, in floats
};

struct Block {  // some channels of the input under one tile, and what each filter takes from them
  const float* packed;
  int64_t pitch;  // floats from row to row
  const Tap* taps;
  const int32_t* cuts;  // where the taps of each filter begin, `stride` apart; they end at the cut after it
  int64_t stride;
  const float* bias;         // what the sums start from; null after the first block
  const void* const* ahead;  // input of the block after it, to fetch meanwhile
  int64_t fetches;
};

CSAM_INLINE int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

CSAM_INLINE void fetch(const Block& b, int64_t from, int64_t to) {
  for (int64_t i = from; i < to && i < b.fetches; ++i) __builtin_prefetch(b.ahead[i], 0, 2);
}

struct Tile {
  int64_t rows, columns;
  void (*add)(Block, int64_t filters, float* sums);
};

template <int R, int C>
static void add_taps(const Block b, int64_t filters, float* sums) {
  const int64_t share = tiles(b.fetches, filters);
  for (int64_t o = 0; o < filters; ++o, sums += R * C * W) {
    const Tap *t = b.taps + b.cuts[o * b.stride], *end = b.taps + b.cuts[o * b.stride + 1];
    fetch(b, o * share, (o + 1) * share);
    if (!b.bias && t == end) continue;
    vf v[R][C];
    const vf start = splat(b.bias ? b.bias[o] : 0);
#pragma GCC unroll 32
    for (int i = 0; i < R * C; ++i) v[i / C][i % C] = b.bias ? start : load<vf>(sums + i * W);
    for (; t < end; ++t) {
      const vf w = splat(t->weight);
      const float* in = b.packed + t->offset;
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r, in += b.pitch)
#pragma GCC unroll 32
        for (int c = 0; c < C; ++c) v[r][c] = fma(w, load<vf>(in + c * W), v[r][c]);
    }
#pragma GCC unroll 32
    for (int i = 0; i < R * C; ++i) store(sums + i * W, v[i / C][i % C]);
  }
}

CSAM_INLINE vf finished(vf sum, bool relu) { return relu ? (sum < vf{} ? vf{} : sum) : sum; }

// How samples lie: kLanes of them make a packed vector, and kSums vectors of sums.
struct Float32 {
  using Element = float;
  static constexpr int kLanes = W, kSums = 1;
  static constexpr Tile kTiles[] = {
#if defined(__AVX512F__)
      {4, 4, add_taps<4, 4>},   {2, 8, add_taps<2, 8>}, {2, 7, add_taps<2, 7>},
      {1, 16, add_taps<1, 16>}, {1, 4, add_taps<1, 4>}, {1, 1, add_taps<1, 1>},
#else
      {2, 4, add_taps<2, 4>},
      {1, 8, add_taps<1, 8>},
      {1, 4, add_taps<1, 4>},
      {1, 1, add_taps<1, 1>},
#endif
  };
  static float weight(float w) { return w; }
  static vf pack(const float* in) { return load<vf>(in); }
  static void finish(const float* sums, const float* other, bool relu, float* out) {
    const vf sum = load<vf>(sums);
    store(out, finished(other ? sum + load<vf>(other) : sum, relu));
  }
};

struct Bfloat16 {  // widened when it is packed
  using Element = uint16_t;
  static constexpr int kLanes = W, kSums = 1;
  static constexpr auto& kTiles = Float32::kTiles;
  static float weight(float w) { return csam::from_bf16(csam::to_bf16(w)); }
  static vf pack(const uint16_t* in) { return from_bf16(load<vh>(in)); }
  static void finish(const float* sums, const uint16_t* other, bool relu, uint16_t* out) {
    const vf sum = load<vf>(sums);
    store(out, to_bf16(finished(other ? sum + from_bf16(load<vh>(other)) : sum, relu)));
  }
};

#if defined(__AVX512F__)
#define CSAM_BF16 __attribute__((target("avx512bf16"))) static

// One tap, or two whose products enter the sums in one instruction. The one alone is paired with zeros times zero,
// which spread no NaN.
template <int R, int C, int Taps>
CSAM_BF16 inline __attribute__((always_inline)) void add_pair(const Block& b, const Tap* t, __m512 (*sum)[2]) {
  const uint32_t second = Taps > 1 ? float_bits(t[1].weight) : 0;
  const __m512bh w = (__m512bh)_mm512_set1_epi32(int(float_bits(t->weight) >> 16 | second));
  const float *p = b.packed + t->offset, *q = Taps > 1 ? b.packed + t[1].offset : p;
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r, p += b.pitch, q += b.pitch)
#pragma GCC unroll 32
    for (int c = 0; c < C; ++c, ++sum) {
      const __m512i x = _mm512_load_si512(p + c * W);
      const __m512i y = Taps > 1 ? _mm512_load_si512(q + c * W) : _mm512_setzero_si512();
      (*sum)[0] = _mm512_dpbf16_ps((*sum)[0], (__m512bh)_mm512_unpacklo_epi16(x, y), w);
      (*sum)[1] = _mm512_dpbf16_ps((*sum)[1], (__m512bh)_mm512_unpackhi_epi16(x, y), w);
    }
}

template <int R, int C>
CSAM_BF16 void add_pairs(const Block b, int64_t filters, float* sums) {
  const int64_t share = tiles(b.fetches, filters);
  for (int64_t o = 0; o < filters; ++o, sums += 2 * R * C * W) {
    const Tap *t = b.taps + b.cuts[o * b.stride], *end = b.taps + b.cuts[o * b.stride + 1];
    fetch(b, o * share, (o + 1) * share);
    if (!b.bias && t == end) continue;
    __m512 v[R * C][2];
    const __m512 start = _mm512_set1_ps(b.bias ? b.bias[o] : 0);
#pragma GCC unroll 32
    for (int i = 0; i < 2 * R * C; ++i) v[i / 2][i % 2] = b.bias ? start : _mm512_load_ps(sums + i * W);
    for (; end - t > 1; t += 2) add_pair<R, C, 2>(b, t, v);
    if (t < end) add_pair<R, C, 1>(b, t, v);
#pragma GCC unroll 32
    for (int i = 0; i < 2 * R * C; ++i) _mm512_store_ps(sums + i * W, v[i / 2][i % 2]);
  }
}

struct Bfloat16Pairs {  // for AVX512-BF16; unpacking a vector gives the sums' order, and packing undoes it
  using Element = uint16_t;
  static constexpr int kLanes = 2 * W, kSums = 2;
  static constexpr Tile kTiles[] = {{2, 4, add_pairs<2, 4>},
                                    {1, 8, add_pairs<1, 8>},
                                    {1, 7, add_pairs<1, 7>},
                                    {1, 4, add_pairs<1, 4>},
                                    {1, 1, add_pairs<1, 1>}};
  static float weight(float w) { return Bfloat16::weight(w); }
  static vf pack(const uint16_t* in) { return load<vf>(in); }
  static void finish(const float* sums, const uint16_t* other, bool relu, uint16_t* out) {
    vf low = load<vf>(sums), high = load<vf>(sums + W);
    if (other) {
      const __m512i o = _mm512_loadu_si512(other), zero = _mm512_setzero_si512();
      low += (vf)_mm512_unpacklo_epi16(zero, o);
      high += (vf)_mm512_unpackhi_epi16(zero, o);
    }
    const vu a = bf16_bits(finished(low, relu)), b = bf16_bits(finished(high, relu));
    _mm512_storeu_si512(out, _mm512_packus_epi32((__m512i)a, (__m512i)b));
  }
};
#endif

// The tile that leaves the least to do: multiply-adds, those of pixels past the edge included, and packed vectors.
template <class Format>
static Tile choose_tile(const SampleConvArgs& a) {
  Tile best = {};
  int64_t least = 0;
  for (const Tile& t : Format::kTiles) {
    const Axis y(a.kernel[0], a.stride[0], a.dilation[0], t.rows);
    const Axis x(a.kernel[1], a.stride[1], a.dilation[1], t.columns);
    const int64_t work = a.rows[a.filters] * t.rows * t.columns + kPackCost * a.channels * y.lines * x.lines;
    const int64_t cost = work * tiles(a.out_height, t.rows) * tiles(a.out_width, t.columns);
    if (!best.rows || cost < least) {
      best = t;
      least = cost;
    }
  }
  return best;
}

// The first n samples at `in`; the lanes past them are 0.
template <class Format>
CSAM_INLINE vf pack(const void* in, int64_t n) {
  if (n >= Format::kLanes) return Format::pack(static_cast<const typename Format::Element*>(in));
  typename Format::Element some[Format::kLanes] = {};
  memcpy(some, in, n * sizeof *some);
  return Format::pack(some);
}

template <class Format>
CSAM_INLINE void finish(const float* sums, const typename Format::Element* other, bool relu,
                        typename Format::Element* out, int64_t n) {
  if (n >= Format::kLanes) return Format::finish(sums, other, relu, out);
  typename Format::Element some[Format::kLanes] = {};
  if (other) memcpy(some, other, n * sizeof *other);
  Format::finish(sums, other ? some : nullptr, relu, some);
  memcpy(out, some, n * sizeof *out);
}

template <class Format>
static void convolve(const SampleConvArgs a, int threads) {
  using Element = typename Format::Element;
  const Element *in = static_cast<const Element*>(a.x), *other = static_cast<const Element*>(a.other);
  Element* out = static_cast<Element*>(a.out);
  const Tile t = choose_tile<Format>(a);
  const Axis y(a.kernel[0], a.stride[0], a.dilation[0], t.rows), x(a.kernel[1], a.stride[1], a.dilation[1], t.columns);
  const int64_t area = a.kernel[0] * a.kernel[1], vectors = y.lines * x.lines;
  const int64_t fitting = kBlockBytes / (4 * W * vectors), most = fitting < 1 ? 1 : fitting;
  const int64_t blocks = a.channels ? tiles(a.channels, most) : 1, together = tiles(a.channels, blocks);
  const int64_t down = tiles(a.out_height, t.rows), across = tiles(a.out_width, t.columns);
  const int64_t depth = tiles(a.samples, Format::kLanes), places = down * across * depth;
  const int64_t parts = tiles(a.filters, kFilters), share = tiles(threads, places);
  const int64_t group = tiles(a.filters, parts > share ? parts : share), groups = tiles(a.filters, group);
  const int64_t tile = t.rows * t.columns * Format::kSums * W;  // sums of one filter
  const bool far = a.channels * a.height * a.width * a.samples * int64_t(sizeof(Element)) > kNearBytes;
  Tap* taps = static_cast<Tap*>(malloc(sizeof(Tap) * a.rows[a.filters]));
  int32_t* cuts = static_cast<int32_t*>(malloc(4 * a.filters * (blocks + 1)));  // where each block begins in each row
  int32_t* offsets = static_cast<int32_t*>(malloc(4 * together * area));
  float* bias = static_cast<float*>(calloc(a.filters, 4));
  if (a.bias) memcpy(bias, a.bias, 4 * a.filters);
  for (int64_t i = 0; i < together * area; ++i) {
    const int64_t line = i / area * y.lines + y.first[i % area / a.kernel[1]];
    offsets[i] = int32_t((line * x.lines + x.first[i % a.kernel[1]]) * W);
  }
#pragma omp parallel num_threads(threads) firstprivate(a, other, out, in)
  {
#pragma omp for schedule(static)
    for (int64_t o = 0; o < a.filters; ++o) {
      int32_t* cut = cuts + o * (blocks + 1);
      const int32_t end = a.rows[o + 1], *row = a.taps;
      int32_t k = *cut = a.rows[o];
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * together * area, next = first + together * area;
        for (; k < end && row[k] < next; ++k) taps[k] = {Format::weight(a.values[k]), offsets[row[k] - first]};
        *++cut = k;
      }
    }
    const Element zeros[Format::kLanes] = {};
    float* packed = static_cast<float*>(aligned_alloc(64, (4 * W * together * vectors + 64) & ~63));
    float* sums = static_cast<float*>(aligned_alloc(64, (4 * group * tile + 64) & ~63));
    const void** lines = static_cast<const void**>(malloc(8 * together * vectors));  // where its vectors come from
    int64_t* columns = static_cast<int64_t*>(malloc(8 * x.lines));
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < places * groups; ++job) {
      const int64_t filter = job % groups * group, place = job / groups;
      const int64_t filters = a.filters - filter < group ? a.filters - filter : group;
      const int64_t sample = place % depth * Format::kLanes, n = a.samples - sample;
      const int64_t left = place / depth % across * t.columns, top = place / depth / across * t.rows;
      for (int64_t j = 0; j < x.lines; ++j) {
        const int64_t column = left * a.stride[1] - a.padding[1] + x.source[j];
        columns[j] = column >= 0 && column < a.width ? column * a.samples + sample : -1;
      }
      const auto find = [&](int64_t b) {
        const int64_t from = b * together, to = from + together < a.channels ? from + together : a.channels;
        int64_t found = 0;
        for (int64_t c = from; c < to; ++c)
          for (int64_t i = 0; i < y.lines; ++i) {
            const int64_t row = top * a.stride[0] - a.padding[0] + y.source[i];
            const bool inside = row >= 0 && row < a.height;
            const Element* start = in + (c * a.height + row) * a.width * a.samples;
            for (int64_t j = 0; j < x.lines; ++j)
              lines[found++] = inside && columns[j] >= 0 ? start + columns[j] : zeros;
          }
        return found;
      };
      int64_t count = find(0);
      for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t i = 0; i < count; ++i) store(packed + i * W, pack<Format>(lines[i], n));
        count = find(b + 1);
        const int32_t* cut = cuts + filter * (blocks + 1) + b;
        const float* start = b ? nullptr : bias + filter;
        t.add({packed, x.lines * W, taps, cut, blocks + 1, start, lines, far ? count : 0}, filters, sums);
      }
      for (int64_t o = 0; o < filters; ++o)
        for (int64_t r = 0; r < t.rows && top + r < a.out_height; ++r)
          for (int64_t c = 0; c < t.columns && left + c < a.out_width; ++c) {
            const int64_t i = (((filter + o) * a.out_height + top + r) * a.out_width + left + c) * a.samples + sample;
            const float* sum = sums + o * tile + (r * t.columns + c) * Format::kSums * W;
            finish<Format>(sum, other ? other + i : nullptr, a.relu, out + i, n);
          }
    }
    free(packed);
    free(lines);
    free(sums);
    free(columns);
  }
  free(bias);
  free(offsets);
  free(cuts);
  free(taps);
}

void sample_conv2d(const SampleConvArgs& a, int threads) {
  if (a.dtype == kF32) return convolve<Float32>(a, threads);
#if defined(__AVX512F__)
  if (__builtin_cpu_supports("avx512bf16")) return convolve<Bfloat16Pairs>(a, threads);
#endif
  convolve<Bfloat16>(a, threads);
}

}  // namespace CSAM_ISA
}  // namespace csam
