// A 3x3 convolution of stride 1 or 2 by Winograd's minimal filtering, samples innermost (Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks", CVPR 2016, section 4): windows of the input and each 3x3 of the weight
// become places, whose products, summed over channels, give a square of outputs: F(2x2, 3x3) by 16 multiplications in
// place of 36, F(4x4, 3x3) by 36 in place of 144. The latter is for integers, of which it is exact, and else where it
// leaves at most three quarters of the products, of float32 in four tiles or more. A job is a block of tiles of one
// vector of samples: its input is transformed once, and at every place the filters add their products by the dense
// loops of sample_block.h, a tile standing for a pixel.
//
// Of 4x4 outputs bfloat16 would lose too much. Its networks multiply in fixed point of 16 bits instead, as fast: what
// the windows of a sample in a block become, in units of the most that its inputs could give, and what a filter
// becomes, in the smallest unit that keeps sums of kFixedUnits below 2^31; those are added in float32. This loses less
// than rounding weights to bfloat16 would.
//
// At one place of F(2x2, 3x3) windows are summed along both axes; at the others they are differences, small where an
// image is smooth. So in bfloat16 most of what rounding weights moves is moved there, all samples alike: its weights
// are two bfloat16s each, the second what the first leaves, and 17 products take the place of 36.
#pragma once
#include "sample_conv2d.h"

