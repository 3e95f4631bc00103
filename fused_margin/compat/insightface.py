"""The margins and `PartialFC_V2` of insightface's arcface_torch, for one process.

```python
from fused_margin.compat.insightface import CombinedMarginLoss, PartialFC_V2
# was: from losses import CombinedMarginLoss; from partial_fc_v2 import PartialFC_V2
```

Loss, gradients and state are those of arcface_torch, without a process group and without the (N, C)
logits. What differs:

- The last batch may be smaller. Labels out of range are errors; there their rows count with a
  constant loss and push all classes away.
- There a loss above 69.08 = -ln(1e-30) is shown as 69.08; its gradient is the same.
- ArcFace's gradient there is the straight-through one, and so it is here by default;
  ``grad="exact"`` gives the derivative of the loss.
- Sampled classes, and classes split over ranks, are errors.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import nn

from fused_margin import (
    _compiled,
    _names,
    _setup,
    _validate,
    _validate_margins,
    _validate_settings,
    margins,
    negatives,
)
from fused_margin.compat import _refusals
from fused_margin.losses.base import MarginSoftmaxLoss, draw_normal

__all__ = ["ArcFace", "CombinedMarginLoss", "CosFace", "PartialFC_V2"]


class _Margin(_names.Watched, nn.Module):
    """A margin for `PartialFC_V2`, which also does what it does there: change finished cosines."""

    s: float
    interclass_filtering_threshold: float = 0.0

    @property
    def psi(self) -> margins.Margin:
        """The margin, a function of the target cosine."""
        raise NotImplementedError

    @property
    def negatives(self) -> negatives.Negatives | None:
        """The logit 0 above the threshold, if that is positive."""
        threshold = self.interclass_filtering_threshold
        return negatives.filtered(threshold, zero=True) if threshold > 0 else None

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Scaled logits with the margin at the targets.

        Args:
            logits: cosines (N, C), left as they are.
            labels: (N,) or (N, 1); -1 leaves a row without target.

        Returns:
            (N, C). `PartialFC_V2` doesn't call this, as it makes no such matrix.
        """
        labels = labels.flatten()
        rows = (labels != -1).nonzero()[:, 0]
        places = rows, labels[rows]
        target = margins.apply(logits[places], self.psi)
        if self.interclass_filtering_threshold > 0:
            logits = logits.masked_fill(logits > self.interclass_filtering_threshold, 0.0)
        return logits.index_put(places, target) * self.s


class CombinedMarginLoss(_Margin):
    """ArcFace for (m1, m2, m3) = (1, m, 0), CosFace for (1, 0, m): what its original computes.

    Args:
        s: scale, > 0.
        m1: 1.0.
        m2: ArcFace's margin, radians.
        m3: CosFace's margin, an offset of the cosine.
        interclass_filtering_threshold: other classes whose cosine is larger get the logit 0,
            without a gradient, as likely wrong labels; 0 for none, 0.4 there for noisy sets.
        grad: ArcFace's, ``"straight_through"`` or ``"exact"``.
    """

    def __init__(
        self, s: float, m1: float, m2: float, m3: float, interclass_filtering_threshold: float = 0,
        *, grad: str = "straight_through",
    ) -> None:  # fmt: skip
        super().__init__()
        _refusals.combined_margin(m1, m2, m3)
        self.s, self.m1 = _validate_settings.number_scale(s), m1
        self.m2, self.m3 = _validate_margins.angular_margin(m2), _validate_margins.cosine_margin(m3)
        self.interclass_filtering_threshold = _validate.between(
            "interclass_filtering_threshold", interclass_filtering_threshold, -1.0, 1.0
        )
        self.grad = _validate.grad(grad)

    @property
    def psi(self) -> margins.Margin:
        """cos(theta) - m3, or cos(theta + m2)."""
        if self.m3 > 0:
            return margins.additive(self.m3)
        return margins.angular(self.m2, "none", self.grad)

    def extra_repr(self) -> str:
        """With units."""
        shown = f"s={self.s:g}, m1={self.m1}, m2={self.m2} rad, m3={self.m3} (cosine)"
        threshold = self.interclass_filtering_threshold
        return f"{shown}, interclass_filtering_threshold={threshold:g}" if threshold > 0 else shown


