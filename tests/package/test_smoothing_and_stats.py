"""Label smoothing, and how a batch stands, out of the sweep of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import dense_formulas as dense
import pytest
import torch
import torch.nn.functional as F
from helpers import SHAPED_BACKENDS, device_of, in_blocks, problem
from test_other_classes import compare
from torch._dynamo.testing import CompileCounterWithBackend

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import metrics, negatives
from fused_margin.compat import heads, insightface, pml

pytestmark = pytest.mark.usefixtures("one_thread")

Tensor = torch.Tensor
BACKENDS = SHAPED_BACKENDS
each_backend = pytest.mark.parametrize("backend", BACKENDS)
ROWS, CLASSES, DIM = 12, 30, 5


def leaves(backend: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    given, device = problem(ROWS, CLASSES, DIM, seed=3), device_of(backend)
    x, w = (part.to(device, dtype, copy=True).requires_grad_() for part in (given.x, given.w))
    labels = given.labels.to(device, copy=True)
    labels[3] = -100
    return x, w, labels


CALLS: dict[str, tuple[Callable[..., Any], dense.Formula, float, int]] = {
    "arcface": (
        lambda x, w, y, **kw: fmf.arcface(x, w, y, 0.4, 16.0, **kw),
        dense.Formula(dense.arc(0.4)), 16.0, 1,
    ),
    "sub-centres": (
        lambda x, w, y, **kw: fmf.cosface(x, w, y, 0.2, 16.0, sub_centers=3, **kw),
        dense.Formula(dense.additive(0.2)), 16.0, 3,
    ),
    "curricularface": (
        lambda x, w, y, **kw: fmf.curricularface(x, w, y, 0.4, 16.0, t=0.3, **kw),
        dense.curricular(0.4, 0.3), 16.0, 1,
    ),
    "circle_softmax": (fmf.circle_softmax, dense.circle(0.35), 64.0, 1),
    "beyond the shift": (
        lambda x, w, y, **kw: fmf.cosface(x, w, y, 0.2, 500.0, **kw),
        dense.Formula(dense.additive(0.2)), 500.0, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@each_backend
def test_smoothing_is_that_of_cross_entropy(backend: str, name: str) -> None:
    call, formula, scale, centers = CALLS[name]
    x, w, labels = leaves(backend)
    labels = labels.clamp(max=CLASSES // centers - 1)
    logits = dense.logits(formula, x, w, labels, scale, centers)
    for smoothing, reduction in ((0.1, "none"), (0.3, "mean"), (1.0, "sum")):
        loss = call(x, w, labels, label_smoothing=smoothing, reduction=reduction, backend=backend)
        expected = F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=smoothing)
        compare(loss, expected, (x, w))


@pytest.mark.usefixtures("poison")
@each_backend
def test_smoothing_of_few_rows_and_classes(backend: str) -> None:
    """And nothing of an ignored row, whatever it holds."""
    x, w, labels = leaves(backend)
    for rows, classes in ((0, CLASSES), (1, CLASSES), (ROWS, 2)):
        part, few, kept = x[:rows], w[:classes], labels[:rows].clamp(max=classes - 1)
        loss = fmf.cosface(part, few, kept, label_smoothing=0.2, backend=backend)
        logits = dense.logits(dense.Formula(dense.additive(0.35)), part, few, kept, 64.0)
        expected = F.cross_entropy(logits, kept, reduction="sum", label_smoothing=0.2)
        compare(loss, expected / max(1, int((kept >= 0).sum())), (x, w))
    broken = x.detach().clone()
    broken[3] = math.nan
    broken.requires_grad_()
    loss = fmf.cosface(broken, w, labels, label_smoothing=0.2, backend=backend)
    expected = fmf.cosface(x, w, labels, label_smoothing=0.2, backend=backend)
    torch.testing.assert_close(loss, expected)
    d_x, d_w = torch.autograd.grad(loss, (broken, w))
    assert bool((d_x[3] == 0).all())
    torch.testing.assert_close(d_w, torch.autograd.grad(expected, w)[0])


def test_smoothing_with_a_learnt_scale_and_in_half_precision() -> None:
    x, w, labels = leaves()
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    logits = dense.logits(dense.Formula(dense.additive(0.2)), x, w, labels, scale)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    for backend in ("reference", "cpu"):
        loss = fmf.cosface(x, w, labels, 0.2, scale, label_smoothing=0.1, backend=backend)
        compare(loss, expected, (x, w, scale))
    for dtype in (torch.bfloat16, torch.float16):
        half = x.detach().to(dtype).requires_grad_()
        loss = fmf.cosface(half, w.float(), labels, 0.2, 12.0, label_smoothing=0.1)
        loss.backward()
        assert half.grad is not None
        assert bool(half.grad.isfinite().all())
        torch.testing.assert_close(loss.double(), expected, rtol=0, atol=0.2)
    torch.autograd.gradcheck(
        lambda x, w: fmf.cosface(x, w, labels, 0.2, 12.0, label_smoothing=0.1), (x, w),
        fast_mode=True,
    )  # fmt: skip


def test_smoothing_of_huge_and_of_zero_rows() -> None:
    x, w, labels = leaves()
    with torch.no_grad():
        x[0] *= 1e160
        w[1] *= 1e155
        w[2] = 0.0
    loss = fmf.cosface(x, w, labels, label_smoothing=0.2)
    expected = fmf.cosface(x, w, labels, label_smoothing=0.2, backend="reference")
    compare(loss, expected, (x, w))


def test_focal_factors_know_the_target_s_probability() -> None:
    """Not what smoothing has made of the loss."""
    x, w, labels = leaves()
    logits = dense.logits(dense.Formula(dense.additive(0.2)), x, w, labels, 16.0)
    hard, smooth = (
        F.cross_entropy(logits, labels, reduction="none", label_smoothing=part)
        for part in (0.0, 0.1)
    )
    for backend in ("reference", "cpu"):
        loss = fmf.cosface(
            x, w, labels, 0.2, 16.0, label_smoothing=0.1, focal_gamma=2.0, focal_alpha=0.25,
            reduction="none", backend=backend,
        )  # fmt: skip
        compare(loss, 0.25 * (1.0 - (-hard).exp()) ** 2 * smooth, (x, w))


def test_smoothing_of_a_module() -> None:
    criterion = fm.ArcFaceLoss(CLASSES, DIM, label_smoothing=0.1)
    x, _, labels = leaves(dtype=torch.float32)
    expected = fmf.arcface(x, criterion.weight, labels, label_smoothing=0.1)
    torch.testing.assert_close(criterion(x, labels), expected)
    assert "label_smoothing=0.1" in repr(criterion)
    criterion.label_smoothing = 0.0
    assert "label_smoothing" not in repr(criterion)
    torch.testing.assert_close(criterion(x, labels), fmf.arcface(x, criterion.weight, labels))
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
        criterion.label_smoothing = 1.5


# --- statistics of a batch ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
@each_backend
def test_stats_are_those_of_a_product_of_their_own(backend: str, name: str) -> None:
    """And the loss is the same, with or without; an ignored row has none."""
    call, _, _, centers = CALLS[name]
    x, w, labels = leaves(backend)
    labels = labels.clamp(max=CLASSES // centers - 1)
    options: dict[str, Any] = {"reduction": "none", "backend": backend}
    loss, stats = call(x, w, labels, return_stats=True, **options)
    compare(loss, call(x, w, labels, **options), (x, w))
    expected = metrics.evaluate(x, w, labels, sub_centers=centers)
    for got, want in zip(stats, expected, strict=True):
        assert not got.requires_grad
        assert got.shape == (ROWS,)
        torch.testing.assert_close(got, want, equal_nan=True)
    assert stats.rank[3] == stats.hardest_class[3] == -1
    assert bool(stats.target_cosine[3].isnan() & stats.hardest_cosine[3].isnan())
    for k in (1, 3):
        torch.testing.assert_close(stats.accuracy(k), expected.accuracy(k))


def test_stats_of_what_is_left_out() -> None:
    """A class that is filtered out of the softmax is still the hardest one."""
    x, w, labels = leaves()
    shape = negatives.filtered(0.2)
    found: Any = fmf.cosface(x, w, labels, negatives=shape, return_stats=True)
    stats = found[1]
    expected = metrics.evaluate(x, w, labels)
    torch.testing.assert_close(stats.hardest_cosine, expected.hardest_cosine, equal_nan=True)
    assert torch.equal(stats.rank, expected.rank)


@each_backend
def test_stats_of_no_rows(backend: str) -> None:
    x, w, labels = leaves(backend, torch.float32)
    for rows, kept in ((x[:0], labels[:0]), (x, torch.full_like(labels, -100))):
        found: Any = fmf.cosface(rows, w, kept, return_stats=True, backend=backend)
        loss, stats = found
        assert loss == 0.0
        assert bool(stats.accuracy().isnan())
        assert bool((torch.autograd.grad(loss, w)[0] == 0).all())


def test_rows_that_are_not_finite_are_not_right() -> None:
    x, w, labels = leaves(dtype=torch.float32)
    x = x.detach().clone()
    x[0], x[1, 2] = math.nan, math.inf
    for backend in ("reference", "cpu"):
        found: Any = fmf.arcface(x, w, labels, return_stats=True, backend=backend)
        assert found[1].rank[:2].tolist() == [CLASSES - 1] * 2
    assert metrics.evaluate(x, w, labels).rank[:2].tolist() == [CLASSES - 1] * 2


def test_stats_of_equal_classes() -> None:
    """A class as near as the target doesn't count as nearer, however products are rounded."""
    torch.manual_seed(0)
    w = torch.randn(4, 33).repeat(20, 1)
    x, labels = torch.randn(40, 33), torch.arange(40)
    near = metrics.predict(x, w[:4]).classes[:, 0] + 4 * (labels % 20)
    for backend in ("reference", "cpu"):
        found: Any = fmf.arcface(x, w, near, return_stats=True, backend=backend)
        stats = found[1]
        assert int(stats.rank.sum()) == 0


