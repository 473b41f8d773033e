// What the kernels share: launching, vector memory accesses, warp and block sums.
#pragma once
#include "kernels.h"

namespace csam::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kWarp = 32;

// Launch a persistent grid: as many blocks as stay resident, fewer when there is less work.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int resident, Device device,
                   Arguments... arguments) {
  if (blocks <= 0) return cudaSuccess;
  const int64_t most = int64_t(device.multiprocessors) * resident;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks < most ? blocks : most));
  config.blockDim = dim3(unsigned(threads));
  config.stream = device.stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

inline bool aligned(const void* p, unsigned bytes = 16) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

__host__ __device__ inline int element_size(int dtype) { return dtype == kF32 ? 4 : dtype == kBool ? 1 : 2; }

constexpr int kGroup = 8;

// Eight values as they lie in memory.
struct Raw {
  uint32_t w[kGroup];
};

__device__ inline Raw load_raw(const void* p, int dtype, int64_t at, int n, bool vector) {
  Raw raw;
  const int bytes = element_size(dtype);
  if (vector) {
    const char* from = static_cast<const char*>(p) + at * bytes;
    if (bytes == 1) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      raw.w[0] = v.x, raw.w[1] = v.y;
    } else {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      raw.w[0] = v.x, raw.w[1] = v.y, raw.w[2] = v.z, raw.w[3] = v.w;
    }
    if (bytes == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from + 16);
      raw.w[4] = v.x, raw.w[5] = v.y, raw.w[6] = v.z, raw.w[7] = v.w;
    }
    return raw;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) raw.w[i] = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i >= n) continue;
    if (bytes == 4) raw.w[i] = static_cast<const uint32_t*>(p)[at + i];
    else if (bytes == 2) raw.w[i / 2] |= uint32_t(static_cast<const uint16_t*>(p)[at + i]) << (16 * (i % 2));
    else raw.w[i / 4] |= uint32_t(static_cast<const uint8_t*>(p)[at + i]) << (8 * (i % 4));
  }
  return raw;
}

__device__ inline void widen(const Raw& raw, int dtype, float out[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const uint16_t half = uint16_t(raw.w[i / 2] >> (16 * (i % 2)));
    if (dtype == kF32) out[i] = bits_float(raw.w[i]);
    else if (dtype == kBF16) out[i] = from_bf16(half);
    else if (dtype == kF16) out[i] = from_f16(half);
    else out[i] = float((raw.w[i / 4] >> (8 * (i % 4))) & 0xFF);
  }
}

__device__ inline uint32_t pack(uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; }

// Eight values as one or two 16-byte stores. __stwb is the plain store, but one that the compiler does not split: it
// made scalar stores of `*p = v` where v comes out of branches.
template <int dtype>
__device__ inline void store8(void* out, int64_t at, const float v[8]) {
  if constexpr (dtype == kF32) {
    float4* p = reinterpret_cast<float4*>(static_cast<float*>(out) + at);
    __stwb(p, make_float4(v[0], v[1], v[2], v[3]));
    __stwb(p + 1, make_float4(v[4], v[5], v[6], v[7]));
  } else {
    uint16_t h[8];
    for (int i = 0; i < 8; ++i) h[i] = dtype == kBF16 ? to_bf16(v[i]) : to_f16(v[i]);
    __stwb(reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + at),
           make_uint4(pack(h[0], h[1]), pack(h[2], h[3]), pack(h[4], h[5]), pack(h[6], h[7])));
  }
}
template <int dtype>
__device__ inline void store1(void* out, int64_t at, float v) {
  if constexpr (dtype == kF32) static_cast<float*>(out)[at] = v;
  else static_cast<uint16_t*>(out)[at] = dtype == kBF16 ? to_bf16(v) : to_f16(v);
}

template <class T>
__device__ inline T warp_sum(T v) {
  for (int other = kWarp / 2; other > 0; other /= 2) v += __shfl_xor_sync(kAllLanes, v, other);
  return v;
}

// Sum over a block of THREADS threads in a fixed order; the result is thread 0's. Every thread must call it.
template <int THREADS, class T>
__device__ inline T block_sum(T v) {
  __shared__ T parts[THREADS / kWarp];
  v = warp_sum(v);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = v;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < THREADS / kWarp; ++w) v += parts[w];
  __syncthreads();
  return v;
}

}  // namespace csam::cuda
