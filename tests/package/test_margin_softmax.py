"""`functional.margin_softmax`: any psi, with what every loss has."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, device_of, eager_cosines

import fused_margin.functional as fmf
from fused_margin import margins

Psi = Callable[[torch.Tensor], torch.Tensor]
SCALE = 30.0


def combined(m1: float, m2: float, m3: float) -> Psi:
    """cos(m1 theta + m2) - m3, by the angle itself."""
    return lambda u: torch.cos(m1 * torch.atan2(margins.sine(u), u) + m2) - m3


def sphereface(u: torch.Tensor) -> torch.Tensor:
    """(-1)^k cos(4 theta) - 2 k for theta in [k pi / 4, (k + 1) pi / 4]."""
    theta = torch.atan2(margins.sine(u), u)
    k = (4.0 * theta / math.pi).floor().clamp(0, 3)
    return (1.0 - 2.0 * (k % 2)) * torch.cos(4.0 * theta) - 2.0 * k


MARGINS = {
    "combined": combined(1.0, 0.3, 0.2),
    "multiplied": combined(1.35, 0.0, 0.0),
    "sphereface": sphereface,
    "cos 2 theta, monotone": lambda u: 2.0 * u * u.abs() - 1.0,
}


def _leaves(backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 12, generator=generator, dtype=torch.float64).to(device_of(backend))
    w = torch.randn(20, 12, generator=generator, dtype=torch.float64).to(device_of(backend))
    labels = torch.randint(20, (9,), generator=generator).to(device_of(backend))
    return x.requires_grad_(), w.requires_grad_(), labels


def _dense(
    psi: Psi, x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor, reduction: str
) -> torch.Tensor:
    cosines, index = eager_cosines(x, w), labels.clamp_min(0)[:, None]
    logits = SCALE * cosines.scatter(1, index, psi(cosines.gather(1, index)[:, 0])[:, None])
    return F.cross_entropy(logits, labels, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_psi_equals_dense_code(backend: str, name: str, reduction: str) -> None:
    x, w, labels = _leaves(backend)
    labels[::4] = -100
    upstream = torch.ones((), dtype=x.dtype, device=x.device)
    if reduction == "none":
        upstream = torch.linspace(0.1, 1.0, 9, dtype=x.dtype, device=x.device)
    results = []
    for call in (
        lambda: fmf.margin_softmax(
            x, w, labels, MARGINS[name], SCALE, reduction=reduction, backend=backend
        ),
        lambda: _dense(MARGINS[name], x, w, labels, reduction),
    ):
        loss = call()
        results.append((loss, *torch.autograd.grad(loss, (x, w), upstream)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_built_in_margins_are_the_losses(backend: str) -> None:
    x, w, labels = _leaves(backend)
    for psi, loss in (
        (margins.angular(0.5, "linear", "exact"), fmf.arcface(x, w, labels, backend=backend)),
        (margins.additive(0.35), fmf.cosface(x, w, labels, backend=backend)),
    ):
        assert torch.equal(fmf.margin_softmax(x, w, labels, psi, 64.0, backend=backend), loss)

        def by_hand(u: torch.Tensor, psi: margins.Margin = psi) -> torch.Tensor:
            return margins.apply(u, psi)

        called = fmf.margin_softmax(x, w, labels, by_hand, 64.0, backend=backend)
        torch.testing.assert_close(called, loss, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_an_ignored_row_is_looked_at(backend: str) -> None:
    """NaN in the row, and a psi whose slope is NaN at what stands for its cosine, 0."""
    x, w, labels = _leaves(backend)

    def psi(u: torch.Tensor) -> torch.Tensor:
        return (u * u).sqrt()

    keep = torch.arange(9) != 4
    only = torch.autograd.grad(
        fmf.margin_softmax(x[keep], w, labels[keep], psi, SCALE, backend=backend), (x, w)
    )
    labels[4] = -100
    spoiled = x.detach().clone()
    spoiled[4] = float("nan")
    spoiled.requires_grad_()
    loss = fmf.margin_softmax(spoiled, w, labels, psi, SCALE, backend=backend)
    got = torch.autograd.grad(loss, (spoiled, w))
    for actual, expected in zip(got, only, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    assert got[0][4].tolist() == [0.0] * 12


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_label_past_the_last_class_is_refused(backend: str) -> None:
    x, w, labels = _leaves(backend)
    labels[2] = 20
    with pytest.raises(ValueError, match=r"labels\[2\] is 20"):
        fmf.margin_softmax(x, w, labels, torch.sin, SCALE, backend=backend)


def test_what_psi_closes_over_is_learnt() -> None:
    x, w, labels = _leaves("cpu")
    offset = torch.full((9,), 0.2, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    loss = fmf.margin_softmax(x, w, labels, lambda u: u - offset, scale)
    expected = fmf.cosface(x, w, labels, offset, scale)
    assert torch.equal(loss, expected)
    inputs = (x, w, offset, scale)
    for got, want in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_under_autocast_and_compile() -> None:
    x, w, labels = (part.detach() for part in _leaves("cpu"))
    x, w = x.float().requires_grad_(), w.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fmf.margin_softmax(x, w, labels, sphereface, SCALE)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, _dense(sphereface, x, w, labels, "mean"), rtol=2e-2, atol=0.1)
    compiled = torch.compile(fmf.margin_softmax, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(x, w, labels, sphereface, SCALE),
        fmf.margin_softmax(x, w, labels, sphereface, SCALE),
    )


@pytest.mark.parametrize("psi", [0.5, None, "arcface"])
def test_a_psi_that_is_none(psi: object) -> None:
    x, w, labels = _leaves("cpu")
    with pytest.raises(TypeError, match="psi must be a function of the target cosines"):
        fmf.margin_softmax(x, w, labels, psi, SCALE)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("psi", [torch.sum, lambda u: u[:, None], lambda u: 0.5])
def test_a_psi_of_another_shape(psi: Psi) -> None:
    x, w, labels = _leaves("cpu")
    with pytest.raises(
        ValueError, match=r"psi must return a tensor of its argument's shape, \(9,\)"
    ):
        fmf.margin_softmax(x, w, labels, psi, SCALE)


def test_coefficients_of_another_shape_are_refused() -> None:
    """They would be broadcast: a column to a matrix of losses, a number per class to nothing."""
    x, w, labels = torch.randn(8, 4), torch.randn(20, 4), torch.randint(20, (8,))
    for wrong, remedy in (
        (torch.full((8, 1), 0.1), r"use \.flatten\(\)"),
        (torch.full((20,), 0.1), r"margin\[labels\]"),
        (torch.full((1,), 0.1), r"margin\.expand\(8\)"),
    ):
        for psi in (margins.additive(wrong), margins.angular(wrong, "linear", "exact")):
            with pytest.raises(ValueError, match=rf"must have shape \(8,\).*{remedy}"):
                fmf.margin_softmax(x, w, labels, psi, 16.0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("compiles", [False, True])
def test_a_learnt_number_is_a_coefficient(backend: str, compiles: bool) -> None:
    x, w, labels = torch.randn(8, 4), torch.randn(20, 4), torch.randint(20, (8,))

    def loss(margin: torch.Tensor) -> torch.Tensor:
        return fmf.margin_softmax(x, w, labels, margins.additive(margin), 16.0, backend=backend)

    if compiles:
        torch.compiler.reset()
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    margin = torch.tensor(0.3, requires_grad=True)
    value = loss(margin)
    torch.testing.assert_close(value, fmf.cosface(x, w, labels, 0.3, 16.0))
    (slope,) = torch.autograd.grad(value, margin)
    h = 1e-3
    either = [fmf.cosface(x.double(), w.double(), labels, 0.3 + d, 16.0) for d in (h, -h)]
    assert float(slope) == pytest.approx(float(either[0] - either[1]) / (2 * h), rel=1e-3)


def test_what_angular_is_given_is_checked() -> None:
    with pytest.raises(ValueError, match="radians"):
        margins.angular(28.6)
    with pytest.raises(ValueError, match="boundary must be one of"):
        margins.angular(0.5, "linaer")
    with pytest.raises(ValueError, match="grad must be one of"):
        margins.angular(0.5, "linear", "excat")
    assert margins.angular(0.5) == margins.angular(0.5, "linear", "exact")
