"""Rows that must not count, numbers at the ends of their range, and what nearly cancels.

Each of the ways in which a gradient may be formed: both of the CPU's, and the kernels' strategies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    ARCFACE,
    COSFACE,
    FP32,
    FP64,
    HALF_MODES,
    HAS_TRITON,
    Mode,
    Problem,
    ahead,
    arcface,
    check_loss,
    device_of,
    in_blocks,
    needs_triton,
    normalized_softmax,
    problem,
    run,
    yardstick,
)

import fused_margin.functional as fmf
from fused_margin import _validate
from fused_margin._arguments import PLAIN

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("poison")
FP16, BF16 = HALF_MODES[:2]
STRATEGIES = ("chunked", "fused", "kept", "lent")


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cpu", marks=in_blocks, id="cpu-blocks"),
        pytest.param("cpu", marks=ahead, id="cpu-ahead"),
        *(pytest.param(f"triton-{name}", marks=needs_triton) for name in STRATEGIES),
    ]
)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend, made to go one of its ways."""
    name, _, strategy = request.param.partition("-")
    with _strategy(strategy) if strategy else contextlib.nullcontext():
        yield name


def _strategy(name: str) -> contextlib.AbstractContextManager[None]:
    from fused_margin._triton import planning

    return planning.override(name)


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> Iterator[str]:
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    with _strategy(request.param):
        yield request.param


# --- the target cosine ----------------------------------------------------------------------------

ANGLES = (1e-3, 2e-3, 5e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


def _at_angles(dim: int) -> Problem:
    """A row for each of `ANGLES`, its target at that angle; no other class is near."""
    given = problem(len(ANGLES), 40, dim)
    labels = torch.arange(len(ANGLES))
    target = given.w[labels] / given.w[labels].norm(dim=1, keepdim=True)
    aside = given.x - (given.x * target).sum(dim=1, keepdim=True) * target
    aside = aside / aside.norm(dim=1, keepdim=True)
    theta = torch.tensor(ANGLES, dtype=torch.float64)[:, None]
    x = 3.0 * (theta.cos() * target + theta.sin() * aside)
    return dataclasses.replace(given, x=x, labels=labels)


@pytest.mark.parametrize("dim", [20, 60])
def test_loss_at_small_angles(backend: str, dim: int) -> None:
    """The loss has the digits of its dtype: an error of u of 1e-7 would be one of 7e-3 at 1e-3."""
    given = _at_angles(dim)
    expected = yardstick(ARCFACE, given, FP32, reduction="none").value
    actual = run(ARCFACE, given, FP32, backend, reduction="none").value
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0.0)


def test_slope_at_small_angles(backend: str) -> None:
    """psi' takes its sine from u, too."""
    given = _at_angles(20)
    expected = yardstick(ARCFACE, given, FP32, reduction="none")
    actual = run(ARCFACE, given, FP32, backend, reduction="none")
    error = (actual.d_x - expected.d_x).norm(dim=1) / expected.d_x.norm(dim=1)
    assert float(error.max()) < 3e-4


def test_target_cosine_is_fp64(backend: str) -> None:
    """Of fp32 inputs, in [-1, 1]: rounding leaves some of many parallel rows a little outside."""
    given = problem(20, 60, 50)
    w = given.w.float().double()
    labels = torch.cat([torch.arange(60), torch.arange(60), given.labels])
    x = torch.cat([2.0 * w, -0.5 * w, given.x])
    given = dataclasses.replace(given, x=x, w=w, labels=labels)
    x, w = (leaf.detach() for leaf in given.leaves(FP32, device_of(backend)))
    numbers = torch.tensor([9.0], dtype=torch.float64)
    lse, u, *_ = torch.ops.fused_margin.cosine_lse(
        x, w, labels.to(x.device), numbers, None, *PLAIN, torch.float32, backend, 0
    )
    assert (lse.dtype, u.dtype) == (torch.float64, torch.float64)
    assert float(u.abs().max()) == 1.0
    expected = torch.cosine_similarity(x.cpu().double(), w.cpu().double()[labels], dim=1)
    torch.testing.assert_close(u.cpu(), expected, rtol=0.0, atol=1e-12)


@needs_triton
def test_lse_is_added_in_fp64() -> None:
    """The maximum, 64, and the log of the sum, 38 times 1, are exact here; fp32 would lose 4e-6."""
    device = device_of("triton")
    x = torch.zeros(3, 20, device=device)
    w = torch.zeros(39, 20, device=device)
    x[:, 4], w[:, 4] = 2.0, 0.5
    numbers = torch.tensor([64.0], dtype=torch.float64)
    lse, *_ = torch.ops.fused_margin.cosine_lse(
        x, w, torch.arange(3, device=device), numbers, None, *PLAIN, torch.float32, "triton", 0
    )
    assert lse.tolist() == pytest.approx([64.0 + math.log(38.0)] * 3, rel=0.0, abs=1e-12)


