"""Losses whose margin is the same function of every row's target cosine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Unpack

from fused_margin import _validate, _validate_margins, _validate_settings, functional, margins
from fused_margin.losses.base import LossOptions, MarginSoftmaxLoss, of_rows


class ArcFaceLoss(MarginSoftmaxLoss):
    """ArcFace with its own class weights; see `functional.arcface`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m in radians, at most pi; a number, or (C,) floating, one for each class, as
            `margins.by_class_size` makes them.
        scale: s > 0, or a Parameter.
        boundary: ``"linear"``, ``"continuous"`` or ``"none"``, for theta + m > pi, or ``"easy"``.
        grad: ``"exact"`` or ``"straight_through"``.
        **options: see `MarginSoftmaxLoss`.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "margin": _validate_margins.module_angular_margin,
        "scale": _validate_settings.module_scale,
        "boundary": _validate.boundary,
        "grad": _validate.grad,
        **MarginSoftmaxLoss.settings,
    }

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float | torch.Tensor = 0.5,
        scale: float | nn.Parameter = 64.0, *, boundary: str = "linear", grad: str = "exact",
        **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin, self.boundary, self.grad = margin, boundary, grad

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """cos(theta + m)."""
        return margins.angular(
            of_rows("margin", self.margin, labels, self.num_classes), self.boundary, self.grad
        )


class CosFaceLoss(MarginSoftmaxLoss):
    """CosFace with its own class weights; see `functional.cosface`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m, an offset of the cosine, at most 2; a number, or (C,) floating.
        scale: s > 0, or a Parameter.
        **options: see `MarginSoftmaxLoss`.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "margin": _validate_margins.module_cosine_margin,
        **MarginSoftmaxLoss.settings,
    }

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float | torch.Tensor = 0.35,
        scale: float | nn.Parameter = 64.0, **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin = margin

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """cos(theta) - m."""
        return margins.additive(of_rows("margin", self.margin, labels, self.num_classes))


class FixedAdaCosLoss(MarginSoftmaxLoss):
    """Fixed AdaCos with its own class weights and no hyperparameter; see `functional.fixed_adacos`.

    Args:
        num_classes: C >= 3; the scale is sqrt(2) * ln(C - 1).
        embedding_size: D >= 1.
        **options: see `MarginSoftmaxLoss`.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        **MarginSoftmaxLoss.settings,
        "scale": _validate_settings.derived_scale,
    }

    def __init__(
        self, num_classes: int, embedding_size: int, **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        _validate_settings.no_scale("FixedAdaCosLoss", options)
        super().__init__(num_classes, embedding_size, None, **options)
        _validate.fixed_adacos_classes(self.num_classes)

    @property
    def scale(self) -> float:
        """sqrt(2) * ln(C - 1), of the weight as it is."""
        return functional.fixed_adacos_scale(self.num_classes)

    @scale.setter
    def scale(self, value: Any) -> None:
        _validate_settings.derived_scale(value)

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """cos(theta)."""
        return margins.NO_MARGIN


class NormalizedSoftmaxLoss(MarginSoftmaxLoss):
    """Normalised softmax with its own class weights; see `functional.normalized_softmax`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        scale: s > 0, the inverse of a temperature.
        **options: see `MarginSoftmaxLoss`.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, scale: float | nn.Parameter = 20.0,
        **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, scale, **options)

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """cos(theta)."""
        return margins.NO_MARGIN


class CombinedMarginLoss(MarginSoftmaxLoss):
    """cos(m1 theta + m2) - m3 with its own class weights; see `functional.combined_margin`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        m1: multiplies the angle.
        m2: radians.
        m3: an offset of the cosine. (1, 0.5, 0) is ArcFace, (1, 0, 0.4) what insightface trains
            large sets with; `functional.combined_margin` has a table.
        scale: s > 0, or a Parameter.
        boundary: ``"none"`` or ``"continuous"``, for m1 theta + m2 > pi.
        grad: ``"exact"`` or ``"straight_through"``.
        **options: see `MarginSoftmaxLoss`.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "m1": functools.partial(_validate_margins.multiplier, "m1", lowest=0.01),
        "m2": functools.partial(_validate_margins.angle, "m2"),
        "m3": functools.partial(_validate_margins.offset, "m3"),
        "scale": _validate_settings.module_scale,
        "boundary": functools.partial(
            _validate.choice, "boundary", allowed=_validate_margins.CONTINUATIONS
        ),
        "grad": _validate.grad,
        **MarginSoftmaxLoss.settings,
    }

    def __init__(
        self, num_classes: int, embedding_size: int, m1: float = 1.0, m2: float = 0.5,
        m3: float = 0.0, scale: float | nn.Parameter = 64.0, *, boundary: str = "none",
        grad: str = "exact", **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        # a scale, and 1, m2, m3 of insightface
        is_other = isinstance(m1, (int, float)) and m1 < 1.0 and embedding_size == 1
        _validate_settings.sizes_first(type(self), num_classes, embedding_size, is_other=is_other)
        m1 = _validate_margins.multiplier("m1", m1, 0.01)  # first, as a scale in its place is more
        super().__init__(num_classes, embedding_size, scale, **options)
        self.m1, self.m2, self.m3 = m1, m2, m3
        self.boundary, self.grad = boundary, grad

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> functional.Psi:
        """cos(m1 theta + m2) - m3."""
        return margins.combined(self.m1, self.m2, self.m3, self.boundary, self.grad)


class SphereFaceLoss(MarginSoftmaxLoss):
    """SphereFace of normalised embeddings with its own class weights; see `functional.sphereface`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m, which multiplies the angle, in [1, 16].
        scale: s > 0, or a Parameter.
        **options: see `MarginSoftmaxLoss`.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "margin": functools.partial(_validate_margins.multiplier, "margin"),
        **MarginSoftmaxLoss.settings,
    }

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 1.5,
        scale: float | nn.Parameter = 30.0, **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin = margin

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> functional.Psi:
        """(-1)^k cos(m theta) - 2 k."""
        return margins.multiplied(self.margin)
