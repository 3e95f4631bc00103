"""Few classes: all cosines in one block, and so few operators that they don't cost more than it.

The exponentials, (C, N), are what the forward leaves for the backward, which then takes one product
for each gradient. Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from fused_margin._arguments import Gradients, Needs, Swept
from fused_margin._cpu.memory import gradient_memory, kept_memory, work_memory
from fused_margin._cpu.products import LOG2_E, product_dtype
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
from fused_margin._numerics import NORM_EPS, needs_shift

# Up to this many cosines, and elements of W, a call is this module's.
LOGITS, WEIGHT_ELEMENTS = 1 << 20, 1 << 22
# From this many multiplications on, a product in bf16 saves more than its casts cost.
LOWERED = 1 << 24
# Factors of x from which on it keeps its digits when it is rounded to bf16.
SMALLEST_FACTOR = 2.0**-90


def fits(num_rows: int, num_classes: int, dim: int) -> bool:
    """Whether all classes make one block; a single class, which may be no other, is `sweep`'s."""
    is_small = num_rows * num_classes <= LOGITS and num_classes * dim <= WEIGHT_ELEMENTS
    return is_small and num_classes > 1


def _product_dtype(problem: Problem) -> torch.dtype:
    if math.prod(problem.sizes) < LOWERED:
        return problem.accumulate
    return product_dtype(problem.compute_dtype, problem.accumulate)


def _multiply(
    a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, out: torch.Tensor
) -> torch.Tensor:
    """A B in ``out``; the operands rounded to ``dtype``."""
    a, b = a.to(dtype), b.to(dtype)
    return torch.mm(a, b, out=out) if dtype is out.dtype else out.copy_(torch.mm(a, b))


def _exponentials(
    problem: Problem, x: Vectors, w: Vectors, dtype: torch.dtype
) -> tuple[torch.Tensor, np.ndarray]:
    """Exponentials of all but the targets, (C, N), 0 at these, and lse (eq. 2), (N,) fp64.

    They are exp(s c), or exp(s c - lse) where a shift is needed.
    """
    scaled = x.values * (x.inverse * (problem.scale * LOG2_E))[:, None]
    z = kept_memory.empty(w.values.shape[0], x.values.shape[0], dtype=x.values.dtype)
    inv_w = w.inverse[:, None]
    if x.values.shape[0] > x.values.shape[1]:  # W has fewer elements
        _multiply(w.values * inv_w, scaled.t(), dtype, z)
    else:
        _multiply(w.values, scaled.t(), dtype, z).mul_(inv_w)
    problem.targets.fill(z, -float("inf"))
    if not needs_shift(problem.scale, z.shape[0], z.dtype):
        e = z.exp2_()
        return e, np.log(e.sum(dim=0).double().numpy())
    shift = z.amax(dim=0)
    e = z.sub_(shift).exp2_()
    total = e.sum(dim=0)
    lse = shift.double().numpy() / LOG2_E + np.log(total.double().numpy())
    return e.div_(total), lse


def forward(problem: Problem, num_kept: int, num_bytes: int) -> Swept:
    """lse and u (eq. 1, 2), and in ``num_bytes`` the exponentials, unless none are to be kept."""
    x = measure(embeddings(problem))
    w = problem.w.to(problem.accumulate)
    inv_w = torch.linalg.vector_norm(w, dim=1).clamp_min_(NORM_EPS).reciprocal_()
    e, lse = _exponentials(problem, x.rows, shrink_huge(w, inv_w), _product_dtype(problem))
    u = target_cosines(x, w, problem.targets)
    kept = e.view(-1).view(torch.uint8) if num_kept else e.new_empty(num_bytes, dtype=torch.uint8)
    return Swept(torch.from_numpy(lse), u, x.inverse, inv_w, kept)


class _Products(NamedTuple):
    """q / ||w|| (C, D) and v / ||x|| (N, D), the gradients of the norms left in (eq. 7)."""

    q: torch.Tensor | None
    v: torch.Tensor | None


