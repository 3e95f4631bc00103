"""Margin-softmax losses over many classes without an N x C matrix.

ArcFace, CosFace, AdaCos, AdaFace, MagFace and their kin as drop-in modules
(:mod:`fused_margin.losses`) and functions (:mod:`fused_margin.functional`), class-blocked on a CPU
and as Triton kernels on a GPU. Importing the package never imports Triton.
"""

from fused_margin import (
    _flops,
    distributed,
    functional,
    margins,
    metrics,
    optim,
    regularizers,
    sampling,
    schedules,
)
from fused_margin._cpu import empty_cache
from fused_margin._setup import (
    UnsynchronizedWeightsWarning,
    WeightDecayWarning,
    check_setup,
)
from fused_margin._version import __version__
from fused_margin.config import show_config
from fused_margin.losses import (
    AdaCosLoss,
    AdaFaceLoss,
    ArcFaceLoss,
    CombinedMarginLoss,
    CosFaceLoss,
    ElasticFaceLoss,
    FixedAdaCosLoss,
    MagFaceLoss,
    MarginSoftmaxLoss,
    NormalizedSoftmaxLoss,
    SphereFaceLoss,
)

__all__ = [
    "AdaCosLoss",
    "AdaFaceLoss",
    "ArcFaceLoss",
    "CombinedMarginLoss",
    "CosFaceLoss",
    "ElasticFaceLoss",
    "FixedAdaCosLoss",
    "MagFaceLoss",
    "MarginSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "SphereFaceLoss",
    "UnsynchronizedWeightsWarning",
    "WeightDecayWarning",
    "__version__",
    "check_setup",
    "distributed",
    "empty_cache",
    "functional",
    "margins",
    "metrics",
    "optim",
    "regularizers",
    "sampling",
    "schedules",
    "show_config",
]

_flops.register_when_imported()
