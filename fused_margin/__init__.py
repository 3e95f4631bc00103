"""Margin-softmax losses over many classes without an N x C matrix.

ArcFace, CosFace, AdaCos, AdaFace, MagFace and their kin as drop-in modules
(:mod:`fused_margin.losses`) and functions (:mod:`fused_margin.functional`), class-blocked on a CPU
and as Triton kernels on a GPU. Importing the package never imports Triton.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fused_margin import (
    _flops,
    distributed,
    functional,
    margins,
    metrics,
    negatives,
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
    CircleSoftmaxLoss,
    CombinedMarginLoss,
    CosFaceLoss,
    CurricularFaceLoss,
    ElasticFaceLoss,
    FixedAdaCosLoss,
    MagFaceLoss,
    MarginSoftmaxLoss,
    MVSoftmaxLoss,
    NormalizedSoftmaxLoss,
    SphereFaceLoss,
)

if TYPE_CHECKING:
    from fused_margin import compat as compat
    from fused_margin import convert as convert
    from fused_margin import tuning as tuning

_LAZY = ("compat", "convert", "tuning")

__all__ = [
    "AdaCosLoss",
    "AdaFaceLoss",
    "ArcFaceLoss",
    "CircleSoftmaxLoss",
    "CombinedMarginLoss",
    "CosFaceLoss",
    "CurricularFaceLoss",
    "ElasticFaceLoss",
    "FixedAdaCosLoss",
    "MVSoftmaxLoss",
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
    "negatives",
    "optim",
    "regularizers",
    "sampling",
    "schedules",
    "show_config",
]

_flops.register_when_imported()


def __getattr__(name: str) -> Any:
    """What is imported where it is first asked for; of other names where they are."""
    if name in _LAZY:
        return importlib.import_module(f"fused_margin.{name}")
    places = importlib.import_module("fused_margin._places")
    raise AttributeError(
        f"module 'fused_margin' has no attribute {name!r}{places.whereabouts(name)}"
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
