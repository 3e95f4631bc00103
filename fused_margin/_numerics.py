"""Numerical conventions that every backend shares."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# x_hat = x / max(||x||, NORM_EPS), the convention of torch.nn.functional.normalize
NORM_EPS = 1e-12

# An inverse norm from here on comes from the clamp, where the gradient has no projection. A little
# below 1 / NORM_EPS, which rounding may miss.
CLAMPED_INVERSE_NORM = 0.999 / NORM_EPS


def accumulation_dtype(x: torch.Tensor, w: torch.Tensor) -> torch.dtype:
    """fp64 if either input is fp64, else fp32: the dtype of sums, norms, loss, lse and u."""
    return torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32


def sum_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 where the device is known to have it, for sums whose rounding something magnifies.

    Subtracting a mean does so, and a margin near theta = 0.
    """
    if tensors[0].device.type in ("cpu", "cuda"):
        return torch.float64
    return accumulation_dtype(tensors[0], tensors[-1])


def shrinkage(x: torch.Tensor) -> torch.Tensor:
    """What to multiply rows (..., D) by so that no square overflows: 1 or a power of 2, (..., 1).

    Cosines don't depend on it, and nothing is rounded. The norm stays above NORM_EPS.
    """
    half = math.frexp(torch.finfo(x.dtype).max)[1] // 2  # 64 in fp32, 512 in fp64
    # the last dimension by its number: as -1, a graph of an empty batch can't have it (torch 2.13)
    largest = torch.linalg.vector_norm(x.detach(), math.inf, dim=x.ndim - 1, keepdim=True)
    is_huge = largest > 2.0 ** (half - 27)
    return torch.ones_like(largest).masked_fill(is_huge, 2.0 ** -(half + 12))


def normalized(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (R, D) over their norms, and the inverse norms (R, 1), in the accumulation dtype."""
    rows = rows.to(accumulation_dtype(rows, rows))
    shrink = shrinkage(rows)
    rows = rows * shrink
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    inverse = norm.clamp_min_(NORM_EPS).reciprocal_()
    return rows.mul_(inverse), inverse.mul_(shrink)


def requested_dtype(x: torch.Tensor, w: torch.Tensor) -> torch.dtype:
    """The dtype in which products are asked for: autocast's if it is on, else the embeddings'.

    As under autocast itself, fp64 is never lowered.
    """
    if accumulation_dtype(x, w) is torch.float64:
        return torch.float64
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class Range(NamedTuple):
    """The least and the largest that phi(c) can be for c in [-1, 1]."""

    lowest: float
    highest: float

    @property
    def bound(self) -> float:
        """The largest absolute value."""
        return max(-self.lowest, self.highest)


def logit_range(phi: torch.Tensor | None) -> Range:
    """The range of phi (eq. 20), that of c for None; what is left out has none."""
    if phi is None:
        return Range(-1.0, 1.0)
    offset, linear, square, _, _, below, *root = phi.tolist()
    values = [-below, below]
    if not math.isinf(offset):
        ends = [-1.0, 1.0]
        if square and abs(linear) < 2.0 * abs(square):
            ends.append(-linear / (2.0 * square))
        values += [offset + linear * c + square * c * c for c in ends]
        for number in root:  # times a sine from 0 to 1
            values += [min(values) + min(number, 0.0), max(values) + max(number, 0.0)]
    return Range(min(values), max(values))


def largest_exponent(dtype: torch.dtype) -> float:
    """Up to this, and down to its negative, a power of e neither overflows nor underflows."""
    return 0.95 * math.log(torch.finfo(dtype).max)


def needs_shift(scale: float, num_classes: int, accumulate: torch.dtype) -> bool:
    """Whether exp(s cos) has to be taken relative to a maximum.

    Args:
        scale: the largest |s cos|. num_classes: C. accumulate: the dtype of the exponentials.

    |s cos| <= s up to rounding: no shift is needed where e^s times C does not overflow and e^-s
    does not underflow.
    """
    return scale + math.log(num_classes) > largest_exponent(accumulate)


def mixed(*numbers: int) -> int:
    """A seed of 63 bits from several numbers, by multiplications and shifts (SplitMix64)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % (1 << 64)
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % (1 << 64)
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % (1 << 64)
        mixed ^= mixed >> 31
    return mixed >> 1
