"""Value and gradients of every loss against the fp64 reference, judged by the eager error."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers import (
    ARCFACE,
    BACKENDS,
    COSFACE,
    FP32,
    FP64,
    HALF_MODES,
    LOSSES,
    MIXED_MODES,
    MODES,
    NORMALIZED_SOFTMAX,
    Layout,
    Loss,
    Mode,
    Problem,
    Result,
    ahead,
    arcface,
    assert_close,
    check_loss,
    cosface,
    device_of,
    eager_cosine_lse,
    evaluate,
    in_blocks,
    in_one_block,
    needs_triton,
    normalized_softmax,
    problem,
    run,
    run_eager,
    sizes,
    yardstick,
)

import fused_margin.functional as fmf
from fused_margin._cpu import backend

pytestmark = pytest.mark.usefixtures("poison", "_forms_products_again")


@pytest.fixture
def _forms_products_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems this small would keep every product; other files test that."""
    monkeypatch.setattr(backend, "KEPT_BYTES", 0)
    monkeypatch.setattr(backend, "KEPT_BYTES_PER_FURTHER_ROW", 0)


# N, C and D below, at and above what a tile or a block holds, and never a multiple of it.
SHAPES = (
    (1, 2, 1),
    (1, 3, 3),
    (7, 2, 64),
    (7, 10, 3),
    (33, 3, 130),
    (33, 257, 64),
    (150, 10, 17),
    (17, 600, 300),
)
# In half precision the rounding of a few products does not average out over a small D.
HALF_SHAPES = ((7, 2, 64), (33, 3, 130), (33, 257, 64))
# Interpreted kernels are slow: one shape for all losses, and the shapes for one loss.
SHAPE = (9, 150, 70)


def cases(
    *,
    losses: tuple[Loss, ...] = LOSSES,
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    modes: tuple[Mode, ...] = (FP32, FP64),
) -> list[Any]:
    """Loss, shape, mode and backend: every combination, and for Triton every value of each."""
    full = [
        (loss, shape, mode)
        for loss in losses
        for shape in shapes
        for mode in modes
        if shape[1] > 2 or loss.name != "fixed_adacos"
    ]
    first, last = modes[0], modes[-1]
    cross = {(loss, SHAPE, first): None for loss in losses}
    cross |= {(losses[0], SHAPE, mode): None for mode in modes}
    cross |= {(losses[0], shape, last): None for shape in shapes if shape[1] <= 300}
    marks = ((), in_one_block, in_blocks, ahead)
    ways = (("reference", ()), *(("cpu", mark) for mark in marks))
    chosen = [(case, way, marks) for case in full for way, marks in ways]
    chosen += [(case, "triton", needs_triton) for case in cross]
    return [
        pytest.param(
            *case,
            way,
            marks=marks,
            id="-".join(map(str, (*case, marks.name if way == "cpu" and marks else way))),
        )
        for case, way, marks in chosen
    ]


# --- the yardstick itself -------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES[:-3], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_reference_matches_cross_entropy(
    loss: Loss, shape: tuple[int, int, int], reduction: str
) -> None:
    if loss.name == "fixed_adacos" and shape[1] < 3:
        loss = NORMALIZED_SOFTMAX
    given = problem(*shape)
    eager = run_eager(loss, given, FP64, reduction=reduction)
    actual = yardstick(loss, given, FP64, reduction=reduction)
    unit = sizes(loss, given, FP64, reduction=reduction)
    eps = torch.finfo(torch.float64).eps
    # cross-entropy is off by eps s however small the loss; test_losses.py has that regime
    absolute = loss.scale(shape[1]) * (shape[0] if reduction == "sum" else 1)
    allowed = 4 * eps * (unit.value + absolute)
    assert bool(((actual.value - eager.value).abs() <= allowed).all())
    for name in ("d_x", "d_w"):
        difference = getattr(actual, name) - getattr(eager, name)
        # softmax gives the target p - 1, off by eps however small 1 - p is
        allowed = 4 * eps * (getattr(unit, name) + loss.scale(shape[1]) * _largest(given, name))
        assert bool((difference.norm(dim=1, keepdim=True) <= allowed).all())


