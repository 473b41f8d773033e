"""C-SAM on top of csam_kernels: masked layers, mask search, certificates and the reference training loop."""

from csam import data, masks, models, sampling, transforms
from csam.adapters import Opaque
from csam.cc_cert import CCCert, cc_cert_bound
from csam.nn import MaskedConv2d, MaskedLinear, convert, fold, masked_layers
from csam.search import MaskSearch
from csam.smoothing import ABSTAIN, Smooth

__all__ = [
    "ABSTAIN",
    "CCCert",
    "MaskSearch",
    "MaskedConv2d",
    "MaskedLinear",
    "Opaque",
    "Smooth",
    "cc_cert_bound",
    "convert",
    "data",
    "fold",
    "masked_layers",
    "masks",
    "models",
    "sampling",
    "transforms",
]
