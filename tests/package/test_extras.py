"""What a sweep makes of other classes, and finds out about them: every backend does the same.

Judged by the dense reference, which `test_family` and its kin judge by formulas of their own.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from helpers import FUSED_BACKENDS, device_of, needs_triton

from fused_margin import _ops, _reference
from fused_margin._arguments import Extras
from fused_margin._cpu import sweep
from fused_margin.functional.sweeps import nearest_centers

# d, a, b, e, f, l of eq. 20
PHI = {
    "plain": None,
    "curricular": (0.0, 0.3, 1.0, 0.3, 2.0, 1.0),
    "misclassified": (0.2, 1.2, 0.0, 1.2, 0.0, 1.0),
    "zero": (0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    "left out": (-math.inf, 0.0, 0.0, 0.0, 0.0, 1.0),
    "circle": (-0.0625, 0.0, 1.0, 0.25, 1.0, 0.0),
    "turned": (0.0, math.cos(0.3), 0.0, math.cos(0.3), 0.0, 1.0, math.sin(0.3)),
}
N, D = 6, 8
NO_TARGET = 2  # a row


class Case(NamedTuple):
    x: torch.Tensor
    w: torch.Tensor
    rows: torch.Tensor
    extras: Extras


def _case(
    phi: str, centers: int, has_total: bool, has_stats: bool, num_classes: int, device: Any
) -> Case:
    x = torch.randn(N, D, dtype=torch.float64)
    w = torch.randn(num_classes * centers, D, dtype=torch.float64)
    labels = torch.randint(num_classes, (N,))
    labels[NO_TARGET] = -1
    if centers > 1:
        w[5 * centers + 1] = w[5 * centers]  # of two equal centres the first counts
        labels[3] = 5
        x[3] += 2.0 * w[5 * centers]
    rows, u = nearest_centers(x, w, labels, centers)
    threshold = torch.where(torch.arange(N) % 2 == 0, -0.2, 0.2).double() + 0.01 * u
    given = PHI[phi]
    extras = Extras(
        threshold.to(device) if given is not None else None,
        torch.tensor(given, dtype=torch.float64, device=device) if given is not None else None,
        u.to(device) if has_stats else None,
        centers=centers,
        has_total=has_total,
    )
    return Case(x.to(device), w.to(device), rows.to(device), extras)


def _results(case: Case, backend: str, scale: float, is_learnt: bool) -> list[torch.Tensor]:
    """Outputs, then gradients of sums of them."""
    x, w = (part.clone().requires_grad_() for part in case[:2])
    s: Any = scale
    if is_learnt:
        s = torch.tensor(scale, dtype=x.dtype, device=x.device, requires_grad=True)
    if backend == "reference":
        lse, u, found = _reference.cosine_lse(x, w, case.rows, s, case.extras)
    else:
        lse, u, found = _ops.cosine_lse(x, w, case.rows, s, x.dtype, backend, None, case.extras)
    factors = torch.linspace(-1.0, 2.0, N, dtype=x.dtype, device=x.device)
    # a row without any other class has lse -inf, and no gradient
    target = (lse.nan_to_num(neginf=0.0) * factors).sum() + (u * factors.flip(0)).sum()
    if case.extras.has_total:
        target = target + 0.1 * (found.total * factors.square()).sum()
    leaves = (x, w, s) if is_learnt else (x, w)
    gradients = torch.autograd.grad(target, leaves)
    if backend != "reference" and found.class_sum.numel():
        found = found._replace(class_sum=found.class_sum[:0])
    return [lse.detach(), u.detach(), *(part.detach() for part in found), *gradients]


def _compare(case: Case, backend: str, scale: float, is_learnt: bool) -> None:
    expected = _results(case, "reference", scale, is_learnt)
    for got, want in zip(_results(case, backend, scale, is_learnt), expected, strict=True):
        want = want[:0] if want.shape != got.shape and not got.numel() else want
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("phi", PHI)
def test_all_that_the_cpu_is_asked(monkeypatch: pytest.MonkeyPatch, phi: str, centers: int) -> None:
    """With d_w lent and without, in blocks, with a shift and without."""
    for name in ("MIN_BLOCK", "MAX_BLOCK"):
        monkeypatch.setattr(sweep, name, 16)
    flags = itertools.product((False, True), repeat=3)
    for (has_total, has_stats, is_learnt), scale in itertools.product(flags, (9.0, 900.0)):
        case = _case(phi, centers, has_total, has_stats, 41, "cpu")
        _compare(case, "cpu", scale, is_learnt)


@needs_triton
@pytest.mark.parametrize(
    ("phi", "centers", "has_total", "has_stats", "is_learnt"),
    [
        ("plain", 1, True, True, False),
        ("plain", 3, True, True, True),
        ("plain", 5, False, False, False),
        ("curricular", 1, True, True, True),
        ("misclassified", 1, False, True, False),
        ("zero", 3, True, False, False),
        ("left out", 1, True, False, True),
        ("circle", 2, True, True, True),
        ("turned", 1, True, False, True),
    ],
)
def test_all_that_the_kernels_are_asked(
    phi: str, centers: int, has_total: bool, has_stats: bool, is_learnt: bool
) -> None:
    case = _case(phi, centers, has_total, has_stats, 41, device_of("triton"))
    _compare(case, "triton", 9.0, is_learnt)


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_a_second_backward_of_a_shaped_loss(backend: str) -> None:
    """The memory of d_w was lent, and has been written over."""
    case = _case("curricular", 3, False, True, 41, device_of(backend))
    x, w = (part.clone().requires_grad_() for part in case[:2])
    lse, u, _ = _ops.cosine_lse(x, w, case.rows, 9.0, x.dtype, backend, None, case.extras)
    once = torch.autograd.grad((lse + u).sum(), (x, w), retain_graph=True)
    again = torch.autograd.grad((lse + u).sum(), (x, w))
    for got, want in zip(again, once, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_more_centres_than_a_tile_holds() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    case = _case("plain", 17, False, False, 41, device_of("triton"))
    with pytest.raises(ValueError, match="at most 16 sub-centres of a class, got 17"):
        _results(case, "triton", 9.0, False)
