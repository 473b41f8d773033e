// Convolution with the samples innermost, [C, H, W, S], of weights in compressed rows. A job is a tile of output pixels
// of one vector of samples. The input under it is packed a few channels at a time, padded and with strides undone, into
// a block that stays in the first-level cache; over that block every filter adds its taps, in ascending order, to the
// tile's sums. Sparse: each filter its own taps, the sums of a register tile of pixels at a time. Dense: kFilters
// filters share what they load; only live filters and channels take part.
#pragma once
#include "sample_formats.h"

namespace csam {
namespace CSAM_ISA {

// Bytes that a packed block may take, and what a multiply-add over it costs: in a first-level cache beside sums, all of
// it, or in a second-level cache. Few surviving weights are better off far away at once than near, some at a time, with
// sums put down in between. Measured on AMD EPYC family 26, ResNet-18 in bfloat16 at densities of 0.02 to 0.5.
struct Room {
  int64_t bytes;
  double cost;
};
#if defined(__AVX512F__)
constexpr Room kSparseRooms[] = {{20 << 10, 1}, {48 << 10, 1.09}, {96 << 10, 1.24}, {192 << 10, 1.28}};
constexpr Room kDenseRooms[] = {{40 << 10, 1}};
#else  // of 32 KB in the first level, AMD EPYC family 25 model 1
constexpr Room kSparseRooms[] = {{14 << 10, 1}, {28 << 10, 1.05}, {48 << 10, 1.2}, {96 << 10, 1.3}, {192 << 10, 1.4}};
constexpr Room kDenseRooms[] = {{28 << 10, 1}};
#endif
constexpr int64_t kNearBytes = 1 << 20;  // of input that needs no prefetch
// A 1x1 layer fetches the place after its own from so many channels on, whose lines are more than a processor follows
// by itself, for so many multiply-adds of a line at least.
constexpr int64_t kFetchedFrom = 64, kFetchedFor = 16;
constexpr int64_t kSumBytes = 512 << 10;  // of sums that a job keeps: half of a second-level cache
constexpr int64_t kMostTileRows = 32;
constexpr int64_t kTurn = 8;             // filters, at least, whose results are stored while their sums are near
constexpr int64_t kMostLines = 1 << 20;  // of a channel under a tile of more than one pixel
constexpr double kPackCost = 3;          // of one packed vector, in fused multiply-adds
constexpr double kTurnCost = 20;         // of one filter's turn over a block
constexpr double kSumCost = 2;           // of one sum put down and taken up again
constexpr double kEndCost = 6;           // of storing one vector of results
constexpr double kRunCost = 20;          // of a row of one filter's results, wherever it goes
constexpr double kJobCost = 100;         // of a tile, whatever it holds
// Sums that keep multiply-adds busy: two a cycle, of four cycles; of integers the product is not waited for.
template <class Format>
constexpr double kChains = std::is_same_v<typename Format::Element, uint8_t> && Format::kSums < 4 ? 2 : 8;

// Whether sums begin as short ones of half the width (sample_halves.h), of so many products. What that costs, reckoned
// for a Xeon (family 6, model 207): packing a vector, a short sum that enters the long one, and blocks out of a
// first-level cache of 48 KB that gives two vectors a cycle, a second-level one less than one. Measured there, what
// they choose is as fast as any one of the rooms on two ResNets and GoogLeNet, but for .94 of the time at a density of
// 0.05.
template <class Format>
constexpr bool kShortSums = false;
constexpr int64_t kShort = 64;
constexpr double kHalvesPackCost = 9, kEnterCost = 7;
constexpr Room kHalvesRooms[] = {{20 << 10, 1}, {40 << 10, 1.1}, {96 << 10, 2}, {192 << 10, 2.2}};

// The input lines under a tile's rows or columns, ordered so that outputs side by side read lines side by side.
struct Axis {
  int64_t lines = 0;
  Array<int64_t> source;  // line -> input position, counted from the first output's first tap
  Array<int64_t> first;   // tap -> line that the first output reads
  Axis(int64_t kernel, int64_t stride, int64_t dilation, int64_t outputs) : source(kernel * outputs), first(kernel) {
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
};

struct Window {  // of an output along an axis: its taps inside the image, from first to last, last excluded
  int64_t first = 0, last;
  Window(const SampleConvArgs& a, int axis, int64_t output) : last(a.kernel[axis]) {
    const int64_t size = axis ? a.width : a.height, start = output * a.stride[axis] - a.padding[axis];
    while (first < last && start + first * a.dilation[axis] < 0) ++first;
    while (first < last && start + (last - 1) * a.dilation[axis] >= size) --last;
  }
};

struct Shape {  // of a tile of output pixels, and the register tile that fills it
  int64_t rows, columns;
  Micro micro;
};

// What of a layer is alive, and how its results are stored.
template <class Format>
struct Layer {
  using Element = typename Format::Element;
  SampleConvArgs a;
  bool dense;
  int64_t channels = 0, slots = 0, live = 0;  // channels that are read; filters, the live ones of a dense layer first
  int64_t area, padded;                       // taps; live filters, filled up to whole turns of a dense loop
  int64_t in_rows, out_rows;                  // that are kept of a channel of the input, and of a filter's results
  Array<int32_t> channel, filter;             // which they are
  Array<int32_t> place;                       // of each channel among those that are read
  Array<float> bias, scales;
  Array<Element> border;  // what lies outside the image

