// The multi-tensor mask passes. Layers are described by a table in the kernel's parameters, so a pass over any network
// of up to kMany layers is one launch. A block takes units of kUnit weights, a thread eight of them in 16-byte
// accesses, all loads before the first use. Every sum is taken unit by unit in a fixed order: its bits depend on
// nothing else.
//
//   step_kernel      W = theta * M, M plain or perturbed, or C~ alone
//   squares_kernel   sum of g^2 of every unit; scales_kernel turns the sums into rho / ||g||
//   gradient_kernel  dL/dtheta, dL/dM and sums of (dL/dM)^2; fold_kernel finishes masks whose values many units share;
//                    norm_kernel adds the sums up
#include <algorithm>

#include "../common/normal.h"
#include "device.h"

namespace csam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 3;
constexpr int kGradientResident = 2;  // leaves 128 registers a thread
constexpr int kUnit = kThreads * kGroup;
constexpr int kBand = 16;  // rows that a unit of a mask shared by all rows takes
constexpr int kFew = 36, kMany = 280;

struct Entry {
  Layer layer;
  int64_t first_unit;     // in this table
  int64_t first_partial;  // of the sums that fold_kernel adds up, in all partial sums
  bool vector;            // every pointer allows 16-byte accesses
};
template <int LAYERS>
struct Table {
  Entry entries[LAYERS];
  int64_t units, first_sum;  // the sums of the table's units among all partial sums
  int count, first_layer;
};
static_assert(sizeof(Table<kMany>) < 32700, "kernel parameters end at 32764 bytes");

// Calls body(unit of the layer, entry, layer) for the block's share of all units.
template <class T, class Body>
__device__ inline void for_units(const T& table, Body body) {
  int layer = 0;
  for (int64_t unit = blockIdx.x; unit < table.units; unit += gridDim.x) {
    while (layer + 1 < table.count && unit >= table.entries[layer + 1].first_unit) ++layer;
    body(unit - table.entries[layer].first_unit, table.entries[layer], layer);
  }
}

__host__ __device__ inline int64_t size(const MaskLayout& l) { return l.rows * l.cols; }
__device__ inline float load_one(const void* p, int dtype, int64_t at) {
  if (dtype == kF32) return static_cast<const float*>(p)[at];
  if (dtype == kBF16) return from_bf16(static_cast<const uint16_t*>(p)[at]);
  if (dtype == kF16) return from_f16(static_cast<const uint16_t*>(p)[at]);
  return float(static_cast<const uint8_t*>(p)[at]);
}

template <int dtype>
__device__ inline void store_group(void* p, int64_t at, int n, bool vector, const float v[kGroup]) {
  if (vector) return store8<dtype>(p, at, v);
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (i < n) store1<dtype>(p, at + i, v[i]);
}
__device__ inline void store_group(void* p, int dtype, int64_t at, int n, bool vector, const float v[kGroup]) {
  if (dtype == kF32) store_group<kF32>(p, at, n, vector, v);
  else if (dtype == kBF16) store_group<kBF16>(p, at, n, vector, v);
  else store_group<kF16>(p, at, n, vector, v);
}

// Mask values of weights at .. at+n-1 of a broadcast mask; each is loaded once a run.
__device__ inline void spread(const Layer& l, int64_t at, int n, float out[kGroup]) {
  const MaskLayout& y = l.layout;
  int64_t row = at / y.cols, col = at % y.cols, run = col / y.span, inside = col % y.span;
  float value = 0;
  bool fresh = true;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i >= n) break;
    if (fresh) value = load_one(l.mask, l.mask_dtype, row * y.row_stride + run * y.col_stride);
    out[i] = value;
    ++col, ++inside;
    fresh = col == y.cols || inside == y.span;
    if (col == y.cols) ++row, col = 0, run = 0, inside = 0;
    else if (inside == y.span) ++run, inside = 0;
  }
}

struct StepOptions {
  uint64_t seed, step;
  float radius;         // times 2^-31
  const float* scales;  // rho / ||g||: one a layer, or one
  bool one_scale;
};

