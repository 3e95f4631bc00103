"""A shard of the classes may hold a single one: rows whose target that is have no other class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BACKENDS, FUSED_BACKENDS, device_of, eager_cosine_lse, eager_cosines

import fused_margin.functional as fmf
from fused_margin._arguments import PLAIN

# Triton's interpreter is NumPy, which warns of log(0) = -inf.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")

Tensor = torch.Tensor

ROWS, DIM = 6, 5
LABELS = torch.tensor([0, -1, 0, 7, 0, -100])  # a target in every second row
HAS_TARGET = LABELS == 0


def _leaves(
    backend: str, dtype: torch.dtype = torch.float64, num_classes: int = 1
) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, DIM, dtype=torch.float64).to(device_of(backend), dtype)
    w = torch.randn(num_classes, DIM, dtype=torch.float64).to(device_of(backend), dtype)
    return x.requires_grad_(), w.requires_grad_()


@pytest.mark.parametrize("scale", [9.0, 800.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values(backend: str, dtype: torch.dtype, scale: float) -> None:
    x, w = _leaves(backend, dtype)
    lse, u = fmf.cosine_lse(x, w, LABELS.to(x.device), scale, backend=backend)
    cosines = eager_cosines(x.detach().double(), w.detach().double())[:, 0].cpu()
    eps = torch.finfo(dtype).eps
    assert torch.equal(lse.isneginf().cpu(), HAS_TARGET)
    torch.testing.assert_close(
        lse.cpu().double()[~HAS_TARGET], scale * cosines[~HAS_TARGET], rtol=0, atol=4 * scale * eps
    )
    torch.testing.assert_close(u.cpu().double(), cosines.where(HAS_TARGET, 0.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("labels", [LABELS, LABELS * 0, LABELS * 0 - 1], ids=["some", "all", "no"])
@pytest.mark.parametrize("scale", [9.0, 800.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str, scale: float, labels: Tensor) -> None:
    """Those of dense code; whatever arrives at an lse of -inf goes nowhere."""
    x, w = _leaves(backend)
    labels = labels.to(x.device)
    s = torch.tensor(scale, dtype=torch.float64, device=x.device, requires_grad=True)
    inputs = (x, w, s)
    upstream = torch.randn(2, ROWS, dtype=torch.float64, device=x.device)
    lse, u = fmf.cosine_lse(x, w, labels, s, backend=backend)
    got = torch.autograd.grad((lse, u), inputs, tuple(upstream))
    dense_lse, dense_u = eager_cosine_lse(x, w, labels, s)
    rows = ~dense_lse.isneginf()
    want = torch.autograd.grad((dense_lse[rows], dense_u), inputs, (upstream[0][rows], upstream[1]))
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12 * scale)
    (d_x,) = torch.autograd.grad(fmf.cosine_lse(x, w, labels, 9.0, backend=backend)[0].sum(), x)
    assert torch.equal(d_x[labels == 0], torch.zeros_like(d_x[labels == 0]))


@pytest.mark.parametrize("memory_budget", [None, 0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, memory_budget: int | None) -> None:
    x, w = _leaves(backend)
    s = torch.tensor(7.0, dtype=torch.float64, device=x.device, requires_grad=True)

    def finite(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        lse, u = fmf.cosine_lse(
            x, w, LABELS.to(x.device), s, backend=backend, memory_budget=memory_budget
        )
        return lse.exp(), u  # exp(-inf) is 0, and so is its derivative

    torch.autograd.gradcheck(finite, (x, w, s))
    if backend == "reference":
        torch.autograd.gradgradcheck(finite, (x, w, s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_of_one_class_make_the_whole(backend: str, dtype: torch.dtype) -> None:
    """The loss over four classes, one on each of four ranks."""
    x, w = _leaves(backend, dtype, num_classes=4)
    labels = torch.tensor([0, 1, 2, 3, 0, 2], device=x.device)
    parts = [
        fmf.cosine_lse(x, w[k : k + 1], labels - k, 20.0, backend=backend) for k in range(len(w))
    ]
    lse = torch.stack([lse for lse, _ in parts]).logsumexp(dim=0)
    u = torch.stack([u for _, u in parts]).sum(dim=0)
    got = -torch.nn.functional.logsigmoid(20.0 * (u - 0.35) - lse)
    want = fmf.cosface(x, w, labels, 0.35, 20.0, reduction="none", backend=backend)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), (x, w)), torch.autograd.grad(want.sum(), (x, w))
    )


@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend: str) -> None:
    torch._dynamo.reset()
    x, w = _leaves(backend, torch.float32)
    labels = LABELS.to(x.device)

    def call(x: Tensor, w: Tensor) -> Tensor:
        lse, u = fmf.cosine_lse(x, w, labels, 9.0, backend=backend)
        return (lse.exp() + u).sum()

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, w), call(x, w))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, w), (x, w)), torch.autograd.grad(call(x, w), (x, w))
    )


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_opcheck(backend: str) -> None:
    x, w = _leaves(backend)
    numbers = torch.tensor([9.0], dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.fused_margin.cosine_lse.default,
        (x, w, LABELS.to(x.device), numbers, None, *PLAIN, torch.float64, backend, 0),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (fmf.arcface, ()), (fmf.cosface, ()), (fmf.fixed_adacos, ()),
        (fmf.normalized_softmax, (9.0,)), (fmf.margin_softmax, (torch.sin, 9.0)),
    ],
)  # fmt: skip
def test_a_loss_needs_two(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    x, w = _leaves("cpu")
    with pytest.raises(ValueError, match=r"C >= 2 rows \(classes\), got 1"):
        function(x, w, LABELS, *arguments)
    with pytest.raises(ValueError, match=r"C >= 1 rows \(classes\), got 0"):
        fmf.cosine_lse(x, w[:0], LABELS, 9.0)


def test_half_precision_and_autocast() -> None:
    x, w = _leaves("cpu", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lse, u = fmf.cosine_lse(x, w, LABELS, 9.0)
    assert lse.dtype is torch.float32
    d_x, d_w = torch.autograd.grad(lse.exp().sum() + u.sum(), (x, w))
    assert math.isfinite(float(d_x.sum() + d_w.sum()))
