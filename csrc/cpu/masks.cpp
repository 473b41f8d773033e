// The multi-tensor mask passes: effective_weights, perturb_masks, mask_gradients.
// A thread takes fixed chunks of kChunk weights; inside, blocks of kBlock values stay in the first-level cache while
// they are widened, perturbed, multiplied and narrowed. Sums are taken chunk by chunk in a fixed order, so their bits
// do not depend on the number of threads.
#include <stdlib.h>

#include "kernels.h"
#include "random.h"

namespace csam {
namespace CSAM_ISA {

constexpr int64_t kBlock = 1024;  // values; a multiple of 4*W for every ISA
constexpr int64_t kChunk = 65536;

template <class From>
CSAM_INLINE void widen16(const uint16_t* in, int64_t n, float* out, From from) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, from(load<vh>(in + i)));
  if (i < n) {
    uint16_t last[W] = {};
    memcpy(last, in + i, 2 * (n - i));
    float wide[W];
    store(wide, from(load<vh>(last)));
    memcpy(out + i, wide, 4 * (n - i));
  }
}

// n values at `offset` as compute type T (float or double): the memory itself where it has that type, else `buffer`.
CSAM_INLINE const float* widen(const void* p, int dtype, int64_t offset, int64_t n, float* buffer) {
  switch (dtype) {
    case kF32: return static_cast<const float*>(p) + offset;
    case kBF16: widen16(static_cast<const uint16_t*>(p) + offset, n, buffer, [](vh h) { return from_bf16(h); }); break;
    case kF16: widen16(static_cast<const uint16_t*>(p) + offset, n, buffer, [](vh h) { return from_f16(h); }); break;
    case kF64:
      for (int64_t i = 0; i < n; ++i) buffer[i] = float(static_cast<const double*>(p)[offset + i]);
      break;
    default:
      for (int64_t i = 0; i < n; ++i) buffer[i] = float(static_cast<const uint8_t*>(p)[offset + i]);
  }
  return buffer;
}
CSAM_INLINE const double* widen(const void* p, int dtype, int64_t offset, int64_t n, double* buffer) {
  if (dtype == kF64) return static_cast<const double*>(p) + offset;
  float narrow_buffer[kBlock] = {};
  const float* v = widen(p, dtype, offset, n, narrow_buffer);
  for (int64_t i = 0; i < n; ++i) buffer[i] = v[i];
  return buffer;
}

template <class To>
CSAM_INLINE void narrow16(const float* in, int64_t n, uint16_t* out, To to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, to(load<vf>(in + i)));
  if (i < n) {
    float last[W] = {};
    memcpy(last, in + i, 4 * (n - i));
    uint16_t h[W];
    store(h, to(load<vf>(last)));
    memcpy(out + i, h, 2 * (n - i));
  }
}
CSAM_INLINE void narrow(const float* in, void* p, int dtype, int64_t offset, int64_t n) {
  switch (dtype) {
    case kF32: memcpy(static_cast<float*>(p) + offset, in, 4 * n); break;
    case kBF16: narrow16(in, n, static_cast<uint16_t*>(p) + offset, [](vf v) { return to_bf16(v); }); break;
    case kF16: narrow16(in, n, static_cast<uint16_t*>(p) + offset, [](vf v) { return to_f16(v); }); break;
    default:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(p)[offset + i] = in[i];
  }
}
CSAM_INLINE void narrow(const double* in, void* p, int dtype, int64_t offset, int64_t n) {
  if (dtype == kF64) {
    memcpy(static_cast<double*>(p) + offset, in, 8 * n);
    return;
  }
  float buffer[kBlock];
  for (int64_t i = 0; i < n; ++i) buffer[i] = float(in[i]);
  narrow(buffer, p, dtype, offset, n);
}

CSAM_INLINE int64_t mask_size(const MaskLayout& l) {
  const int64_t a_row = l.col_stride ? (l.cols + l.span - 1) / l.span : 1;
  return l.row_stride ? l.rows * a_row : a_row;
}

// Spread broadcast mask values over weights offset .. offset+n-1.
template <class T>
CSAM_INLINE void spread(const T* mask, const MaskLayout& l, int64_t offset, int64_t n, T* out) {
  int64_t done = 0;
  while (done < n) {
    const int64_t row = (offset + done) / l.cols, col = (offset + done) % l.cols;
    const int64_t group = col / l.span;
    int64_t run = (group + 1) * l.span < l.cols ? (group + 1) * l.span - col : l.cols - col;
    if (run > n - done) run = n - done;
    const T value = mask[row * l.row_stride + group * l.col_stride];
    for (int64_t i = 0; i < run; ++i) out[done + i] = value;
    done += run;
  }
}