template <int KIND>
__device__ inline void perturb(const StepOptions& o, int layer, int64_t at, const float g[kGroup], float m[kGroup]) {
  if constexpr (KIND == kUniform) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t quad = uint32_t(uint64_t(at) / 4) + half;
      const Words start = {{quad, uint32_t(o.step), uint32_t(o.step >> 32), uint32_t(layer)}};
      const Words w = philox4x32(start, uint32_t(o.seed), uint32_t(o.seed >> 32) ^ kPerturbDomain);
#pragma unroll
      for (int j = 0; j < 4; ++j) m[4 * half + j] = clip01(m[4 * half + j] + float(int32_t(w.v[j])) * o.radius);
    }
  } else {
    const float scale = o.scales[o.one_scale ? 0 : layer];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) m[i] = clip01(m[i] + scale * g[i]);
  }
}

template <int KIND, class T>
__global__ void __launch_bounds__(kThreads, kResident) step_kernel(const __grid_constant__ T table, StepOptions o) {
  for_units(table, [&](int64_t unit, const Entry& entry, int layer) {
    const Layer& l = entry.layer;
    const int64_t at = unit * kUnit + threadIdx.x * kGroup, left = size(l.layout) - at;
    if (left <= 0) return;
    const int n = left < kGroup ? int(left) : kGroup;
    const bool vector = entry.vector && n == kGroup, full = elementwise(l.layout);
    Raw weight{}, mask{}, grad{};
    if (l.weight) weight = load_raw(l.weight, l.weight_dtype, at, n, vector);
    if (full) mask = load_raw(l.mask, l.mask_dtype, at, n, vector);
    if (KIND == kAdversarial) grad = load_raw(l.grad, l.grad_dtype, at, n, vector);
    float m[kGroup], v[kGroup];
    if (full) widen(mask, l.mask_dtype, m);
    else spread(l, at, n, m);
    if constexpr (KIND != kPlain) {
      if (KIND == kAdversarial) widen(grad, l.grad_dtype, v);
      perturb<KIND>(o, table.first_layer + layer, at, v, m);
    }
    if (l.weight) {
      widen(weight, l.weight_dtype, v);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) m[i] = v[i] * m[i];
    }
    store_group(l.out, l.out_dtype, at, n, vector, m);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    squares_kernel(const __grid_constant__ T table, double* __restrict__ partial) {
  for_units(table, [&](int64_t unit, const Entry& entry, int) {
    const Layer& l = entry.layer;
    const int64_t at = unit * kUnit + threadIdx.x * kGroup, left = size(l.layout) - at;
    const int n = left < kGroup ? int(left) : kGroup;
    double total = 0;
    if (n > 0) {
      float g[kGroup];
      widen(load_raw(l.grad, l.grad_dtype, at, n, entry.vector && n == kGroup), l.grad_dtype, g);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) total += i < n ? double(g[i]) * g[i] : 0.0;
    }
    total = block_sum<kThreads>(total);
    if (threadIdx.x == 0) partial[table.first_sum + entry.first_unit + unit] = total;
  });
}

__device__ inline double sum_range(const double* values, int64_t count) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) total += values[i];
  return block_sum<kThreads>(total);
}

// Block b: the scale of layer b of the table, or with count != 0 the one scale of all `count` partial sums.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    scales_kernel(const __grid_constant__ T table, const double* partial, int64_t count, double rho, float* scales) {
  const int last = count ? 1 : table.count;
  for (int layer = blockIdx.x; layer < last; layer += gridDim.x) {
    const int64_t first = count ? 0 : table.entries[layer].first_unit;
    const int64_t end = count ? count : layer + 1 < table.count ? table.entries[layer + 1].first_unit : table.units;
    const double square = sum_range(partial + (count ? 0 : table.first_sum) + first, end - first);
    if (threadIdx.x == 0) scales[count ? 0 : table.first_layer + layer] = square > 0 ? float(rho / sqrt(square)) : 0.0f;
  }
}

// How the units of a broadcast mask's gradient lie. A run is what one mask value covers of one row. Where every row has
// its own values, `total` counts the runs of all rows, otherwise those of one row, and a unit takes a band of rows.
struct Tiling {
  bool own, direct;  // direct: a run lies in one unit, which writes its mask value itself
  int64_t in_row, total, pieces, tiles, bands;
  int per_tile;

