// A convolution whose filters read one channel each, such as a depthwise one, samples innermost: straight from the
// input to the output, with nothing packed. A job is one filter at one vector of samples; it makes a row of results at
// a time.
#pragma once
#include "sample_conv2d.h"

namespace csam {
namespace CSAM_ISA {

template <class Format>
struct Depthwise : Layer<Format> {
  using Base = Layer<Format>;
  using Base::a, Base::area, Base::bias, Base::border, Base::in_rows, Base::out_rows, Base::slots;
  using typename Base::Element;
  static constexpr int K = Format::kSums;
  static constexpr int64_t kMostRows = 64;  // of a kernel

  Array<float> weights;  // [filters, area], rounded as they multiply
  Array<int32_t> reads;  // each filter's channel
  double cost = 0;       // of kLanes samples, as a Convolution's

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
    cost = double(a.filters * a.out_height * a.out_width) * K * (area + 0.5 * columns + kEndCost);
  }

  void lay() {
    weights = Array<float>(a.filters * area);
    for (int64_t o = 0; o < a.filters; ++o)
      for (int64_t k = a.rows[o]; k < a.rows[o + 1]; ++k)
        weights[o * area + a.taps[k] % area] = Format::widen(Format::narrow(a.values[k]));
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
    Element some[Format::kLanes] = {};
    const vf first = splat(bias[o]);
    for (int64_t x = 0; x < a.out_width; ++x, sums += K * W) {
      vf sum[K], in[K];
      for (vf& v : sum) v = first;
      const float* w = weights.data + o * area;
      for (int64_t i = 0; i < a.kernel[0]; ++i)
        for (int64_t j = 0; j < a.kernel[1]; ++j, ++w) {
          const Element* from = pixel(lines[i], x * a.stride[1] - a.padding[1] + j * a.dilation[1]);
          if (!Whole) from = static_cast<Element*>(memcpy(some, from, n * sizeof(Element)));
          Format::unpack(from, in);
          for (int k = 0; k < K; ++k) sum[k] = fma(splat(*w), in[k], sum[k]);
        }
      for (int k = 0; k < K; ++k) store(sums + k * W, sum[k]);
    }
  }

  struct Column {
    vf v[3][K];
  };
  inline __attribute__((always_inline)) void look(const Line* lines, int64_t x, Column& to) const {
    for (int i = 0; i < 3; ++i) Format::unpack(pixel(lines[i], x), to.v[i]);
  }
  CSAM_INLINE void add(const vf* w, vf first, const Column& l, const Column& m, const Column& r, float* sums) {
    vf sum[K];
    for (vf& v : sum) v = first;
    for (int i = 0; i < 3; ++i)
      for (int k = 0; k < K; ++k)
        sum[k] = fma(w[3 * i + 2], r.v[i][k], fma(w[3 * i + 1], m.v[i][k], fma(w[3 * i], l.v[i][k], sum[k])));
    for (int k = 0; k < K; ++k) store(sums + k * W, sum[k]);
  }

  void roll(int64_t o, const Line* lines, float* sums) const {
    vf w[9];
    for (int k = 0; k < 9; ++k) w[k] = splat(weights[o * area + k]);
    const vf first = splat(bias[o]);
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
