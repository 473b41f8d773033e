// semantic_batch: a thread takes whole copies; one bilinear gather, then blur in two passes where asked for, then the
// photometric map in place, all while the copy is in cache. A tap is one load of four channels.
#include <math.h>
#include <stdlib.h>

#include "kernels.h"
#include "simd.h"

namespace csam {
namespace CSAM_ISA {

constexpr int kColumns = 8;
constexpr int kChannels = 4;  // that lie side by side
typedef float v4 __attribute__((vector_size(4 * kChannels)));

// The image with its channels innermost, in groups of four, and zeros around it: one before, two after each line.
struct Bordered {
  const float* values;
  int64_t stride, group;  // values from a line to the next, from a group of channels to the next
};

static Bordered bordered(const SemanticArgs& a) {
  const int64_t stride = kChannels * (a.width + 3), group = stride * (a.height + 3);
  const int64_t groups = (a.channels + kChannels - 1) / kChannels;
  float* values = static_cast<float*>(calloc(groups * group, sizeof(float)));
  for (int64_t c = 0; c < a.channels; ++c)
    for (int64_t v = 0; v < a.height; ++v) {
      float* line = values + c / kChannels * group + (v + 1) * stride + kChannels + c % kChannels;
      for (int64_t u = 0; u < a.width; ++u) line[kChannels * u] = a.x[(c * a.height + v) * a.width + u];
    }
  return {values, stride, group};
}

// Where W output pixels read: the first of four taps, and how much of it and of the next one each way. What lies
// outside is drawn into the border, where taps of any weight are 0.
struct Taps {
  int32_t at[W];
  float left[W], right[W], top[W], bottom[W];
};

CSAM_INLINE void split(vf x, int64_t length, vi& first, float* before, float* after) {
  x = x > -1.0f ? x : splat(-1.0f);
  x = x < float(length) ? x : splat(float(length));
  const vi cut = __builtin_convertvector(x, vi);
  first = cut + (vi)(to_float(cut) > x);  // -1 where it was cut upwards
  const vf rest = x - to_float(first);
  store(before, 1.0f - rest);
  store(after, rest);
}

CSAM_INLINE v4 all(float x) { return x - v4{}; }

// Four pixels of four channels: the sums of their taps, a pixel a vector, then a channel a vector.
CSAM_INLINE void resample(const float* values, int64_t stride, const Taps& taps, int first, v4 channels[kChannels]) {
  v4 p[4];
  for (int j = 0; j < 4; ++j) {
    const int i = first + j;
    const float *upper = values + taps.at[i], *lower = upper + stride;
    const v4 left = all(taps.left[i]), right = all(taps.right[i]);
    p[j] = all(taps.top[i]) * (left * load<v4>(upper) + right * load<v4>(upper + kChannels)) +
           all(taps.bottom[i]) * (left * load<v4>(lower) + right * load<v4>(lower + kChannels));
  }
  typedef int32_t i4 __attribute__((vector_size(16)));
  const i4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, front = {0, 1, 4, 5}, back = {2, 3, 6, 7};
  const v4 a = __builtin_shuffle(p[0], p[1], low), b = __builtin_shuffle(p[2], p[3], low);
  const v4 c = __builtin_shuffle(p[0], p[1], high), d = __builtin_shuffle(p[2], p[3], high);
  channels[0] = __builtin_shuffle(a, b, front), channels[1] = __builtin_shuffle(a, b, back);
  channels[2] = __builtin_shuffle(c, d, front), channels[3] = __builtin_shuffle(c, d, back);
}

// Output pixel p reads input R(angle) (p - centre - t) / scale + centre; four taps, zero outside.
static void affine(const SemanticArgs& a, const Bordered& image, const float* row, float* out) {
  const double angle = row[0] * (3.14159265358979323846 / 180);
  const float cosine = float(cos(angle) / row[3]), sine = float(sin(angle) / row[3]);
  const float cx = 0.5f * (a.width - 1), cy = 0.5f * (a.height - 1);
  const float tx = row[1] * a.width, ty = row[2] * a.height;
  vf lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  for (int64_t v = 0; v < a.height; ++v) {
    const float dy = v - cy - ty;
    for (int64_t u = 0; u < a.width; u += W) {
      const vf dx = (lanes + float(u)) - cx - tx;
      Taps taps;
      vi x0, y0;
      split(cosine * dx - sine * dy + cx, a.width, x0, taps.left, taps.right);
      split(sine * dx + cosine * dy + cy, a.height, y0, taps.top, taps.bottom);
      store(taps.at, (y0 + 1) * int32_t(image.stride) + (x0 + 1) * kChannels);
      const int count = a.width - u < W ? int(a.width - u) : W;
      for (int64_t c = 0; c < a.channels; c += kChannels) {
        const float* values = image.values + c / kChannels * image.group;
        float* o = out + (c * a.height + v) * a.width + u;
        const int used = a.channels - c < kChannels ? int(a.channels - c) : kChannels;
        for (int i = 0; i < count; i += 4) {
          v4 channels[kChannels];
          resample(values, image.stride, taps, i, channels);
          const int some = count - i < 4 ? count - i : 4;
          for (int k = 0; k < used; ++k)
            if (some == 4) store(o + k * a.height * a.width + i, channels[k]);
            else memcpy(o + k * a.height * a.width + i, &channels[k], some * sizeof(float));
        }
      }
    }
  }
}

constexpr int kRadius = 96;  // of the widest blur

// out[i] = sum over k of kernel[k] * (lines[k])[i], in the order of k.
static void mix(const float* const* lines, const float* kernel, int64_t taps, int64_t length, float* out) {
  int64_t i = 0;
  for (; i + W <= length; i += W) {
    vf total = {};
    for (int64_t k = 0; k < taps; ++k) total = total + kernel[k] * load<vf>(lines[k] + i);
    store(out + i, total);
  }
  for (; i < length; ++i) {
    float total = 0;
    for (int64_t k = 0; k < taps; ++k) total += kernel[k] * lines[k][i];
    out[i] = total;
  }
}

// The separable Gaussian with replicated edges; scratch: pixels + width + 2 * kRadius values.
static void blur(const SemanticArgs& a, float sigma, float* image, float* scratch) {
  const int64_t radius = int64_t(ceil(3.0 * sigma)), taps = 2 * radius + 1;
  float kernel[2 * kRadius + 1];
  const float* lines[2 * kRadius + 1];
  double total = 0;
  for (int64_t k = -radius; k <= radius; ++k) total += exp(-0.5 * k * k / (double(sigma) * sigma));
  for (int64_t k = -radius; k <= radius; ++k)
    kernel[k + radius] = float(exp(-0.5 * k * k / (double(sigma) * sigma)) / total);
  float* edged = scratch + a.height * a.width;
  for (int64_t c = 0; c < a.channels; ++c) {
    float* plane = image + c * a.height * a.width;
    for (int64_t k = 0; k < taps; ++k) lines[k] = edged + k;
    for (int64_t v = 0; v < a.height; ++v) {
      const float* line = plane + v * a.width;
      for (int64_t k = 0; k < radius; ++k) edged[k] = line[0], edged[radius + a.width + k] = line[a.width - 1];
      memcpy(edged + radius, line, a.width * sizeof(float));
      mix(lines, kernel, taps, a.width, scratch + v * a.width);
    }
    for (int64_t v = 0; v < a.height; ++v) {
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t from = v + k - radius;
        lines[k] = scratch + (from < 0 ? 0 : from >= a.height ? a.height - 1 : from) * a.width;
      }
      mix(lines, kernel, taps, a.width, plane + v * a.width);
    }
  }
}

// clip(contrast * v + brightness, 0, 1) ** gamma
static void photometric(float* values, int64_t count, float contrast, float brightness, float gamma) {
  int64_t e = 0;
  for (; e + W <= count; e += W) store(values + e, clip01(contrast * load<vf>(values + e) + brightness));
  for (; e < count; ++e) {
    const float v = contrast * values[e] + brightness;
    values[e] = v < 0 ? 0 : v > 1 ? 1 : v;
  }
  if (gamma != 1)
    for (e = 0; e < count; ++e) values[e] = powf(values[e], gamma);
}

void semantic_batch(const SemanticArgs& a, int threads) {
  const int64_t pixels = a.height * a.width, elements = a.channels * pixels;
  if (!elements) return;  // a line has no edge to replicate
  const Bordered image = bordered(a);
#pragma omp parallel num_threads(threads)
  {
    float* scratch = static_cast<float*>(malloc(sizeof(float) * (pixels + a.width + 2 * kRadius)));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.n; ++i) {
      const float* row = a.params + i * kColumns;
      float* out = a.out + i * elements;
      affine(a, image, row, out);
      if (row[4] > 0) blur(a, row[4], out, scratch);
      photometric(out, elements, row[5], row[6], row[7]);
    }
    free(scratch);
  }
  free(const_cast<float*>(image.values));
}

}  // namespace CSAM_ISA
}  // namespace csam
