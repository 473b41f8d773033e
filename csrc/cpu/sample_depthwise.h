// A convolution whose filters read one channel each, such as a depthwise one, samples innermost: straight from the
// input to the output, with nothing packed. A job is one filter at one vector of samples; it makes a row of results at
// a time.
#pragma once
#include <type_traits>

#include "sample_conv2d.h"

namespace csam {
namespace CSAM_ISA {

// Where a row of one filter's results lies.
template <class Format>
struct Row {
  using Element = typename Format::Element;
  const Element* other;  // null, or what is added
  Element* out;
  int64_t step, width;  // from one result to the next in values, and of a result in elements
  Ending ending;
  CSAM_INLINE void finish(const Row& to, int64_t x, const vf* sums) {
    const int64_t at = x * to.step, width = sizeof(Element) == 1 ? to.width : 1;
    Format::finish(sums, to.other ? to.other + at : nullptr, to.ending, to.out + at * width);
  }
};

// Three lines of the input, from left of the image to right of it. A line is pixels `step` apart, or the border's.
template <class Element>
struct Columns {
  const Element *at[3], *border;
  int64_t step[3], x, width;
  CSAM_INLINE void next(Columns& c, const Element** from) {
    const bool inside = uint64_t(c.x++) < uint64_t(c.width);
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      from[i] = inside ? c.at[i] : c.border;
      c.at[i] += c.step[i];
    }
  }
};

template <int N>
struct Stride {};

#if defined(__AVX512F__)
// Columns of three pixels, interleaved once for three results; what is missing to four is multiplied by zero.
template <class Format>
CSAM_VNNI void roll_quads(const Columns<uint8_t>& from_left, int64_t width, const uint32_t* w, float bias,
                          const Row<Format>& row) {
  Columns<uint8_t> pixels = from_left;
  const Row<Format> to = row;
  const __m512i first = _mm512_set1_epi32(int32_t(bias)), zero = _mm512_setzero_si512();
  Quad columns[3];
  const uint8_t* from[3];
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t) {
    Columns<uint8_t>::next(pixels, from);
    columns[t] =
        interleaved(_mm512_loadu_si512(from[0]), _mm512_loadu_si512(from[1]), _mm512_loadu_si512(from[2]), zero);
  }
  for (int64_t x = 0; x < width; x += 3)
#pragma GCC unroll 3
    for (int t = 0; t < 3; ++t) {
      if (x + t >= width) return;
      Columns<uint8_t>::next(pixels, from);
      columns[(t + 2) % 3] =
          interleaved(_mm512_loadu_si512(from[0]), _mm512_loadu_si512(from[1]), _mm512_loadu_si512(from[2]), zero);
      __m512i sum[4] = {first, first, first, first};
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          sum[i] = _mm512_dpbusd_epi32(sum[i], columns[(t + j) % 3].v[i], _mm512_set1_epi32(int(w[j])));
      Row<Format>::finish(to, x + t, (const vf*)sum);
    }
}

// The same of bfloat16: the upper two pixels of a column interleaved, and the lowest with zeros times zero, which
// spread no NaN: six products of a result, of two multiplications each. With a stride of 2 a column serves two results
// at most.
CSAM_BF16 inline __attribute__((always_inline)) void interleave(const uint16_t* const* from, __m512bh* column) {
  const __m512i zero = _mm512_setzero_si512();
  __m512i v[3];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    v[i] = _mm512_loadu_si512(from[i]);
    asm("" : "+v"(v[i]));  // in a register: as an operand in memory it would be loaded twice
  }
  column[0] = (__m512bh)_mm512_unpacklo_epi16(v[0], v[1]), column[1] = (__m512bh)_mm512_unpackhi_epi16(v[0], v[1]);
  column[2] = (__m512bh)_mm512_unpacklo_epi16(v[2], zero), column[3] = (__m512bh)_mm512_unpackhi_epi16(v[2], zero);
}
template <class Format, int N>
CSAM_BF16 void roll_pairs(Stride<N>, const Columns<uint16_t>& from_left, int64_t width, const uint32_t* w, float bias,
                          const Row<Format>& row) {
  Columns<uint16_t> pixels = from_left;
  const Row<Format> to = row;
  const __m512 first = _mm512_set1_ps(bias);
  __m512bh weights[3][2], columns[3][4];
  const uint16_t* from[3];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) weights[j][i] = (__m512bh)_mm512_set1_epi32(int(w[2 * j + i]));
