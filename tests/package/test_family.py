"""Losses whose margin lives on the target cosine: each against its formula, by the angle itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import check_no_rows, device_of, needs_triton, problem

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import margins

Tensor = torch.Tensor
BACKENDS = ("reference", "cpu", pytest.param("triton", marks=needs_triton))
each_backend = pytest.mark.parametrize("backend", BACKENDS)

ROWS, CLASSES, DIM = 14, 9, 6


class Case(NamedTuple):
    """A call; its margin as a function of angles and norms, (N,) each; what it adds to a row."""

    call: Callable[..., Tensor]
    psi: Callable[[Tensor, Tensor], Tensor]
    scale: float
    penalty: Callable[[Tensor], Tensor] | None = None


def _combined(m1: float, m2: float, m3: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda theta, norm: (m1 * theta + m2).cos() - m3


def _continued(theta: Tensor, norm: Tensor) -> Tensor:
    """1.3 theta + 0.4 with an offset of 0.1, parallel to cos(theta) past pi."""
    end = math.cos((math.pi - 0.4) / 1.3)
    past = theta.cos() - end - 1.0 - 0.1
    return torch.where(1.3 * theta + 0.4 <= math.pi, (1.3 * theta + 0.4).cos() - 0.1, past)


def _sphere(m: float) -> Callable[[Tensor, Tensor], Tensor]:
    def psi(theta: Tensor, norm: Tensor) -> Tensor:
        k = (m * theta / math.pi).floor().detach()
        return (-1.0) ** k * (m * theta).cos() - 2.0 * k

    return psi


def _adaface(theta: Tensor, norm: Tensor) -> Tensor:
    z = (0.5 * (norm.detach().clamp(1e-3, 100.0) - 3.0) / (2.0 + 1e-3)).clamp(-1.0, 1.0)
    return (theta - 0.4 * z).clamp(0.0, math.pi).cos() - (0.4 + 0.4 * z)


def _magnitude(norm: Tensor) -> Tensor:
    return norm.clamp(2.0, 9.0)


def _magface(theta: Tensor, norm: Tensor) -> Tensor:
    m = 0.3 + (0.9 - 0.3) / (9.0 - 2.0) * (_magnitude(norm) - 2.0)
    return torch.where(theta + m <= math.pi, (theta + m).cos(), theta.cos() - m * m.sin())


CASES = {
    "easy": Case(
        lambda x, w, y, **kw: fmf.arcface(x, w, y, 0.5, 16.0, boundary="easy", **kw),
        lambda theta, norm: torch.where(theta.cos() > 0, (theta + 0.5).cos(), theta.cos()),
        16.0,
    ),
    "easy, a margin a row": Case(
        lambda x, w, y, **kw: fmf.arcface(
            x, w, y, torch.full_like(x[:, 0], 0.5).detach(), 16.0, boundary="easy", **kw
        ),
        lambda theta, norm: torch.where(theta.cos() > 0, (theta + 0.5).cos(), theta.cos()),
        16.0,
    ),
    "combined": Case(
        lambda x, w, y, **kw: fmf.combined_margin(x, w, y, 1.1, 0.3, 0.2, 16.0, **kw),
        _combined(1.1, 0.3, 0.2), 16.0,
    ),
    "combined, m1 = 1": Case(
        lambda x, w, y, **kw: fmf.combined_margin(x, w, y, 1.0, 0.3, 0.2, 16.0, **kw),
        _combined(1.0, 0.3, 0.2), 16.0,
    ),
    "combined, continuous": Case(
        lambda x, w, y, **kw: fmf.combined_margin(
            x, w, y, 1.3, 0.4, 0.1, 16.0, boundary="continuous", **kw
        ),
        _continued, 16.0,
    ),
    "combined, the angle alone": Case(fmf.combined_margin, _combined(1.0, 0.5, 0.0), 64.0),
    "combined, the offset alone": Case(
        lambda x, w, y, **kw: fmf.combined_margin(x, w, y, 1.0, 0.0, 0.4, 16.0, **kw),
        _combined(1.0, 0.0, 0.4), 16.0,
    ),
    "sphereface": Case(fmf.sphereface, _sphere(1.5), 30.0),
    "sphereface, m = 4": Case(
        lambda x, w, y, **kw: fmf.sphereface(x, w, y, 4.0, 8.0, **kw), _sphere(4.0), 8.0
    ),
    "adaface": Case(
        lambda x, w, y, **kw: fmf.adaface(
            x, w, y, 0.4, 16.0, h=0.5, norm_mean=3.0, norm_std=2.0, **kw
        ),
        _adaface, 16.0,
    ),
    "magface": Case(
        lambda x, w, y, **kw: fmf.magface(
            x, w, y, 0.3, 0.9, 16.0, lower_norm=2.0, upper_norm=9.0, regularizer=5.0, **kw
        ),
        _magface, 16.0,
        lambda norm: 5.0 * (_magnitude(norm) / 81.0 + 1.0 / _magnitude(norm)),
    ),
}  # fmt: skip


def leaves(dtype: torch.dtype = torch.float64, device: Any = "cpu") -> tuple[Tensor, ...]:
    """Embeddings of norms 0.3 to 30, class weights, and labels of which one is ignored."""
    given = problem(ROWS, CLASSES, DIM, seed=4)
    x, w = (part.to(device, dtype, copy=True).requires_grad_() for part in (given.x, given.w))
    labels = given.labels.to(device, copy=True)
    labels[3] = -100
    return x, w, labels


def dense_rows(case: Case, x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Losses of the rows by N x C logits and arc cosines; 0 where a row is ignored."""
    cosines = F.normalize(x) @ F.normalize(w).t()
    index = labels.clamp_min(0)[:, None]
    theta, norm = cosines.gather(1, index)[:, 0].acos(), x.norm(dim=1)
    logits = case.scale * cosines.scatter(1, index, case.psi(theta, norm)[:, None])
    rows = F.cross_entropy(logits, labels, reduction="none")
    if case.penalty is not None:
        rows = rows + case.penalty(norm).masked_fill(labels == -100, 0.0)
    return rows


