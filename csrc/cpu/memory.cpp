// Sums of squares, and the memory of large results.
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"

namespace csam {
namespace {

constexpr int64_t kChunk = 65536;

template <class T>
double squares(const T* g, int64_t n, int threads) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  std::vector<double> partial(chunks, 0.0);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < chunks; ++c) {
    double lane[8] = {};
    const int64_t end = std::min(n, (c + 1) * kChunk);
    int64_t i = c * kChunk;
    for (; i + 8 <= end; i += 8)
      for (int j = 0; j < 8; ++j) lane[j] += double(g[i + j]) * g[i + j];
    for (; i < end; ++i) lane[0] += double(g[i]) * g[i];
    for (double v : lane) partial[c] += v;
  }
  double total = 0;
  for (double p : partial) total += p;
  return total;
}

}  // namespace

// Sum over fixed chunks in a fixed order: the same bits for any number of threads.
double squared_norm(const void* g, int64_t n, int dtype, int threads) {
  return dtype == kF64 ? squares(static_cast<const double*>(g), n, threads)
                       : squares(static_cast<const float*>(g), n, threads);
}

// A first touch is a page fault every 4 KiB, and a fault costs more than writing the page, so blocks for large results
// lie on huge pages and are used again.
namespace {

constexpr int64_t kHuge = 2 << 20;
constexpr int64_t kMostIdle = int64_t(256) << 20;  // what is kept beyond this goes back to the system

struct Pool {
  std::mutex lock;
  std::multimap<int64_t, void*> idle;
  int64_t idle_bytes = 0;
};
Pool& pool() {
  static Pool* p = new Pool;  // never destroyed: tensors may outlive the module
  return *p;
}

}  // namespace

int64_t block_size(int64_t bytes) { return (bytes + kHuge - 1) / kHuge * kHuge; }

void* take_block(int64_t bytes) {
  const int64_t size = block_size(bytes);
  {
    Pool& p = pool();
    std::lock_guard<std::mutex> guard(p.lock);
    const auto found = p.idle.lower_bound(size);
    if (found != p.idle.end() && found->first == size) {
      void* block = found->second;
      p.idle.erase(found);
      p.idle_bytes -= size;
      return block;
    }
  }
  void* block = aligned_alloc(kHuge, size);
  if (!block) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(block, size, MADV_HUGEPAGE);
#endif
  return block;
}

void give_block(void* block, int64_t bytes) {
  const int64_t size = block_size(bytes);
  Pool& p = pool();
  std::lock_guard<std::mutex> guard(p.lock);
  if (p.idle_bytes + size > kMostIdle) return free(block);
  p.idle.emplace(size, block);
  p.idle_bytes += size;
}

}  // namespace csam
