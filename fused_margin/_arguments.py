"""Names for what travels together between the operators and the backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, dtype

# Labels as `check_labels` and ``margin_ce`` return them.
IGNORED, INVALID = -1, -2
# Takes rows of d_w from one on, (B, D) in the accumulation dtype, and may overwrite them. It may
# change these rows of W too: whatever reads them comes before.
Update = Callable[[int, Tensor], None]


class Extras(NamedTuple):
    """What a sweep makes of the cosines of the other classes, and finds out, beside lse and u.

    Attributes:
        threshold: tau of each row (eq. 20), (N,), accumulation dtype; None: logits are s c.
        phi: d, a, b, e, f and l of eq. 20, (6,) fp64, on the device of the rows; with h (7,).
        nearer: cosine above which another class is nearer than the target, (N,), accumulation
            dtype; None: nothing is asked about the nearest classes.
        classes: rows of W that take part, (k,) int64, ascending; None: all. Labels are then their
            numbers among these, or -1; d_w has k rows. For kernels only, with centers = 1.
        centers: K rows of W for each class, one after the other, of which that with the largest
            cosine counts, the first of several. Labels are then rows of W: the nearest of the
            target's.
        has_total: whether the sum of the other classes' phi(c) is asked for.
    """

    threshold: Tensor | None = None
    phi: Tensor | None = None
    nearer: Tensor | None = None
    classes: Tensor | None = None
    centers: int = 1
    has_total: bool = False

    @property
    def reshapes(self) -> bool:
        """Whether other logits than s times the cosines of all rows of W enter lse."""
        return self.threshold is not None or self.centers > 1

    @property
    def adds_in_sweep(self) -> bool:
        """Whether the sum of phi(c) has to be formed within the sweep."""
        return self.has_total and self.reshapes

    @property
    def adds_vectors(self) -> bool:
        """Whether it is a product with the sum of w_hat (eq. 21)."""
        return self.has_total and not self.reshapes

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing beside lse and u to do within the sweep."""
        return not self.reshapes and self.nearer is None

    def rows_like(self, w: Tensor) -> Tensor:
        """As many rows of W, (C, D), as take part: their sizes and strides, not their numbers."""
        return w if self.classes is None else w[: self.classes.shape[0]]


PLAIN = Extras()


class Found(NamedTuple):
    """What `Extras` asked for; without entries where they did not.

    Attributes:
        total: sum of phi(c) over the other classes, (N,) fp64.
        class_sum: sum of w_hat over all classes, (D,) fp64, where that is how total was formed.
        hardest: the nearest other class, (N,) int64. hardest_cosine: its cosine, (N,).
        rank: how many other classes are nearer than the target, (N,) int64.
    """

    total: Tensor
    class_sum: Tensor
    hardest: Tensor
    hardest_cosine: Tensor
    rank: Tensor

    @classmethod
    def empty(cls, x: Tensor, accumulate: dtype, extras: Extras) -> Found:
        """Memory for it; N may be symbolic."""
        num_rows, dim = x.shape
        of_total = num_rows if extras.has_total else 0
        of_classes = dim if extras.adds_vectors else 0
        of_nearest = 0 if extras.nearer is None else num_rows
        return cls(
            total=x.new_empty(of_total, dtype=torch.float64),
            class_sum=x.new_empty(of_classes, dtype=torch.float64),
            hardest=x.new_empty(of_nearest, dtype=torch.int64),
            hardest_cosine=x.new_empty(of_nearest, dtype=accumulate),
            rank=x.new_empty(of_nearest, dtype=torch.int64),
        )


class Inputs(NamedTuple):
    """What a forward starts from, and its backward again.

    Attributes:
        x: embeddings (N, D). w: class weights (C, D), any floating dtype and strides; where
            ``extras.classes`` take part, `Extras.rows_like` it.
        labels: (N,), any integer dtype; outside [0, C) means no target.
        scale: s > 0. scale_tensor: 0-d, which then counts instead; None if s is a number.
        compute_dtype: the dtype asked for in products.
        extras: what else is asked for.
    """

    x: Tensor
    w: Tensor
    labels: Tensor
    scale: float
    scale_tensor: Tensor | None
    compute_dtype: dtype
    extras: Extras = PLAIN


