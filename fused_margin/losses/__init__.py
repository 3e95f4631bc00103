"""Losses as modules that own the class weights; the mathematics is in `functional`."""

from fused_margin.losses.adaptive import AdaCosLoss, AdaFaceLoss, ElasticFaceLoss, MagFaceLoss
from fused_margin.losses.base import LossOptions as LossOptions
from fused_margin.losses.base import MarginSoftmaxLoss
from fused_margin.losses.fixed import (
    ArcFaceLoss,
    CombinedMarginLoss,
    CosFaceLoss,
    FixedAdaCosLoss,
    NormalizedSoftmaxLoss,
    SphereFaceLoss,
)
from fused_margin.losses.others import CircleSoftmaxLoss, CurricularFaceLoss, MVSoftmaxLoss

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
]
