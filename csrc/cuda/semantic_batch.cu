// semantic_batch: a block takes a tile of one copy (whole rows, or a piece of a long one). One bilinear gather; where
// the copy is not blurred the photometric map follows in registers and the result is final. A blurred copy is resampled
// into shared memory, blurred along rows into scratch, and a second kernel blurs along columns, four pixels in 16-byte
// accesses where the width allows, and applies the map. The gather takes a pixel a thread: neighbours' taps share cache
// lines so, and a warp's stores fill whole ones.
#include <cmath>

#include "device.h"

namespace csam::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kResident = 5;
constexpr int kBlurResident = 10;
constexpr int kColumns = 8;
constexpr int kTile = 512;   // pixels
constexpr int kRadius = 96;  // of the widest blur, 3 x 32
constexpr int kTaps = 2 * kRadius + 1;

struct Prepared {  // of one copy
  double total;    // of the blur's weights before they are normalised
  float cosine, sine;
};

__device__ inline int radius_of(float blur) { return blur > 0 ? int(ceil(3.0 * blur)) : 0; }
__device__ inline double weight(int k, float blur) { return exp(-0.5 * k * k / (double(blur) * blur)); }

__global__ void __launch_bounds__(kThreads, kResident) prepare_kernel(SemanticArgs a, Prepared* prepared) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.n; i += int64_t(gridDim.x) * kThreads) {
    const float* row = a.params + i * kColumns;
    double cosine, sine, total = 0;
    sincospi(row[0] / 180.0, &sine, &cosine);
    const int radius = radius_of(row[4]);
    for (int k = -radius; k <= radius && radius; ++k) total += weight(k, row[4]);
    prepared[i] = {total, float(cosine / row[3]), float(sine / row[3])};
  }
}

// Where output pixel (v, u) reads: four taps, zero outside.
struct Taps {
  int64_t at[4];
  float weight[4];
  bool inside;

  __device__ Taps(const SemanticArgs& a, const float* row, float cosine, float sine, int v, int u) {
    const int w = int(a.width), h = int(a.height);
    const float cx = 0.5f * (a.width - 1), cy = 0.5f * (a.height - 1);
    const float dx = u - cx - row[1] * a.width, dy = v - cy - row[2] * a.height;
    const float sx = cosine * dx - sine * dy + cx, sy = sine * dx + cosine * dy + cy;
    inside = sx > -1 && sx < w && sy > -1 && sy < h;
    if (!inside) return;
    const int x0 = int(floorf(sx)), y0 = int(floorf(sy));
    const float fx = sx - x0, fy = sy - y0;
    weight[0] = x0 >= 0 ? 1 - fx : 0, weight[1] = x0 + 1 < w ? fx : 0;
    weight[2] = y0 >= 0 ? 1 - fy : 0, weight[3] = y0 + 1 < h ? fy : 0;
    const int64_t xa = x0 < 0 ? 0 : x0, xb = x0 + 1 < w ? x0 + 1 : w - 1;
    const int64_t ya = (y0 < 0 ? 0 : y0) * a.width, yb = (y0 + 1 < h ? y0 + 1 : h - 1) * a.width;
    at[0] = ya + xa, at[1] = ya + xb, at[2] = yb + xa, at[3] = yb + xb;
  }
  __device__ float sample(const float* plane) const {
    if (!inside) return 0;
    const float top = weight[0] * __ldg(plane + at[0]) + weight[1] * __ldg(plane + at[1]);
    const float bottom = weight[0] * __ldg(plane + at[2]) + weight[1] * __ldg(plane + at[3]);
    return weight[2] * top + weight[3] * bottom;
  }
};

__device__ inline float photometric(float v, const float* row) {
  v = clip01(row[5] * v + row[6]);
  return row[7] == 1 ? v : powf(v, row[7]);
}

// The normalised weights of a blur; every thread of the block must call it.
__device__ inline void load_taps(float* taps, float blur, double total) {
  const int radius = radius_of(blur);
  for (int k = threadIdx.x; k <= 2 * radius; k += kThreads) taps[k] = float(weight(k - radius, blur) / total);
  __syncthreads();
}

struct Tiles {
  int64_t rows, length, in_row, a_copy;  // rows of a tile, pixels of a row, tiles side by side, tiles of a copy

  Tiles(int64_t height, int64_t width)
      : rows(width <= kTile ? kTile / width : 1),
        length(width <= kTile ? width : kTile - 2 * kRadius),
        in_row((width + length - 1) / length),
        a_copy((height + rows - 1) / rows * in_row) {}
};