  explicit Layer(const SampleConvArgs& args)
      : a(args),
        dense(args.engine != kSparse),
        area(a.kernel[0] * a.kernel[1]),
        in_rows(a.in_rows ? a.in_rows : a.height),
        out_rows(a.out_rows ? a.out_rows : a.out_height),
        channel(a.channels + 1),
        filter(a.filters + Format::kFilters),
        place(a.channels),
        border(Format::kLanes) {
    int64_t found = 0;
    for (int64_t k = 0; k < a.rows[a.filters] && found < a.channels; ++k) {
      int32_t& there = place[uint32_t(a.taps[k]) / uint32_t(area)];  // half of the time of a division of 64 bits
      found += !there;
      there = 1;
    }
    for (int64_t c = 0; c < a.channels; ++c)
      if (place[c]) channel[channels] = int32_t(c), place[c] = int32_t(channels++);
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t o = 0; o < a.filters; ++o)
        if ((dense && a.rows[o] == a.rows[o + 1]) == bool(pass)) filter[slots++] = int32_t(o), live += !pass;
    padded = tiles(live, Format::kFilters) * Format::kFilters;
    bias = Array<float>(slots + Format::kFilters);
    for (int64_t s = 0; a.bias && s < slots; ++s) bias[s] = a.bias[filter[s]];
    scales = Array<float>(slots + Format::kFilters);
    for (int64_t s = 0; s < slots; ++s) scales[s] = a.scales ? a.scales[filter[s]] : 1;
    for (int i = 0; i < Format::kLanes; ++i) border[i] = Element(a.zero);
  }

  // Rows of a tile, at most. Between steps that run together as many are kept as the reader needs for one of its own,
  // and what makes them is never ahead.
  int64_t most_rows() const { return in_rows < a.height || out_rows < a.out_height ? 1 : kMostLines; }
  // Rows of the input that results from row `top` on, so many, are made of: up to this one.
  int64_t reach(int64_t top, int64_t rows) const {
    const int64_t end = (top + rows - 1) * a.stride[0] - a.padding[0] + (a.kernel[0] - 1) * a.dilation[0] + 1;
    return end < a.height ? end : a.height;
  }

  // The weight with its zeros: [padded, channels of whole units, area].
  Array<float> full() const {
    const int64_t inner = tiles(channels, Format::kTogether) * Format::kTogether * area;
    Array<float> out(padded * inner);
    for (int64_t s = 0; s < live; ++s)
      for (int64_t o = filter[s], k = a.rows[o]; k < a.rows[o + 1]; ++k)
        out[s * inner + place[a.taps[k] / area] * area + a.taps[k] % area] = a.values[k];
    return out;
  }