  __host__ __device__ explicit Tiling(const MaskLayout& y)
      : own(y.row_stride != 0 || y.rows == 1),
        direct(own && y.span <= kUnit),
        in_row(runs(y)),
        total(own ? y.rows * in_row : in_row),
        pieces(y.span <= kUnit ? 1 : (y.span + kUnit - 1) / kUnit),
        tiles(pieces > 1 ? total * pieces : 0),
        bands(own ? 1 : (y.rows + kBand - 1) / kBand),
        per_tile(pieces > 1 ? 1 : int(kUnit / y.span)) {
    if (per_tile > kGroup) per_tile -= per_tile % kGroup;  // tiles start where 16-byte accesses may
    if (pieces == 1) tiles = (total + per_tile - 1) / per_tile;
  }
  __host__ __device__ int64_t start(const MaskLayout& y, int64_t run) const {
    return run / in_row * y.cols + run % in_row * y.span;
  }
  __host__ __device__ int64_t value(const MaskLayout& y, int64_t run) const {
    return run / in_row * y.row_stride + run % in_row * y.col_stride;
  }
  __host__ __device__ int64_t units() const { return tiles * bands; }
  __host__ __device__ int64_t partials() const { return direct ? 0 : bands * total * pieces; }
};

// Elementwise: the thread's eight weights; returns their part of ||dL/dM||^2.
__device__ inline double gradient_group(const Entry& entry, int64_t unit) {
  const Layer& l = entry.layer;
  const int64_t at = unit * kUnit + threadIdx.x * kGroup, left = size(l.layout) - at;
  if (left <= 0) return 0;
  const int n = left < kGroup ? int(left) : kGroup;
  const bool vector = entry.vector && n == kGroup;
  const Raw grad = load_raw(l.grad, l.grad_dtype, at, n, vector);
  const Raw weight = load_raw(l.weight, kF32, at, n, vector);
  Raw mask{};
  if (l.out) mask = load_raw(l.mask, l.mask_dtype, at, n, vector);
  float g[kGroup], v[kGroup];
  widen(grad, l.grad_dtype, g);
  widen(weight, kF32, v);
  double squares = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    v[i] = g[i] * v[i];
    squares += i < n ? double(v[i]) * v[i] : 0.0;
  }
  if (l.out_mask) store_group<kF32>(l.out_mask, at, n, vector, v);
  if (l.out) {
    widen(mask, l.mask_dtype, v);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) v[i] = g[i] * v[i];
    store_group<kF32>(l.out, at, n, vector, v);
  }
  return squares;
}

// Where value i of a unit lies in shared memory: groups of eight start in different banks.
__device__ inline int spaced(int i) { return i + i / kGroup; }

