"""The Triton provider: one launcher an operation, for any CUDA device, no toolkit needed.

`discrepancy`, which sees one tile of logits at a time, is left to torch's own kernels.
"""

from csam_kernels.reference import discrepancy
from csam_kernels.triton.launchers.binarize import binarize
from csam_kernels.triton.launchers.count_votes import count_votes
from csam_kernels.triton.launchers.effective_weights import effective_weights
from csam_kernels.triton.launchers.mask_gradients import mask_gradients
from csam_kernels.triton.launchers.masked_conv2d import (
    live_tiles,
    masked_conv2d,
    masked_conv2d_backward,
    masked_conv2d_inference,
    smoothing_conv2d,
)
from csam_kernels.triton.launchers.masked_linear import masked_linear, masked_linear_backward
from csam_kernels.triton.launchers.percentile_init import percentile_init
from csam_kernels.triton.launchers.perturb_masks import perturb_masks
from csam_kernels.triton.launchers.philox_uniform import philox_uniform
from csam_kernels.triton.launchers.semantic_batch import semantic_batch
from csam_kernels.triton.launchers.smoothing_noise import grid_noise, smoothing_noise
