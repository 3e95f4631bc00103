"""The memory of the weight's gradient, lent to the forward until the backward writes it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import importlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    FP32,
    FP64,
    HALF_MODES,
    Mode,
    ahead,
    arcface,
    check_loss,
    device_of,
    needs_triton,
    problem,
)
from torch.utils.checkpoint import checkpoint

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import _cpu, _loans
from fused_margin._arguments import TAKEN, Loan
from fused_margin._cpu import backend as cpu_backend
from fused_margin._cpu import sweep

Tensor = torch.Tensor
pytestmark = pytest.mark.usefixtures("poison")
ARCFACE = arcface(0.4, 16.0)
BF16, BF16_MASTER_FP32 = (mode for mode in HALF_MODES if mode.name in ("bf16", "bf16_master_fp32"))
each_backend = pytest.mark.parametrize(
    "backend", [pytest.param("cpu", marks=ahead), pytest.param("triton", marks=needs_triton)]
)
# rows of d_w longer than those of exponentials, as long, shorter; odd; within a block and beyond;
# longer than a tile
SHAPES = (
    (7, 33, 24), (16, 33, 16), (33, 150, 24), (5, 41, 3), (48, 70, 17), (48, 150, 40),
    (48, 150, 80),
)  # fmt: skip
# the rounding of a few products in half precision does not average out over a small D
HALF_SHAPES = ((7, 33, 64), (130, 70, 65), (33, 150, 64), (130, 70, 144))


@pytest.fixture(autouse=True)
def lends(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Problems as small as these are lent memory, in small blocks."""
    for name in ("MIN_BLOCK", "MAX_BLOCK"):
        monkeypatch.setattr(sweep, name, 16)
    monkeypatch.setattr(importlib.import_module("fused_margin._triton.tiles"), "LEAST_AGAIN", 1)
    if getattr(request.node, "callspec", None) is None or "triton" not in str(request.node.name):
        yield
        return
    from fused_margin._triton import planning

    with planning.override("lent"):
        yield


@pytest.fixture
def loans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of d_w of the loans made so far."""
    made: list[int] = []
    lend = _loans.lend

    def noting(ctx: Any, w: Tensor, loan: Any) -> None:
        if loan is not None:
            made.append(loan.d_w.data_ptr())
        lend(ctx, w, loan)

    monkeypatch.setattr(_loans, "lend", noting)
    return made


def _leaves(backend: str, mode: Mode = FP32, shape: tuple[int, int, int] = SHAPES[0]) -> Any:
    given = problem(*shape)
    device = device_of(backend)
    x = given.x.to(device, mode.embeddings, copy=True).requires_grad_()
    w = given.w.to(device, mode.weight, copy=True).requires_grad_()
    return x, w, given.labels.to(device)


@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        *((mode, shape) for mode in (FP32, FP64) for shape in SHAPES),
        *((mode, shape) for mode in (BF16, BF16_MASTER_FP32) for shape in HALF_SHAPES),
    ],
    ids=str,
)
@each_backend
def test_gradients(loans: list[int], backend: str, shape: tuple[int, int, int], mode: Mode) -> None:
    check_loss(ARCFACE, problem(*shape), mode, backend, reduction="none")
    num_rows, _, dim = shape
    largest = 4 * (dim // 16 * 16) if dim <= 64 else dim // 16 * 16  # of whole tiles, or of rows
    if backend == "cpu" or num_rows <= largest:
        assert loans


@pytest.mark.parametrize("budget", [0, 20 * 48 * 4, 1 << 20])
@ahead
def test_what_does_not_fit_is_kept_on_top(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """Exponentials of 16 of 70 classes fit; with more memory further blocks, or all."""
    monkeypatch.setattr(cpu_backend, "KEPT_BYTES", budget)
    monkeypatch.setattr(cpu_backend, "LARGER_BLOCKS", 0)
    monkeypatch.setattr(cpu_backend, "KEPT_BYTES_PER_FURTHER_ROW", 0)
    formed: list[int] = []
    multiply = sweep.Sweep.multiply

    def noting(self: Any, block: Any, out: Tensor) -> Tensor:
        formed.append(block.start)
        return multiply(self, block, out)

    monkeypatch.setattr(sweep.Sweep, "multiply", noting)
    check_loss(ARCFACE, problem(48, 70, 17), FP32, "cpu", reduction="none")
    again = {0: [16, 32, 48, 64], 20 * 48 * 4: [32, 48, 64], 1 << 20: []}[budget]
    assert formed == [0, 16, 32, 48, 64, *again]


@pytest.mark.parametrize("is_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("function", ["margin_softmax", "cosine_lse"])
@each_backend
def test_the_functions_of_any_margin_lend_too(
    loans: list[int], backend: str, function: str, is_tensor: bool
) -> None:
    """On a GPU not if the scale is there: whether a shift is needed isn't known without waiting."""
    x, w, labels = _leaves(backend, FP64)
    scale: Any = 9.0
    if is_tensor:
        scale = torch.tensor(9.0, dtype=torch.float64, device=x.device, requires_grad=True)
    leaves = (x, w, scale) if is_tensor else (x, w)

    def value(backend: str) -> Tensor:
        if function == "margin_softmax":
            return fmf.margin_softmax(x, w, labels, lambda u: u - 0.2, scale, backend=backend)
        lse, u = fmf.cosine_lse(x, w, labels, scale, backend=backend)
        return (lse.sin() + u).sum()

    expected = torch.autograd.grad(value("reference"), leaves)
    actual = torch.autograd.grad(value(backend), leaves)
    assert len(loans) == (backend == "cpu" or not is_tensor)
    torch.testing.assert_close(actual, expected)


