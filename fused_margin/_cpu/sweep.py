"""Many classes: cosines exist for one block of classes at a time.

A block is class-major, (B, N): the product W_block x^T is faster that way round, and the sums over
classes run along the outer dimension. Elementwise work is in place on that block. Row quantities,
(N,), are combined in fp64. Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from fused_margin._arguments import Gradients, Needs, Swept
from fused_margin._cpu.memory import gradient_memory, kept_memory
from fused_margin._cpu.products import (
    LOG2_E,
    multiply_transposed,
    needs_shift,
    product_dtype,
)
from fused_margin._cpu.rows import (
    Problem,
    RowGradients,
    Vectors,
    embeddings,
    measure,
    project,
    rounded,
    shrink_huge,
    target_cosines,
)
from fused_margin._numerics import CLAMPED_INVERSE_NORM, NORM_EPS

# Bytes of one (B, N) block, and of B rows of W. Measured (docs/design.md): elementwise passes slow
# down once a block leaves the last-level cache, but with many rows products and the passes over B
# rows of W lose more below 2048 classes: a block may take up to four times as much for those.
BLOCK_BYTES = 2 << 20
WEIGHT_BLOCK_BYTES = 16 << 20
MIN_BLOCK, EFFICIENT_BLOCK, MAX_BLOCK = 128, 2048, 8192


def block_size(num_rows: int, num_classes: int, dim: int, itemsize: int) -> int:
    """Classes in a block, so that the block and its rows of W stay within their budgets."""
    size = BLOCK_BYTES // (itemsize * max(num_rows, 1))
    size = max(size, min(EFFICIENT_BLOCK, 4 * size))
    size = min(size, WEIGHT_BLOCK_BYTES // (itemsize * dim))
    return min(num_classes, max(MIN_BLOCK, min(MAX_BLOCK, size)))


@dataclass
class Block:
    """One block of classes: rows ``start`` to ``stop`` of W."""

    start: int
    stop: int
    weight: Vectors  # (B, D), accumulation dtype
    operand: torch.Tensor  # (B, D), product dtype
    rows: torch.Tensor  # rows whose target lies in the block, (T,)
    targets: torch.Tensor  # their labels - start, (T,)
    product: torch.Tensor  # s log2(e) ||w|| cos, (B, N), accumulation dtype; not to be written to
    work: torch.Tensor  # (B, N), accumulation dtype, to be written to


class Sweep:
    """Iterates over the blocks of W, forming s log2(e) ||w|| cos in buffers that are reused."""

    def __init__(self, problem: Problem, x: Vectors, kept: torch.Tensor) -> None:
        """Prepare buffers.

        Args:
            problem: what to sweep over.
            x: its embeddings, (N, D).
            kept: products of the first K classes, (K, N), that outlive the sweep.
        """
        num_rows, num_classes, dim = problem.sizes
        scaled = x.values * (x.inverse * (problem.scale * LOG2_E))[:, None]
        self.w, self.accumulate = problem.w, scaled.dtype
        self.dtype = product_dtype(problem.compute_dtype, self.accumulate)
        self.operand = scaled.to(self.dtype)  # (N, D)
        self.size = block_size(num_rows, num_classes, dim, scaled.element_size())
        self.work = scaled.new_empty(self.size, num_rows)
        self.product = scaled.new_empty(self.size, num_rows, dtype=self.dtype)
        converts = self.dtype is not self.accumulate
        self.widened = torch.empty_like(self.work) if converts else None
        self.scratch = self.product if self.widened is None else self.widened
        self.kept = kept
        self.w_accumulate = (
            None if self.w.dtype is self.accumulate else scaled.new_empty(self.size, dim)
        )
        self.w_operand = scaled.new_empty(self.size, dim, dtype=self.dtype) if converts else None
        self.order = problem.labels.argsort(stable=True)
        self.sorted_labels = problem.labels[self.order]

    def blocks(self, inv_w: torch.Tensor, *, is_first: bool) -> Iterator[Block]:
        """Yield each block with its product.

        The first sweep fills ``inv_w`` (C,) and ``kept``; a later one reads them.
        """
        num_classes = self.w.shape[0]
        starts = torch.arange(0, num_classes + self.size, self.size, device="cpu")
        bounds = torch.searchsorted(self.sorted_labels, starts.clamp_max(num_classes)).tolist()
        for index, start in enumerate(range(0, num_classes, self.size)):
            stop = min(start + self.size, num_classes)
            length = stop - start
            weight = self.w[start:stop]
            if self.w_accumulate is not None:
                weight = self.w_accumulate[:length].copy_(weight)
            if is_first:
                norm = torch.linalg.vector_norm(weight, dim=1, out=inv_w[start:stop])
                norm.clamp_min_(NORM_EPS).reciprocal_()
            rows = shrink_huge(weight, inv_w[start:stop])
            operand = rows.values
            if self.w_operand is not None:
                is_same = self.w.dtype is self.dtype and rows.shrunk is None
                operand = self.w[start:stop] if is_same else self.w_operand[:length].copy_(operand)
            is_kept = stop <= len(self.kept)
            product = self.kept[start:stop] if is_kept else self.product[:length]
            if is_first or not is_kept:
                formed = multiply_transposed(operand, self.operand, out=product)
                if formed is not product:
                    product.copy_(formed)
                # two such blocks at once, this and the next, would cost more than the copy
                del formed
            if self.widened is not None:
                product = self.widened[:length].copy_(product)
            here = slice(bounds[index], bounds[index + 1])
            yield Block(
                start=start,
                stop=stop,
                weight=rows,
                operand=operand,
                rows=self.order[here],
                targets=self.sorted_labels[here] - start,
                product=product,
                work=self.work[:length],
            )

    def row_sums(self, block: Block, factors: torch.Tensor) -> torch.Tensor:
        """Sum over rows of work * product * factors, (B,); the product is lost unless kept."""
        length = block.stop - block.start
        scratch = self.scratch[:length]
        return torch.mul(block.work, block.product, out=scratch).mv(factors)


def _kept_products(kept: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The bytes of ``kept`` as products of the first classes, (K, N)."""
    return kept[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)