namespace csam {
namespace CSAM_ISA {

constexpr int64_t kMostTiles = 8;                 // of a block
constexpr int64_t kPlaceBytes = 20 << 10;         // of a block's units at one place that filters go over in turn
constexpr int64_t kTransformedBytes = 512 << 10;  // of a block that has more tiles than a register tile
constexpr float kMostWord = 32767;

// B^T, G and A^T along one axis, the latter's even and odd rows, and what is left to do to a result; inputs from tile
// to tile, and tiles side by side that a block has at most.
struct F2 {
  static constexpr int64_t kOut = 2, kIn = 4, kStep = 2, kColumns = 8;
  static constexpr double kWeight[kIn][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  static constexpr double kInputCost = 40, kEachInputCost = 35, kOutputCost = 80, kEachOutputCost = 40;
  template <class V>
  CSAM_INLINE void input(const V* d, V* out) {
    out[0] = d[0] - d[2], out[1] = d[1] + d[2], out[2] = d[2] - d[1], out[3] = d[1] - d[3];
  }
  template <class V>
  CSAM_INLINE void even(const V* m, V* out) {
    out[0] = m[0] + m[1] + m[2];
  }
  template <class V>
  CSAM_INLINE void odd(const V* m, V* out) {
    out[0] = m[1] - m[2] - m[3];
  }
  CSAM_INLINE vf result(vf sum, int64_t, int64_t) { return sum; }
};

// The polynomials are taken at 0, +-2/3, +-3/2 and infinity: of float32 up to twice the rounding of direct sums (rms),
// half of what it would be at the 0, +-1, +-2 and infinity that bytes take. Weights at +-3/2 are multiplied by kMore,
// and what they give is divided by it: in fixed point they would be too small for those beside them.
template <int kMore>
struct F4 {
  static constexpr int64_t kOut = 4, kIn = 6, kStep = 4, kColumns = 8;
  static constexpr double kWeight[kIn][3] = {{1, 0, 0},
                                             {-81. / 130, -54. / 130, -36. / 130},
                                             {-81. / 130, 54. / 130, -36. / 130},
                                             {kMore * 8. / 65, kMore * 12. / 65, kMore * 18. / 65},
                                             {kMore * 8. / 65, kMore * -12. / 65, kMore * 18. / 65},
                                             {0, 0, 1}};
  static constexpr double kInputCost = 110, kEachInputCost = 230, kOutputCost = 220, kEachOutputCost = 280;
  // What |input| <= 1 becomes, at most, and at any place.
  static constexpr double kLargest[kIn] = {169. / 36, 65. / 12, 65. / 12, 65. / 18, 65. / 18, 169. / 36};
  static constexpr double kLargestPlace = 65. * 65 / 144;
  static constexpr float kA = 2.f / 3, kB = 1.5f, kLess = 1.f / kMore;
  template <class V>
  CSAM_INLINE void input(const V* d, V* out) {
    const V middle = splat(-kA * kA - kB * kB), a = splat(kA), b = splat(kB);
    const V p = fma(splat(-kB * kB), d[2], d[4]), q = fma(splat(-kB * kB), d[1], d[3]);
    const V r = fma(splat(-kA * kA), d[2], d[4]), t = fma(splat(-kA * kA), d[1], d[3]);
    out[0] = fma(middle, d[2], d[0] + d[4]);
    out[1] = fma(a, q, p), out[2] = fma(-a, q, p), out[3] = fma(b, t, r), out[4] = fma(-b, t, r);
    out[5] = fma(middle, d[3], d[1] + d[5]);
  }
  template <class V>
  CSAM_INLINE void even(const V* m, V* out) {
    const V p = m[1] + m[2], r = m[3] + m[4];
    out[0] = fma(splat(kLess), r, m[0] + p);
    out[1] = fma(splat(kA * kA), p, splat(kLess * kB * kB) * r);
  }
  template <class V>
  CSAM_INLINE void odd(const V* m, V* out) {
    const V q = m[1] - m[2], t = m[3] - m[4];
    out[0] = fma(splat(kA), q, splat(kLess * kB) * t);
    out[1] = fma(splat(kA * kA * kA), q, fma(splat(kLess * kB * kB * kB), t, m[5]));
  }
  CSAM_INLINE vf result(vf sum, int64_t, int64_t) { return sum; }
};

// With a stride of 2. Every other input meets one tap alone and is left as it is; those between meet two, by F(4, 2) at
// +-1/2, +-1 and infinity: 81 multiplications in place of 144.
struct F4Strided {
  static constexpr int64_t kOut = 4, kIn = 9, kStep = 8, kColumns = 2;
  static constexpr double kWeight[kIn][3] = {{-4. / 3, 0, -2. / 3},
                                             {4. / 3, 0, -2. / 3},
                                             {4. / 3, 0, 4. / 3},
                                             {-4. / 3, 0, 4. / 3},
                                             {0, 0, 2},
                                             {0, 4, 0},
                                             {0, 4, 0},
                                             {0, 4, 0},
                                             {0, 4, 0}};
  static constexpr double kInputCost = 220, kEachInputCost = 460, kOutputCost = 400, kEachOutputCost = 500;
  static constexpr double kLargest[kIn] = {3, 3, 2.5, 2.5, 2.5, 1, 1, 1, 1}, kLargestPlace = 9;
  template <class V>
  CSAM_INLINE void input(const V* d, V* out) {
    const V half = splat(0.5f), fourth = splat(0.25f);
    const V p = d[6] - d[2], q = half * (d[4] - d[0]), r = fma(-fourth, d[2], d[6]), t = fma(-fourth, d[0], d[4]);
    out[0] = p + q, out[1] = p - q, out[2] = r + t, out[3] = r - t;
    out[4] = d[8] - fma(-fourth, d[0], splat(1.25f) * d[4]);
    out[5] = d[1], out[6] = d[3], out[7] = d[5], out[8] = d[7];
  }
  template <class V>
  CSAM_INLINE void even(const V* m, V* out) {
    const V fourth = splat(0.25f), p = m[0] + m[1], r = splat(0.5f) * (m[2] + m[3]);
    out[0] = fma(fourth, m[5], p + r);
    out[1] = fma(fourth, p + m[7], r);
  }
  template <class V>
  CSAM_INLINE void odd(const V* m, V* out) {
    const V half = splat(0.5f), fourth = splat(0.25f), q = m[0] - m[1], t = half * (m[2] - m[3]);
    out[0] = fma(half, q, fma(fourth, m[6], t));
    out[1] = fma(splat(0.125f), q, fma(half, m[4], fma(fourth, m[8], t)));
  }
  CSAM_INLINE vf result(vf sum, int64_t, int64_t) { return sum; }
};

// Of bytes: what windows become is within 16 bits, and so are weights, whose rows are multiplied by 24, 6, 6, 24,
// 24, 6. Results are multiples of 3 * 2^kShift along each axis, modulo 2^32: the product with the inverse of 9 and a
// shift give them exactly if they are below 2^25, though sums on the way may pass 2^31.
struct F4Bytes {
  static constexpr int64_t kOut = 4, kIn = 6, kStep = 4, kColumns = 8;
  static constexpr double kWeight[kIn][3] = {{6, 0, 0}, {-1, -1, -1}, {-1, 1, -1}, {1, 2, 4}, {1, -2, 4}, {0, 0, 6}};
  static constexpr double kInputCost = 80, kEachInputCost = 165, kOutputCost = 160, kEachOutputCost = 200;
  static constexpr int kShift[kOut] = {3, 2, 1, 1};
  static constexpr uint32_t kNinth = 0x38E38E39;
  static constexpr double kMost = 1 << 25;
  template <class V>
  CSAM_INLINE void input(const V* d, V* out) {
    const V a = d[4] - (d[2] << 2), b = d[3] - (d[1] << 2), c = d[4] - d[2], e = (d[3] - d[1]) << 1;
    out[0] = ((d[0] - d[2]) << 2) + c;
    out[1] = a + b, out[2] = a - b, out[3] = c + e, out[4] = c - e;
    out[5] = d[5] - d[3] - (e << 1);
  }
  template <class V>
  CSAM_INLINE void even(const V* m, V* out) {
    const V p = m[1] + m[2], r = m[3] + m[4];
    out[0] = m[0] + (p << 2) + r, out[1] = p + r;
  }
  template <class V>
  CSAM_INLINE void odd(const V* m, V* out) {
    const V q = m[1] - m[2], s = m[3] - m[4];
    out[0] = (q << 1) + s, out[1] = q + (s << 1) + m[5];
  }
  CSAM_INLINE vu result(vu sum, int64_t y, int64_t x) { return (vu)((vi)(sum * kNinth) >> (kShift[y] + kShift[x])); }
};

// The format that multiplies what is transformed, with the samples and sums of the network's.
template <class Format>
struct Transformed {
  using Type = std::conditional_t<sizeof(typename Format::Element) == 2, Bfloat16Words<Format>, Format>;
};
#if defined(__AVX512F__)
template <>
struct Transformed<Int8Quads> {
  using Type = Int8Words;
};
#endif

// A layer for tiles of either size.
template <class Element>
struct Winograd {
  double cost = 0;
  virtual ~Winograd() = default;
  virtual void claim(Sizes& sizes) const = 0;
  virtual void lay() = 0;
  virtual int64_t jobs() const = 0;
  virtual void run(int64_t job, const Element* in, const Element* other, Element* out, const Scratch& s) const = 0;
};

template <class Format, class F>
struct Minimal final : Winograd<typename Format::Element>, Layer<Format> {
  using Base = Layer<Format>;
  using Base::a, Base::bias, Base::border, Base::channel, Base::channels, Base::filter, Base::live, Base::padded;
  using typename Base::Element;
  using Winograd<Element>::cost;
  static constexpr int64_t S = Format::kLanes, P = Format::kSums * W;  // samples; floats of a packed or summed tile
  using V = std::conditional_t<sizeof(Element) == 1, vu, vf>;
  using Work = typename Format::Work;
  static constexpr int64_t T = Format::kTogether, N = Format::kWork;  // channels of a unit; vectors of a pixel
  static constexpr int64_t kOut = F::kOut, kIn = F::kIn, kPlaces = kIn * kIn, kStep = F::kStep;
  static constexpr int64_t kReached = kStep * (F::kColumns - 1) + kIn;
  static constexpr int64_t kSummed = kIn + 1,
                           kPasses = kPlaces + (sizeof(Element) == 2 && kOut == 2);  // that place; once more over it
  // A multiply-add as `Convolution::choose` prices it, and in these a tile of a channel and of a filter.
  static constexpr double kUnit = Format::kDense[0].columns == 1 ? 1.5 : 1, kNarrow = kFixed<Format> ? 1.2 : 1.5;
  static constexpr double kInputCost = kUnit * (F::kInputCost + F::kEachInputCost * Format::kSums);
  static constexpr double kOutputCost = kUnit * (F::kOutputCost + F::kEachOutputCost * Format::kSums);

