"""What else than exp(s c) a sweep makes of the other classes' cosines, block by block.

Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fused_margin._arguments import Found
from fused_margin._cpu.products import LOG2_E
from fused_margin._cpu.rows import SINE_FLOOR, Problem
from fused_margin._numerics import logit_range

LEFT_OUT = -math.inf


class Phi(NamedTuple):
    """phi (eq. 20) in units of z: z times ``below``, or offset + linear z + square z^2 above.

    And there ``root`` times the sine.
    """

    threshold: torch.Tensor  # (1, N)
    offset: float
    linear: float
    square: float
    slope: float
    slope_linear: float
    below: float
    root: float

    @classmethod
    def of(cls, problem: Problem) -> Phi | None:
        """That of a problem; None where phi is c."""
        extras, unit = problem.extras, problem.scale * LOG2_E
        if extras.threshold is None or extras.phi is None:
            return None
        offset, linear, square, slope, slope_linear, below, *root = extras.phi.tolist()
        threshold = (extras.threshold * unit)[None, :]
        return cls(
            threshold, offset * unit, linear, square / unit, slope, slope_linear / unit, below,
            root[0] * unit if root else 0.0,
        )  # fmt: skip


class Others:
    """Works on blocks of z = s log2(e) c, (B, N), in place.

    Masks are numbers, 0 or 1, and what is left out lies ``far`` below all else: on a CPU torch
    takes twenty times as long to select by a boolean mask as to multiply.
    """

    def __init__(self, problem: Problem, like: torch.Tensor) -> None:
        """Prepare buffers of the shape of ``like``, the largest block."""
        self.unit, self.centers = problem.scale * LOG2_E, problem.extras.centers
        self.phi = Phi.of(problem)
        self.far = 4.0 * self.unit * logit_range(problem.extras.phi).bound + 2.0**14
        self.is_above = self.factors = self.slopes = None
        self.sines = None
        if self.phi is not None:
            self.is_above, self.factors, self.slopes = (torch.empty_like(like) for _ in range(3))
            self.sines = torch.empty_like(like) if self.phi.root else None

    def leave_out(self, z: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor) -> None:
        """Lower z of the rows' own classes, and that of centres that are not the nearest.

        Args:
            z: (B, N). targets: rows of W, as rows of the block, (T,). rows: of the batch, (T,).
        """
        if self.centers > 1 and z.numel():
            self._keep_nearest(self._by_class(z))
        self._set_own(z, targets, rows, LEFT_OUT if self.phi is None else -self.far)

    def shape(
        self, z: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor | None:
        """Turn z into s log2(e) phi(c); returns its slope where that is not 1, (B, N).

        What is left out stays so. Arguments as for `leave_out`.
        """
        phi = self.phi
        if phi is None or self.is_above is None or self.factors is None or self.slopes is None:
            return None
        is_above, factors, slopes = (
            part[: len(z)] for part in (self.is_above, self.factors, self.slopes)
        )
        torch.gt(z, phi.threshold, out=is_above)
        if math.isinf(phi.offset):
            z.sub_(is_above, alpha=self.far)
            self._set_own(z, targets, rows, LEFT_OUT)
            return None
        # phi(c) is c times a factor, and above the threshold the offset and the root more
        factor = _stepped(z, is_above, phi.below, phi.linear - phi.below, phi.square, out=factors)
        # the slope is that factor, and above the threshold a line and the root's slope more
        slope = _stepped(
            z, is_above, factor, phi.slope - phi.linear, phi.slope_linear - phi.square, out=slopes
        )
        sines = None
        if self.sines is not None:
            sines = torch.mul(z, z, out=self.sines[: len(z)])
            sines.mul_(-1.0 / self.unit**2).add_(1.0).clamp_min_(0.0).sqrt_()
            ratio = sines.clamp_min(SINE_FLOOR)
            torch.div(z, ratio, out=ratio)
            root = -phi.root / self.unit**2
            slope = torch.addcmul(_tensor(z, slope), is_above, ratio, value=root, out=slopes)
        # centres that aren't the nearest stay left out; z of own classes is set below
        lowered = None
        if phi.below != 1.0 and self.centers > 1:
            lowered = torch.le(z, -0.5 * self.far, out=torch.empty_like(z))
        if isinstance(factor, torch.Tensor) or factor != 1.0:
            z.mul_(factor)
        if phi.offset:
            z.add_(is_above, alpha=phi.offset)
        if sines is not None:
            z.addcmul_(is_above, sines, value=phi.root)
        if lowered is not None:
            z.sub_(lowered, alpha=self.far)
        self._set_own(z, targets, rows, LEFT_OUT)
        if isinstance(slope, torch.Tensor):
            return slope
        return None if slope == 1.0 else slopes.fill_(slope)

    def is_in(self, z: torch.Tensor) -> torch.Tensor:
        """Whether anything enters the softmax, (B, N) bool."""
        return z > -0.5 * self.far

    def total(self, z: torch.Tensor) -> torch.Tensor:
        """Sum of phi(c) over the block, (N,) fp64; z as `shape` left it."""
        return z.masked_fill(~self.is_in(z), 0.0).sum(dim=0).double().div_(self.unit)

    def _set_own(
        self, z: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, value: float
    ) -> None:
        if self.centers == 1:
            z[targets, rows] = value
        else:
            self._by_class(z)[targets // self.centers, :, rows] = value

    def _by_class(self, z: torch.Tensor) -> torch.Tensor:
        """(B / K, K, N)."""
        return z.view(z.shape[0] // self.centers, self.centers, z.shape[1])

    def _keep_nearest(self, z: torch.Tensor) -> None:
        """Lower z of each class, (B / K, K, N), where it isn't the first of the largest."""
        largest = z[:, 0].clone()
        for center in range(1, self.centers):
            torch.maximum(largest, z[:, center], out=largest)
        is_less, count = torch.empty_like(largest), torch.zeros_like(largest)
        for center in range(self.centers):
            count += torch.lt(z[:, center], largest, out=is_less)
            z[:, center].sub_(is_less, alpha=self.far)
        if bool(count.amin() == self.centers - 1):
            return
        found = torch.zeros_like(largest, dtype=torch.bool)  # there are ties
        for center in range(self.centers):
            is_largest = z[:, center] == largest
            z[:, center].sub_((is_largest & found).to(z.dtype), alpha=self.far)
            found |= is_largest


def _tensor(like: torch.Tensor, value: torch.Tensor | float) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=like.dtype, device="cpu")


def _stepped(
    z: torch.Tensor, is_above: torch.Tensor, below: torch.Tensor | float, offset: float,
    slope: float, out: torch.Tensor,
) -> torch.Tensor | float:  # fmt: skip
    """``below``, and offset + slope z more where ``is_above``, in as few passes as that takes."""
    if offset and slope:
        line = torch.add(_tensor(z, offset), z, alpha=slope, out=out)
        return torch.addcmul(_tensor(z, below), is_above, line, out=out)
    if slope:
        return torch.addcmul(_tensor(z, below), is_above, z, value=slope, out=out)
    if offset:
        return torch.add(_tensor(z, below), is_above, alpha=offset, out=out)
    return below


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
            self.largest = extras.nearer.new_full((num_rows,), LEFT_OUT)
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