def forward(problem: Problem, num_kept: int, num_bytes: int) -> Swept:
    """lse and u (eq. 1, 2), and in ``num_bytes`` the products of the first ``num_kept`` classes."""
    x = measure(embeddings(problem))
    accumulate = problem.accumulate
    num_rows, num_classes, _ = problem.sizes
    dtype = product_dtype(problem.compute_dtype, accumulate)
    inv_w = x.inverse.new_empty(num_classes)
    kept = kept_memory.empty(num_bytes, dtype=torch.uint8)
    sweep = Sweep(problem, x.rows, _kept_products(kept, (num_kept, num_rows), dtype))
    num_blocks = -(-num_classes // sweep.size)
    # the sum, or its log, of each block
    partial = x.inverse.new_empty(num_blocks, num_rows, dtype=torch.float64)
    shifts = needs_shift(problem.scale, num_classes, accumulate)
    for index, block in enumerate(sweep.blocks(inv_w, is_first=True)):
        # s log2(e) cos, (B, N)
        z = torch.mul(block.product, block.weight.inverse[:, None], out=block.work)
        z[block.targets, block.rows] = -float("inf")
        if shifts:
            # The lower bound keeps a block that holds nothing but a row's target at exp(-inf).
            shift = z.amax(dim=0).clamp_min_(torch.finfo(accumulate).min)
            total = z.sub_(shift).exp2_().sum(dim=0).double()
            partial[index] = total.log_().add_(shift, alpha=1.0 / LOG2_E)
        else:
            partial[index] = z.exp2_().sum(dim=0)
    lse = partial.logsumexp(dim=0) if shifts else partial.sum(dim=0).log_()
    u = target_cosines(x, problem.w, problem.targets)
    return Swept(lse, u, x.inverse, inv_w, kept)


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
        if problem.w.shape[0] == 1:  # without another class lse is -inf: nothing goes through it
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


def _probabilities(block: Block, minus_lse: torch.Tensor, shifts: bool) -> torch.Tensor:
    """2^(z - log2(e) lse) / ||w||, 0 at the targets, (B, N), in the block's work."""
    inv_norm = block.weight.inverse[:, None]
    if shifts:  # rounded as in the forward, where a rounding of s cos is no small error
        p = torch.mul(block.product, inv_norm, out=block.work).add_(minus_lse)
    else:
        p = torch.addcmul(minus_lse, block.product, inv_norm, out=block.work)
    p.exp2_()
    p[block.targets, block.rows] = 0.0
    return p.mul_(inv_norm)


class _WeightGradient:
    """d_w, (C, D), of which one block after the other is written."""

    def __init__(self, problem: Problem, x: Vectors, factors: _Factors, sweep: Sweep) -> None:
        num_classes, dim = problem.w.shape
        dtype, accumulate = sweep.dtype, sweep.accumulate
        self.sweep, self.factors = sweep, factors
        # rows of d_w_hat: of the other classes, (D, N), and of the target's, (N, D)
        self.operand = (x.values * factors.a[:, None]).to(dtype).t()
        self.of_target = x.values * factors.of_target[:, None]
        self.d_w = gradient_memory.empty(num_classes, dim, dtype=problem.w.dtype)
        shape = sweep.size, dim
        self.product = None if dtype is accumulate else x.values.new_empty(shape, dtype=dtype)
        self.block = None if self.d_w.dtype is accumulate else x.values.new_empty(shape)

    def radial(self, block: Block) -> torch.Tensor:
        """sum_n G c / ||w||^2, (B,), 0 below the norm's clamp; the product is lost unless kept."""
        inverse = block.weight.inverse
        radial = self.sweep.row_sums(block, self.factors.a_per_unit).mul_(inverse)
        of_target = self.factors.gu_u[block.rows] * inverse[block.targets]
        radial.index_add_(0, block.targets, of_target)
        return radial.mul_(inverse).masked_fill_(inverse >= CLAMPED_INVERSE_NORM, 0.0)

    def write(self, block: Block, p: torch.Tensor, radial: torch.Tensor) -> None:
        """The block's rows: d_w_hat / ||w|| less its radial part; p in the product dtype."""
        length = block.stop - block.start
        here = self.d_w[block.start : block.stop]
        grad = here if self.block is None else self.block[:length]
        if self.product is None:
            tangent = multiply_transposed(p, self.operand, out=grad)
        else:
            tangent = grad.copy_(multiply_transposed(p, self.operand, out=self.product[:length]))
        if len(block.rows):
            of_target = self.of_target[block.rows] * block.weight.inverse[block.targets, None]
            tangent.index_add_(0, block.targets, of_target)
        torch.addcmul(tangent, block.weight.values, radial[:, None], value=-1.0, out=grad)
        del tangent
        block.weight.undo(grad)
        if self.block is not None:
            here.copy_(grad)


class _EmbeddingsGradient:
    """v, (N, D), to which one block after the other is added, then d_x and d_scale."""

    def __init__(self, problem: Problem, x: Vectors, factors: _Factors, sweep: Sweep) -> None:
        self.problem, self.x, self.factors = problem, x, factors
        # contiguous whatever x's strides, as the operator's fake promises
        shape, dtype = x.values.shape, sweep.dtype
        self.v = x.values.new_zeros(shape)
        is_same = dtype is sweep.accumulate
        self.product = None if is_same else x.values.new_empty(shape, dtype=dtype)

    def add(self, block: Block, p: torch.Tensor) -> None:
        """p in the product dtype."""
        if self.product is not None:
            self.v.add_(torch.mm(p.t(), block.operand, out=self.product))
        else:
            self.v.addmm_(p.t(), block.operand)

    def finish(
        self, swept: Swept, g_u: np.ndarray, needs: Needs
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """d_x and d_scale (eq. 8, 9)."""
        v, x, targets = self.v, self.x, self.problem.targets
        v.mul_(self.factors.a[:, None])
        weight = self.problem.w[targets.classes].to(self.problem.accumulate)
        rows = shrink_huge(weight, swept.inv_w[targets.classes])
        factors = targets.of(self.factors.of_target) * rows.inverse
        targets.add(v, rows.values * factors[:, None])
        radial = project(x, v)  # sum_k G_nk c_nk
        d_scale = None
        if needs.scale:
            of_others = radial.double().numpy() - g_u * swept.u.numpy()
            d_scale = torch.from_numpy(of_others).sum() / self.problem.scale
        return v.to(self.problem.x.dtype) if needs.x else None, d_scale


def backward(
    g: RowGradients, problem: Problem, swept: Swept, num_kept: int, needs: Needs
) -> Gradients:
    """Vector-Jacobian product of `forward` (eq. 7 to 9), for gradients ``g`` of lse and u."""
    x = shrink_huge(embeddings(problem), swept.inv_x)
    num_rows, num_classes, _ = problem.sizes
    dtype = product_dtype(problem.compute_dtype, problem.accumulate)
    sweep = Sweep(problem, x, _kept_products(swept.kept, (num_kept, num_rows), dtype))
    shifts = needs_shift(problem.scale, num_classes, problem.accumulate)
    factors = _Factors.of(g, problem, swept, x)
    of_x = _EmbeddingsGradient(problem, x, factors, sweep) if needs.x or needs.scale else None
    of_w = _WeightGradient(problem, x, factors, sweep) if needs.w else None
    for block in sweep.blocks(swept.inv_w, is_first=False):
        p = _probabilities(block, factors.minus_lse, shifts)
        radial = None if of_w is None else of_w.radial(block)
        if dtype is not problem.accumulate:
            p = sweep.product[: block.stop - block.start].copy_(p)
        if of_x is not None:
            of_x.add(block, p)
        if of_w is not None and radial is not None:
            of_w.write(block, p, radial)
    d_x, d_scale = (None, None) if of_x is None else of_x.finish(swept, g.u, needs)
    return Gradients(d_x, None if of_w is None else of_w.d_w, d_scale)