  int64_t rows, columns;  // of a block, in tiles
  int64_t units, together, group, down, across;
  Micro micro;
  Array<uint32_t> weights;  // [passes][blocks of units][padded / kFilters][units][kFilters]
  Array<int32_t> offsets;   // of each unit of a block
  Array<float> nothing, filter_units;

  struct Units {  // of a block's samples: what inputs are multiplied by, and results
    alignas(64) float input[P], result[P];
  };

  explicit Minimal(const SampleConvArgs& args) : Base(args) {
    units = tiles(channels, T);
    choose();
    const int64_t count = rows * columns;
    micro = Format::kDense[0];
    for (const Micro& m : Format::kDense)
      if (count % micro.columns) micro = m;
    together = tiles(units, tiles(units, fitting(count)));
    const int64_t fit = kSumBytes / (4 * kPlaces * count * P) / Format::kFilters * Format::kFilters;
    group = tiles(live, tiles(live, fit < Format::kFilters ? Format::kFilters : fit));
    group = tiles(group, Format::kFilters) * Format::kFilters;
    down = tiles(a.out_height, kOut * rows);
    across = tiles(a.out_width, kOut * columns);
    nothing = Array<float>(group);
    offsets = Array<int32_t>(together);
    for (int64_t u = 0; u < together; ++u) offsets[u] = int32_t(u * count * P);
  }

