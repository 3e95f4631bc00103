"""`torch.compile` without graph breaks, and `torch.library.opcheck` on every operator."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import FUSED_BACKENDS as EVERY_WAY
from helpers import device_of, needs_triton
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch._aot_autograd.utils import make_boxed_func

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import _ops
from fused_margin._arguments import PLAIN, Extras

# Dynamo itself instantiates an autograd.Function it traces (torch 2.13).
pytestmark = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"
)

# A graph doesn't depend on which of the CPU backend's ways its operators go.
BACKENDS = ("reference", "cpu", pytest.param("triton", marks=needs_triton))
FUSED_BACKENDS = BACKENDS[1:]

CLASSES, DIM = 11, 5
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "arcface": fmf.arcface,
    "arcface-options": lambda x, w, y, **kw: fmf.arcface(
        x, w, y, 0.3, 20.0, boundary="continuous", grad="straight_through", reduction="sum", **kw
    ),
    "cosface": fmf.cosface,
    "fixed_adacos": fmf.fixed_adacos,
    "normalized_softmax": lambda x, w, y, **kw: fmf.normalized_softmax(x, w, y, 20.0, **kw),
    "cosine_lse": lambda x, w, y, **kw: torch.stack(fmf.cosine_lse(x, w, y, 20.0, **kw)).sum(),
    "tensor scale": lambda x, w, y, **kw: fmf.arcface(
        x, w, y, 0.3, torch.tensor(20.0, device=x.device), **kw
    ),
    "tensor margin": lambda x, w, y, **kw: fmf.arcface(x, w, y, x[:, 0].detach().abs(), **kw),
    "none": lambda x, w, y, **kw: fmf.arcface(x, w, y, reduction="none", **kw).square().sum(),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def _batch(rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(CLASSES, (rows,))
    labels[0] = -100
    x = torch.randn(rows, DIM, device=device, requires_grad=True)
    return x, labels.to(device)


def _check(
    compiled: Callable[..., Any], eager: Callable[..., Any], w: torch.Tensor, rows: int
) -> None:
    x, labels = _batch(rows, w.device)
    inputs = (x, w)
    got, want = compiled(x, w, labels), eager(x, w, labels)
    torch.testing.assert_close(got, want)
    for actual, expected in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_functions(backend: str, name: str) -> None:
    """Fixed shapes first, then any batch size in one graph."""

    def eager(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labels = labels if name != "cosine_lse" else labels.clamp_min(0)
        return FUNCTIONS[name](x, w, labels, backend=backend)

    w = torch.randn(CLASSES, DIM, device=device_of(backend), requires_grad=True)
    _check(torch.compile(eager, backend="aot_eager", fullgraph=True), eager, w, 4)
    torch._dynamo.reset()
    dynamic = torch.compile(eager, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (4, 7, 3):
            _check(dynamic, eager, w, rows)


@pytest.mark.parametrize(
    "make",
    [
        fm.ArcFaceLoss, fm.CosFaceLoss, fm.FixedAdaCosLoss, fm.NormalizedSoftmaxLoss,
        lambda c, d, **kw: fm.CombinedMarginLoss(c, d, 1.1, 0.3, 0.2, **kw),
        lambda c, d, **kw: fm.ArcFaceLoss(c, d, torch.linspace(0.1, 0.5, CLASSES), **kw),
        lambda *args, **kw: fm.ArcFaceLoss(*args, reduction="none", **kw),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_modules(backend: str, make: Callable[..., torch.nn.Module]) -> None:
    criterion = make(CLASSES, DIM, backend=backend).to(device_of(backend))
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 8):
        x, labels = _batch(rows, device_of(backend))
        torch.testing.assert_close(compiled(x, labels), criterion(x, labels))
        compiled(x, labels).sum().backward()


@pytest.mark.parametrize("budget", [300, 4000])
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_memory_budget_in_one_graph(backend: str, budget: int) -> None:
    """Whether a batch's cosines fit the budget or not, it is one graph."""

    def eager(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return fmf.arcface(x, w, labels, backend=backend, memory_budget=budget)

    w = torch.randn(CLASSES, DIM, device=device_of(backend), requires_grad=True)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (4, 70, 2):
            _check(compiled, eager, w, rows)


@pytest.mark.parametrize("budget", [None, 300, 4000])
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_export_for_any_batch_size(backend: str, budget: int | None) -> None:
    """Nothing that depends on the number of rows may bound it; the exported loss has gradients."""
    device = device_of(backend)
    criterion = fm.ArcFaceLoss(CLASSES, DIM, backend=backend, memory_budget=budget).to(device)
    rows = torch.export.Dim("rows")
    exported = torch.export.export(
        criterion, _batch(7, device), dynamic_shapes=({0: rows}, {0: rows}), strict=False
    )
    (bounds,) = exported.range_constraints.values()
    assert bounds.lower <= 2
    assert bounds.upper > 1 << 40
    module = exported.module()
    for count in (2, 70):
        x, labels = _batch(count, device)
        got, want = module(x, labels), criterion(x, labels)
        torch.testing.assert_close(got, want)
        (d_x,) = torch.autograd.grad(got, x)
        torch.testing.assert_close(d_x, torch.autograd.grad(want, x)[0])


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_autocast_is_compiled(backend: str) -> None:
    criterion = fm.ArcFaceLoss(CLASSES, DIM, backend=backend).to(device_of(backend))
    device = device_of(backend)

    def eager(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return criterion(x, labels)

    x, labels = _batch(6, device)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, labels), eager(x, labels), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_out_of_range_survive_compile(backend: str) -> None:
    if device_of(backend).type != "cpu":
        pytest.skip("on a GPU a label out of range makes its row NaN (test_gpu.py)")
    criterion = fm.ArcFaceLoss(CLASSES, DIM, backend=backend)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    x, labels = _batch(4, torch.device("cpu"))
    compiled(x, labels)
    labels[2] = CLASSES
    with pytest.raises(ValueError, match=r"labels\[2\] is 11 "):
        compiled(x, labels)


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None,
    reason="Inductor needs a C++ compiler",
)
def test_inductor() -> None:
    """A model, the loss and the optimiser's gradients, compiled together."""
    model = torch.nn.Sequential(torch.nn.Linear(3, DIM), torch.nn.Tanh())
    criterion = fm.ArcFaceLoss(CLASSES, DIM)
    parameters = [*model.parameters(), *criterion.parameters()]

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return criterion(model(images), labels)

    compiled = torch.compile(step, fullgraph=True)
    images, (_, labels) = torch.randn(6, 3), _batch(6, torch.device("cpu"))
    got, want = compiled(images, labels), step(images, labels)
    torch.testing.assert_close(got, want)
    for actual, expected in zip(
        torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_transposed_embeddings(backend: str) -> None:
    """The gradient has the strides that the operator's fake promises, whatever those of x."""
    device = device_of(backend)
    x = torch.randn(DIM, 6, device=device).t().requires_grad_()
    w = torch.randn(CLASSES, DIM, device=device, requires_grad=True)
    labels = torch.randint(CLASSES, (6,), device=device)

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return fmf.arcface(x * 1.0, w, labels, backend=backend)

    expected = torch.autograd.grad(call(x, w), (x, w))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(x, w), (x, w))
    torch.testing.assert_close(actual, expected)


