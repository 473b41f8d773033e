// Dense convolution on AMX tiles, samples innermost. A job is a tile of output pixels of one vector of samples. The
// input under it is packed so that what a product reads follows itself in memory: [chunk of channels][line][unit]; a
// unit, a row of B, is the channels that one instruction multiplies at once, of all samples. The units of lines side by
// side are a run, which products divide, in int8 reaching past its end: with few channels one reaches over several
// taps. 32 filters, two tiles of A, and two vectors of samples share four tiles of sums, which stay in registers over
// all products of a pixel. Weights and inputs come from a second-level cache and pass by the first, where the sums of
// some pixels wait to be stored: one plane's side by side. Taps outside the image are left out where that shows in no
// bit.
#pragma once
#include "amx.h"
#include "sample_halves.h"

namespace csam {
namespace CSAM_ISA {

template <class Format>
constexpr bool kTiled = false;
template <class Format>
struct TiledConvolution;

#if defined(__AVX512F__)

struct Bfloat16Tiles : Bfloat16Halves {  // dense sums in another order
  static constexpr const char* kName = "bfloat16 tiles, float16 sparse";
  template <int C, int A, int B>
  static void product() {
    tile_product_bf16<C, A, B>();
  }
};
struct Int8Tiles : Int8Quads {  // the same bits
  template <int C, int A, int B>
  static void product() {
    tile_product_int8<C, A, B>();
  }
};

template <>
constexpr bool kTiled<Bfloat16Tiles> = true;
template <>
constexpr bool kShortSums<Bfloat16Tiles> = true;
template <>
constexpr bool kTiled<Int8Tiles> = true;

template <class Format>
constexpr int64_t kPixels = 16 / Format::kSums;     // whose sums are kept, 32 KB
constexpr int64_t kTile = 256;                      // floats, 16 rows of 16
constexpr int64_t kPackedBytes = 1280 << 10;        // of a second-level cache of 2 MiB
constexpr int64_t kMostDown = 4, kMostAcross = 32;  // pixels of a tile
// Cycles on a Xeon (family 6, model 207), fitted to 110 layers a dtype: four products and their operands, which come
// from a second-level cache, a vector of results, packing a unit; a byte of weights from that cache, and about a job.
constexpr double kQuadCost = 114, kResultCost = 5, kUnitCost = 21, kStreamCost = 1. / 16, kTilesCost = 500;

struct Read {     // one product of a pixel
  int32_t in;     // what it reads, from the pixel's first line on, in floats
  int32_t index;  // of its weights
};

template <class Element>
struct Results {  // where they go, and what is added
  Element* out;
  const Element* other;  // or null
  int64_t samples, sample, n;
};

struct SumTiles {     // four: two strips of filters at two vectors, or one at four
  float* sums;        // where they are put, the second right behind the first
  int64_t second;     // floats from the first to the third
  int64_t in_second;  // floats from the input of the first two to that of the last two, where one strip has four
};

template <int T>
using TileNumber = std::integral_constant<int, T>;

// Sums left in tiles 0 .. 3. They are put down between the first products of the next, which else would wait for them.
struct Held {
  float* sums = nullptr;  // where they go, as in SumTiles; null: nothing is left
  int64_t second = 0;
  bool four = false;
  template <int T>
  inline __attribute__((always_inline)) void put_down() const {
    if (sums && (T < 2 || four)) tile_store<T>(sums + T / 2 * second + T % 2 * kTile, 64);
  }
  void put_down_all() {
    put_down<0>(), put_down<1>(), put_down<2>(), put_down<3>();
    sums = nullptr;
  }
};

template <class Format, int Strips, int Vectors>
static void add_products(const Read* read, const Read* end, const uint32_t* weights, int64_t pitch, const float* packed,
                         const SumTiles& t, Held& held) {
  constexpr int64_t kUnit = 64 * Format::kSums;
  constexpr bool kFour = Strips * Vectors == 4;
  const auto begin = [&](auto tile) __attribute__((always_inline)) {
    constexpr int T = decltype(tile)::value;
    held.template put_down<T>();
    if (T < 2 || kFour) tile_zero<T>();
  };
  bool fresh = kFour && read < end;
  if (!fresh) begin(TileNumber<0>{}), begin(TileNumber<1>{}), begin(TileNumber<2>{}), begin(TileNumber<3>{});
  // Loads first: in between, a neighbour on the same core would have the products wait for them.
  for (; read < end; ++read, fresh = false) {
    const uint32_t* w = weights + read->index * Strips * 16 * pitch;
    const float* in = packed + read->in;
    tile_load_once<4>(w, 4 * pitch);
    if (Strips == 2) tile_load_once<5>(w + 16 * pitch, 4 * pitch);
    tile_load_once<6>(in, kUnit);
    tile_load_once<7>(in + W, kUnit);
    if (fresh) begin(TileNumber<0>{});
    Format::template product<0, 4, 6>();
    if (fresh) begin(TileNumber<1>{});
    Format::template product<1, 4, 7>();
    if (kFour && Strips == 1) {
      tile_load_once<6>(in + t.in_second, kUnit);
      tile_load_once<7>(in + t.in_second + W, kUnit);
    }
    if (fresh) begin(TileNumber<2>{}), begin(TileNumber<3>{});
    if (kFour) {
      Format::template product<2, Strips == 2 ? 5 : 4, 6>();
      Format::template product<3, Strips == 2 ? 5 : 4, 7>();
    }
  }
  held = {t.sums, t.second, kFour};
}

// Kinds of the outputs along an axis: those alike have the same taps inside the image.
struct Kinds {
  int64_t count = 0;
  Array<int64_t> first, last;  // of each kind: its taps from first to last, last excluded
  Array<int32_t> of;           // output -> kind
  Kinds() = default;
  Kinds(const SampleConvArgs& a, int axis, int64_t outputs, bool all) : first(outputs), last(outputs), of(outputs) {
    for (int64_t o = 0; o < outputs; ++o) {
      Window taps(a, axis, o);
      if (all) taps.first = 0, taps.last = a.kernel[axis];
      int64_t kind = 0;
      while (kind < count && (first[kind] != taps.first || last[kind] != taps.last)) ++kind;
      if (kind == count) first[count] = taps.first, last[count++] = taps.last;
      of[o] = int32_t(kind);
    }
  }
};

template <class Format>
struct TiledConvolution : Layer<Format> {
  using Base = Layer<Format>;
  using Base::a, Base::area, Base::bias, Base::border, Base::channel, Base::channels, Base::filter, Base::in_rows;
  using Base::live;
  using typename Base::Element;
  static constexpr int64_t T = Format::kTogether, kSums = Format::kSums, kUnit = kSums * W;  // floats of a unit
  static constexpr bool kPads = std::is_same_v<Element, uint8_t>;  // whatever is read times zero is zero