  // G w G^T, in double, for the dense loops.
  void lay() override {
    const Array<float> full = Base::full();
    const int64_t size = padded * units * T;
    Array<float> places(kPasses * size);
    for (int64_t i = 0; i < size; ++i)
      for (int64_t y = 0; y < kIn; ++y) {
        double row[3] = {};
        for (int64_t x = 0; x < 3; ++x)
          for (int64_t k = 0; k < 3; ++k) row[x] += F::kWeight[y][k] * full[i * 9 + 3 * k + x];
        for (int64_t x = 0; x < kIn; ++x) {
          const double* g = F::kWeight[x];
          places[(kIn * y + x) * size + i] = float(g[0] * row[0] + g[1] * row[1] + g[2] * row[2]);
        }
      }
    if constexpr (kPasses > kPlaces)
      for (int64_t i = 0; i < size; ++i) {
        const float sum = places[kSummed * size + i];
        places[kPlaces * size + i] = sum - Format::widen(Format::narrow(sum));
      }
    if constexpr (kFixed<Format>) fix(places);
    weights = Array<uint32_t>(size / T * kPasses);
    uint32_t* to = weights.data;
    for (int64_t p = 0; p < kPasses; ++p)
      for (int64_t u = 0; u < units; u += together)
        to = Base::lay_units(places.data + p * size, 1, u, units - u < together ? units - u : together, to);
  }

  void claim(Sizes& sizes) const override {
    Sizes::raise(sizes.packed, kPlaces * pitch());
    Sizes::raise(sizes.sums, kPlaces * group * rows * columns * P);
  }

  int64_t jobs() const override { return down * across; }
  // Floats from one place of a block to the next: a line more than are needed, for places whole pages apart would share
  // the same few lines of a first-level cache.
  int64_t pitch() const { return units * rows * columns * P + 16; }

