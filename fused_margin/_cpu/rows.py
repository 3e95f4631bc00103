"""What is linear in N or in a block's rows: norms, target cosines, the margin and the loss.

Quantities of shape (N,) are fp64 NumPy arrays where several operators in a row would each cost more
than their work. Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.dlpack import (
    to_dlpack,  # pyright: ignore[reportPrivateImportUsage] - it is documented
)

from fused_margin._arguments import PLAIN, Extras, Slopes
from fused_margin._numerics import CLAMPED_INVERSE_NORM, NORM_EPS
from fused_margin.margins import SINE_SQUARED_FLOOR, Margin

SINE_FLOOR = math.sqrt(SINE_SQUARED_FLOOR)

# A row whose norm is beyond this is multiplied by a power of 2 that brings it to about SHRUNK_NORM,
# so that neither its squares overflow nor its inverse norm squared underflows.
HUGE = {torch.float32: 2.0**40, torch.float64: 2.0**300}
SHRUNK_NORM = 2.0**20
# Elements of x that are widened to fp64 at a time.
WIDENED = 1 << 20
# Elements of a matrix from which on torch's threads pay for a dot product of each row.
THREADED = 1 << 20


class Targets(NamedTuple):
    """The rows that have a target, and their classes.

    Attributes:
        classes: (T,) int64.
        rows: (T,) int64, ascending; None if every row has a target.
    """

    classes: torch.Tensor
    rows: torch.Tensor | None

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of ``values`` that have a target."""
        return values if self.rows is None else values[self.rows]

    def fill(self, block: torch.Tensor, value: float) -> None:
        """Set the targets' entries of a (C, N) matrix to a number."""
        if self.rows is None:
            block.scatter_(0, self.classes[None, :], value)
        else:
            block[self.classes, self.rows] = value

    def put(self, block: torch.Tensor, values: torch.Tensor) -> None:
        """Set the targets' entries of a (C, N) matrix to those of ``values``, (N,)."""
        if self.rows is None:
            block.scatter_(0, self.classes[None, :], values[None, :])
        else:
            block[self.classes, self.rows] = values[self.rows]

    def add(self, matrix: torch.Tensor, values: torch.Tensor) -> None:
        """Add ``values``, (T, D), to the rows of an (N, D) matrix that have a target."""
        if self.rows is None:
            matrix.add_(values)
        else:
            matrix.index_add_(0, self.rows, values)


class _Exported:
    """A tensor on the CPU as NumPy imports it: `Tensor.__dlpack__` asks four times as long."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return to_dlpack(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # kDLCPU


def view_of(tensor: torch.Tensor) -> np.ndarray:
    """A caller's tensor as an array, to be read. After `Tensor.numpy` FSDP couldn't resize it."""
    return np.from_dlpack(_Exported(tensor))


def find_targets(labels: torch.Tensor, num_classes: int) -> Targets:
    """The labels, (N,) int64, that lie in [0, C)."""
    values = view_of(labels)
    # read as unsigned, a negative label is larger than any number of classes
    if not values.size or np.maximum.reduce(values.view(np.uint64)) < num_classes:
        return Targets(labels, None)
    rows = torch.from_numpy(((values >= 0) & (values < num_classes)).nonzero()[0])
    return Targets(labels[rows], rows)


class Problem(NamedTuple):
    """What a sweep over the classes starts from.

    Attributes:
        x: embeddings (N, D). w: class weights (C, D), any floating dtype and strides.
        labels: (N,) int64; outside [0, C) means no target.
        targets: those that are inside.
        ignored: rows of which nothing may be used, (N,) bool; None if there are none.
        scale: s > 0.
        compute_dtype: the dtype asked for in products. accumulate: that of sums.
        extras: what else is asked for; ``w`` then has its rows of W, and labels are such.
    """

    x: torch.Tensor
    w: torch.Tensor
    labels: torch.Tensor
    targets: Targets
    ignored: torch.Tensor | None
    scale: float
    compute_dtype: torch.dtype
    accumulate: torch.dtype
    extras: Extras = PLAIN

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, C, D."""
        return self.x.shape[0], self.w.shape[0], self.w.shape[1]


