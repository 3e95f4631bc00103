"""What else than exp(s c) a sweep makes of the other classes' cosines, block by block.

Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fused_margin._arguments import Extras, Found
from fused_margin._cpu.products import LOG2_E
from fused_margin._cpu.rows import Problem
from fused_margin._numerics import largest_logit

LOWEST = -math.inf


def bound(problem: Problem) -> float:
    """The largest |s phi(c)|."""
    return problem.scale * largest_logit(problem.extras.phi)


class _Phi(NamedTuple):
    """phi (eq. 20) of z = s log2(e) c: z times ``below``, or offset + linear z + square z^2."""

    threshold: torch.Tensor  # (1, N)
    offset: float
    linear: float
    square: float
    slope: float
    slope_linear: float
    below: float

    @classmethod
    def of(cls, extras: Extras, unit: float) -> _Phi | None:
        if extras.threshold is None or extras.phi is None:
            return None
        offset, linear, square, slope, slope_linear, below = extras.phi.tolist()
        threshold = (extras.threshold * unit)[None, :]
        return cls(
            threshold, offset * unit, linear, square / unit, slope, slope_linear / unit, below
        )


class Others:
    """Works on blocks of z = s log2(e) c, (B, N), in place."""

    def __init__(self, problem: Problem, like: torch.Tensor) -> None:
        """Prepare buffers of the shape of ``like``, the largest block."""
        extras, self.unit = problem.extras, problem.scale * LOG2_E
        self.centers = extras.centers
        self.phi = _Phi.of(extras, self.unit)
        self.lost = torch.empty_like(like, dtype=torch.bool) if extras.reshapes else None
        self.is_below = self.slopes = self.values = None
        if self.phi is not None:
            self.is_below = torch.empty_like(like, dtype=torch.bool)
            self.slopes, self.values = torch.empty_like(like), torch.empty_like(like)

    def leave_out(self, z: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> None:
        """Set z of the rows' own classes to -inf, and that of centres that are not the nearest.

        Args:
            z: (B, N). targets: rows of W, as rows of the block, (T,). rows: of the batch, (T,).
        """
        if self.centers == 1:
            z[targets, rows] = LOWEST
            return
        of_class = z.view(-1, self.centers, z.shape[1])
        of_class[targets // self.centers, :, rows] = LOWEST
        largest = of_class[:, 0].clone()
        for center in range(1, self.centers):
            torch.maximum(largest, of_class[:, center], out=largest)
        found = torch.zeros_like(largest, dtype=torch.bool)
        for center in range(self.centers):
            of_center = of_class[:, center]
            is_less = of_center < largest
            is_less |= found
            of_center.masked_fill_(is_less, LOWEST)
            found |= is_less.logical_not_()

    def shape(self, z: torch.Tensor) -> torch.Tensor | None:
        """Turn z into s log2(e) phi(c); returns its slope where that is not 1, (B, N)."""
        phi = self.phi
        if phi is None or self.is_below is None or self.slopes is None or self.values is None:
            return None
        length = z.shape[0]
        is_below = torch.le(z, phi.threshold, out=self.is_below[:length])
        values, slopes = self.values[:length], self.slopes[:length]
        is_lost = None
        if phi.below != 1.0 and self.lost is not None:
            is_lost = torch.eq(z, LOWEST, out=self.lost[:length])
        if phi.slope_linear:
            _line(z, phi.slope, phi.slope_linear, out=slopes).masked_fill_(is_below, phi.below)
        else:
            torch.where(is_below, _number(z, phi.below), _number(z, phi.slope), out=slopes)
        if phi.square:
            _line(z, phi.linear, phi.square, out=values).mul_(z)
            if phi.offset:
                values.add_(phi.offset)
        elif phi.linear:
            _line(z, phi.offset, phi.linear, out=values)
        else:
            values.fill_(phi.offset)
        if phi.below != 1.0:
            z.mul_(phi.below)
        torch.where(is_below, z, values, out=z)
        if is_lost is not None:
            z.masked_fill_(is_lost, LOWEST)
        return slopes

    def total(self, z: torch.Tensor) -> torch.Tensor:
        """Sum of phi(c) over the block, (N,) fp64; z as `shape` left it."""
        lost = torch.eq(z, LOWEST)
        return z.masked_fill(lost, 0.0).sum(dim=0).double().div_(self.unit)


def _number(like: torch.Tensor, value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=like.dtype, device="cpu")


def _line(z: torch.Tensor, offset: float, slope: float, out: torch.Tensor) -> torch.Tensor:
    """offset + slope z in one pass."""
    return torch.add(_number(z, offset), z, alpha=slope, out=out)


class Nearest:
    """The nearest other class of each row so far, and how many are nearer than the target."""

    def __init__(self, problem: Problem, like: torch.Tensor) -> None:
        """Prepare a buffer of the shape of ``like``, the largest block."""
        extras, num_rows = problem.extras, problem.x.shape[0]
        self.found = Found.empty(problem.x, problem.accumulate, extras)
        self.unit = problem.scale * LOG2_E
        self.centers, self.nearer = extras.centers, None
        if extras.nearer is not None:
            self.nearer = (extras.nearer * self.unit)[None, :]
            self.largest = extras.nearer.new_full((num_rows,), LOWEST)
            self.count = torch.zeros_like(self.largest)
            self.found.hardest.zero_()
            self.is_nearer = torch.empty_like(like)

    def look(self, z: torch.Tensor, start: int) -> None:
        """Take z, (B, N), of the rows of W from ``start`` on into account: -inf if left out."""
        if self.nearer is None:
            return
        values = z.amax(dim=0)
        # an arg max takes ten times as long as a maximum: only where that rose
        raised = (values > self.largest).nonzero()[:, 0]
        self.largest[raised] = values[raised]
        index = z[:, raised].argmax(dim=0).add_(start)
        self.found.hardest[raised] = index.div_(self.centers, rounding_mode="floor")
        self.count += torch.gt(z, self.nearer, out=self.is_nearer[: z.shape[0]]).sum(dim=0)

    def result(self) -> Found:
        """What was found over all blocks."""
        if self.nearer is not None:
            torch.div(self.largest, self.unit, out=self.found.hardest_cosine)
            self.found.rank.copy_(self.count)
        return self.found
