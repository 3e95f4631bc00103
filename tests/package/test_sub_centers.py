"""Several rows of weights for each class, of which the nearest counts; and what they tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import dense_formulas as dense
import pytest
import torch
import torch.nn.functional as F
from helpers import SHAPED_BACKENDS, device_of
from test_other_classes import compare

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import metrics

pytestmark = pytest.mark.usefixtures("one_thread")

Tensor = torch.Tensor
BACKENDS = SHAPED_BACKENDS
each_backend = pytest.mark.parametrize("backend", BACKENDS)
ROWS, CLASSES, CENTERS, DIM = 14, 20, 3, 4


def leaves(backend: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Rows near to a centre of their class and far from all, of which one is ignored."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    w = torch.randn(CLASSES * CENTERS, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    x[:6] += 2.0 * w[labels[:6] * CENTERS + torch.arange(6) % CENTERS]
    labels[3] = -100
    device = device_of(backend)
    x, w = (part.to(device, dtype).requires_grad_() for part in (x, w))
    return x, w, labels.to(device)


CALLS: dict[str, tuple[Callable[..., Tensor], dense.Formula, float]] = {
    "arcface": (
        lambda x, w, y, **kw: fmf.arcface(x, w, y, 0.4, 16.0, **kw),
        dense.Formula(dense.arc(0.4)), 16.0,
    ),
    "cosface": (fmf.cosface, dense.Formula(dense.additive(0.35)), 64.0),
    "a psi": (
        lambda x, w, y, **kw: fmf.margin_softmax(x, w, y, lambda u: 2 * u * u.abs() - 1, 9.0, **kw),
        dense.Formula(lambda u: 2 * u * u.abs() - 1), 9.0,
    ),
    "curricularface": (
        lambda x, w, y, **kw: fmf.curricularface(x, w, y, 0.4, 16.0, t=0.3, **kw),
        dense.curricular(0.4, 0.3), 16.0,
    ),
    "beyond the shift": (
        lambda x, w, y, **kw: fmf.cosface(x, w, y, 0.2, 500.0, **kw),
        dense.Formula(dense.additive(0.2)), 500.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@each_backend
def test_value_and_gradients_are_the_formulas(backend: str, name: str) -> None:
    call, formula, scale = CALLS[name]
    x, w, labels = leaves(backend)
    expected = F.cross_entropy(
        dense.logits(formula, x, w, labels, scale, CENTERS), labels, reduction="none"
    )
    options: dict[str, Any] = {"sub_centers": CENTERS, "backend": backend}
    compare(call(x, w, labels, reduction="none", **options), expected, (x, w))
    compare(call(x, w, labels, **options), expected.sum() / (ROWS - 1), (x, w))


@each_backend
def test_the_first_of_equal_centres_gets_the_gradient(backend: str) -> None:
    """Of the target's class and of others."""
    x, w, labels = leaves(backend)
    w = w.detach()[::CENTERS].repeat_interleave(CENTERS, dim=0).requires_grad_()
    single = w.detach()[::CENTERS].clone().requires_grad_()
    loss = fmf.arcface(x, w, labels, 0.4, 16.0, sub_centers=CENTERS, backend=backend)
    expected = fmf.arcface(x, single, labels, 0.4, 16.0, backend=backend)
    torch.testing.assert_close(loss, expected)
    (got,), (want,) = torch.autograd.grad(loss, w), torch.autograd.grad(expected, single)
    torch.testing.assert_close(got[::CENTERS], want)
    for center in range(1, CENTERS):
        assert bool((got[center::CENTERS] == 0).all())


def test_gradcheck() -> None:
    x, w, labels = leaves()
    x = x.detach()[:4].clone().requires_grad_()
    w = w.detach()[:12].clone().requires_grad_()
    labels = labels[:4] % 4

    def call(x: Tensor, w: Tensor, backend: str = "cpu") -> Tensor:
        return fmf.arcface(x, w, labels, 0.4, 9.0, sub_centers=3, backend=backend)

    torch.autograd.gradcheck(call, (x, w), fast_mode=True)
    torch.autograd.gradgradcheck(lambda x: call(x, w.detach(), "reference"), (x,), fast_mode=True)


