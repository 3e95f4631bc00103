"""On real hardware: parity, memory, devices, streams, graphs, and no synchronisation."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from helpers import (
    ARCFACE,
    COSFACE,
    FP32,
    HALF_MODES,
    LOSSES,
    MODES,
    Loss,
    Mode,
    Result,
    assert_close,
    check_loss,
    problem,
    run,
    run_eager,
    sizes,
    yardstick,
)

import fused_margin as fm
import fused_margin.functional as fmf

pytestmark = [
    pytest.mark.gpu,
    # PyTorch says so once, when it is asked to make synchronisation an error.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

CUDA = torch.device("cuda")
SHAPES = ((1, 2, 1), (7, 10, 3), (33, 257, 130), (300, 1000, 300))
LARGE = (64, 100_003, 512)


def _case(
    num_rows: int, num_classes: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leaves and labels made on the GPU."""
    x = torch.randn(num_rows, dim, device=CUDA, dtype=dtype).requires_grad_()
    w = torch.randn(num_classes, dim, device=CUDA, dtype=dtype).requires_grad_()
    return x, w, torch.randint(num_classes, (num_rows,), device=CUDA)


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Make every call that waits for the GPU an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dtypes(shape: tuple[int, int, int], mode: Mode) -> None:
    if mode in HALF_MODES and shape[2] < 16:
        shape = (shape[0] + 16, *shape[1:2], 64)  # rounding of a few products does not average out
    check_loss(ARCFACE, problem(*shape), mode, "auto", device=CUDA, reduction="none")