  int64_t rows, columns;        // of a tile
  int64_t lines, across_lines;  // under it, and under a row of it
  int64_t chunks, units, deep;  // units of a line of a chunk, and of a product
  int64_t row_pitch;            // of a product's weights, in units: a power of two, so none lies in two cache lines
  int64_t products;             // of a chunk
  int64_t hop;                  // from a tap to the one whose line is next to its line
  int64_t pairs, part;          // of strips of 16 filters; of a job
  bool merged = false;          // some product reaches over several lines
  bool all;                     // taps outside the image count
  double cost = 0;              // cycles of kLanes samples, about
  Array<int64_t> row_source, column_source;
  Kinds down_kinds, across_kinds;
  Array<Read> reads;        // for each kind of row and of column
  Array<int32_t> cuts;      // where they begin
  Array<uint32_t> weights;  // [pairs][chunks][products][strips][16][row_pitch]

  explicit TiledConvolution(const SampleConvArgs& args, int64_t shares = 1)
      : Base(args), pairs(tiles(live, 32)), all(a.zero != 0) {
    divide();
    choose();
    const Axis y(a.kernel[0], a.stride[0], a.dilation[0], rows), x(a.kernel[1], a.stride[1], a.dilation[1], columns);
    across_lines = x.lines;
    lines = y.lines * x.lines;
    row_source = Base::copied(y.source.data, y.lines);
    column_source = Base::copied(x.source.data, x.lines);
    part = pairs ? tiles(pairs, pairs < shares ? pairs : shares) : 0;
  }