@each_backend
def test_edges(backend: str) -> None:
    """Two classes; no row and one; all rows ignored, whatever they hold; a label out of range."""
    x, w, labels = leaves(backend)
    options: dict[str, Any] = {"sub_centers": CENTERS, "backend": backend}
    few, kept = w[: 2 * CENTERS], labels.clamp_min(0) % 2
    found = dense.logits(dense.Formula(dense.additive(0.35)), x, few, kept, 64.0, CENTERS)
    compare(fmf.cosface(x, few, kept, **options), F.cross_entropy(found, kept), (x,))
    for rows in (0, 1):
        loss = fmf.arcface(x[:rows], w, labels[:rows], **options)
        assert bool(torch.autograd.grad(loss, w)[0].isfinite().all())
    broken = torch.full_like(x, math.nan).requires_grad_()
    loss = fmf.arcface(broken, w, torch.full_like(labels, -100), **options)
    assert loss == 0.0
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(loss, (broken, w)))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 20\)"):
        fmf.arcface(x, w, labels + CLASSES, **options)


@each_backend
def test_a_row_that_is_not_finite_is_seen(backend: str) -> None:
    """NaN is never the largest of a class's rows."""
    x, w, labels = leaves(backend)
    w = w.detach().clone()
    w[CENTERS + 1, 0] = math.nan
    loss = fmf.arcface(x, w, labels, sub_centers=CENTERS, backend=backend)
    assert bool(loss.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    """Of embeddings and under autocast; W and its gradient stay fp32."""
    x, w, labels = leaves(dtype=torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    found = dense.logits(
        dense.Formula(dense.arc(0.5)), x.double(), w.double(), labels, 16.0, CENTERS
    )
    exact = F.cross_entropy(found, labels)
    loss = fmf.arcface(x, w, labels, scale=16.0, sub_centers=CENTERS)
    loss.backward()
    assert w.grad is not None
    assert (loss.dtype, w.grad.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=0.2)


def test_a_module() -> None:
    criterion = fm.ArcFaceLoss(CLASSES, DIM, sub_centers=CENTERS)
    assert criterion.weight.shape == (CLASSES * CENTERS, DIM)
    assert criterion.num_classes == CLASSES
    assert "sub_centers=3" in repr(criterion)
    x, _, labels = leaves(dtype=torch.float32)
    expected = fmf.arcface(x, criterion.weight, labels, sub_centers=CENTERS)
    torch.testing.assert_close(criterion(x, labels), expected)
    cosines = dense.cosines(x, criterion.weight, CENTERS)
    torch.testing.assert_close(criterion.logits(x), 64.0 * cosines)
    with torch.no_grad():
        torch.testing.assert_close(criterion.logits(x), 64.0 * cosines)
    adacos = fm.AdaCosLoss(CLASSES, DIM, sub_centers=CENTERS)
    assert float(adacos.scale) == pytest.approx(math.sqrt(2) * math.log(CLASSES - 1))
    assert bool(adacos(x, labels).isfinite())
    margin = fm.margins.by_class_size(torch.arange(CLASSES))
    criterion.margin = margin
    rows = margin[labels.clamp_min(0)]
    expected = fmf.arcface(x, criterion.weight, labels, rows, sub_centers=CENTERS)
    torch.testing.assert_close(criterion(x, labels), expected)


# --- metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 1 << 30], ids=["small blocks", "one block"])
def test_the_nearest_classes(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CPU_BYTES", limit)
    x, w, labels = leaves(dtype=torch.float32)
    w = w.detach().repeat(6, 1) + 0.1 * torch.randn(6 * len(w), DIM)  # more than a block
    found = metrics.predict(x, w, 4, sub_centers=CENTERS)
    cosines = dense.cosines(x.double(), w.double(), CENTERS)
    expected = cosines.topk(4, dim=1)
    assert torch.equal(found.classes, expected.indices)
    torch.testing.assert_close(found.cosines.double(), expected.values, rtol=0, atol=1e-6)
    kept = labels != -100
    of_all = metrics.evaluate(x, w, labels, sub_centers=CENTERS)
    stats = metrics.Evaluation(*(part[kept] for part in of_all))
    cosines, labels = cosines[kept], labels[kept]
    target = cosines.gather(1, labels[:, None])
    others = cosines.scatter(1, labels[:, None], -2.0)
    torch.testing.assert_close(stats.target_cosine.double(), target[:, 0], rtol=0, atol=1e-6)
    assert torch.equal(stats.rank, (others > target).sum(dim=1))
    assert torch.equal(stats.hardest_class, others.argmax(dim=1))


def test_dominant_centres_and_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row; and counts of two halves make those of the whole."""
    x, w, labels = (part.detach() for part in leaves())
    labels = labels.clamp(max=5)
    counts = torch.zeros(CLASSES, CENTERS, dtype=torch.int64)
    for row, label in zip(x, labels.tolist(), strict=True):
        if label != -100:
            own = w[label * CENTERS : (label + 1) * CENTERS]
            counts[label, F.cosine_similarity(row[None], own).argmax()] += 1
    for limit in (1, 1 << 30):
        monkeypatch.setattr(metrics, "CPU_BYTES", limit)
        assert torch.equal(metrics.center_counts(x, w, labels, CENTERS), counts)
        halves = [
            metrics.center_counts(x[part], w, labels[part], CENTERS)
            for part in (slice(0, 7), slice(7, None))
        ]
        assert torch.equal(halves[0] + halves[1], counts)
        dominant = metrics.dominant_centers(counts)
        assert dominant.tolist() == [
            CENTERS * k + max(range(CENTERS), key=row.__getitem__)
            for k, row in enumerate(counts.tolist())
        ]
        angles = metrics.outlier_angles(x, w, labels, dominant)
        assert int(angles.isnan().sum()) == 1
        assert bool(angles[3].isnan())
        kept = labels != -100
        cosines = F.cosine_similarity(x[kept], w[dominant[labels[kept]]])
        torch.testing.assert_close(angles[kept], cosines.acos(), rtol=1e-7, atol=1e-7)
    assert metrics.center_counts(x[:0], w, labels[:0], CENTERS).sum() == 0
    assert metrics.outlier_angles(x[:0], w, labels[:0], dominant).shape == (0,)


def test_wrong_labels_are_found() -> None:
    """After a training in which a fifth of the labels of each class was another's."""
    torch.manual_seed(0)
    people, shots, dim = 10, 40, 16
    truth = torch.arange(people).repeat_interleave(shots)
    x = F.normalize(torch.randn(people, dim))[truth] + 0.15 * torch.randn(people * shots, dim)
    labels = truth.clone()
    labels[::5] = (labels[::5] + 1) % people
    criterion = fm.ArcFaceLoss(people, dim, 0.3, 16.0, sub_centers=3)
    optimizer = torch.optim.Adam(criterion.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        criterion(x, labels).backward()
        optimizer.step()
    counts = metrics.center_counts(x, criterion.weight, labels, 3)
    assert int(counts.sum()) == len(labels)
    dominant = metrics.dominant_centers(counts)
    angles = metrics.outlier_angles(x, criterion.weight, labels, dominant)
    is_kept = angles < math.radians(75.0)
    assert bool(is_kept[labels == truth].float().mean() > 0.95)
    assert bool(is_kept[labels != truth].float().mean() < 0.1)
    single = fm.ArcFaceLoss(people, dim)
    single.weight.data.copy_(criterion.weight.data[dominant])
    assert float(metrics.evaluate(x, single.weight, truth).accuracy()) > 0.95


# --- errors ---------------------------------------------------------------------------------------

X, W, Y = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([0, 1, 2])
COUNTS = torch.ones(3, 2, dtype=torch.int64)
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no multiple": (
        lambda: fmf.arcface(X, W, Y, sub_centers=4), ValueError,
        "sub_centers = 4 rows for each of at least two classes.*got 6 rows",
    ),
    "one class": (lambda: fmf.arcface(X, W, Y, sub_centers=6), ValueError, "two classes"),
    "none": (
        lambda: fm.ArcFaceLoss(3, 4, sub_centers=0), ValueError, ">= 1, got 0; 1 is one row of wei"
    ),
    "None": (
        lambda: fm.ArcFaceLoss(3, 4, sub_centers=None),  # pyright: ignore[reportArgumentType]
        TypeError, "sub_centers must be an int, got None; 1 is one row of weights",
    ),
    "half": (
        lambda: fm.ArcFaceLoss(3, 4, sub_centers=1.5), TypeError,  # pyright: ignore[reportArgumentType]
        "sub_centers must be an int",
    ),
    "logits": (lambda: fmf.cosine_logits(X, W, 1.0, sub_centers=0), ValueError, ">= 1, got 0"),
    "t": (lambda: fmf.curricularface_t(X, W, Y, 0.0, sub_centers=4), ValueError, "sub_centers = 4"),
    "scale": (lambda: fmf.adacos_scale(X, W, Y, 9.0, sub_centers=0), ValueError, ">= 1, got 0"),
    "predict": (lambda: metrics.predict(X, W, 4, sub_centers=2), ValueError, "at most 3"),
    "label": (lambda: metrics.center_counts(X, W, Y + 1, 2), ValueError, r"\[0, 3\)"),
    "counts": (
        lambda: metrics.dominant_centers(COUNTS.float()), ValueError, "metrics.center_counts makes"
    ),
    "centers": (
        lambda: metrics.outlier_angles(X, W, Y, COUNTS), ValueError, "dominant_centers makes them"
    ),
    "centers of others": (
        lambda: metrics.outlier_angles(X, W, Y, torch.arange(4)), ValueError, "no multiple"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()
