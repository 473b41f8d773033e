// A convolution whose filters read one channel each, such as a depthwise one, samples innermost: straight from the
// input to the output, with nothing packed. A job is some rows of results of some filters at one vector of samples.
#pragma once
#include <type_traits>

#include "sample_conv2d.h"

namespace csam {
namespace CSAM_ISA {

// A row of the input, or the border: pixel x of channel c at at + c * plane + x * step.
template <class Element>
struct Line {
  const Element* at;
  int64_t plane, step;
};

// A row of results, of each filter: the same, of a result's first value.
template <class Format>
struct Row {
  using Element = typename Format::Element;
  const Element* other;  // null, or what is added
  Element* out;
  int64_t plane, step, width;  // the last of a result, in elements
  Ending ending;

  Row of(int64_t filter, float scale) const {
    Row row = *this;
    if (other) row.other += filter * plane;
    row.out += filter * plane * width, row.ending.scale = scale;
    return row;
  }
  template <bool kAdds = true>
  CSAM_INLINE void finish(const Row& to, int64_t x, const vs* sums) {
    const int64_t at = x * to.step, width = sizeof(Element) == 1 ? to.width : 1;
    Format::finish(sums, kAdds && to.other ? to.other + at : nullptr, to.ending, to.out + at * width);
  }
};

#if defined(__AVX512F__)
// Two and four neighbours times their weights, added to the sums. As assembly, since an intrinsic would ask every
// caller to be compiled for AVX512-BF16 or AVX512-VNNI.
CSAM_INLINE vf add_two(vf pairs, vf weights, vf sums) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(pairs), "v"(weights));
  return sums;
}
CSAM_INLINE vi add_four(vi quads, vi weights, vi sums) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(quads), "v"(weights));
  return sums;
}
#endif

template <class Format>
struct Depthwise : Layer<Format> {
  using Base = Layer<Format>;
  using Base::a, Base::area, Base::bias, Base::border, Base::in_rows, Base::out_rows, Base::slots;
  using typename Base::Element;
  static constexpr int K = Format::kSums;
  static constexpr int64_t kMostRows = 64;    // of a kernel
  static constexpr int64_t kRowsOfAJob = 32;  // of results, at least if there are so many
  static constexpr bool kQuads = K == 4;      // four taps are multiplied at once
  static constexpr bool kIntegers = sizeof(Element) == 1;
  // Two are, where columns roll; not where short sums are worth it, for there VDPBF16PS takes longer than two FMAs.
  static constexpr bool kPairs = K == 2 && !kShortSums<Format>;
  using V = std::conditional_t<kIntegers, vi, vf>;

