// A convolution whose filters read one channel each, such as a depthwise one, samples innermost: straight from the
// input to the output, with nothing packed. A job is one filter at one vector of samples; it makes a row of results at
// a time.
#pragma once
#include <type_traits>

#include "sample_conv2d.h"

namespace csam {
namespace CSAM_ISA {

#if defined(__AVX512F__)
// Columns of three pixels, interleaved once for three results; what is missing to four is multiplied by zero.
template <class Pixels>
CSAM_VNNI void roll_quads(const Pixels& pixels, int64_t left, int64_t width, const uint32_t* w, float bias,
                          float* sums) {
  const __m512i first = _mm512_set1_epi32(int32_t(bias)), zero = _mm512_setzero_si512();
  Quad columns[3];
  const uint8_t* from[3];
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t) {
    pixels(left + t, from);
    columns[t] =
        interleaved(_mm512_loadu_si512(from[0]), _mm512_loadu_si512(from[1]), _mm512_loadu_si512(from[2]), zero);
  }
  for (int64_t x = 0; x < width; x += 3)
#pragma GCC unroll 3
    for (int t = 0; t < 3; ++t, sums += 4 * W) {
      if (x + t >= width) return;
      pixels(left + x + t + 2, from);
      columns[(t + 2) % 3] =
          interleaved(_mm512_loadu_si512(from[0]), _mm512_loadu_si512(from[1]), _mm512_loadu_si512(from[2]), zero);
      __m512i sum[4] = {first, first, first, first};
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          sum[i] = _mm512_dpbusd_epi32(sum[i], columns[(t + j) % 3].v[i], _mm512_set1_epi32(int(w[j])));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) _mm512_store_si512(sums + i * W, sum[i]);
    }
}
CSAM_VNNI void add_quad(const uint8_t* const* from, uint32_t w, float* sums) {
  const Quad q = interleaved(_mm512_loadu_si512(from[0]), _mm512_loadu_si512(from[1]), _mm512_loadu_si512(from[2]),
                             _mm512_loadu_si512(from[3]));
  for (int i = 0; i < 4; ++i) {
    const __m512i sum = _mm512_load_si512(sums + i * W);
    _mm512_store_si512(sums + i * W, _mm512_dpbusd_epi32(sum, q.v[i], _mm512_set1_epi32(int(w))));
  }
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

  int64_t words() const { return kQuads ? rolls() ? 3 : tiles(area, 4) : area; }

  void lay() {
    weights = Array<uint32_t>(a.filters * words());
    for (int64_t o = 0; o < a.filters; ++o)
      for (int64_t k = a.rows[o]; k < a.rows[o + 1]; ++k) {
        const int64_t tap = a.taps[k] % area, word = rolls() ? tap % 3 : tap / 4, place = rolls() ? tap / 3 : tap % 4;
        const uint32_t bits = Format::weight(a.values[k]);
        if (kQuads) weights[o * words() + word] |= (bits & 0xFF) << (8 * place);
        else weights[o * area + tap] = bits;
      }
  }

  void claim(Sizes& sizes) const { Sizes::raise(sizes.sums, a.out_width * K * W); }
  int64_t jobs(int64_t samples) const {
    return tiles(a.out_height, together_rows()) * slots * tiles(samples, Format::kLanes);
  }
  int64_t together_rows() const { return Base::most_rows() < a.out_height ? Base::most_rows() : a.out_height; }

  // Whether columns of three pixels are unpacked once for three results.
  bool rolls() const { return a.kernel[0] == 3 && a.kernel[1] == 3 && a.stride[1] == 1 && a.dilation[1] == 1; }

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
    Line lines[kMostRows];
    for (int64_t y = top; y < end && y < a.out_height; ++y) {
      for (int64_t i = 0; i < a.kernel[0]; ++i) {
        const int64_t row = y * a.stride[0] - a.padding[0] + i * a.dilation[0];
        const bool inside = row >= 0 && row < a.height;
        lines[i] = inside ? Line{in + row % in_rows * a.width * samples, samples} : Line{border.data, 0};
      }
      if (n < Format::kLanes) any<false>(o, lines, n, s.sums.data);
      else if (rolls()) roll(o, lines, s.sums.data);
      else any<true>(o, lines, n, s.sums.data);
      Base::write(o, y, 0, 1, a.out_width, sample, n, s.sums.data, K * W, other, out, samples);
    }
  }

 private:
  const Element* pixel(const Line& line, int64_t x) const {
    return x >= 0 && x < a.width ? line.at + x * line.step : border.data;
  }

  template <bool Whole>
  void any(int64_t o, const Line* lines, int64_t n, float* sums) const {
    Element some[4][Format::kLanes] = {};
    const uint32_t* w = weights.data + o * words();
    for (int64_t x = 0; x < a.out_width; ++x, sums += K * W) {
      const auto from = [&](int64_t tap, Element* copy) {
        const int64_t column = x * a.stride[1] - a.padding[1] + tap % a.kernel[1] * a.dilation[1];
        const Element* at = pixel(lines[tap / a.kernel[1]], column);
        return Whole ? at : static_cast<Element*>(memcpy(copy, at, n * sizeof(Element)));
      };
      if constexpr (kQuads) {
        for (int k = 0; k < K; ++k) store(sums + k * W, Format::start(bias[o]));
        for (int64_t tap = 0; tap < area; tap += 4) {
          const Element* at[4];
          for (int64_t j = 0; j < 4; ++j) at[j] = from(tap + j < area ? tap + j : tap, some[j]);
          add_quad(at, w[tap / 4], sums);
        }
        continue;
      } else {
        V sum[K];
        vf in[K];
        for (V& v : sum) v = start(V{}, bias[o]);
        for (int64_t tap = 0; tap < area; ++tap) {
          Format::unpack(from(tap, some[0]), in);
          for (int k = 0; k < K; ++k) sum[k] = product_sum(spread<V>(w[tap]), (V)in[k], sum[k]);
        }
        for (int k = 0; k < K; ++k) store(sums + k * W, sum[k]);
      }
    }
  }

  struct Column {
    V v[3][K];
  };
  inline __attribute__((always_inline)) void look(const Line* lines, int64_t x, Column& to) const {
    for (int i = 0; i < 3; ++i) Format::unpack(pixel(lines[i], x), reinterpret_cast<vf*>(to.v[i]));
  }
  CSAM_INLINE void add(const V* w, V first, const Column& l, const Column& m, const Column& r, float* sums) {
    V sum[K];
    for (V& v : sum) v = first;
    for (int i = 0; i < 3; ++i)
      for (int k = 0; k < K; ++k) {
        sum[k] = product_sum(w[3 * i], l.v[i][k], sum[k]);
        sum[k] = product_sum(w[3 * i + 1], m.v[i][k], sum[k]);
        sum[k] = product_sum(w[3 * i + 2], r.v[i][k], sum[k]);
      }
    for (int k = 0; k < K; ++k) store(sums + k * W, sum[k]);
  }

  void roll(int64_t o, const Line* lines, float* sums) const {
    if constexpr (kQuads) {
      const auto column = [&](int64_t x, const Element** from) {
        for (int i = 0; i < 3; ++i) from[i] = pixel(lines[i], x);
      };
      return roll_quads(column, -a.padding[1], a.out_width, weights.data + o * words(), bias[o], sums);
    } else {
      roll_one(o, lines, sums);
    }
  }

  void roll_one(int64_t o, const Line* lines, float* sums) const {
    V w[9];
    for (int k = 0; k < 9; ++k) w[k] = spread<V>(weights[o * area + k]);
    const V first = start(V{}, bias[o]);
    Column c[3];
    int64_t x = -a.padding[1];
    look(lines, x++, c[0]);
    look(lines, x++, c[1]);
    for (int64_t left = a.out_width; left > 0; left -= 3, sums += 3 * K * W) {
      look(lines, x++, c[2]);
      add(w, first, c[0], c[1], c[2], sums);
      if (left < 2) break;
      look(lines, x++, c[0]);
      add(w, first, c[1], c[2], c[0], sums + K * W);
      if (left < 3) break;
      look(lines, x++, c[1]);
      add(w, first, c[2], c[0], c[1], sums + 2 * K * W);
    }
  }
};

}  // namespace CSAM_ISA
}  // namespace csam
