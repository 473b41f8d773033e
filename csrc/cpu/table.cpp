// The kernel table of one instruction set; that of AMX is AVX-512's, but for what multiplies dense layers.
#include "kernels.h"

#define CSAM_JOIN_(a, b) a##b
#define CSAM_JOIN(a, b) CSAM_JOIN_(a, b)
#define CSAM_TEXT_(a) #a
#define CSAM_TEXT(a) CSAM_TEXT_(a)

namespace csam {
namespace CSAM_ISA {
void philox_uniform(float*, int64_t, int64_t, uint64_t, uint64_t, uint32_t);
void smoothing_noise(const NoiseArgs&, int);
void effective_weights(const MaskPass&, int);
void perturb_masks(const MaskPass&, int);
double mask_gradients(const MaskPass&, int);
void select_scan(SelectScan&);
void count_votes(const VoteArgs&, int);
void discrepancy(const DiscrepancyArgs&, int);
void semantic_batch(const SemanticArgs&, int);
void sample_conv2d(const SampleConvArgs&, int);
SampleNetwork* sample_network(const SampleNetworkArgs&);
void sample_conv2d_tiles(const SampleConvArgs&, int);
SampleNetwork* sample_network_tiles(const SampleNetworkArgs&);
}  // namespace CSAM_ISA

extern const Kernels CSAM_JOIN(CSAM_ISA, _kernels) = {
    CSAM_TEXT(CSAM_ISA),     CSAM_ISA::philox_uniform, CSAM_ISA::smoothing_noise, CSAM_ISA::effective_weights,
    CSAM_ISA::perturb_masks, CSAM_ISA::mask_gradients, CSAM_ISA::select_scan,     CSAM_ISA::count_votes,
    CSAM_ISA::discrepancy,   CSAM_ISA::semantic_batch, CSAM_ISA::sample_conv2d,   CSAM_ISA::sample_network};
#if defined(__AVX512F__)
extern const Kernels amx_kernels = {
    "amx",
    CSAM_ISA::philox_uniform,
    CSAM_ISA::smoothing_noise,
    CSAM_ISA::effective_weights,
    CSAM_ISA::perturb_masks,
    CSAM_ISA::mask_gradients,
    CSAM_ISA::select_scan,
    CSAM_ISA::count_votes,
    CSAM_ISA::discrepancy,
    CSAM_ISA::semantic_batch,
    CSAM_ISA::sample_conv2d_tiles,
    CSAM_ISA::sample_network_tiles,
};
#endif

}  // namespace csam
