// A 3x3 convolution of stride 1 by Winograd's minimal filtering F(2x2, 3x3), samples innermost (Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1): each 4x4 of the input and each 3x3 of the
// weight become 4x4 places, whose products, summed over channels, give 2x2 outputs: 16 multiplications in place of 36.
// A job is a block of such tiles of one vector of samples: its input is transformed once, and at every place the
// filters add their products by the dense loops of sample_conv2d.h, a tile standing for a pixel. Of integers all of
// that is exact: what weights become is a multiple of a quarter, and is multiplied by four.
#pragma once
#include "sample_conv2d.h"

namespace csam {
namespace CSAM_ISA {

constexpr int64_t kPlaces = 16;
constexpr int64_t kMostTiles = 8;                 // of a block
constexpr int64_t kPlaceBytes = 20 << 10;         // of a block's units at one place that filters go over in turn
constexpr int64_t kTransformedBytes = 512 << 10;  // of a block that has more tiles than a register tile

// The four combinations of B^T, of A^T the two, along one axis.
template <class V>
CSAM_INLINE void input_combinations(V a, V b, V c, V d, V* out) {
  out[0] = a - c, out[1] = b + c, out[2] = c - b, out[3] = b - d;
}
template <class V>
CSAM_INLINE void output_combinations(V a, V b, V c, V d, V* out) {
  out[0] = a + b + c, out[1] = b - c - d;
}

template <class Format>
struct Winograd : Layer<Format> {
  using Base = Layer<Format>;
  using Base::a, Base::bias, Base::border, Base::channel, Base::channels, Base::filter, Base::live, Base::padded;
  using typename Base::Element;
  static constexpr int64_t S = Format::kLanes, P = Format::kSums * W;  // samples; floats of a packed or summed tile
  static constexpr int64_t T = Format::kTogether, kColumns = 2 * kMostTiles + 2;
  static constexpr bool kIntegers = sizeof(Element) == 1;
  using V = std::conditional_t<kIntegers, vu, vf>;  // unsigned: sums of sums may pass 2^31 on the way
  // Of a tile of a channel, of a filter, in multiply-adds.
  static constexpr double kInputCost = 40 + 35 * Format::kSums, kOutputCost = 80 + 40 * Format::kSums;

  int64_t rows, columns;  // of a block, in tiles
  int64_t units, together, group, down, across;
  Micro micro;
  Array<uint32_t> weights;  // [places][blocks of units][padded / kFilters][units][kFilters]
  Array<int32_t> offsets;   // of each unit of a block
  Array<float> nothing;
  double cost = 0;

  explicit Winograd(const SampleConvArgs& args) : Base(args) {
    units = tiles(channels, T);
    choose();
    const int64_t count = rows * columns;
    micro = Format::kDense[0];
    for (const Micro& m : Format::kDense)
      if (count % micro.columns) micro = m;
    const int64_t fitting = kPlaceBytes / (4 * P * count), parts = tiles(units, fitting < 1 ? 1 : fitting);
    together = tiles(units, parts);
    const int64_t fit = kSumBytes / (4 * kPlaces * count * P) / Format::kFilters * Format::kFilters;
    group = tiles(live, tiles(live, fit < Format::kFilters ? Format::kFilters : fit));
    group = tiles(group, Format::kFilters) * Format::kFilters;
    down = tiles(a.out_height, 2 * rows);
    across = tiles(a.out_width, 2 * columns);
    nothing = Array<float>(group);
    offsets = Array<int32_t>(together);
    for (int64_t u = 0; u < together; ++u) offsets[u] = int32_t(u * count * P);
  }

