"""Many classes: cosines exist for one block of classes at a time.

A block is class-major, (B, N): the product W_block x^T is faster that way round, and the sums over
classes run along the outer dimension. Elementwise work is in place on that block. Row quantities,
(N,), are combined in fp64. Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from fused_margin._arguments import Found, Gradients, Needs, Swept, Update
from fused_margin._cpu.memory import gradient_memory, kept_memory
from fused_margin._cpu.others import Nearest, Others
from fused_margin._cpu.products import (
    LOG2_E,
    multiply_transposed,
    product_dtype,
)
from fused_margin._cpu.rows import (
    Problem,
    RowGradients,
    Vectors,
    add_shared,
    embeddings,
    measure,
    project,
    rounded,
    shrink_huge,
    target_cosines,
)
from fused_margin._numerics import CLAMPED_INVERSE_NORM, NORM_EPS, logit_range, needs_shift

# Bytes of one (B, N) block, and of B rows of W. Measured (docs/design.md): elementwise passes slow
# down once a block leaves the last-level cache, but with many rows products and the passes over B
# rows of W lose more below 2048 classes: a block may take up to four times as much for those.
BLOCK_BYTES = 2 << 20
WEIGHT_BLOCK_BYTES = 16 << 20
MIN_BLOCK, EFFICIENT_BLOCK, MAX_BLOCK = 128, 2048, 8192


def block_size(
    sizes: tuple[int, int, int], itemsize: int, centers: int = 1, efficient: int = EFFICIENT_BLOCK
) -> int:
    """Rows of W in a block, so that the block and they stay within their budgets.

    Args:
        sizes: N, rows of W, D.
        itemsize: of the accumulation dtype.
        centers: rows of a class, which stay together.
        efficient: rows of a block that may take four times the budget.
    """
    num_rows, num_classes, dim = sizes
    size = BLOCK_BYTES // (itemsize * max(num_rows, 1))
    size = max(size, min(efficient, 4 * size))
    size = min(size, WEIGHT_BLOCK_BYTES // (itemsize * dim))
    size = max(MIN_BLOCK, min(MAX_BLOCK, size))
    return min(num_classes, max(1, size // centers) * centers)


class Block:
    """One block of classes: rows ``start`` to ``stop`` of W.

    Attributes:
        weight: (B, D), accumulation dtype.
        rows: rows whose target lies in the block, (T,). targets: their labels - start, (T,).
        work: (B, N), accumulation dtype, to be written to.
    """

    def __init__(self, sweep: Sweep, start: int, stop: int, weight: Vectors, here: slice) -> None:
        self.sweep, self.start, self.stop, self.weight = sweep, start, stop, weight
        self.rows = sweep.order[here]
        self.targets = sweep.sorted_labels[here] - start
        self.work = sweep.work[: stop - start]

    @functools.cached_property
    def operand(self) -> torch.Tensor:
        """(B, D), product dtype."""
        sweep, values = self.sweep, self.weight.values
        if sweep.w_operand is None:
            return values
        if sweep.w.dtype is sweep.dtype and self.weight.shrunk is None:
            return sweep.w[self.start : self.stop]
        return sweep.w_operand[: self.stop - self.start].copy_(values)


class Sweep:
    """Iterates over the blocks of W, and forms s log2(e) ||w|| cos in buffers that are reused.

    Attributes:
        product: (B, N), product dtype: a buffer for the product of a block.
    """

    def __init__(self, problem: Problem, x: Vectors, size: int | None = None) -> None:
        """Prepare buffers, for embeddings ``x``, (N, D), and blocks of ``size`` classes."""
        num_rows, _, dim = problem.sizes
        scaled = x.values * (x.inverse * (problem.scale * LOG2_E))[:, None]
        self.w, self.accumulate = problem.w, scaled.dtype
        self.dtype = product_dtype(problem.compute_dtype, self.accumulate)
        self.x_operand = scaled.to(self.dtype)  # (N, D)
        centers = problem.extras.centers
        self.size = size or block_size(problem.sizes, scaled.itemsize, centers)
        self.work = scaled.new_empty(self.size, num_rows)
        self.product = scaled.new_empty(self.size, num_rows, dtype=self.dtype)
        converts = self.dtype is not self.accumulate
        self.widened = torch.empty_like(self.work) if converts else None
        self.w_accumulate = (
            None if self.w.dtype is self.accumulate else scaled.new_empty(self.size, dim)
        )
        self.w_operand = scaled.new_empty(self.size, dim, dtype=self.dtype) if converts else None
        self.others = Others(problem, self.work)
        self.order = problem.labels.argsort(stable=True)
        self.sorted_labels = problem.labels[self.order]

    def blocks(self, inv_w: torch.Tensor, *, is_first: bool) -> Iterator[Block]:
        """Yield each block. The first sweep fills ``inv_w``, (C,); a later one reads it."""
        num_classes = self.w.shape[0]
        starts = torch.arange(0, num_classes + self.size, self.size, device="cpu")
        bounds = torch.searchsorted(self.sorted_labels, starts.clamp_max(num_classes)).tolist()
        for index, start in enumerate(range(0, num_classes, self.size)):
            stop = min(start + self.size, num_classes)
            weight = self.w[start:stop]
            if self.w_accumulate is not None:
                weight = self.w_accumulate[: stop - start].copy_(weight)
            if is_first:
                norm = torch.linalg.vector_norm(weight, dim=1, out=inv_w[start:stop])
                norm.clamp_min_(NORM_EPS).reciprocal_()
            rows = shrink_huge(weight, inv_w[start:stop])
            yield Block(self, start, stop, rows, slice(bounds[index], bounds[index + 1]))

    def form(self, block: Block, out: torch.Tensor | None = None) -> torch.Tensor:
        """s log2(e) ||w|| cos, (B, N), in the accumulation dtype.

        Args:
            block: of which classes.
            out: where it is to lie in the product dtype, (B, N).
        """
        product = self.product[: block.stop - block.start] if out is None else out
        formed = self.multiply(block, product)
        if formed is not product:
            product.copy_(formed)
        # two such blocks at once, this and the next, would cost more than the copy
        del formed
        return self.widen(product)

    def multiply(self, block: Block, out: torch.Tensor) -> torch.Tensor:
        """The same in the product dtype, in ``out`` or in memory of its own."""
        return multiply_transposed(block.operand, self.x_operand, out=out)

    def widen(self, product: torch.Tensor) -> torch.Tensor:
        """A block's product, (B, N), in the accumulation dtype."""
        if self.widened is None:
            return product
        return self.widened[: len(product)].copy_(product)


