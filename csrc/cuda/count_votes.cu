// count_votes: 1, 8 or 32 lanes take a row, find its first largest logit, and vote into the block's own histogram,
// equal votes of a warp at once; the block adds its counts to the result at the end. Integer sums are exact in any
// order.
#include <cmath>

#include "device.h"

namespace csam::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kResident = 8;
constexpr int kBins = 4096;  // classes that a block counts in shared memory
constexpr int kUnroll = 4;   // loads in flight a lane

__device__ inline float value(float v) { return v; }
__device__ inline double value(double v) { return v; }
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
__device__ inline float value(Bf16 v) { return from_bf16(v.bits); }
__device__ inline float value(F16 v) { return from_f16(v.bits); }

template <class V>
struct Best {
  V value;
  int index;
  bool nan;

  __device__ void meet(V v, int i) {
    nan |= v != v;
    if (v > value || (v == value && i < index)) value = v, index = i;
  }
};

template <class T, int LANES>
__global__ void __launch_bounds__(kThreads, kResident) votes_kernel(VoteArgs a) {
  using V = decltype(value(T()));
  __shared__ unsigned bins[kBins];
  const int classes = int(a.classes), lane = threadIdx.x % LANES;
  const bool shared = classes <= kBins;
  for (int c = threadIdx.x; shared && c < classes; c += kThreads) bins[c] = 0;
  __syncthreads();

  constexpr int kRows = kThreads / LANES;
  for (int64_t base = int64_t(blockIdx.x) * kRows; base < a.n; base += int64_t(gridDim.x) * kRows) {
    const int64_t row = base + threadIdx.x / LANES;
    Best<V> best{-INFINITY, classes, false};
    if (row < a.n) {
      const T* logits = static_cast<const T*>(a.logits) + row * a.row_stride;
      for (int first = lane; first < classes; first += kUnroll * LANES) {
        T loaded[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          if (first + u * LANES < classes) loaded[u] = logits[first + u * LANES];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          if (first + u * LANES < classes) best.meet(value(loaded[u]), first + u * LANES);
      }
    }
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) {
      const V v = __shfl_xor_sync(kAllLanes, best.value, other);
      const int index = __shfl_xor_sync(kAllLanes, best.index, other);
      best.nan |= __shfl_xor_sync(kAllLanes, int(best.nan), other) != 0;
      best.meet(v, index);
    }
    const int vote = row < a.n && lane == 0 && !best.nan ? best.index : -1;
    const unsigned same = __match_any_sync(kAllLanes, vote);
    if (vote >= 0 && __ffs(int(same)) - 1 == int(threadIdx.x % kWarp)) {
      const unsigned count = unsigned(__popc(same));
      if (shared) atomicAdd(&bins[vote], count);
      else atomicAdd(reinterpret_cast<unsigned long long*>(a.out) + vote, (unsigned long long)count);
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; shared && c < classes; c += kThreads)
    if (bins[c]) atomicAdd(reinterpret_cast<unsigned long long*>(a.out) + c, (unsigned long long)bins[c]);
}

template <class T, int LANES>
cudaError_t votes(const VoteArgs& a, Device device) {
  constexpr int kRows = kThreads / LANES;
  return launch(votes_kernel<T, LANES>, (a.n + kRows - 1) / kRows, kThreads, kResident, device, a);
}

template <class T>
cudaError_t votes(const VoteArgs& a, Device device) {
  if (a.classes <= 32) return votes<T, 1>(a, device);
  return a.classes <= 256 ? votes<T, 8>(a, device) : votes<T, 32>(a, device);
}

}  // namespace

cudaError_t count_votes(const VoteArgs& a, Device device) {
  switch (a.dtype) {
    case kF32: return votes<float>(a, device);
    case kF64: return votes<double>(a, device);
    case kBF16: return votes<Bf16>(a, device);
    default: return votes<F16>(a, device);
  }
}

}  // namespace csam::cuda
