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
from collections.abc import Callable

import torch

from fused_margin import _validate, _validate_margins
from fused_margin._arguments import Margin

__all__ = [
    "NO_MARGIN",
    "Margin",
    "adaptive",
    "additive",
    "angular",
    "by_class_size",
    "circle",
    "combined",
    "multiplied",
    "sine",
    "theta",
]

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
            cos(theta + m), which rises again there. ``"easy"``, the easy margin, has cos(theta + m)
            where cos(theta) >= 0, and cos(theta) elsewhere.
        grad: ``"exact"``, or ``"straight_through"``: psi'(u) = 1, as when the margin is applied
            outside autograd.

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019,
        arXiv:1801.07698, eq. 3.
    """
    _validate.boundary(boundary)
    straight_through = _validate.grad(grad) == "straight_through"
    if not isinstance(margin, torch.Tensor):
        margin = _validate_margins.angular_margin(margin)
    if torch.compiler.is_compiling() and not isinstance(margin, torch.Tensor):
        # Dynamo keeps a float symbolic in a product, and in torch 2.11 not in math.cos
        margin = torch.ones((), dtype=torch.float64, device="cpu") * margin
    if isinstance(margin, torch.Tensor):
        cos, sin = margin.cos(), margin.sin()
        if boundary == "easy":
            return Margin(cos, sin, 0.0, 0.0, straight_through)
        offset = margin * sin if boundary == "linear" else 1.0 - cos
        threshold = torch.where(margin > 0, -cos, torch.full_like(cos, ALWAYS_ANGULAR)).detach()
        if boundary == "none":
            threshold = torch.full_like(threshold, ALWAYS_ANGULAR)
        return Margin(cos, sin, threshold, offset, straight_through)
    cos, sin = math.cos(margin), math.sin(margin)
    if boundary == "easy":
        return Margin(cos, sin, 0.0, 0.0, straight_through)
    offset = margin * sin if boundary == "linear" else 1.0 - cos
    # theta + m > pi  <=>  u < cos(pi - m) = -cos(m), and it never happens for m <= 0
    threshold = ALWAYS_ANGULAR if boundary == "none" or margin <= 0 else -cos
    return Margin(cos, sin, threshold, offset, straight_through)


def additive(margin: float | torch.Tensor) -> Margin:
    """Coefficients of CosFace's margin, a cosine offset: psi(u) = u - m.

    Args:
        margin: an offset of the cosine, within 2; float, or (N,) tensor, whose values are not
            checked.

    References:
        Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, 2018,
        arXiv:1801.09414, eq. 4.
    """
    if not isinstance(margin, torch.Tensor):
        margin = _validate_margins.cosine_margin(margin)
    return Margin(1.0, 0.0, NEVER_ANGULAR, margin)


def combined(
    m1: float, m2: float, m3: float, boundary: str = "none", grad: str = "exact"
) -> Margin | Callable[[torch.Tensor], torch.Tensor]:
    """The margin of which ArcFace, CosFace and SphereFace are cases: cos(m1 theta + m2) - m3.

    Args:
        m1: multiplies the angle, in [0.01, 16].
        m2: radians, within pi.
        m3: an offset of the cosine, within 2.
        boundary: where m1 theta + m2 > pi: ``"none"`` keeps the formula, which rises again there;
            ``"continuous"`` goes on from -1 - m3 as cos(theta) does.
        grad: ``"exact"``, or ``"straight_through"``: psi'(u) = 1.

    Returns:
        A `Margin` if m1 is 1 and either of m2 and m3 is 0, so that it is one of eq. 5; else a
        function.

    References:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019,
        arXiv:1801.07698, eq. 4.
    """
    _validate.choice("boundary", boundary, _validate_margins.CONTINUATIONS)
    straight_through = _validate.grad(grad) == "straight_through"
    m1 = _validate_margins.multiplier("m1", m1, 0.01)
    m2, m3 = _validate_margins.angle("m2", m2), _validate_margins.offset("m3", m3)
    if m1 == 1.0 and m2 == 0.0:
        return additive(m3)
    if m1 == 1.0 and m3 == 0.0:
        return angular(m2, boundary, grad)

    def psi(u: torch.Tensor) -> torch.Tensor:
        angle = m1 * theta(u) + m2
        value = angle.cos() - m3
        if boundary == "continuous":
            # from where the angle reaches pi; cos of a tensor, as m1 may be symbolic in a graph
            last = ((math.pi - m2) / m1 * torch.ones_like(u)).clamp(0.0, math.pi).cos()
            value = value.where(angle <= math.pi, u - last - 1.0 - m3)
        return value.detach() + (u - u.detach()) if straight_through else value

    return psi


def multiplied(margin: float) -> Callable[[torch.Tensor], torch.Tensor]:
    r"""SphereFace's margin, which multiplies the angle: :math:`(-1)^k \cos(m\theta) - 2k`.

    k is the floor of m theta / pi: the cosine falls on, by 2 for every pi of m theta.

    Args:
        margin: m, from 1, which is no margin, to 16; not only integers.

    References:
        Liu et al., SphereFace: Deep Hypersphere Embedding for Face Recognition, 2017,
        arXiv:1704.08063, eq. 6.
    """
    margin = _validate_margins.multiplier("margin", margin)

    def psi(u: torch.Tensor) -> torch.Tensor:
        angle = margin * theta(u)
        turns = (angle.detach() / math.pi).floor()
        return (1.0 - 2.0 * turns.remainder(2.0)) * angle.cos() - 2.0 * turns

    return psi


def adaptive(margin: float, quality: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    r"""AdaFace's margin (eq. 17), with the angle clipped to [0, pi].

    .. math:: \cos(\theta - m \hat z) - (m + m \hat z)

    Args:
        margin: m, radians and an offset of the cosine.
        quality: z of each row, in [-1, 1], (N,).

    References:
        Kim et al., AdaFace: Quality Adaptive Margin for Face Recognition, 2022, arXiv:2204.00964.
    """

    def psi(u: torch.Tensor) -> torch.Tensor:
        shift = -margin * quality.to(u.dtype)
        cos, sin = shift.cos(), shift.sin()
        turned = u * cos - sine(u) * sin
        # theta + shift < 0  <=>  u > cos(shift), and > pi  <=>  u < -cos(shift)
        turned = torch.where((shift < 0) & (u > cos), 1.0, turned)
        turned = torch.where((shift > 0) & (u < -cos), -1.0, turned)
        return turned - margin + shift

    return psi


def circle(margin: float) -> Callable[[torch.Tensor], torch.Tensor]:
    r"""The target's part of Circle loss: :math:`[1 + m - u]_+ (u - (1 - m))`, the factor constant.

    Args:
        margin: m, an offset of the cosine, in [0, 1].

    References:
        Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization, 2020,
        arXiv:2002.10857, eq. 6, 8.
    """
    margin = _validate.between("margin", margin, 0.0, 1.0, "it is a cosine offset")

    def psi(u: torch.Tensor) -> torch.Tensor:
        offset = margin * torch.ones_like(u)  # a product, in which Dynamo keeps a float symbolic
        return (1.0 + offset - u.detach()).clamp_min(0.0) * (u - (1.0 - offset))

    return psi


def by_class_size(
    counts: torch.Tensor, smallest: float = 0.05, largest: float = 0.5, power: float = 0.25
) -> torch.Tensor:
    r"""Margins by how many samples a class has: the fewer, the larger, as :math:`n^{-1/4}`.

    Args:
        counts: samples of each class, (C,), as ``torch.bincount(labels, minlength=C)`` makes them;
            0 counts as 1.
        smallest: margin of the largest class, radians or an offset of the cosine, within pi.
        largest: margin of the smallest class.
        power: of 1/n, in [0, 10].

    Returns:
        (C,) fp32: n^-power, scaled to [smallest, largest]; the middle if all counts are equal.

    References:
        Ha et al., Google Landmark Recognition 2020 Competition Third Place Solution, 2020,
        arXiv:2010.05350.
    """
    counts = _validate_margins.class_counts(counts)
    smallest = _validate_margins.angle("smallest", smallest)
    largest = _validate_margins.angle("largest", largest)
    power = _validate.between("power", power, 0.0, 10.0)
    _validate.ordered("smallest", smallest, "largest", largest)
    rarity = counts.to(torch.float64, copy=True).clamp_min_(1.0) ** -power
    low, high = rarity.aminmax()
    is_level = high == low
    part = torch.where(is_level, 0.5, (rarity - low) / torch.where(is_level, 1.0, high - low))
    return (smallest + (largest - smallest) * part).to(torch.float32)


def theta(u: torch.Tensor) -> torch.Tensor:
    """The angle of target cosines u, in radians, with a finite slope at u = -1 and 1."""
    return torch.atan2(sine(u), u)


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