  void claim(Sizes& sizes) const {
    Sizes::raise(sizes.packed,
                 (chunks * lines * units + deep) * kUnit);  // and what a product reaches past the last run
    Sizes::raise(sizes.sums, kPixels<Format> * 2 * kSums * kTile);
  }

  void lay() {
    const Axis y(a.kernel[0], a.stride[0], a.dilation[0], rows), x(a.kernel[1], a.stride[1], a.dilation[1], columns);
    lay_reads(x, y);
    lay_weights();
  }

  int64_t parts() const { return part ? tiles(pairs, part) : 1; }
  int64_t jobs(int64_t samples) const {
    return tiles(a.out_height, rows) * tiles(a.out_width, columns) * tiles(samples, Format::kLanes) * parts();
  }
  int64_t together_rows() const { return rows; }

  void run(int64_t job, const Element* in, const Element* other, Element* out, int64_t samples,
           const Scratch& s) const {
    const int64_t depth = tiles(samples, Format::kLanes), across = tiles(a.out_width, columns);
    const int64_t mine = job % parts(), place = job / parts();
    const int64_t sample = place % depth * Format::kLanes, n = samples - sample;
    const int64_t left = place / depth % across * columns, top = place / depth / across * rows;
    const int64_t bottom = top + rows < a.out_height ? top + rows : a.out_height;
    const int64_t right = left + columns < a.out_width ? left + columns : a.out_width;
    const int64_t end = (mine + 1) * part < pairs ? (mine + 1) * part : pairs;
    if (pairs) {
      pack(in + sample, top, left, n, samples, s);
      TileShapes shapes;
      for (int t = 0; t < 8; ++t) {  // 0 .. 3: sums, 4 and 5: weights, 6 and 7: inputs
        shapes.rows[t] = uint8_t(t < 6 ? 16 : deep);
        shapes.row_bytes[t] = uint16_t(t == 4 || t == 5 ? 4 * deep : 64);
      }
      tile_configure(shapes);
      const Results<Element> results = {out, other, samples, sample, n};
      for (int64_t pair = mine * part; pair < end; ++pair)
        for (int64_t y = top; y < bottom; ++y) add_row(pair, y, top, left, right, s, results);
      tile_release();
    }
    if (!mine) Base::write_dead(top, left, rows, columns, sample, n, other, out, samples);
  }

 private:
  // How many units a line and a product have: as few products as possible, then as little memory. Of bytes the last
  // product of a run may reach past its end, with weights of zero; what may be NaN it must not reach.
  void divide() {
    const int64_t all_units = channels ? tiles(channels, T) : 1, least = tiles(all_units, tiles(all_units, 16));
    hop = a.stride[1] % a.dilation[1] ? a.kernel[1] : a.stride[1] / a.dilation[1];
    int64_t fewest = 0;
    for (int64_t u = least; u <= all_units || u <= 16; ++u)
      for (int64_t d = 1; d <= 16; ++d) {
        int64_t found = 0;
        bool even = true;
        for (int64_t first = 0; first < hop && first < a.kernel[1]; ++first) {
          even &= run_units(first, u) % d == 0;
          found += tiles(run_units(first, u), d);
        }
        const int64_t c = tiles(all_units, u), total = c * found;
        if ((even || kPads) && (!fewest || total < fewest || (total == fewest && c * u < chunks * units)))
          fewest = total, chunks = c, units = u, deep = d, products = found * a.kernel[0];
      }
    merged = deep > units || units % deep;
    for (row_pitch = 1; row_pitch < deep;) row_pitch *= 2;
  }

