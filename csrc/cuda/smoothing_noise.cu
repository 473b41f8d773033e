// smoothing_noise: a thread takes eight pixels of every plane (one plane, or the three channels of a channels_last
// image) of two samples at a time: image values are loaded once, noise is drawn, added and rounded in registers, and
// leaves in 16-byte stores. Shapes that do not divide so are written value by value, a quad of the generator a thread.
// philox_uniform: a quad a thread.
#include "../common/normal.h"
#include "device.h"

namespace csam::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kResident = 8;
constexpr int resident(int planes) { return planes == 1 ? 6 : 4; }  // leaves 80 and 128 registers a thread

template <int law>
__device__ inline void quad_deviates(int64_t quad, uint64_t sample, const NoiseArgs& a, float out[4]) {
  const Words start = {{uint32_t(quad), uint32_t(sample), uint32_t(sample >> 32), a.stream}};
  deviates<Law(law)>(philox4x32(start, uint32_t(a.seed), uint32_t(a.seed >> 32)), out);
}

// PLANES == 1: out[i][e], pixels stands for all elements. PLANES == 3: out[i][pixel][channel].
template <int dtype, int PLANES, int law, int COPIES>
__device__ inline void noisy_group(const NoiseArgs& a, int64_t pixels, int64_t group, int64_t sample, int copies) {
  float x[PLANES][kGroup];
  for (int plane = 0; plane < PLANES; ++plane) {
    const float4* in = reinterpret_cast<const float4*>(a.x + plane * pixels + group * kGroup);
    const float4 low = __ldg(in), high = __ldg(in + 1);
    x[plane][0] = low.x, x[plane][1] = low.y, x[plane][2] = low.z, x[plane][3] = low.w;
    x[plane][4] = high.x, x[plane][5] = high.y, x[plane][6] = high.z, x[plane][7] = high.w;
  }
#pragma unroll
  for (int copy = 0; copy < COPIES; ++copy) {
    if (copy >= copies) break;
    float noisy[PLANES * kGroup];
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float eps[4];
        quad_deviates<law>((plane * pixels + group * kGroup) / 4 + half, a.first_sample + sample + copy, a, eps);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          noisy[(4 * half + j) * PLANES + plane] = fmaf(a.scale, eps[j], x[plane][4 * half + j]);
      }
    const int64_t at = ((sample + copy) * pixels + group * kGroup) * PLANES;
#pragma unroll
    for (int part = 0; part < PLANES; ++part) store8<dtype>(a.out, at + part * kGroup, noisy + part * kGroup);
  }
}

template <int dtype, int PLANES, int law>
__global__ void __launch_bounds__(kThreads, resident(PLANES)) noise_kernel(NoiseArgs a, int64_t pixels) {
  constexpr int COPIES = PLANES == 1 ? 2 : 1;
  const int64_t groups = pixels / kGroup, stride = int64_t(gridDim.x) * kThreads;
  const int64_t sample_step = stride / groups * COPIES, group_step = stride % groups;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  int64_t sample = first / groups * COPIES, group = first % groups;
  while (sample < a.n) {
    const int64_t left = a.n - sample;
    noisy_group<dtype, PLANES, law, COPIES>(a, pixels, group, sample, left < COPIES ? int(left) : COPIES);
    sample += sample_step;
    group += group_step;
    if (group >= groups) group -= groups, sample += COPIES;
  }
}

template <int dtype, int law>
__global__ void __launch_bounds__(kThreads, kResident) ragged_noise_kernel(NoiseArgs a) {
  const int64_t elements = a.channels * a.pixels, quads = (elements + 3) / 4;
  const int64_t stride = int64_t(gridDim.x) * kThreads, first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t sample_step = stride / quads, quad_step = stride % quads;
  int64_t sample = first / quads, quad = first % quads;
  while (sample < a.n) {
    float eps[4];
    quad_deviates<law>(quad, a.first_sample + sample, a, eps);
    for (int j = 0; j < 4; ++j) {
      const int64_t e = 4 * quad + j;
      if (e >= elements) break;
      const int64_t at = a.channels_last ? e % a.pixels * a.channels + e / a.pixels : e;
      store1<dtype>(a.out, sample * elements + at, fmaf(a.scale, eps[j], a.x[e]));
    }
    sample += sample_step;
    quad += quad_step;
    if (quad >= quads) quad -= quads, ++sample;
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    uniform_kernel(float* out, int64_t n, int64_t k, uint64_t seed, uint64_t first, uint32_t stream) {
  const int64_t quads = (k + 3) / 4, stride = int64_t(gridDim.x) * kThreads;
  for (int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x; t < n * quads; t += stride) {
    const int64_t i = t / quads, quad = t % quads;
    const uint64_t sample = first + i;
    const Words start = {{uint32_t(quad), uint32_t(sample), uint32_t(sample >> 32), stream}};
    const Words w = philox4x32(start, uint32_t(seed), uint32_t(seed >> 32) ^ kUniformDomain);
    for (int j = 0; j < 4 && 4 * quad + j < k; ++j) out[i * k + 4 * quad + j] = float(w.v[j] >> 8) * 0x1p-24f;
  }
}

int64_t blocks_for(int64_t items) { return (items + kThreads - 1) / kThreads; }

template <int dtype, int law>
cudaError_t noise(const NoiseArgs& a, Device device) {
  const bool interleaved = a.channels_last && a.channels > 1 && a.pixels > 1;
  const int64_t elements = a.channels * a.pixels, pixels = interleaved ? a.pixels : elements;
  if (!a.n || !elements) return cudaSuccess;
  const int64_t items = a.n * (pixels / kGroup);
  const bool whole = pixels % kGroup == 0 && aligned(a.x) && aligned(a.out);
  if (whole && !interleaved)
    return launch(noise_kernel<dtype, 1, law>, blocks_for((items + 1) / 2), kThreads, resident(1), device, a, pixels);
  if (whole && a.channels == 3)
    return launch(noise_kernel<dtype, 3, law>, blocks_for(items), kThreads, resident(3), device, a, pixels);
  return launch(ragged_noise_kernel<dtype, law>, blocks_for(a.n * ((elements + 3) / 4)), kThreads, kResident, device,
                a);
}

template <int law>
cudaError_t noise(const NoiseArgs& a, Device device) {
  switch (a.dtype) {
    case kF32: return noise<kF32, law>(a, device);
    case kBF16: return noise<kBF16, law>(a, device);
    default: return noise<kF16, law>(a, device);
  }
}

}  // namespace

cudaError_t smoothing_noise(const NoiseArgs& a, Device device) {
  switch (a.law) {
    case Law::kUniform: return noise<int(Law::kUniform)>(a, device);
    case Law::kLaplace: return noise<int(Law::kLaplace)>(a, device);
    default: return noise<int(Law::kGaussian)>(a, device);
  }
}

cudaError_t philox_uniform(float* out, int64_t n, int64_t k, uint64_t seed, uint64_t first, uint32_t stream,
                           Device device) {
  const int64_t blocks = blocks_for(n * ((k + 3) / 4));
  return launch(uniform_kernel, blocks, kThreads, kResident, device, out, n, k, seed, first, stream);
}

}  // namespace csam::cuda