@pytest.mark.parametrize("name", CASES)
@each_backend
def test_value_and_gradients_are_the_formulas(backend: str, name: str) -> None:
    case = CASES[name]
    x, w, labels = leaves(device=device_of(backend))
    upstream = torch.linspace(0.1, 1.0, ROWS, dtype=x.dtype, device=x.device)
    loss = case.call(x, w, labels, reduction="none", backend=backend)
    expected = dense_rows(case, x, w, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-11)
    for got, want in zip(
        torch.autograd.grad(loss, (x, w), upstream),
        torch.autograd.grad(expected, (x, w), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    mean = case.call(x, w, labels, backend=backend)
    torch.testing.assert_close(mean, expected.sum() / (ROWS - 1), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    """Of AdaFace along the sphere, as it has no gradient through the norm."""
    case = CASES[name]
    x, w, labels = leaves()
    norm = x.detach()[:6].norm(dim=1, keepdim=True)

    def call(x: Tensor, w: Tensor, backend: str = "cpu") -> Tensor:
        x = F.normalize(x) * norm if name == "adaface" else x
        return case.call(x, w, labels[:6], backend=backend)

    shown = x.detach()[:6].clone().requires_grad_()
    torch.autograd.gradcheck(call, (shown, w), fast_mode=True)
    torch.autograd.gradgradcheck(
        lambda x: call(x, w.detach(), "reference"), (shown,), fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_half_precision_and_autocast(name: str, dtype: torch.dtype) -> None:
    """Norms, angles and margins are not rounded to the embeddings' dtype or autocast's."""
    case = CASES[name]
    x, w, labels = leaves(torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    exact = dense_rows(case, x.double(), w.double(), labels).sum() / (ROWS - 1)
    loss = case.call(x, w, labels)
    loss.backward()
    assert loss.dtype is torch.float32
    assert x.grad is not None
    assert x.grad.dtype is dtype
    assert bool(x.grad.isfinite().all())
    # products may be rounded to 2^-8: cosines to a hundredth, logits to `scale` times that
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=0.01 * case.scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = case.call(x.float(), w, labels, backend="reference")
    torch.testing.assert_close(mixed.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@each_backend
def test_no_rows(backend: str, name: str) -> None:
    """An empty batch, one row, and rows that are all ignored, whatever they hold."""
    x, w, labels = leaves(torch.float32, device_of(backend))
    check_no_rows(functools.partial(CASES[name].call, backend=backend), x, w, labels)


def test_straight_through() -> None:
    """psi' = 1: the gradient by a cosine is that of the plain softmax with this target logit."""
    x, w, labels = leaves()
    for m1, m3 in ((1.0, 0.0), (1.1, 0.2)):
        loss = fmf.combined_margin(x, w, labels, m1, 0.3, m3, 8.0, grad="straight_through")

        def psi(u: Tensor, m1: float = m1, m3: float = m3) -> Tensor:
            return u + ((m1 * u.acos() + 0.3).cos() - m3 - u).detach()

        expected = fmf.margin_softmax(x, w, labels, psi, 8.0)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w))
        )


class _Penalised(fm.NormalizedSoftmaxLoss):
    def penalty(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return embeddings.detach().square().sum(dim=1)


def test_what_a_subclass_adds_to_a_row() -> None:
    """Counted as the rest of the loss is, but for ignored rows, whose own may be NaN."""
    x, _, labels = leaves(torch.float32)
    x = x.detach().clone()
    x[3] = math.nan
    criterion = _Penalised(CLASSES, DIM)
    plain = fmf.normalized_softmax(x, criterion.weight, labels, 20.0, reduction="none")
    expected = plain + x.square().sum(dim=1).nan_to_num(0.0)
    torch.testing.assert_close(criterion(x, labels), expected.sum() / (ROWS - 1))


# --- at the ends of the angle ---------------------------------------------------------------------

PSIS: dict[str, Any] = {
    "easy": margins.angular(0.5, "easy"),
    "combined": margins.combined(1.1, 0.3, 0.2),
    "combined, continuous": margins.combined(1.3, 0.4, 0.1, "continuous"),
    "multiplied": margins.multiplied(1.5),
    "multiplied by 4": margins.multiplied(4.0),
    "adaptive, easy": margins.adaptive(0.4, torch.full((2001,), -1.0)),
    "adaptive, hard": margins.adaptive(0.4, torch.full((2001,), 1.0)),
    "no margin": margins.combined(1.0, 0.0, 0.0),
}
FALLING = [name for name in PSIS if name not in ("easy", "combined")]  # the others rise again


def _psi(name: str, u: Tensor) -> Tensor:
    psi = PSIS[name]
    return margins.apply(u, psi) if isinstance(psi, margins.Margin) else psi(u)


@pytest.mark.parametrize("name", PSIS)
def test_margins_at_every_angle(name: str) -> None:
    u = torch.linspace(0.0, math.pi, 2001, dtype=torch.float64).cos()
    u[0], u[-1] = 1.0, -1.0
    u.requires_grad_()
    value = _psi(name, u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    assert bool(slope.isfinite().all())
    assert slope.abs().max() < 1300.0  # at most 4 over the floor's root, 0.00316
    assert bool((value <= u + 1e-9).all())  # a margin takes from the target
    if name in FALLING:
        assert bool((value.diff() <= 1e-12).all())
    inside = slice(20, -20)
    u = u.detach()
    h = 1e-6
    quotient = (_psi(name, u + h) - _psi(name, u - h))[inside] / (2 * h)
    off = (quotient - slope[inside]).abs() > 1e-4 * (1.0 + slope[inside].abs())
    assert int(off.sum()) <= 4  # quotients across a threshold


def test_pieces_of_sphereface_meet() -> None:
    """And at every pi of m theta the margin has taken 2 more, for m that is no integer too."""
    for m in (1.0, 1.5, 2.0, 4.0):
        for k in range(int(m) + 1):
            angle = torch.tensor([k * math.pi / m - 1e-9, k * math.pi / m + 1e-9])
            u = angle.double().clamp(0.0, math.pi).cos()
            if k * math.pi / m <= math.pi:
                torch.testing.assert_close(margins.multiplied(m)(u), u.new_full((2,), 1.0 - 2.0 * k)
                                           if k else u, rtol=0, atol=1e-6)  # fmt: skip


def test_combined_is_a_built_in_margin_where_it_can_be() -> None:
    """So that ArcFace and CosFace under this name are as fast as under their own."""
    assert margins.combined(1.0, 0.5, 0.0) == margins.angular(0.5, "none")
    assert margins.combined(1.0, 0.0, 0.4) == margins.additive(0.4)
    assert isinstance(margins.angular(0.5, "easy"), margins.Margin)


# --- ElasticFace ----------------------------------------------------------------------------------


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("kind", ["arc", "cos"])
@each_backend
def test_elasticface_draws_its_margins(backend: str, kind: str, plus: bool) -> None:
    x, w, labels = leaves(device=device_of(backend))
    generator = torch.Generator().manual_seed(11)
    loss = fmf.elasticface(
        x, w, labels, 0.4, 16.0, sigma=0.1, kind=kind, plus=plus, generator=generator,
        reduction="none", backend=backend,
    )  # fmt: skip
    drawn = 0.4 + 0.1 * torch.randn(ROWS, generator=torch.Generator().manual_seed(11))
    drawn = drawn.double().to(x.device)
    if plus:  # smallest first, of the rows that count, to the nearest first
        u = (F.normalize(x) * F.normalize(w)[labels.clamp_min(0)]).sum(dim=1)
        counted = [row for row in range(ROWS) if row != 3]
        by_distance = sorted(counted, key=u.detach().neg().tolist().__getitem__)
        ascending = sorted(float(drawn[row]) for row in counted)
        for row, value in zip(by_distance, ascending, strict=True):
            drawn[row] = value
    if kind == "arc":
        expected = fmf.arcface(
            x, w, labels, drawn, 16.0, boundary="none", reduction="none", backend=backend
        )
    else:
        expected = fmf.cosface(x, w, labels, drawn, 16.0, reduction="none", backend=backend)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w))
    )


def test_elasticface_of_a_module() -> None:
    """A seed gives the same margins again, torch's own by default; evaluation draws none."""
    x, _, labels = leaves(torch.float32)
    criterion = fm.ElasticFaceLoss(CLASSES, DIM, sigma=0.2, reduction="none")
    losses = []
    for _ in range(2):
        criterion.generator = torch.Generator().manual_seed(5)
        losses.append([criterion(x, labels), criterion(x, labels)])
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])
    assert not torch.equal(losses[0][0], losses[0][1])
    criterion.generator = None
    torch.manual_seed(1)
    first = criterion(x, labels)
    torch.manual_seed(1)
    assert torch.equal(criterion(x, labels), first)
    criterion.eval()
    expected = fmf.arcface(x, criterion.weight, labels, 0.5, boundary="none", reduction="none")
    torch.testing.assert_close(criterion(x, labels), expected)