@pytest.mark.parametrize("mode", [FP32, HALF_MODES[3]], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_losses(loss: Loss, mode: Mode) -> None:
    for reduction in ("mean", "sum", "none"):
        check_loss(loss, problem(33, 257, 130), mode, "triton", device=CUDA, reduction=reduction)


@pytest.mark.parametrize("mode", [FP32, HALF_MODES[3], HALF_MODES[4]], ids=str)
def test_many_classes(mode: Mode) -> None:
    for loss in (ARCFACE, COSFACE):
        check_loss(loss, problem(*LARGE), mode, "auto", device=CUDA, reduction="none")


@pytest.mark.parametrize("strategy", ["chunked", "fused", "kept", "lent"])
@pytest.mark.parametrize("mode", [FP32, *HALF_MODES], ids=str)
def test_strategies(strategy: str, mode: Mode) -> None:
    from fused_margin._triton import planning

    given = problem(100, 1000, 64)
    with torch.no_grad():
        x, w = given.x.to(CUDA, mode.embeddings), given.w.to(CUDA, mode.weight)
        tiles = planning.plan(x, w, mode.autocast or mode.embeddings).tiles
    if strategy == "fused" and tiles.for_fused(64) is None:
        pytest.skip("no fused tiles for this operand type")
    with planning.override(strategy):
        check_loss(ARCFACE, given, mode, "triton", device=CUDA, reduction="none")
        check_loss(COSFACE, given, mode, "triton", device=CUDA, reduction="mean")


@pytest.mark.parametrize("strategy", ["chunked", "kept", "lent"])
@pytest.mark.parametrize("described", [None, False], ids=["as chosen", "pointers"])
@pytest.mark.parametrize("mode", [m for m in HALF_MODES if "bf16" in m.name], ids=str)
def test_descriptors(mode: Mode, described: bool | None, strategy: str) -> None:
    """Blocks by tensor descriptors, where this GPU has them, and by pointers."""
    from fused_margin._triton import planning

    for dim in (72, 70):  # rows of W at multiples of 16 bytes, and not
        given = problem(300, 5000, dim)
        with planning.override(strategy, descriptors=described):
            check_loss(ARCFACE, given, mode, "triton", device=CUDA, reduction="none")


def test_memory_budget() -> None:
    """Within it the exponentials are kept, N C of them; the gradients are as accurate."""
    x, w, labels = _case(64, 20_000, 96, torch.bfloat16)
    gradients, kept = [], []
    for budget in (None, 1 << 30):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = fmf.arcface(x, w, labels, memory_budget=budget)
        kept.append(torch.cuda.memory_allocated() - before)
        gradients.append(torch.autograd.grad(loss, (x, w)))
    lent = w.numel() * w.element_size()  # d_w, made ahead
    assert kept[0] - lent < 64 * 20_000 * 2 <= kept[1]
    for without, within in zip(*gradients, strict=True):
        error = (within.double() - without.double()).norm() / without.double().norm()
        assert float(error) < 1e-2


def test_tf32() -> None:
    """PyTorch's setting for fp32 products is obeyed; judged by eager code with the same setting."""
    given = problem(33, 257, 130)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        actual = run(ARCFACE, given, FP32, "auto", device=CUDA, reduction="none")
        eager = run_eager.__wrapped__(ARCFACE, given, FP32, device=CUDA, reduction="none")
    finally:
        torch.set_float32_matmul_precision(precision)
    expected = yardstick(ARCFACE, given, FP32, reduction="none")
    unit = sizes(ARCFACE, given, FP32, reduction="none")
    # the matrix unit cuts off what Triton hands it, which errs twice as far as rounding
    twice = Result(*(want + 2.0 * (got - want) for got, want in zip(eager, expected, strict=True)))
    assert_close(actual, expected, [twice], unit, FP32)


def test_reference_runs_on_a_gpu() -> None:
    check_loss(ARCFACE, problem(33, 257, 130), FP32, "reference", device=CUDA)


@pytest.mark.slow
def test_more_than_2_to_the_31_weights() -> None:
    """Offsets past 31 bits: the last classes are as right as the first ones."""
    dim = 512
    num_classes = 2**31 // dim + 1000
    needed = 5 * num_classes * dim  # bf16 weight and gradient, and some
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    x = torch.randn(16, dim, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    w = torch.zeros(num_classes, dim, device=CUDA, dtype=torch.bfloat16)
    w[:500].normal_()
    w[-500:].normal_()
    w.requires_grad_()
    labels = torch.arange(16, device=CUDA) - 8
    labels = torch.where(labels < 0, num_classes + labels, labels)
    loss = fmf.arcface(x, w, labels, reduction="none")
    loss.sum().backward()
    # the classes between have cosine 0 and add the same number to every row
    ends = torch.cat([w.detach()[:500], w.detach()[-500:]]).requires_grad_()
    x_ends = x.detach().clone().requires_grad_()
    lse, u = fmf.cosine_lse(
        x_ends, ends, torch.where(labels < 500, labels, labels - num_classes + 1000), 64.0
    )
    between = torch.full_like(lse, math.log(num_classes - 1000))
    psi = u * math.cos(0.5) - (1 - u * u).clamp_min(1e-5).sqrt() * math.sin(0.5)
    expected = -torch.nn.functional.logsigmoid(64.0 * psi - torch.logaddexp(lse, between))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    expected.sum().backward()
    assert w.grad is not None
    assert ends.grad is not None
    got = torch.cat([w.grad[:500], w.grad[-500:]])
    error = (got.float() - ends.grad.float()).norm() / ends.grad.float().norm()
    assert float(error) < 0.02


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["arcface", "cosine_lse"])
def test_no_tensor_of_rows_by_classes(name: str, dtype: torch.dtype) -> None:
    num_rows, num_classes, dim = 1024, 200_000, 64

    def step(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> None:
        if name == "arcface":
            fmf.arcface(x, w, labels).backward()
        else:
            lse, u = fmf.cosine_lse(x, w, labels, 64.0)
            (lse - u).sum().backward()

    step(*_case(num_rows, 1000, dim, dtype))  # what is allocated once, whatever C
    x, w, labels = _case(num_rows, num_classes, dim, dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(x, w, labels)
    growth = torch.cuda.max_memory_allocated() - before
    gradients = (x.numel() + w.numel()) * x.element_size()
    assert growth - gradients < num_rows * num_classes * 2 / 4  # bytes of N x C in bf16, a quarter


# --- devices and streams --------------------------------------------------------------------------


def test_tensors_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA or ROCm devices")
    with torch.cuda.device(0):
        check_loss(
            ARCFACE, problem(33, 257, 130), FP32, "auto", device=torch.device("cuda", 1),
            reduction="none",
        )  # fmt: skip
        assert torch.cuda.current_device() == 0


def test_side_stream() -> None:
    x, w, labels = _case(64, 5000, 96)
    expected = fmf.arcface(x, w, labels)
    gradients = torch.autograd.grad(expected, (x, w))
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # leaves of its own: those of another stream would make autograd wait for that one
            leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
            loss = fmf.arcface(*leaves, labels)
            results.append((loss, torch.autograd.grad(loss, leaves)))
    torch.cuda.synchronize()
    for loss, parts in results:
        assert torch.equal(loss, expected)
        for got, want in zip(parts, gradients, strict=True):
            assert torch.equal(got, want)


def test_labels_on_another_device() -> None:
    x, w, labels = _case(4, 10, 8)
    with pytest.raises(ValueError, match=r"labels are on cpu, embeddings on cuda"):
        fmf.arcface(x, w, labels.cpu())
    with pytest.raises(ValueError, match="takes CPU tensors"):
        fmf.arcface(x, w, labels, backend="cpu")


@pytest.mark.parametrize("budget", [None, 1 << 30])
def test_cuda_graph(budget: int | None) -> None:
    """A captured step replays on new inputs, with the same bits as a call."""
    criterion = fm.ArcFaceLoss(5000, 96, device=CUDA, memory_budget=budget)
    x, _, labels = _case(64, 5000, 96)
    criterion(x, labels).backward()  # compiles, and allocates what is allocated once
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            x.grad = criterion.weight.grad = None
            criterion(x, labels).backward()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = criterion.weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = criterion(x, labels)
        loss.backward()
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            labels.random_(5000)
        graph.replay()
        torch.cuda.synchronize()
        assert x.grad is not None
        fresh = x.detach().clone().requires_grad_()
        expected = criterion(fresh, labels)
        assert torch.equal(loss, expected)
        assert torch.equal(x.grad, torch.autograd.grad(expected, fresh)[0])


# --- labels out of range, and no synchronisation --------------------------------------------------


@pytest.mark.parametrize("loss", [ARCFACE, COSFACE], ids=str)
@pytest.mark.parametrize("value", [10, -1, 127, 2**40])
def test_label_out_of_range(monkeypatch: pytest.MonkeyPatch, loss: Loss, value: int) -> None:
    """That row's loss and gradients are NaN; the other rows' are right."""
    monkeypatch.delenv("FUSED_MARGIN_CHECK_LABELS", raising=False)
    x, w, labels = _case(6, 10, 8)
    good = torch.tensor([0, 1, 3, 4, 5], device=CUDA)
    bad = labels.clone()
    bad[2] = value
    loss(x, w, labels, reduction="none")  # compile first
    with no_synchronisation():
        actual = loss(x, w, bad, reduction="none")
    expected = loss(x, w, labels, reduction="none")
    assert bool(actual[2].isnan())
    torch.testing.assert_close(actual[good], expected[good])
    (d_x,) = torch.autograd.grad(actual.sum(), x)
    (d_x_expected,) = torch.autograd.grad(expected.sum(), x)
    assert bool(d_x[2].isnan().all())
    torch.testing.assert_close(d_x[good], d_x_expected[good])
    assert bool(loss(x, w, bad).isnan())


def test_label_out_of_range_with_a_tensor_scale() -> None:
    x, w, labels = _case(6, 10, 8)
    scale = torch.tensor(30.0, device=CUDA, requires_grad=True)
    labels[2] = 10
    loss = fmf.arcface(x, w, labels, scale=scale, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    (d_x,) = torch.autograd.grad(loss.sum(), x)
    assert d_x.isnan().all(dim=1).tolist() == [False, False, True, False, False, False]


def test_labels_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_MARGIN_CHECK_LABELS", "1")
    x, w, labels = _case(6, 10, 8)
    fmf.arcface(x, w, labels)
    labels[2] = 10
    for scale in (64.0, torch.tensor(64.0, device=CUDA)):
        with pytest.raises(ValueError, match=r"labels\[2\] is 10 "):
            fmf.arcface(x, w, labels, scale=scale)


@pytest.mark.parametrize("with_tensor_scale", [False, True])
def test_a_step_does_not_synchronise(with_tensor_scale: bool) -> None:
    x, w, labels = _case(64, 5000, 96)
    labels[::7] = -100
    scale = torch.tensor(30.0, device=CUDA, requires_grad=True) if with_tensor_scale else 30.0

    def step() -> None:
        fmf.arcface(x, w, labels, scale=scale).backward()

    step()
    with no_synchronisation():
        step()


# --- bits and gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [FP32, *HALF_MODES], ids=str)
def test_repeats_are_equal_to_the_bit(mode: Mode) -> None:
    given = problem(300, 5000, 130)
    first = run(ARCFACE, given, mode, "auto", device=CUDA, reduction="none")
    for _ in range(20):
        again = run(ARCFACE, given, mode, "auto", device=CUDA, reduction="none")
        for got, want in zip(again, first, strict=True):
            assert torch.equal(got, want)


def test_frozen_embeddings_or_weight() -> None:
    x, w, labels = _case(64, 5000, 96)
    both = torch.autograd.grad(fmf.arcface(x, w, labels), (x, w))
    (d_x,) = torch.autograd.grad(fmf.arcface(x, w.detach(), labels), x)
    (d_w,) = torch.autograd.grad(fmf.arcface(x.detach(), w, labels), w)
    torch.testing.assert_close(d_x, both[0])
    torch.testing.assert_close(d_w, both[1])


def test_frozen_weight_has_no_gradient_memory() -> None:
    x, w, labels = _case(64, 200_000, 512)
    w = w.detach()
    fmf.arcface(x, w, labels).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fmf.arcface(x, w, labels).backward()
    growth = torch.cuda.max_memory_allocated() - before
    assert growth < w.numel() * w.element_size() / 4


def test_strides_and_ignored_rows() -> None:
    given = problem(33, 257, 130)
    labels = given.labels.clone()
    labels[::5] = -100
    transposed = dataclasses.replace(
        given,
        labels=labels,
        layout_x=lambda tensor: tensor.t().contiguous().t(),
        layout_w=lambda tensor: tensor.t().contiguous().t(),
    )
    check_loss(ARCFACE, transposed, FP32, "auto", device=CUDA, reduction="none")


def test_empty_batch() -> None:
    x, w, labels = _case(6, 10, 8)
    x = x.detach()[:0].requires_grad_()
    loss = fmf.arcface(x, w, labels[:0])
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert w.grad is not None
    assert bool((w.grad == 0).all())


def test_compile() -> None:
    criterion = fm.ArcFaceLoss(500, 96, device=CUDA)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    x, _, labels = _case(64, 500, 96)
    assert torch.equal(compiled(x, labels), criterion(x, labels))