  Array<uint32_t> weights;  // [filters, words()], as the format multiplies; column by column if they roll
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
    const double taps = kQuads || kPairs ? words() : area;
    cost = double(a.filters * a.out_height * a.out_width) * K * (taps + 0.5 * columns + kEndCost);
  }

  // Three pixels down a column of the input, that serve up to three results. They are multiplied by kWords words of
  // weights: in pairs the upper two pixels interleaved and the lowest with zeros times zero, which spread no NaN; in
  // quads all three, and zeros.
  struct Column {
    static constexpr int kWords = kQuads ? 1 : kPairs ? 2 : 3;
    V v[kWords][K];

    __attribute__((always_inline)) Column(const Element* top, const Element* middle, const Element* bottom) {
      if constexpr (kQuads || kPairs) {
#if defined(__AVX512F__)
        const __m512i x = once(_mm512_loadu_si512(top)), y = once(_mm512_loadu_si512(middle));
        const __m512i z = once(_mm512_loadu_si512(bottom)), zero = _mm512_setzero_si512();
        if constexpr (kQuads) {
          const Quad q = interleaved(x, y, z, zero);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) v[0][k] = (V)q.v[k];
        } else {
          v[0][0] = (V)_mm512_unpacklo_epi16(x, y), v[0][1] = (V)_mm512_unpackhi_epi16(x, y);
          v[1][0] = (V)_mm512_unpacklo_epi16(z, zero), v[1][1] = (V)_mm512_unpackhi_epi16(z, zero);
        }
#elif defined(__AVX2__)
        const vi x = Format::widened(top), y = Format::widened(middle), z = Format::widened(bottom);
        v[0][0] = low_pairs(x, y), v[0][1] = high_pairs(x, y);
        v[1][0] = low_pairs(z, vi{}), v[1][1] = high_pairs(z, vi{});
#endif
      } else {
        Format::unpack(top, reinterpret_cast<vs*>(v[0]));
        Format::unpack(middle, reinterpret_cast<vs*>(v[1]));
        Format::unpack(bottom, reinterpret_cast<vs*>(v[2]));
        if constexpr (K == 1)
#pragma GCC unroll 3
          for (int i = 0; i < kWords; ++i) v[i][0] = once(v[i][0]);
      }
    }
    __attribute__((always_inline)) void add(const V* w, V* sums) const {  // of pairs and quads
#pragma GCC unroll 3
      for (int i = 0; i < kWords; ++i)
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
#if defined(__AVX512F__)
          if constexpr (kQuads) sums[k] = add_four(v[i][k], w[i], sums[k]);
          else sums[k] = add_two(v[i][k], w[i], sums[k]);
#elif defined(__AVX2__)
          sums[k] = (V)Format::dot((vf)sums[k], v[i][k], w[i]);
#endif
        }
    }
  };

  // Whether columns of three pixels are unpacked once for the results that they serve.
  bool rolls() const {
    return a.kernel[0] == 3 && a.kernel[1] == 3 && a.stride[1] <= 2 && a.dilation[1] == 1 && a.padding[1] <= 2;
  }
  int64_t words() const { return rolls() ? 3 * Column::kWords : kQuads ? tiles(area, 4) : area; }

  void lay() {
    weights = Array<uint32_t>(a.filters * words());
    for (int64_t o = 0; o < a.filters; ++o)
      for (int64_t k = a.rows[o]; k < a.rows[o + 1]; ++k) {
        const int64_t tap = a.taps[k] % area, row = tap / 3, each = kQuads ? 4 : kPairs ? 2 : 1;  // taps a word
        const uint32_t bits = Format::weight(a.values[k]);
        const int64_t word = !rolls() ? tap / (kQuads ? 4 : 1) : tap % 3 * Column::kWords + row / each;
        uint32_t& to = weights[o * words() + word];
        if (kQuads) to |= (bits & 0xFF) << (8 * (rolls() ? row : tap % 4));
        else if (kPairs && rolls()) to |= (kIntegers ? bits & 0xFFFF : bits >> 16) << (16 * (row % 2));
        else to = bits;
      }
  }

  void claim(Sizes& sizes) const {  // for fewer samples than lanes
    const int64_t vectors = a.kernel[0] * a.width + (1 + sizeof(float) / sizeof(Element)) * a.out_width;
    Sizes::raise(sizes.packed, vectors * Format::kLanes * int64_t(sizeof(Element)) / 4);
  }
  int64_t jobs(int64_t samples) const {
    return tiles(a.out_height, together_rows()) * groups() * tiles(samples, Format::kLanes);
  }
  int64_t together_rows() const { return Base::most_rows() < a.out_height ? Base::most_rows() : a.out_height; }
  int64_t group() const { return tiles(kRowsOfAJob, together_rows()); }  // filters
  int64_t groups() const { return tiles(slots, group()); }

  void run(int64_t job, const Element* in, const Element* other, Element* out, int64_t samples,
           const Scratch& s) const {
    const int64_t depth = tiles(samples, Format::kLanes), sample = job % depth * Format::kLanes, n = samples - sample;
    const int64_t first = job / depth % groups() * group(), last = first + group() < slots ? first + group() : slots;
    const int64_t top = job / depth / groups() * together_rows(), end = top + together_rows();
    const int64_t width = a.real ? sizeof(float) / sizeof(Element) : 1;
    for (int64_t y = top; y < end && y < a.out_height; ++y) {
      From lines[kMostRows];
      for (int64_t i = 0; i < a.kernel[0]; ++i) {
        const int64_t row = y * a.stride[0] - a.padding[0] + i * a.dilation[0];
        const bool inside = row >= 0 && row < a.height;
        if (inside) lines[i] = {in + row % in_rows * a.width * samples + sample, in_rows * a.width * samples, samples};
        else lines[i] = {border.data, 0, 0};
      }
      const int64_t at = Base::place_of(y, 0, samples) + sample;
      const To to = {other ? other + at : nullptr,
                     out + at * width,
                     out_rows * a.out_width * samples,
                     samples,
                     width,
                     Base::ending(1)};
      if (n >= Format::kLanes) make(first, last, lines, to);
      else
        for (int64_t o = first; o < last; ++o) make_some(o, lines, n, to, reinterpret_cast<Element*>(s.packed.data));
    }
  }

 private:
  using From = Line<Element>;
  using To = Row<Format>;

  // A row of results of whole vectors, of filters first .. last - 1.
  void make(int64_t first, int64_t last, const From* lines, const To& to) const {
    for (int64_t o = first; o < last; ++o) {
      From nothing[kMostRows];  // for a filter without a weight, which multiplies zeros
      const bool dead = a.rows[o] == a.rows[o + 1];
      for (int64_t i = 0; dead && i < a.kernel[0]; ++i) nothing[i] = {border.data, 0, 0};
      make_one(o, dead ? nothing : lines, to);
    }
  }
  void make_one(int64_t o, const From* lines, const To& to) const {
    if (!rolls()) any(o, lines, to);
    else if (a.stride[1] == 2) roll<2, true>(o, lines, to);
    else if (to.other) roll<1, true>(o, lines, to);
    else roll<1, false>(o, lines, to);
  }

  // Of the first n samples: from copies that are filled up with zeros, and through one of what comes of them.
  void make_some(int64_t o, const From* lines, int64_t n, const To& to, Element* copy) const {
    constexpr int64_t L = Format::kLanes;
    const auto fill = [&](const Element* from, int64_t pixels) {
      Element* first = copy;
      for (int64_t x = 0; x < pixels; ++x, copy += L, from += to.step) {
        memset(copy, 0, L * sizeof(Element));
        memcpy(copy, from, n * sizeof(Element));
      }
      return first;
    };
    From whole[kMostRows];
    for (int64_t i = 0; i < a.kernel[0]; ++i) {
      const From& line = lines[i];
      whole[i] = line.step ? From{fill(line.at + reads[o] * line.plane, a.width), 0, L} : line;
    }
    const Element* other = to.other ? fill(to.other + o * to.plane, a.out_width) : nullptr;
    make(o, o + 1, whole, {other, copy, 0, L, to.width, to.ending});
    Element* out = to.out + o * to.plane * to.width;
    for (int64_t x = 0; x < a.out_width; ++x)
      memcpy(out + x * to.step * to.width, copy + x * L * to.width, n * to.width * sizeof(Element));
  }

  const Element* pixel(const From& line, int64_t channel, int64_t x) const {
    return x >= 0 && x < a.width ? line.at + channel * line.plane + x * line.step : border.data;
  }

  void any(int64_t o, const From* lines, const To& row) const {
    const To to = row.of(o, Base::scales[o]);
    const uint32_t* w = weights.data + o * words();
    for (int64_t x = 0; x < a.out_width; ++x) {
      const int64_t left = x * a.stride[1] - a.padding[1];
      const Element* at[4];
      vf sums[K];
      for (vf& v : sums) v = Format::start(bias[o]);
      for (int64_t tap = 0, i = 0; i < a.kernel[0]; ++i)
        for (int64_t j = 0; j < a.kernel[1]; ++j, ++tap) {
          const Element* from = pixel(lines[i], reads[o], left + j * a.dilation[1]);
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
      To::finish(to, x, sums);
    }
  }
#if defined(__AVX512F__)
  CSAM_INLINE void add_quad(const uint8_t* const* from, uint32_t w, vf* sums) {
    const Quad q = interleaved(_mm512_loadu_si512(from[0]), _mm512_loadu_si512(from[1]), _mm512_loadu_si512(from[2]),
                               _mm512_loadu_si512(from[3]));
    for (int i = 0; i < 4; ++i) sums[i] = (vf)add_four((vi)q.v[i], spread<vi>(w), (vi)sums[i]);
  }
#endif

  // Three lines, from left of the image to right of it.
  struct Columns {
    const Element *top, *middle, *bottom, *border;
    int64_t steps[3], x, width;
    Columns(const From* lines, int64_t channel, int64_t left, int64_t width, const Element* border)
        : top(lines[0].at + channel * lines[0].plane + left * lines[0].step),
          middle(lines[1].at + channel * lines[1].plane + left * lines[1].step),
          bottom(lines[2].at + channel * lines[2].plane + left * lines[2].step),
          border(border),
          steps{lines[0].step, lines[1].step, lines[2].step},
          x(left),
          width(width) {}
    __attribute__((always_inline)) Column next() {  // that is inside the image
      const Element *t = top, *m = middle, *b = bottom;
      top += steps[0], middle += steps[1], bottom += steps[2];
      return Column(t, m, b);
    }
    __attribute__((always_inline)) Column next_or_border() {
      const bool inside = uint64_t(x++) < uint64_t(width);
      const Element *t = inside ? top : border, *m = inside ? middle : border, *b = inside ? bottom : border;
      top += steps[0], middle += steps[1], bottom += steps[2];
      return Column(t, m, b);
    }
  };
  struct Weights {  // of the three columns under a result
    V v[3][Column::kWords];
    explicit Weights(const uint32_t* w) {
#pragma GCC unroll 9
      for (int k = 0; k < 3 * Column::kWords; ++k) v[k / Column::kWords][k % Column::kWords] = spread<V>(w[k]);
    }
  };

  template <int kStride, bool kAdds>
  __attribute__((noinline)) void roll(int64_t o, const From* lines, const To& row) const {
    const To to = row.of(o, Base::scales[o]);
    const Weights w(weights.data + o * words());
    const V first = start(V{}, bias[o]);
    if constexpr (!kPairs && !kQuads) roll_in_order<kStride>(o, lines, w, first, to);
    else if constexpr (kStride == 1) scatter<kAdds>(o, lines, w, first, to);
    else scatter_in_twos(o, lines, w, first, to);
  }

  // Each result of its three columns, the taps in ascending order: the same bits as other convolutions.
  template <int kStride>
  __attribute__((always_inline)) void roll_in_order(int64_t o, const From* lines, const Weights& w, V first,
                                                    const To& to) const {
    Columns columns(lines, reads[o], -a.padding[1], a.width, border.data);
    Column l = columns.next_or_border(), m = kStride == 1 ? columns.next_or_border() : l;
#pragma GCC unroll 3
    for (int64_t x = 0; x < a.out_width; ++x) {
      if (kStride == 2) m = columns.next_or_border();
      const Column r = columns.next_or_border();
      V sums[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        sums[k] = first;
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          sums[k] = product_sum(w.v[0][i], l.v[i][k], sums[k]);
          sums[k] = product_sum(w.v[1][i], m.v[i][k], sums[k]);
          sums[k] = product_sum(w.v[2][i], r.v[i][k], sums[k]);
        }
      }
      To::finish(to, x, (const vs*)sums);
      l = kStride == 1 ? m : r, m = r;
    }
  }

  // Column by column: each is the last of one result, the middle of the next and the first of the one after it. These
  // three are in the making at a time, so that none of their sums waits for itself.
  template <bool kAdds>
  __attribute__((always_inline)) void scatter(int64_t o, const From* lines, const Weights& w, V first,
                                              const To& to) const {
    // Zeros outside the image add nothing; integers there may not be zeros.
    const int64_t end = a.out_width + 2, left = kIntegers ? 0 : a.padding[1], inside = kIntegers ? end : left + a.width;
    Columns columns(lines, reads[o], left - a.padding[1], a.width, border.data);
    V sums[3][K];
#pragma GCC unroll 12
    for (int i = 0; i < 3 * K; ++i) sums[i / K][i % K] = first;
    const auto add = [&](V* last, V* middle, V* next) __attribute__((always_inline)) {
      const Column c = kIntegers ? columns.next_or_border() : columns.next();
      c.add(w.v[2], last);
      c.add(w.v[1], middle);
      c.add(w.v[0], next);
    };
    const auto finish = [&](int64_t x, V* last) __attribute__((always_inline)) {
      To::template finish<kAdds>(to, x - 2, (const vs*)last);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) last[k] = first;
    };
    const auto turn = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const V last = sums[0][k];
        sums[0][k] = sums[1][k], sums[1][k] = sums[2][k], sums[2][k] = last;
      }
    };
    int64_t x = left;
    for (; x < 2 && x < inside; ++x) {
      add(sums[0], sums[1], sums[2]);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) sums[0][k] = first;
      turn();
    }
    for (; x + 2 < inside; x += 3) {
      add(sums[0], sums[1], sums[2]);
      finish(x, sums[0]);
      add(sums[1], sums[2], sums[0]);
      finish(x + 1, sums[1]);
      add(sums[2], sums[0], sums[1]);
      finish(x + 2, sums[2]);
    }
    for (; x < end; ++x) {
      if (x < inside) add(sums[0], sums[1], sums[2]);
      if (x > 1) finish(x, sums[0]);
      turn();
    }
  }

  // The same with a stride of 2: every other column is the last of one result and the first of the next.
  __attribute__((always_inline)) void scatter_in_twos(int64_t o, const From* lines, const Weights& w, V first,
                                                      const To& to) const {
    Columns columns(lines, reads[o], -a.padding[1], a.width, border.data);
    V sums[K];
    for (int64_t x = 0; x <= a.out_width; ++x) {
      const Column c = columns.next_or_border();
      if (x) {
        c.add(w.v[2], sums);
        To::finish(to, x - 1, (const vs*)sums);
      }
      if (x == a.out_width) return;
      for (int k = 0; k < K; ++k) sums[k] = first;
      c.add(w.v[0], sums);
      columns.next_or_border().add(w.v[1], sums);
    }
  }
};

}  // namespace CSAM_ISA
}  // namespace csam
