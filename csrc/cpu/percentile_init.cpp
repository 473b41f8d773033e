// percentile_init: the quantile by selection on a copy of the magnitudes, then one scaling pass.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace csam {
namespace {

template <class T>
void one(const T* weight, int64_t n, double tau, T* out) {
  std::vector<T> magnitude(n);
  for (int64_t i = 0; i < n; ++i) magnitude[i] = std::abs(weight[i]);
  const double position = tau * double(n - 1);
  const int64_t low = int64_t(std::floor(position));
  std::nth_element(magnitude.begin(), magnitude.begin() + low, magnitude.end());
  T quantile = magnitude[low];
  if (low + 1 < n) {
    const T next = *std::min_element(magnitude.begin() + low + 1, magnitude.end());
    quantile += T(position - double(low)) * (next - quantile);
  }
  for (int64_t i = 0; i < n; ++i) {
    const T m = std::abs(weight[i]);
    out[i] = quantile > 0 ? std::min(m / quantile, T(1)) : T(m > 0);
  }
}

}  // namespace

void percentile_init(const void* weight, int64_t n, int dtype, double tau, void* out) {
  if (!n) return;
  if (dtype == kF64) one(static_cast<const double*>(weight), n, tau, static_cast<double*>(out));
  else one(static_cast<const float*>(weight), n, tau, static_cast<float*>(out));
}

}  // namespace csam
