// semantic_batch: a thread takes whole copies; one bilinear gather, then blur in two passes where asked for, then the
// photometric map in place.
#include <math.h>
#include <stdlib.h>

#include "kernels.h"
#include "simd.h"

namespace csam {
namespace CSAM_ISA {

constexpr int kColumns = 8;

// Output pixel p reads input R(angle) (p - centre - t) / scale + centre; four taps, zero outside.
static void affine(const SemanticArgs& a, const float* row, float* out) {
  const double angle = row[0] * (3.14159265358979323846 / 180);
  const float cosine = float(cos(angle) / row[3]), sine = float(sin(angle) / row[3]);
  const float cx = 0.5f * (a.width - 1), cy = 0.5f * (a.height - 1);
  const float tx = row[1] * a.width, ty = row[2] * a.height;
  const int64_t pixels = a.height * a.width;
  const int w = int(a.width), h = int(a.height);
  for (int v = 0; v < h; ++v) {
    const float dy = v - cy - ty;
    for (int u = 0; u < w; ++u) {
      const float dx = u - cx - tx;
      const float sx = cosine * dx - sine * dy + cx, sy = sine * dx + cosine * dy + cy;
      float* o = out + v * a.width + u;
      if (!(sx > -1 && sx < w && sy > -1 && sy < h)) {
        for (int64_t c = 0; c < a.channels; ++c) o[c * pixels] = 0;
        continue;
      }
      const int x0 = int(floorf(sx)), y0 = int(floorf(sy));
      const float fx = sx - x0, fy = sy - y0;
      const float wx[2] = {x0 >= 0 ? 1 - fx : 0, x0 + 1 < w ? fx : 0};
      const float wy[2] = {y0 >= 0 ? 1 - fy : 0, y0 + 1 < h ? fy : 0};
      const int64_t xa = x0 < 0 ? 0 : x0, xb = x0 + 1 < w ? x0 + 1 : w - 1;
      const int64_t ya = (y0 < 0 ? 0 : y0) * a.width, yb = (y0 + 1 < h ? y0 + 1 : h - 1) * a.width;
      for (int64_t c = 0; c < a.channels; ++c) {
        const float* in = a.x + c * pixels;
        o[c * pixels] =
            wy[0] * (wx[0] * in[ya + xa] + wx[1] * in[ya + xb]) + wy[1] * (wx[0] * in[yb + xa] + wx[1] * in[yb + xb]);
      }
    }
  }
}

// One direction of the Gaussian with replicated edges: `lines` lines of `length` values, `step` apart inside a line.
static void blur_lines(const float* in, float* out, int64_t lines, int64_t line_step, int64_t length, int64_t step,
                       const float* kernel, int64_t radius) {
  for (int64_t l = 0; l < lines; ++l)
    for (int64_t i = 0; i < length; ++i) {
      float total = 0;
      for (int64_t k = -radius; k <= radius; ++k) {
        const int64_t j = i + k < 0 ? 0 : i + k >= length ? length - 1 : i + k;
        total += kernel[k + radius] * in[l * line_step + j * step];
      }
      out[l * line_step + i * step] = total;
    }
}

static void blur(const SemanticArgs& a, float sigma, float* image, float* scratch) {
  const int64_t radius = int64_t(ceil(3.0 * sigma));
  float kernel[2 * 96 + 1];
  double total = 0;
  for (int64_t k = -radius; k <= radius; ++k) total += exp(-0.5 * k * k / (double(sigma) * sigma));
  for (int64_t k = -radius; k <= radius; ++k)
    kernel[k + radius] = float(exp(-0.5 * k * k / (double(sigma) * sigma)) / total);
  for (int64_t c = 0; c < a.channels; ++c) {
    float* plane = image + c * a.height * a.width;
    blur_lines(plane, scratch, a.height, a.width, a.width, 1, kernel, radius);
    blur_lines(scratch, plane, a.width, 1, a.height, a.width, kernel, radius);
  }
}

void semantic_batch(const SemanticArgs& a, int threads) {
  const int64_t pixels = a.height * a.width, elements = a.channels * pixels;
#pragma omp parallel num_threads(threads)
  {
    float* scratch = static_cast<float*>(malloc(sizeof(float) * (pixels + 1)));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.n; ++i) {
      const float* row = a.params + i * kColumns;
      float* out = a.out + i * elements;
      affine(a, row, out);
      if (row[4] > 0) blur(a, row[4], out, scratch);
      const float contrast = row[5], brightness = row[6], gamma = row[7];
      for (int64_t e = 0; e < elements; ++e) {
        const float v = contrast * out[e] + brightness;
        out[e] = v < 0 ? 0 : v > 1 ? 1 : v;
      }
      if (gamma != 1)
        for (int64_t e = 0; e < elements; ++e) out[e] = powf(out[e], gamma);
    }
    free(scratch);
  }
}

}  // namespace CSAM_ISA
}  // namespace csam
