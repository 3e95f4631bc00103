"""Which of three ways a call goes, and how much of its forward it keeps for the backward."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from fused_margin import _loans
from fused_margin._arguments import PLAIN, Extras, Found, Gradients, Loan, Needs, Swept, Update
from fused_margin._cpu import ahead, single, sweep, tiny
from fused_margin._cpu.products import product_dtype
from fused_margin._cpu.rows import Problem, RowGradients
from fused_margin._numerics import accumulation_dtype

# Bytes of products that the forward leaves for the backward, those of the first classes: this much,
# and more for each row of the batch above 256. The others are formed again, so that memory does not
# grow with N C.
KEPT_BYTES = 40 << 20
KEPT_ROWS, KEPT_BYTES_PER_FURTHER_ROW = 256, 224 << 10
# What the larger blocks of `ahead` take more, and so is left of the above to them.
LARGER_BLOCKS = 24 << 20
# Products of a class take as long as a row of d_w in passes over them if they are that many times
# fewer.
ROWS_FOR_AHEAD = 4
# What most steps ask for.
WEIGHTS_TOO = Needs(x=True, w=True, scale=False)


def kept_bytes(x: torch.Tensor, w: torch.Tensor, budget: int) -> Any:
    """Bytes that outlive the forward: for all cosines, or ``budget``; negative for the default.

    A formula without cases, so that `torch.compile` and `torch.export` need not know N.

    Returns:
        An int, symbolic where N or the budget is.
    """
    num_rows, num_classes = x.shape[0], w.shape[0]
    is_known = type(num_rows) is int and type(budget) is int
    largest, smallest = (max, min) if is_known else (torch.sym_max, torch.sym_min)
    available: Any = budget
    if budget < 0:
        further_rows = largest(0, num_rows - KEPT_ROWS)
        available = KEPT_BYTES + further_rows * KEPT_BYTES_PER_FURTHER_ROW
    return smallest(num_rows * num_classes * accumulation_dtype(x, w).itemsize, available)


def kept_classes(
    x: torch.Tensor,
    w: torch.Tensor,
    compute_dtype: torch.dtype,
    num_bytes: int,
    extras: Extras = PLAIN,
) -> int:
    """Of how many rows of W ``num_bytes`` hold the products: all, or those of whole blocks."""
    (num_rows, dim), num_classes = x.shape, w.shape[0]
    accumulate = accumulation_dtype(x, w)
    if extras.is_plain and single.fits(num_rows, num_classes, dim):
        needed = num_rows * num_classes * accumulate.itemsize
        return num_classes if needed <= num_bytes else 0
    bytes_per_class = num_rows * product_dtype(compute_dtype, accumulate).itemsize
    if num_classes * bytes_per_class <= num_bytes:
        return num_classes
    sizes = num_rows, num_classes, dim
    size = sweep.block_size(sizes, accumulate.itemsize, extras.centers)
    return num_bytes // (bytes_per_class * size) * size


def _way(problem: Problem) -> ModuleType:
    num_rows, num_classes, dim = problem.sizes
    if not (problem.extras.is_plain and single.fits(num_rows, num_classes, dim)):
        return sweep
    return tiny if tiny.fits(problem) else single


def runs_ahead(problem: Problem, num_kept: int, needs: Needs = WEIGHTS_TOO) -> bool:
    """Whether the backward is done ahead, in the memory of d_w, if that may be lent.

    Not where all products are kept anyway and are so few a class that a pass over them costs less
    than one over a row of d_w.
    """
    num_rows, num_classes, dim = problem.sizes
    if _way(problem) is not sweep or not ahead.fits(problem, needs):
        return False
    return num_kept < num_classes or ROWS_FOR_AHEAD * num_rows > dim


def forward(
    problem: Problem, budget: int, lends_for: Needs | None = None
) -> tuple[Swept, Found | None, Loan | None]:
    """lse, u, the inverse norms, and up to ``budget`` bytes for a backward, as `kept_bytes` has it.

    Raises nothing: labels outside [0, C) mean "no target".

    Args:
        problem: what to sweep over.
        budget: see `kept_bytes`.
        lends_for: the gradients that will be asked for, d_w among them, if autograd keeps a loan.

    Returns:
        those, what `problem.extras` asked of a sweep, and a loan if there is one.
    """
    x, w, extras = problem.x, problem.w, problem.extras
    num_bytes = kept_bytes(x, w, budget)
    num_kept = kept_classes(x, w, problem.compute_dtype, num_bytes, extras)
    way = _way(problem)
    if way is not sweep:
        return way.forward(problem, num_kept, num_bytes), None, None
    may_lend = lends_for is not None and _loans.may_lend(w)
    if lends_for is not None and may_lend and runs_ahead(problem, num_kept, lends_for):
        on_top = num_bytes if budget >= 0 else max(0, num_bytes - LARGER_BLOCKS)
        return ahead.forward(problem, on_top, lends_for, num_bytes)
    swept, found = sweep.forward(problem, num_kept, num_bytes)
    return swept, found, None


def backward(
    g: RowGradients, problem: Problem, swept: Swept, needs: Needs, loan: Loan | None = None,
    update: Update | None = None,
) -> Gradients:  # fmt: skip
    """Vector-Jacobian product of `forward`, for gradients ``g`` of lse and u.

    And of the total, where `sweep` has formed it. Of many classes ``update`` takes the rows of d_w,
    if it is given, and may change W there.
    """
    if problem.targets.rows is not None:  # elsewhere u is the number 0, whatever its gradient
        found = problem.targets.rows.numpy()
        g_u = np.zeros_like(g.u)
        g_u[found] = g.u[found]
        g = g._replace(u=g_u)
    if loan is not None:
        return ahead.backward(g, problem, swept, loan, needs)
    num_kept = kept_classes(
        problem.x, problem.w, problem.compute_dtype, swept.kept.shape[0], problem.extras
    )
    way = _way(problem)
    if way is sweep:
        return sweep.backward(g, problem, swept, num_kept, needs, update)
    return way.backward(g, problem, swept, num_kept, needs)