// use(i, u) for every W values of the uniform noise at offset .. offset+n-1 of one layer, the last perhaps past the
// end; offset is a multiple of kBlock.
template <class Use>
CSAM_INLINE void uniform_noise(const MaskPass& pass, int64_t layer, int64_t offset, int64_t n, Use use) {
  const float scale = float(pass.layers[layer].scale);
  Counter c;
  counter(pass.seed, pass.step, uint32_t(layer), kPerturbDomain, c);
  for (int64_t i = 0; i < n; i += 4 * W) {
    const WordVectors w = philox(uint32_t((offset + i) / 4), c);
    vu ordered[4];
    interleave(w.v, ordered);
    for (int j = 0; j < 4 && i + j * W < n; ++j) use(i + j * W, to_float((vi)ordered[j]) * scale);
  }
}

// C~ of mask values offset .. offset+n-1 of one layer; offset is a multiple of kBlock.
CSAM_INLINE void perturb(const MaskPass& pass, int64_t layer, const float* mask, int64_t offset, int64_t n,
                         float* out) {
  const MaskLayer& l = pass.layers[layer];
  const float scale = float(l.scale);
  if (pass.kind == kUniform) {
    uniform_noise(pass, layer, offset, n, [&](int64_t e, vf u) {
      if (e + W <= n) {
        store(out + e, clip01(load<vf>(mask + e) + u));
      } else {
        for (int64_t t = e; t < n; ++t) out[t] = csam::clip01(mask[t] + u[t - e]);
      }
    });
    return;
  }
  float buffer[kBlock];
  const float* g = widen(l.grad, pass.grad_dtype, offset, n, buffer);
  for (int64_t i = 0; i < n; ++i) out[i] = csam::clip01(mask[i] + scale * g[i]);
}
CSAM_INLINE void perturb(const MaskPass& pass, int64_t layer, const double* mask, int64_t offset, int64_t n,
                         double* out) {
  const MaskLayer& l = pass.layers[layer];
  double buffer[kBlock];
  const double* g = pass.kind == kAdversarial ? widen(l.grad, pass.grad_dtype, offset, n, buffer) : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    double push;
    if (g) {
      push = l.scale * g[i];
    } else {
      const uint64_t e = offset + i;
      const Words start = {{uint32_t(e / 4), uint32_t(pass.step), uint32_t(pass.step >> 32), uint32_t(layer)}};
      const Words w = philox4x32(start, uint32_t(pass.seed), uint32_t(pass.seed >> 32) ^ kPerturbDomain);
      push = double(int32_t(w.v[e % 4])) * l.scale;
    }
    const double v = mask[i] + push;
    out[i] = v < 0 ? 0 : v > 1 ? 1 : v;
  }
}

// Run body(layer, first, count) over all chunks of all layers.
template <class Body>
CSAM_INLINE void for_chunks(const MaskPass& pass, int threads, const int64_t* sizes, Body body) {
  int64_t chunks = 0;
  for (int64_t l = 0; l < pass.count; ++l) chunks += (sizes[l] + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t c = 0; c < chunks; ++c) {
    int64_t layer = 0, rest = c;
    while (rest >= (sizes[layer] + kChunk - 1) / kChunk) rest -= (sizes[layer++] + kChunk - 1) / kChunk;
    const int64_t first = rest * kChunk;
    const int64_t count = sizes[layer] - first < kChunk ? sizes[layer] - first : kChunk;
    body(layer, first, count, c);
  }
}

struct Sizes {
  int64_t* v;
  explicit Sizes(int64_t n) : v(static_cast<int64_t*>(malloc(sizeof(int64_t) * (n + 1)))) {}
  ~Sizes() { free(v); }
};

template <class T>
void perturb_all(const MaskPass& pass, int threads) {
  Sizes sizes(pass.count);
  for (int64_t l = 0; l < pass.count; ++l) sizes.v[l] = mask_size(pass.layers[l].layout);
  for_chunks(pass, threads, sizes.v, [&](int64_t layer, int64_t first, int64_t count, int64_t) {
    T* out = static_cast<T*>(pass.layers[layer].out);
    const T* mask = static_cast<const T*>(pass.layers[layer].mask);
    for (int64_t b = 0; b < count; b += kBlock) {
      const int64_t n = count - b < kBlock ? count - b : kBlock, at = first + b;
      perturb(pass, layer, mask + at, at, n, out + at);
    }
  });
}

void perturb_masks(const MaskPass& pass, int threads) {
  if (pass.mask_dtype == kF64) perturb_all<double>(pass, threads);
  else perturb_all<float>(pass, threads);
}

