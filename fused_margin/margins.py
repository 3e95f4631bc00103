r"""Margins as functions of the target cosine: :math:`\psi(u)` on (N,) tensors.

Every built-in margin is one formula with four coefficients (eq. 5 of ``docs/math.md``)::

    psi(u) = u * cos - sqrt(1 - u^2) * sin      where u >= threshold
           = u - offset                         elsewhere

ArcFace uses both branches; CosFace and plain normalised softmax have a threshold above 1, so that
only the second applies. Kernels take the four numbers, and a new margin of this form needs no
kernel. A coefficient may also be an (N,) tensor: one margin per sample, differentiable.
"""

from __future__ import annotations

import math

import torch

from fused_margin import _validate
from fused_margin._arguments import Margin

# psi'(u) divides by sqrt(max(1 - u^2, SINE_SQUARED_FLOOR)). With 1e-7 instead, fp32 gradients at
# angles below 3e-3 rad could be 60 % off; with 1e-5, 0.6 % (docs/math.md). Shared by every backend.
SINE_SQUARED_FLOOR = 1e-5

# Cosines lie in [-1, 1], so these thresholds mean "first branch never" and "first branch always".
NEVER_ANGULAR = 2.0
ALWAYS_ANGULAR = -2.0


NO_MARGIN = Margin(1.0, 0.0, NEVER_ANGULAR, 0.0)


def angular(margin: float | torch.Tensor, boundary: str = "linear", grad: str = "exact") -> Margin:
    """Coefficients of ArcFace's additive angular margin.

    Args:
        margin: radians, at most pi; float, or (N,) tensor, whose values are not checked.
        boundary: what happens where theta + m > pi: ``"linear"`` continues with cos(theta) -
            m sin(m), ``"continuous"`` with cos(theta) - (1 + cos(pi - m)), ``"none"`` keeps
            cos(theta + m), which rises again there.
        grad: ``"exact"``, or ``"straight_through"``: psi'(u) = 1, as when the margin is applied
            outside autograd.

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019,
        arXiv:1801.07698, eq. 3.
    """
    _validate.boundary(boundary)
    straight_through = _validate.grad(grad) == "straight_through"
    if not isinstance(margin, torch.Tensor):
        margin = _validate.angular_margin(margin)
    if torch.compiler.is_compiling() and not isinstance(margin, torch.Tensor):
        # Dynamo keeps a float symbolic in a product, and in torch 2.11 not in math.cos
        margin = torch.ones((), dtype=torch.float64, device="cpu") * margin
    if isinstance(margin, torch.Tensor):
        cos, sin = margin.cos(), margin.sin()
        offset = margin * sin if boundary == "linear" else 1.0 - cos
        threshold = torch.where(margin > 0, -cos, torch.full_like(cos, ALWAYS_ANGULAR)).detach()
        if boundary == "none":
            threshold = torch.full_like(threshold, ALWAYS_ANGULAR)
        return Margin(cos, sin, threshold, offset, straight_through)
    cos, sin = math.cos(margin), math.sin(margin)
    offset = margin * sin if boundary == "linear" else 1.0 - cos
    # theta + m > pi  <=>  u < cos(pi - m) = -cos(m), and it never happens for m <= 0
    threshold = ALWAYS_ANGULAR if boundary == "none" or margin <= 0 else -cos
    return Margin(cos, sin, threshold, offset, straight_through)


def additive(margin: float | torch.Tensor) -> Margin:
    """Coefficients of CosFace's margin, a cosine offset: psi(u) = u - m.

    References:
        Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, 2018,
        arXiv:1801.09414, eq. 4.
    """
    return Margin(1.0, 0.0, NEVER_ANGULAR, margin)


def clamp_cosine(u: torch.Tensor) -> torch.Tensor:
    """u clamped to [-1, 1], which rounding may leave; the derivative by u is 1 everywhere."""
    value = u.detach()
    return u + (value.clamp(-1.0, 1.0) - value)


def sine(u: torch.Tensor) -> torch.Tensor:
    r"""sin(theta) of cosines u = cos(theta), with a slope that stays finite.

    .. math:: \sqrt{\max(1 - u^2, 0)}, \quad\text{slope}\quad
              \frac{-u}{\sqrt{\max(1 - u^2, 10^{-5})}}

    For margins of one's own: ``psi = u * math.cos(m) - sine(u) * math.sin(m)`` is cos(theta + m),
    for which ``torch.cos(torch.acos(u) + m)`` has an infinite slope at u = 1 and -1. Within
    0.0032 rad of theta = 0 and pi the floor bounds the slope; the value is exact there too.

    Args:
        u: cosines, any shape, floating; a u that rounding has put outside [-1, 1] gives 0.

    Returns:
        sin(theta) >= 0, u's shape and dtype; differentiable any number of times, in forward mode
        and under `torch.func` transforms too.
    """
    squared = (1.0 - u) * (1.0 + u)  # 1 - u^2 without its rounding
    is_regular = squared > SINE_SQUARED_FLOOR
    # sqrt sees 1 instead of what the other branch takes: its own derivative is infinite at 0
    regular = squared.where(is_regular, 1.0).sqrt()
    floored = squared / (2.0 * math.sqrt(SINE_SQUARED_FLOOR))  # the right slope, by autograd
    value = squared.detach().clamp_min(0.0).sqrt()
    return regular.where(is_regular, value + (floored - floored.detach()))


def apply(u: torch.Tensor, margin: Margin) -> torch.Tensor:
    """Evaluate psi(u) (eq. 5), differentiable in ``u`` and in tensor coefficients.

    Args:
        u: target cosines, (N,). Rounding may leave them a little outside [-1, 1]; the value is
            clamped, the derivative is not.
        margin: the coefficients.

    Returns:
        psi(u), (N,).
    """
    u = clamp_cosine(u)
    shifted = u - margin.offset
    if isinstance(margin.threshold, float) and margin.threshold == NEVER_ANGULAR:
        psi = shifted
    else:
        psi = torch.where(u >= margin.threshold, u * margin.cos - sine(u) * margin.sin, shifted)
    if margin.straight_through:
        return psi.detach() + (u - u.detach())
    return psi
