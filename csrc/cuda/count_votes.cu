// count_votes: 1, 8 or 32 lanes take a row, find its first largest logit, and vote into the block's own histogram,
// equal votes of a warp at once; the block adds its counts to the result at the end. Integer sums are exact in any
// order. Short rows without gaps go through shared memory by the tile, a long or spread row straight to its warp; both
// are read in aligned packs of 16 bytes, several in flight, and only what is left at the ends of a run value by value.
#include <cmath>

#include "device.h"

namespace csam::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kResident = 16;
constexpr int kLoads = 3;        // packs in flight a thread
constexpr int kPack = 16;        // bytes
constexpr int kBanks = 128;      // bytes that shared memory gives at a time
constexpr int kMostBins = 2048;  // classes that a block counts in shared memory

template <int LANES>
constexpr bool kTiled = LANES < kWarp;
template <int LANES>
constexpr int kRowBytes = LANES * 4 * kPack;  // the longest row in a tile
template <int LANES>
constexpr int kBins = kTiled<LANES> ? kRowBytes<LANES> / 2 : kMostBins;

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

// How many values `run` lies behind the start of a pack.
template <class T>
__device__ inline int skew(const T* run) {
  return int(reinterpret_cast<uintptr_t>(run) % kPack / sizeof(T));
}

// A lane's share of run[0..count): pack(at, words) for what lies in whole packs, value(at, v) for the rest.
template <int LANES, class T, class OnValue, class OnPack>
__device__ inline void for_run(const T* run, int count, int lane, OnValue value, OnPack pack) {
  constexpr int kValues = kPack / sizeof(T), kStep = LANES * kValues;
  static_assert(LANES > 2 * kValues, "a lane takes one value of the ends at most");
  const int head = min(count, (kValues - skew(run)) % kValues), body = (count - head) / kValues * kValues;
  const int at = lane < head ? lane : lane + body;
  T loose{};
  if (at < count) loose = run[at];
  const int end = head + body;
#pragma unroll 1
  for (int first = head + lane * kValues; first < end; first += kLoads * kStep) {
    uint4 words[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
      if (first + u * kStep < end) words[u] = *reinterpret_cast<const uint4*>(run + first + u * kStep);
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
      if (first + u * kStep < end) pack(first + u * kStep, words[u]);
  }
  if (at < count) value(at, loose);
}

template <class V>
struct Best {
  V value;  // NaN once met
  int index;

  __device__ void meet(V v, int i) {
    if (v > value || v != v || (v == value && i < index)) value = v, index = i;
  }
};

template <class T, int LANES>
__global__ void __launch_bounds__(kThreads, kResident) votes_kernel(VoteArgs a) {
  using V = decltype(value(T()));
  constexpr int kRows = kThreads / LANES;
  __shared__ unsigned bins[kBins<LANES>];
  __shared__ uint4 tile[kTiled<LANES> ? kRows * kRowBytes<LANES> / kPack + 1 : 1];
  const int classes = int(a.classes), lane = threadIdx.x % LANES, own = threadIdx.x / LANES;
  const bool shared = classes <= kBins<LANES>;
  for (int c = threadIdx.x; shared && c < classes; c += kThreads) bins[c] = 0;
  __syncthreads();

  for (int64_t base = int64_t(blockIdx.x) * kRows; base < a.n; base += int64_t(gridDim.x) * kRows) {
    const T* logits = static_cast<const T*>(a.logits) + base * a.row_stride;
    const int rows = int(min(a.n - base, int64_t(kRows)));
    Best<V> best{-INFINITY, classes};
    if constexpr (kTiled<LANES>) {
      const int before = skew(logits);
      T* copy = reinterpret_cast<T*>(tile) + before;
      for_run<kThreads>(
          logits, rows * classes, threadIdx.x, [&](int at, T v) { copy[at] = v; },
          [&](int at, uint4 words) { tile[(before + at) / (kPack / int(sizeof(T)))] = words; });
      __syncthreads();
      // Rows whose length has a large power of two start in one bank: they are read from different places on.
      const int turn = own * (classes & -classes) * int(sizeof(T)) / kBanks * LANES % classes;
      for (int c = lane; c < classes && own < rows; c += LANES) {
        const int i = c + turn < classes ? c + turn : c + turn - classes;
        best.meet(value(copy[own * classes + i]), i);
      }
      __syncthreads();
    } else if (own < rows) {
      const T* row = logits + own * a.row_stride;
      for_run<LANES>(
          row, classes, lane, [&](int at, T v) { best.meet(value(v), at); },
          [&](int at, uint4 words) {
            T v[kPack / sizeof(T)];
            memcpy(v, &words, kPack);
#pragma unroll
            for (int i = 0; i < kPack / int(sizeof(T)); ++i) best.meet(value(v[i]), at + i);
          });
    }
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) {
      const V v = __shfl_xor_sync(kAllLanes, best.value, other);
      const int index = __shfl_xor_sync(kAllLanes, best.index, other);
      best.meet(v, index);
    }
    const int vote = own < rows && lane == 0 && best.value == best.value ? best.index : -1;
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
  const int64_t bytes = a.row_stride == a.classes ? a.classes * int64_t(sizeof(T)) : INT64_MAX;
  if (bytes <= kRowBytes<1>) return votes<T, 1>(a, device);
  return bytes <= kRowBytes<8> ? votes<T, 8>(a, device) : votes<T, kWarp>(a, device);
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