// The case of training in bfloat16: from float32 weights and masks to the rounded product in registers; n is a multiple
// of W.
CSAM_INLINE void product_to_bf16(const MaskPass& pass, int64_t layer, int64_t offset, int64_t n) {
  const MaskLayer& l = pass.layers[layer];
  const float* weight = static_cast<const float*>(l.weight) + offset;
  const float* mask = static_cast<const float*>(l.mask) + offset;
  const float* grad = static_cast<const float*>(l.grad) + offset;
  uint16_t* out = static_cast<uint16_t*>(l.out) + offset;
  const vf scale = splat(float(l.scale));
  if (pass.kind == kUniform)
    uniform_noise(pass, layer, offset, n, [&](int64_t e, vf u) {
      store(out + e, to_bf16(load<vf>(weight + e) * clip01(load<vf>(mask + e) + u)));
    });
  else if (pass.kind == kAdversarial)
    for (int64_t e = 0; e < n; e += W)
      store(out + e, to_bf16(load<vf>(weight + e) * clip01(load<vf>(mask + e) + scale * load<vf>(grad + e))));
  else
    for (int64_t e = 0; e < n; e += W) store(out + e, to_bf16(load<vf>(weight + e) * load<vf>(mask + e)));
}

// Masks that are broadcast are perturbed beforehand (they are small): here kind is plain for them.
template <class T>
void effective_all(const MaskPass& pass, int threads) {
  Sizes sizes(pass.count);
  for (int64_t l = 0; l < pass.count; ++l) sizes.v[l] = pass.layers[l].layout.rows * pass.layers[l].layout.cols;
  for_chunks(pass, threads, sizes.v, [&](int64_t layer, int64_t first, int64_t count, int64_t) {
    const MaskLayer& l = pass.layers[layer];
    const bool full = elementwise(l.layout);
    const bool in_registers = full && pass.weight_dtype == kF32 && pass.mask_dtype == kF32 && pass.out_dtype == kBF16 &&
                              (pass.kind != kAdversarial || pass.grad_dtype == kF32);
    alignas(64) T wide_weight[kBlock], wide_mask[kBlock], noisy[kBlock], product[kBlock];
    for (int64_t b = 0; b < count; b += kBlock) {
      const int64_t n = count - b < kBlock ? count - b : kBlock, at = first + b;
      if (in_registers && n % W == 0) {
        product_to_bf16(pass, layer, at, n);
        continue;
      }
      const T* w = widen(l.weight, pass.weight_dtype, at, n, wide_weight);
      const T* m;
      if (full) {
        m = widen(l.mask, pass.mask_dtype, at, n, wide_mask);
        if (pass.kind != kPlain) {
          perturb(pass, layer, m, at, n, noisy);
          m = noisy;
        }
      } else {  // small masks were widened to T by the caller
        spread(static_cast<const T*>(l.mask), l.layout, at, n, wide_mask);
        m = wide_mask;
      }
      for (int64_t i = 0; i < n; ++i) product[i] = w[i] * m[i];
      narrow(product, l.out, pass.out_dtype, at, n);
    }
  });
}

void effective_weights(const MaskPass& pass, int threads) {
  if (pass.weight_dtype == kF64) effective_all<double>(pass, threads);
  else effective_all<float>(pass, threads);
}

// dL/dM of a broadcast mask: sums over rows and spans, each mask value by one thread in a fixed order.
template <class T>
void reduce_broadcast(const MaskPass& pass, const MaskLayer& l, int threads) {
  const MaskLayout& y = l.layout;
  T* dmask = static_cast<T*>(l.out_mask);
  const T* weight = static_cast<const T*>(l.weight);
  const int64_t groups = y.col_stride ? (y.cols + y.span - 1) / y.span : 1;
  const int64_t span = y.col_stride ? y.span : y.cols;
  const int64_t owners = y.row_stride ? y.rows : groups;  // parallel over what owns its results
  const int64_t grain = 1 + 16384 / (1 + (y.row_stride ? y.cols : y.rows * span));
#pragma omp parallel for schedule(dynamic, grain) num_threads(threads)
  for (int64_t o = 0; o < owners; ++o) {
    const int64_t row0 = y.row_stride ? o : 0, row1 = y.row_stride ? o + 1 : y.rows;
    const int64_t g0 = y.row_stride ? 0 : o, g1 = y.row_stride ? groups : o + 1;
    for (int64_t g = g0; g < g1; ++g) {
      double total = 0;
      const int64_t c0 = g * span, c1 = c0 + span < y.cols ? c0 + span : y.cols;
      for (int64_t row = row0; row < row1; ++row)
        for (int64_t at = row * y.cols + c0; at < row * y.cols + c1; at += kBlock) {
          const int64_t end = row * y.cols + c1;
          const int64_t n = end - at < kBlock ? end - at : kBlock;
          T buffer[kBlock];
          const T* grad = widen(l.grad, pass.grad_dtype, at, n, buffer);
          double part = 0;
          for (int64_t i = 0; i < n; ++i) part += double(grad[i]) * double(weight[at + i]);
          total += part;
        }
      dmask[row0 * y.row_stride + g * y.col_stride] = T(total);
    }
  }
}

