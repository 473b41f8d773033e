// discrepancy: a thread takes whole rows; sums run over the classes in a fixed order, so no result depends on who takes
// a row, nor on the instruction set.
#include <math.h>
#include <stdlib.h>

#include "kernels.h"
#include "logits.h"

namespace csam {
namespace CSAM_ISA {

constexpr int64_t kLanes = 8;  // on every instruction set: their sums are added in the same order
typedef double Lanes __attribute__((vector_size(8 * kLanes)));
typedef uint64_t Bits __attribute__((vector_size(8 * kLanes)));

CSAM_INLINE Lanes product_sum(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#else
  for (int i = 0; i < kLanes; ++i) c[i] = ::fma(a[i], b[i], c[i]);
  return c;
#endif
}

// e^x for x <= 0 with an error of 1e-16 of it; 0 below 2^-1022; NaN of NaN. e^x = 2^n e^r with |r| <= ln(2) / 2, and
// e^r by its series, whose terms from r^14 on are below 2^-57.
CSAM_INLINE Lanes exponential(Lanes x) {
  const Lanes zero = {}, magic = zero + 0x1.8p52;
  const Lanes scaled = product_sum(x, zero + 0x1.71547652b82fep0, magic), n = scaled - magic;
  const Lanes r = product_sum(n, zero - 0x1.abc9e3b39803fp-56, product_sum(n, zero - 0x1.62e42fefa39efp-1, x));
  Lanes p = zero + 1.0 / 6227020800;
  constexpr double kTerms[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1,           1};
#pragma GCC unroll 13
  for (double term : kTerms) p = product_sum(p, r, zero + term);
  const Lanes power = (Lanes)((Bits)p + ((Bits)scaled << 52));  // n stands in the lowest bits of n + magic
  return x < -708 ? zero : x == x ? power : x;
}

// p = softmax(row) in double, filled up with zeros to whole lanes; returns the class of the largest, -1 where p is NaN.
template <class T>
static int64_t softmax(const T* row, int64_t classes, double* p) {
  const int64_t top = winner(row, classes);
  if (top < 0) return -1;
  const double most = value(row[top]);
  for (int64_t c = 0; c < classes; ++c) p[c] = value(row[c]) - most;
  for (int64_t c = classes; c % kLanes; ++c) p[c] = -INFINITY;
  Lanes sums = {};
  for (int64_t c = 0; c < classes; c += kLanes) {
    const Lanes e = exponential(load<Lanes>(p + c));
    sums += e;
    store(p + c, e);
  }
  double total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += sums[i];
  for (int64_t c = 0; c < classes; c += kLanes) store(p + c, load<Lanes>(p + c) / total);
  return total == total ? top : -1;  // NaN of infinite logits
}

template <class T>
static void compare(const DiscrepancyArgs& a, int threads) {
  double* clean = static_cast<double*>(malloc((a.classes + kLanes) * sizeof(double)));
  const int64_t prediction = softmax(a.clean, a.classes, clean);
#pragma omp parallel num_threads(threads)
  {
    double* p = static_cast<double*>(malloc((a.classes + kLanes) * sizeof(double)));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.n; ++i) {
      const int64_t top = softmax(static_cast<const T*>(a.logits) + i * a.row_stride, a.classes, p);
      const bool known = prediction >= 0 && top >= 0;
      double most = known ? 0 : NAN;
      if (known) {
        Lanes moves = {};
        for (int64_t c = 0; c < a.classes; c += kLanes) {
          const Lanes moved = load<Lanes>(p + c) - load<Lanes>(clean + c), size = moved < 0 ? -moved : moved;
          moves = size > moves ? size : moves;
        }
        for (int64_t j = 0; j < kLanes; ++j) most = moves[j] > most ? moves[j] : most;
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
