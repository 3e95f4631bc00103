"""The ends of the range: angles near 0 and pi, target cosines at 1, norms from 0 to the largest.

Expected values are fp64 eager code on the same inputs, which no backend takes part in.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, CPU_BACKENDS, FUSED_BACKENDS, device_of, eager_cosine_lse

import fused_margin.functional as fmf
from fused_margin import margins, regularizers
from fused_margin._arguments import PLAIN

pytestmark = [
    pytest.mark.usefixtures("poison", "one_thread"),
    # PyTorch's own, when it first loads its decompositions for forward mode
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning"),
    # NumPy, in which the interpreter runs kernels; a GPU computes inf and NaN without a word
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning"),
]

Tensor = torch.Tensor
each_backend = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _at_angle(w: Tensor, theta: float) -> Tensor:
    """Rows at an angle of ``theta`` to the rows of w, (N, D), with norms spread over 0.1 to 10."""
    w_hat = F.normalize(w)
    other = torch.randn_like(w)
    other = F.normalize(other - (other * w_hat).sum(dim=1, keepdim=True) * w_hat)
    norms = torch.logspace(-1, 1, len(w), dtype=w.dtype)[:, None]
    return (w_hat * math.cos(theta) + other * math.sin(theta)) * norms


def _problem(
    theta: float, dtype: torch.dtype, rows: int = 256, dim: int = 64
) -> tuple[Tensor, ...]:
    """Embeddings at ``theta`` to their classes, weight and labels, rounded to ``dtype``."""
    w = torch.randn(rows, dim, dtype=torch.float64)
    return _at_angle(w, theta).to(dtype), w.to(dtype), torch.arange(rows)


def _relative(actual: Tensor, expected: Tensor) -> float:
    """Largest error of a row, relative to that row."""
    difference = actual.detach().cpu().double() - expected.detach()
    if expected.ndim == 2:
        return float((difference.norm(dim=1) / expected.norm(dim=1)).max())
    return float((difference / expected).abs().max())


# --- target cosines -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("theta", [0.0, math.pi])
@each_backend
def test_target_cosines_stay_within_one(backend: str, theta: float, dtype: torch.dtype) -> None:
    """Summed in fp32, a seventh of such rows come out above 1."""
    x, w, labels = (t.to(device_of(backend)) for t in _problem(theta, dtype))
    for scale in (64.0, torch.tensor(64.0, device=x.device)):
        _, u = fmf.cosine_lse(x, w, labels, scale, backend=backend)
        assert float(u.abs().max()) <= 1.0
        assert float((u - math.cos(theta)).abs().max()) <= 4.0 * torch.finfo(dtype).eps
        assert bool((u.acos() + 0.5).cos().isfinite().all())


@pytest.mark.parametrize("factor", [2.0, -2.0])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_target_cosines_stay_within_one_in_fp64(backend: str, factor: float) -> None:
    """The margin takes them so, whatever the inputs' dtype."""
    w, labels = torch.randn(60, 64), torch.arange(60)
    numbers = torch.tensor([64.0], dtype=torch.float64)
    _, u, *_ = torch.ops.fused_margin.cosine_lse(
        factor * w, w, labels, numbers, None, *PLAIN, torch.float32, backend, 0
    )
    assert u.dtype is torch.float64
    assert float(u.abs().max()) <= 1.0


@each_backend
def test_the_clamp_lets_gradients_through(backend: str) -> None:
    """At 1e-4 rad u is 1 in fp32, while its gradient, of size 1e-4 / ||x||, has its digits."""
    x, w, labels = (t.to(device_of(backend)) for t in _problem(1e-4, torch.float32))
    x, w = x.requires_grad_(), w.requires_grad_()
    _, u = fmf.cosine_lse(x, w, labels, 64.0, backend=backend)
    u.sum().backward()
    x64, w64 = (t.detach().cpu().double().requires_grad_() for t in (x, w))
    F.cosine_similarity(x64, w64).sum().backward()
    for leaf, expected in ((x, x64), (w, w64)):
        assert leaf.grad is not None
        assert expected.grad is not None
        assert _relative(leaf.grad, expected.grad) <= 0.01