// Products of one block; returns the block's sum of squares of dL/dM, in double: small gradients' squares underflow.
CSAM_INLINE double products(const float* g, const float* w, const float* m, int64_t n, float* dtheta, float* dmask) {
  vd squares[2] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) {
      const int64_t e = i + j * W;
      const vf grad = load<vf>(g + e), dm = grad * load<vf>(w + e);
      if (dtheta) store(dtheta + e, grad * load<vf>(m + e));
      if (dmask) store(dmask + e, dm);
      vhalf halves[2];
      memcpy(halves, &dm, sizeof dm);
      for (int h = 0; h < 2; ++h) {
        const vd wide = __builtin_convertvector(halves[h], vd);
        squares[h] += wide * wide;
      }
    }
  double total = sum(squares[0] + squares[1]);
  for (; i < n; ++i) {
    const float dm = g[i] * w[i];
    if (dtheta) dtheta[i] = g[i] * m[i];
    if (dmask) dmask[i] = dm;
    total += double(dm) * dm;
  }
  return total;
}
CSAM_INLINE double products(const double* g, const double* w, const double* m, int64_t n, double* dtheta,
                            double* dmask) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double dm = g[i] * w[i];
    if (dtheta) dtheta[i] = g[i] * m[i];
    if (dmask) dmask[i] = dm;
    total += dm * dm;
  }
  return total;
}

template <class T>
double gradients_all(const MaskPass& pass, int threads) {
  Sizes sizes(pass.count);
  int64_t chunks = 0;
  for (int64_t l = 0; l < pass.count; ++l) {
    const MaskLayout& y = pass.layers[l].layout;
    // A broadcast mask needs this pass for dL/dtheta alone; its dL/dM is reduced below.
    sizes.v[l] = elementwise(y) || pass.layers[l].out ? y.rows * y.cols : 0;
    chunks += (sizes.v[l] + kChunk - 1) / kChunk;
  }
  double* partial = static_cast<double*>(calloc(chunks + 1, sizeof(double)));
  for_chunks(pass, threads, sizes.v, [&](int64_t layer, int64_t first, int64_t count, int64_t chunk) {
    const MaskLayer& l = pass.layers[layer];
    const bool full = elementwise(l.layout);
    alignas(64) T wide_grad[kBlock], wide_mask[kBlock];
    T* dtheta = static_cast<T*>(l.out);
    T* dmask = full ? static_cast<T*>(l.out_mask) : nullptr;
    double total = 0;
    for (int64_t b = 0; b < count; b += kBlock) {
      const int64_t n = count - b < kBlock ? count - b : kBlock, at = first + b;
      const T* g = widen(l.grad, pass.grad_dtype, at, n, wide_grad);
      const T* w = static_cast<const T*>(l.weight) + at;
      const T* m = wide_mask;
      if (dtheta && full) m = widen(l.mask, pass.mask_dtype, at, n, wide_mask);
      else if (dtheta) spread(static_cast<const T*>(l.mask), l.layout, at, n, wide_mask);
      total += products(g, w, m, n, dtheta ? dtheta + at : nullptr, dmask ? dmask + at : nullptr);
    }
    if (full) partial[chunk] = total;
  });
  double norm = 0;
  for (int64_t c = 0; c < chunks; ++c) norm += partial[c];
  free(partial);
  for (int64_t l = 0; l < pass.count; ++l) {
    const MaskLayer& layer = pass.layers[l];
    if (elementwise(layer.layout) || !layer.out_mask) continue;
    reduce_broadcast<T>(pass, layer, threads);
    const T* dmask = static_cast<const T*>(layer.out_mask);
    const int64_t n = mask_size(layer.layout);
    for (int64_t i = 0; i < n; ++i) norm += double(dmask[i]) * dmask[i];
  }
  return norm;
}

double mask_gradients(const MaskPass& pass, int threads) {
  return pass.weight_dtype == kF64 ? gradients_all<double>(pass, threads) : gradients_all<float>(pass, threads);
}

}  // namespace CSAM_ISA
}  // namespace csam
