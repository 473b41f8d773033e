"""csam-kernels: fused masked layers, mask perturbation and randomized-smoothing batches as torch operators."""

from csam_kernels.backend import BackendUnavailable, backends, explain
from csam_kernels.ops.binarize import binarize
from csam_kernels.ops.count_votes import count_votes
from csam_kernels.ops.discrepancy import discrepancy
from csam_kernels.ops.effective_weights import effective_weights
from csam_kernels.ops.grid_noise import grid_noise
from csam_kernels.ops.mask_gradients import mask_gradients
from csam_kernels.ops.masked_conv2d import masked_conv2d
from csam_kernels.ops.masked_conv2d_inference import live_tiles, masked_conv2d_inference
from csam_kernels.ops.masked_linear import masked_linear
from csam_kernels.ops.percentile_init import percentile_init
from csam_kernels.ops.perturb_masks import perturb_masks
from csam_kernels.ops.philox_uniform import philox_uniform
from csam_kernels.ops.sample_conv2d import compress, sample_conv2d
from csam_kernels.ops.sample_network import sample_network
from csam_kernels.ops.semantic_batch import SEMANTIC_COLUMNS, SEMANTIC_NEUTRAL, semantic_batch
from csam_kernels.ops.smoothing_conv2d import smoothing_conv2d
from csam_kernels.ops.smoothing_noise import smoothing_noise

OPERATIONS = (
    "masked_conv2d",
    "masked_conv2d_inference",
    "masked_linear",
    "effective_weights",
    "perturb_masks",
    "mask_gradients",
    "binarize",
    "percentile_init",
    "smoothing_noise",
    "grid_noise",
    "smoothing_conv2d",
    "count_votes",
    "discrepancy",
    "semantic_batch",
    "philox_uniform",
    "sample_conv2d",
)

__all__ = [
    *OPERATIONS,
    "OPERATIONS",
    "SEMANTIC_COLUMNS",
    "SEMANTIC_NEUTRAL",
    "BackendUnavailable",
    "backends",
    "compress",
    "explain",
    "live_tiles",
    "sample_network",
]
