"""Nothing of an ignored row, forward or backward, reaches anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BACKENDS, device_of

import fused_margin.functional as fmf

N, C, D = 9, 41, 5
IGNORED = 3
LOSSES: dict[str, Any] = {
    "arcface": fmf.arcface,
    "fixed_adacos": fmf.fixed_adacos,
    "tensor scale": lambda x, w, y, **kw: fmf.arcface(
        x, w, y, scale=torch.tensor(20.0, device=x.device), **kw
    ),
    "tensor margin": lambda x, w, y, **kw: fmf.arcface(
        x, w, y, torch.full(y.shape, 0.4, device=x.device), **kw
    ),
}
VALUES = (float("nan"), float("inf"), 3e38)


def _leaves(backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = device_of(backend)
    x = torch.randn(N, D, dtype=dtype, device=device, requires_grad=True)
    w = torch.randn(C, D, device=device, requires_grad=True)
    labels = torch.randint(C, (N,), device=device)
    labels[IGNORED] = -100
    return x, w, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_gradient(backend: str, name: str, dtype: torch.dtype) -> None:
    """The derivative of sqrt is infinite at the 0 of an ignored row."""
    x, w, labels = _leaves(backend, dtype)
    counted = labels != -100
    loss = LOSSES[name](x, w, labels, backend=backend, reduction="none")
    got = torch.autograd.grad(loss.sqrt().sum(), (x, w), retain_graph=True)
    want = torch.autograd.grad(loss[counted].sqrt().sum(), (x, w), retain_graph=True)
    assert bool(torch.isfinite(got[1]).all())
    assert not bool(got[0][IGNORED].any())
    torch.testing.assert_close(got, want)
    upstream = torch.ones(N, device=x.device)
    upstream[IGNORED] = float("nan")
    again = torch.autograd.grad(loss, (x, w), upstream)
    torch.testing.assert_close(again, torch.autograd.grad(
        LOSSES[name](x, w, labels, backend=backend, reduction="sum"), (x, w)
    ))  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_embedding_that_is_no_number(
    backend: str, name: str, reduction: str, value: float
) -> None:
    x, w, labels = _leaves(backend, torch.float32)
    spoilt = x.detach().clone()
    spoilt[IGNORED, 2] = value
    spoilt.requires_grad_()
    results = []
    for embeddings in (x, spoilt):
        loss = LOSSES[name](embeddings, w, labels, backend=backend, reduction=reduction)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (embeddings, w))))
    torch.testing.assert_close(results[1], results[0])
    assert not bool(results[1][1][IGNORED].any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_row(backend: str) -> None:
    x, w, labels = _leaves(backend, torch.float32)
    with torch.no_grad():
        x.fill_(float("nan"))
    loss = fmf.arcface(x, w, labels.fill_(-100), backend=backend)
    gradients = torch.autograd.grad(loss, (x, w))
    assert loss.item() == 0.0
    assert not any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_target_is_not_ignored(backend: str) -> None:
    """In `cosine_lse` a label outside [0, C) says only that lse runs over all classes."""
    x, w, labels = _leaves(backend, torch.float32)
    lse, u = fmf.cosine_lse(x, w, labels.fill_(-1), 20.0, backend=backend)
    logits = 20.0 * torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).t()
    torch.testing.assert_close(lse, logits.logsumexp(1))
    assert not bool(u.any())
    got = torch.autograd.grad(lse.sum(), (x, w))
    torch.testing.assert_close(got, torch.autograd.grad(logits.logsumexp(1).sum(), (x, w)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_gradient_where_there_is_no_cosine(backend: str, dtype: torch.dtype) -> None:
    """A row without target has u = 0, a constant, whose gradient reaches nothing."""
    x, w, labels = _leaves(backend, dtype)
    labels[IGNORED] = -1
    scale = torch.tensor(20.0, requires_grad=True)
    lse, u = fmf.cosine_lse(x, w, labels, scale, backend=backend)

    def gradients(of_nothing: float) -> tuple[torch.Tensor, ...]:
        upstream = torch.ones_like(u)
        upstream[IGNORED] = of_nothing
        total = (lse, u), (x, w, scale), (torch.ones_like(lse), upstream)
        return torch.autograd.grad(*total, retain_graph=True)

    torch.testing.assert_close(gradients(float("inf")), gradients(0.0))