class Swept(NamedTuple):
    """What a sweep leaves for the backward.

    Attributes:
        lse: (N,) fp64 (eq. 2). u: target cosines in [-1, 1], (N,) fp64 (eq. 1).
        inv_x: 1 / max(||x||, eps), (N,). inv_w: likewise (C,); accumulation dtype.
        kept: cosines or exponentials that need not be formed again, as the backend lays them out.
    """

    lse: Tensor
    u: Tensor
    inv_x: Tensor
    inv_w: Tensor
    kept: Tensor

    @classmethod
    def empty(cls, x: Tensor, w: Tensor, accumulate: dtype, kept_shape: tuple[Any, ...]) -> Swept:
        """Memory for it; sizes may be symbolic."""
        num_rows = x.shape[0]
        return cls(
            lse=x.new_empty(num_rows, dtype=torch.float64),
            u=x.new_empty(num_rows, dtype=torch.float64),
            inv_x=x.new_empty(num_rows, dtype=accumulate),
            inv_w=x.new_empty(w.shape[0], dtype=accumulate),
            kept=x.new_empty(kept_shape, dtype=torch.uint8),
        )


class Loan(NamedTuple):
    """Memory of a coming d_w, in which a forward leaves what the backward would form again.

    A backward that takes it writes d_w over it. Another through the same graph finds `TAKEN`
    instead, and sweeps once more into new memory.

    Attributes:
        d_w: (C, D), W's dtype, contiguous.
        left: what the backend has to know of what it left there.
    """

    d_w: Tensor
    left: Any


TAKEN = Loan(torch.empty(0, device="cpu"), None)


class Losses(NamedTuple):
    """What ``margin_ce`` makes of a sweep, accumulation dtype.

    Attributes:
        loss: (N,), or 0-d once reduced.
        slope_lse, slope_u: derivatives of each row's own loss by lse and u, (N,).
        num_counted: rows that are not ignored, 0-d.
        targets: labels as `check_labels` returns them, (N,) int64.
    """

    loss: Tensor
    slope_lse: Tensor
    slope_u: Tensor
    num_counted: Tensor
    targets: Tensor

    @classmethod
    def empty(cls, x: Tensor, accumulate: dtype, *, is_reduced: bool) -> Losses:
        """Memory for it; N may be symbolic."""
        num_rows = x.shape[0]
        return cls(
            loss=x.new_empty(() if is_reduced else (num_rows,), dtype=accumulate),
            slope_lse=x.new_empty(num_rows, dtype=accumulate),
            slope_u=x.new_empty(num_rows, dtype=accumulate),
            num_counted=x.new_empty((), dtype=accumulate),
            targets=x.new_empty(num_rows, dtype=torch.int64),
        )


class Slopes(NamedTuple):
    """Where a backward starts.

    Attributes:
        lse, u: derivatives of each row's own loss, (N,), to be multiplied by ``grad``; the
            gradients of lse and u themselves where there is none.
        grad: gradient of the loss, 0-d or (N,). num_counted: 0-d, over what a mean
            was taken.
        total: gradient of the sum of the other classes' phi(c), (N,).
    """

    lse: Tensor
    u: Tensor
    grad: Tensor | None
    num_counted: Tensor | None
    total: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    w: bool
    scale: bool


class Gradients(NamedTuple):
    """d_x (N, D), d_w (C, D) in their input's dtype, d_scale 0-d; None where not asked for."""

    x: Tensor | None
    w: Tensor | None
    scale: Tensor | None


class Margin(NamedTuple):
    """Coefficients of eq. 5; numbers, (N,) tensors for one margin per sample, or 0-d ones."""

    cos: float | Tensor
    sin: float | Tensor
    threshold: float | Tensor
    offset: float | Tensor
    straight_through: bool = False

    @property
    def is_tensor(self) -> bool:
        """Whether any coefficient is a tensor, so that autograd over N numbers is needed.

        Not so those of a float margin, 0-d tensors while `torch.compile` traces it.
        """
        return any(isinstance(value, Tensor) and _is_given(value) for value in self)


def _is_given(value: Tensor) -> bool:
    """Whether a coefficient is a tensor of the caller's, not a number that Dynamo traces."""
    return value.ndim > 0 or value.requires_grad or not torch.compiler.is_compiling()


def rows_of(values: Tensor, classes: Tensor, shape: torch.Size) -> Tensor:
    """A gradient (C, D) with these rows and no others."""
    # said in this way too, since torch 2.11 warns of checks that nobody has declined
    with torch.sparse.check_sparse_tensor_invariants(False):
        return torch.sparse_coo_tensor(
            classes[None], values, shape, is_coalesced=True, check_invariants=False
        )