__global__ void __launch_bounds__(kThreads, kResident)
    affine_kernel(SemanticArgs a, Tiles tiles, const Prepared* __restrict__ prepared, float* __restrict__ blurred) {
  __shared__ float resampled[kTile], taps[kTaps];
  const int64_t pixels = a.height * a.width;
  for (int64_t unit = blockIdx.x; unit < a.n * tiles.a_copy; unit += gridDim.x) {
    const int64_t copy = unit / tiles.a_copy, tile = unit % tiles.a_copy;
    const float* row = a.params + copy * kColumns;
    const Prepared p = prepared[copy];
    const int radius = radius_of(row[4]);
    const int first_row = int(tile / tiles.in_row * tiles.rows), first = int(tile % tiles.in_row * tiles.length);
    const int rows = int(min(tiles.rows, a.height - first_row)), length = int(min(tiles.length, a.width - first));
    if (!radius) {
      for (int i = threadIdx.x; i < rows * length; i += kThreads) {
        const int v = first_row + i / length, u = first + i % length;
        const Taps t(a, row, p.cosine, p.sine, v, u);
        for (int64_t c = 0; c < a.channels; ++c)
          a.out[(copy * a.channels + c) * pixels + v * a.width + u] = photometric(t.sample(a.x + c * pixels), row);
      }
      continue;
    }
    load_taps(taps, row[4], p.total);
    const int low = max(first - radius, 0), high = min(first + length + radius, int(a.width)), span = high - low;
    for (int64_t c = 0; c < a.channels; ++c) {
      for (int i = threadIdx.x; i < rows * span; i += kThreads)
        resampled[i] = Taps(a, row, p.cosine, p.sine, first_row + i / span, low + i % span).sample(a.x + c * pixels);
      __syncthreads();
      for (int i = threadIdx.x; i < rows * length; i += kThreads) {
        const int r = i / length, u = first + i % length;
        float total = 0;
        for (int k = -radius; k <= radius; ++k)
          total += taps[k + radius] * resampled[r * span + min(max(u + k, 0), int(a.width) - 1) - low];
        blurred[(copy * a.channels + c) * pixels + (first_row + r) * a.width + u] = total;
      }
      __syncthreads();
    }
  }
}

template <int PIXELS>
__global__ void __launch_bounds__(kThreads, kBlurResident)
    column_blur_kernel(SemanticArgs a, const Prepared* __restrict__ prepared, const float* __restrict__ blurred) {
  __shared__ float taps[kTaps];
  const int64_t pixels = a.height * a.width, elements = a.channels * pixels;
  const int64_t a_copy = (elements + kTile - 1) / kTile;
  for (int64_t unit = blockIdx.x; unit < a.n * a_copy; unit += gridDim.x) {
    const int64_t copy = unit / a_copy, first = unit % a_copy * kTile;
    const float* row = a.params + copy * kColumns;
    const int radius = radius_of(row[4]);
    if (!radius) continue;
    load_taps(taps, row[4], prepared[copy].total);
    for (int64_t e = first + threadIdx.x * PIXELS; e < min(first + kTile, elements); e += kThreads * PIXELS) {
      const int64_t plane = e / pixels, pixel = e % pixels;
      const int v = int(pixel / a.width), u = int(pixel % a.width), last = int(a.height) - 1;
      const float* in = blurred + copy * elements + plane * pixels + u;
      float total[PIXELS] = {};
#pragma unroll 4
      for (int k = -radius; k <= radius; ++k) {
        const float* from = in + min(max(v + k, 0), last) * a.width;
        float4 four{};
        if constexpr (PIXELS == 4) four = *reinterpret_cast<const float4*>(from);
        else four.x = *from;
        const float loaded[] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < PIXELS; ++i) total[i] += taps[k + radius] * loaded[i];
      }
#pragma unroll
      for (int i = 0; i < PIXELS; ++i) total[i] = photometric(total[i], row);
      float* to = a.out + copy * elements + e;
      if constexpr (PIXELS == 4)
        __stwb(reinterpret_cast<float4*>(to), make_float4(total[0], total[1], total[2], total[3]));
      else *to = total[0];
    }
    __syncthreads();
  }
}

}  // namespace

int64_t semantic_room(int64_t n, int64_t elements) {
  return n * int64_t(sizeof(Prepared)) + n * elements * int64_t(sizeof(float));
}

cudaError_t semantic_batch(const SemanticArgs& a, Device device) {
  const int64_t elements = a.channels * a.height * a.width;
  if (!a.n || !elements) return cudaSuccess;
  Prepared* prepared = static_cast<Prepared*>(a.scratch);
  float* blurred = reinterpret_cast<float*>(prepared + a.n);
  const Tiles tiles(a.height, a.width);
  cudaError_t error = launch(prepare_kernel, (a.n + kThreads - 1) / kThreads, kThreads, kResident, device, a, prepared);
  if (error != cudaSuccess) return error;
  error = launch(affine_kernel, a.n * tiles.a_copy, kThreads, kResident, device, a, tiles, prepared, blurred);
  if (error != cudaSuccess) return error;
  const int64_t units = a.n * ((elements + kTile - 1) / kTile);
  const auto blur =
      a.width % 4 == 0 && aligned(a.out) && aligned(blurred) ? column_blur_kernel<4> : column_blur_kernel<1>;
  return launch(blur, units, kThreads, kBlurResident, device, a, prepared, blurred);
}

}  // namespace csam::cuda