@needs_triton
@pytest.mark.parametrize("mode", [FP32, FP64, BF16, BF16_MASTER_FP32], ids=str)
@pytest.mark.parametrize("chunk_bytes", [1, 40 * 16 * 8, 1 << 20])
def test_rows_of_the_batch_that_d_w_cannot_hold(
    loans: list[int], monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, mode: Mode
) -> None:
    """Of 90 rows it has 80 or 32; exponentials of the others are formed again, chunk by chunk."""
    from fused_margin._triton import launch, planning

    monkeypatch.setattr(launch, "CHUNK_BYTES", chunk_bytes)
    found: list[tuple[int, int, int]] = []
    beyond = launch._beyond

    def noting(call: Any, left: Any, block: int) -> Any:
        for first, length, q in beyond(call, left, block):
            assert q is not None
            found.append((first, length, left.num_rows))
            yield first, length, q

    monkeypatch.setattr(launch, "_beyond", noting)
    with planning.override("lent"):
        check_loss(ARCFACE, problem(90, 150, 40), mode, "triton", reduction="none")
    assert loans
    assert {num_lent for *_, num_lent in found} == {80 if mode is BF16_MASTER_FP32 else 32}
    assert sum(length for _, length, _ in found) == 150 * len(loans)
    num_chunks = len(found) / len(loans)
    assert num_chunks == 1 if chunk_bytes == 1 << 20 else chunk_bytes > 1 or num_chunks > 2


@each_backend
def test_the_gradient_is_the_memory_lent(loans: list[int], backend: str) -> None:
    x, w, labels = _leaves(backend)
    fmf.arcface(x, w, labels, backend=backend).backward()
    assert w.grad is not None
    assert w.grad.data_ptr() == loans[0], "no copy"
    assert w.grad.is_contiguous()


@each_backend
@pytest.mark.parametrize("shape", [SHAPES[0], (33, 150, 24), (48, 150, 80)], ids=str)
def test_a_second_backward_forms_the_cosines_again(
    loans: list[int], shape: tuple[int, int, int], backend: str
) -> None:
    """The same bits come of it; the first one's gradient, and what it has become, is left alone."""
    x, w, labels = _leaves(backend, FP64, shape)
    loss = fmf.arcface(x, w, labels, backend=backend)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.mul_(3.0)
    second = torch.autograd.grad(loss, (x, w), retain_graph=True)
    third = torch.autograd.grad(loss, (x, w))
    assert len(loans) == 1
    for copy, *gradients in zip(copies, first, second, third, strict=True):
        assert torch.equal(gradients[0], 3.0 * copy)
        assert torch.equal(gradients[1], copy)
        assert torch.equal(gradients[2], copy)