#pragma GCC unroll 2
  for (int t = 0; t < 3 - N; ++t) {
    Columns<uint16_t>::next(pixels, from);
    interleave(from, columns[t]);
  }
  constexpr int kTurn = N == 1 ? 3 : 1;  // results until the columns are where they were
  for (int64_t x = 0; x < width; x += kTurn)
#pragma GCC unroll 3
    for (int t = 0; t < kTurn; ++t) {
      if (x + t >= width) return;
#pragma GCC unroll 2
      for (int j = 3 - N; j < 3; ++j) {
        Columns<uint16_t>::next(pixels, from);
        interleave(from, columns[(t + j) % 3]);
      }
      __m512 sum[2] = {first, first};
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          sum[i % 2] = _mm512_dpbf16_ps(sum[i % 2], columns[(t + j) % 3][i], weights[j][i / 2]);
      Row<Format>::finish(to, x + t, (const vf*)sum);
#pragma GCC unroll 4
      for (int i = 0; i < 4 && N == 2; ++i) columns[0][i] = columns[2][i];
    }
}

CSAM_VNNI void add_quad(const uint8_t* const* from, uint32_t w, vf* sums) {
  const Quad q = interleaved(_mm512_loadu_si512(from[0]), _mm512_loadu_si512(from[1]), _mm512_loadu_si512(from[2]),
                             _mm512_loadu_si512(from[3]));
  for (int i = 0; i < 4; ++i) sums[i] = (vf)_mm512_dpbusd_epi32((__m512i)sums[i], q.v[i], _mm512_set1_epi32(int(w)));
}
#endif

template <class Format>
struct Depthwise : Layer<Format> {
  using Base = Layer<Format>;
  using Base::a, Base::area, Base::bias, Base::border, Base::in_rows, Base::out_rows, Base::slots;
  using typename Base::Element;
  static constexpr int K = Format::kSums;
  static constexpr int64_t kMostRows = 64;  // of a kernel
  static constexpr bool kQuads = K == 4;    // four taps are multiplied at once
  static constexpr bool kPairs = K == 2;    // two are, where columns roll
  using V = std::conditional_t<sizeof(Element) == 1, vi, vf>;

  Array<uint32_t> weights;  // [filters, area], as the format multiplies; of quads four a word, down a column if `rolls`
  Array<int32_t> reads;     // each filter's channel
  double cost = 0;          // of kLanes samples, as a Convolution's

  static bool serves(const SampleConvArgs& a) {
    const int64_t area = a.kernel[0] * a.kernel[1];
    bool one = a.engine == kSparse && a.rows[a.filters] > a.filters &&
               a.kernel[0] <= kMostRows;  // with fewer taps there is little to share
    for (int64_t o = 0; one && o < a.filters; ++o)
      for (int64_t k = a.rows[o] + 1; k < a.rows[o + 1]; ++k) one &= a.taps[k] / area == a.taps[k - 1] / area;
    return one;
  }

  explicit Depthwise(const SampleConvArgs& args) : Base(args), reads(a.filters) {
    for (int64_t o = 0; o < a.filters; ++o)
      if (a.rows[o] < a.rows[o + 1]) reads[o] = int32_t(a.taps[a.rows[o]] / area);
    const double columns = rolls() ? 3 : double(area);  // that are unpacked for a result
    const double taps = kQuads ? words() : area;
    cost = double(a.filters * a.out_height * a.out_width) * K * (taps + 0.5 * columns + kEndCost);
  }

  int64_t words() const { return kQuads ? rolls() ? 3 : tiles(area, 4) : kPairs && rolls() ? 6 : area; }