  // For a dense loop over `units` units from unit `from` on: [padded / kFilters][units][taps][kFilters], of w [padded,
  // channels, taps].
  uint32_t* lay_units(const float* w, int64_t taps, int64_t from, int64_t units, uint32_t* out) const {
    const int64_t there = tiles(channels, Format::kTogether) * Format::kTogether;
    for (int64_t s = 0; s < padded; s += Format::kFilters)
      for (int64_t u = from; u < from + units; ++u)
        for (int64_t k = 0; k < taps; ++k)
          for (int64_t f = 0; f < Format::kFilters; ++f) {
            float unit[Format::kTogether];
            for (int64_t i = 0; i < Format::kTogether; ++i)
              unit[i] = w[((s + f) * there + u * Format::kTogether + i) * taps + k];
            *out++ = Format::unit_weight(unit);
          }
    return out;
  }

  static Array<int64_t> copied(const int64_t* from, int64_t n) {
    Array<int64_t> to(n);
    memcpy(to.data, from, 8 * n);
    return to;
  }

  // Sums [rows, columns] of one filter, `pitch` floats apart, to the outputs from (top, left) on that are inside.
  void write(int64_t slot, int64_t top, int64_t left, int64_t rows, int64_t columns, int64_t sample, int64_t n,
             const float* sums, int64_t pitch, const Element* other, Element* out, int64_t samples) const {
    const int64_t end = columns < a.out_width - left ? columns : a.out_width - left;
    for (int64_t r = 0; r < rows && top + r < a.out_height; ++r)
      write_row<false>(slot, place_of(top + r, left, samples) + sample, end, n, sums + r * columns * pitch, pitch, W,
                       other, out, samples);
  }
  // Of an output, in values from the first of its filter on.
  int64_t place_of(int64_t y, int64_t x, int64_t samples) const { return (y % out_rows * a.out_width + x) * samples; }

  // Those of a row, their vectors `gap` floats apart, to the output at place `at` and those right of it.
  template <bool kAddsBias>
  inline __attribute__((always_inline)) void write_row(int64_t slot, int64_t at, int64_t columns, int64_t n,
                                                       const float* sum, int64_t pitch, int64_t gap,
                                                       const Element* other, Element* out, int64_t samples) const {
    const Ending ending = this->ending(scales[slot]);
    const int64_t width = a.real ? sizeof(float) / sizeof(Element) : 1;         // of a stored value, in elements
    const int64_t plane = out_rows * a.out_width * samples, ahead = 2 * plane;  // the filter after the next one's
    const int64_t i = filter[slot] * plane + at;
    const Element* added = other ? other + i : nullptr;
    Element* to = out + width * i;
    const vf filters_bias = Format::start(kAddsBias ? bias[slot] : 0);
    if (n < Format::kLanes)
      write_some<kAddsBias>(n, columns, sum, pitch, gap, filters_bias, added, ending, to, samples);
    else if (added)
      for (int64_t c = 0; c < columns; ++c, sum += pitch, added += samples, to += width * samples) {
        __builtin_prefetch(added + ahead);
        __builtin_prefetch(to + ahead, 1);
        finish_at<kAddsBias>(sum, gap, filters_bias, added, ending, to);
      }
    else
      for (int64_t c = 0; c < columns; ++c, sum += pitch, to += width * samples) {
        __builtin_prefetch(to + ahead, 1);
        finish_at<kAddsBias>(sum, gap, filters_bias, nullptr, ending, to);
      }
  }

  template <bool kAddsBias>
  CSAM_INLINE void finish_at(const float* sums, int64_t gap, vf bias, const Element* other, const Ending& ending,
                             Element* out) {
    using Sum = std::conditional_t<std::is_same_v<Element, uint8_t>, vi, vf>;
    vf v[Format::kSums];
    for (int i = 0; i < Format::kSums; ++i) {
      v[i] = load<vf>(sums + i * gap);
      if (kAddsBias) v[i] = (vf)((Sum)v[i] + (Sum)bias);
    }
    Format::finish(v, other, ending, out);
  }

  template <bool kAddsBias>
  void write_some(int64_t n, int64_t end, const float* sum, int64_t pitch, int64_t gap, vf bias, const Element* added,
                  const Ending& ending, Element* to, int64_t samples) const {
    const int64_t width = a.real ? sizeof(float) / sizeof(Element) : 1;
    for (int64_t c = 0; c < end; ++c, sum += pitch, to += width * samples) {
      Element some[Format::kLanes * 4] = {};
      if (added) memcpy(some, added + c * samples, n * sizeof *some);
      finish_at<kAddsBias>(sum, gap, bias, added ? some : nullptr, ending, some);
      memcpy(to, some, n * width * sizeof *some);
    }
  }