# --- opcheck --------------------------------------------------------------------------------------

OPS = torch.ops.fused_margin


def _arguments(backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = device_of(backend)
    x = torch.randn(4, DIM, dtype=dtype, device=device, requires_grad=True)
    w = torch.randn(CLASSES, DIM, dtype=dtype, device=device, requires_grad=True)
    return x, w, torch.tensor([3, 0, -1, 10], device=device)


@pytest.mark.cpu_ahead
@pytest.mark.parametrize("name", ["arcface", "margin_softmax"])
def test_steps_of_compiled_code_that_could_lend(name: str) -> None:
    """From the second on it has inputs that require gradients, and autograd is off."""

    def eager(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if name == "arcface":
            return fmf.arcface(x, w, labels, scale=16.0)
        return fmf.margin_softmax(x, w, labels, lambda u: u - 0.2, 16.0)

    w = torch.randn(CLASSES, DIM, requires_grad=True)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        _check(compiled, eager, w, 4)


@pytest.mark.usefixtures("poison")  # bytes of `kept` beyond what is used are the same each time
@pytest.mark.parametrize("budget", [0, -1, 1 << 20])
@pytest.mark.parametrize("with_tensor_scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_opcheck_cosine_lse(
    backend: str, dtype: torch.dtype, with_tensor_scale: bool, budget: int
) -> None:
    x, w, labels = _arguments(backend, dtype)
    scale = torch.tensor(9.0, device=x.device, requires_grad=True) if with_tensor_scale else None
    numbers = torch.tensor([9.0], dtype=torch.float64)
    arguments = (x, w, labels, numbers, scale, *PLAIN, dtype, backend, budget)
    torch.library.opcheck(OPS.cosine_lse.default, arguments)


def _extras(x: torch.Tensor, centers: int) -> Extras:
    """Everything that a sweep can be asked for."""
    rows = torch.linspace(-0.1, 0.1, len(x), device=x.device)
    phi = torch.tensor([0.1, 0.3, 0.8, 0.3, 1.6, 1.0], dtype=torch.float64, device=x.device)
    return Extras(rows, phi, rows, None, centers, True)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_opcheck_of_extras(backend: str, centers: int) -> None:
    x, w, labels = _arguments(backend, torch.float32)
    w = w[: len(w) // centers * centers].detach().requires_grad_()
    numbers = torch.tensor([9.0], dtype=torch.float64)
    scale = torch.tensor(9.0, device=x.device, requires_grad=True)
    for extras in (_extras(x, centers), Extras(centers=centers, has_total=True)):
        arguments = (x, w, labels, numbers, scale, *extras, torch.float32, backend, -1)
        torch.library.opcheck(OPS.cosine_lse.default, arguments)
        swept = OPS.cosine_lse(*(None if a is None else a for a in arguments))
        lse, u, inv_x, inv_w, kept, total, class_sum, *_ = (part.detach() for part in swept)
        omega = class_sum if len(class_sum) else None
        backward = (
            torch.randn_like(lse), torch.randn_like(u), None, None, torch.randn_like(total),
            x.detach(), w.detach(), labels, numbers, scale.detach(), *extras, torch.float32,
            backend, lse, u, inv_x, inv_w, kept, omega, True, True, True,
        )  # fmt: skip
        torch.library.opcheck(OPS.cosine_lse_backward.default, backward)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_opcheck_margin_ce(backend: str, reduction: str) -> None:
    x, w, labels = _arguments(backend, torch.float32)
    numbers = torch.tensor([9.0, 0.877, 0.479, -0.877, 0.24], dtype=torch.float64)
    torch.library.opcheck(
        OPS.margin_ce.default,
        (x, w, labels, numbers, False, reduction, -1, torch.float32, backend, -1),
    )


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_opcheck_backward(backend: str, needs: tuple[bool, bool, bool]) -> None:
    """All but its autograd test: the operator refuses to be differentiated."""
    x, w, labels = (part.detach() for part in _arguments(backend, torch.float32))
    scale = torch.tensor(9.0, device=x.device)
    numbers = torch.tensor([1.0], dtype=torch.float64)
    lse, u, inv_x, inv_w, kept, *_ = OPS.cosine_lse(
        x, w, labels, numbers, scale, *PLAIN, torch.float32, backend, 1 << 20
    )
    arguments = (
        torch.randn_like(lse), torch.randn_like(u), None, None, None, x, w, labels, numbers, scale,
        *PLAIN, torch.float32, backend, lse, u, inv_x, inv_w, kept, None, *needs,
    )  # fmt: skip
    torch.library.opcheck(OPS.cosine_lse_backward.default, arguments)


@pytest.mark.parametrize("scale", [9.0, 800.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", EVERY_WAY)
def test_outputs_are_as_the_fakes_say(backend: str, dtype: torch.dtype, scale: float) -> None:
    """Their dtypes and strides, by which compiled code reads them, with transposed inputs too."""
    x, w, labels = _arguments(backend, dtype)
    x, w = (part.detach().t().contiguous().t() for part in (x, w))
    numbers = torch.tensor([scale], dtype=torch.float64)
    arguments = (x, w, labels, numbers, None, *PLAIN, dtype, backend, 1 << 20)
    torch.library.opcheck(OPS.cosine_lse.default, arguments, test_utils="test_faketensor")
    swept = OPS.cosine_lse(*arguments)
    arguments = (
        torch.randn_like(swept[0]), torch.randn_like(swept[1]), None, None, None, x, w, labels,
        numbers, None, *PLAIN, dtype, backend, *swept[:5], None, True, True, False,
    )  # fmt: skip
    torch.library.opcheck(OPS.cosine_lse_backward.default, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_opcheck_check_labels(dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 3, 100, 7], dtype=dtype)
    torch.library.opcheck(OPS.check_labels.default, (labels, 10, 100))


# --- what a graph may not depend on ---------------------------------------------------------------

SCHEDULES: dict[str, tuple[Callable[..., Any], list[tuple[float, ...]]]] = {
    "arcface": (fmf.arcface, [(0.5 * i / 12, 20.0 + i) for i in range(12)]),
    "combined, all three": (
        fmf.combined_margin,
        [(1.0 + i / 20, i / 40, 0.3 - i / 50) for i in range(1, 12)],
    ),
    "sphereface": (fmf.sphereface, [(1.05 + i / 10, 20.0 + i) for i in range(12)]),
    "adaface": (fmf.adaface, [(0.05 + i / 40, 20.0 + i) for i in range(12)]),
    "magface": (fmf.magface, [(0.05 + i / 40, 0.6 + i / 40) for i in range(12)]),
    "easy": (
        lambda x, w, y, m, **kw: fmf.arcface(x, w, y, m, boundary="easy", **kw),
        [(0.05 + i / 40,) for i in range(12)],
    ),
    "arcface, margin alone": (fmf.arcface, [(0.05 + i / 30,) for i in range(12)]),
    "cosface": (fmf.cosface, [(0.4 * i / 12, 64.0 - i) for i in range(12)]),
    "normalized_softmax": (fmf.normalized_softmax, [(10.0 + i,) for i in range(12)]),
    "cosine_lse": (
        lambda *args, **kw: torch.stack(fmf.cosine_lse(*args, **kw)).sum(),
        [(10.0 + i / 2,) for i in range(12)],
    ),
    "cosine_logits": (
        lambda x, w, labels, s, backend: fmf.cosine_logits(x, w, s).sum(),
        [(10.0 + i / 2,) for i in range(12)],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_compiles_twice(backend: str, name: str) -> None:
    """Once for the first numbers, and once for all others."""
    device = device_of(backend)
    x, w, labels = (part.to(device) for part in (torch.randn(6, DIM), torch.randn(CLASSES, DIM),
                                                 torch.randint(CLASSES, (6,))))  # fmt: skip
    x.requires_grad_()
    function, numbers = SCHEDULES[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for values in numbers:
        got = compiled(x, w, labels, *values, backend=backend)
        torch.testing.assert_close(got, function(x, w, labels, *values, backend=backend))
        torch.autograd.grad(got, x)
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_of_a_module_compiles_twice(backend: str) -> None:
    criterion = fm.ArcFaceLoss(CLASSES, DIM, backend=backend).to(device_of(backend))
    x, labels = _batch(6, device_of(backend))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    for epoch in range(12):
        criterion.margin, criterion.scale = 0.5 * epoch / 12, 30.0 + epoch
        torch.testing.assert_close(compiled(x, labels), criterion(x, labels))
    assert counter.frame_count == 2


class _Around(torch.nn.Module):
    """A module that has another."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.inner(x, labels)


# What sees to it that a module's integers may vary: not where Dynamo meets it as a global.
REACHED: dict[str, Callable[..., Any]] = {
    "itself": lambda criterion, compiled: compiled(criterion),
    "in another": lambda criterion, compiled: compiled(_Around(criterion)),
    "closure": lambda criterion, compiled: compiled(lambda x, y: criterion(x, y)),
    "argument": lambda criterion, compiled: functools.partial(
        compiled(lambda module, x, y: module(x, y)), criterion
    ),
}


@pytest.mark.parametrize("reached", REACHED)
@pytest.mark.parametrize("name", ["memory_budget", "ignore_index"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_of_integers_compiles_twice(backend: str, name: str, reached: str) -> None:
    criterion = fm.ArcFaceLoss(CLASSES, DIM, backend=backend).to(device_of(backend))
    counter = CompileCounterWithBackend("aot_eager")
    call = REACHED[reached](criterion, lambda f: torch.compile(f, backend=counter, fullgraph=True))
    x, labels = _batch(6, device_of(backend))
    for epoch in range(12):
        value = 100 * epoch + 50 if name == "memory_budget" else -100 - epoch
        setattr(criterion, name, value)
        if name == "ignore_index":
            labels[0] = value
        got, want = call(x, labels), criterion(x, labels)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["memory_budget", "ignore_index"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_of_a_function_compile_twice(backend: str, name: str) -> None:
    x, labels = _batch(6, device_of(backend))
    w = torch.randn(CLASSES, DIM, device=x.device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fmf.cosface, backend=counter, fullgraph=True)
    for epoch in range(12):
        options: dict[str, Any] = {"ignore_index": -100, name: 50 + 100 * epoch}
        labels[0] = options["ignore_index"]
        got = compiled(x, w, labels, backend=backend, **options)
        torch.testing.assert_close(got, fmf.cosface(x, w, labels, backend=backend, **options))
        torch.autograd.grad(got, x)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("boundary", ("continuous", "none", "linear")), ("grad", ("straight_through", "exact")),
        ("reduction", ("sum", "none", "mean")), ("backend", ("reference", "cpu", "auto")),
        ("memory_budget", (0, None, 1, 2, 0)),
    ],
)  # fmt: skip
def test_a_schedule_of_everything_else(name: str, values: tuple[Any, ...]) -> None:
    """What is not a number compiles once for each of its few values."""
    criterion = fm.ArcFaceLoss(CLASSES, DIM)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    x, labels = _batch(6, torch.device("cpu"))
    for value in (getattr(criterion, name), *values):
        setattr(criterion, name, value)
        torch.testing.assert_close(compiled(x, labels), criterion(x, labels))


class _OwnMargin(fm.MarginSoftmaxLoss):
    """A margin that nothing in the package has."""

    def psi(self, embeddings: torch.Tensor, labels: torch.Tensor) -> fmf.Psi:
        return lambda u: 2.0 * u * u.abs() - 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_margin_of_ones_own(backend: str) -> None:
    criterion = _OwnMargin(CLASSES, DIM, backend=backend).to(device_of(backend))
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    x, labels = _batch(6, device_of(backend))
    rows = torch.export.Dim("rows")
    exported = torch.export.export(
        criterion, (x, labels), dynamic_shapes=({0: rows}, {0: rows}), strict=False
    )
    for scale in (30.0, 20.0, 10.0):
        criterion.scale = scale
        got, want = compiled(x, labels), criterion(x, labels)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))
    x, labels = _batch(9, device_of(backend))
    criterion.scale = 64.0
    torch.testing.assert_close(exported.module()(x, labels), criterion(x, labels))


class _Step(torch.nn.Module):
    """A model that returns its loss."""

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, DIM)
        self.criterion = fm.ArcFaceLoss(num_classes, DIM, **options)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.criterion(self.linear(images), labels)


def _images(rows: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3), torch.randint(num_classes, (rows,))


@pytest.mark.parametrize("memory_budget", [None, 0, 1 << 20])
@pytest.mark.parametrize("num_classes", [CLASSES, 100_000])
@pytest.mark.parametrize("dim", ["Dim", "AUTO", "DYNAMIC"])
def test_export_with_a_dynamic_batch(dim: str, num_classes: int, memory_budget: int | None) -> None:
    """What is kept for the backward puts no constraint on N."""
    Dim = torch.export.Dim
    rows = Dim("rows", min=2, max=4096) if dim == "Dim" else getattr(Dim, dim)
    step = _Step(num_classes, memory_budget=memory_budget)
    exported = torch.export.export(
        step, _images(8, num_classes), dynamic_shapes=({0: rows}, {0: rows})
    )
    module = exported.module()
    for count in (3, 8, 400):
        batch = _images(count, num_classes)
        torch.testing.assert_close(module(*batch), step(*batch))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")  # is deprecated: torch 2.13, 2.14
# sizes are constants of a trace, as of any model that checks them
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")
@pytest.mark.filterwarnings("ignore:torch.(from_numpy|tensor) results are registered as constants")
@pytest.mark.parametrize("memory_budget", [None, 1000])
def test_trace(memory_budget: int | None) -> None:
    """TorchScript compares a trace with one made without gradients; so does TensorBoard's graph."""
    _ops._kept_numbers.cache_clear()  # as in a process that has computed no loss yet
    step = _Step(CLASSES, memory_budget=memory_budget)
    traced: Any = torch.jit.trace(step, _images(8, CLASSES))
    for rows in (8, 5):
        batch = _images(rows, CLASSES)
        got, want = traced(*batch), step(*batch)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, list(step.parameters())),
            torch.autograd.grad(want, list(step.parameters())),
        )


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_grad_mode_under_compile(backend: str) -> None:
    """Without gradients nothing is kept; with them what the graph was told."""
    criterion = fm.ArcFaceLoss(CLASSES, DIM, backend=backend, memory_budget=1 << 20)
    criterion = criterion.to(device_of(backend))
    budgets: list[int] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        budgets.extend(
            node.args[-1] for node in graph.graph.nodes if "margin_ce" in str(node.target)
        )
        return make_boxed_func(graph.forward)

    compiled = torch.compile(criterion, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    x, labels = _batch(6, device_of(backend))
    compiled(x, labels).backward()
    with torch.no_grad():
        compiled(x, labels)
    assert budgets == [1 << 20, 0]


def test_each_function_has_recompilations_of_its_own() -> None:
    """Each of them is compiled for two batch sizes in one process, where Dynamo allows eight."""
    torch.compiler.reset()
    weight = torch.randn(20, 4)

    def calls(x: torch.Tensor, labels: torch.Tensor) -> list[Callable[[], Any]]:
        return [
            lambda: fmf.arcface(x, weight, labels),
            lambda: fmf.cosface(x, weight, labels),
            lambda: fmf.fixed_adacos(x, weight, labels),
            lambda: fmf.normalized_softmax(x, weight, labels, 16.0),
            lambda: fmf.margin_softmax(x, weight, labels, fm.margins.NO_MARGIN, 16.0),
            lambda: fmf.cosine_lse(x, weight, labels, 16.0),
        ]

    for index in range(6):

        def call(x: torch.Tensor, labels: torch.Tensor, index: int = index) -> Any:
            return calls(x, labels)[index]()

        compiled = torch.compile(call, backend="eager", fullgraph=True)
        for num_rows in (8, 5):
            x, labels = torch.randn(num_rows, 4), torch.randint(20, (num_rows,))
            torch.testing.assert_close(compiled(x, labels), call(x, labels))
