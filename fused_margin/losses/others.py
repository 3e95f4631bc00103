"""Losses that reshape the logits of other classes too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Unpack

from fused_margin import (
    _validate,
    _validate_margins,
    _validate_settings,
    functional,
    margins,
)
from fused_margin import negatives as shapes
from fused_margin.functional import others
from fused_margin.losses.base import LossOptions, MarginSoftmaxLoss, of_rows

Settings = dict[str, Callable[[Any], Any]]


class CurricularFaceLoss(MarginSoftmaxLoss):
    """CurricularFace with its own class weights and curriculum; see `functional.curricularface`.

    ``t``, the moving mean of target cosines, is a buffer, part of ``state_dict()``. In training
    mode each forward first takes its batch into it. See `MarginSoftmaxLoss` on statistics.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m in radians; a number, or (C,) floating, one for each class.
        scale: s > 0, or a Parameter.
        momentum: the part of each batch in t, in [0, 1].
        boundary: of the target's logit, see `functional.arcface`.
        **options: see `MarginSoftmaxLoss`.
    """

    settings: ClassVar[Settings] = {
        "margin": _validate_margins.module_angular_margin,
        "scale": _validate_settings.module_scale,
        "momentum": functools.partial(_validate.between, "momentum", lowest=0.0, highest=1.0),
        "boundary": _validate.boundary,
        **MarginSoftmaxLoss.settings,
    }
    t: torch.Tensor

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float | torch.Tensor = 0.5,
        scale: float | nn.Parameter = 64.0, *, momentum: float = 0.01, boundary: str = "linear",
        **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin, self.momentum, self.boundary = margin, momentum, boundary

    def initial_statistics(self) -> dict[str, float]:
        """Where the curriculum starts."""
        return {"t": 0.0}

    def update_statistics(self, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Take the target cosines of this batch in."""
        t = functional.curricularface_t(
            embeddings, self.weight, labels, self.t, self.momentum,
            ignore_index=self.ignore_index, sub_centers=self.sub_centers,
        )  # fmt: skip
        self.set_statistic("t", t)

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """cos(theta + m)."""
        return margins.angular(self._margins(labels), self.boundary)

    def negatives(self, embeddings: torch.Tensor, labels: torch.Tensor) -> shapes.Negatives:
        """c (t + c) above cos(theta + m)."""
        return shapes.curricular(self.t, self._margins(labels))

    def _margins(self, labels: torch.Tensor) -> float | torch.Tensor:
        return of_rows("margin", self.margin, labels, self.num_classes)


class MVSoftmaxLoss(MarginSoftmaxLoss):
    """MV-softmax with its own class weights; see `functional.mv_softmax`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m, an offset of the cosine for ``"cos"``, 0.35 by default, radians for ``"arc"``,
            0.5; a number, or (C,) floating.
        scale: s > 0, or a Parameter.
        kind: ``"cos"`` or ``"arc"``. One that is assigned later leaves the margin as it is.
        t: from 1, which is the loss without, to 10.
        boundary: see `functional.arcface`; of ``"arc"`` only.
        **options: see `MarginSoftmaxLoss`.
    """

    settings: ClassVar[Settings] = {
        "margin": _validate_margins.module_angular_margin,
        "scale": _validate_settings.module_scale,
        "kind": _validate_margins.kind,
        "t": functools.partial(_validate.between, "t", lowest=1.0, highest=10.0),
        "boundary": _validate.boundary,
        **MarginSoftmaxLoss.settings,
    }

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float | torch.Tensor | None = None,
        scale: float | nn.Parameter = 32.0, *, kind: str = "cos", t: float = 1.2,
        boundary: str = "linear", **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, scale, **options)
        self.kind, self.t, self.boundary = kind, t, boundary
        self.margin = _validate_margins.default_of_kind(margin, self.kind)

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """cos(theta + m), or cos(theta) - m."""
        margin = of_rows("margin", self.margin, labels, self.num_classes)
        margin = _validate_margins.within_kind(margin, self.kind)
        return others.mv_psi(margin, self.kind, self.boundary)

    def negatives(self, embeddings: torch.Tensor, labels: torch.Tensor) -> shapes.Negatives:
        """t c + t - 1 above psi(cos(theta))."""
        return shapes.misclassified(self.psi(embeddings, labels), self.t)


class CircleSoftmaxLoss(MarginSoftmaxLoss):
    """Circle loss with its own class weights; see `functional.circle_softmax`.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        margin: m, an offset of the cosine, in [0, 1].
        scale: s > 0, or a Parameter.
        **options: see `MarginSoftmaxLoss`.
    """

    settings: ClassVar[Settings] = {
        "margin": functools.partial(
            _validate.between,
            "margin",
            lowest=0.0,
            highest=1.0,
            hint="it is a cosine offset, and the scale comes after it",
        ),
        "scale": _validate_settings.module_scale,
        **MarginSoftmaxLoss.settings,
    }

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 0.35,
        scale: float | nn.Parameter = 64.0, **options: Unpack[LossOptions],
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin = margin

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> functional.Psi:
        """[1 + m - u]_+ (u - (1 - m))."""
        return margins.circle(self.margin)

    def negatives(self, embeddings: torch.Tensor, labels: torch.Tensor) -> shapes.Negatives:
        """[c + m]_+ (c - m)."""
        return shapes.circle(self.margin)