# --- margins per class ----------------------------------------------------------------------------


@each_backend
def test_a_margin_for_each_class(backend: str) -> None:
    x, _, labels = leaves(torch.float32, device_of(backend))
    margin = torch.linspace(0.1, 0.6, CLASSES)
    for make, function in ((fm.ArcFaceLoss, fmf.arcface), (fm.CosFaceLoss, fmf.cosface)):
        criterion: Any = make(CLASSES, DIM, margin, 16.0, backend=backend).to(x.device)
        rows = margin.to(x.device)[labels.clamp_min(0)]
        expected = function(x, criterion.weight, labels, rows, 16.0, backend=backend)
        torch.testing.assert_close(criterion(x, labels), expected)
        assert f"margin=Tensor(shape ({CLASSES},))" in repr(criterion)
        assert list(criterion.state_dict()) == ["weight"]
        assert criterion.margin is not margin
        criterion.margin = 0.2  # and back to a number
        expected = function(x, criterion.weight, labels, 0.2, 16.0, backend=backend)
        torch.testing.assert_close(criterion(x, labels), expected)
        criterion.margin = margin
        assert criterion.double().margin.dtype is torch.float64
        with pytest.raises(ValueError, match=r"margin must have shape \(9,\).*per class.*\(8,\)"):
            criterion.margin = margin[1:]
        assert torch.equal(criterion.margin.cpu(), margin.double())
    criterion.weight = torch.nn.Parameter(torch.randn(CLASSES + 1, DIM, device=x.device))
    with pytest.raises(ValueError, match=r"margin must have shape \(10,\)"):
        criterion(x, labels)