def _largest(given: Problem, name: str) -> float:
    rows = given.x if name == "d_x" else given.w
    return float(given.upstream.sum()) / float(rows.norm(dim=1).min())


# --- dtypes and shapes ----------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "shape", "mode", "backend"), cases())
def test_full_precision(loss: Loss, shape: tuple[int, int, int], mode: Mode, backend: str) -> None:
    check_loss(loss, problem(*shape), mode, backend, reduction="none")


@pytest.mark.parametrize(
    ("loss", "shape", "mode", "backend"), cases(shapes=HALF_SHAPES, modes=HALF_MODES)
)
def test_half_precision(loss: Loss, shape: tuple[int, int, int], mode: Mode, backend: str) -> None:
    check_loss(loss, problem(*shape), mode, backend, reduction="none")


@pytest.mark.parametrize(
    ("loss", "shape", "mode", "backend"),
    cases(losses=(ARCFACE,), shapes=HALF_SHAPES, modes=MIXED_MODES),
)
def test_mixed_with_double(
    loss: Loss, shape: tuple[int, int, int], mode: Mode, backend: str
) -> None:
    check_loss(loss, problem(*shape), mode, backend, reduction="none")


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_results(mode: Mode, backend: str) -> None:
    device = device_of(backend)
    given = problem(5, 6, 8)
    x, w = given.leaves(mode, device)
    with mode.context(device):
        loss = fmf.arcface(x, w, given.labels.to(device), backend=backend)
        lse, u = fmf.cosine_lse(x, w, given.labels.to(device), 30.0, backend=backend)
    assert {loss.dtype, lse.dtype, u.dtype} == {mode.accumulate}
    (loss + lse.sum() + u.sum()).backward()
    assert x.grad is not None
    assert w.grad is not None
    assert (x.grad.dtype, w.grad.dtype) == (mode.embeddings, mode.weight)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions(backend: str, reduction: str) -> None:
    given = problem(33, 40, 20)
    for loss in (ARCFACE, COSFACE):
        check_loss(loss, given, FP32, backend, reduction=reduction)
    labels = given.labels.clone()
    labels[::3] = 7
    ignored = dataclasses.replace(given, labels=labels)
    for ignore_index in (7, -100):
        check_loss(ARCFACE, ignored, FP32, backend, reduction=reduction, ignore_index=ignore_index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_in_none(backend: str) -> None:
    given = problem(20, 12, 9)
    labels = given.labels.clone()
    labels[::4] = -100
    given = dataclasses.replace(given, labels=labels)
    check_loss(ARCFACE, given, FP32, backend, reduction="none")
    assert bool((run(ARCFACE, given, FP32, backend, reduction="none").value[::4] == 0).all())


# --- scales and margins ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 16.0, 30.0, 80.0, 88.0, 120.0, 220.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales(backend: str, scale: float) -> None:
    modes = (FP32, FP64) if backend != "triton" or scale in (1.0, 220.0) else (FP32,)
    for mode in modes:
        for loss in (arcface(scale=scale), normalized_softmax(scale)):
            check_loss(loss, problem(9, 40, 20), mode, backend, reduction="none")


@pytest.mark.parametrize("boundary", ["linear", "continuous", "none"])
@pytest.mark.parametrize("margin", [-0.4, 0.0, 0.2, 1.3, 2.0, math.pi])
@pytest.mark.parametrize("backend", BACKENDS)
def test_angular_margins(backend: str, margin: float, boundary: str) -> None:
    check_loss(
        arcface(margin=margin, boundary=boundary), problem(20, 12, 4), FP32, backend,
        reduction="none",
    )  # fmt: skip


@pytest.mark.parametrize("margin", [-0.2, 0.0, 0.35, 1.9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cosine_margins(backend: str, margin: float) -> None:
    check_loss(cosface(margin=margin), problem(20, 12, 4), FP32, backend, reduction="none")


# --- strides --------------------------------------------------------------------------------------


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


def _every_other_column(tensor: torch.Tensor) -> torch.Tensor:
    wide = tensor.new_full((tensor.shape[0], 2 * tensor.shape[1]), math.nan)
    wide[:, ::2] = tensor
    return wide[:, ::2]


def _every_other_row(tensor: torch.Tensor) -> torch.Tensor:
    tall = tensor.new_full((2 * tensor.shape[0], tensor.shape[1]), math.nan)
    tall[1::2] = tensor
    return tall[1::2]


def _inside(tensor: torch.Tensor) -> torch.Tensor:
    frame = tensor.new_full((tensor.shape[0] + 2, tensor.shape[1] + 5), math.nan)
    frame[1:-1, 3:-2] = tensor
    return frame[1:-1, 3:-2]


def _expanded_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1].clone().expand(tensor.shape)


def _expanded_columns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :1].clone().expand(tensor.shape)


LAYOUTS = (
    _transposed, _every_other_column, _every_other_row, _inside, _expanded_rows, _expanded_columns,
)  # fmt: skip


def _with_layouts(given: Problem, layout_x: Layout, layout_w: Layout) -> Problem:
    """``given`` with other strides, its values those that the layout can hold."""
    return dataclasses.replace(
        given,
        x=layout_x(given.x).contiguous(),
        w=layout_w(given.w).contiguous(),
        layout_x=layout_x,
        layout_w=layout_w,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str, layout: Layout) -> None:
    given = problem(7, 40, 21)
    modes = (FP32,) if backend == "triton" else (FP32, HALF_MODES[0], MIXED_MODES[0])
    for mode in modes:
        for strided in (
            _with_layouts(given, layout, torch.Tensor.contiguous),
            _with_layouts(given, torch.Tensor.contiguous, layout),
        ):
            check_loss(NORMALIZED_SOFTMAX, strided, mode, backend, reduction="none")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_labels_and_upstream(backend: str) -> None:
    given = problem(8, 12, 5)
    labels = given.labels.repeat_interleave(3)[::3]
    assert labels.stride() == (3,)
    check_loss(ARCFACE, dataclasses.replace(given, labels=labels), FP32, backend, reduction="none")
    one_label = dataclasses.replace(given, labels=given.labels[:1].expand(8))
    check_loss(ARCFACE, one_label, FP32, backend, reduction="none")
    wide = given.upstream.repeat_interleave(3)[::3]
    check_loss(ARCFACE, dataclasses.replace(given, upstream=wide), FP32, backend, reduction="none")


# --- the edges of the domain ----------------------------------------------------------------------


def _with_zero_rows(given: Problem) -> Problem:
    """A zero row in x, in W, and one on both sides of a target cosine."""
    x, w, labels = given.x.clone(), given.w.clone(), given.labels.clone()
    x[0] = 0.0
    w[1] = 0.0
    x[2], w[int(labels[2])] = 0.0, 0.0
    labels[3] = 1
    return dataclasses.replace(given, x=x, w=w, labels=labels)


@pytest.mark.parametrize("loss", [ARCFACE, COSFACE], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows(backend: str, loss: Loss) -> None:
    given = _with_zero_rows(problem(7, 12, 20))
    for mode in (FP32, FP64):
        check_loss(loss, given, mode, backend, reduction="none")


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # interpreter
@pytest.mark.parametrize("mode", HALF_MODES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_in_half_precision(backend: str, mode: Mode) -> None:
    # 1 / 1e-12 overflows fp16: a zero row's gradient is then infinite, and no other row's is
    given = _with_zero_rows(problem(7, 12, 20))
    actual = run(ARCFACE, given, mode, backend, reduction="none")
    assert bool(actual.value.isfinite().all())
    assert not bool(actual.d_x.isnan().any())
    assert not bool(actual.d_w.isnan().any())
    assert bool(actual.d_x[given.x.norm(dim=1) > 0].isfinite().all())
    assert bool(actual.d_w[given.w.norm(dim=1) > 0].isfinite().all())


@pytest.mark.parametrize("loss", [*LOSSES, arcface(margin=-0.5)], ids=str)
@pytest.mark.parametrize("mode", [FP32, FP64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parallel_and_antiparallel(backend: str, mode: Mode, loss: Loss) -> None:
    given = problem(12, 9, 16)
    x = given.x.clone()
    factor = torch.tensor([3.0, -0.2, 1.0, -1.0, 250.0, -250.0], dtype=torch.float64)
    x[:6] = given.w[given.labels[:6]] * factor[:, None]
    given = dataclasses.replace(given, x=x)
    actual = run(loss, given, mode, backend, reduction="none")
    for part in actual:
        assert bool(part.isfinite().all())
    check_loss(loss, given, mode, backend, reduction="none")


@pytest.mark.parametrize("power", [-15, 15])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_and_huge_norms(backend: str, power: int) -> None:
    given = problem(7, 12, 20)
    factor = 10.0 ** (power / 3)
    scaled = dataclasses.replace(given, x=given.x * factor, w=given.w / factor)
    check_loss(ARCFACE, scaled, FP32, backend, reduction="none")


# --- the primitive --------------------------------------------------------------------------------


def _lse_results(
    given: Problem, mode: Mode, backend: str | None, scale: float, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """lse, u and the gradients by x, W and s of a random combination; eager for no backend."""
    device = torch.device("cpu") if backend is None else device_of(backend)
    x, w = given.leaves(mode, device, dtype)
    s = torch.tensor(scale, dtype=dtype or mode.accumulate, device=device, requires_grad=True)
    labels, upstream = given.labels.to(device), given.upstream.to(device)
    with mode.context(device):
        if backend is None:
            lse, u = eager_cosine_lse(x, w, labels, s)
        else:
            lse, u = fmf.cosine_lse(x, w, labels, s, backend=backend)
    total = (lse * upstream.to(lse) - u * upstream.flip(0).to(u)).sum()
    gradients = torch.autograd.grad(total, (x, w, s))
    return tuple(part.detach().cpu().double() for part in (lse, u, *gradients))


LSE_CASES = [
    (mode, shape)
    for mode in (FP32, FP64, *HALF_MODES)
    for shape in ((1, 2, 4), (9, 150, 70), (64, 7, 130))
    if shape[0] > 1 or mode not in HALF_MODES
]


@pytest.mark.parametrize(("mode", "shape"), LSE_CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cosine_lse(backend: str, shape: tuple[int, int, int], mode: Mode) -> None:
    """Root mean square errors of lse, u and three gradients; every fourth row has no target."""
    given = problem(*shape)
    labels = given.labels.clone()
    outside = torch.tensor([-1, shape[1], shape[1] + 3, -100])
    labels[::4] = outside.repeat(len(labels))[: len(labels[::4])]
    given = dataclasses.replace(given, labels=labels)
    scale = 30.0
    actual = _lse_results(given, mode, backend, scale)
    expected = _lse_results(given, mode, "reference", scale, torch.float64)
    eager = _lse_results(given, mode, None, scale)
    eps = torch.finfo(mode.accumulate).eps
    roundings = (eps, eps, torch.finfo(mode.embeddings).eps, torch.finfo(mode.weight).eps, eps)
    # one number that sums over rows may be right by luck; roundings of cosines add in quadrature
    compute = torch.finfo(mode.autocast or mode.embeddings).eps * float(given.upstream.norm())
    extra = (0.0, 0.0, 0.0, 0.0, compute)
    for got, want, careful, rounding, more in zip(
        actual, expected, eager, roundings, extra, strict=True
    ):
        floor = (rounding + 4.0 * scale * eps) * float(want.norm()) + more
        assert float((got - want).norm()) <= 2.0 * float((careful - want).norm()) + floor
    assert bool((actual[1][::4] == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_cosine_lse_of_one_other_class(backend: str) -> None:
    # with C = 2 the log-sum-exp is s times the other class's cosine, whatever its size
    device = device_of(backend)
    x = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]], device=device)
    w = torch.tensor([[2.0, 0.0], [0.0, 5.0]], device=device)
    labels = torch.tensor([1, 1, 1], device=device)
    lse, u = fmf.cosine_lse(x, w, labels, 220.0, backend=backend)
    torch.testing.assert_close(lse.cpu(), torch.tensor([220.0, 0.0, -220.0]))
    torch.testing.assert_close(u.cpu(), torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_margin_and_scale_equal_floats(backend: str) -> None:
    given = problem(9, 20, 12)
    device = device_of(backend)
    margin = torch.full((9,), 0.3, dtype=torch.float64, device=device)
    scale = torch.tensor(24.0, dtype=torch.float64, device=device)
    for loss in (arcface(0.3, 24.0), arcface(0.3, 24.0, "continuous"), cosface(0.3, 24.0)):
        expected = run(loss, given, FP64, backend, reduction="none")
        for arguments in ({"margin": margin}, {"scale": scale}, {"margin": margin, "scale": scale}):
            actual = run(loss.with_arguments(**arguments), given, FP64, backend, reduction="none")
            for got, want in zip(actual, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


# --- can these tolerances fail? -------------------------------------------------------------------


def _drop_class(given: Problem) -> Problem:
    """``given`` without its hardest class: an unused one that is moved where nobody sees it."""
    unused = sorted(set(range(len(given.w))) - set(given.labels.tolist()))
    w = given.w.clone()
    w[unused[0]] = w[unused[1]]
    return dataclasses.replace(given, w=w)


@pytest.mark.parametrize("mode", [FP32, *HALF_MODES[:4]], ids=str)
def test_tolerances_reject_known_errors(mode: Mode) -> None:
    given = problem(33, 100, 64)
    options: dict[str, Any] = {"reduction": "none"}
    expected = yardstick(ARCFACE, given, mode, **options)
    eager = run_eager(ARCFACE, given, mode, **options)
    unit = sizes(ARCFACE, given, mode, **options)
    exact = run(ARCFACE, given, mode, "reference", **options)

    def check(wrong: Result) -> None:
        assert_close(wrong, expected, [eager], unit, mode)

    def replaced(**parts: torch.Tensor) -> Result:
        return exact._replace(**parts)

    check(exact)
    margin_error = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 0.1}[mode.embeddings]
    target_only = _target_part(given, mode)
    swapped = exact.d_w.clone()
    swapped[[0, 1]] = exact.d_w[[1, 0]]
    wrong = {
        "margin": run(arcface(margin=0.5 + margin_error), given, mode, "reference", **options),
        "scale": run(arcface(scale=64.0 * (1 + margin_error)), given, mode, "reference", **options),
        "class dropped": run(ARCFACE, _drop_class(given), mode, "reference", **options),
        "upstream of the first row for all": run(
            ARCFACE, dataclasses.replace(given, upstream=given.upstream[:1].expand(33)), mode,
            "reference", **options,
        ),
        "target's gradient lost in d_w": replaced(d_w=exact.d_w - target_only.d_w),
        "target's gradient lost in d_x": replaced(d_x=exact.d_x - target_only.d_x),
        "a row never written": replaced(d_x=exact.d_x.index_fill(0, torch.tensor(4), math.nan)),
        "two classes exchanged": replaced(d_w=swapped),
        "a loss of one row lost": replaced(value=exact.value.index_fill(0, torch.tensor(4), 0.0)),
    }  # fmt: skip
    for name, result in wrong.items():
        try:
            check(result)
        except AssertionError:
            continue
        pytest.fail(f"not noticed: {name}")


def _target_part(given: Problem, mode: Mode) -> Result:
    """What the gradient of the target cosine contributes, by cosine_lse's second output."""

    def call(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        lse, u = fmf.cosine_lse(x, w, labels, 64.0, backend="reference")
        logit = 64.0 * (u * math.cos(0.5) - (1 - u * u).clamp_min(1e-5).sqrt() * math.sin(0.5))
        return -torch.nn.functional.logsigmoid(logit - lse.detach())

    return evaluate(call, given, mode, torch.device("cpu"))