// Broadcast: the block's weights of one unit, their products summed run by run in shared memory.
__device__ inline double gradient_tile(const Entry& entry, int64_t unit, double* partial) {
  __shared__ double products[kUnit + kThreads];
  const Layer& l = entry.layer;
  const MaskLayout& y = l.layout;
  const Tiling t(y);
  const int64_t tile = unit % t.tiles, band = unit / t.tiles;
  const int64_t first_run = tile / t.pieces * t.per_tile, piece = tile % t.pieces;
  const int64_t last_run = min(first_run + t.per_tile, t.total) - 1;
  const int64_t start = t.start(y, first_run), skip = piece * kUnit;
  const int64_t row_end = (last_run / t.in_row + 1) * y.cols;
  const int length = int(min(min(t.start(y, last_run) + y.span, row_end) - start - skip, int64_t(kUnit)));
  const int64_t first_row = band * kBand;
  const int rows = t.own ? 1 : int(min(int64_t(kBand), y.rows - first_row));

  const int at = threadIdx.x * kGroup, n = max(0, min(length - at, kGroup));
  const int64_t from = first_row * y.cols + start + skip + at;
  float m[kGroup];
  if (l.out) spread(l, from, n, m);  // the same in every row of a band
  double sums[kGroup] = {};
  for (int r = 0; r < rows && n > 0; ++r) {
    const int64_t offset = from + r * y.cols;
    const bool vector = entry.vector && n == kGroup && offset % kGroup == 0;
    const Raw grad = load_raw(l.grad, l.grad_dtype, offset, n, vector);
    const Raw weight = load_raw(l.weight, kF32, offset, n, vector);
    float g[kGroup], w[kGroup];
    widen(grad, l.grad_dtype, g);
    widen(weight, kF32, w);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) sums[j] += double(g[j]) * w[j];
    if (!l.out) continue;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) g[j] = g[j] * m[j];
    store_group<kF32>(l.out, offset, n, vector, g);
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j) products[spaced(at + j)] = sums[j];
  __syncthreads();

  int lanes = 1;  // a run is summed by so many lanes of a warp
  while (lanes < kWarp && lanes * kGroup < y.span) lanes *= 2;
  const int64_t count = last_run - first_run + 1;
  double squares = 0;
  for (int64_t base = 0; base < count; base += kThreads / lanes) {
    const int64_t run = first_run + base + threadIdx.x / lanes;
    const bool live = run <= last_run;
    double total = 0;
    if (live) {
      const int from = t.pieces > 1 ? 0 : int(t.start(y, run) - start);
      const int64_t end = t.pieces > 1 ? length : min(t.start(y, run) + y.span, (run / t.in_row + 1) * y.cols) - start;
      for (int i = from + threadIdx.x % lanes; i < end; i += lanes) total += products[spaced(i)];
    }
    for (int other = lanes / 2; other > 0; other /= 2) total += __shfl_xor_sync(kAllLanes, total, other);
    if (!live || threadIdx.x % lanes) continue;
    if (t.direct) {
      const float dm = float(total);
      l.out_mask[t.value(y, run)] = dm;
      squares += double(dm) * dm;
    } else {
      partial[entry.first_partial + (band * t.total + run) * t.pieces + piece] = total;
    }
  }
  __syncthreads();
  return squares;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kGradientResident)
    gradient_kernel(const __grid_constant__ T table, double* partial) {
  for_units(table, [&](int64_t unit, const Entry& entry, int) {
    const bool full = elementwise(entry.layer.layout);
    const double squares =
        block_sum<kThreads>(full ? gradient_group(entry, unit) : gradient_tile(entry, unit, partial));
    if (threadIdx.x == 0) partial[table.first_sum + entry.first_unit + unit] = squares;
  });
}

// A thread adds up the bands and pieces of one mask value.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident) fold_kernel(const __grid_constant__ T table, double* partial) {
  for_units(table, [&](int64_t unit, const Entry& entry, int) {
    const MaskLayout& y = entry.layer.layout;
    const Tiling t(y);
    const int64_t run = unit * kThreads + threadIdx.x;
    double squares = 0;
    if (run < t.total) {
      double total = 0;
      for (int64_t band = 0; band < t.bands; ++band)
        for (int64_t piece = 0; piece < t.pieces; ++piece)
          total += partial[entry.first_partial + (band * t.total + run) * t.pieces + piece];
      const float dm = float(total);
      entry.layer.out_mask[t.value(y, run)] = dm;
      squares = double(dm) * dm;
    }
    squares = block_sum<kThreads>(squares);
    if (threadIdx.x == 0) partial[table.first_sum + entry.first_unit + unit] = squares;
  });
}

__global__ void __launch_bounds__(kThreads) norm_kernel(const double* partial, int64_t count, double* norm) {
  const double total = sum_range(partial, count);
  if (threadIdx.x == 0) *norm = total;
}

int64_t step_units(const Layer& l) { return (size(l.layout) + kUnit - 1) / kUnit; }
int64_t gradient_units(const Layer& l) {
  if (!size(l.layout)) return 0;
  return elementwise(l.layout) ? step_units(l) : Tiling(l.layout).units();
}
int64_t fold_partials(const Layer& l) {
  return elementwise(l.layout) || !size(l.layout) ? 0 : Tiling(l.layout).partials();
}
int64_t fold_units(const Layer& l) { return fold_partials(l) ? (Tiling(l.layout).total + kThreads - 1) / kThreads : 0; }
template <class Count>
int64_t sum_over(const std::vector<Layer>& layers, Count count) {
  int64_t total = 0;
  for (const Layer& l : layers) total += count(l);
  return total;
}