  Ending ending(float scale) const { return {a.low, a.high, scale, a.shift, a.other_scale, a.real}; }

  // The filters without a weight, over the same outputs.
  void write_dead(int64_t top, int64_t left, int64_t rows, int64_t columns, int64_t sample, int64_t n,
                  const Element* other, Element* out, int64_t samples) const {
    for (int64_t o = live; o < slots; ++o) {
      vf constant[Format::kSums];
      for (vf& v : constant) v = Format::start(bias[o]);
      write(o, top, left, rows, columns, sample, n, reinterpret_cast<float*>(constant), 0, other, out, samples);
    }
  }
};

struct Scratch {  // of one thread; serves every layer that it was made large enough for
  Array<float> packed, sums;
  Array<int64_t> offsets;
};
struct Sizes {
  int64_t packed = 0, sums = 0, offsets = 0;
  static void raise(int64_t& size, int64_t to) { size = size < to ? to : size; }
  int64_t bytes() const {
    return Array<float>::taken(packed) + Array<float>::taken(sums) + Array<int64_t>::taken(offsets);
  }
  Scratch make() const { return {Array<float>(packed), Array<float>(sums), Array<int64_t>(offsets)}; }
};

// A convolution readied: its weight laid out for the tile that leaves the least to do.
template <class Format>
struct Convolution : Layer<Format> {
  using Base = Layer<Format>;
  using Base::a, Base::area, Base::bias, Base::border, Base::channel, Base::channels, Base::dense, Base::filter;
  using Base::in_rows, Base::live, Base::padded, Base::place, Base::slots;
  using typename Base::Element;
  Shape tile;
  int64_t room;     // of a packed block, in bytes
  double cost = 0;  // of kLanes samples
  int64_t lines, across_lines, unit, together, blocks, down, across, group;
  bool fetches_next;
  Array<int64_t> row_source, column_source;
  Array<Tap> taps;
  Array<int32_t> cuts, offsets, before;
  Array<float> powers;
  Array<uint32_t> weights;

  void claim(Sizes& sizes) const {
    Sizes::raise(sizes.packed, together / step() * unit);
    Sizes::raise(sizes.sums, group * tile.rows * tile.columns * sum_vectors() * W);
    Sizes::raise(sizes.offsets, 2 * lines);
  }

  int64_t sum_vectors() const { return Format::kSums + (kShortSums<Format> ? 1 : 0); }
  int64_t step() const { return dense ? Format::kTogether : 1; }  // channels of a unit

  explicit Convolution(const SampleConvArgs& args, int64_t shares = 1) : Base(args) {
    if (dense) choose(kDenseRooms, Format::kDense);
    else if (kShortSums<Format>) choose(kHalvesRooms, Format::kSparse);
    else choose(kSparseRooms, Format::kSparse);
    const Axis y(a.kernel[0], a.stride[0], a.dilation[0], tile.rows);
    const Axis x(a.kernel[1], a.stride[1], a.dilation[1], tile.columns);
    across_lines = x.lines;
    lines = y.lines * x.lines;
    unit = dense ? lines * W * Format::kSums : lines * W;
    row_source = Base::copied(y.source.data, y.lines);
    column_source = Base::copied(x.source.data, x.lines);
    const int64_t fitting = room / (4 * unit), most = (fitting < 1 ? 1 : fitting) * step();
    blocks = channels ? tiles(channels, most) : 1;
    together = tiles(tiles(channels, blocks), step()) * step();
    blocks = channels ? tiles(channels, together) : 1;
    // Under wider kernels most of that place is near: those before have read it.
    const int64_t products = dense ? live * channels : a.rows[a.filters];
    fetches_next = area == 1 && channels >= kFetchedFrom && products >= kFetchedFor * channels;
    down = tiles(a.out_height, tile.rows);
    across = tiles(a.out_width, tile.columns);
    const int64_t sums = 4 * W * sum_vectors() * tile.rows * tile.columns;
    const int64_t fit = kSumBytes / sums, parts = tiles(live, fit < Format::kFilters ? Format::kFilters : fit);
    group = tiles(tiles(live, parts > shares ? parts : shares), Format::kFilters) * Format::kFilters;
    if (group < Format::kFilters) group = Format::kFilters;
  }

