"""Losses whose margin or scale follows the batch: its norms, its cosines, or chance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Unpack

from fused_margin import _validate, _validate_margins, _validate_settings, functional, margins
from fused_margin.functional import adaptive
from fused_margin.losses.base import LossOptions, MarginSoftmaxLoss

Settings = dict[str, Callable[[Any], Any]]


def _between(name: str, lowest: float, highest: float) -> Callable[[Any], float]:
    return functools.partial(_validate.between, name, lowest=lowest, highest=highest)


class AdaCosLoss(MarginSoftmaxLoss):
    """AdaCos: no margin, and a scale that follows the batches; see `functional.adacos_scale`.

    The scale is a buffer, part of ``state_dict()``. In training mode each forward first updates it
    from its batch, by a sweep over the classes of its own. See `MarginSoftmaxLoss` on statistics.

    Args:
        num_classes: C >= 3; the scale starts as sqrt(2) * ln(C - 1).
        embedding_size: D >= 1.
        **options: see `MarginSoftmaxLoss`.
    """

    settings: ClassVar[Settings] = {
        **MarginSoftmaxLoss.settings,
        "scale": _validate_settings.adaptive_scale,
    }

    def __init__(
        self, num_classes: int, embedding_size: int, **options: Unpack[LossOptions]
    ) -> None:
        _validate_settings.no_scale("AdaCosLoss", options)
        super().__init__(num_classes, embedding_size, None, **options)

    def initial_statistics(self) -> dict[str, float]:
        """The scale of Fixed AdaCos."""
        _validate.fixed_adacos_classes(self.num_classes, "AdaCos")
        return {"scale": functional.fixed_adacos_scale(self.num_classes)}

    def update_statistics(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Set the scale to what this batch makes of it."""
        scale = functional.adacos_scale(
            embeddings, self.weight, labels, self._current_scale(),
            ignore_index=self.ignore_index, backend=self.backend, sub_centers=self.sub_centers,
        )  # fmt: skip
        self.set_statistic("scale", scale)

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """cos(theta)."""
        return margins.NO_MARGIN


