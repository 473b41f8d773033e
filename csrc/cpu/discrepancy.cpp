// discrepancy: a thread takes whole rows; sums run over the classes in order, so no result depends on who takes a row.
#include <math.h>
#include <stdlib.h>

#include "kernels.h"
#include "logits.h"

namespace csam {
namespace CSAM_ISA {

// p = softmax(row) in double; returns the class of the largest, -1 where p is NaN.
template <class T>
static int64_t softmax(const T* row, int64_t classes, double* p) {
  const int64_t top = winner(row, classes);
  if (top < 0) return -1;
  const double most = value(row[top]);
  double total = 0;
  for (int64_t c = 0; c < classes; ++c) total += p[c] = exp(value(row[c]) - most);
  for (int64_t c = 0; c < classes; ++c) p[c] /= total;
  return total == total ? top : -1;  // NaN of infinite logits
}

template <class T>
static void compare(const DiscrepancyArgs& a, int threads) {
  double* clean = static_cast<double*>(malloc(a.classes * sizeof(double)));
  const int64_t prediction = softmax(a.clean, a.classes, clean);
#pragma omp parallel num_threads(threads)
  {
    double* p = static_cast<double*>(malloc(a.classes * sizeof(double)));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.n; ++i) {
      const int64_t top = softmax(static_cast<const T*>(a.logits) + i * a.row_stride, a.classes, p);
      const bool known = prediction >= 0 && top >= 0;
      double most = known ? 0 : NAN;
      if (known)
        for (int64_t c = 0; c < a.classes; ++c) {
          const double moved = fabs(p[c] - clean[c]);
          most = moved > most ? moved : most;
        }
      a.out[i] = most;
      a.changed[i] = known && top != prediction;
    }
    free(p);
  }
  free(clean);
}

void discrepancy(const DiscrepancyArgs& a, int threads) {
  switch (a.dtype) {
    case kF32: return compare<float>(a, threads);
    case kF64: return compare<double>(a, threads);
    case kBF16: return compare<Bf16>(a, threads);
    default: return compare<F16>(a, threads);
  }
}

}  // namespace CSAM_ISA
}  // namespace csam
