"""What kernels take as one argument each: Triton opens a NamedTuple inside the kernel.

A field that is None is known at compile time, so that its presence is a flag. A group itself is
always given, without fields if there is nothing in it: Triton 3.6 can't compare a group that has a
field None with None. Sizes are arguments of their own, as are fp64 numbers: Triton types a float in
a tuple as fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of a matrix with a column for each row of the batch, rows lie a multiple of this apart, as the
# compiler knows: loads are wide whatever N is. Of N itself it knows nothing, so that no kernel is
# compiled again for another batch.
PITCH = 16
# As many rows as a tile has at most, which a kernel may ask for beyond the last; and label -1.
READ_BEYOND = 256


def pitch(num_rows: int) -> int:
    """N up to a multiple of `PITCH`; a formula without cases, as N may be symbolic."""
    return (num_rows + PITCH - 1) // PITCH * PITCH


class Matrix(NamedTuple):
    """(R, D), any strides: a row for each embedding or for each class.

    Attributes:
        ptr: where it begins, with its strides.
        index: where each row is, (R,) int64, in rows from ``ptr`` on; None: one after the other.
    """

    ptr: Tensor | None = None
    stride_row: int = 0
    stride_d: int = 0
    index: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor, index: Tensor | None = None) -> Matrix:
        """The matrix in a tensor, or of some of its rows."""
        if index is not None:
            padded = torch.nn.functional.pad(index, (READ_BEYOND, READ_BEYOND))
            index = padded[READ_BEYOND:-READ_BEYOND]
        return cls(tensor, *tensor.stride(), index)


class Others(NamedTuple):
    """What is made of other classes, and what is found out about them; None for what isn't.

    Attributes:
        threshold: tau (eq. 20), (N,). phi: (6,) fp64. root: phi again, if it is of 7.
        nearer: see `_arguments.Extras`, (N,).
        best, best_class, count: the largest s c, its class, and how many are nearer; (splits, N).
        total, weighted: sums of phi(c), and of s phi(c) exp(s phi(c) - maximum); (splits, N).
        slope_total: gradient of the sum of phi(c), (N,).
    """

    threshold: Tensor | None = None
    phi: Tensor | None = None
    root: Tensor | None = None
    nearer: Tensor | None = None
    best: Tensor | None = None
    best_class: Tensor | None = None
    count: Tensor | None = None
    total: Tensor | None = None
    weighted: Tensor | None = None
    slope_total: Tensor | None = None


NO_OTHERS = Others()


class Rows(NamedTuple):
    """What is known of each row of the batch, (N,) each.

    Attributes:
        labels: of any integer dtype, with their stride.
        u: target cosines, fp64. inv_x: inverse norms. lse: fp64 (eq. 2).
        slope_lse, slope_u: derivatives of the row's own loss by lse and u; gradients of these two
            where there is no ``grad``.
        grad: gradient of the loss, with its stride: 0 where it is one number. Labels that come with
            it are `margin_ce`'s, which mark ignored rows.
        num_counted: 0-d, over what a mean was taken.
        scale: 0-d, where it is no Python number.
        others: what else than exp(s c) is made of other classes.
    """

    labels: Tensor
    stride_label: int
    u: Tensor
    inv_x: Tensor | None = None
    lse: Tensor | None = None
    slope_lse: Tensor | None = None
    slope_u: Tensor | None = None
    grad: Tensor | None = None
    stride_grad: int = 0
    num_counted: Tensor | None = None
    scale: Tensor | None = None
    others: Others = NO_OTHERS


class LossOutputs(NamedTuple):
    """What `rows_kernel` makes of a margin; nothing where there is none.

    Attributes:
        rows: loss of each row, (N,). reduced: 0-d, None where it isn't. targets: labels with
            ignored and invalid rows marked, (N,) int64.
    """

    rows: Tensor | None = None
    reduced: Tensor | None = None
    targets: Tensor | None = None


class Kept(NamedTuple):
    """What a sweep keeps of its cosines; nothing where there are no entries.

    Attributes:
        entries: (C, pitch) in rows of ``stride``, in the dtype of G. shifts: (class blocks, pitch),
            relative to which they are, and entries go up to whole blocks. None where they are
            exponentials over the norm of the class, without a shift.
        pitch: how many entries a class has, N up to a multiple of `PITCH`; or of the first rows.
    """

    entries: Tensor | None = None
    shifts: Tensor | None = None
    pitch: int = 0
    stride: int = 0


class Chunk(NamedTuple):
    """What `gradient_kernel` leaves for the two products.

    Attributes:
        g: G / (||x|| ||w||), (K, pitch), 0 past N; or exponentials, anything past N. radial: sum_n
            G c of each class and row block, (K, row blocks), None if g has none. row_radial: sum_k
            G c of each row, (class blocks, N), where one chunk is all. pitch: N up to a multiple
            of `PITCH`, or more.
    """

    g: Tensor
    radial: Tensor | None
    row_radial: Tensor | None
    pitch: int


class Precision(NamedTuple):
    """Constants of a call, known at compile time; dtypes are Triton's.

    Attributes:
        ACC: dtype of sums. COMPUTE: of the operands of the cosines. GRADIENT: of G and of the
            operands of the products with it.
        COSINES, PRODUCTS: precision of these products, "ieee" or "tf32".
        NORMALIZE_FIRST: whether operands are normalised before they are cast to COMPUTE; rows of W
            in a sweep, which has no norms yet, only where they would not fit in it.
        CENTERS: rows of W for each class. PLACES: the power of two of places that they take.
    """

    ACC: Any
    COMPUTE: Any
    GRADIENT: Any
    COSINES: str
    PRODUCTS: str
    NORMALIZE_FIRST: bool
    CENTERS: int = 1
    PLACES: int = 1