  void lay() {
    const Axis y(a.kernel[0], a.stride[0], a.dilation[0], tile.rows);
    const Axis x(a.kernel[1], a.stride[1], a.dilation[1], tile.columns);
    if (dense) lay_dense(x, y);
    else lay_sparse(x, y);
  }

  // The tile and the block that leave the least to do, in multiply-adds of a vector: those of pixels past the edge
  // included, packed vectors, sums that are put down and taken up again between blocks, and turns of the loops.
  template <class Rooms, class Micros>
  void choose(const Rooms& rooms, const Micros& micros) {
    const int64_t filters = dense ? Format::kFilters : 1, rows = tiles(live, filters);
    const double products =
        dense ? double(rows * filters * tiles(channels, step()) * Format::kSums * area) : double(a.rows[a.filters]);
    constexpr bool halves = kShortSums<Format>;  // dense layers of such formats are no Convolution
    bool found = false;
    int64_t known[2][129] = {};  // lines under so many rows, and columns, of a tile
    const auto lines_under = [&](int axis, int64_t outputs) {
      int64_t& count = known[axis][outputs];
      if (!count) count = Axis(a.kernel[axis], a.stride[axis], a.dilation[axis], outputs).lines;
      return count;
    };
    const auto consider = [&](const Room& r, const Micro& m, int64_t down_times, int64_t across_times) {
      const Shape s = {m.rows * down_times, m.columns * across_times, m};
      if (s.rows > Base::most_rows()) return;
      const int64_t under = lines_under(0, s.rows) * lines_under(1, s.columns);
      if (under > kMostLines && s.rows * s.columns > 1) return;
      const int64_t each = 4 * W * under * (dense ? Format::kSums : 1) / step();  // bytes of a channel
      const int64_t fitting = r.bytes / each;
      const int64_t turns = tiles(channels, fitting < step() ? step() : fitting);
      const double pixels = double(s.rows * s.columns), micros = double(down_times * across_times);
      const double chains = double(m.rows * m.columns * Format::kSums);
      const double narrow = dense                      ? (m.columns == 1 ? 1.5 : 1)
                            : chains < kChains<Format> ? kChains<Format> / chains
                                                       : 1;
      const double pack = halves ? kHalvesPackCost : kPackCost;
      const double put_down = double(turns - 1) * filters * pixels * (dense || halves ? 1 : Format::kSums) * kSumCost;
      const double enter = halves ? (products / kShort + double(rows)) * pixels * kEnterCost : 0;
      const double work = products * pixels * narrow * r.cost + enter + pack * channels * under +
                          rows * (turns * micros * kTurnCost + put_down) +
                          live * (pixels * Format::kSums * kEndCost + s.rows * kRunCost) + kJobCost;
      const double total = work * tiles(a.out_height, s.rows) * tiles(a.out_width, s.columns);
      if (!found || total < cost) tile = s, room = r.bytes, cost = total, found = true;
    };
    for (const Room& room : rooms)
      for (const Micro& m : micros)
        for (int64_t i = 1; i <= 8; i *= 2)
          for (int64_t j = 1; j <= 8; j *= 2) consider(room, m, i, j);
  }

  int32_t offset(const Axis& x, const Axis& y, int64_t tap) const {  // in a channel, in vectors
    return int32_t(y.first[tap / a.kernel[1]] * x.lines + x.first[tap % a.kernel[1]]);
  }

