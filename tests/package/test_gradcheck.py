"""Gradients of every public function against finite differences in fp64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKENDS, device_of

import fused_margin.functional as fmf

ROWS, CLASSES, DIM = 3, 5, 3
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "arcface-linear": functools.partial(fmf.arcface, boundary="linear", scale=7.0),
    "arcface-continuous": functools.partial(fmf.arcface, boundary="continuous", scale=7.0),
    "arcface-none": functools.partial(fmf.arcface, boundary="none", scale=7.0),
    "arcface-negative": functools.partial(fmf.arcface, margin=-0.3, scale=7.0),
    "cosface": functools.partial(fmf.cosface, scale=7.0),
    "fixed_adacos": fmf.fixed_adacos,
    "normalized_softmax": functools.partial(fmf.normalized_softmax, scale=7.0),
}


def _inputs(backend: str, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, weight and labels; the last row lies past theta + 0.5 = pi."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, DIM, dtype=torch.float64, generator=generator)
    w = torch.randn(CLASSES, DIM, dtype=torch.float64, generator=generator)
    labels = torch.tensor([4, 0, 2])
    noise = torch.randn(DIM, dtype=torch.float64, generator=generator)
    x[-1] = -w[2] / w[2].norm() + 0.1 * noise / noise.norm()
    device = device_of(backend)
    return (
        x.to(device).requires_grad_(),
        w.to(device).requires_grad_(),
        labels.to(device),
    )


def test_the_last_row_is_past_the_boundary() -> None:
    x, w, labels = _inputs("cpu")
    cosine = torch.nn.functional.cosine_similarity(x, w[labels]).detach()
    assert float(cosine[-1].acos()) + 0.5 > math.pi
    assert bool((cosine[:-1].acos() + 0.5 < math.pi).all())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses(backend: str, name: str, reduction: str) -> None:
    x, w, labels = _inputs(backend)
    labels[1] = -100

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[name](x, w, labels, reduction=reduction, backend=backend)

    # interpreted kernels are slow: every element for one reduction only, for the other
    # a random projection
    fast = backend == "triton" and reduction == "mean"
    assert torch.autograd.gradcheck(call, (x, w), fast_mode=fast)


@pytest.mark.parametrize("boundary", ["linear", "continuous", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_straight_through(backend: str, boundary: str) -> None:
    """The derivative documented is the exact one with psi' = 1 for the target."""
    x, w, labels = _inputs(backend)
    arguments = {"margin": 0.5, "scale": 7.0, "boundary": boundary, "reduction": "sum"}
    loss = fmf.arcface(x, w, labels, grad="straight_through", backend=backend, **arguments)
    torch.testing.assert_close(loss, fmf.arcface(x, w, labels, backend=backend, **arguments))
    d_x, d_w = torch.autograd.grad(loss, (x, w))

    x_cpu, w_cpu = (tensor.detach().cpu().requires_grad_() for tensor in (x, w))
    cosine = torch.nn.functional.normalize(x_cpu) @ torch.nn.functional.normalize(w_cpu).t()
    target = torch.nn.functional.one_hot(labels.cpu(), CLASSES).bool()
    theta = cosine[target].acos()
    inside = (theta + 0.5).cos()
    past = {
        "linear": theta.cos() - 0.5 * math.sin(0.5),
        "continuous": theta.cos() - 1 - math.cos(math.pi - 0.5),
        "none": inside,
    }[boundary]
    logits = cosine.detach().clone()
    logits[target] = torch.where(theta + 0.5 > math.pi, past, inside).detach()
    probabilities = (7.0 * logits).softmax(dim=1) - target.double()  # d loss / d logits
    expected = torch.autograd.grad(cosine, (x_cpu, w_cpu), 7.0 * probabilities)
    torch.testing.assert_close(d_x.cpu(), expected[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(d_w.cpu(), expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (fmf.arcface, {"boundary": "linear"}),
        (fmf.arcface, {"boundary": "continuous"}),
        (fmf.arcface, {"boundary": "none"}),
        (fmf.cosface, {}),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_margin_and_scale(
    backend: str, function: Callable[..., torch.Tensor], options: dict[str, str]
) -> None:
    x, w, labels = _inputs(backend)
    margin = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, device=x.device)
    scale = torch.tensor(7.0, dtype=torch.float64, device=x.device)

    def call(*arguments: torch.Tensor) -> torch.Tensor:
        x, w, margin, scale = arguments
        return function(x, w, labels, margin, scale, backend=backend, **options)

    inputs = (x, w, margin.requires_grad_(), scale.requires_grad_())
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("scale", [7.0, 800.0])
@pytest.mark.parametrize("labels", [(4, 0, 2), (-1, 5, 2), (7, -100, 1000)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cosine_lse(backend: str, labels: tuple[int, ...], scale: float) -> None:
    """Both outputs, with targets, without some, and without any; exp with and without a shift."""
    x, w, _ = _inputs(backend)
    targets = torch.tensor(labels, device=x.device)
    s = torch.tensor(scale, dtype=torch.float64, device=x.device, requires_grad=True)

    def call(
        x: torch.Tensor, w: torch.Tensor, s: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fmf.cosine_lse(x, w, targets, s, backend=backend)

    assert torch.autograd.gradcheck(call, (x, w, s), eps=1e-6 * min(1.0, 7.0 / scale))


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_output_of_cosine_lse(backend: str, output: int) -> None:
    x, w, labels = _inputs(backend)

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return fmf.cosine_lse(x, w, labels, 7.0, backend=backend)[output]

    assert torch.autograd.gradcheck(call, (x, w))


def test_cosine_logits() -> None:
    x, w, _ = _inputs("reference")
    s = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fmf.cosine_logits, (x, w, s))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_reference_is_twice_differentiable(name: str) -> None:
    x, w, labels = _inputs("reference")

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[name](x, w, labels, backend="reference")

    assert torch.autograd.gradgradcheck(call, (x, w))


def test_reference_primitive_is_twice_differentiable() -> None:
    x, w, labels = _inputs("reference")
    s = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)

    def call(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return fmf.cosine_lse(arguments[0], arguments[1], labels, arguments[2], backend="reference")

    assert torch.autograd.gradgradcheck(call, (x, w, s))
