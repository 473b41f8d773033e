// sample_conv2d: one convolution, its jobs shared among threads.
#include <omp.h>

#include <memory>

#include "sample_depthwise.h"
#include "sample_tiles.h"

namespace csam {
namespace CSAM_ISA {

template <class Kind>
static void run(Kind& c, const SampleConvArgs& a, int threads) {
  using Element = typename Kind::Element;
  c.lay();
  const Element *in = static_cast<const Element*>(a.x), *other = static_cast<const Element*>(a.other);
  Element* out = static_cast<Element*>(a.out);
  Sizes sizes;
  c.claim(sizes);
  const std::unique_ptr<Scratch[]> scratch(new Scratch[threads]);  // here, where memory may run out
  for (int t = 0; t < threads; ++t) scratch[t] = sizes.make();
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t job = 0; job < c.jobs(a.samples); ++job)
    c.run(job, in, other, out, a.samples, scratch[omp_get_thread_num()]);
}

template <class Format>
static void convolve(const SampleConvArgs& a, int threads) {
  if (Depthwise<Format>::serves(a)) {
    Depthwise<Format> c(a);
    return run(c, a, threads);
  }
  const int64_t places = tiles(a.out_height, 8) * tiles(a.out_width, 8) * tiles(a.samples, Format::kLanes);
  const int64_t shares = tiles(threads, places ? places : 1);
  if constexpr (kTiled<Format>)
    if (a.engine != kSparse) {
      TiledConvolution<Format> c(a, shares);
      return run(c, a, threads);
    }
  Convolution<Format> c(a, shares);
  run(c, a, threads);
}

void sample_conv2d(const SampleConvArgs& a, int threads) {
  if (a.dtype == kF32) return convolve<Float32>(a, threads);
#if defined(__AVX512F__)
  if (__builtin_cpu_supports("avx512bf16")) return convolve<Bfloat16Pairs>(a, threads);
#endif
  convolve<Bfloat16>(a, threads);
}

#if defined(__AVX512F__)
void sample_conv2d_tiles(const SampleConvArgs& a, int threads) {
  if (a.dtype == kF32) return convolve<Float32>(a, threads);
  convolve<Bfloat16Tiles>(a, threads);
}
#endif

}  // namespace CSAM_ISA
}  // namespace csam