def test_stats_of_a_module() -> None:
    criterion = fm.AdaFaceLoss(CLASSES, DIM, class_weight=torch.rand(CLASSES), focal_gamma=1.0)
    x, _, labels = leaves(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = criterion(x, labels, sample_weight=torch.rand(ROWS), return_stats=True)
    assert loss.ndim == 0
    assert stats.rank.shape == (ROWS,)
    criterion.eval()
    with torch.no_grad():
        plain, again = criterion(x, labels, return_stats=True)
    torch.testing.assert_close(plain, criterion(x, labels))
    assert torch.equal(again.rank, metrics.evaluate(x, criterion.weight, labels).rank)
    with pytest.raises(TypeError, match="return_stats must be True or False, got int 1"):
        criterion(x, labels, return_stats=1)


# --- under torch.compile --------------------------------------------------------------------------


@in_blocks
def test_stats_under_compile() -> None:
    """With the loss in one graph, whatever the batch."""
    torch._dynamo.reset()
    criterion = fm.ArcFaceLoss(CLASSES // 2, DIM, sub_centers=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    x, _, labels = leaves(dtype=torch.float32)
    labels = labels.clamp(max=CLASSES // 2 - 1)
    for rows in (ROWS, 7, 9):
        part = x.detach()[:rows].requires_grad_()
        got, want = (c(part, labels[:rows], return_stats=True) for c in (compiled, criterion))
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(
            torch.autograd.grad(got[0], part), torch.autograd.grad(want[0], part)
        )
        for actual, expected in zip(got[1], want[1], strict=True):
            torch.testing.assert_close(actual, expected, equal_nan=True)
    assert counter.frame_count <= 2


@in_blocks
def test_a_schedule_of_smoothing_compiles_twice() -> None:
    """For its first value and for all others."""
    torch._dynamo.reset()
    criterion = fm.CosFaceLoss(CLASSES, DIM)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    x, _, labels = leaves(dtype=torch.float32)
    for step in range(1, 5):
        criterion.label_smoothing = step / 20
        got, want = compiled(x, labels), criterion(x, labels)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))
    assert counter.frame_count == 2


# --- mixtures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        fm.ArcFaceLoss, fm.AdaFaceLoss, lambda c, d: heads.ArcMarginProduct(d, c),
        lambda c, d: insightface.PartialFC_V2(insightface.ArcFace(), d, c), pml.ArcFaceLoss,
    ],
    ids=["ArcFaceLoss", "AdaFaceLoss", "heads", "insightface", "pml"],
)  # fmt: skip
def test_the_code_for_mixtures_in_the_error_runs(make: Any) -> None:
    """And is the mixture of two losses."""
    criterion = make(CLASSES, DIM).eval()  # AdaFace's statistics stay as they are
    x, a, b = torch.randn(6, DIM), *torch.randint(CLASSES, (2, 6))
    lam = 0.3 if isinstance(criterion, pml.ArcFaceLoss) else torch.full((6,), 0.3)
    targets = 0.3 * F.one_hot(a, CLASSES) + 0.7 * F.one_hot(b, CLASSES)
    with pytest.raises(TypeError, match="cutmix") as caught:
        criterion(x, targets)
    code = str(caught.value).rpartition(": ")[2]
    names = {"criterion": criterion, "torch": torch, "x": x, "a": a, "b": b, "lam": lam}
    expected = 0.3 * criterion(x, a) + 0.7 * criterion(x, b)
    torch.testing.assert_close(eval(code, names), expected)


def test_two_labels_with_weights() -> None:
    """Mixup and cutmix: one call with each row twice is the mixture of two losses."""
    x, w, labels = leaves()
    other = labels.roll(1)
    share = torch.linspace(0.1, 0.9, ROWS, dtype=torch.float64)
    rows = [fmf.arcface(x, w, y, reduction="none") for y in (labels, other)]
    expected = (share * rows[0] + (1.0 - share) * rows[1]).sum()
    loss = fmf.arcface(
        torch.cat([x, x]), w, torch.cat([labels, other]), reduction="sum",
        sample_weight=torch.cat([share, 1.0 - share]),
    )  # fmt: skip
    compare(loss, expected, (x, w))