  // The tile that leaves the least to do.
  void choose() {
    const double pixels = double(a.out_height * a.out_width), strips = double(tiles(live, 16));
    const double quads = pixels * strips * kSums / 4, depth = double(chunks * products);
    const double fixed = quads * depth * kQuadCost + pixels * live * kSums * kResultCost;
    for (int64_t r = 1; r <= kMostDown && r <= Base::most_rows(); r *= 2)
      for (int64_t c = 1; c <= kMostAcross; c *= 2) {
        const Axis y(a.kernel[0], a.stride[0], a.dilation[0], r), x(a.kernel[1], a.stride[1], a.dilation[1], c);
        const int64_t packed = chunks * y.lines * x.lines * units;
        if (r * c > 1 && 4 * packed * kUnit > kPackedBytes) continue;
        const double work =
            double(packed) * kSums / 2 * kUnitCost + strips * depth * 64 * row_pitch * kStreamCost + kTilesCost;
        const double total = fixed + work * double(tiles(a.out_height, r) * tiles(a.out_width, c));
        if (!cost || total < cost) rows = r, columns = c, cost = total;
      }
  }

  // Product p of a chunk: of kernel row p / (products / kernel height), of the run from tap `first` on, units from
  // `unit` of it on.
  struct Place {
    int64_t row, first, unit;
  };
  Place place(int64_t p) const {
    const int64_t across = products / a.kernel[0];
    int64_t first = 0, at = p % across;
    for (; at >= tiles(run_units(first, units), deep); ++first) at -= tiles(run_units(first, units), deep);
    return {p / across, first, at * deep};
  }
  // Of the run from a tap on, of lines of so many units.
  int64_t run_units(int64_t first, int64_t u) const { return tiles(a.kernel[1] - first, hop) * u; }

  void lay_reads(const Axis& x, const Axis& y) {
    down_kinds = Kinds(a, 0, a.out_height, all);
    across_kinds = Kinds(a, 1, a.out_width, all);
    const int64_t kinds = down_kinds.count * across_kinds.count;
    reads = Array<Read>(kinds * chunks * products);
    cuts = Array<int32_t>(kinds + 1);
    int32_t laid = 0;
    for (int64_t k = 0; k < kinds; ++k, cuts[k] = laid) {
      const int64_t down = k / across_kinds.count, across = k % across_kinds.count;
      for (int64_t c = 0; c < chunks; ++c)
        for (int64_t p = 0; p < products; ++p) {
          const Place at = place(p);
          bool inside = false;
          for (int64_t u = at.unit / units; u <= (at.unit + deep - 1) / units; ++u) {
            const int64_t tap = at.first + u * hop;
            inside |= tap >= across_kinds.first[across] && tap < across_kinds.last[across];
          }
          if (!inside || at.row < down_kinds.first[down] || at.row >= down_kinds.last[down]) continue;
          const int64_t line = y.first[at.row] * x.lines + x.first[at.first];
          const int64_t unit = (c * lines + line) * units + at.unit;
          reads[laid++] = {int32_t(unit * kUnit), int32_t(c * products + p)};
        }
    }
  }

  void lay_weights() {
    const Array<float> full = Base::full();
    const int64_t there = tiles(channels, T) * T;
    weights = Array<uint32_t>(tiles(live, 16) * chunks * products * 16 * row_pitch);
    uint32_t* to = weights.data;
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t p = 0; p < chunks * products; ++p) {
        const Place at = place(p % products);
        for (int64_t o = pair * 32, end = o + (live - o > 16 ? 32 : 16); o < end; ++o, to += row_pitch)
          for (int64_t d = 0; d < deep; ++d) {
            const int64_t unit = at.unit + d, across = at.first + unit / units * hop;
            const int64_t tap = at.row * a.kernel[1] + across;
            float w[T];
            for (int64_t i = 0; i < T; ++i) {
              const int64_t c = (p / products * units + unit % units) * T + i;
              w[i] = o < live && c < there && across < a.kernel[1] ? full[(o * there + c) * area + tap] : 0;
            }
            to[d] = Format::unit_weight(w);
          }
      }
  }