bool fits(const void* p, int dtype) { return aligned(p, dtype == kBool ? 8 : 16); }
bool vector(const Layer& l) {
  const bool mask = !elementwise(l.layout) || fits(l.mask, l.mask_dtype);
  return mask && aligned(l.weight) && aligned(l.grad) && aligned(l.out) && aligned(l.out_mask);
}

// Calls run(table) for as many tables as the layers fill.
template <class Count, class Run>
cudaError_t for_tables(const std::vector<Layer>& layers, Count count, int64_t first_sum, int64_t first_partial,
                       Run run) {
  size_t first = 0;
  const auto fill = [&](auto& table) {
    table.units = 0;
    table.first_sum = first_sum;
    table.first_layer = int(first);
    table.count = int(std::min(layers.size() - first, std::size(table.entries)));
    for (int i = 0; i < table.count; ++i) {
      const Layer& l = layers[first++];
      table.entries[i] = {l, table.units, first_partial, vector(l)};
      table.units += count(l);
      first_partial += fold_partials(l);
    }
    first_sum += table.units;
    return run(table);
  };
  cudaError_t error = cudaSuccess;
  while (first < layers.size() && error == cudaSuccess) {
    if (layers.size() - first <= kFew) {
      Table<kFew> table;
      error = fill(table);
    } else {
      Table<kMany> table;
      error = fill(table);
    }
  }
  return error;
}

}  // namespace

int64_t units(const std::vector<Layer>& layers) { return sum_over(layers, step_units); }

int64_t gradient_room(const std::vector<Layer>& layers) {
  return sum_over(layers, gradient_units) + sum_over(layers, fold_units) + sum_over(layers, fold_partials);
}

cudaError_t mask_step(const MaskStep& pass, Device device) {
  const StepOptions options{pass.seed, pass.step, float(pass.radius * 0x1p-31), pass.scales, pass.global_norm};
  if (pass.kind == kAdversarial) {
    const int64_t all = pass.global_norm ? units(pass.layers) : 0;
    cudaError_t error = for_tables(pass.layers, step_units, 0, 0, [&](const auto& table) {
      using T = std::decay_t<decltype(table)>;
      return launch(squares_kernel<T>, table.units, kThreads, kResident, device, table, pass.partial);
    });
    if (error != cudaSuccess) return error;
    error = for_tables(pass.layers, step_units, 0, 0, [&](const auto& table) {
      using T = std::decay_t<decltype(table)>;
      const int blocks = !pass.global_norm ? table.count : table.first_layer == 0;
      return launch(scales_kernel<T>, blocks, kThreads, kResident, device, table, pass.partial, all, pass.rho,
                    pass.scales);
    });
    if (error != cudaSuccess) return error;
  }
  return for_tables(pass.layers, step_units, 0, 0, [&](const auto& table) {
    using T = std::decay_t<decltype(table)>;
    const auto kernel = pass.kind == kPlain     ? step_kernel<kPlain, T>
                        : pass.kind == kUniform ? step_kernel<kUniform, T>
                                                : step_kernel<kAdversarial, T>;
    return launch(kernel, table.units, kThreads, kResident, device, table, options);
  });
}

cudaError_t mask_gradients(const GradientPass& pass, Device device) {
  const int64_t squares = sum_over(pass.layers, gradient_units), sums = squares + sum_over(pass.layers, fold_units);
  cudaError_t error = for_tables(pass.layers, gradient_units, 0, sums, [&](const auto& table) {
    using T = std::decay_t<decltype(table)>;
    return launch(gradient_kernel<T>, table.units, kThreads, kGradientResident, device, table, pass.partial);
  });
  if (error != cudaSuccess) return error;
  error = for_tables(pass.layers, fold_units, squares, sums, [&](const auto& table) {
    using T = std::decay_t<decltype(table)>;
    return launch(fold_kernel<T>, table.units, kThreads, kResident, device, table, pass.partial);
  });
  if (error != cudaSuccess) return error;
  return launch(norm_kernel, 1, kThreads, 1, device, pass.partial, sums, pass.norm);
}

}  // namespace csam::cuda
