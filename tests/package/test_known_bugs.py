"""Mistakes that other implementations of such losses have made, one test each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ARCFACE,
    BACKENDS,
    COSFACE,
    CPU_BACKENDS,
    FP32,
    FP64,
    HALF_MODES,
    check_loss,
    device_of,
    problem,
    run,
    yardstick,
)

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import _cpu

pytestmark = pytest.mark.usefixtures("poison")

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "arcface": fmf.arcface,
    "cosface": fmf.cosface,
    "fixed_adacos": fmf.fixed_adacos,
    "normalized_softmax": lambda x, w, y, **kw: fmf.normalized_softmax(x, w, y, 20.0, **kw),
    "arcface, tensor scale": lambda x, w, y, **kw: fmf.arcface(
        x, w, y, 0.5, torch.tensor(64.0, device=x.device), **kw
    ),
}
each_loss = pytest.mark.parametrize("name", LOSSES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _leaves(
    backend: str, rows: int = 6, classes: int = 10, dim: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    given = problem(rows, classes, dim)
    x, w = given.leaves(FP32, device_of(backend))
    return x, w, given.labels.to(device_of(backend), copy=True)


# --- tiles ----------------------------------------------------------------------------------------


@each_backend
def test_embeddings_wider_than_a_tile(backend: str) -> None:
    """Something added once per tile of D goes unnoticed while D fits one tile."""
    check_loss(ARCFACE, problem(5, 20, 600), FP32, backend, reduction="none")


@each_backend
def test_more_rows_and_classes_than_a_tile(backend: str) -> None:
    check_loss(ARCFACE, problem(270, 5, 3), FP32, backend, reduction="none")
    check_loss(ARCFACE, problem(3, 530, 5), FP32, backend, reduction="none")


@pytest.mark.parametrize("num_classes", [2, 5, 127, 129])
@each_backend
def test_padded_classes_are_not_counted(backend: str, num_classes: int) -> None:
    """Classes that pad a tile have cosine 0: they show where every real cosine is negative."""
    device = device_of(backend)
    x = torch.ones(3, 4, device=device)
    w = -torch.ones(num_classes, 4, device=device)
    labels = torch.tensor([0, 1, 0], device=device)
    lse, u = fmf.cosine_lse(x, w, labels, 50.0, backend=backend)
    torch.testing.assert_close(u.cpu(), -torch.ones(3))
    torch.testing.assert_close(lse.cpu(), torch.full((3,), math.log(num_classes - 1) - 50.0))


@each_backend
def test_labels_of_other_shards_do_not_match_padding(backend: str) -> None:
    """A label outside [0, C) has no target, be it within the tile that holds C."""
    device = device_of(backend)
    x, w, _ = _leaves(backend, rows=8, classes=5)
    labels = torch.tensor([5, 6, 15, 31, 63, 127, -1, -5], device=device)
    lse, u = fmf.cosine_lse(x, w, labels, 20.0, backend=backend)
    expected = fmf.cosine_logits(x, w, 20.0).logsumexp(dim=1)
    torch.testing.assert_close(lse, expected)
    assert bool((u == 0).all())
    got = torch.autograd.grad(lse.sum() + 7.0 * u.sum(), (x, w))
    want = torch.autograd.grad(expected.sum(), (x, w))
    for actual, careful in zip(got, want, strict=True):
        torch.testing.assert_close(actual, careful, rtol=1e-4, atol=1e-5)


@each_backend
def test_offsets_beyond_31_bits(backend: str, tmp_path: Path) -> None:
    """A weight whose third row begins 2^32 elements into its storage; the file is sparse."""
    if device_of(backend).type != "cpu":
        pytest.skip("memory of a GPU is not sparse")
    stride, dim = 2**31, 4
    number = 2 * stride + dim
    storage = torch.from_file(str(tmp_path / "w"), shared=True, size=number, dtype=torch.float16)
    w = storage.as_strided((3, dim), (stride, 1))
    values = torch.randn(3, dim).half()
    w.copy_(values)
    x, labels = torch.randn(2, dim).half(), torch.tensor([2, 0])
    actual = fmf.cosine_lse(x, w, labels, 9.0, backend=backend)
    expected = fmf.cosine_lse(x, values, labels, 9.0, backend=backend)
    torch.testing.assert_close(actual, expected)


# --- upstream gradients ---------------------------------------------------------------------------


@each_loss
@each_backend
def test_every_element_of_grad_output_is_used(backend: str, name: str) -> None:
    """Not the first one for all rows."""
    x, w, labels = _leaves(backend)
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0, 1e-3], device=x.device)
    loss = LOSSES[name](x, w, labels, reduction="none", backend=backend)
    got = torch.autograd.grad(loss, (x, w), upstream)
    rows = [
        torch.autograd.grad(
            LOSSES[name](x, w, labels, reduction="none", backend=backend)[row], (x, w)
        )
        for row in range(6)
    ]
    for index, actual in enumerate(got):
        expected = sum(float(upstream[row]) * rows[row][index] for row in range(6))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@each_loss
@each_backend
def test_grad_output_of_stride_zero(backend: str, name: str) -> None:
    x, w, labels = _leaves(backend)

    def gradients(expand: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        loss = LOSSES[name](x, w, labels, reduction="none", backend=backend)
        return torch.autograd.grad(expand(loss), (x, w))

    expected = gradients(lambda loss: (loss * torch.ones_like(loss)).sum())
    for expand in (torch.Tensor.sum, lambda loss: loss.expand(3, -1).sum() / 3.0):
        torch.testing.assert_close(gradients(expand), expected)
    mean = LOSSES[name](x, w, labels, backend=backend)
    torch.testing.assert_close(
        torch.autograd.grad(mean.expand(4).sum(), (x, w)),
        tuple(part * 4.0 / 6.0 for part in expected),
    )


@pytest.mark.parametrize("mode", [FP32, *HALF_MODES], ids=str)
@each_backend
def test_target_gradient_near_certainty(backend: str, mode: Any) -> None:
    """At p -> 1 the target's gradient, p - 1, is of the size of the others' and must not vanish."""
    given = problem(12, 30, 40)
    x = given.w[given.labels] / given.w[given.labels].norm(dim=1, keepdim=True) + 0.1 * (
        given.x / given.x.norm(dim=1, keepdim=True)
    )
    # an upstream gradient that keeps fp16 from underflowing
    given = dataclasses.replace(given, x=x, upstream=1e3 * given.upstream)
    certain = dataclasses.replace(
        COSFACE, arguments={"margin": 0.0, "scale": 16.0}, psi=lambda u: u
    )
    expected = yardstick(certain, given, mode, reduction="none")
    assert float(expected.value.max()) < 0.02
    actual = run(certain, given, mode, backend, reduction="none")
    # a few times s eps: half precision rounds every cosine
    eps = max(
        torch.finfo(dtype).eps
        for dtype in (mode.embeddings, mode.weight, mode.autocast or mode.weight)
    )
    targets = given.labels.unique()
    for got, want in ((actual.d_x, expected.d_x), (actual.d_w[targets], expected.d_w[targets])):
        relative = (got - want).norm(dim=1) / want.norm(dim=1)
        assert float(relative.max()) < 4.0 * 16.0 * eps


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_target_gradient_of_a_hard_row_is_not_rounded(backend: str) -> None:
    """At p -> 1 it outweighs all others: it stays out of a product of bf16."""
    given = problem(1, 5, 40)
    label = int(given.labels)
    given = dataclasses.replace(given, x=given.x - 9.0 * given.w[label])
    (mode,) = (mode for mode in HALF_MODES if mode.name == "bf16_master_fp32")
    actual, expected = run(COSFACE, given, mode, backend), yardstick(COSFACE, given, mode)
    difference = actual.d_w[label] - expected.d_w[label]
    assert float(difference.norm() / expected.d_w[label].norm()) < 1e-5


# --- what autograd asks for -----------------------------------------------------------------------


@each_loss
@each_backend
def test_frozen_embeddings_or_weight(backend: str, name: str) -> None:
    x, w, labels = _leaves(backend)
    call = LOSSES[name]
    both = torch.autograd.grad(call(x, w, labels, backend=backend), (x, w))
    (d_x,) = torch.autograd.grad(call(x, w.detach(), labels, backend=backend), x)
    (d_w,) = torch.autograd.grad(call(x.detach(), w, labels, backend=backend), w)
    torch.testing.assert_close((d_x, d_w), both)
    frozen = call(x.detach(), w.detach(), labels, backend=backend)
    assert not frozen.requires_grad


@each_backend
def test_frozen_embeddings_and_weight(backend: str) -> None:
    x, w, labels = _leaves(backend)
    scale = torch.tensor(20.0, device=x.device, requires_grad=True)

    def total(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        lse, u = fmf.cosine_lse(x, w, labels, scale, backend=backend)
        return (lse - 3.0 * u).sum()

    alone = torch.autograd.grad(total(x.detach(), w.detach()), scale)
    torch.testing.assert_close(alone, torch.autograd.grad(total(x, w), (scale, x, w))[:1])


@each_loss
def test_only_the_gradients_asked_for_are_computed(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls: list[tuple[bool, bool]] = []
    original = _cpu.backward

    def backward(*args: Any) -> Any:
        needs = args[3]
        calls.append((needs.x, needs.w))
        return original(*args)

    monkeypatch.setattr(_cpu, "backward", backward)
    x, w, labels = _leaves("cpu")
    LOSSES[name](x, w.detach(), labels, backend="cpu").backward()
    LOSSES[name](x.detach(), w, labels, backend="cpu").backward()
    LOSSES[name](x, w, labels, backend="cpu").backward()
    assert calls == [(True, False), (False, True), (True, True)]


@each_loss
@each_backend
def test_no_grad(backend: str, name: str) -> None:
    x, w, labels = _leaves(backend)
    expected = LOSSES[name](x, w, labels, backend=backend)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = LOSSES[name](x, w, labels, backend=backend)
        assert not loss.requires_grad
        assert torch.equal(loss, expected.detach())


@each_loss
@each_backend
def test_retain_graph(backend: str, name: str) -> None:
    """Twice the same gradients, and inputs as they were: nothing saved is written to."""
    x, w, labels = _leaves(backend)
    copies = [part.detach().clone() for part in (x, w, labels)]
    loss = LOSSES[name](x, w, labels, backend=backend)
    value = loss.detach().clone()
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(loss.detach(), value)
    for part, copy in zip((x, w, labels), copies, strict=True):
        assert torch.equal(part.detach(), copy)


@each_backend
def test_gradients_accumulate(backend: str) -> None:
    x, w, labels = _leaves(backend)
    for _ in range(2):
        fmf.arcface(x, w, labels, backend=backend).backward()
    expected = torch.autograd.grad(fmf.arcface(x, w, labels, backend=backend), (x, w))
    assert x.grad is not None
    assert w.grad is not None
    torch.testing.assert_close((x.grad, w.grad), tuple(2 * part for part in expected))


@each_backend
def test_changing_a_saved_input_is_noticed(backend: str) -> None:
    x, w, labels = _leaves(backend)
    loss = fmf.arcface(x, w, labels, backend=backend)
    with torch.no_grad():
        w.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_backend
def test_autocast_with_a_master_weight(backend: str, dtype: torch.dtype) -> None:
    """Embeddings in autocast's dtype, weight in fp32, backward outside of the context."""
    device = device_of(backend)
    criterion = fm.ArcFaceLoss(10, 4, backend=backend).to(device)
    layer = torch.nn.Linear(3, 4).to(device)
    labels = torch.tensor([1, 2, 9], device=device)
    with torch.autocast(device.type, dtype=dtype):
        embeddings = layer(torch.randn(3, 3, device=device))
        assert embeddings.dtype is dtype
        loss = criterion(embeddings, labels)
    assert loss.dtype is torch.float32
    loss.backward()
    for parameter in (*criterion.parameters(), *layer.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.dtype is torch.float32
        assert bool(parameter.grad.isfinite().all())


# --- ignored rows, empty batches, labels ----------------------------------------------------------


@each_loss
@each_backend
def test_ignored_rows_are_written(backend: str, name: str) -> None:
    """Zeros, where memory held NaN."""
    x, w, labels = _leaves(backend)
    labels[1] = labels[4] = -100
    loss = LOSSES[name](x, w, labels, reduction="none", backend=backend)
    d_x, d_w = torch.autograd.grad(loss.sum(), (x, w))
    assert loss[[1, 4]].tolist() == [0.0, 0.0]
    assert bool((d_x[[1, 4]] == 0).all())
    assert bool(d_w.isfinite().all())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_loss
@each_backend
def test_empty_batch(backend: str, name: str, reduction: str) -> None:
    x, w, labels = _leaves(backend, rows=6)
    x = x.detach()[:0].requires_grad_()
    loss = LOSSES[name](x, w, labels[:0], reduction=reduction, backend=backend)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert float(loss.detach().sum()) == 0.0
    d_x, d_w = torch.autograd.grad(loss.sum(), (x, w))
    assert d_x.shape == (0, 4)
    assert bool((d_w == 0).all())


@each_backend
def test_empty_batch_of_the_primitive(backend: str) -> None:
    x, w, labels = _leaves(backend)
    x = x.detach()[:0].requires_grad_()
    lse, u = fmf.cosine_lse(x, w, labels[:0], 9.0, backend=backend)
    assert lse.shape == u.shape == (0,)
    d_x, d_w = torch.autograd.grad(lse.sum() + u.sum(), (x, w))
    assert d_x.shape == (0, 4)
    assert bool((d_w == 0).all())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_loss
@each_backend
def test_all_rows_ignored(backend: str, name: str, reduction: str) -> None:
    x, w, labels = _leaves(backend)
    labels.fill_(-100)
    loss = LOSSES[name](x, w, labels, reduction=reduction, backend=backend)
    assert bool((loss == 0).all())
    for gradient in torch.autograd.grad(loss.sum(), (x, w)):
        assert bool((gradient == 0).all())


@pytest.mark.parametrize("ignore_index", [-1, 3, 10, 255])
@each_loss
@each_backend
def test_ignore_index_precedes_the_range_check(backend: str, name: str, ignore_index: int) -> None:
    x, w, labels = _leaves(backend)
    labels[2] = ignore_index
    keep = labels != ignore_index
    options = {"ignore_index": ignore_index, "backend": backend}
    loss = LOSSES[name](x, w, labels, **options)
    torch.testing.assert_close(loss, LOSSES[name](x[keep], w, labels[keep], **options))


INTEGERS = (
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@each_backend
def test_labels_of_every_integer_dtype(backend: str, dtype: torch.dtype) -> None:
    x, w, labels = _leaves(backend)
    typed = labels.cpu().to(dtype).to(x.device)
    for call in LOSSES.values():
        expected = call(x, w, labels, backend=backend)
        assert torch.equal(call(x, w, typed, backend=backend), expected)
        call(x, w, typed, backend=backend).backward()
    expected_parts = fmf.cosine_lse(x, w, labels, 9.0, backend=backend)
    for got, want in zip(
        fmf.cosine_lse(x, w, typed, 9.0, backend=backend), expected_parts, strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int8], ids=str)
@each_backend
def test_out_of_range_in_narrow_dtypes(backend: str, dtype: torch.dtype) -> None:
    """Unsigned labels never equal -100; one past the end is still refused."""
    if device_of(backend).type != "cpu":
        pytest.skip("on a GPU a label out of range makes its row NaN (test_gpu.py)")
    x, w, labels = _leaves(backend)
    labels[3] = 100
    with pytest.raises(ValueError, match=r"labels\[3\] is 100 "):
        fmf.arcface(x, w, labels.to(dtype), backend=backend)


# --- distributed tensors --------------------------------------------------------------------------


def test_sharded_weight_is_refused(tmp_path: Path) -> None:
    """A DTensor's kernels would read memory that other ranks own."""
    if not torch.distributed.is_available():
        pytest.skip("this build of PyTorch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        w = distribute_tensor(torch.randn(10, 4), init_device_mesh("cpu", (1,)))
        x, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
        with pytest.raises(TypeError, match=r"weight is a DTensor.*shard_classes.*full_tensor"):
            fmf.arcface(x, w, labels)
        with pytest.raises(TypeError, match=r"embeddings is a DTensor.*embeddings.to_local\(\)"):
            fmf.cosine_logits(distribute_tensor(x, w.device_mesh), w, 9.0)
        with pytest.raises(TypeError, match=r"labels is a DTensor.*labels.to_local\(\)"):
            fmf.arcface(x, w.full_tensor(), distribute_tensor(labels, w.device_mesh))
    finally:
        torch.distributed.destroy_process_group()


# --- gradients at the poles -----------------------------------------------------------------------


@pytest.mark.parametrize("boundary", ["linear", "continuous", "none"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@each_backend
def test_gradients_are_finite_at_the_poles(backend: str, sign: float, boundary: str) -> None:
    """d theta / d cos theta is infinite at |cos| = 1; the slope of psi is not."""
    given = problem(4, 6, 8)
    for mode in (FP32, FP64):
        x = sign * given.w[given.labels].to(mode.embeddings)
        w = given.w.to(device_of(backend), mode.weight, copy=True).requires_grad_()
        x = x.to(device_of(backend), copy=True).requires_grad_()
        loss = fmf.arcface(
            x, w, given.labels.to(x.device), boundary=boundary, backend=backend, scale=16.0
        )
        for gradient in torch.autograd.grad(loss, (x, w)):
            assert bool(gradient.isfinite().all())


@each_backend
def test_small_angles(backend: str) -> None:
    """At an angle of 1e-3 psi' is floored as documented, in every dtype: 1 + ... / sqrt(1e-5)."""
    angle, margin, scale = 1e-3, 0.5, 64.0
    slope = math.cos(margin) + math.cos(angle) * math.sin(margin) / math.sqrt(1e-5)
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=dtype)
        x = x.to(device_of(backend), copy=True).requires_grad_()
        w = torch.eye(2, dtype=dtype, device=x.device)
        label = torch.zeros(1, dtype=torch.int64, device=x.device)
        # the loss is log(1 + exp(z)), z = s (c_other - psi)
        loss = fmf.arcface(x, w, label, margin, scale, backend=backend)
        (d_x,) = torch.autograd.grad(loss, x)
        psi = math.cos(angle + margin)
        sigma = 1 / (1 + math.exp(scale * (psi - math.sin(angle))))
        along = sigma * scale * (math.cos(angle) + math.sin(angle) * slope)
        got = float(-d_x[0, 0] * math.sin(angle) + d_x[0, 1] * math.cos(angle))
        assert got == pytest.approx(along, rel=0.01 if dtype is torch.float32 else 1e-9)


# sizes of each way through the CPU backend
@pytest.mark.parametrize("shape", [(8, 10, 16), (64, 300, 64), (64, 20_000, 64)], ids=str)
def test_inputs_stay_resizable(shape: tuple[int, int, int]) -> None:
    """FSDP2 frees gathered parameters by resizing their storage, as `Tensor.numpy` forbids."""
    num_rows, num_classes, dim = shape
    x, w = torch.randn(num_rows, dim, requires_grad=True), torch.randn(num_classes, dim)
    w.requires_grad_()
    labels = torch.randint(num_classes, (num_rows,))
    grad = torch.rand(num_rows)
    fmf.arcface(x, w, labels, reduction="none").backward(grad)
    lse, u = fmf.cosine_lse(x, w, labels, 8.0)
    torch.autograd.backward((lse, u), (grad, grad))
    given = {"x": x, "w": w, "labels": labels, "grad": grad}
    assert [name for name, t in given.items() if not t.untyped_storage().resizable()] == []