@needs_triton
def test_a_backward_takes_what_was_left_whatever_is_chosen_by_then(
    loans: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `torch.set_float32_matmul_precision`, which chooses tiles that hold no rows."""
    from fused_margin._triton import launch, planning

    plan = planning.plan
    with planning.override("lent"):
        x, w, labels = _leaves("triton", FP64)
        loss = fmf.arcface(x, w, labels, backend="triton")
        without = dataclasses.replace(plan(x, w, torch.float64), lent=None)
        monkeypatch.setattr(launch, "plan", lambda *_: without)
        first = torch.autograd.grad(loss, (x, w), retain_graph=True)
        second = torch.autograd.grad(loss, (x, w))
    assert len(loans) == 1
    expected = torch.autograd.grad(fmf.arcface(x, w, labels, backend="reference"), (x, w))
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected)


@each_backend
def test_backward_with_create_graph_leaves_the_loan(loans: list[int], backend: str) -> None:
    """Its gradients, which refuse to be differentiated, are those of a plain backward."""
    x, w, labels = _leaves(backend, FP64)
    loss = fmf.arcface(x, w, labels, backend=backend)
    first = torch.autograd.grad(loss, (x, w), create_graph=True)
    second = torch.autograd.grad(loss, (x, w))
    assert second[1].data_ptr() == loans[0]
    torch.testing.assert_close(tuple(each.detach() for each in first), second)


@each_backend
def test_gradients_are_added_to(loans: list[int], backend: str) -> None:
    x, w, labels = _leaves(backend, FP64)
    expected = torch.autograd.grad(fmf.arcface(x, w, labels, backend="reference"), (x, w))
    for steps in range(1, 4):
        fmf.arcface(x, w, labels, backend=backend).backward()
        assert len(loans) == 1, "a gradient that is there may be about to be dropped"
        torch.testing.assert_close((x.grad, w.grad), tuple(steps * each for each in expected))
    w.grad = None
    fmf.arcface(x, w, labels, backend=backend).backward()
    assert len(loans) == 2


@each_backend
def test_one_loan_at_a_time(loans: list[int], backend: str) -> None:
    """Two losses of one weight: both right, the second without a loan; of two weights: two."""
    x, w, labels = _leaves(backend, FP64)
    other = w.detach().clone().requires_grad_()
    expected = torch.autograd.grad(fmf.arcface(x, w, labels, backend="reference"), (x, w))
    losses = [fmf.arcface(x, each, labels, backend=backend) for each in (w, w, other)]
    assert len(loans) == 2
    d_x, d_w, d_other = torch.autograd.grad(torch.stack(losses).sum(), (x, w, other))
    torch.testing.assert_close((d_x, d_w), (3.0 * expected[0], 2.0 * expected[1]))
    torch.testing.assert_close(d_other, expected[1])


@each_backend
def test_a_loss_that_is_dropped_gives_its_loan_back(loans: list[int], backend: str) -> None:
    x, w, labels = _leaves(backend)
    fmf.arcface(x, w, labels, backend=backend)
    loans.clear()
    gc.collect()
    fmf.arcface(x, w, labels, backend=backend)
    assert len(loans) == 1


@each_backend
def test_an_operator_called_by_itself_lends_nothing(loans: list[int], backend: str) -> None:
    """What it leaves for a backward is among its outputs, where anyone can look."""
    x, w, labels = _leaves(backend, FP64)
    numbers = torch.tensor([16.0, *fm.margins.additive(0.35)[:4]], dtype=torch.float64)
    loss, *_ = torch.ops.fused_margin.margin_ce(
        x, w, labels, numbers, False, "mean", -100, torch.float64, backend, -1
    )
    assert not loans
    actual = torch.autograd.grad(loss, (x, w))
    exact = fmf.cosface(x, w, labels, 0.35, 16.0, backend="reference")
    torch.testing.assert_close(actual, torch.autograd.grad(exact, (x, w)))


def test_one_of_two_threads_takes_a_loan() -> None:
    """That both backwards of one graph have seen; the other finds that it is taken."""
    both, w = threading.Barrier(2), torch.zeros(3, 2)

    class Node:
        held: Any = None

        @property
        def loan(self) -> Any:
            found = self.held
            both.wait(timeout=60)
            return found

        @loan.setter
        def loan(self, value: Any) -> None:
            self.held = value

    node, given = Node(), Loan(torch.zeros(3, 2), None)
    _loans.lend(node, w, given)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        taken = [threads.submit(_loans.take, node, w) for _ in range(2)]
    assert sorted(one.result() is given for one in taken) == [False, True]
    assert sorted(one.result() is TAKEN for one in taken) == [False, True]


@pytest.mark.parametrize("frozen", ["x", "w"])
@each_backend
def test_frozen_inputs(loans: list[int], backend: str, frozen: str) -> None:
    x, w, labels = _leaves(backend, FP64)
    leaf = w if frozen == "x" else x
    (x if frozen == "x" else w).requires_grad_(False)

    def gradient(backend: str) -> Tensor:
        return torch.autograd.grad(fmf.arcface(x, w, labels, backend=backend), leaf)[0]

    torch.testing.assert_close(gradient(backend), gradient("reference"))
    assert len(loans) == (frozen == "x")


@each_backend
def test_nothing_is_lent_to_a_compiled_graph(loans: list[int], backend: str) -> None:
    """There an operator may not return what was given to it."""
    x, w, labels = _leaves(backend, FP64)
    compiled = torch.compile(fmf.arcface, backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(x, w, labels, backend=backend), (x, w))
    assert not loans
    expected = torch.autograd.grad(fmf.arcface(x, w, labels, backend="reference"), (x, w))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("earlier", [False, True], ids=["first", "beside another loss"])
@each_backend
def test_activation_checkpointing(loans: list[int], backend: str, earlier: bool) -> None:
    """What is saved is the same both times, whatever else there is: nothing is lent."""
    x, w, labels = _leaves(backend, FP64)
    other = fmf.arcface(x, w, labels, backend=backend) if earlier else None

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return fmf.arcface(x, w, labels, backend=backend)

    value = checkpoint(loss, x, w, use_reentrant=False)
    assert isinstance(value, Tensor)
    del other
    actual = torch.autograd.grad(value, (x, w))
    assert len(loans) == earlier
    expected = torch.autograd.grad(fmf.arcface(x, w, labels, backend="reference"), (x, w))
    torch.testing.assert_close(actual, expected)


@ahead
def test_a_module_trains_as_on_the_reference() -> None:
    """With an optimiser that drops gradients after the forward, and with one that does before."""
    given = problem(9, 41, 24)

    def train(backend: str, order: Callable[[Any, Any], None]) -> Tensor:
        torch.manual_seed(0)
        criterion = fm.ArcFaceLoss(41, 24, backend=backend, dtype=torch.float64)
        optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1, momentum=0.9)
        for _ in range(4):
            order(lambda: criterion(given.x, given.labels), optimizer)
        return criterion.weight.detach()

    def before(loss: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    def between(loss: Any, optimizer: Any) -> None:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    expected = train("reference", before)
    torch.testing.assert_close(train("cpu", before), expected)
    torch.testing.assert_close(train("cpu", between), expected)


@pytest.mark.parametrize("exponent", [0, -30, -60, 25])
@each_backend
def test_small_and_large_gradients_keep_their_digits(backend: str, exponent: int) -> None:
    """A row's factor over its sum of exponentials may leave what fp32 holds."""
    x, w, labels = _leaves(backend, FP32, (7, 33, 24))
    for scale in (1.0, 60.0):
        lse, u = fmf.cosine_lse(x, w, labels, scale, backend=backend)
        exact = fmf.cosine_lse(x.double(), w.double(), labels, scale, backend="reference")
        weights = (
            torch.logspace(0.0, -3.0, 7, dtype=torch.float64, device=x.device) * 10.0**exponent
        )
        actual = torch.autograd.grad(((lse + 0.5 * u) * weights).sum(), (x, w))
        expected = torch.autograd.grad(((exact[0] + 0.5 * exact[1]) * weights).sum(), (x, w))
        for got, want in zip(actual, expected, strict=True):
            largest = want.abs().max().clamp_min(1e-35)
            assert float((got - want).abs().max() / largest) < 1e-4


@each_backend
@pytest.mark.parametrize("mode", [FP32, BF16, FP64], ids=lambda mode: mode.name)
@pytest.mark.parametrize("norm", [1e-6, 2.0, 1e6])
def test_rows_on_both_sides_of_all_classes(
    loans: list[int], backend: str, norm: float, mode: Mode
) -> None:
    """Small factors of large exponentials count as much as large factors of small ones."""
    generator = torch.Generator().manual_seed(0)
    common, device = torch.eye(64)[0], device_of(backend)
    around = torch.randn(200, 64, generator=generator)
    w = 0.9 * common + 0.44 * torch.nn.functional.normalize(around * (1.0 - common))
    side = torch.where(torch.arange(33) % 4 == 0, 1.0, -1.0)[:, None]
    x = norm * (side * common + torch.randn(33, 64, generator=generator) / 16)
    labels = torch.randint(200, (33,), generator=generator).to(device)
    exact: list[Tensor] = []
    for one in ("reference", backend):
        is_exact = one == "reference"
        leaves = [x.to(device, mode.embeddings), w.to(device, mode.weight)]
        leaves = [(leaf.double() if is_exact else leaf).requires_grad_() for leaf in leaves]
        loss = fmf.arcface(leaves[0], leaves[1], labels, 0.5, 64.0, backend=one)
        found = torch.autograd.grad(loss, leaves)
        if is_exact:
            exact = list(found)
            continue
        for got, want in zip(found, exact, strict=True):
            tolerance = 5e-2 if mode is BF16 else 1e-5
            assert float((got.double() - want).norm() / want.norm()) < tolerance
    assert len(loans) == 1


def test_what_is_done_ahead_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many classes, unless all products are kept and those of a class are few beside D."""
    monkeypatch.undo()

    def is_ahead(num_rows: int, num_classes: int, dim: int, scale: float = 64.0) -> bool:
        x, w = torch.empty(1, dim).expand(num_rows, dim), torch.empty(1, dim)
        labels = torch.zeros(num_rows, dtype=torch.int64)
        given = _cpu.Problem(
            x, w.expand(num_classes, dim), labels, _cpu.find_targets(labels, num_classes), None,
            scale, torch.float32, torch.float32,
        )  # fmt: skip
        num_bytes = int(_cpu.kept_bytes(x, given.w, -1))
        num_kept = _cpu.kept_classes(x, given.w, torch.float32, num_bytes)
        return cpu_backend.runs_ahead(given, num_kept)

    assert is_ahead(256, 100_000, 512)
    assert is_ahead(64, 10**6, 512), "not all products are kept"
    assert not is_ahead(64, 100_000, 512)
    assert not is_ahead(16, 1000, 512), "one block"
    assert not is_ahead(256, 100_000, 512, scale=100.0), "exponentials need a shift"


@needs_triton
def test_a_gpu_lends_by_default_where_it_would_form_the_cosines_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fused_margin._triton import planning, tiles

    monkeypatch.setattr(tiles, "LEAST_AGAIN", 33)

    def is_lent(num_rows: int, num_classes: int, dim: int, scale: float = 64.0) -> bool:
        x = torch.empty(num_rows, dim, dtype=torch.bfloat16, device="meta")
        w = torch.empty(num_classes, dim, device="meta")
        hopper = planning.Device("sm_90", True, 132)
        p = planning.plan_on(hopper, torch.float32, torch.bfloat16, True, True)
        assert not planning.is_lent(x, w, scale, p, budget=1 << 40), "kept on top, all of it"
        return planning.is_lent(x, w, scale, p, budget=0)

    with planning.override():
        assert is_lent(1024, 2_059_906, 512)
        assert not is_lent(1024, 100_000, 64), "fused"
        assert is_lent(1040, 128_256, 512), "a row of d_w holds most of the batch"
        # all, or but for so many rows that a sweep of theirs is wide enough
        held = {num_rows: tiles.rows_held(num_rows, 1024, 64) for num_rows in (1024, 1040, 1057)}
        assert held == {1024: 1024, 1040: 960, 1057: 1024}
        assert is_lent(4096, 128_256, 512)
        assert not is_lent(4112, 128_256, 512), "a row of d_w holds less than a quarter"
        assert is_lent(2048, 128_256, 1024), "chunk by chunk, as no tile holds rows"
        assert not is_lent(2064, 128_256, 1024), "a row of d_w is too short"
        assert is_lent(512, 128_256, 512, scale=0.5)
        assert not is_lent(512, 128_256, 1024, scale=0.5), "exponentials show no cosines"
        assert not is_lent(512, 128_256, 512, scale=80.0), "exponentials need a shift"
        assert not is_lent(32, 10_000_000, 512), "bound by reading the weights"
        assert not is_lent(128, 1000, 512), "bound by its launches"
        assert not is_lent(0, 128_256, 512)