  // The results of a row of 32 filters, from column `left` to `right`, some pixels at a time.
  void add_row(int64_t pair, int64_t y, int64_t top, int64_t left, int64_t right, const Scratch& s,
               const Results<Element>& to) const {
    const int64_t first = pair * 32, strips = live - first > 16 ? 2 : 1, pitch = strips * kSums * kTile;  // of a pixel
    const int64_t step = units * kUnit;  // from a pixel's lines to the next's
    const uint32_t* w = weights.data + pair * chunks * products * 32 * row_pitch;
    const float* packed = s.packed.data + (y - top) * across_lines * step;
    const int32_t* kinds = cuts.data + down_kinds.of[y] * across_kinds.count;
    const int64_t at = Base::place_of(y, 0, to.samples) + to.sample;
    for (int64_t begin = left; begin < right; begin += kPixels<Format>) {
      const int64_t end = begin + kPixels<Format> < right ? begin + kPixels<Format> : right;
      float* sums = s.sums.data;
      Held held;
      for (int64_t x = begin; x < end; ++x, packed += step, sums += pitch) {
        const int32_t kind = across_kinds.of[x];
        const Read *from = reads.data + kinds[kind], *last = reads.data + kinds[kind + 1];
        if (strips == 2) {
          for (int64_t v = 0; v < kSums; v += 2)
            add_products<Format, 2, 2>(from, last, w, row_pitch, packed + v * W, {sums + v * kTile, kSums * kTile, 0},
                                       held);
        } else if (kSums == 4) {
          add_products<Format, 1, 4>(from, last, w, row_pitch, packed, {sums, 2 * kTile, 2 * W}, held);
        } else if (x + 1 < end && across_kinds.of[x + 1] == kind) {
          add_products<Format, 1, 4>(from, last, w, row_pitch, packed, {sums, 2 * kTile, step}, held);
          ++x, packed += step, sums += pitch;
        } else {
          add_products<Format, 1, 2>(from, last, w, row_pitch, packed, {sums, 0, 0}, held);
        }
      }
      held.put_down_all();
      for (int64_t f = 0; f < strips * 16 && first + f < live; ++f) {
        if (f % 8 == 4) tiles_stay_awake();
        const float* sum = s.sums.data + f / 16 * kSums * kTile + f % 16 * 16;
        Base::template write_row<true>(first + f, at + begin * to.samples, end - begin, to.n, sum, pitch, kTile,
                                       to.other, to.out, to.samples);
      }
    }
  }

  // The lines under a tile, the samples past the n-th 0. Lines outside the image are written where a product reads one.
  void pack(const Element* in, int64_t top, int64_t left, int64_t n, int64_t samples, const Scratch& s) const {
    Element some[T][Format::kLanes] = {};
    const int64_t plane = in_rows * a.width * samples, first_row = top * a.stride[0] - a.padding[0];
    const int64_t first_column = left * a.stride[1] - a.padding[1];
    const bool fills = merged || all;
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t i = 0; i < lines / across_lines; ++i) {
        const int64_t row = first_row + row_source[i];
        const bool there = row >= 0 && row < a.height;
        if (!there && !fills) continue;
        const Element* from = in + (there ? row % in_rows * a.width * samples : 0);
        for (int64_t u = 0; u < units; ++u) {
          float* out = s.packed.data + ((c * lines + i * across_lines) * units + u) * kUnit;
          const Element* base[T];
          for (int64_t j = 0; j < T; ++j) {
            const int64_t k = (c * units + u) * T + j;
            base[j] = there && k < channels ? from + channel[k] * plane : nullptr;
          }
          for (int64_t l = 0; l < across_lines; ++l, out += units * kUnit) {
            const int64_t column = first_column + column_source[l];
            const bool inside = column >= 0 && column < a.width;
            if (!inside && !fills) continue;
            const Element* at[T];
            for (int64_t j = 0; j < T; ++j) {
              at[j] = inside && base[j] ? base[j] + column * samples : border.data;
              if (n < Format::kLanes) at[j] = static_cast<Element*>(memcpy(some[j], at[j], n * sizeof(Element)));
            }
            Format::pack_unit(at, out);
          }
        }
      }
  }
};

#endif

}  // namespace CSAM_ISA
}  // namespace csam