def test_the_clamp_lets_second_derivatives_through() -> None:
    """At theta = 0 the first derivative is 0, and the second is -(I - x_hat x_hat^T) / ||x||^2."""
    x, w, labels = _problem(0.0, torch.float64, rows=20, dim=6)
    assert bool(((F.normalize(x) * F.normalize(w)).sum(dim=1) > 1.0).any())

    def cosine(row: Tensor, label: Tensor) -> Tensor:
        return fmf.cosine_lse(row[None], w, label[None], 64.0, backend="reference")[1][0]

    actual = torch.func.vmap(torch.func.hessian(cosine))(x, labels)
    x_hat = F.normalize(x)
    expected = x_hat[:, :, None] * x_hat[:, None, :] - torch.eye(6, dtype=torch.float64)
    scaled = actual * x.square().sum(dim=1)[:, None, None]
    torch.testing.assert_close(scaled, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("theta", [0.0, 1e-4, 0.5, math.pi - 1e-4])
@each_backend
def test_arcface_as_a_margin_of_ones_own(backend: str, theta: float) -> None:
    """`margins.sine` gives what `arcface` computes, and finite gradients where acos has none."""
    results = []
    for is_own in (True, False):
        torch.manual_seed(0)
        x, w, labels = (t.to(device_of(backend)) for t in _problem(theta, torch.float64, 16, 8))
        x, w = x.requires_grad_(), w.requires_grad_()
        if is_own:
            lse, u = fmf.cosine_lse(x, w, labels, 30.0, backend=backend)
            psi = u * math.cos(0.5) - margins.sine(u) * math.sin(0.5)
            loss = -F.logsigmoid(30.0 * psi - lse).mean()
        else:
            loss = fmf.arcface(x, w, labels, 0.5, 30.0, boundary="none", backend=backend)
        results.append((loss, *torch.autograd.grad(loss, (x, w))))
    for own, built_in in zip(*results, strict=True):
        assert bool(own.isfinite().all())
        torch.testing.assert_close(own, built_in, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["floats", "tensor margin", "tensor scale"])
@pytest.mark.parametrize("theta", [1e-3, 1e-2, 0.1, 1.0])
@each_backend
def test_small_angles_keep_the_digits_of_the_loss(backend: str, theta: float, kind: str) -> None:
    """A u summed in fp32 is off by 1e-7 or more, the sine at 1e-3 rad by 1e-4, the loss by 1e-2.

    The cosines of the others leave 3e-6 at D = 512 (at D = 64, where they are larger, 1.6e-5).
    """
    given = _problem(theta, torch.float32, rows=64, dim=512)
    x, w, labels = (t.to(device_of(backend)) for t in given)
    margin = torch.full((len(x),), 0.5, device=x.device) if kind == "tensor margin" else 0.5
    scale = torch.tensor(64.0, device=x.device) if kind == "tensor scale" else 64.0
    loss = fmf.arcface(x, w, labels, margin, scale, reduction="none", backend=backend)
    assert loss.dtype is torch.float32
    lse, u = eager_cosine_lse(x.cpu().double(), w.cpu().double(), labels.cpu(), 64.0)
    expected = -F.logsigmoid(64.0 * (u.acos() + 0.5).cos() - lse)
    assert _relative(loss, expected) <= 1e-5


# --- norms ----------------------------------------------------------------------------------------

SCALE = 8.0  # small, so that every class takes part in the gradients


def _loss(x: Tensor, w: Tensor, labels: Tensor, backend: str) -> Tensor:
    return fmf.arcface(x, w, labels, 0.5, SCALE, boundary="none", reduction="sum", backend=backend)


def _eager(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """The same loss in fp64, norms clamped at 1e-12."""
    lse, u = eager_cosine_lse(x, w, labels, SCALE)
    psi = u * math.cos(0.5) - (1.0 - u * u).sqrt() * math.sin(0.5)
    return -F.logsigmoid(SCALE * psi - lse).sum()


def _compare(
    backend: str,
    dtype: torch.dtype,
    factors_x: Tensor,
    factors_w: Tensor,
    tolerance: float,
) -> None:
    """Loss and each row of the gradients, for rows multiplied by powers of 2 in ``dtype``.

    Where a factor is large the expected gradient is computed without it and then divided, so that
    fp64 doesn't overflow either.
    """
    x, w = torch.randn(12, 16, dtype=torch.float64), torch.randn(9, 16, dtype=torch.float64)
    labels = torch.arange(12) % 9
    x, w = x.clamp(-1.9, 1.9).to(dtype), w.clamp(-1.9, 1.9).to(dtype)
    device = device_of(backend)
    divisor_x, divisor_w = (factors.clamp(min=1.0)[:, None] for factors in (factors_x, factors_w))
    plain_x = (x.double() * factors_x.clamp(max=1.0)[:, None]).requires_grad_()
    plain_w = (w.double() * factors_w.clamp(max=1.0)[:, None]).requires_grad_()
    x = (plain_x.detach() * divisor_x).to(dtype).to(device).requires_grad_()
    w = (plain_w.detach() * divisor_w).to(dtype).to(device).requires_grad_()
    assert bool(x.isfinite().all() & w.isfinite().all())
    loss = _loss(x, w, labels.to(device), backend)
    loss.backward()
    expected = _eager(plain_x, plain_w, labels)
    expected.backward()
    torch.testing.assert_close(
        loss.detach().cpu().double(), expected.detach(), rtol=tolerance, atol=0
    )
    for leaf, other, divisor in ((x, plain_x, divisor_x), (w, plain_w, divisor_w)):
        assert leaf.grad is not None
        assert other.grad is not None
        assert _relative(leaf.grad.cpu().double() * divisor, other.grad) <= tolerance


def _factors(size: int, rows: dict[int, float]) -> Tensor:
    factors = torch.ones(size, dtype=torch.float64)
    for row, factor in rows.items():
        factors[row] = factor
    return factors


def _skip_beyond_the_kernels(backend: str, dtype: torch.dtype, power: int) -> None:
    if backend == "triton" and power > {torch.float32: 58, torch.float64: 490}[dtype]:
        pytest.skip("beyond norms of 1e18 (1e150) the kernels give NaN: docs/math.md, large norms")


@pytest.mark.parametrize("which", ["embeddings", "weight", "both"])
@pytest.mark.parametrize(
    ("dtype", "power"),
    [
        *((torch.float32, power) for power in (45, 58, 62, 66, 126)),
        *((torch.float64, power) for power in (490, 510, 530, 1020)),
    ],
    ids=str,
)
@each_backend
def test_large_norms(backend: str, dtype: torch.dtype, power: int, which: str) -> None:
    """Cosines don't depend on norms; squares overflow from 2^64 (2^512) on, sums of them before."""
    _skip_beyond_the_kernels(backend, dtype, power)
    size_x, size_w = 12, 9
    factor = 2.0**power
    factors_x = _factors(size_x, {0: factor, 5: factor} if which != "weight" else {})
    factors_w = _factors(size_w, {2: factor, 8: factor} if which != "embeddings" else {})
    _compare(backend, dtype, factors_x, factors_w, 1e-5 if dtype is torch.float32 else 1e-11)


@pytest.mark.parametrize("which", ["embeddings", "weight"])
@pytest.mark.parametrize(
    ("dtype", "norm"), [(torch.float32, 1e20), (torch.float64, 1e160)], ids=str
)
def test_the_kernels_give_nan_where_squares_overflow(
    dtype: torch.dtype, norm: float, which: str
) -> None:
    """Not the finite loss of a row of zeros; the other rows keep theirs if an embedding is huge."""
    pytest.importorskip("triton", reason="Triton is not installed")
    device = device_of("triton")
    x, w = torch.randn(6, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    labels = torch.tensor([1, 2, 3, 4, 1, 2])
    (x if which == "embeddings" else w)[0] *= norm
    x, w = (tensor.to(device).requires_grad_() for tensor in (x, w))
    loss = fmf.arcface(x, w, labels.to(device), backend="triton", reduction="none")
    expected = [True] + [which == "weight"] * 5
    assert loss.isnan().tolist() == expected
    d_x, d_w = torch.autograd.grad(loss.sum(), (x, w))
    assert d_x.isnan().any(dim=1).tolist() == expected
    assert bool(d_w.isnan().any())


@pytest.mark.parametrize("power", [36, 50, 60])
@each_backend
def test_small_gradients_of_large_rows(backend: str, power: int) -> None:
    """d_w of 1e-30 keeps its digits, though the gradient times 1 / ||w||^2 underflows."""
    x, w, labels = torch.randn(12, 16), torch.randn(9, 16), torch.arange(12) % 9
    device = device_of(backend)
    large = (w * 2.0**power).to(device).requires_grad_()
    small = w.double().requires_grad_()
    (1e-12 * _loss(x.to(device), large, labels.to(device), backend)).backward()
    (1e-12 * _eager(x.double(), small, labels)).backward()
    assert large.grad is not None
    assert small.grad is not None
    assert _relative(large.grad.cpu().double() * 2.0**power, small.grad) <= 1e-5


@pytest.mark.parametrize("power", [-30, -45, -60, -140])
@pytest.mark.parametrize("which", ["embeddings", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_backend
def test_small_norms(backend: str, dtype: torch.dtype, which: str, power: int) -> None:
    """Above the clamp of 2^-40 gradients have no radial part, below it they are v / eps whole."""
    factors_x = _factors(12, {0: 2.0**power, 5: 2.0**power} if which == "embeddings" else {})
    factors_w = _factors(9, {2: 2.0**power, 8: 2.0**power} if which == "weight" else {})
    _compare(backend, dtype, factors_x, factors_w, 1e-5 if dtype is torch.float32 else 1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_backend
def test_zero_rows(backend: str, dtype: torch.dtype) -> None:
    """Cosines 0, and gradients of the order s / 1e-12: inf in fp16, which ends at 65504."""
    device = device_of(backend)
    x, w = torch.randn(6, 8).to(dtype), torch.randn(5, 8).to(dtype)
    x[1], w[2] = 0.0, 0.0
    x, w = (t.to(device).requires_grad_() for t in (x, w))
    labels = torch.tensor([0, 1, 2, 3, 4, 0], device=device)
    lse, u = fmf.cosine_lse(x, w, labels, SCALE, backend=backend)
    assert u[1:3].tolist() == [0.0, 0.0]
    torch.testing.assert_close(lse[1].cpu().float(), torch.tensor(math.log(4.0)))
    loss = _loss(x, w, labels, backend)
    loss.backward()
    assert bool(loss.isfinite())
    for leaf, zero in ((x, 1), (w, 2)):
        assert leaf.grad is not None
        others = torch.arange(len(leaf), device=device) != zero
        assert bool(leaf.grad[others].isfinite().all())
        if dtype is torch.float16:
            assert bool(leaf.grad[zero].isinf().all())
        else:
            assert bool(leaf.grad[zero].isfinite().all())
            assert float(leaf.grad[zero].abs().max()) > 1e9


@each_backend
def test_large_bf16_rows_are_finite(backend: str) -> None:
    """bf16 has fp32's range, and so do its norms."""
    _skip_beyond_the_kernels(backend, torch.float32, 125)
    device = device_of(backend)
    x, w = torch.randn(6, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    labels = torch.tensor([0, 1, 2, 3, 4, 0], device=device)
    plain = float(_loss(x.to(device), w.to(device), labels, backend))
    x[1] *= 2.0**125
    w[2] *= 2.0**125
    assert bool(x.isfinite().all() & w.isfinite().all())
    x, w = (t.to(device).requires_grad_() for t in (x, w))
    loss = _loss(x, w, labels, backend)
    loss.backward()
    assert loss.item() == pytest.approx(plain, rel=1e-5)
    for leaf in (x, w):
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())


@each_backend
def test_an_infinite_row_is_nan_and_says_so(backend: str) -> None:
    """A row that has already overflowed is not made to look sound."""
    device = device_of(backend)
    x, w = torch.randn(3, 8), torch.randn(5, 8)
    x[1, 3] = math.inf
    labels = torch.arange(3, device=device)
    loss = fmf.cosface(x.to(device), w.to(device), labels, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("row", [2.0**-45, 0.0, 2.0**126])
def test_second_derivatives_of_the_reference_are_finite(row: float) -> None:
    """At a norm of 0, where the second derivative of the norm itself is NaN."""
    x, w = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    x[1] *= row
    w[2] *= row
    labels = torch.arange(3)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return _loss(x, w, labels, "reference")

    for block in torch.autograd.functional.hessian(loss, (x, w)):
        for part in block:
            assert bool(part.isfinite().all())


@pytest.mark.parametrize(
    ("dtype", "power"),
    [
        *((torch.float32, power) for power in (50, 66, 126)),
        *((torch.float64, power) for power in (530, 1020)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "function",
    [
        regularizers.regular_face,
        lambda w: fmf.cosine_logits(w[:3], w, 5.0).square().sum(),
    ],
    ids=["regular_face", "cosine_logits"],
)
def test_large_norms_of_other_functions(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype, power: int
) -> None:
    w = torch.randn(9, 16).clamp(-1.9, 1.9).to(dtype)
    factors = _factors(9, {2: 2.0**power, 8: 2.0**power})[:, None]
    large = (w.double() * factors).to(dtype).requires_grad_()
    small = w.double().requires_grad_()
    value, expected = function(large), function(small)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-11
    torch.testing.assert_close(value.detach().double(), expected.detach(), rtol=tolerance, atol=0)
    (grad,) = torch.autograd.grad(value, large)
    (expected_grad,) = torch.autograd.grad(expected, small)
    assert _relative(grad.double() * factors, expected_grad) <= tolerance


# --- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [64.0, 1e3, 1e5, 1e8, 1e10])
@pytest.mark.parametrize("shape", [(8, 12, 10), (8, 700, 40), (70, 3000, 10)], ids=str)
@each_backend
def test_large_scales(backend: str, shape: tuple[int, int, int], scale: float) -> None:
    """s cos - lse is a small difference of large numbers, of which its exponential makes errors."""
    num_rows, num_classes, dim = shape
    if backend == "triton" and (num_rows * num_classes > 6000 or scale > 1e3):
        pytest.skip(
            "large shapes are slow in the interpreter; kernels keep no digits at such scales"
        )
    device = device_of(backend)
    x, w = torch.randn(num_rows, dim), torch.randn(num_classes, dim)
    labels = torch.randint(num_classes, (num_rows,))
    results = []
    for dtype, name, where in (
        (torch.float64, "reference", torch.device("cpu")),
        (torch.float32, "reference", torch.device("cpu")),
        (torch.float32, backend, device),
    ):
        leaves = x.to(where, dtype).requires_grad_(), w.to(where, dtype).requires_grad_()
        loss = fmf.normalized_softmax(*leaves, labels.to(where), scale, backend=name)
        gradients = torch.autograd.grad(loss, leaves)
        results.append([part.detach().cpu().double() for part in (loss, *gradients)])
    exact, eager, actual = results
    for want, by_eager, got in zip(exact, eager, actual, strict=True):
        # the kernels form s cos again with other tiles, in whose rounding it may differ
        rounding = 1e-7 * scale if backend == "triton" else 1e-6
        allowed = 3.0 * float((by_eager - want).norm() / want.norm()) + rounding
        assert float((got - want).norm() / want.norm()) <= allowed


@pytest.mark.parametrize("scale", [1e5, 1e8, 1e10])
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_gradients_are_bounded_at_huge_scales(backend: str, scale: float) -> None:
    """Whatever is rounded, a probability is at most 1."""
    device = device_of(backend)
    x = torch.randn(8, 40, device=device).requires_grad_()
    w = torch.randn(700, 40, device=device).requires_grad_()
    labels = torch.randint(700, (8,), device=device)
    loss = fmf.normalized_softmax(x, w, labels, scale, backend=backend, reduction="sum")
    for leaf, gradient in zip((x, w), torch.autograd.grad(loss, (x, w)), strict=True):
        bound = 2.0 * 700 * scale / float(leaf.detach().norm(dim=1).min())
        assert float(gradient.norm(dim=1).max()) <= bound


@pytest.mark.parametrize("scale", [1e5, 1e8, 1e10])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_equal_classes_share_a_gradient_at_huge_scales(backend: str, scale: float) -> None:
    """Each of four has a quarter, though s cos + log 4 rounds to s cos."""
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(2, 8)
    labels = torch.zeros(3, dtype=torch.int64)

    def gradient(w: Tensor) -> Tensor:
        lse, _ = fmf.cosine_lse(x, w, labels, scale, backend=backend)
        return torch.autograd.grad(lse.sum(), x)[0]

    assert _relative(gradient(w[[0, 1, 1, 1, 1]]), gradient(w).double()) <= 1e-5


@pytest.mark.parametrize("scale", [83.0, 88.0])
@each_backend
def test_many_classes_that_are_nearly_equal(backend: str, scale: float) -> None:
    """Each exponential is below the largest number, and their sum is not."""
    device = device_of(backend)
    direction = F.normalize(torch.randn(1, 16))
    w = (direction + 1e-6 * torch.randn(400, 16)).to(device).requires_grad_()
    x = direction.expand(3, 16).to(device)
    loss = fmf.normalized_softmax(x, w, torch.arange(3, device=device), scale, backend=backend)
    assert float(loss.detach()) == pytest.approx(math.log(400.0), abs=2e-3)
    (gradient,) = torch.autograd.grad(loss, w)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("scale", [64.0, 80.0])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_small_gradients_of_rows_beside_another_class(
    backend: str, scale: float, factor: float
) -> None:
    """Factors are e^-lse there, and products in bf16 take the smallest numbers for 0."""
    w, labels = torch.randn(50, 16, requires_grad=True), torch.arange(8)
    x = w.detach()[labels + 20].bfloat16().requires_grad_()
    loss = fmf.normalized_softmax(x, w, labels, scale, backend=backend)
    found = torch.autograd.grad(loss * factor, (x, w))
    x, w = (leaf.detach().double().requires_grad_() for leaf in (x, w))
    loss = fmf.normalized_softmax(x, w, labels, scale, backend="reference")
    for got, want in zip(found, torch.autograd.grad(loss, (x, w)), strict=True):
        assert float((got.double() / factor - want).norm() / want.norm()) < 5e-3


@each_backend
def test_where_the_angular_case_begins(backend: str) -> None:
    """theta + m = pi belongs to it: with m = pi and theta = 0, psi = cos(pi) = -1."""
    device = device_of(backend)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64, device=device)
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64, device=device)
    labels = torch.tensor([0], device=device)
    loss = fmf.arcface(x, w, labels, margin=math.pi, scale=5.0, backend=backend)
    assert float(loss) == pytest.approx(5.0 + math.log1p(math.exp(-5.0)), abs=1e-9)