  void lay_sparse(const Axis& x, const Axis& y) {
    taps = Array<Tap>(a.rows[a.filters]);
    cuts = Array<int32_t>(blocks * (live + 1));
    if constexpr (kShortSums<Format>) {
      before = Array<int32_t>(blocks * live);
      powers = Array<float>(live);
      for (int64_t o = 0; o < live; ++o) powers[o] = Format::power(a.values + a.rows[o], a.rows[o + 1] - a.rows[o]);
    }
    Array<int32_t> next(live);    // tap of each filter
    Array<int32_t> offset(area);  // in a channel, of each place of the kernel
    for (int64_t o = 0; o < live; ++o) next[o] = a.rows[o];
    for (int64_t k = 0; k < area; ++k) offset[k] = this->offset(x, y, k) * W;
    int32_t laid = 0;
    for (int64_t b = 0; b < blocks; ++b) {  // as they are read
      int32_t* cut = cuts.data + b * (live + 1);
      for (int64_t o = 0; o < live; ++o) {
        *cut++ = laid;
        if (kShortSums<Format>) before[b * live + o] = next[o] - a.rows[o];
        for (int32_t& k = next[o]; k < a.rows[o + 1]; ++k) {
          const uint32_t tap = a.taps[k], c = tap / uint32_t(area);
          const int64_t at = place[c] - b * together;
          if (at >= together) break;
          uint32_t weight;
          if constexpr (kShortSums<Format>) weight = Format::tap(a.values[k] / powers[o]);
          else weight = Format::weight(a.values[k]);
          taps[laid++] = {weight, int32_t(at * lines * W) + offset[tap - c * uint32_t(area)]};
        }
      }
      *cut = laid;
    }
  }

  void lay_dense(const Axis& x, const Axis& y) {
    offsets = Array<int32_t>(together / step() * area);
    for (int64_t p = 0; p < together / step() * area; ++p)
      offsets[p] = int32_t(p / area * unit + offset(x, y, p % area) * W * Format::kSums);
    const Array<float> full = Base::full();
    weights = Array<uint32_t>(padded * padded_channels() * area / Format::kTogether);
    uint32_t* out = weights.data;
    for (int64_t b = 0; b < blocks; ++b)
      out = Base::lay_units(full.data, area, b * together / Format::kTogether, units(b), out);
  }

  int64_t padded_channels() const { return tiles(channels, step()) * step(); }
  int64_t units(int64_t b) const {
    const int64_t left = padded_channels() - b * together;
    return (left < together ? left : together) / step();
  }
  int64_t groups() const { return live ? tiles(live, group) : 1; }
  int64_t jobs(int64_t samples) const { return down * across * tiles(samples, Format::kLanes) * groups(); }
  int64_t together_rows() const { return tile.rows; }  // that jobs / down jobs make

  void run(int64_t job, const Element* in, const Element* other, Element* out, int64_t samples,
           const Scratch& s) const {
    const auto [sample, top, left] = corner(job, samples);
    const int64_t part = job % groups(), first = part * group, n = samples - sample;
    const int64_t mine = live - first < group ? live - first : group;
    const bool far = channels * a.height * a.width * samples * int64_t(sizeof(Element)) > kNearBytes;
    find(job, samples, s.offsets.data);
    Input ahead = {reinterpret_cast<const char*>(in), s.offsets.data, lines, 0, channel.data, 0, 0, 0};
    ahead.plane = in_rows * a.width * samples * int64_t(sizeof(Element));
    int64_t row_at[kMostTileRows];
    Outputs outputs = {};
    outputs.width = a.real ? sizeof(float) / sizeof(Element) : 1;
    outputs.other = other ? other + sample : nullptr;
    outputs.out = out + sample * outputs.width;
    outputs.row_at = row_at;
    outputs.rows = tile.rows < a.out_height - top ? tile.rows : a.out_height - top;
    outputs.columns = tile.columns < a.out_width - left ? tile.columns : a.out_width - left;
    for (int64_t r = 0; r < tile.rows; ++r) row_at[r] = Base::place_of(top + r, left, samples);
    outputs.plane = Base::out_rows * a.out_width * samples;
    outputs.step = samples;
    outputs.filter = filter.data + first;
    outputs.scales = Base::scales.data + first;
    outputs.ending = Base::ending(1);
    for (int64_t b = 0; b < blocks && mine > 0; ++b) {
      pack(ahead, b, n, s.packed.data);
      const int64_t packed_units = units(b);
      // Filters end in the last block, some at a time while their sums are near.
      const bool last = b + 1 == blocks, straight = last && n >= Format::kLanes;
      ahead.next = (b + 1) * together, ahead.line = 0;
      if (last && far && fetches_next && part + 1 == groups() && job + 1 < jobs(samples)) {
        find(job + 1, samples, s.offsets.data + lines);
        ahead.offsets = s.offsets.data + lines, ahead.next = 0;
      }
      ahead.end = ahead.next + together < channels ? ahead.next + together : channels;
      const int64_t some = tiles(kTurn, Format::kFilters) * Format::kFilters;
      const int64_t turn = last && !straight ? some : mine, pixels = tile.rows * tile.columns;
      for (int64_t o = 0; o < mine; o += turn) {
        const int64_t here = mine - o < turn ? mine - o : turn, slot = first + o;
        float* sums = s.sums.data + (blocks > 1 ? o : 0) * pixels * Format::kSums * W;
        Block block = {s.packed.data, across_lines * W * (dense ? Format::kSums : 1), tile.rows, tile.columns, pixels};
        block.bias = b && !kShortSums<Format> ? nullptr : bias.data + slot;
        block.ahead = &ahead;
        block.fetches = far && ahead.next < ahead.end ? (ahead.end - ahead.next) * lines : 0;
        if (dense) {
          block.weights = weights.data + (b * together / Format::kTogether * padded + slot * packed_units) * area;
          block.offsets = offsets.data;
          block.products = packed_units * area;
        } else {
          block.taps = taps.data;
          block.cuts = cuts.data + b * (live + 1) + slot;
          if constexpr (kShortSums<Format>) {
            block.powers = powers.data + slot;
            block.before = before.data + b * live + slot;
            block.halves = s.sums.data + (2 * group + (blocks > 1 ? o : 0)) * pixels * W;
            block.last = last;
          }
        }
        if (straight) block.outputs = &outputs;
        tile.micro.add(block, here, sums);
        for (int64_t i = 0; i < here && last && !straight; ++i)
          Base::write(slot + i, top, left, tile.rows, tile.columns, sample, n, sums + i * pixels * Format::kSums * W,
                      Format::kSums * W, other, out, samples);
      }
    }
    if (!part) Base::write_dead(top, left, tile.rows, tile.columns, sample, n, other, out, samples);
  }

