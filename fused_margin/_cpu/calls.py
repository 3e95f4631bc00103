"""The CPU backend by the names of the operators, as `_triton.launch` has the kernels."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from fused_margin import _validate
from fused_margin._arguments import (
    IGNORED,
    Found,
    Gradients,
    Inputs,
    Loan,
    Losses,
    Needs,
    Slopes,
    Swept,
    Update,
)
from fused_margin._cpu import backend
from fused_margin._cpu.rows import Problem, Targets, chain, find_targets, losses, rounded
from fused_margin._numerics import accumulation_dtype
from fused_margin.margins import Margin


def _plain_numbers() -> contextlib.AbstractContextManager[Any]:
    """Without autocast, and without NumPy's warnings: NaN and infinite inputs give such outputs."""
    quiet = np.errstate(all="ignore")
    if not torch.is_autocast_enabled("cpu"):  # to turn it off anyway takes longer than to ask
        return quiet
    stack = contextlib.ExitStack()
    stack.enter_context(quiet)
    stack.enter_context(torch.autocast("cpu", enabled=False))
    return stack


def _problem(
    inputs: Inputs, labels: torch.Tensor, targets: Targets, ignored: torch.Tensor | None
) -> Problem:
    """What the CPU backend starts from; ``labels`` (N,) int64."""
    x, w, _, scale, scale_tensor, compute_dtype, extras = inputs
    if scale_tensor is not None:
        scale = _validate.positive_scale(scale_tensor.detach().item())
    return Problem(
        x, w, labels, targets, ignored, scale, compute_dtype, accumulation_dtype(x, w), extras
    )


def cosine_lse(
    inputs: Inputs, budget: int, lends_for: Needs | None
) -> tuple[Swept, Found | None, Loan | None]:
    """What ``cosine_lse`` returns, and a loan if there is one.

    Args:
        inputs: what to sweep over; labels outside [0, C) mean "no target".
        budget: see `backend.kept_bytes`.
        lends_for: the gradients that will be asked for, d_w among them, if autograd keeps a loan.
    """
    labels = inputs.labels.long()
    with _plain_numbers():
        problem = _problem(inputs, labels, find_targets(labels, inputs.w.shape[0]), None)
        return backend.forward(problem, budget, lends_for)


def margin_ce(
    inputs: Inputs,
    margin: Margin,
    reduction: str,
    ignore_index: int,
    budget: int,
    lends_for: Needs | None,
) -> tuple[Losses, Swept, Loan | None]:
    """What ``margin_ce`` returns, and a loan if there is one; arguments as for `cosine_lse`."""
    with _plain_numbers():
        labels, ignored = inputs.labels.long(), None
        num_classes, count = inputs.w.shape[0], labels.shape[0]
        targets = find_targets(labels, num_classes)
        if targets.rows is not None or 0 <= ignore_index < num_classes:
            _validate.label_range(labels, num_classes, ignore_index)
            ignored = labels == ignore_index
            labels = labels.masked_fill(ignored, IGNORED)
            targets = find_targets(labels, num_classes)
            count -= int(ignored.sum())
        problem = _problem(inputs, labels, targets, ignored)
        swept, _, loan = backend.forward(problem, budget, lends_for)
        found = losses(swept.lse, swept.u, ignored, inputs.scale, margin)
        loss, dtype = found.loss, swept.inv_x.dtype
        if reduction != "none":
            loss = np.asarray(loss.sum() / (max(count, 1) if reduction == "mean" else 1))
        reduced = Losses(
            loss=rounded(loss, dtype),
            slope_lse=rounded(found.slope_lse, dtype),
            slope_u=rounded(found.slope_u, dtype),
            num_counted=rounded(np.array(float(count)), dtype),
            targets=labels.clone() if labels.is_inference() else labels,  # which autograd can save
        )
        return reduced, swept, loan


def backward(
    slopes: Slopes, inputs: Inputs, swept: Swept, needs: Needs, loan: Loan | None,
    update: Update | None, of_hat: torch.Tensor | None,
) -> Gradients:  # fmt: skip
    """The gradients that are needed; see `backend.backward`.

    Args:
        slopes: where it starts. inputs, swept: what a forward was given and returned.
        needs: the gradients that are asked for. loan, update: as for `backend.backward`.
        of_hat: see `RowGradients`.
    """
    with _plain_numbers():
        labels, ignored = inputs.labels.long(), None
        targets = find_targets(labels, inputs.w.shape[0])
        if slopes.grad is not None and targets.rows is not None:
            ignored = labels == IGNORED  # which margin_ce has marked
        problem = _problem(inputs, labels, targets, ignored)
        g = chain(slopes, ignored)._replace(of_hat=of_hat)
        return backend.backward(g, problem, swept, needs, loan, update)
