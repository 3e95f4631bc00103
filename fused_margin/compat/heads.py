"""Layers with a margin that are copied everywhere, as modules that return the loss.

Their originals return the logits, (N, C), for `nn.CrossEntropyLoss`. One line changes:

```python
# before: loss = nn.CrossEntropyLoss()(metric_fc(features, labels), labels)
loss = metric_fc(features, labels)
```

Arguments, `weight` (C, D), its initialisation and the numbers are theirs. `logits(features)` has
the scaled cosines *without* margin, for an accuracy: what they return has the margin at the target.
Their slope is infinite where a feature lies on its class's weight; here it is finite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from fused_margin import (
    _compiled,
    _validate,
    _validate_margins,
    _validate_others,
    functional,
    margins,
    negatives,
)
from fused_margin.compat import _refusals
from fused_margin.losses import MarginSoftmaxLoss
from fused_margin.losses.base import of_rows

__all__ = ["AddMarginProduct", "ArcMarginProduct", "SpeechBrainAAM", "WeSpeakerAAM"]

# cos(theta) > 0 is where an easy margin applies, and eq. 5 asks for cos(theta) >= a threshold
_ABOVE_ZERO = torch.finfo(torch.float32).tiny


def angular(margin: float | torch.Tensor, boundary: str, easy_margin: bool) -> margins.Margin:
    """cos(theta + m); with an easy margin cos(theta) where that isn't positive."""
    if not easy_margin:
        return margins.angular(margin, boundary)
    if isinstance(margin, torch.Tensor):
        return margins.Margin(margin.cos(), margin.sin(), _ABOVE_ZERO, 0.0)
    return margins.Margin(math.cos(margin), math.sin(margin), _ABOVE_ZERO, 0.0)


