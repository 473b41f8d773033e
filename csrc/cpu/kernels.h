// The table of kernels: one a instruction set, filled by cpu/table.cpp, chosen in cpu/dispatch.cpp at run time.
// Kernels know raw pointers, sizes, strides and seeds; shapes were checked by the layer above.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/deviates.h"
#include "../common/mask_math.h"

namespace csam {

inline int64_t element_size(int dtype) { return dtype == kF64 ? 8 : dtype == kF32 ? 4 : dtype == kBool ? 1 : 2; }

// The law of a whole number of grid steps, as a table of Walker's (csam_kernels/cells.py): column i of 2^bits gives i
// to fractions below its threshold, and its other number to the rest; both less 2^(bits-1).
struct Cells {
  const uint32_t* columns;  // the threshold's first 32 - bits bits, then the other number
  const uint64_t* rest;     // the threshold's next 64 bits
  int bits;
};

struct NoiseArgs {
  const float* x;  // with cells in steps of the grid: whole numbers
  int64_t n, channels, pixels;
  Law law;
  float scale;  // of the law's deviates; with cells the grid, in steps to 1
  uint64_t seed, first_sample;
  uint32_t stream;
  void* out;
  int dtype;
  bool channels_last;
  const Cells* cells;  // of Law::kCells, or null
};

enum Perturbation : int { kPlain = 0, kUniform = 1, kAdversarial = 2 };

struct MaskLayer {     // one layer of a multi-tensor pass; unused pointers are null
  const void* weight;  // theta
  const void* mask;    // C
  const void* grad;    // g = dL/dC for the adversarial arm, or G = dL/dW for mask_gradients
  void* out;           // W, C~, or dL/dtheta
  void* out_mask;      // dL/dM
  MaskLayout layout;   // of the mask over the weight; perturb_masks sees [1, n]
  double scale;        // radius * 2^-31 (uniform) or rho / ||g|| (adversarial)
};

struct MaskPass {
  MaskLayer* layers;
  int64_t count;
  int weight_dtype, mask_dtype, grad_dtype, out_dtype;
  int kind;
  uint64_t seed, step;
};

struct SelectScan {  // one pass over scores: mask what is surely in, collect what lies in between
  const void* scores;
  int64_t n;
  int dtype;
  uint32_t low, high;  // ordered keys; above high is kept, below low is not
  uint8_t* mask;
  uint32_t first_index;  // of scores[0] in the whole selection
  uint64_t* candidates;  // (key << 32 | ~index), room for n
  int64_t found, above;  // results
};

struct VoteArgs {
  const void* logits;
  int64_t n, classes, row_stride;
  int dtype;
  int64_t* out;
};

struct DiscrepancyArgs {
  const double* clean;  // logits [classes]
  const void* logits;
  int64_t n, classes, row_stride;
  int dtype;
  double* out;    // [n]
  bool* changed;  // [n]
};

struct SemanticArgs {
  const float* x;
  int64_t n, channels, height, width;
  const float* params;  // [n, 8]
  float* out;
};

// How a convolution multiplies: each filter its own weights, in time proportional to them; filters sharing what they
// load, zeros between live ones included; or that after Winograd's transform.
enum Engine : int { kSparse = 0, kDense = 1, kWinograd = 2 };

struct SampleConvArgs {
  const void* x;  // [channels, height, width, samples]
  int dtype;      // of x, other and out
  int64_t channels, height, width, samples;
  const float* values;  // the weight in compressed rows
  const int32_t *taps, *rows;
  int64_t filters;
  const float* bias;  // or null
  const void* other;  // or null
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  float low, high;  // bounds of the result
  int engine;
  // Of integers: out = clamp(sum * scales[filter] + other * other_scale + shift), low >= 0 and high <= 255, or a float
  // where `real`; outside the image lies `zero`.
  const float* scales;
  float shift, other_scale;
  int zero;
  bool real;
  void* out;
  int64_t out_height, out_width;
  int64_t in_rows, out_rows;  // of each channel that there is memory for, taken again and again; 0 for all
};

// A network on samples that lie innermost: steps that read and write places of one arena, [C, H, W, lanes] each. Steps
// from one whose `out_rows` are few to the next that keeps all of its own run together, some rows of each at a time.
struct SampleStep {
  bool pools;              // maximum over the window of `conv`, else the convolution itself
  SampleConvArgs conv;     // x, other and out unset; copied
  int64_t in, other, out;  // places in the arena, in values of one sample; other < 0 for none
};

struct SampleNetworkArgs {
  int dtype;
  int64_t channels, height, width;  // of an image
  const float *mean, *std;          // [channels], or null
  float scale, shift;               // of integers: what stands for an image's value v is v * scale + shift
  const SampleStep* steps;
  int64_t count;
  int64_t arena, in, out, classes;  // values of one sample; places of the image and of the logits
  bool draft;                       // no weight is laid out: only the costs may be asked for
};

class SampleNetwork {  // readied for one instruction set; its methods may run on several threads at once
 public:
  virtual ~SampleNetwork() = default;
  virtual const char* format() const = 0;  // of the values, and how they are multiplied
  virtual int64_t lanes() const = 0;
  virtual int64_t memory() const = 0;  // bytes of a thread
  // Adds the votes of noisy samples first .. first + n - 1 of x [C, H, W] to out [classes]; NaN casts none. `law`,
  // `scale` and `cells` as in NoiseArgs.
  virtual void votes(const float* x, Law law, float scale, const Cells* cells, uint64_t seed, uint32_t stream,
                     uint64_t first, int64_t n, int64_t* out) const = 0;
  // x [n, C, H, W] in the network's dtype, float of integers -> out [n, classes].
  virtual void logits(const void* x, int64_t n, float* out) const = 0;
  // What each step should cost, in multiply-adds of a vector a sample.
  virtual void costs(double* vectors) const = 0;
  // The least seconds of each step over `rounds` tiles of noise.
  virtual void times(int64_t rounds, double* seconds) const = 0;
};

struct Kernels {
  const char* name;
  void (*philox_uniform)(float* out, int64_t n, int64_t k, uint64_t seed, uint64_t first, uint32_t stream);
  void (*smoothing_noise)(const NoiseArgs&, int threads);
  void (*effective_weights)(const MaskPass&, int threads);
  void (*perturb_masks)(const MaskPass&, int threads);
  double (*mask_gradients)(const MaskPass&, int threads);
  void (*select_scan)(SelectScan&);
  void (*count_votes)(const VoteArgs&, int threads);
  void (*discrepancy)(const DiscrepancyArgs&, int threads);
  void (*semantic_batch)(const SemanticArgs&, int threads);
  void (*sample_conv2d)(const SampleConvArgs&, int threads);
  SampleNetwork* (*sample_network)(const SampleNetworkArgs&);
};

extern const Kernels generic_kernels, avx2_kernels, avx512_kernels, amx_kernels;

const Kernels& kernels();                // the table in force
const char* isa_supported(const char*);  // "" or why not
void set_isa(const char* name);          // "auto", "generic", "avx2", "avx512", "amx"

// ISA-independent operations, built on the table.
void binarize(const void* const* scores, const int64_t* sizes, int64_t count, int dtype, int64_t keep,
              uint8_t* const* masks, int threads);
void percentile_init(const void* weight, int64_t n, int dtype, double tau, void* out);
double squared_norm(const void* g, int64_t n, int dtype, int threads);
void* take_block(int64_t bytes);  // from the pool of memory for large results
void give_block(void* block, int64_t bytes);
int64_t block_size(int64_t bytes);  // of the block that is taken for so many

}  // namespace csam