class AdaFaceLoss(MarginSoftmaxLoss):
    """AdaFace with its own class weights and statistics of norms; see `functional.adaface`.

    ``norm_mean`` and ``norm_std`` are buffers, part of ``state_dict()``. In training mode each
    forward first takes its batch into them. See `MarginSoftmaxLoss` on statistics.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m, radians and an offset of the cosine, in [0, 2].
        scale: s > 0, or a Parameter.
        h: how far a standard deviation of the norms turns the margin.
        momentum: the part of each batch in the moving statistics, in [0, 1].
        **options: see `MarginSoftmaxLoss`.
    """

    settings: ClassVar[Settings] = {
        "margin": functools.partial(
            _validate.between,
            "margin",
            lowest=0.0,
            highest=adaptive.LARGEST_ADAFACE_MARGIN,
            hint=adaptive.RADIANS,
        ),
        "scale": _validate_settings.module_scale,
        "h": _between("h", 0.0, 100.0),
        "momentum": _between("momentum", 0.0, 1.0),
        **MarginSoftmaxLoss.settings,
    }
    norm_mean: torch.Tensor
    norm_std: torch.Tensor

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 0.4,
        scale: float | nn.Parameter = 64.0, *, h: float = 0.333, momentum: float = 0.01,
        **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin, self.h, self.momentum = margin, h, momentum

    def initial_statistics(self) -> dict[str, float]:
        """Where AdaFace's own code starts."""
        return {"norm_mean": 20.0, "norm_std": 100.0}

    def update_statistics(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Take the norms of this batch in."""
        mean, std = functional.adaface_statistics(
            embeddings, labels, self.norm_mean, self.norm_std, self.momentum,
            ignore_index=self.ignore_index, weight=self.weight,
        )  # fmt: skip
        self.set_statistic("norm_mean", mean)
        self.set_statistic("norm_std", std)

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> functional.Psi:
        """cos(theta - m z) - (m + m z), z of each row's norm."""
        return adaptive.adaface_psi(
            embeddings, labels, self.margin, self.h, self.norm_mean, self.norm_std,
            self.ignore_index,
        )  # fmt: skip


class MagFaceLoss(MarginSoftmaxLoss):
    """MagFace with its own class weights; see `functional.magface`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        lower_margin: radians, of embeddings of norm ``lower_norm`` and less.
        upper_margin: radians, of norm ``upper_norm`` and more.
        scale: s > 0, or a Parameter.
        lower_norm: > 0.
        upper_norm: > lower_norm.
        regularizer: lambda >= 0, of what is added to each row's loss.
        boundary: see `functional.arcface`.
        **options: see `MarginSoftmaxLoss`.
    """

    settings: ClassVar[Settings] = {
        "lower_margin": functools.partial(_validate_margins.angle, "lower_margin"),
        "upper_margin": functools.partial(_validate_margins.angle, "upper_margin"),
        "scale": _validate_settings.module_scale,
        "lower_norm": functools.partial(_validate.positive, "lower_norm"),
        "upper_norm": functools.partial(_validate.positive, "upper_norm"),
        "regularizer": _between("regularizer", 0.0, _validate.LARGEST_SCALE),
        "boundary": _validate.boundary,
        **MarginSoftmaxLoss.settings,
    }

    def __init__(
        self, num_classes: int, embedding_size: int, lower_margin: float = 0.45,
        upper_margin: float = 0.8, scale: float | nn.Parameter = 64.0, *, lower_norm: float = 10.0,
        upper_norm: float = 110.0, regularizer: float = 35.0, boundary: str = "linear",
        **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, scale, **options)
        self.lower_margin, self.upper_margin = lower_margin, upper_margin
        self.lower_norm, self.upper_norm = lower_norm, upper_norm
        self.regularizer, self.boundary = regularizer, boundary
        _validate.increasing("lower_norm", self.lower_norm, "upper_norm", self.upper_norm)
        _validate.ordered("lower_margin", self.lower_margin, "upper_margin", self.upper_margin)

    def _magnitudes(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return adaptive.magnitudes(
            embeddings, labels, self.lower_norm, self.upper_norm, self.ignore_index
        )

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """cos(theta + m(a)), a of each row's norm."""
        margin = adaptive.magface_margin(
            self._magnitudes(embeddings, labels), self.lower_margin, self.upper_margin,
            self.lower_norm, self.upper_norm,
        )  # fmt: skip
        return margins.angular(margin, self.boundary)

    def penalty(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """lambda (a / a_u^2 + 1 / a)."""
        found = self._magnitudes(embeddings, labels)
        return adaptive.magface_penalty(found, self.upper_norm, self.regularizer)


class ElasticFaceLoss(MarginSoftmaxLoss):
    """ElasticFace with its own class weights; see `functional.elasticface`.

    In evaluation mode the margin is not drawn but its mean.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: mean of the margin, radians for ``"arc"``, 0.5 by default, an offset of the cosine
            for ``"cos"``, 0.35.
        scale: s > 0, or a Parameter.
        sigma: standard deviation of the margin, in its unit.
        kind: ``"arc"`` or ``"cos"``. One that is assigned later leaves the margin as it is.
        plus: ElasticFace+: larger margins for rows farther from their class.
        boundary: see `functional.arcface`; of ``"arc"`` only.
        generator: where margins are drawn from; torch's own by default. It is no part of
            ``state_dict()``: ``generator.get_state()`` is. A function compiled with
            ``fullgraph=True`` takes torch's own only.
        **options: see `MarginSoftmaxLoss`.
    """

    settings: ClassVar[Settings] = {
        "margin": _validate_margins.module_number,
        "scale": _validate_settings.module_scale,
        "sigma": _between("sigma", 0.0, 10.0),
        "kind": _validate_margins.kind,
        "plus": functools.partial(_validate.flag, "plus"),
        "boundary": _validate.boundary,
        "generator": _validate_settings.generator,
        **MarginSoftmaxLoss.settings,
    }

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float | None = None,
        scale: float | nn.Parameter = 64.0, *, sigma: float = 0.05, kind: str = "arc",
        plus: bool = False, boundary: str = "none", generator: torch.Generator | None = None,
        **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, scale, **options)
        self.kind, self.sigma, self.plus = kind, sigma, plus
        self.margin = _validate_margins.default_of_kind(margin, self.kind)
        self.boundary, self.generator = boundary, generator

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> functional.Psi:
        """cos(theta + e) or cos(theta) - e, with e drawn for each row."""
        return adaptive.elastic_psi(
            labels, self.margin, self.sigma if self.training else 0.0, self.kind, self.boundary,
            self.generator, self.ignore_index, plus=self.plus,
        )  # fmt: skip
