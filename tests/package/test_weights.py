"""Options that weigh rows: weights of classes and samples, focal factors; and a learnt scale."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import device_of, needs_triton, problem
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fused_margin as fm
import fused_margin.functional as fmf

Tensor = torch.Tensor
BACKENDS = ("reference", "cpu", pytest.param("triton", marks=needs_triton))
each_backend = pytest.mark.parametrize("backend", BACKENDS)
ROWS, CLASSES, DIM, SCALE = 12, 7, 5, 12.0


def _leaves(backend: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    given, device = problem(ROWS, CLASSES, DIM, seed=2), device_of(backend)
    x, w = (part.to(device, dtype, copy=True).requires_grad_() for part in (given.x, given.w))
    labels = given.labels.to(device, copy=True)
    labels[2] = labels[7] = -100
    return x, w, labels


def _weights(device: torch.device) -> tuple[Tensor, Tensor]:
    classes = torch.linspace(0.2, 2.0, CLASSES, dtype=torch.float64, device=device)
    rows = torch.linspace(1.5, 0.1, ROWS, dtype=torch.float64, device=device)
    rows[2] = float("nan")  # of an ignored row
    return classes.requires_grad_(), rows.requires_grad_()


def _logits(x: Tensor, w: Tensor, labels: Tensor, scale: Any = SCALE) -> Tensor:
    """CosFace's, margin 0.2."""
    cosines = F.normalize(x) @ F.normalize(w).t()
    return scale * (cosines - 0.2 * F.one_hot(labels.clamp_min(0), w.shape[0]).to(x))


