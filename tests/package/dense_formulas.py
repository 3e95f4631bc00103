"""Losses by their papers' formulas, on the whole (N, C) logits: nothing of the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


class Formula(NamedTuple):
    """Logits over the scale.

    Attributes:
        psi: of the target's cosines, (N, 1). other: of the others', (N, C), beside the target's.
    """

    psi: Callable[[Tensor], Tensor]
    other: Callable[[Tensor, Tensor], Tensor] = lambda c, u: c


def cosines(x: Tensor, w: Tensor, centers: int = 1) -> Tensor:
    """To the nearest centre of each class, the first of several, (N, C)."""
    found = F.normalize(x) @ F.normalize(w).t()
    return found if centers == 1 else found.unflatten(1, (-1, centers)).max(dim=2).values


def logits(
    formula: Formula, x: Tensor, w: Tensor, labels: Tensor, scale: Any, centers: int = 1
) -> Tensor:
    """Of rows whose labels are in range, and of ignored ones as if they were of class 0."""
    c, index = cosines(x, w, centers), labels.clamp_min(0)[:, None]
    u = c.gather(1, index)
    return scale * formula.other(c, u).scatter(1, index, formula.psi(u))


def arc(margin: float) -> Callable[[Tensor], Tensor]:
    """cos(theta + m), and cos(theta) - m sin(m) past pi."""

    def psi(u: Tensor) -> Tensor:
        theta = u.acos()
        return torch.where(
            theta + margin <= math.pi, (theta + margin).cos(), u - margin * math.sin(margin)
        )

    return psi


def additive(margin: float) -> Callable[[Tensor], Tensor]:
    """cos(theta) - m."""
    return lambda u: u - margin


def curricular(margin: float, t: float) -> Formula:
    """Of CurricularFace: c (t + c) where c > cos(theta_y + m)."""

    def other(c: Tensor, u: Tensor) -> Tensor:
        return torch.where(c > (u.detach().acos() + margin).cos(), c * (t + c), c)

    return Formula(arc(margin), other)


def misclassified(psi: Callable[[Tensor], Tensor], t: float) -> Formula:
    """Of MV-softmax: t c + t - 1 where c > psi(cos(theta_y))."""
    return Formula(psi, lambda c, u: torch.where(c > psi(u.detach()), t * c + t - 1.0, c))


def circle(margin: float) -> Formula:
    """Of Circle loss, with factors that are constants."""
    return Formula(
        lambda u: (1.0 + margin - u.detach()).clamp_min(0.0) * (u - (1.0 - margin)),
        lambda c, u: (c.detach() + margin).clamp_min(0.0) * (c - margin),
    )


def filtered(psi: Callable[[Tensor], Tensor], threshold: float, value: float) -> Formula:
    """Logits of a constant value where c > threshold."""
    return Formula(psi, lambda c, u: c.masked_fill(c.detach() > threshold, value))


def inter_topk(
    psi: Callable[[Tensor], Tensor], k: int, penalty: float, *, turns: bool = False
) -> Formula:
    """c + penalty, or cos(theta - penalty), for the k largest other cosines of each row."""

    def other(c: Tensor, u: Tensor) -> Tensor:
        # the target is put in its place afterwards, and is not among them
        chosen = c.detach().masked_fill(c == u, -2.0).topk(k, dim=1).indices
        is_chosen = torch.zeros_like(c).scatter(1, chosen, 1.0) > 0.0
        inside = c.clamp(-1.0 + 1e-12, 1.0 - 1e-12)  # rows that lie on their class
        return torch.where(is_chosen, (inside.acos() - penalty).cos() if turns else c + penalty, c)

    return Formula(psi, other)