  void lay() {
    weights = Array<uint32_t>(a.filters * words());
    for (int64_t o = 0; o < a.filters; ++o)
      for (int64_t k = a.rows[o]; k < a.rows[o + 1]; ++k) {
        const int64_t tap = a.taps[k] % area, word = rolls() ? tap % 3 : tap / 4, place = rolls() ? tap / 3 : tap % 4;
        const uint32_t bits = Format::weight(a.values[k]);
        if (kPairs && rolls()) weights[o * 6 + 2 * word + place / 2] |= place % 2 ? bits : bits >> 16;
        else if (kQuads) weights[o * words() + word] |= (bits & 0xFF) << (8 * place);
        else weights[o * area + tap] = bits;
      }
  }

  void claim(Sizes& sizes) const {  // for fewer samples than lanes
    const int64_t vectors = a.kernel[0] * a.width + (1 + sizeof(float) / sizeof(Element)) * a.out_width;
    Sizes::raise(sizes.packed, vectors * Format::kLanes * int64_t(sizeof(Element)) / 4);
  }
  int64_t jobs(int64_t samples) const {
    return tiles(a.out_height, together_rows()) * slots * tiles(samples, Format::kLanes);
  }
  int64_t together_rows() const { return Base::most_rows() < a.out_height ? Base::most_rows() : a.out_height; }

  // Whether columns of three pixels are unpacked once for three results.
  bool rolls() const {
    return a.kernel[0] == 3 && a.kernel[1] == 3 && a.stride[1] <= (kPairs ? 2 : 1) && a.dilation[1] == 1;
  }

  struct Line {  // of the input: pixels from `at` on, or of the border again and again
    const Element* at;
    int64_t step;
  };

  void run(int64_t job, const Element* in, const Element* other, Element* out, int64_t samples,
           const Scratch& s) const {
    const int64_t depth = tiles(samples, Format::kLanes), o = job / depth % slots;
    const int64_t sample = job % depth * Format::kLanes, n = samples - sample;
    const int64_t top = job / depth / slots * together_rows(), end = top + together_rows();
    in += reads[o] * in_rows * a.width * samples + sample;
    const int64_t width = a.real ? sizeof(float) / sizeof(Element) : 1;
    const Ending ending = Base::ending(Base::scales[o]);
    Line lines[kMostRows];
    for (int64_t y = top; y < end && y < a.out_height; ++y) {
      for (int64_t i = 0; i < a.kernel[0]; ++i) {
        const int64_t row = y * a.stride[0] - a.padding[0] + i * a.dilation[0];
        const bool inside = row >= 0 && row < a.height;
        lines[i] = inside ? Line{in + row % in_rows * a.width * samples, samples} : Line{border.data, 0};
      }
      const int64_t at = (Base::filter[o] * out_rows + y % out_rows) * a.out_width * samples + sample;
      const Row<Format> to = {other ? other + at : nullptr, out + at * width, samples, width, ending};
      if (n < Format::kLanes) make_some(o, lines, n, to, reinterpret_cast<Element*>(s.packed.data));
      else make(o, lines, to);
    }
  }

 private:
  const Element* pixel(const Line& line, int64_t x) const {
    return x >= 0 && x < a.width ? line.at + x * line.step : border.data;
  }

  // A row of results of whole vectors.
  void make(int64_t o, const Line* lines, const Row<Format>& to) const {
    if (rolls()) roll(o, lines, to);
    else any(o, lines, to);
  }

  // Of the first n samples: from copies that are filled up with zeros, and through one of what comes of them.
  void make_some(int64_t o, const Line* lines, int64_t n, const Row<Format>& to, Element* copy) const {
    constexpr int64_t L = Format::kLanes;
    const auto fill = [&](const Element* from, int64_t pixels) {
      Element* first = copy;
      for (int64_t x = 0; x < pixels; ++x, copy += L, from += to.step) {
        memset(copy, 0, L * sizeof(Element));
        memcpy(copy, from, n * sizeof(Element));
      }
      return first;
    };
    Line whole[kMostRows];
    for (int64_t i = 0; i < a.kernel[0]; ++i) whole[i] = lines[i].step ? Line{fill(lines[i].at, a.width), L} : lines[i];
    const Element* other = to.other ? fill(to.other, a.out_width) : nullptr;
    make(o, whole, {other, copy, L, to.width, to.ending});
    for (int64_t x = 0; x < a.out_width; ++x)
      memcpy(to.out + x * to.step * to.width, copy + x * L * to.width, n * to.width * sizeof(Element));
  }