def test_margins_by_class_size() -> None:
    counts = torch.tensor([1, 16, 81, 0, 10_000])
    found = margins.by_class_size(counts, 0.05, 0.5)
    rarity = [1.0, 1 / 2, 1 / 3, 1.0, 1 / 10]
    expected = [0.05 + 0.45 * (value - 0.1) / 0.9 for value in rarity]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert margins.by_class_size(torch.full((3,), 7), 0.1, 0.3).tolist() == pytest.approx([0.2] * 3)
    fm.ArcFaceLoss(5, 4, found)
    assert counts.tolist() == [1, 16, 81, 0, 10_000]
    with pytest.raises(ValueError, match=r"counts must have shape \(C,\).*torch.bincount"):
        margins.by_class_size(torch.ones(2, 2))
    for wrong in (math.nan, math.inf, -5.0):
        with pytest.raises(ValueError, match=f"finite and >= 0.*got {wrong:g} of class 1"):
            margins.by_class_size(torch.tensor([4.0, wrong]))


@pytest.mark.parametrize("kind", [fm.FixedAdaCosLoss, fm.AdaCosLoss])
def test_a_derived_scale_is_not_taken(kind: Any) -> None:
    words = f"{kind.__name__} derives its scale and takes none, got scale=30.0"
    with pytest.raises(TypeError, match=words):
        kind(10, 8, scale=30.0)


def test_bounds_in_the_wrong_order() -> None:
    with pytest.raises(ValueError, match="lower_margin must be at most upper_margin"):
        fm.MagFaceLoss(10, 8, 0.8, 0.4)
    with pytest.raises(ValueError, match="smallest must be at most largest"):
        fm.margins.by_class_size(torch.arange(5), 0.5, 0.05)