class Vectors(NamedTuple):
    """Vectors of x or of W, with huge ones shrunk.

    Attributes:
        values: (R, D), accumulation dtype.
        inverse: 1 / max(||row||, eps) of ``values``, (R,), accumulation dtype.
        shrunk: the huge rows, (S,) int64, and what they were multiplied by, (S, 1); None if there
            are none.
    """

    values: torch.Tensor
    inverse: torch.Tensor
    shrunk: tuple[torch.Tensor, torch.Tensor] | None

    def undo(self, gradient: torch.Tensor) -> None:
        """Turn the gradient of ``values`` into that of the rows as they were, in place."""
        if self.shrunk is not None:
            rows, factors = self.shrunk
            gradient[rows] *= factors


def row_dots(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Dot products of the rows of two matrices (R, D) of one dtype, (R,) in that dtype.

    NumPy takes a half to a tenth of the time of torch, which forms all products before it adds
    them, until threads pay.
    """
    if a.numel() > THREADED:
        return torch.linalg.vecdot(a, b).numpy()
    return np.vecdot(view_of(a), view_of(b))


def inverse_norms(rows: np.ndarray) -> np.ndarray:
    """1 / max(||row||, eps) of fp64 rows, (R,) fp64."""
    return _inverse_of(np.sqrt(np.vecdot(rows, rows)))


def _inverse_of(norms: np.ndarray) -> np.ndarray:
    return np.reciprocal(np.maximum(norms, NORM_EPS, out=norms), out=norms)


def _measured(rows: torch.Tensor) -> tuple[np.ndarray, torch.Tensor | None]:
    """`inverse_norms` of rows of any dtype, and the rows in fp64 where these were made for it."""
    if rows.numel() > THREADED:
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).numpy()
        return _inverse_of(norms), None
    wide = rows.double()
    return inverse_norms(view_of(wide)), wide


def rounded(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """An fp64 array as a tensor of the accumulation dtype."""
    if dtype is torch.float32:
        array = array.astype(np.float32, copy=False)
    return torch.from_numpy(array)


def shrink_huge(rows: torch.Tensor, inverse: torch.Tensor) -> Vectors:
    """Vectors (R, D) in the accumulation dtype, with their inverse norms, for what follows."""
    values, smallest = inverse.numpy(), 1.0 / HUGE[rows.dtype]
    if not values.size or not np.minimum.reduce(values) < smallest:
        return Vectors(rows, inverse, None)
    huge = (inverse < smallest).nonzero()[:, 0]
    _, exponents = rows[huge].abs().amax(dim=1, keepdim=True).frexp()
    factors = torch.ldexp(torch.full_like(rows[huge, :1], SHRUNK_NORM), -exponents)
    rows = rows.clone()
    rows[huge] *= factors
    return Vectors(rows, rounded(_measured(rows)[0], rows.dtype), (huge, factors))


class Measured(NamedTuple):
    """Vectors whose norms were found.

    Attributes:
        rows: (R, D). exact: inverse norms of ``rows``, (R,) fp64.
        inverse: those of the rows before huge ones were shrunk, (R,), accumulation dtype.
        wide: ``rows`` in fp64 where there is a copy, (R, D).
    """

    rows: Vectors
    exact: np.ndarray
    inverse: torch.Tensor
    wide: torch.Tensor | None


def measure(values: torch.Tensor) -> Measured:
    """Find the norms of rows (R, D) in the accumulation dtype."""
    exact, wide = _measured(values)
    inverse = rounded(exact, values.dtype)
    rows = shrink_huge(values, inverse)
    if rows.shrunk is not None:
        exact, wide = _measured(rows.values)
    return Measured(rows, exact, inverse, wide)


def embeddings(problem: Problem) -> torch.Tensor:
    """x, (N, D), in the accumulation dtype, 0 where it is ignored."""
    x = problem.x.to(problem.accumulate)
    return x if problem.ignored is None else x.masked_fill(problem.ignored[:, None], 0.0)


def target_cosines(x: Measured, w: torch.Tensor, targets: Targets) -> torch.Tensor:
    """u (eq. 1), (N,) fp64 in [-1, 1]; 0 where there is no target.

    Norms and dot are fp64: the margin, and near theta = 0 the loss itself, amplify the rounding of
    fp32.

    Args:
        x: (N, D). w: (C, D), any floating dtype.
    """
    num_found, dim = targets.classes.shape[0], w.shape[1]
    u = np.empty(num_found)
    step = max(1, WIDENED // dim)
    values = targets.of(x.rows.values if x.wide is None else x.wide)
    for start in range(0, num_found, step):
        here = slice(start, start + step)
        weight = measure(w.index_select(0, targets.classes[here]).double())
        part = row_dots(values[here].double(), weight.rows.values)
        np.multiply(part, weight.exact, out=u[here])
    u *= x.exact if targets.rows is None else x.exact[targets.rows.numpy()]
    u = torch.from_numpy(np.minimum(np.maximum(u, -1.0, out=u), 1.0, out=u))
    if targets.rows is None:
        return u
    every = torch.zeros(x.exact.shape[0], dtype=torch.float64, device="cpu")
    return every.index_put_((targets.rows,), u)


class RowLosses(NamedTuple):
    """Loss of each row and its derivatives by lse and by u; (N,) fp64 arrays."""

    loss: np.ndarray
    slope_lse: np.ndarray
    slope_u: np.ndarray


def losses(
    lse: torch.Tensor,
    u: torch.Tensor,
    ignored: torch.Tensor | None,
    scale: float,
    margin: Margin,
) -> RowLosses:
    """Loss and derivatives (eq. 4 to 6), 0 on ignored rows.

    Args:
        lse: (N,) fp64. u: (N,) fp64 in [-1, 1]. ignored: (N,) bool, or None. margin: floats.
    """
    cosine = u.numpy()
    sine = np.sqrt(np.maximum(1.0 - cosine * cosine, 0.0))
    psi = cosine * margin.cos - sine * margin.sin
    slope = margin.cos + cosine * margin.sin / np.maximum(sine, SINE_FLOOR)
    is_angular = cosine >= margin.threshold
    if not is_angular.all():
        psi = np.where(is_angular, psi, cosine - margin.offset)
        slope = np.where(is_angular, slope, 1.0)
    if margin.straight_through:
        slope = 1.0
    # -log sigmoid(s psi - lse) and sigmoid(lse - s psi), without cancellation or overflow
    gap = lse.numpy() - scale * psi
    loss = np.maximum(gap, 0.0) + np.log1p(np.exp(-np.abs(gap)))
    sigma = -np.expm1(-loss)
    slope_u = sigma * (slope * -scale)
    if ignored is not None:
        for part in (loss, sigma, slope_u):
            part[ignored.numpy()] = 0.0
    return RowLosses(loss, sigma, slope_u)


def project(rows: Vectors, gradient: torch.Tensor) -> np.ndarray:
    """Take the radial part out of q / ||r|| (eq. 8), in place of ``gradient``, (R, D).

    Returns:
        q . r_hat, (R,).
    """
    radial, inverse = row_dots(gradient, rows.values), rows.inverse.numpy()
    factor = inverse * inverse
    if np.maximum.reduce(inverse, initial=0.0) >= CLAMPED_INVERSE_NORM:
        factor[inverse >= CLAMPED_INVERSE_NORM] = 0.0  # below the clamp there is no projection
    factor *= radial
    gradient.addcmul_(rows.values, torch.from_numpy(factor)[:, None], value=-1.0)
    rows.undo(gradient)
    return radial


def add_shared(q: torch.Tensor, of_hat: torch.Tensor | None, w: Vectors) -> None:
    """Add to q / ||w||, (R, D), of some classes what all share: see `RowGradients`."""
    if of_hat is not None:
        q.addr_(w.inverse, of_hat.to(q.dtype))


class RowGradients(NamedTuple):
    """Gradients of what a forward returns.

    Attributes:
        lse, u: of these, (N,), fp32 or fp64.
        total: in a sweep that forms it, of the total, (N,).
        of_hat: where another does, the gradient by w_hat that all classes share, (D,) fp64.
    """

    lse: np.ndarray
    u: np.ndarray
    total: np.ndarray | None = None
    of_hat: torch.Tensor | None = None


def chain(slopes: Slopes, ignored: torch.Tensor | None) -> RowGradients:
    """Multiply the derivatives of the loss by its own gradient, over the count of rows.

    Args:
        slopes: the derivatives, gradients already where there is no gradient of the loss.
        ignored: (N,) bool, or None.
    """
    g_lse, g_u = view_of(slopes.lse), view_of(slopes.u)
    if slopes.grad is None:
        total = None if slopes.total is None else view_of(slopes.total).copy()
        return RowGradients(g_lse, g_u, total)
    factor = slopes.grad.item() if slopes.grad.ndim == 0 else view_of(slopes.grad)
    if slopes.num_counted is not None:
        factor = factor / max(slopes.num_counted.item(), 1.0)
    if ignored is not None:  # whose gradient may be infinite or NaN
        factor = np.where(ignored.numpy(), 0.0, factor)
    return RowGradients(g_lse * factor, g_u * factor)
