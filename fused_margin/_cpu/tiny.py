"""Next to no work: a step costs what its calls cost, and NumPy's cost least.

Cosines are fp64, so that their product holds those of the targets too. What the forward leaves are
the probabilities among the other classes, exp(s c - lse), (C, N).
Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from fused_margin._arguments import Gradients, Needs, Swept
from fused_margin._cpu.rows import (
    Problem,
    RowGradients,
    add_shared,
    embeddings,
    inverse_norms,
    project,
    rounded,
    shrink_huge,
    view_of,
)

# Up to this many multiplications a call is this module's.
MULTIPLICATIONS = 1 << 18


def fits(problem: Problem) -> bool:
    """Whether a call is this module's: fp64 has room to spare for its numbers, and it is small."""
    num_rows, num_classes, dim = problem.sizes
    is_small = num_rows * num_classes * dim <= MULTIPLICATIONS
    return is_small and problem.accumulate is torch.float32


def _entries(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Index of the targets in a (C, N) matrix."""
    classes, rows = problem.targets
    found = np.arange(problem.x.shape[0]) if rows is None else rows.numpy()
    return view_of(classes), found


class _Probabilities(NamedTuple):
    """What `forward` finds, all fp64.

    Attributes:
        p: exp(s c - lse), (C, N), 0 at the targets.
        lse: (eq. 2), (N,). u: (eq. 1), (N,). inv_x: inverse norms, (N,). inv_w: likewise, (C,).
    """

    p: np.ndarray
    lse: np.ndarray
    u: np.ndarray
    inv_x: np.ndarray
    inv_w: np.ndarray


def _wide(rows: torch.Tensor) -> np.ndarray:
    is_known = rows.dtype in (torch.float32, torch.float64)  # to NumPy
    return view_of(rows if is_known else rows.float()).astype(np.float64)


def _probabilities(problem: Problem) -> _Probabilities:
    x, w = _wide(embeddings(problem)), _wide(problem.w)
    inv_x, inv_w = inverse_norms(x), inverse_norms(w)
    entries = _entries(problem)
    z = w @ x.T
    z *= inv_w[:, None]
    z *= inv_x * problem.scale
    of_targets = z[entries] / problem.scale
    of_targets = np.minimum(np.maximum(of_targets, -1.0, out=of_targets), 1.0, out=of_targets)
    if problem.targets.rows is None:
        u = of_targets
    else:
        u = np.zeros(inv_x.shape)
        u[entries[1]] = of_targets
    z[entries] = -np.inf
    lse = np.maximum.reduce(z, axis=0)
    z -= lse
    p = np.exp(z, out=z)
    total = np.add.reduce(p, axis=0)
    p /= total
    lse += np.log(total)
    return _Probabilities(p, lse, u, inv_x, inv_w)


def forward(problem: Problem, num_kept: int, num_bytes: int) -> Swept:
    """lse and u, and in ``num_bytes`` the probabilities, unless none are to be kept."""
    p, lse, u, inv_x, inv_w = _probabilities(problem)
    if num_kept:
        kept = p.astype(np.float32).reshape(-1).view(np.uint8)
    else:
        kept = np.empty(num_bytes, np.uint8)
    return Swept(
        torch.from_numpy(lse),
        torch.from_numpy(u),
        rounded(inv_x, torch.float32),
        rounded(inv_w, torch.float32),
        torch.from_numpy(kept),
    )


def backward(
    g: RowGradients, problem: Problem, swept: Swept, num_kept: int, needs: Needs
) -> Gradients:
    """Vector-Jacobian product of `forward` (eq. 7 to 9), for gradients ``g`` of lse and u."""
    x = shrink_huge(embeddings(problem), swept.inv_x)
    w = shrink_huge(problem.w.to(problem.accumulate), swept.inv_w)
    inv_x, inv_w = x.inverse.numpy(), w.inverse.numpy()
    if num_kept:
        num_rows, num_classes, _ = problem.sizes
        p = swept.kept.numpy().view(np.float32).reshape(num_classes, num_rows)
    else:
        p = _probabilities(problem).p
    entries = _entries(problem)
    # G / (||x|| ||w||), so that the products take x and W as they are
    scaled = p * (g.lse * inv_x * problem.scale)
    scaled[entries] = (g.u * inv_x)[entries[1]]
    scaled *= inv_w[:, None]
    factors = scaled.astype(np.float32)
    d_x = d_w = d_scale = None
    if needs.w:
        q = torch.from_numpy(factors @ view_of(x.values))
        add_shared(q, g.of_hat, w)
        project(w, q)
        d_w = q.to(problem.w.dtype)
    if needs.x or needs.scale:
        v = torch.from_numpy(factors.T @ view_of(w.values))
        radial = project(x, v)
        if needs.scale:
            d_scale = torch.from_numpy(radial - g.u * swept.u.numpy()).sum() / problem.scale
        if needs.x:
            d_x = v.to(problem.x.dtype)
    return Gradients(d_x, d_w, d_scale)