class _Factors(NamedTuple):
    """What e^(s c) is multiplied by in G / ||x||, and its targets' entries, (N,) each."""

    of_others: torch.Tensor
    of_target: torch.Tensor


def _empty_products(problem: Problem, needs: Needs, dtype: torch.dtype) -> _Products:
    num_rows, num_classes, dim = problem.sizes
    return _Products(
        gradient_memory.empty(num_classes, dim, dtype=dtype) if needs.w else None,
        # contiguous whatever x's strides, as the operator's fake promises
        problem.x.new_empty(num_rows, dim, dtype=dtype) if needs.x or needs.scale else None,
    )


def _exact_products(
    problem: Problem, e: torch.Tensor, factors: _Factors, x: Vectors, w: Vectors, out: _Products
) -> None:
    """Products of G / (||x|| ||w||) with x and W as they are."""
    scaled = torch.mul(e, factors.of_others, out=work_memory.empty(*e.shape, dtype=e.dtype))
    problem.targets.put(scaled, factors.of_target)
    scaled.mul_(w.inverse[:, None])
    if out.q is not None:
        torch.mm(scaled, x.values, out=out.q)
    if out.v is not None:
        torch.mm(scaled.t(), w.values, out=out.v)


def _rounded_products(
    problem: Problem, e: torch.Tensor, factors: _Factors, x: Vectors, w: Vectors, out: _Products,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Products of the exponentials alone, which are larger than x and W, rounded to ``dtype``.

    As p -> 1 the target outweighs all others: it stays out of them.
    """
    targets, of_others = problem.targets, factors.of_others
    if (of_others.abs() < SMALLEST_FACTOR).any():  # products take what is near 0 for 0
        e, of_others = e * of_others, torch.ones_like(of_others)
    operand, of_others, inv_w = e.to(dtype), of_others[:, None], w.inverse[:, None]
    of_target = targets.of(factors.of_target) * w.inverse.index_select(0, targets.classes)
    of_target = of_target[:, None]
    if out.q is not None:
        _multiply(operand, x.values * of_others, dtype, out.q).mul_(inv_w)
        out.q.index_add_(0, targets.classes, targets.of(x.values) * of_target)
    if out.v is not None:
        _multiply(operand.t(), w.values * inv_w, dtype, out.v).mul_(of_others)
        targets.add(out.v, w.values.index_select(0, targets.classes).mul_(of_target))


def backward(
    g: RowGradients, problem: Problem, swept: Swept, num_kept: int, needs: Needs
) -> Gradients:
    """Vector-Jacobian product of `forward` (eq. 7 to 9), for gradients ``g`` of lse and u."""
    x = shrink_huge(embeddings(problem), swept.inv_x)
    w = shrink_huge(problem.w.to(problem.accumulate), swept.inv_w)
    num_rows, num_classes, _ = problem.sizes
    dtype = _product_dtype(problem)
    if num_kept:
        e = swept.kept.view(problem.accumulate).view(num_classes, num_rows)
    else:
        e, _ = _exponentials(problem, x, w, dtype)
    inv_x = x.inverse.numpy()
    of_others = g.lse * inv_x * problem.scale
    if not needs_shift(problem.scale, num_classes, e.dtype):
        of_others *= np.exp(-swept.lse.numpy())
    factors = _Factors(rounded(of_others, e.dtype), rounded(g.u * inv_x, e.dtype))
    products = _empty_products(problem, needs, e.dtype)
    if dtype is e.dtype:
        _exact_products(problem, e, factors, x, w, products)
    else:
        _rounded_products(problem, e, factors, x, w, products, dtype)
    q, v = products
    d_x = d_w = d_scale = None
    if q is not None:
        add_shared(q, g.of_hat, w)
        project(w, q)
        d_w = q.to(problem.w.dtype)
    if v is not None:
        radial = project(x, v)
        if needs.scale:
            of_others = radial.astype(np.float64) - g.u * swept.u.numpy()
            d_scale = torch.from_numpy(of_others).sum() / problem.scale
        if needs.x:
            d_x = v.to(problem.x.dtype)
    return Gradients(d_x, d_w, d_scale)
