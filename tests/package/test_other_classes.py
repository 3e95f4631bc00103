"""Losses that reshape the logits of other classes, each against its paper's formula."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import dense_formulas as dense
import pytest
import torch
import torch.nn.functional as F
from helpers import SHAPED_BACKENDS, ahead, check_no_rows, device_of, in_blocks, problem
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import margins, negatives
from fused_margin._cpu import others

pytestmark = pytest.mark.usefixtures("one_thread")

Tensor = torch.Tensor
BACKENDS = SHAPED_BACKENDS
each_backend = pytest.mark.parametrize("backend", BACKENDS)
ROWS, CLASSES, DIM = 14, 40, 4  # of 4 dimensions: cosines of all sizes


class Case(NamedTuple):
    """A call, the formula and its scale."""

    call: Callable[..., Tensor]
    formula: dense.Formula
    scale: float


def _with(shape: Any) -> Any:
    psi = margins.additive(0.2)
    return lambda x, w, y, **kw: fmf.margin_softmax(x, w, y, psi, 16.0, negatives=shape, **kw)


CASES = {
    "curricularface": Case(
        lambda x, w, y, **kw: fmf.curricularface(x, w, y, 0.4, 16.0, t=0.3, **kw),
        dense.curricular(0.4, 0.3), 16.0,
    ),
    "curricularface, defaults": Case(fmf.curricularface, dense.curricular(0.5, 0.0), 64.0),
    "curricularface, a margin a row": Case(
        lambda x, w, y, **kw: fmf.curricularface(
            x, w, y, torch.full_like(x[:, 0], 0.4).detach(), 16.0,
            t=torch.tensor(0.3, device=x.device), **kw,
        ),
        dense.curricular(0.4, float(torch.tensor(0.3))), 16.0,
    ),
    "mv_softmax": Case(
        fmf.mv_softmax, dense.misclassified(dense.additive(0.35), 1.2), 32.0
    ),
    "mv_softmax, arc": Case(
        lambda x, w, y, **kw: fmf.mv_softmax(x, w, y, scale=16.0, kind="arc", t=1.3, **kw),
        dense.misclassified(dense.arc(0.5), 1.3), 16.0,
    ),
    "circle_softmax": Case(fmf.circle_softmax, dense.circle(0.35), 64.0),
    "circle_softmax, m = 0": Case(
        lambda x, w, y, **kw: fmf.circle_softmax(x, w, y, 0.0, 30.0, **kw), dense.circle(0.0), 30.0
    ),
    "filtered": Case(
        _with(negatives.filtered(0.4)),
        dense.filtered(dense.additive(0.2), 0.4, -math.inf), 16.0,
    ),
    "filtered to 0": Case(
        _with(negatives.filtered(0.4, zero=True)),
        dense.filtered(dense.additive(0.2), 0.4, 0.0), 16.0,
    ),
    "inter_topk": Case(
        lambda x, w, y, **kw: _with(fmf.inter_topk(x, w, y, 3, 0.1, kind="cos"))(x, w, y, **kw),
        dense.inter_topk(dense.additive(0.2), 3, 0.1), 16.0,
    ),
    "inter_topk, arc": Case(
        lambda x, w, y, **kw: _with(fmf.inter_topk(x, w, y, 3, 0.1))(x, w, y, **kw),
        dense.inter_topk(dense.additive(0.2), 3, 0.1, turns=True), 16.0,
    ),
    "beyond the shift": Case(
        lambda x, w, y, **kw: fmf.curricularface(x, w, y, 0.4, 300.0, t=0.9, **kw),
        dense.curricular(0.4, 0.9), 300.0,
    ),
}  # fmt: skip


def leaves(backend: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rows near to their class and far from it, and one that is ignored."""
    given, device = problem(ROWS, CLASSES, DIM, seed=4), device_of(backend)
    x, w = (part.to(device, dtype, copy=True).requires_grad_() for part in (given.x, given.w))
    labels = given.labels.to(device, copy=True)
    labels[3] = -100
    return x, w, labels