def test_a_block_that_holds_nothing_but_a_target(backend: str) -> None:
    """Its maximum is -inf, and so it is for the first block of a split."""
    given = problem(5, 65, 8)
    for label in (0, 32, 64):
        labels = torch.full((5,), label)
        check_loss(
            ARCFACE, dataclasses.replace(given, labels=labels), FP64, backend, reduction="none"
        )


def test_the_clamp_of_u_is_left_out_of_the_derivative(backend: str) -> None:
    """At u = 1 the loss still has a gradient by u."""
    given = problem(3, 9, 16)
    given = dataclasses.replace(given, x=2.0 * given.w[given.labels])
    x, w = (leaf.detach() for leaf in given.leaves(FP32, device_of(backend)))
    scale, margin = 4.0, 0.5
    cos, sin = math.cos(margin), math.sin(margin)
    numbers = torch.tensor([scale, cos, sin, -cos, margin * sin], dtype=torch.float64)
    _, d_lse, d_u, *_ = torch.ops.fused_margin.margin_ce(
        x, w, given.labels.to(x.device), numbers, False, "none", -100, torch.float32, backend, 0
    )
    slope = cos + sin / math.sqrt(1e-5)
    assert bool((d_lse > 1e-6).all())
    torch.testing.assert_close(d_u, -scale * slope * d_lse, rtol=1e-5, atol=0.0)


def test_margin_of_pi_at_the_target(backend: str) -> None:
    """At theta + m = pi, exactly, the first case of psi applies: -1, not 1 - m sin m."""
    x = torch.eye(3, dtype=torch.float64, device=device_of(backend))
    for dtype in (torch.float32, torch.float64):
        leaf, w = x.to(dtype), 2.0 * x.to(dtype)
        labels = torch.arange(3, device=x.device)
        loss = fmf.arcface(leaf, w, labels, math.pi, 4.0, backend=backend)
        # psi = -1, and two other classes at a right angle
        assert float(loss) == pytest.approx(math.log1p(2.0 * math.exp(4.0)), rel=1e-6)


# --- ignored rows ---------------------------------------------------------------------------------

IGNORED = [1, 4, 16]
POISON = {
    "nan": lambda rows: rows.fill_(math.nan),
    "inf": lambda rows: rows.fill_(math.inf),
    "one element": lambda rows: rows[:, :1].fill_(-math.inf),
}


def _with_ignored_rows(ignore_index: int) -> tuple[Problem, Problem]:
    """A problem with ignored rows, and the same without these rows."""
    given = problem(19, 41, 24)
    labels = given.labels.clone()
    labels[labels == ignore_index] += 1
    labels[IGNORED] = ignore_index
    counted = labels != ignore_index
    return dataclasses.replace(given, labels=labels), dataclasses.replace(
        given, x=given.x[counted], labels=labels[counted], upstream=given.upstream[counted]
    )


@pytest.mark.parametrize(
    ("mode", "poison"),
    [(FP32, "nan"), (FP32, "inf"), (FP16, "one element"), (BF16, "nan"), (FP64, "one element")],
    ids=str,
)
def test_nothing_of_an_ignored_row_is_used(backend: str, mode: Mode, poison: str) -> None:
    """Embeddings and incoming gradient may hold anything."""
    ignore_index = {"nan": -100, "inf": 3, "one element": -1}[poison]
    given, without = _with_ignored_rows(ignore_index)
    x, upstream = given.x.clone(), given.upstream.clone()
    x[IGNORED] = POISON[poison](x[IGNORED])
    upstream[IGNORED] = math.inf if poison == "inf" else math.nan
    counted = given.labels != ignore_index
    for reduction in ("none", "mean") if poison == "inf" else ("none",):
        options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index}
        bad = dataclasses.replace(given, x=x, upstream=upstream)
        got = run(ARCFACE, bad, mode, backend, **options)
        want = run(ARCFACE, without, mode, backend, **options)
        assert bool((got.d_x[~counted] == 0).all())
        value = got.value
        if reduction == "none":
            assert bool((value[~counted] == 0).all())
            value = value[counted]
        # other rows come together in a tile: sums round differently
        eps = torch.finfo(mode.embeddings).eps
        for one, other in ((value, want.value), (got.d_x[counted], want.d_x), (got.d_w, want.d_w)):
            atol = 32.0 * eps * float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=32.0 * eps, atol=atol)


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_what_the_forward_says_of_an_ignored_row(backend: str, ignore_index: int) -> None:
    given, _ = _with_ignored_rows(ignore_index)
    x, w = (leaf.detach() for leaf in given.leaves(FP32, device_of(backend)))
    x[IGNORED] = math.nan
    numbers = torch.tensor([9.0, 1.0, 0.0, 2.0, 0.3], dtype=torch.float64)
    loss, d_lse, d_u, count, targets, *_ = torch.ops.fused_margin.margin_ce(
        x, w, given.labels.to(x.device), numbers, False, "none", ignore_index, torch.float32,
        backend, 0,
    )  # fmt: skip
    for part in (loss, d_lse, d_u):
        assert part[IGNORED].tolist() == [0.0, 0.0, 0.0]
    assert float(count) == 16.0
    expected = given.labels.clone()
    expected[IGNORED] = -1
    assert torch.equal(targets.cpu(), expected)