  struct Corner {  // of a job: its first sample and output
    int64_t sample, top, left;
  };
  Corner corner(int64_t job, int64_t samples) const {
    const int64_t depth = tiles(samples, Format::kLanes), place = job / groups();
    return {place % depth * Format::kLanes, place / depth / across * tile.rows, place / depth % across * tile.columns};
  }

  // Where the lines under the tile of a job lie in a channel, in bytes; -1 outside the image.
  void find(int64_t job, int64_t samples, int64_t* found) const {
    const auto [sample, top, left] = corner(job, samples);
    for (int64_t i = 0; i < lines / across_lines; ++i) {
      const int64_t row = top * a.stride[0] - a.padding[0] + row_source[i];
      const int64_t start = row >= 0 && row < a.height ? row % in_rows * a.width * samples + sample : -1;
      for (int64_t j = 0; j < across_lines; ++j) {
        const int64_t column = left * a.stride[1] - a.padding[1] + column_source[j];
        const bool inside = start >= 0 && column >= 0 && column < a.width;
        *found++ = inside ? (start + column * samples) * int64_t(sizeof(Element)) : -1;
      }
    }
  }

  // The first n samples of the lines of a block's channels, the lanes past them 0.
  void pack(const Input& from, int64_t b, int64_t n, float* out) const {
    constexpr int64_t T = Format::kTogether;
    const char* nothing = reinterpret_cast<const char*>(border.data);
    const int64_t first = b * together, last = first + units(b) * step();
    Element some[T][Format::kLanes] = {};
    for (int64_t c = first; c < last; c += step()) {
      const char* base[T];
      int64_t mask[T];  // 0 of a channel past the last
      for (int64_t j = 0; j < step(); ++j) {
        mask[j] = c + j < channels ? -1 : 0;
        base[j] = mask[j] ? from.in + channel[c + j] * from.plane : nothing;
      }
      for (int64_t i = 0; i < lines; ++i, out += W * (dense ? Format::kSums : 1)) {
        const int64_t offset = from.offsets[i];
        const Element* in[T];
        for (int64_t j = 0; j < step(); ++j) {
          in[j] = reinterpret_cast<const Element*>(offset >= 0 ? base[j] + (offset & mask[j]) : nothing);
          if (n < Format::kLanes) in[j] = static_cast<Element*>(memcpy(some[j], in[j], n * sizeof(Element)));
        }
        if (dense) Format::pack_unit(in, out);
        else store(out, Format::pack(in[0]));
      }
    }
  }
};

}  // namespace CSAM_ISA
}  // namespace csam
