// What csrc/cuda offers: launchers that know raw device addresses, sizes, strides and seeds, and a stream. None of them
// allocates, synchronises or reads a device value, so all can be captured in a CUDA graph. Shapes were checked above.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "../common/deviates.h"
#include "../common/dtype.h"
#include "../common/mask_math.h"

namespace csam::cuda {

struct Device {
  int multiprocessors;  // grids are persistent: multiprocessors x resident blocks
  cudaStream_t stream;
};

struct NoiseArgs {
  const float* x;  // [channels, pixels]
  int64_t n, channels, pixels;
  Law law;      // any but kCells
  float scale;  // of its deviates
  uint64_t seed, first_sample;
  uint32_t stream;
  void* out;  // [n, channels, pixels], or [n, pixels, channels] when channels_last
  int dtype;
  bool channels_last;
};
cudaError_t smoothing_noise(const NoiseArgs&, Device);
cudaError_t philox_uniform(float* out, int64_t n, int64_t k, uint64_t seed, uint64_t first, uint32_t stream, Device);

struct VoteArgs {
  const void* logits;  // [n, classes], rows row_stride apart
  int64_t n, classes, row_stride;
  int dtype;
  int64_t* out;  // [classes], added to
};
cudaError_t count_votes(const VoteArgs&, Device);

enum Perturbation : int { kPlain = 0, kUniform = 1, kAdversarial = 2 };

struct Layer {         // one layer of a multi-tensor pass; unused pointers are null
  const void* weight;  // theta
  const void* mask;    // M or C
  const void* grad;    // g = dL/dC for the adversarial arm, or G = dL/dW for mask_gradients
  void* out;           // W, C~, or dL/dtheta
  float* out_mask;     // dL/dM
  MaskLayout layout;   // of the mask over the weight; perturb_masks sees [1, n]
  int16_t weight_dtype, mask_dtype, grad_dtype, out_dtype;
};

struct MaskStep {  // W = theta * M, or C~ alone where a layer has no weight
  std::vector<Layer> layers;
  int kind;
  bool global_norm;
  double radius, rho;
  uint64_t seed, step;
  double* partial;  // room for units(layers) sums: adversarial arm only
  float* scales;    // room for a float a layer: adversarial arm only
};
cudaError_t mask_step(const MaskStep&, Device);

struct GradientPass {
  std::vector<Layer> layers;
  double* partial;  // room for gradient_room(layers) sums
  double* norm;     // ||dL/dM||^2
};
cudaError_t mask_gradients(const GradientPass&, Device);

int64_t units(const std::vector<Layer>&);          // blocks of work of an elementwise pass over the layers
int64_t gradient_room(const std::vector<Layer>&);  // doubles of scratch that mask_gradients needs

struct Scores {
  const void* scores;
  uint8_t* mask;
  int64_t count;
  int64_t keep;  // where every layer is a selection of its own
  int dtype;
};
struct Selection {
  std::vector<Scores> layers;
  bool global;  // one selection over all layers, which keeps `keep`
  int64_t keep;
  void* scratch;  // selection_room(layers, global) bytes
};
cudaError_t binarize(const Selection&, Device);
int64_t selection_room(const std::vector<int64_t>& counts, bool global);

struct SemanticArgs {
  const float* x;  // [channels, height, width]
  int64_t n, channels, height, width;
  const float* params;  // [n, 8]
  float* out;           // [n, channels, height, width]
  void* scratch;        // semantic_room(...) bytes
};
cudaError_t semantic_batch(const SemanticArgs&, Device);
int64_t semantic_room(int64_t n, int64_t elements);

}  // namespace csam::cuda