  // G w G^T, in double, for the dense loops.
  void lay() {
    static constexpr double G[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
    constexpr double scale = kIntegers ? 4 : 1;
    const Array<float> full = Base::full();
    const int64_t size = padded * units * T;
    Array<float> places(kPlaces * size);
    for (int64_t i = 0; i < size; ++i)
      for (int64_t y = 0; y < 4; ++y) {
        double row[3] = {};
        for (int64_t x = 0; x < 3; ++x)
          for (int64_t k = 0; k < 3; ++k) row[x] += G[y][k] * full[i * 9 + 3 * k + x];
        for (int64_t x = 0; x < 4; ++x)
          places[(4 * y + x) * size + i] = float(scale * (G[x][0] * row[0] + G[x][1] * row[1] + G[x][2] * row[2]));
      }
    weights = Array<uint32_t>(size / T * kPlaces);
    uint32_t* to = weights.data;
    for (int64_t p = 0; p < kPlaces; ++p)
      for (int64_t u = 0; u < units; u += together)
        to = Base::lay_units(places.data + p * size, 1, u, units - u < together ? units - u : together, to);
  }

  void claim(Sizes& sizes) const {
    Sizes::raise(sizes.packed, kPlaces * units * rows * columns * P);
    Sizes::raise(sizes.sums, kPlaces * group * rows * columns * P);
  }

  int64_t jobs() const { return down * across; }

  void run(int64_t job, const Element* in, const Element* other, Element* out, const Scratch& s) const {
    const int64_t top = job / across * 2 * rows, left = job % across * 2 * columns, count = rows * columns;
    for (int64_t u = 0; u < units; ++u)
      for (int64_t r = 0; r < rows; ++r)
        transform(in, u, top + 2 * r - a.padding[0], left - a.padding[1],
                  s.packed.data + (u * count + r * columns) * P);
    for (int64_t first = 0; first < live; first += group) {
      const int64_t mine = live - first < group ? live - first : group;
      for (int64_t p = 0; p < kPlaces; ++p)
        for (int64_t u = 0; u < units; u += together) {
          const int64_t here = units - u < together ? units - u : together;
          Block block = {s.packed.data + (p * units + u) * count * P, 0, 1, count, kPlaces * count};
          block.weights = weights.data + (p * units + u) * padded + first * here;
          block.offsets = offsets.data;
          block.products = here;
          block.bias = u ? nullptr : nothing.data;
          micro.add(block, mine, s.sums.data + p * count * P);
        }
      for (int64_t o = 0; o < mine; ++o)
        finish(first + o, top, left, s.sums.data + o * kPlaces * count * P, other, out);
    }
    Base::write_dead(top, left, 2 * rows, 2 * columns, 0, S, other, out, S);
  }

 private:
  // The block that leaves the least to do, as `Convolution::choose` counts it.
  void choose() {
    const double turns = double(padded) / Format::kFilters;
    for (int64_t r = 1; r <= 2; ++r)
      for (int64_t c = 1; c <= kMostTiles; c *= 2) {
        const int64_t count = r * c;
        if (count > kMostTiles ||
            (count > Format::kDense[0].columns && 4 * kPlaces * units * count * P > kTransformedBytes))
          continue;
        const int64_t fitting = kPlaceBytes / (4 * P * count);
        const double parts = double(tiles(units, fitting < 1 ? 1 : fitting)), n = double(count);
        const double narrow = count % Format::kDense[0].columns ? 1.5 : 1;
        const double micros = n / Format::kDense[0].columns;
        const double work = kPlaces * (double(padded * units * T) * n * narrow +
                                       parts * turns * (micros * kTurnCost + Format::kFilters * n * kSumCost)) +
                            double(channels) * n * kInputCost + double(live) * n * kOutputCost;
        const double total = work * double(tiles(a.out_height, 2 * r) * tiles(a.out_width, 2 * c));
        if (!cost || total < cost) rows = r, columns = c, cost = total;
      }
  }

  // A row of tiles of one unit, whose first pixel is (top, left), to its places, `units * rows * columns * P` apart.
  void transform(const Element* in, int64_t unit, int64_t top, int64_t left, float* out) const {
    constexpr int64_t N = Format::kSums;
    V down_combined[4][N][kColumns][T];
    const int64_t inside = a.width - left < 2 * columns + 2 ? a.width - left : 2 * columns + 2;
    for (int64_t i = 0; i < T; ++i) {
      const int64_t c = unit * T + i;
      const Element* row[4];
      int64_t step[4];
      for (int64_t y = 0; y < 4; ++y) {
        const bool there = c < channels && top + y >= 0 && top + y < a.height;
        step[y] = there ? S : 0;
        row[y] = there ? in + ((int64_t(channel[c]) * a.height + top + y) * a.width + left) * S : border.data;
      }
      for (int64_t j = 0; j < 2 * columns + 2; ++j) {
        const int64_t across = j >= -left && j < inside;
        vs v[4][N];
        for (int64_t y = 0; y < 4; ++y) Format::unpack(across ? row[y] + j * step[y] : border.data, v[y]);
        for (int64_t n = 0; n < N; ++n) {
          V each[4];
          input_combinations((V)v[0][n], (V)v[1][n], (V)v[2][n], (V)v[3][n], each);
          for (int64_t y = 0; y < 4; ++y) down_combined[y][n][j][i] = each[y];
        }
      }
    }
    const int64_t place = units * rows * columns * P;
    for (int64_t y = 0; y < 4; ++y)
      for (int64_t n = 0; n < N; ++n) {
        const auto& d = down_combined[y][n];
        for (int64_t t = 0; t < columns; ++t) {
          vf v[4][T];
          for (int64_t i = 0; i < T; ++i) {
            V each[4];
            input_combinations(d[2 * t][i], d[2 * t + 1][i], d[2 * t + 2][i], d[2 * t + 3][i], each);
            for (int64_t x = 0; x < 4; ++x) v[x][i] = (vf)each[x];
          }
          for (int64_t x = 0; x < 4; ++x) Format::pack_sums(v[x], out + (4 * y + x) * place + t * P + n * W);
        }
      }
  }

  static vf unscaled(vf sum) { return sum; }
  static vu unscaled(vu sum) { return (vu)((vi)sum >> 2); }

  // A^T of what is summed at the places, and to the outputs.
  void finish(int64_t slot, int64_t top, int64_t left, const float* sums, const Element* other, Element* out) const {
    constexpr int64_t N = Format::kSums;
    const int64_t place = rows * columns * P;
    const V start = (V)Format::start(bias[slot]);
    alignas(64) float done[4 * P];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c, sums += P) {
        for (int64_t n = 0; n < N; ++n) {
          V d[4][2];
          const float* from = sums + n * W;
          for (int64_t x = 0; x < 4; ++x, from += place)
            output_combinations(load<V>(from), load<V>(from + 4 * place), load<V>(from + 8 * place),
                                load<V>(from + 12 * place), d[x]);
          for (int64_t y = 0; y < 2; ++y) {
            V both[2];
            output_combinations(d[0][y], d[1][y], d[2][y], d[3][y], both);
            for (int64_t x = 0; x < 2; ++x) store(done + (2 * y + x) * P + n * W, unscaled(both[x]) + start);
          }
        }
        Base::write(slot, top + 2 * r, left + 2 * c, 2, 2, 0, S, done, P, other, out, S);
      }
  }
};

}  // namespace CSAM_ISA
}  // namespace csam
