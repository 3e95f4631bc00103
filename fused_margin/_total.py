"""The sum of all cosines of a row, which needs no cosine (eq. 21 of ``docs/math.md``).

With omega the sum of w_hat over all classes it is x_hat . omega: a pass over W for it, beside
products that take N times as long. The gradient by w_hat is the same for all classes; the CPU
backend adds it to each block of d_w, elsewhere it takes a pass over d_w. Plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fused_margin._arguments import Update
from fused_margin._numerics import CLAMPED_INVERSE_NORM, normalized

Tensor = torch.Tensor

# Bytes of W that are worked on at a time, in the accumulation dtype
CPU_BYTES, OTHER_BYTES = 4 << 20, 64 << 20
# Below it an inverse norm, or its square, may have lost digits.
SMALLEST_INVERSE = 2.0**-40


class _Rows(NamedTuple):
    """Rows start to stop of W: w_hat is values times factor, of inverse norms ``inverse``."""

    start: int
    stop: int
    values: Tensor
    factor: Tensor
    inverse: Tensor


def _blocks(w: Tensor, inv_w: Tensor) -> Iterator[_Rows]:
    is_on_cpu = w.device.type == "cpu"
    limit = CPU_BYTES if is_on_cpu else OTHER_BYTES
    size = max(1, limit // (w.shape[1] * inv_w.itemsize))
    for start in range(0, w.shape[0], size):
        stop = min(start + size, w.shape[0])
        rows, inverse = w[start:stop].to(inv_w.dtype), inv_w[start:stop]
        if is_on_cpu and bool((inverse < SMALLEST_INVERSE).any()):
            rows, inverse = normalized(rows)
            yield _Rows(start, stop, rows, torch.ones_like(inverse[:, 0]), inverse[:, 0])
        else:
            yield _Rows(start, stop, rows, inverse, inverse)


def class_sum(w: Tensor, inv_w: Tensor) -> Tensor:
    """omega, (D,) fp64, from weights (C, D) and their inverse norms (C,)."""
    total = w.new_zeros(w.shape[1], dtype=torch.float64)
    for block in _blocks(w, inv_w):
        if w.device.type == "cpu":  # in half the time of a product
            total += (block.values * block.factor[:, None]).sum(dim=0)
        else:
            total += torch.mv(block.values.t(), block.factor)
    return total


def of_others(omega: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """Sum of the cosines of all classes but the target, (N,) fp64; u is 0 where there is none."""
    return normalized(x.double())[0] @ omega - u


def add_to_d_x(d_x: Tensor, g: Tensor, omega: Tensor, unit: tuple[Tensor, Tensor]) -> None:
    """Add the gradient of the sum over all classes by x, in place.

    Args:
        d_x: (N, D).
        g: gradient of the sum, (N,).
        omega: see `class_sum`. unit: x_hat (N, D) and inverse norms (N, 1), fp64.
    """
    x_hat, inv_x = unit
    radial = (x_hat @ omega)[:, None].masked_fill(inv_x >= CLAMPED_INVERSE_NORM, 0.0)
    d_x.add_((omega - radial * x_hat).mul_(inv_x).mul_(g.double()[:, None]).to(d_x.dtype))


def direction(g: Tensor, unit: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient by w_hat, the same of each class, (D,) fp64; arguments as for `add_to_d_x`."""
    return g.double() @ unit[0]


def add_to_d_w(d_w: Tensor, direction: Tensor, w: Tensor, inv_w: Tensor) -> None:
    """Add the gradient of the sum over all classes by W, in place.

    Args:
        d_w: (C, D), the floating dtype of ``w`` or of ``inv_w``.
        direction: see there. w: (C, D). inv_w: (C,).
    """
    of_hat = direction.to(inv_w.dtype)
    for block in _blocks(w, inv_w):
        rows = d_w[block.start : block.stop]
        total = rows.to(inv_w.dtype)
        radial = torch.mv(block.values, of_hat).mul_(block.factor)
        radial.masked_fill_(block.inverse >= CLAMPED_INVERSE_NORM, 0.0)
        radial.mul_(block.factor).mul_(block.inverse)
        total.addr_(block.inverse, of_hat)
        total.addcmul_(block.values, radial[:, None], value=-1.0)
        if total is not rows:
            rows.copy_(total)


def completing(update: Update, direction: Tensor, w: Tensor, inv_w: Tensor) -> Update:
    """What takes rows of d_w that lack the gradient of the sum over all classes, and adds it."""

    def updated(start: int, grad: Tensor) -> None:
        here = slice(start, start + len(grad))
        with torch.autocast(w.device.type, enabled=False):
            add_to_d_w(grad, direction, w[here], inv_w[here])
        update(start, grad)

    return updated