def test_infinite_gradient_of_an_ignored_row(backend: str) -> None:
    """The root of a loss of 0, say."""
    given, _ = _with_ignored_rows(-100)
    x, w = given.leaves(FP32, device_of(backend))
    loss = fmf.arcface(x, w, given.labels.to(x.device), reduction="none", backend=backend)
    d_x, d_w = torch.autograd.grad(loss.sqrt().sum(), (x, w))
    assert bool((d_x[IGNORED] == 0).all())
    assert bool(d_x.isfinite().all())
    assert bool(d_w.isfinite().all())


def test_label_minus_one_of_the_primitive_is_no_ignored_row(backend: str) -> None:
    """To `cosine_lse` it only says that there is no target."""
    given = problem(5, 12, 8)
    x, w = given.leaves(FP64, device_of(backend))
    labels = torch.full((5,), -1, device=x.device)
    lse, _ = fmf.cosine_lse(x, w, labels, 9.0, backend=backend)
    expected = fmf.cosine_logits(x, w, 9.0).logsumexp(dim=1)
    torch.testing.assert_close(lse, expected)
    for got, want in zip(
        torch.autograd.grad(lse.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, want)


# --- labels out of range --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "reduction"), [(-7, "none"), (-1, "none"), (41, "sum"), (47, "mean")]
)
def test_invalid_label_is_nan(
    monkeypatch: pytest.MonkeyPatch, strategy: str, label: int, reduction: str
) -> None:
    """As on a GPU, where it can't raise: the row's loss and gradient, and that of every class."""
    monkeypatch.setattr(_validate, "label_range", lambda *arguments: None)
    given = problem(19, 41, 24)
    labels = given.labels.clone()
    labels[5], labels[6] = label, -100
    bad = dataclasses.replace(given, labels=labels)
    got = run(ARCFACE, bad, FP32, "triton", reduction=reduction)
    others = torch.arange(19) != 5
    if reduction == "none":
        assert bool(got.value[5].isnan())
        assert bool(got.value[others].isfinite().all())
    else:
        assert bool(got.value.isnan())
    assert bool(got.d_x[5].isnan().all())
    assert bool(got.d_x[others].isfinite().all())
    assert bool((got.d_x[6] == 0).all())
    assert bool(got.d_w.isnan().all())


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [FP32, FP64], ids=str)
@pytest.mark.parametrize("loss", [ARCFACE, COSFACE], ids=str)
def test_no_projection_below_the_clamp(backend: str, mode: Mode, loss: Any) -> None:
    """There x_hat = x / 1e-12 is linear; just below, a projection would take most of the row."""
    given = problem(9, 20, 24)
    x, w = given.x.clone(), given.w.clone()
    for rows, index, norm in ((x, 0, 0.97e-12), (x, 1, 3e-13), (w, 2, 0.97e-12), (w, 3, 3e-13)):
        rows[index] *= norm / rows[index].norm()
    w[int(given.labels[4])] *= 0.9e-12 / w[int(given.labels[4])].norm()
    check_loss(loss, dataclasses.replace(given, x=x, w=w), mode, backend, reduction="none")


@pytest.mark.parametrize(
    ("norm_x", "norm_w", "upstream"),
    [
        (1e18, 1.0, 1e-10), (1.0, 1e18, 1e-10), (1e9, 1e9, 1e-10), (1e18, 1e18, 1.0),
        (1e-11, 1e-11, 1.0), (1e18, 1e-11, 1.0),
    ],
)  # fmt: skip
def test_large_and_small_norms(backend: str, norm_x: float, norm_w: float, upstream: float) -> None:
    """1 / ||w||^2 times a small gradient would underflow."""
    given = problem(9, 40, 24)

    def scaled(rows: Tensor, norm: float) -> Tensor:
        factor = torch.linspace(1.0, 2.0, len(rows), dtype=torch.float64)[:, None]
        return rows * norm * factor / rows.norm(dim=1, keepdim=True)

    given = dataclasses.replace(
        given,
        x=scaled(given.x, norm_x),
        w=scaled(given.w, norm_w),
        upstream=given.upstream * upstream,
    )
    check_loss(arcface(scale=30.0), given, FP32, backend, reduction="none")


# --- small scales ---------------------------------------------------------------------------------


def _worst_row(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.mark.parametrize("scale", [1e-4, 0.03, 2.0])
@pytest.mark.parametrize("mode", [FP32, BF16, FP64], ids=str)
def test_gradient_at_small_scales(backend: str, mode: Mode, scale: float) -> None:
    """The cosines of the projection keep their digits, though every exponential is near 1."""
    given = problem(18, 70, 40)
    loss = normalized_softmax(scale)
    actual = run(loss, given, mode, backend, reduction="sum")
    expected = yardstick(loss, given, mode, reduction="sum")
    bound = {FP32: 5e-6, BF16: 1e-2, FP64: 1e-14}[mode]
    assert _worst_row(actual.d_w, expected.d_w) < bound
    assert _worst_row(actual.d_x, expected.d_x) < bound