  void any(int64_t o, const Line* lines, const Row<Format>& row) const {
    const Row<Format> to = row;
    const uint32_t* w = weights.data + o * words();
    for (int64_t x = 0; x < a.out_width; ++x) {
      const int64_t left = x * a.stride[1] - a.padding[1];
      const Element* at[4];
      vf sums[K];
      for (vf& v : sums) v = Format::start(bias[o]);
      for (int64_t tap = 0, i = 0; i < a.kernel[0]; ++i)
        for (int64_t j = 0; j < a.kernel[1]; ++j, ++tap) {
          const Element* from = pixel(lines[i], left + j * a.dilation[1]);
          if constexpr (kQuads) {
            at[tap % 4] = from;
            if (tap % 4 < 3 && tap + 1 < area) continue;
            for (int64_t k = tap % 4 + 1; k < 4; ++k) at[k] = from;  // times zero
            add_quad(at, w[tap / 4], sums);
          } else {
            vf in[K];
            Format::unpack(from, in);
            for (int k = 0; k < K; ++k) sums[k] = (vf)product_sum(spread<V>(w[tap]), (V)in[k], (V)sums[k]);
          }
        }
      Row<Format>::finish(to, x, sums);
    }
  }

  struct Column {
    V v[3][K];
  };
  inline __attribute__((always_inline)) void look(const Line* lines, int64_t x, Column& to) const {
    for (int i = 0; i < 3; ++i) Format::unpack(pixel(lines[i], x), reinterpret_cast<vf*>(to.v[i]));
  }
  CSAM_INLINE void add(const V* w, V first, const Column& l, const Column& m, const Column& r, const Row<Format>& to,
                       int64_t x) {
    V sum[K];
    for (V& v : sum) v = first;
    for (int i = 0; i < 3; ++i)
      for (int k = 0; k < K; ++k) {
        sum[k] = product_sum(w[3 * i], l.v[i][k], sum[k]);
        sum[k] = product_sum(w[3 * i + 1], m.v[i][k], sum[k]);
        sum[k] = product_sum(w[3 * i + 2], r.v[i][k], sum[k]);
      }
    Row<Format>::finish(to, x, (const vf*)sum);
  }

  void roll(int64_t o, const Line* lines, const Row<Format>& to) const {
    if constexpr (kQuads || kPairs) {
      Columns<Element> pixels = {{}, border.data, {}, -a.padding[1], a.width};
      for (int i = 0; i < 3; ++i) {
        pixels.step[i] = lines[i].step;
        pixels.at[i] = lines[i].at - a.padding[1] * pixels.step[i];
      }
      const uint32_t* w = weights.data + o * words();
      if constexpr (kQuads) roll_quads(pixels, a.out_width, w, bias[o], to);
      else if (a.stride[1] == 1) roll_pairs(Stride<1>{}, pixels, a.out_width, w, bias[o], to);
      else roll_pairs(Stride<2>{}, pixels, a.out_width, w, bias[o], to);
    } else {
      roll_one(o, lines, to);
    }
  }

  void roll_one(int64_t o, const Line* lines, const Row<Format>& row) const {
    const Row<Format> to = row;
    V w[9];
    for (int k = 0; k < 9; ++k) w[k] = spread<V>(weights[o * area + k]);
    const V first = start(V{}, bias[o]);
    Column c[3];
    const int64_t left = -a.padding[1], end = a.out_width;
    look(lines, left, c[0]);
    look(lines, left + 1, c[1]);
    for (int64_t x = 0; x < end; x += 3) {
      look(lines, left + x + 2, c[2]);
      add(w, first, c[0], c[1], c[2], to, x);
      if (x + 1 == end) break;
      look(lines, left + x + 3, c[0]);
      add(w, first, c[1], c[2], c[0], to, x + 1);
      if (x + 2 == end) break;
      look(lines, left + x + 4, c[1]);
      add(w, first, c[2], c[0], c[1], to, x + 2);
    }
  }
};

}  // namespace CSAM_ISA
}  // namespace csam
