// The maximum over windows, samples innermost: down the columns of a row of windows, then along the row which that
// gives, one channel after another. Numbers are compared as integers of the same order, NaN above all. Those of the
// input's rows are made once and stay where they are until the windows have passed (not with dilation: rows between
// them come later); bytes are such integers as they are.
#pragma once
#include "sample_conv2d.h"

namespace csam {
namespace CSAM_ISA {

constexpr double kComparisonCost = 4;     // of a maximum of two vectors, in multiply-adds
constexpr int64_t kAheadBytes = 4 << 10;  // fetched before they are read: .7 to .8 of the time where tensors are large

struct Span {  // the inputs of a window along an axis
  int64_t first, count;
};

template <class Format>
struct Pooling {
  using Element = typename Format::Element;
  static constexpr int64_t S = Format::kLanes;
  static constexpr bool kKeyed = sizeof(Element) > 1;
  using Lane =
      std::conditional_t<sizeof(Element) == 1, uint8_t, std::conditional_t<sizeof(Element) == 2, int16_t, int32_t>>;
  typedef Lane Keys __attribute__((vector_size(S * sizeof(Lane))));
  static constexpr int kBits = 8 * sizeof(Lane);
  static constexpr Lane kSize = Lane(~(uint64_t(1) << (kBits - 1))),
                        kInfinity = Lane(kBits == 16 ? 0x7F80 : 0x7F800000);
  static constexpr Lane kLowest = kKeyed ? Lane(~kInfinity) : 0;

  SampleConvArgs a;
  bool stay;
  double cost;  // of kLanes samples
  Array<Span> down, across;

  explicit Pooling(const SampleConvArgs& args)
      : a(args),
        stay(a.dilation[0] == 1),
        cost(kComparisonCost * double(a.channels * a.out_height * (a.width * a.kernel[0] + a.out_width * a.kernel[1]))),
        down(spans(0, a.out_height)),
        across(spans(1, a.out_width)) {}

  void claim(Sizes& sizes) const {
    const int64_t rows = kKeyed ? a.kernel[0] + 1 : 1;
    Sizes::raise(sizes.packed, rows * a.width * S * int64_t(sizeof(Element)) / 4);
  }

  void run(const Element* in, Element* out, const Scratch& s) const {
    Keys* most = reinterpret_cast<Keys*>(s.packed.data);
    Keys* made = most + a.width;
    for (int64_t c = 0; c < a.channels; ++c, in += a.height * a.width * S)
      for (int64_t y = 0, next = 0; y < a.out_height; ++y) {  // the channel's first row without keys
        const Span& rows = down[y];
        for (int64_t i = 0; kKeyed && i < rows.count; ++i) {
          const int64_t row = rows.first + i * a.dilation[0];
          if (stay && row < next) continue;
          next = row + 1;
          key(in + row * a.width * S, made + slot(rows, i) * a.width);
        }
        const Keys* from = kKeyed ? made : reinterpret_cast<const Keys*>(in);
        for (int64_t x = 0; x < a.width && !rows.count; ++x) most[x] = Keys{} + kLowest;
        for (int64_t i = 0; i < rows.count; i += 3) {  // three at a time, the last one again where there are fewer
          const int64_t left = rows.count - 1 - i;
          raise(from + slot(rows, i) * a.width, from + slot(rows, i + (left > 0)) * a.width,
                from + slot(rows, i + (left > 1 ? 2 : left)) * a.width, i > 0, most);
        }
        for (int64_t x = 0; x < a.out_width; ++x, out += S) {
          Keys all = Keys{} + kLowest;
          for (int64_t i = 0; i < across[x].count; ++i) all = greater(all, most[across[x].first + i * a.dilation[1]]);
          store(out, swapped(all));
        }
      }
  }

 private:
  Array<Span> spans(int axis, int64_t outputs) const {
    Array<Span> all(outputs);
    for (int64_t o = 0; o < outputs; ++o) {
      const Window taps(a, axis, o);
      all[o] = {o * a.stride[axis] - a.padding[axis] + taps.first * a.dilation[axis], taps.last - taps.first};
    }
    return all;
  }

  // Where the keys of a window's row are, in rows.
  int64_t slot(const Span& rows, int64_t i) const {
    const int64_t row = rows.first + i * a.dilation[0];
    return !kKeyed ? row : stay ? row % a.kernel[0] : i;
  }

  void key(const Element* from, Keys* to) const {
    for (int64_t x = 0; x < a.width; ++x, from += S) {
      fetch(from);
      to[x] = keyed(load<Keys>(from));
    }
  }

  void raise(const Keys* first, const Keys* second, const Keys* third, bool begun, Keys* most) const {
    for (int64_t x = 0; x < a.width; ++x) {
      if (!kKeyed) fetch(third + x);
      if (!kKeyed && a.stride[0] > 1) fetch((second == third ? first : second) + x);  // new too
      const Keys of_three = greater(greater(first[x], second[x]), third[x]);
      most[x] = begun ? greater(most[x], of_three) : of_three;
    }
  }

  CSAM_INLINE void fetch(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + kAheadBytes, 0, 2); }

  static Keys swapped(Keys v) {  // bits to keys, and back
    return kKeyed ? v ^ ((v >> (kBits - 1)) & kSize) : v;
  }
  static Keys keyed(Keys v) {
    if (!kKeyed) return v;
    const Keys most = Keys{} + kSize;
    return (v & kSize) > kInfinity ? most : swapped(v);
  }
  static Keys greater(Keys a, Keys b) { return a > b ? a : b; }
};

}  // namespace CSAM_ISA
}  // namespace csam
