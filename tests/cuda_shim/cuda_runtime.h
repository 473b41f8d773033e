// Test-only stand-in for the CUDA runtime: a kernel compiled by g++ runs here block by block, each thread of a block a
// fiber. Barriers and warp collectives yield; one that not all threads reach aborts with its kind, so divergence shows.
// CSAM_SHIM_ORDER=reverse runs blocks and threads backwards: results must not depend on it.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

namespace shim {

struct Barrier {
  const char* kind;
  unsigned size, arrived = 0, generation = 0;
};
struct Warp {
  Barrier barrier{"warp collective", 32};
  uint64_t slots[2][32];
};
struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf place;
  bool started = false, done = false;
  Barrier* waits = nullptr;
  unsigned generation = 0;
};

constexpr size_t kStack = 128 << 10;
inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block{"__syncthreads", 0};
inline Fiber* running;
inline std::function<void()> body;

inline void yield() {
  if (!_setjmp(running->place)) _longjmp(scheduler, 1);
}

inline void wait(Barrier& b) {
  const unsigned generation = b.generation;
  if (++b.arrived == b.size) {
    b.arrived = 0;
    ++b.generation;
    return;
  }
  running->waits = &b;
  running->generation = generation;
  yield();
}

// A fiber lives on: each block of a launch finds it here.
inline void live() {
  for (;;) {
    body();
    running->done = true;
    yield();
  }
}

inline void start(Fiber& f) {
  ucontext_t context;
  getcontext(&context);
  f.stack.reset(new char[kStack]);
  f.started = true;
  context.uc_stack.ss_sp = f.stack.get();
  context.uc_stack.ss_size = kStack;
  makecontext(&context, live, 0);
  setcontext(&context);
}

inline void run_block(unsigned threads, bool reverse) {
  block = {"__syncthreads", threads};
  warps.assign(threads / 32, Warp{});
  if (fibers.empty()) fibers = std::vector<Fiber>(1024);
  for (Fiber& f : fibers) f.done = false, f.waits = nullptr;
  static unsigned left, i;  // not on the stack: they outlive a jump
  static bool progress;
  for (left = threads; left > 0;) {
    progress = false;
    for (i = 0; i < threads; ++i) {
      const unsigned t = reverse ? threads - 1 - i : i;
      Fiber& f = fibers[t];
      if (f.done || (f.waits && f.waits->generation == f.generation)) continue;
      f.waits = nullptr;
      progress = true;
      threadIdx = dim3(t);
      running = &f;
      if (!_setjmp(scheduler)) f.started ? _longjmp(f.place, 1) : start(f);
      left -= running->done;
    }
    if (progress) continue;
    for (const Fiber& f : fibers)
      if (f.waits) fprintf(stderr, "cuda_shim: %s not reached by all threads\n", f.waits->kind), abort();
  }
}

// What a lane of the warp gave; every lane must take part.
template <class T>
T exchange(unsigned mask, T value, unsigned lane) {
  if (mask != 0xFFFFFFFFu) fprintf(stderr, "cuda_shim: collective of part of a warp\n"), abort();
  Warp& w = warps[threadIdx.x / 32];
  uint64_t* slots = w.slots[w.barrier.generation & 1];
  memcpy(&slots[threadIdx.x % 32], &value, sizeof value);
  wait(w.barrier);
  memcpy(&value, &slots[lane % 32], sizeof value);
  return value;
}
}  // namespace shim

inline void __syncthreads() { shim::wait(shim::block); }
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int other) {
  return shim::exchange(mask, v, (threadIdx.x % 32) ^ other);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return shim::exchange(mask, v, lane < by ? lane : lane - by);
}
inline unsigned __match_any_sync(unsigned mask, int value) {
  shim::exchange(mask, value, 0);
  const shim::Warp& w = shim::warps[threadIdx.x / 32];
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    bits |= unsigned(int(w.slots[(w.barrier.generation - 1) & 1][lane]) == value) << lane;
  return bits;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline void sincospi(double x, double* s, double* c) { *s = sin(M_PI * x), *c = cos(M_PI * x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stwb(T* p, T v) {
  *p = v;
}
template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p += v;
  return old;
}

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... actual) {
  const char* order = getenv("CSAM_SHIM_ORDER");
  const bool reverse = order && !strcmp(order, "reverse");
  const std::tuple<Expected...> arguments(actual...);
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  shim::body = [&] { std::apply(kernel, arguments); };
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx = dim3(reverse ? gridDim.x - 1 - i : i);
    shim::run_block(blockDim.x, reverse);
  }
  return cudaSuccess;
}
