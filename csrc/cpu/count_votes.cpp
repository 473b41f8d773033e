// count_votes: a thread takes whole rows and counts into its own histogram; integer sums are exact in any order.
#include <stdlib.h>

#include "kernels.h"
#include "logits.h"

namespace csam {
namespace CSAM_ISA {

template <class T>
void count(const VoteArgs& a, int threads) {
  const T* logits = static_cast<const T*>(a.logits);
#pragma omp parallel num_threads(threads)
  {
    int64_t* own = static_cast<int64_t*>(calloc(a.classes, sizeof(int64_t)));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.n; ++i) {
      const int64_t w = winner(logits + i * a.row_stride, a.classes);
      if (w >= 0) ++own[w];
    }
#pragma omp critical(csam_votes)
    for (int64_t c = 0; c < a.classes; ++c) a.out[c] += own[c];
    free(own);
  }
}

void count_votes(const VoteArgs& a, int threads) {
  switch (a.dtype) {
    case kF32: return count<float>(a, threads);
    case kF64: return count<double>(a, threads);
    case kBF16: return count<Bf16>(a, threads);
    default: return count<F16>(a, threads);
  }
}

}  // namespace CSAM_ISA
}  // namespace csam
