r"""What a loss makes of the cosines of the other classes (eq. 20 of ``docs/math.md``).

The logit of class :math:`k \ne y_n` is :math:`s\,\varphi(c_{nk})`,

.. math:: \varphi(c) = \begin{cases} d + a c + b c^2 + h \sqrt{1 - c^2}, & c > \tau_n \\
    l c, & c \le \tau_n \end{cases} \qquad \text{with the slope }
    e + f c - \frac{h c}{\sqrt{1 - c^2}}, \text{ or } l,

which is the derivative unless a loss holds a part of it constant. `functional.margin_softmax` takes
one of these as ``negatives``, beside any margin, on every backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from fused_margin import _validate, _validate_margins, _validate_others, margins
from fused_margin._arguments import Margin

__all__ = ["Negatives", "circle", "curricular", "filtered", "misclassified"]

Tensor = torch.Tensor
Number = float | Tensor


class Negatives(NamedTuple):
    """Coefficients of eq. 20.

    Attributes:
        threshold: tau, a number, (N,) numbers, or a function of the target cosines (N,) that
            returns such; nothing is differentiated through it.
        phi: d, a, b, e, f, l and, if it isn't 0, h: numbers, or 0-d tensors, without gradients.
            The root in the slope is at least the one that `margins.sine` has.
    """

    threshold: Number | Callable[[Tensor], Tensor]
    phi: tuple[Number, ...]

    def thresholds(self, u: Tensor, dtype: torch.dtype) -> Tensor:
        """tau of rows with target cosines ``u``, (N,)."""
        threshold = self.threshold
        if callable(threshold):
            threshold = _validate_margins.psi_values(threshold(u), u)
        _validate_others.threshold(threshold, u)
        return (torch.zeros_like(u) + threshold).to(dtype)

    def coefficients(self, device: torch.device) -> Tensor:
        """phi, (6,) or (7,) fp64."""
        _validate_others.coefficients(self.phi)
        # a float in a product stays symbolic under `torch.compile`
        one = torch.ones((), dtype=torch.float64, device=device)
        return torch.stack([one * number for number in self.phi])


def curricular(t: Number, margin: Number = 0.5) -> Negatives:
    r"""CurricularFace: :math:`\varphi(c) = c\,(t + c)` where :math:`c > \cos(\theta_y + m)`.

    Args:
        t: in [-1, 1], the moving mean of the target cosines; a number or a 0-d tensor.
        margin: m in radians; a number or an (N,) tensor, whose values are not checked.

    References:
        Huang et al., CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition,
        2020, arXiv:2004.00288, eq. 6, 7.
    """
    t, shape = _validate_others.curriculum(t), margins.angular(margin, "none")
    return Negatives(lambda u: margins.apply(u, shape), (0.0, t, 1.0, t, 2.0, 1.0))


def misclassified(psi: Margin | Callable[[Tensor], Tensor], t: float = 1.2) -> Negatives:
    r"""MV-softmax: :math:`\varphi(c) = t c + t - 1` where :math:`c > \psi(\cos\theta_y)`.

    Args:
        psi: the margin of the loss, one of `margins` or a function of the target cosines.
        t: >= 1; with 1 nothing changes.

    References:
        Wang et al., Mis-classified Vector Guided Softmax Loss for Face Recognition, 2019,
        arXiv:1912.00833, eq. 5, 7 (its adaptive weights).
    """
    _validate_margins.psi(psi)
    t = _validate.between("t", t, 1.0, 10.0)
    threshold = (lambda u: margins.apply(u, psi)) if isinstance(psi, Margin) else psi
    return Negatives(threshold, (t - 1.0, t, 0.0, t, 0.0, 1.0))


def filtered(threshold: float, *, zero: bool = False) -> Negatives:
    """Leave out of the softmax whatever class is nearer than a threshold: likely a wrong label.

    Args:
        threshold: a cosine, in [-1, 1]; people take 0.4.
        zero: give such classes the logit 0 instead, as insightface does.
    """
    threshold = _validate.between("threshold", threshold, -1.0, 1.0)
    return Negatives(threshold, (0.0 if zero else -math.inf, 0.0, 0.0, 0.0, 0.0, 1.0))


def circle(margin: float = 0.35) -> Negatives:
    r"""The negatives of Circle loss: :math:`\varphi(c) = [c + m]_+ (c - m)`, the factor constant.

    Args:
        margin: m, an offset of the cosine, in [0, 1].

    References:
        Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization, 2020,
        arXiv:2002.10857, eq. 6, 8.
    """
    margin = _validate.between("margin", margin, 0.0, 1.0)
    return Negatives(-margin, (-margin * margin, 0.0, 1.0, margin, 1.0, 0.0))