class ArcFace(_Margin):
    """cos(theta + m), also where it rises again.

    Args:
        s: scale, > 0.
        margin: m, radians.
        grad: ``"straight_through"`` or ``"exact"``.
    """

    def __init__(
        self, s: float = 64.0, margin: float = 0.5, *, grad: str = "straight_through"
    ) -> None:
        super().__init__()
        self.s, self.margin = (
            _validate_settings.number_scale(s),
            _validate_margins.angular_margin(margin),
        )
        self.grad = _validate.grad(grad)

    @property
    def psi(self) -> margins.Margin:
        """cos(theta + m)."""
        return margins.angular(self.margin, "none", self.grad)

    def extra_repr(self) -> str:
        """With units."""
        return f"s={self.s:g}, margin={self.margin} rad, grad={self.grad!r}"


class CosFace(_Margin):
    """cos(theta) - m.

    Args:
        s: scale, > 0.
        m: an offset of the cosine.
    """

    def __init__(self, s: float = 64.0, m: float = 0.40) -> None:
        super().__init__()
        self.s, self.m = _validate_settings.number_scale(s), _validate_margins.cosine_margin(m)

    @property
    def psi(self) -> margins.Margin:
        """cos(theta) - m."""
        return margins.additive(self.m)

    def extra_repr(self) -> str:
        """With units."""
        return f"s={self.s:g}, m={self.m} (cosine)"


class PartialFC_V2(MarginSoftmaxLoss):
    """Softmax with a margin over all classes, in one process; no process group is needed.

    Args:
        margin_loss: one of this module. It is asked at each call, so that a schedule may set its
            margin.
        embedding_size: D >= 1.
        num_classes: C >= 2.
        sample_rate: 1.0.
        fp16: products on a GPU in fp16, as there; no difference on a CPU, as there.
        options: ``reduction`` and what follows in `MarginSoftmaxLoss`.

    Attributes:
        weight: (C, D), drawn from normal(0, 0.01²).

    References:
        An et al., Killing Two Birds with One Stone: Efficient and Robust Training of Face
        Recognition CNNs by Partial FC, 2022, arXiv:2203.15565.
    """

    settings: ClassVar[dict[str, Any]] = {
        "sample_rate": _refusals.sample_rate,
        **{name: check for name, check in MarginSoftmaxLoss.settings.items() if name != "scale"},
    }
    _elsewhere: ClassVar[dict[str, str]] = MarginSoftmaxLoss._elsewhere | dict.fromkeys(
        ("margin", "m1", "m2", "m3", "interclass_filtering_threshold"),
        "is an attribute of its margin_softmax, the margin_loss that it was given",
    )

    def __init__(
        self, margin_loss: _Margin, embedding_size: int, num_classes: int,
        sample_rate: float = 1.0, fp16: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        _refusals.margin_loss(margin_loss, (_Margin,))
        sample_rate = _refusals.sample_rate(sample_rate)
        _refusals.ranks(_setup._ranks())
        super().__init__(num_classes, embedding_size, None, **options)
        self.sample_rate, self.fp16 = sample_rate, fp16
        self.margin_softmax = margin_loss

    def reset_parameters(self) -> None:
        """Draw the class weights anew from normal(0, 0.01²)."""
        draw_normal(self.weight, 0.01)

    @property
    def scale(self) -> float:
        """The scale of its margin."""
        return self.margin_softmax.s

    @scale.setter
    def scale(self, value: Any) -> None:
        self.margin_softmax.s = _validate_settings.number_scale(value)

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> margins.Margin:
        """The margin of ``margin_loss``."""
        return self.margin_softmax.psi

    def negatives(
        self, embeddings: torch.Tensor, labels: torch.Tensor
    ) -> negatives.Negatives | None:
        """Those of ``margin_loss``."""
        return self.margin_softmax.negatives

    @_compiled.raising()
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        local_embeddings: torch.Tensor,
        local_labels: torch.Tensor,
        *,
        sample_weight: torch.Tensor | None = None,
        return_stats: bool = False,
    ) -> Any:
        """Mean loss of embeddings (N, D) and labels (N,) or (N, 1): 0-d."""
        _validate.both_tensors(local_embeddings, local_labels)
        if local_labels.ndim == 2 and local_labels.shape[1] == 1:
            local_labels = local_labels.squeeze(1)
        forward = functools.partial(
            super().forward, sample_weight=sample_weight, return_stats=return_stats
        )
        if self.fp16 and local_embeddings.is_cuda:
            with torch.autocast("cuda", torch.float16):
                return forward(local_embeddings, local_labels)
        return forward(local_embeddings, local_labels)