class _Head(MarginSoftmaxLoss):
    """Class weights as a linear layer has them."""

    def reset_parameters(self) -> None:
        """Draw the class weights anew by ``nn.init.xavier_uniform_``."""
        nn.init.xavier_uniform_(self.weight)

    @property
    def in_features(self) -> int:
        """D."""
        return self.embedding_size

    @property
    def out_features(self) -> int:
        """C."""
        return self.num_classes

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Scaled cosines without margin, (N, C), of embeddings (N, D) or (N, 1, D)."""
        _validate._tensor("embeddings", embeddings)
        if embeddings.ndim == 3 and embeddings.shape[1] == 1:
            embeddings = embeddings.squeeze(1)
        return super().logits(embeddings)

    @_compiled.raising()
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: torch.Tensor,
        label: torch.Tensor,
        *,
        sample_weight: torch.Tensor | None = None,
        return_stats: bool = False,
    ) -> Any:
        """Mean loss of embeddings (N, D) or (N, 1, D) and labels (N,) or (N, 1): 0-d."""
        _validate.both_tensors(input, label)
        if input.ndim == 3 and input.shape[1] == 1:
            input = input.squeeze(1)
        if label.ndim == 2 and label.shape[1] == 1:
            label = label.squeeze(1)
        return super().forward(input, label, sample_weight=sample_weight, return_stats=return_stats)


class _AngularHead(_Head):
    """ArcFace, with a margin that `update` sets.

    Args:
        num_classes: C >= 2.
        embedding_size: D >= 1.
        scale: s > 0.
        margin: m, radians; a number, or (C,) floating, one for each class.
        easy_margin: cos(theta) where theta >= pi / 2.
        options: ``reduction`` and what follows in `MarginSoftmaxLoss`.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "margin": _validate_margins.module_angular_margin,
        **MarginSoftmaxLoss.settings,
    }
    boundary = "linear"

    def __init__(
        self, num_classes: int, embedding_size: int, scale: float, margin: float,
        easy_margin: bool, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin, self.easy_margin = margin, bool(easy_margin)

    def update(self, margin: float = 0.2) -> None:
        """Set the margin, radians, as a schedule does between steps."""
        self.margin = margin

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> functional.Psi:
        """cos(theta + m)."""
        return self._angular(labels)

    def _angular(self, labels: torch.Tensor) -> margins.Margin:
        margin = of_rows("margin", self.margin, labels, self.num_classes)
        return angular(margin, self.boundary, self.easy_margin)

    def extra_repr(self) -> str:
        """Sizes and settings."""
        return f"{super().extra_repr()}, easy_margin={self.easy_margin}"


class _ShortNames(_Head):
    """Scale and margin by the names of arcface-pytorch."""

    margin: Any

    @property
    def s(self) -> float:
        """The scale."""
        return self.scale

    @s.setter
    def s(self, value: float) -> None:
        self.scale = value

    @property
    def m(self) -> float:
        """The margin: radians, or an offset of the cosine."""
        return self.margin

    @m.setter
    def m(self, value: float) -> None:
        self.margin = value


class ArcMarginProduct(_ShortNames, _AngularHead):
    """Of arcface-pytorch and of Kaggle's notebooks: cos(theta) - m sin(m) where theta + m > pi.

    Args:
        in_features: D >= 1.
        out_features: C >= 2.
        s: scale, > 0.
        m: margin, radians; a number, or (C,) floating, one for each class.
        easy_margin: cos(theta) where theta >= pi / 2.
        ls_eps: in [0, 1). There it spreads the margin, not the target: of the target's logit
            1 - ls_eps + ls_eps / C have it, and ls_eps / C of each other class's. So it is here,
            where that of the others is of second order in the cosine: a logit is off by at most
            s ls_eps sin(m) / (2 C), or s ls_eps m sin(m) / C where theta + m > pi. The smoothing
            of `torch.nn.functional.cross_entropy` is ``label_smoothing``, among the options.
        options: ``reduction`` and what follows in `MarginSoftmaxLoss`.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        **_AngularHead.settings,
        "ls_eps": functools.partial(_validate.between, "ls_eps", lowest=0.0, highest=1.0),
    }

    def __init__(
        self, in_features: int, out_features: int, s: float = 30.0, m: float = 0.50,
        easy_margin: bool = False, ls_eps: float = 0.0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(out_features, in_features, s, m, easy_margin, **options)
        self.ls_eps = ls_eps

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> functional.Psi:
        """cos(theta + m), or its share in the target's logit."""
        margin = self._angular(labels)
        if not self.ls_eps:
            return margin
        share = 1.0 - self.ls_eps * (1.0 - 1.0 / self.num_classes)
        return lambda u: share * margins.apply(u, margin) + (1.0 - share) * u

    def negatives(
        self, embeddings: torch.Tensor, labels: torch.Tensor
    ) -> negatives.Negatives | None:
        """The margin's share in other logits, with sin(theta) as 1 - c^2 / 2."""
        if not self.ls_eps:
            return None
        _refusals.one_margin(self.margin)
        share, sin = self.ls_eps / self.num_classes, math.sin(self.margin)
        linear, square = 1.0 - share * (1.0 - math.cos(self.margin)), 0.5 * share * sin
        threshold = 0.0 if self.easy_margin else -math.cos(self.margin)
        return negatives.Negatives(
            threshold, (-share * sin, linear, square, linear, 2.0 * square, 1.0)
        )


class WeSpeakerAAM(_AngularHead):
    """WeSpeaker's ``ArcMarginProduct``: cos(theta) - (1 - cos(m)) where theta + m > pi.

    With ``K`` its ``ArcMarginProduct_subcenter``, with ``mp`` and ``k_top`` its
    ``ArcMarginProduct_intertopk_subcenter``; 0 for either is that with ``do_lm=True``.

    Args:
        in_features: D >= 1.
        out_features: C >= 2.
        scale: s > 0.
        margin: m, radians; WeSpeaker's scheduler calls ``update(margin)``. Or (C,) floating, where
            inter-topk has its penalty as it is.
        easy_margin: cos(theta) where theta >= pi / 2.
        K: sub-centres, rows of the weight for each class, of which the nearest counts; 3 there.
        mp: the penalty of inter-topk at a margin of 0.2, radians; 0.06 there. As there it grows
            and shrinks with the margin, and is 0 up to a margin of 0.001.
        k_top: how many other classes of a row get it, 0 to 8; 5 there.
        options: ``reduction`` and what follows in `MarginSoftmaxLoss`.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        **_AngularHead.settings,
        "mp": functools.partial(_validate.between, "mp", lowest=0.0, highest=1.0),
        "k_top": _validate_others.top_or_none,
    }
    boundary = "continuous"

    def __init__(
        self, in_features: int, out_features: int, scale: float = 32.0, margin: float = 0.2,
        easy_margin: bool = False, K: int = 1, mp: float = 0.0, k_top: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        options = {"sub_centers": K} | options
        super().__init__(out_features, in_features, scale, margin, easy_margin, **options)
        self.mp, self.k_top = mp, k_top

    def negatives(
        self, embeddings: torch.Tensor, labels: torch.Tensor
    ) -> negatives.Negatives | None:
        """cos(theta - p) of the nearest other classes, p = mp m / 0.2."""
        margin = self.margin
        # there a penalty is for the margin 0.2, and follows another one from 0.001 on
        share = margin / 0.2 if isinstance(margin, float) else 1.0
        if not (self.mp and self.k_top) or share * 0.2 <= 0.001:
            return None
        _refusals.penalty(self.mp, 0.2 * share, self.mp * share)
        return functional.inter_topk(embeddings, self, labels, self.k_top, self.mp * share)


class SpeechBrainAAM(_AngularHead):
    """SpeechBrain's ``Classifier`` and ``LogSoftmaxWrapper(AdditiveAngularMargin)`` in one.

    Args:
        input_size: D >= 1, of ``Classifier`` without ``lin_blocks``.
        out_neurons: C >= 2.
        margin: m, radians; its recipes have 0.2.
        scale: s > 0; its recipes have 30.
        easy_margin: cos(theta) where theta >= pi / 2.
        options: ``reduction`` and what follows in `MarginSoftmaxLoss`.
    """

    def __init__(
        self, input_size: int, out_neurons: int, margin: float = 0.2, scale: float = 30.0,
        easy_margin: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(out_neurons, input_size, scale, margin, easy_margin, **options)


class AddMarginProduct(_ShortNames):
    """CosFace of arcface-pytorch, and of WeSpeaker with (32, 0.2): cos(theta) - m.

    Args:
        in_features: D >= 1.
        out_features: C >= 2.
        s: scale, > 0.
        m: an offset of the cosine; a number, or (C,) floating.
        options: ``reduction`` and what follows in `MarginSoftmaxLoss`.
    """

    settings: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "margin": _validate_margins.module_cosine_margin,
        **MarginSoftmaxLoss.settings,
    }

    def __init__(
        self, in_features: int, out_features: int, s: float = 30.0, m: float = 0.40,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(out_features, in_features, s, **options)
        self.margin = m

    def update(self, margin: float = 0.2) -> None:
        """Set the margin, as WeSpeaker's schedule does between steps."""
        self.margin = margin

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """cos(theta) - m."""
        return margins.additive(of_rows("margin", self.margin, labels, self.num_classes))