def compare(loss: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.linspace(0.1, 1.0, loss.numel()).to(loss).reshape(loss.shape)
    for got, want in zip(
        torch.autograd.grad(loss, inputs, upstream, retain_graph=True),
        torch.autograd.grad(expected, inputs, upstream, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))


@pytest.mark.parametrize("name", CASES)
@each_backend
def test_value_and_gradients_are_the_formulas(backend: str, name: str) -> None:
    case = CASES[name]
    x, w, labels = leaves(backend)
    found = dense.logits(case.formula, x, w, labels, case.scale)
    kept = labels != -100
    reshaped = found.detach() != case.scale * dense.cosines(x, w).detach()
    assert int(reshaped[kept].sum()) > ROWS  # more than the targets alone
    expected = F.cross_entropy(found, labels, reduction="none")
    compare(case.call(x, w, labels, reduction="none", backend=backend), expected, (x, w))
    compare(case.call(x, w, labels, backend=backend), expected.sum() / (ROWS - 1), (x, w))


@pytest.mark.parametrize("name", ["curricularface", "mv_softmax", "filtered"])
def test_gradcheck(name: str) -> None:
    """Circle loss has no gradient through its factors."""
    x, w, labels = leaves("cpu")
    x = x.detach()[:5].clone().requires_grad_()
    w = w.detach()[:9].clone().requires_grad_()
    labels = labels[:5].remainder(9)
    call = CASES[name].call
    torch.autograd.gradcheck(lambda x, w: call(x, w, labels), (x, w), fast_mode=True)
    torch.autograd.gradgradcheck(
        lambda x: call(x, w.detach(), labels, backend="reference"), (x,), fast_mode=True
    )


def test_a_learnt_scale() -> None:
    """Its gradient is that of the formula, on the reference and in blocks."""
    x, w, labels = leaves("cpu")
    for name in ("curricularface", "circle_softmax", "filtered"):
        scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
        found = dense.logits(CASES[name].formula, x, w, labels, scale)
        if name == "filtered":  # dense code's own gradient would be 0 times infinity
            shown = dense.cosines(x, w).detach()
            is_out = (shown > 0.4).scatter(1, labels.clamp_min(0)[:, None], False)
            plain = dense.Formula(dense.additive(0.2))
            found = dense.logits(plain, x, w, labels, scale).masked_fill(is_out, -math.inf)
        for backend in ("reference", "cpu"):
            if name == "curricularface":
                loss = fmf.curricularface(x, w, labels, 0.4, scale, t=0.3, backend=backend)
            elif name == "filtered":
                loss = fmf.margin_softmax(
                    x, w, labels, margins.additive(0.2), scale, backend=backend,
                    negatives=negatives.filtered(0.4),
                )  # fmt: skip
            else:
                loss = fmf.circle_softmax(x, w, labels, scale=scale, backend=backend)
            compare(loss, F.cross_entropy(found, labels), (x, w, scale))


@pytest.mark.parametrize("name", CASES)
@each_backend
def test_no_rows(backend: str, name: str) -> None:
    """An empty batch, one row, and rows that are all ignored, whatever they hold."""
    x, w, labels = leaves(backend, torch.float32)
    check_no_rows(functools.partial(CASES[name].call, backend=backend), x, w, labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["curricularface", "mv_softmax, arc", "circle_softmax"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Of embeddings: a cosine on the other side of a threshold moves the loss by little."""
    case = CASES[name]
    x, w, labels = leaves("cpu", torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    exact = F.cross_entropy(
        dense.logits(case.formula, x.double(), w.double(), labels, case.scale), labels
    )
    loss = case.call(x, w, labels)
    loss.backward()
    assert loss.dtype is torch.float32
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=0.02 * case.scale)


@each_backend
def test_a_row_without_other_classes(backend: str) -> None:
    """All of them are left out: a loss of 0 and no gradient, and other rows are as before."""
    w = torch.eye(3, 4, dtype=torch.float64, device=device_of(backend))
    x = w[:2] + 0.5 * w[1:] + 0.4 * w[[2, 0]]
    x.requires_grad_()
    w.requires_grad_()
    labels = torch.tensor([0, 1], device=x.device)
    shape = negatives.Negatives(
        torch.tensor([-0.5, 0.9], dtype=torch.float64, device=x.device),
        negatives.filtered(0.0).phi,
    )
    rows = _with(shape)(x, w, labels, reduction="none", backend=backend)
    assert float(rows[0].detach()) == 0.0
    expected = F.cross_entropy(
        dense.logits(dense.Formula(dense.additive(0.2)), x, w, labels, 16.0), labels,
        reduction="none",
    )  # fmt: skip
    compare(rows[1], expected[1], (x, w))
    for gradient in torch.autograd.grad(rows[0], (x, w)):
        assert bool((gradient == 0).all())


@each_backend
def test_two_classes(backend: str) -> None:
    x, w, labels = leaves(backend)
    labels = labels.clamp_min(0) % 2
    for name in ("curricularface", "mv_softmax", "circle_softmax"):
        case = CASES[name]
        found = dense.logits(case.formula, x, w[:2], labels, case.scale)
        compare(case.call(x, w[:2], labels, backend=backend), F.cross_entropy(found, labels), (x,))


@each_backend
def test_labels_out_of_range(backend: str) -> None:
    x, w, labels = leaves(backend)
    labels[0] = CLASSES
    for name in ("curricularface", "mv_softmax", "circle_softmax"):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 40\)"):
            CASES[name].call(x, w, labels, backend=backend)


PHIS = list(
    itertools.product(
        (0.0, 0.1), (1.0, 0.7), (0.0, 0.3), (None, 0.4), (None, 0.5), (1.0, 0.5, 0.0), (0.0, 0.2)
    )
)


@pytest.mark.parametrize("centers", [1, 2])
@pytest.mark.parametrize(
    "backend", [pytest.param("cpu", marks=mark, id=mark.name) for mark in (in_blocks, ahead)]
)
def test_any_coefficients(backend: str, centers: int) -> None:
    """Numbers of eq. 20 that no loss has together, the slope another function's than phi's."""
    x, w, labels = leaves(backend)
    w = w.detach()[: CLASSES - CLASSES % centers].requires_grad_()
    labels = labels.clamp(max=len(w) // centers - 1)
    for d, a, b, e, f, below, h in PHIS:
        phi = (d, a, b, a if e is None else e, b if f is None else f, below, h)
        shape = negatives.Negatives(0.1, phi)
        found, expected = (
            _with(shape)(x, w, labels, sub_centers=centers, backend=one)
            for one in (backend, "reference")
        )
        compare(found, expected, (x, w))


class _Passes(TorchDispatchMode):
    """Counts operators over (B, N), which write it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        is_view = "view" in func.name() or "slice" in func.name()
        shape = (CLASSES, ROWS)
        self.count += isinstance(found, Tensor) and found.shape == shape and not is_view
        return found


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("curricularface", 6), ("mv_softmax", 5), ("circle_softmax", 6), ("inter_topk", 3),
        ("filtered", 3),
    ],
)  # fmt: skip
@ahead
def test_passes_over_a_block(name: str, allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is that for the rows' own classes; each is a hundredth of a step at D = 512."""
    counts = []
    shape = others.Others.shape

    def counted(self: Any, *arguments: Any) -> Any:
        with _Passes() as passes:
            slopes = shape(self, *arguments)
        counts.append(passes.count)
        return slopes

    monkeypatch.setattr(others.Others, "shape", counted)
    x, w, labels = leaves("cpu", torch.float32)
    CASES[name].call(x, w, labels.clamp_min(0)).backward()
    assert counts
    assert set(counts) == {allowed}


# --- modules --------------------------------------------------------------------------------------

MODULES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "CircleSoftmaxLoss": (fm.CircleSoftmaxLoss, fmf.circle_softmax, {"margin": 0.2, "scale": 16.0}),
    "MVSoftmaxLoss": (
        fm.MVSoftmaxLoss, fmf.mv_softmax, {"margin": 0.3, "kind": "arc", "t": 1.1, "scale": 9.0}
    ),
    "CurricularFaceLoss": (
        fm.CurricularFaceLoss, fmf.curricularface, {"margin": 0.3, "boundary": "easy"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_their_functions(name: str) -> None:
    kind, function, options = MODULES[name]
    criterion = kind(CLASSES, DIM, **options, sub_centers=2, label_smoothing=0.1).eval()
    x, _, labels = leaves("cpu", torch.float32)
    expected = function(x, criterion.weight, labels, **options, sub_centers=2, label_smoothing=0.1)
    torch.testing.assert_close(criterion(x, labels), expected)
    for setting, value in options.items():
        shown = f"{setting}={value:g}" if isinstance(value, float) else f"{setting}={value!r}"
        assert shown in repr(criterion)
        setattr(criterion, setting, value)


def test_a_margin_for_each_class() -> None:
    x, _, labels = leaves("cpu", torch.float32)
    margin = torch.linspace(0.1, 0.6, CLASSES)
    rows = margin[labels.clamp_min(0)]
    for kind, function in (
        (fm.CurricularFaceLoss, fmf.curricularface), (fm.MVSoftmaxLoss, fmf.mv_softmax)
    ):  # fmt: skip
        criterion: Any = kind(CLASSES, DIM, margin).eval()
        expected = function(x, criterion.weight, labels, rows)
        torch.testing.assert_close(criterion(x, labels), expected)


def test_the_margin_follows_from_the_kind() -> None:
    assert fm.MVSoftmaxLoss(9, 4).margin == fm.ElasticFaceLoss(9, 4, kind="cos").margin == 0.35
    assert fm.MVSoftmaxLoss(9, 4, kind="arc").margin == fm.ElasticFaceLoss(9, 4).margin == 0.5
    x, w, labels = leaves("cpu")
    torch.testing.assert_close(
        fmf.elasticface(x, w, labels, sigma=0.0, kind="cos"), fmf.cosface(x, w, labels, 0.35)
    )
    criterion = fm.MVSoftmaxLoss(CLASSES, DIM, kind="arc")
    criterion.kind = "cos"
    assert criterion.margin == 0.5  # an assignment doesn't move another setting


def test_a_subclass_with_negatives() -> None:
    """Beside any margin, here the inter-topk penalty; a schedule of its own numbers."""

    class InterTopK(fm.CosFaceLoss):
        penalty_of_top = 0.06

        def negatives(self, embeddings: Tensor, labels: Tensor) -> negatives.Negatives:
            return fmf.inter_topk(
                embeddings, self.weight, labels, 5, self.penalty_of_top, kind="cos"
            )

    criterion = InterTopK(CLASSES, DIM, 0.2, 16.0).double()
    x, _, labels = leaves("cpu")
    found = dense.logits(
        dense.inter_topk(dense.additive(0.2), 5, 0.06), x, criterion.weight, labels, 16.0
    )
    compare(criterion(x, labels), F.cross_entropy(found, labels), (x, criterion.weight))


def test_all_other_classes_are_among_the_hardest() -> None:
    x, w, labels = leaves("cpu")
    w, labels = w[:4], labels.clamp_min(0) % 4
    for k in (3, 5, 8):
        loss = _with(fmf.inter_topk(x, w, labels, k, 0.1, kind="cos"))(x, w, labels)
        found = dense.logits(dense.inter_topk(dense.additive(0.2), 3, 0.1), x, w, labels, 16.0)
        torch.testing.assert_close(loss, F.cross_entropy(found, labels))
    first, second = (fmf.inter_topk(x, w, labels, 2).threshold for _ in range(2))
    assert torch.equal(first, second)  # pyright: ignore[reportArgumentType]


# --- under torch.compile --------------------------------------------------------------------------


def _scheduled(x: Tensor, w: Tensor, y: Tensor, t: float, margin: float) -> Tensor:
    return (
        fmf.curricularface(x, w, y, margin, 16.0, t=t)
        + fmf.mv_softmax(x, w, y, margin, t=1.0 + t)
        + fmf.circle_softmax(x, w, y, margin)
        + _with(negatives.filtered(t))(x, w, y)
    )


@in_blocks
def test_schedules_compile_twice() -> None:
    """Of t, of margins and of a threshold: for the first values and for all others."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_scheduled, backend=counter, fullgraph=True)
    x, w, labels = leaves("cpu", torch.float32)
    for step in range(4):
        numbers = 0.1 + step / 20, 0.3 + step / 30
        got, want = (call(x, w, labels, *numbers) for call in (compiled, _scheduled))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))
    assert counter.frame_count == 2


# --- errors ---------------------------------------------------------------------------------------

X, W, Y = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([0, 1, 5])
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "smoothing of what is left out": (
        lambda: fmf.margin_softmax(
            X, W, Y, margins.NO_MARGIN, 9.0, negatives=negatives.filtered(0.4), label_smoothing=0.1
        ),
        ValueError, r"leave some out of the softmax; use negatives.filtered\(threshold, zero=True",
    ),
    "threshold": (
        lambda: fmf.margin_softmax(
            X, W, Y, margins.NO_MARGIN, 9.0,
            negatives=negatives.Negatives(torch.zeros(6), negatives.circle().phi),
        ),
        ValueError, r"must be a number or have shape \(3,\), one cosine per row, got \(6,\)",
    ),
    "two negatives": (
        lambda: fmf.curricularface(X, W, Y, negatives=negatives.circle()), TypeError,
        "curricularface has negatives of its own.*margin_softmax takes any",
    ),
    "no negatives": (
        lambda: fmf.arcface(X, W, Y, negatives=0.4), TypeError,  # pyright: ignore[reportArgumentType]
        r"one of fused_margin.negatives, as fm.negatives.filtered\(0.4\)",
    ),
    "t": (lambda: fmf.curricularface(X, W, Y, t=1.5), ValueError, "t must be in .*mean of target"),
    "t of a tensor": (
        lambda: fmf.curricularface(X, W, Y, t=torch.zeros(1)), ValueError, r"squeeze\(\)"
    ),
    "t below 1": (lambda: fmf.mv_softmax(X, W, Y, t=0.9), ValueError, r"t must be in \[1, 10\]"),
    "kind": (lambda: fm.MVSoftmaxLoss(6, 4, kind="am"), ValueError, "kind must be one of 'arc'"),
    "circle": (lambda: fm.CircleSoftmaxLoss(6, 4, 1.5), ValueError, r"\[0, 1\], got 1.5; it is a"),
    "degrees": (lambda: fm.CurricularFaceLoss(6, 4, 28.6), ValueError, r"math\.radians"),
    "offset": (lambda: fmf.mv_softmax(X, W, Y, 2.5), ValueError, "offset of the cosine"),
    "offset of a module": (
        lambda: fm.MVSoftmaxLoss(6, 4, 2.5)(X, Y), ValueError, "offset of the cosine"
    ),
    "k": (lambda: fmf.inter_topk(X, W, Y, 9), ValueError, "k must be at most 8"),
    "momentum": (
        lambda: fm.CurricularFaceLoss(6, 4, momentum=2.0), ValueError, "momentum must be in"
    ),
    "a drawn margin": (
        lambda: fm.ElasticFaceLoss(6, 4, torch.ones(6)), TypeError,  # pyright: ignore[reportArgumentType]
        "their mean as a number, got Tensor.*arcface or cosface",
    ),
    "a drawn margin of a function": (
        lambda: fmf.elasticface(X, W, Y, torch.ones(3)), TypeError,  # pyright: ignore[reportArgumentType]
        "their mean as a number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()