def _kept_products(kept: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The bytes of ``kept`` as products of the first classes, (K, N)."""
    return kept[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)


def forward(problem: Problem, num_kept: int, num_bytes: int) -> tuple[Swept, Found]:
    """lse and u (eq. 1, 2), and in ``num_bytes`` the products of the first ``num_kept`` classes."""
    x = measure(embeddings(problem))
    accumulate = problem.accumulate
    num_rows, num_classes, _ = problem.sizes
    dtype = product_dtype(problem.compute_dtype, accumulate)
    inv_w = x.inverse.new_empty(num_classes)
    kept = kept_memory.empty(num_bytes, dtype=torch.uint8)
    products = _kept_products(kept, (num_kept, num_rows), dtype)
    sweep = Sweep(problem, x.rows)
    num_blocks = -(-num_classes // sweep.size)
    # the sum, or its log, of each block
    partial = x.inverse.new_empty(num_blocks, num_rows, dtype=torch.float64)
    shifts = _shifts(problem)
    nearest, sums = Nearest(problem, sweep.work), problem.extras.adds_in_sweep
    if sums:
        nearest.found.total.zero_()
    for index, block in enumerate(sweep.blocks(inv_w, is_first=True)):
        out = products[block.start : block.stop] if block.stop <= num_kept else None
        product = sweep.form(block, out)
        # s log2(e) cos, (B, N)
        z = torch.mul(product, block.weight.inverse[:, None], out=block.work)
        sweep.others.leave_out(z, block.targets, block.rows)
        nearest.look(z, block.start)
        sweep.others.shape(z, block.targets, block.rows)
        if sums:
            nearest.found.total.add_(sweep.others.total(z))
        if shifts:
            # The lower bound keeps a block that holds nothing but a row's target at exp(-inf).
            shift = z.amax(dim=0).clamp_min_(torch.finfo(accumulate).min)
            total = z.sub_(shift).exp2_().sum(dim=0).double()
            partial[index] = total.log_().add_(shift, alpha=1.0 / LOG2_E)
        else:
            partial[index] = z.exp2_().sum(dim=0)
    if shifts:
        lse = partial.logsumexp(dim=0)
        if problem.extras.reshapes:  # of a row of which all other classes are left out
            lse.masked_fill_(lse * LOG2_E < -0.5 * sweep.others.far, -math.inf)
    else:
        lse = partial.sum(dim=0).log_()
    u = target_cosines(x, problem.w, problem.targets)
    return Swept(lse, u, x.inverse, inv_w, kept), nearest.result()


def _shifts(problem: Problem) -> bool:
    """Whether exponentials have to be taken relative to a maximum."""
    largest = problem.scale * logit_range(problem.extras.phi).bound
    return needs_shift(largest, problem.w.shape[0], problem.accumulate)


class _Factors(NamedTuple):
    """G_nk = a_n 2^(z_nk - log2(e) lse_n) for k != y_n, and g_u at the target (eq. 7).

    What the subtrahend loses as it is rounded, much at a large scale, is in a_n.

    Attributes:
        a: a / ||x||, (N,). of_target: g_u / ||x||, (N,). minus_lse: (1, N).
        a_per_unit: a over the units of the kept products, (N,). gu_u: g_u u, (N,).
    """

    a: torch.Tensor
    of_target: torch.Tensor
    minus_lse: torch.Tensor
    a_per_unit: torch.Tensor
    gu_u: torch.Tensor

    @classmethod
    def of(cls, g: RowGradients, problem: Problem, swept: Swept, x: Vectors) -> _Factors:
        """The factors for gradients ``g`` of lse and u."""
        lse, g_lse, accumulate = swept.lse.numpy() * LOG2_E, g.lse, problem.accumulate
        if problem.extras.reshapes or problem.w.shape[0] == 1:
            # without another class lse is -inf: nothing goes through it
            is_empty = np.isneginf(lse)
            lse, g_lse = np.where(is_empty, 0.0, lse), np.where(is_empty, 0.0, g_lse)
        minus_lse = rounded(-lse, accumulate)
        a = g_lse * problem.scale * np.exp2(-lse - minus_lse.double().numpy())
        inv_x = x.inverse.double().numpy()
        return cls(
            a=rounded(a * inv_x, accumulate),
            of_target=rounded(g.u * inv_x, accumulate),
            minus_lse=minus_lse[None, :],
            a_per_unit=rounded(a / (problem.scale * LOG2_E), accumulate),
            gu_u=rounded(g.u * swept.u.numpy(), accumulate),
        )


def _probabilities(
    block: Block, product: torch.Tensor, minus_lse: torch.Tensor, shifts: bool
) -> torch.Tensor:
    """2^(z - log2(e) lse) / ||w||, 0 at the targets, (B, N), in the block's work."""
    inv_norm = block.weight.inverse[:, None]
    if shifts:  # rounded as in the forward, where a rounding of s cos is no small error
        p = torch.mul(product, inv_norm, out=block.work).add_(minus_lse)
    else:
        p = torch.addcmul(minus_lse, product, inv_norm, out=block.work)
    p.exp2_()
    p[block.targets, block.rows] = 0.0
    return p.mul_(inv_norm)


class _Shaped:
    """The same where other logits than s c enter lse, and the sum of phi(c) may have a gradient."""

    def __init__(
        self, sweep: Sweep, factors: _Factors, g: RowGradients, x: Vectors, needs: Needs
    ) -> None:
        """Prepare for gradients ``g`` of lse, u and the total."""
        self.others, self.minus_lse = sweep.others, factors.minus_lse
        self.weighted = torch.zeros_like(factors.a) if needs.scale else None
        self.a = self.of_total = None
        self.factors = factors
        if g.total is not None:
            # G itself, over both norms, and no factor is left for the products
            self.a = factors.a[None, :]
            self.of_total = (rounded(g.total, x.inverse.dtype) * x.inverse)[None, :]
            ones = torch.ones_like(factors.a)
            per_unit = x.inverse.reciprocal().div_(sweep.others.unit)
            self.factors = factors._replace(a=ones, a_per_unit=per_unit)

    def probabilities(self, block: Block, product: torch.Tensor) -> torch.Tensor:
        """As `_probabilities`, times the slope of phi."""
        inv_norm = block.weight.inverse[:, None]
        z = torch.mul(product, inv_norm, out=block.work)
        self.others.leave_out(z, block.targets, block.rows)
        slopes = self.others.shape(z, block.targets, block.rows)
        is_in = self.others.is_in(z)
        logits = z.clone() if self.weighted is not None else None
        p = z.add_(self.minus_lse).exp2_()
        if logits is not None and self.weighted is not None:
            self.weighted += logits.mul_(p).masked_fill_(~is_in, 0.0).sum(dim=0)
        if slopes is not None:
            p.mul_(slopes)
        if self.a is not None and self.of_total is not None:
            of_total = self.of_total * is_in
            p.mul_(self.a).add_(of_total if slopes is None else of_total.mul_(slopes))
        return p.mul_(inv_norm)

    def d_scale(self, a_per_unit: torch.Tensor, scale: float) -> torch.Tensor | None:
        """The derivative by s: a times the mean of phi(c)."""
        if self.weighted is None:
            return None
        return (self.weighted.double() * a_per_unit.double()).sum() / scale


class WeightGradient:
    """d_w, (C, D), of which one block after the other is written."""

    def __init__(
        self,
        sweep: Sweep,
        d_w: torch.Tensor | Update,
        x: Vectors,
        factor: torch.Tensor,
        of_target: torch.Tensor,
        of_hat: torch.Tensor | None,
    ) -> None:
        """Prepare operands and buffers.

        Args:
            sweep: the blocks.
            d_w: (C, D), where it is written, or what takes its rows.
            x: embeddings, (N, D).
            factor: of each row, (N,). of_target: g_u / ||x||, (N,).
            of_hat: see `RowGradients`.
        """
        self.sweep, self.d_w = sweep, d_w
        self.of_hat = None if of_hat is None else of_hat.to(sweep.accumulate)
        # rows of d_w_hat: of the other classes, (D, N), and of the target's, (N, D)
        self.operand = (x.values * factor[:, None]).to(sweep.dtype).t()
        self.of_target = x.values * of_target[:, None]
        shape, is_same = (sweep.size, sweep.w.shape[1]), sweep.dtype is sweep.accumulate
        self.product = None if is_same else x.values.new_empty(shape, dtype=sweep.dtype)
        self.direct = None
        if isinstance(d_w, torch.Tensor) and d_w.dtype is sweep.accumulate:
            self.direct = d_w
        self.block = x.values.new_empty(shape if self.direct is None else (0, shape[1]))

    def tangent(self, block: Block, p: torch.Tensor) -> torch.Tensor:
        """d_w_hat / ||w||, (B, D), the radial part included; p in the product dtype."""
        length = block.stop - block.start
        grad = self._grad(block)
        if self.product is None:
            tangent = multiply_transposed(p, self.operand, out=grad)
        else:
            tangent = grad.copy_(multiply_transposed(p, self.operand, out=self.product[:length]))
        return tangent

    def complete(self, block: Block, tangent: torch.Tensor) -> None:
        """Add the part of the block's targets, and what all classes share."""
        inverse = block.weight.inverse
        if len(block.rows):
            of_target = self.of_target[block.rows] * inverse[block.targets, None]
            tangent.index_add_(0, block.targets, of_target)
        add_shared(tangent, self.of_hat, block.weight)

    def radial_of_all(self, block: Block) -> torch.Tensor | float:
        """What all classes share, in the direction of w_hat, over ||w||^2, (B,)."""
        if self.of_hat is None:
            return 0.0
        inverse = block.weight.inverse
        return block.weight.values.mv(self.of_hat).mul_(inverse).mul_(inverse).mul_(inverse)

    def write(self, block: Block, tangent: torch.Tensor, radial: torch.Tensor) -> None:
        """The block's rows: the tangent less its radial part, 0 below the norm's clamp.

        Args:
            block: which rows.
            tangent: (B, D). radial: its dot product with w_hat over ||w||, (B,), overwritten.
        """
        radial.masked_fill_(block.weight.inverse >= CLAMPED_INVERSE_NORM, 0.0)
        grad = self._grad(block)
        torch.addcmul(tangent, block.weight.values, radial[:, None], value=-1.0, out=grad)
        block.weight.undo(grad)
        if not isinstance(self.d_w, torch.Tensor):
            self.d_w(block.start, grad)
        elif self.direct is None:
            self.d_w[block.start : block.stop].copy_(grad)

    def _grad(self, block: Block) -> torch.Tensor:
        if self.direct is None:
            return self.block[: block.stop - block.start]
        return self.direct[block.start : block.stop]


class EmbeddingsSum:
    """v, (N, D), to which one block after the other is added."""

    def __init__(self, sweep: Sweep, x: Vectors) -> None:
        # contiguous whatever x's strides, as the operator's fake promises
        shape, is_same = x.values.shape, sweep.dtype is sweep.accumulate
        self.v = x.values.new_zeros(shape)
        self.product = None if is_same else x.values.new_empty(shape, dtype=sweep.dtype)

    def add(self, block: Block, p: torch.Tensor) -> None:
        """p^T W; p, (B, N), in the product dtype."""
        if self.product is not None:
            self.v.add_(torch.mm(p.t(), block.operand, out=self.product))
        else:
            self.v.addmm_(p.t(), block.operand)


def of_targets(of_target: torch.Tensor, problem: Problem, inv_w: torch.Tensor) -> torch.Tensor:
    """g_u w_hat of the target, over ||x||, of the rows that have one, (T, D).

    Args:
        of_target: g_u / ||x||, (N,). problem: as for `backward`. inv_w: (C,).
    """
    classes = problem.targets.classes
    rows = shrink_huge(problem.w[classes].to(problem.accumulate), inv_w[classes])
    factors = problem.targets.of(of_target) * rows.inverse
    return rows.values * factors[:, None]


def embeddings_gradient(
    v: torch.Tensor, own: torch.Tensor, g: RowGradients, x: Vectors, problem: Problem,
    swept: Swept, needs: Needs,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """d_x and d_scale (eq. 8, 9).

    Args:
        v: sum_k G_nk w_hat_k over the other classes, over ||x||, (N, D); overwritten.
        own: see `of_targets`.
        g: gradients of lse and u. x: the embeddings. problem, swept, needs: as for `backward`.
    """
    problem.targets.add(v, own)
    radial = project(x, v)  # sum_k G_nk c_nk
    d_scale = None
    if needs.scale:
        of_others = radial.astype(np.float64) - g.u * swept.u.numpy()
        d_scale = torch.from_numpy(of_others).sum() / problem.scale
    return v.to(problem.x.dtype) if needs.x else None, d_scale


def _radial(
    block: Block, p: torch.Tensor, product: torch.Tensor, factors: _Factors, scratch: torch.Tensor
) -> torch.Tensor:
    """sum_n G c / ||w||^2, (B,); ``scratch``, (B, N), is overwritten and may be ``product``."""
    inverse = block.weight.inverse
    radial = torch.mul(p, product, out=scratch).mv(factors.a_per_unit).mul_(inverse)
    of_target = factors.gu_u[block.rows] * inverse[block.targets]
    radial.index_add_(0, block.targets, of_target)
    return radial.mul_(inverse)


def backward(
    g: RowGradients, problem: Problem, swept: Swept, num_kept: int, needs: Needs,
    update: Update | None = None,
) -> Gradients:  # fmt: skip
    """Vector-Jacobian product of `forward` (eq. 7 to 9), for gradients ``g`` of lse and u.

    ``update`` takes the rows of d_w, if it is given, and may change W there.
    """
    x = shrink_huge(embeddings(problem), swept.inv_x)
    num_rows, num_classes, dim = problem.sizes
    dtype = product_dtype(problem.compute_dtype, problem.accumulate)
    products = _kept_products(swept.kept, (num_kept, num_rows), dtype)
    sweep = Sweep(problem, x)
    shifts = _shifts(problem)
    factors = _Factors.of(g, problem, swept, x)
    shaped, a_per_unit = None, factors.a_per_unit
    if problem.extras.reshapes:
        shaped = _Shaped(sweep, factors, g, x, needs)
        factors = shaped.factors
    of_x = own = of_w = d_w = None
    if needs.x or needs.scale:
        of_x = EmbeddingsSum(sweep, x)
        own = of_targets(factors.of_target, problem, swept.inv_w)  # before W may change
    if needs.w:
        d_w = update
        if d_w is None:
            d_w = gradient_memory.empty(num_classes, dim, dtype=problem.w.dtype)
        of_w = WeightGradient(sweep, d_w, x, factors.a, factors.of_target, g.of_hat)
    scratch = sweep.product if sweep.widened is None else sweep.widened
    for block in sweep.blocks(swept.inv_w, is_first=False):
        length = block.stop - block.start
        is_kept = block.stop <= num_kept
        kept = products[block.start : block.stop]
        product = sweep.widen(kept) if is_kept else sweep.form(block)
        if shaped is None:
            p = _probabilities(block, product, factors.minus_lse, shifts)
        else:
            p = shaped.probabilities(block, product)
        radial = None
        if of_w is not None:
            radial = _radial(block, p, product, factors, scratch[:length])
            radial += of_w.radial_of_all(block)
        if dtype is not problem.accumulate:
            p = sweep.product[:length].copy_(p)
        if of_x is not None:
            of_x.add(block, p)
        if of_w is not None and radial is not None:
            tangent = of_w.tangent(block, p)
            of_w.complete(block, tangent)
            of_w.write(block, tangent, radial)
            del tangent
    d_x = d_scale = None
    if of_x is not None and own is not None:
        v = of_x.v.mul_(factors.a[:, None])
        d_x, d_scale = embeddings_gradient(v, own, g, x, problem, swept, needs)
    if shaped is not None:
        d_scale = shaped.d_scale(a_per_unit, problem.scale)
    return Gradients(d_x, d_w if isinstance(d_w, torch.Tensor) else None, d_scale)
