"""First and second derivatives of psi and of the sine, in every mode, at and past the ends of u."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

from fused_margin import margins

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PyTorch's own, when it first loads its decompositions for forward mode, and of `linearize`
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

Tensor = torch.Tensor
Call = Callable[[Tensor], Tensor]  # elementwise


EDGE = math.sqrt(1.0 - margins.SINE_SQUARED_FLOOR)
POINTS = torch.tensor(
    [-1.0 - 1e-7, -1.0, -1.0 + 1e-9, -EDGE - 1e-8, -EDGE + 1e-8, -0.3, 0.0, 0.8,
     EDGE - 1e-8, EDGE + 1e-8, 1.0 - 1e-9, 1.0, 1.0 + 1e-7],
    dtype=torch.float64,
)  # fmt: skip


def _sine_slope(u: Tensor) -> Tensor:
    return -u / (1.0 - u * u).clamp_min(margins.SINE_SQUARED_FLOOR).sqrt()


def _sine_curvature(u: Tensor) -> Tensor:
    squared = 1.0 - u * u
    floored = torch.full_like(u, -(margins.SINE_SQUARED_FLOOR**-0.5))
    return torch.where(squared > margins.SINE_SQUARED_FLOOR, -(squared.abs() ** -1.5), floored)


def _psi(u: Tensor, boundary: str, grad: str) -> Tensor:
    return margins.apply(u, margins.angular(0.5, boundary, grad))


def _first_derivatives(f: Call, u: Tensor) -> dict[str, Tensor]:
    ones = torch.ones_like(u)
    leaf = u.detach().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(u, ones))).tangent
    assert dual is not None
    return {
        "backward": torch.autograd.grad(f(leaf).sum(), leaf)[0],
        "grad": func.grad(lambda u: f(u).sum())(u),
        "vmap of grad": func.vmap(func.grad(f))(u),
        "jvp": func.jvp(f, (u,), (ones,))[1],
        "jacfwd": func.jacfwd(f)(u).diagonal(),
        "jacrev": func.jacrev(f)(u).diagonal(),
        "vmap of jvp": func.vmap(lambda u: func.jvp(f, (u,), (torch.ones_like(u),))[1])(u),
        "linearize": func.linearize(f, u)[1](ones),
        "dual": dual,
    }


def _second_derivatives(f: Call, u: Tensor) -> dict[str, Tensor]:
    ones = torch.ones_like(u)
    leaf = u.detach().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)
    return {
        "backward twice": torch.autograd.grad((first + 0.0 * leaf).sum(), leaf)[0],
        "hessian": func.hessian(lambda u: f(u).sum())(u).diagonal(),
        "grad of grad": func.vmap(func.grad(func.grad(f)))(u),
        "jvp of jvp": func.jvp(lambda u: func.jvp(f, (u,), (ones,))[1], (u,), (ones,))[1],
        "jvp of grad": func.jvp(func.grad(lambda u: f(u).sum()), (u,), (ones,))[1],
        "grad of jvp": func.grad(lambda u: func.jvp(f, (u,), (ones,))[1].sum())(u),
    }


def test_sine() -> None:
    value = (1.0 - POINTS * POINTS).clamp_min(0.0).sqrt()
    torch.testing.assert_close(margins.sine(POINTS), value, rtol=0.0, atol=1e-12)
    for mode, slope in _first_derivatives(margins.sine, POINTS).items():
        torch.testing.assert_close(slope, _sine_slope(POINTS), msg=mode, rtol=1e-9, atol=0.0)
    for mode, curvature in _second_derivatives(margins.sine, POINTS).items():
        torch.testing.assert_close(
            curvature, _sine_curvature(POINTS), msg=mode, rtol=1e-9, atol=0.0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sine_keeps_the_dtype_and_has_no_nan(dtype: torch.dtype) -> None:
    u = torch.cat([POINTS, torch.linspace(-1.0, 1.0, 1001, dtype=torch.float64)]).to(dtype)
    result, slope = func.jvp(margins.sine, (u,), (torch.ones_like(u),))[:2]
    assert result.dtype is slope.dtype is dtype
    exact = (1.0 - u.double() ** 2).clamp_min(0.0).sqrt()
    eps = torch.finfo(dtype).eps
    assert float(((result.double() - exact) / exact.clamp_min(1e-12)).abs().max()) <= 4 * eps
    assert float(slope.abs().max()) <= 320.0
    assert math.isnan(float(margins.sine(torch.tensor(math.nan))))


@pytest.mark.parametrize("grad", ["exact", "straight_through"])
@pytest.mark.parametrize("boundary", ["linear", "continuous", "none"])
def test_margin_at_and_past_the_ends(boundary: str, grad: str) -> None:
    """psi' = cos m - sine' sin m where the first case applies, else 1, in every mode."""
    psi = functools.partial(_psi, boundary=boundary, grad=grad)
    u = POINTS.clamp(-1.0, 1.0)
    angular = (u >= -math.cos(0.5)) | torch.tensor(boundary == "none")
    slope = torch.where(angular, math.cos(0.5) - _sine_slope(u) * math.sin(0.5), 1.0)
    curvature = torch.where(angular, -_sine_curvature(u) * math.sin(0.5), 0.0)
    if grad == "straight_through":
        slope, curvature = torch.ones_like(u), torch.zeros_like(u)
    offset = 0.5 * math.sin(0.5) if boundary == "linear" else 1.0 - math.cos(0.5)
    value = torch.where(angular, (u.acos() + 0.5).cos(), u - offset)
    torch.testing.assert_close(psi(POINTS), value, rtol=1e-12, atol=1e-12)
    for mode, actual in _first_derivatives(psi, POINTS).items():
        torch.testing.assert_close(actual, slope, msg=mode, rtol=1e-9, atol=0.0)
    for mode, actual in _second_derivatives(psi, POINTS).items():
        torch.testing.assert_close(actual, curvature, msg=mode, rtol=1e-9, atol=0.0)