  void run(int64_t job, const Element* in, const Element* other, Element* out, const Scratch& s) const override {
    const int64_t top = job / across * kOut * rows, left = job % across * kOut * columns, count = rows * columns;
    const int64_t first_row = job / across * kStep * rows - a.padding[0];
    const int64_t first_column = job % across * kStep * columns - a.padding[1];
    Units fixed;
    if constexpr (kFixed<Format>) measure(in, first_row, first_column, fixed);
    for (int64_t u = 0; u < units; ++u)
      for (int64_t r = 0; r < rows; ++r)
        transform(in, u, first_row + kStep * r, first_column, s.packed.data + (u * count + r * columns) * P, fixed);
    for (int64_t first = 0; first < live; first += group) {
      const int64_t mine = live - first < group ? live - first : group;
      for (int64_t p = 0; p < kPasses; ++p) {
        const bool again = p == kPlaces;
        const int64_t at = again ? kSummed : p;
        for (int64_t u = 0; u < units; u += together) {
          const int64_t here = units - u < together ? units - u : together;
          Block block = {s.packed.data + at * pitch() + u * count * P, 0, 1, count, kPlaces * count};
          block.weights = weights.data + (p * units + u) * padded + first * here;
          block.offsets = offsets.data;
          block.products = here;
          block.bias = u || again ? nullptr : nothing.data;
          micro.add(block, mine, s.sums.data + at * count * P);
        }
      }
      for (int64_t o = 0; o < mine; ++o)
        finish(first + o, top, left, s.sums.data + o * kPlaces * count * P, fixed, other, out);
    }
    Base::write_dead(top, left, kOut * rows, kOut * columns, 0, S, other, out, S);
  }

 private:
  // Units of a block of `count` tiles that filters go over in turn, at most.
  static int64_t fitting(int64_t count) {
    const int64_t fit = kPlaceBytes / (4 * P * count);
    return fit < 1 ? 1 : fit;
  }

  // Weights [kPlaces, padded, channels of whole units] in units of their filters: words, of which no sum of kFixedUnits
  // reaches 2^31.
  void fix(const Array<float>& places) {
    const int64_t inner = units * T;
    filter_units = Array<float>(padded);
    for (int64_t s = 0; s < padded; ++s) {
      double unit = 1e-30;
      for (int64_t p = 0; p < kPlaces; ++p) {
        const double reached = kMostWord * F::kLargest[p / kIn] * F::kLargest[p % kIn] / F::kLargestPlace + 0.5;
        for (int64_t u = 0, end; u < units; u = end) {
          const int64_t block = (u / together + 1) * together, stop = block < units ? block : units;
          end = u + kFixedUnits < stop ? u + kFixedUnits : stop;
          double sum = 0, most = 0;
          for (int64_t c = u * T; c < end * T; ++c) {
            const double size = __builtin_fabs(places[(p * padded + s) * inner + c]);
            sum += size, most = size > most ? size : most;
          }
          sum /= 2147483647. / reached - double((end - u) * T) / 2 - 1;  // what rounding can add
          most /= kMostWord;
          if (most > sum) sum = most;
          if (sum > unit || sum != sum) unit = sum;  // NaN stays
        }
      }
      for (int64_t p = 0; p < kPlaces; ++p)
        for (int64_t c = 0; c < inner; ++c) {
          float& w = places[(p * padded + s) * inner + c];
          const double word = __builtin_rint(w / unit);
          w = word == word ? float(word) : 0;
        }
      filter_units[s] = float(unit);
    }
  }

  // The units of a block whose first pixel is (top, left): what inputs as large as the largest of a sample could become
  // is just below kMostWord of them. Sizes are compared as integers, NaN above all.
  void measure(const Element* in, int64_t top, int64_t left, Units& fixed) const {
    typedef Element Bits __attribute__((vector_size(S * sizeof(Element))));
    const int64_t bottom = top + kStep * (rows - 1) + kIn, right = left + kStep * (columns - 1) + kIn;
    const int64_t end = bottom < a.height ? bottom : a.height, stop = right < a.width ? right : a.width;
    Bits most = {};
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = top > 0 ? top : 0; y < end; ++y) {
        const Element* row = in + (int64_t(channel[c]) * a.height + y) * a.width * S;
        for (int64_t x = left > 0 ? left : 0; x < stop; ++x) {
          const Bits size = load<Bits>(row + x * S) & 0x7FFF;
          most = size > most ? size : most;
        }
      }
    alignas(64) Element stored[S];
    store(stored, most);
    vs sizes[N];
    Format::unpack(stored, sizes);
    for (int64_t n = 0; n < N; ++n) {
      const vf least = splat(0x1p-100f), size = (vf)sizes[n] < least ? least : (vf)sizes[n];
      store(fixed.input + n * W, splat(float((kMostWord - 1) / F::kLargestPlace)) / size);
      store(fixed.result + n * W, splat(float(F::kLargestPlace / (kMostWord - 1))) * size);
    }
  }