CALLS = {  # the fused operator and autograd over N numbers
    "fused": lambda x, w, y, **kw: fmf.cosface(x, w, y, 0.2, SCALE, **kw),
    "psi": lambda x, w, y, **kw: fmf.margin_softmax(x, w, y, lambda u: u - 0.2, SCALE, **kw),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("call", CALLS)
@each_backend
def test_class_weight_is_that_of_cross_entropy(backend: str, call: str, reduction: str) -> None:
    x, w, labels = _leaves(backend)
    classes = _weights(x.device)[0].detach()
    loss = CALLS[call](x, w, labels, class_weight=classes, reduction=reduction, backend=backend)
    expected = F.cross_entropy(_logits(x, w, labels), labels, classes, reduction=reduction)
    _compare(loss, expected, (x, w))


def _compare(loss: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-11)
    upstream = torch.linspace(0.5, 1.0, max(loss.numel(), 1)).to(loss).reshape(loss.shape)
    for got, want in zip(
        torch.autograd.grad(loss, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("call", CALLS)
@each_backend
def test_everything_that_weighs(backend: str, call: str, reduction: str) -> None:
    """Focal factors of p, then the product of both weights, by which a mean is divided."""
    x, w, labels = _leaves(backend)
    classes, rows = _weights(x.device)
    loss = CALLS[call](
        x, w, labels, class_weight=classes, sample_weight=rows, focal_gamma=1.5, focal_alpha=0.25,
        reduction=reduction, backend=backend,
    )  # fmt: skip
    counted = labels != -100
    own = F.cross_entropy(_logits(x, w, labels), labels, reduction="none")
    own = 0.25 * (1.0 - (-own).exp()) ** 1.5 * own
    weights = classes[labels.clamp_min(0)] * torch.where(counted, rows, 0.0)
    expected = {
        "none": own * weights,
        "sum": (own * weights).sum(),
        "mean": (own * weights).sum() / weights.sum(),
    }[reduction]
    _compare(loss, expected, (x, w, classes, rows))


def test_a_weight_is_so_many_rows() -> None:
    x, w, labels = _leaves("cpu")
    rows = torch.ones(ROWS, dtype=torch.float64)
    rows[0], rows[1] = 2.0, 0.0
    kept = [0, 0, *range(2, ROWS)]
    torch.testing.assert_close(
        fmf.arcface(x, w, labels, sample_weight=rows), fmf.arcface(x[kept], w, labels[kept])
    )


@each_backend
def test_weights_that_sum_to_nothing(backend: str) -> None:
    """And no rows: a loss of 0 with gradients of 0, as without weights."""
    x, w, labels = _leaves(backend, torch.float32)
    zeros = torch.zeros(ROWS, device=x.device)
    for count, label in ((ROWS, 1), (ROWS, -100), (0, 1)):
        loss = fmf.arcface(
            x[:count], w, torch.full_like(labels[:count], label), sample_weight=zeros[:count],
            focal_gamma=2.0, class_weight=torch.ones(CLASSES, device=x.device), backend=backend,
        )  # fmt: skip
        assert float(loss.detach()) == 0.0
        for gradient in torch.autograd.grad(loss, (x, w), allow_unused=True):
            assert gradient is None or bool((gradient == 0).all())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_factor_at_tiny_losses(gamma: float) -> None:
    """1 - p keeps its digits where p rounds to 1, and has a gradient at a loss of 0."""
    w = torch.eye(3, dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1])
    for scale in (60.0, 800.0, 1e4):
        plain = fmf.normalized_softmax(x, w, labels, scale, reduction="none").detach()
        loss = fmf.normalized_softmax(x, w, labels, scale, reduction="none", focal_gamma=gamma)
        torch.testing.assert_close(loss, plain ** (1.0 + gamma), rtol=1e-9, atol=0.0)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert bool(gradient.isfinite().all())


def test_focal_factor_of_none_is_none() -> None:
    x, w, labels = _leaves("cpu")
    plain = fmf.arcface(x, w, labels)
    torch.testing.assert_close(fmf.arcface(x, w, labels, focal_gamma=0.0, focal_alpha=1.0), plain)
    torch.testing.assert_close(fmf.arcface(x, w, labels, focal_alpha=3.0), 3.0 * plain)


def test_options_of_a_module() -> None:
    x, _, labels = _leaves("cpu", torch.float32)
    classes, rows = torch.linspace(0.2, 2.0, CLASSES), torch.rand(ROWS)
    criterion = fm.ArcFaceLoss(CLASSES, DIM, class_weight=classes, focal_gamma=2.0, focal_alpha=0.5)
    expected = fmf.arcface(
        x, criterion.weight, labels, class_weight=classes, focal_gamma=2.0, focal_alpha=0.5,
        sample_weight=rows,
    )  # fmt: skip
    torch.testing.assert_close(criterion(x, labels, sample_weight=rows), expected)
    assert repr(criterion).endswith(
        "class_weight=Tensor(shape (7,)), focal_gamma=2, focal_alpha=0.5)"
    )
    assert list(criterion.state_dict()) == ["weight"]
    double: Any = criterion.double()
    assert double.class_weight.dtype is torch.float64
    criterion.class_weight = criterion.focal_gamma = criterion.focal_alpha = None
    torch.testing.assert_close(
        criterion(x.double(), labels), fmf.arcface(x.double(), criterion.weight, labels)
    )
    with pytest.raises(ValueError, match=r"class_weight must have shape \(7,\).*per class"):
        criterion.class_weight = classes[1:]
    assert criterion.class_weight is None


def test_weights_under_compile() -> None:
    """One graph for every weight, and a schedule of gamma compiles twice."""
    criterion = fm.CosFaceLoss(CLASSES, DIM, class_weight=torch.rand(CLASSES), focal_gamma=1.0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    x, _, labels = _leaves("cpu", torch.float32)
    for epoch in range(5):
        criterion.focal_gamma = 1.0 + epoch / 4
        rows = torch.rand(ROWS)
        got, want = (c(x, labels, sample_weight=rows) for c in (compiled, criterion))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))
    assert counter.frame_count == 2


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "class_weight type": ({"class_weight": [1.0]}, TypeError, "class_weight must be a tensor, got"),
    "class_weight shape": (
        {"class_weight": torch.ones(3)}, ValueError, r"shape \(7,\), one number per class, got \(3",
    ),
    "class_weight integer": (
        {"class_weight": torch.ones(7).long()}, TypeError, r"class_weight must be floating.*float",
    ),
    "class_weight device": (
        {"class_weight": torch.ones(7, device="meta")}, ValueError, "class_weight is on meta.*move",
    ),
    "sample_weight shape": (
        {"sample_weight": torch.ones(12, 1)}, ValueError, r"\(12,\), one number per row.*flatten\(",
    ),
    "sample_weight type": ({"sample_weight": 0.5}, TypeError, "sample_weight must be a tensor"),
    "focal_gamma": ({"focal_gamma": -1.0}, ValueError, r"focal_gamma must be in \[0, .*got -1"),
    "focal_alpha": ({"focal_alpha": "1"}, TypeError, "focal_alpha must be a number, got str '1'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("compiles", [False, True])
def test_errors(name: str, compiles: bool) -> None:
    options, kind, message = ERRORS[name]
    x, w, labels = _leaves("cpu")

    def call() -> Tensor:
        return fmf.arcface(x, w, labels, **options)

    if compiles:
        torch._dynamo.reset()
        call = torch.compile(call, backend="eager", fullgraph=True)
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (-torch.ones(7), ValueError, "finite and >= 0, got -1 to -1"),
        (nn.Parameter(torch.ones(7)), TypeError, "not learnt, pass class_weight.detach"),
        ([1.0] * 7, TypeError, "class_weight must be a tensor, got list.*as_tensor"),
    ],
)
def test_class_weights_that_a_module_refuses(value: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        fm.ArcFaceLoss(7, 4, class_weight=value)


# --- a learnt scale -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)])
@each_backend
def test_a_learnt_scale(backend: str, shape: tuple[int, ...]) -> None:
    x, _, labels = _leaves(backend, torch.float32)
    scale = nn.Parameter(torch.full(shape, SCALE, device=x.device))
    criterion = fm.CosFaceLoss(CLASSES, DIM, 0.2, scale, backend=backend).to(x.device)
    assert [name for name, _ in criterion.named_parameters()] == ["weight", "scale"]
    assert "scale=Parameter(12)" in repr(criterion)
    given = torch.tensor(SCALE, device=x.device, requires_grad=True)
    expected = fmf.cosface(x, criterion.weight, labels, 0.2, given, backend=backend)
    loss = criterion(x, labels)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, (x, criterion.weight, scale))
    want = torch.autograd.grad(expected, (x, criterion.weight, given))
    for actual, precise in zip(got, want, strict=True):
        torch.testing.assert_close(actual.reshape(precise.shape), precise)
    torch.testing.assert_close(criterion.logits(x), fmf.cosine_logits(x, criterion.weight, SCALE))