  // The block that leaves the least to do, as `Convolution::choose` counts it.
  void choose() {
    const double turns = double(padded) / Format::kFilters;
    for (int64_t r = 1; r <= 2; ++r)
      for (int64_t c = 1; c <= F::kColumns; c *= 2) {
        const int64_t count = r * c;
        if (count > kMostTiles ||
            (count > Format::kDense[0].columns && 4 * kPlaces * units * count * P > kTransformedBytes))
          continue;
        const double parts = double(tiles(units, fitting(count))), n = double(count);
        const double narrow = count % Format::kDense[0].columns ? kNarrow : kUnit;
        const double micros = n / Format::kDense[0].columns;
        const double work = kPasses * (double(padded * units * Format::kSums) * n * narrow +
                                       parts * turns * (micros * kTurnCost + Format::kFilters * n * kSumCost)) +
                            double(channels) * n * kInputCost + double(live) * n * kOutputCost;
        const double total = work * double(tiles(a.out_height, kOut * r) * tiles(a.out_width, kOut * c));
        if (!cost || total < cost) rows = r, columns = c, cost = total;
      }
  }

  static void unpack(const Element* in, Work* out) {
    if constexpr (std::is_same_v<Work, vw>) Format::unpack_words(in, out);
    else Format::unpack(in, reinterpret_cast<vs*>(out));
  }

  // A row of tiles of one unit, whose first pixel is (top, left), to its places, `pitch` apart.
  void transform(const Element* in, int64_t unit, int64_t top, int64_t left, float* out, const Units& fixed) const {
    Work down_combined[kIn][N][kReached][T];
    const int64_t reached = kStep * (columns - 1) + kIn, inside = a.width - left < reached ? a.width - left : reached;
    for (int64_t i = 0; i < T; ++i) {
      const int64_t c = unit * T + i;
      const Element* row[kIn];
      int64_t step[kIn];
      for (int64_t y = 0; y < kIn; ++y) {
        const bool there = c < channels && top + y >= 0 && top + y < a.height;
        step[y] = there ? S : 0;
        row[y] = there ? in + ((int64_t(channel[c]) * a.height + top + y) * a.width + left) * S : border.data;
      }
      for (int64_t j = 0; j < reached; ++j) {
        const int64_t across = j >= -left && j < inside;
        Work v[N][kIn];
        for (int64_t y = 0; y < kIn; ++y) {
          Work pixel[N];
          unpack(across ? row[y] + j * step[y] : border.data, pixel);
          for (int64_t n = 0; n < N; ++n) {
            v[n][y] = pixel[n];
            if constexpr (kFixed<Format>) v[n][y] = pixel[n] * load<vf>(fixed.input + n * W);
          }
        }
        for (int64_t n = 0; n < N; ++n) {
          Work each[kIn];
          F::input(v[n], each);
          for (int64_t y = 0; y < kIn; ++y) down_combined[y][n][j][i] = each[y];
        }
      }
    }
    const int64_t place = pitch();
    for (int64_t y = 0; y < kIn; ++y)
      for (int64_t n = 0; n < N; ++n)
        for (int64_t t = 0; t < columns; ++t) {
          Work v[kIn][T];
          for (int64_t i = 0; i < T; ++i) {
            Work d[kIn], each[kIn];
            for (int64_t x = 0; x < kIn; ++x) d[x] = down_combined[y][n][kStep * t + x][i];
            F::input(d, each);
            for (int64_t x = 0; x < kIn; ++x) v[x][i] = each[x];
          }
          for (int64_t x = 0; x < kIn; ++x) {
            float* to = out + (kIn * y + x) * place + t * P + n * (P / N);
            if constexpr (kFixed<Format>) Format::pack_words(v[x], to);
            else Format::pack_sums(v[x], to);
          }
        }
  }

  // A^T of what is summed at the places, and to the outputs. Rows of a kind, even or odd, at a time: they stay in
  // registers.
  void finish(int64_t slot, int64_t top, int64_t left, const float* sums, const Units& fixed, const Element* other,
              Element* out) const {
    alignas(64) float done[kOut * kOut * P];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c, sums += P) {
        for (int64_t n = 0; n < Format::kSums; ++n) {
          finish_rows<0>(slot, sums + n * W, fixed.result + n * W, done + n * W);
          finish_rows<1>(slot, sums + n * W, fixed.result + n * W, done + n * W);
        }
        Base::write(slot, top + kOut * r, left + kOut * c, kOut, kOut, 0, S, done, P, other, out, S);
      }
  }

  template <int kOdd>
  inline __attribute__((always_inline)) void finish_rows(int64_t slot, const float* sums, const float* unit,
                                                         float* done) const {
    const int64_t place = rows * columns * P;
    const V start = (V)Format::start(bias[slot]);
    V d[kIn][kOut / 2];
#pragma GCC unroll 9
    for (int x = 0; x < kIn; ++x) {
      V m[kIn];
#pragma GCC unroll 9
      for (int y = 0; y < kIn; ++y) m[y] = load<V>(sums + (kIn * y + x) * place);
      if (kOdd) F::odd(m, d[x]);
      else F::even(m, d[x]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kOut / 2; ++i) {
      V m[kIn], each[2][kOut / 2];
#pragma GCC unroll 9
      for (int x = 0; x < kIn; ++x) m[x] = d[x][i];
      F::even(m, each[0]);
      F::odd(m, each[1]);
#pragma GCC unroll 4
      for (int x = 0; x < kOut; ++x) {
        const int y = 2 * i + kOdd;
        const V sum = each[x % 2][x / 2];
        if constexpr (kFixed<Format>)
          store(done + (kOut * y + x) * P, fma(sum, load<vf>(unit) * splat(filter_units[slot]), start));
        else store(done + (kOut * y + x) * P, F::result(sum, y, x) + start);
      }
    }
  }
};

// Null where there is nothing to multiply, results of integers might not be exact, or nothing is won.
template <class Format>
Winograd<typename Format::Element>* winograd_of(const SampleConvArgs& args) {
  using Element = typename Format::Element;
  using Fours = typename Transformed<Format>::Type;
  if (!args.rows[args.filters]) return nullptr;
  const bool strided = args.stride[0] == 2;
  if constexpr (sizeof(Element) == 1) {
    if (strided) return nullptr;  // where there is AVX-512, bytes are multiplied twice as fast as words
    for (int64_t o = 0; o < args.filters; ++o) {
      double most = 0, least = 0;
      for (int64_t k = args.rows[o]; k < args.rows[o + 1]; ++k) (args.values[k] > 0 ? most : least) += args.values[k];
      if (255 * (most > -least ? most : -least) >= F4Bytes::kMost) return nullptr;
    }
    return new Minimal<Fours, F4Bytes>(args);
  } else {
    const int64_t small = tiles(args.out_height, 2) * tiles(args.out_width, 2);
    const int64_t large = tiles(args.out_height, 4) * tiles(args.out_width, 4);
    const bool fours = 3 * large <= small && (sizeof(Element) == 2 || large >= 4);
    if (strided) return fours ? new Minimal<Fours, F4Strided>(args) : nullptr;
    if (!fours) return new Minimal<Format, F2>(args);
    return new Minimal<Fours, F4<sizeof(Element) == 2 ? 4 : 1>>(args);
  }
}

}  // namespace CSAM_ISA
}  // namespace csam