def test_a_learnt_scale_is_trained_and_saved() -> None:
    x, _, labels = _leaves("cpu", torch.float32)
    criterion = fm.ArcFaceLoss(CLASSES, DIM, scale=nn.Parameter(torch.tensor(SCALE)))
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    criterion(x, labels).backward()
    optimizer.step()
    fm.check_setup(criterion, optimizer)
    assert float(criterion.scale.detach()) != SCALE
    buffer = io.BytesIO()
    torch.save(criterion.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    for assign in (False, True):
        loaded = fm.ArcFaceLoss(CLASSES, DIM, scale=nn.Parameter(torch.tensor(1.0)))
        loaded.load_state_dict(state, assign=assign)
        assert torch.equal(loaded(x, labels), criterion(x, labels))
        assert isinstance(loaded.scale, nn.Parameter)


def test_a_learnt_scale_that_has_become_negative() -> None:
    """What a step of the optimiser made is told with what a module can do about it."""
    criterion = fm.ArcFaceLoss(CLASSES, DIM, scale=nn.Parameter(torch.tensor(SCALE)))
    x, _, labels = _leaves("cpu", torch.float32)
    criterion.scale.data.fill_(-0.5)
    with pytest.raises(ValueError, match=r"got -0\.5;.*criterion\.scale\.data\.clamp_\(min=1\.0\)"):
        criterion(x, labels)


def test_a_learnt_scale_keeps_its_place() -> None:
    criterion = fm.ArcFaceLoss(CLASSES, DIM, scale=nn.Parameter(torch.tensor(SCALE)))
    with pytest.raises(TypeError, match=r"scale is learnt, and float 3.0.*\.data\.fill_\(scale\)"):
        criterion.scale = 3.0
    assert float(criterion.scale.detach()) == SCALE
    del criterion.scale
    criterion.scale = 3.0
    assert list(criterion.state_dict()) == ["weight"]
    for wrong, message in (
        (torch.tensor(-1.0), "scale must be finite in fp32 and > 0"),
        (torch.ones(2), r"one element.*got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            criterion.scale = nn.Parameter(wrong)
    with pytest.raises(TypeError, match="a tensor scale must be floating"):
        criterion.scale = nn.Parameter(torch.tensor(3), requires_grad=False)
    assert criterion.scale == 3.0


def test_what_can_not_be_assigned() -> None:
    criterion = fm.ArcFaceLoss(10, 4, sub_centers=3)
    criterion.sub_centers = 3
    with pytest.raises(AttributeError, match="sub_centers is 3 and can't be set to 2"):
        criterion.sub_centers = 2
    with pytest.raises(AttributeError, match="negatives of a loss is a method"):
        setattr(criterion, "negatives", fm.negatives.filtered(0.4))  # noqa: B010 - by its name, as a type checker refuses it too
    with pytest.raises(ValueError, match=r"phi must be a tuple of the numbers d, a, .* length 2"):
        fm.functional.cosface(
            torch.randn(2, 4), criterion.weight, torch.tensor([0, 1]),
            negatives=fm.negatives.Negatives(0.0, (0.0, 1.0)),
        )  # fmt: skip
