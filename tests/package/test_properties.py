"""Invariances, on examples that hypothesis chooses; the CPU backend's blocks and repeatability."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from typing import Any

import pytest
import torch
from helpers import (
    ARCFACE,
    BACKENDS,
    COSFACE,
    FIXED_ADACOS,
    FP32,
    FP64,
    FUSED_BACKENDS,
    HALF_MODES,
    MODES,
    NORMALIZED_SOFTMAX,
    Loss,
    Problem,
    arcface,
    check_loss,
    cosface,
    device_of,
    problem,
    run,
    yardstick,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_margin.functional as fmf
from fused_margin import _cpu, _numerics
from fused_margin._cpu import backend, memory, rows, single, sweep, tiny

SETTINGS = settings(max_examples=20, derandomize=True, deadline=None, database=None)
TRITON_SETTINGS = settings(SETTINGS, max_examples=5)
NONE: dict[str, Any] = {"reduction": "none"}  # a loss per row, and an upstream gradient for each


def few_for_triton(function: Any) -> Any:
    """Parametrise over backends, with fewer examples where kernels are interpreted."""

    @pytest.mark.parametrize("backend", BACKENDS)
    def test(backend: str) -> None:
        chosen = TRITON_SETTINGS if backend == "triton" else SETTINGS

        @chosen
        @given(st.data())
        def on_examples(data: st.DataObject) -> None:
            function(data, backend)

        on_examples()

    test.__name__, test.__doc__ = function.__name__, function.__doc__
    return test


def _draw(data: st.DataObject) -> tuple[Loss, Problem]:
    loss = data.draw(
        st.sampled_from(
            [
                ARCFACE,
                arcface(boundary="none"),
                arcface(boundary="continuous", grad="straight_through"),
                COSFACE,
                FIXED_ADACOS,
                NORMALIZED_SOFTMAX,
            ]
        )
    )
    rows, classes, dim = (data.draw(st.integers(low, 9)) for low in (1, 3, 2))
    return loss, problem(rows, classes, dim, seed=data.draw(st.integers(0, 99)))


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max())
    )


@few_for_triton
def test_rescaling_a_row_of_x(data: st.DataObject, backend: str) -> None:
    """The loss stays, and so does every gradient but that row's, which is divided."""
    loss, before = _draw(data)
    row = data.draw(st.integers(0, len(before.x) - 1))
    factor = data.draw(st.sampled_from([0.01, 0.5, 3.0, 1000.0]))
    factors = torch.ones(len(before.x), 1, dtype=torch.float64)
    factors[row] = factor
    after = dataclasses.replace(before, x=before.x * factors)
    expected, actual = (run(loss, part, FP64, backend, **NONE) for part in (before, after))
    _close(actual.value, expected.value)
    _close(actual.d_x * factors, expected.d_x)
    _close(actual.d_w, expected.d_w)


@few_for_triton
def test_rescaling_a_row_of_w(data: st.DataObject, backend: str) -> None:
    """The loss stays, and so does every gradient but that class's, which is divided."""
    loss, before = _draw(data)
    row = data.draw(st.integers(0, len(before.w) - 1))
    factor = data.draw(st.sampled_from([0.01, 0.5, 3.0, 1000.0]))
    factors = torch.ones(len(before.w), 1, dtype=torch.float64)
    factors[row] = factor
    after = dataclasses.replace(before, w=before.w * factors)
    expected, actual = (run(loss, part, FP64, backend, **NONE) for part in (before, after))
    _close(actual.value, expected.value)
    _close(actual.d_x, expected.d_x)
    _close(actual.d_w * factors, expected.d_w)


@few_for_triton
def test_permuting_classes(data: st.DataObject, backend: str) -> None:
    """The gradient of W is permuted with W; nothing else changes."""
    loss, before = _draw(data)
    order = torch.tensor(data.draw(st.permutations(range(len(before.w)))))
    after = dataclasses.replace(before, w=before.w[order], labels=order.argsort()[before.labels])
    expected, actual = (run(loss, part, FP64, backend, **NONE) for part in (before, after))
    _close(actual.value, expected.value)
    _close(actual.d_x, expected.d_x)
    _close(actual.d_w, expected.d_w[order])


@few_for_triton
def test_permuting_rows(data: st.DataObject, backend: str) -> None:
    """Losses and the gradient of x are permuted with x; the gradient of W stays."""
    loss, before = _draw(data)
    order = torch.tensor(data.draw(st.permutations(range(len(before.x)))))
    after = dataclasses.replace(
        before,
        x=before.x[order],
        labels=before.labels[order],
        upstream=before.upstream[order],
    )
    expected, actual = (run(loss, part, FP64, backend, **NONE) for part in (before, after))
    _close(actual.value, expected.value[order])
    _close(actual.d_x, expected.d_x[order])
    _close(actual.d_w, expected.d_w)


@few_for_triton
def test_ignored_rows_change_nothing(data: st.DataObject, backend: str) -> None:
    """Loss and gradients are those without the rows, whatever the rows hold."""
    loss, full = _draw(data)
    ignored = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=len(full.x), max_size=len(full.x)))
    )
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    ignore_index = data.draw(st.sampled_from([-100, -1, 10**6]))
    kept = ~ignored
    dropped = dataclasses.replace(
        full, x=full.x[kept], labels=full.labels[kept], upstream=full.upstream[kept]
    )
    marked = dataclasses.replace(full, labels=full.labels.masked_fill(ignored, ignore_index))
    options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index}
    expected, actual = (run(loss, part, FP64, backend, **options) for part in (dropped, marked))
    if reduction == "none":
        assert bool((actual.value[ignored] == 0).all())
        actual = actual._replace(value=actual.value[kept])
    assert bool((actual.d_x[ignored] == 0).all())
    if bool(kept.any()):
        _close(actual.value, expected.value)
        _close(actual.d_x[kept], expected.d_x)
        _close(actual.d_w, expected.d_w)
    else:
        assert bool((actual.value == 0).all())
        assert bool((actual.d_w == 0).all())


@few_for_triton
def test_no_margin_is_normalized_softmax(data: st.DataObject, backend: str) -> None:
    _, before = _draw(data)
    scale = data.draw(st.floats(0.1, 220.0))
    plain = dataclasses.replace(NORMALIZED_SOFTMAX, arguments={"scale": scale})
    expected = run(plain, before, FP64, backend, **NONE)
    boundary = data.draw(st.sampled_from(["linear", "continuous", "none"]))
    for loss in (cosface(0.0, scale), arcface(0.0, scale, boundary)):
        for got, want in zip(run(loss, before, FP64, backend, **NONE), expected, strict=True):
            _close(got, want)


@few_for_triton
def test_losses_are_positive_and_grow_with_the_margin(data: st.DataObject, backend: str) -> None:
    _, before = _draw(data)
    margins = sorted(data.draw(st.lists(st.floats(0.0, 1.5), min_size=2, max_size=2)))
    for make in (arcface, cosface):
        small, large = (run(make(m, 30.0), before, FP64, backend, **NONE).value for m in margins)
        assert bool((small >= 0).all())
        # arcface's linear extension drops where it begins when m is large, hence no theta + m > pi
        monotone = torch.ones_like(small, dtype=torch.bool)
        if make is arcface:
            cosine = torch.nn.functional.cosine_similarity(before.x, before.w[before.labels])
            monotone = cosine.acos() + margins[1] < torch.pi
        assert bool((large >= small - 1e-9)[monotone].all())


@few_for_triton
def test_shards_merge_to_the_whole(data: st.DataObject, backend: str) -> None:
    """One log-sum-exp merges the primitive over shards of the classes, their labels shifted."""
    _, whole = _draw(data)
    device = device_of(backend)
    x, w, labels = (part.to(device) for part in (whole.x, whole.w, whole.labels))
    x = x.detach()
    w = torch.cat([w, w.flip(1)])  # so that a shard has 2 classes or more
    cut = data.draw(st.integers(2, len(w) - 2))
    lse, u = fmf.cosine_lse(x, w, labels, 30.0, backend=backend)
    left = fmf.cosine_lse(x, w[:cut], labels, 30.0, backend=backend)
    right = fmf.cosine_lse(x, w[cut:], labels - cut, 30.0, backend=backend)
    _close(torch.logaddexp(left[0], right[0]), lse)
    _close(left[1] + right[1], u)


# --- the CPU backend's blocks ---------------------------------------------------------------------


@pytest.mark.parametrize("kept_bytes", [0, 9 * 20 * 8, 1 << 20], ids="keeps {} bytes".format)
@pytest.mark.parametrize("scale", [16.0, 220.0, 800.0], ids="scale {}".format)
@pytest.mark.parametrize("size", [1, 2, 7, 40, 41, 64])
def test_block_size_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, size: int, scale: float, kept_bytes: int
) -> None:
    """With and without the shift of exp; a block of 1 may hold nothing but a row's target.

    The products of no class, of about half of them and of all outlive the forward.
    """
    before = problem(9, 41, 5)
    loss = arcface(scale=scale)
    expected = run(loss, before, FP64, "cpu", **NONE)
    monkeypatch.setattr(single, "LOGITS", -1)
    for name in ("MIN_BLOCK", "MAX_BLOCK"):
        monkeypatch.setattr(sweep, name, size)
    monkeypatch.setattr(backend, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(backend, "KEPT_BYTES_PER_FURTHER_ROW", 0)
    assert sweep.block_size((9, 41, 5), 8) == min(size, 41)
    actual = run(loss, before, FP64, "cpu", **NONE)
    for got, want in zip(actual, expected, strict=True):
        _close(got, want)


def test_labels_past_the_last_class_are_in_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last block that is not full ends at C, not where a full one would."""
    x, w = problem(9, 10, 5).leaves(FP64)
    labels = torch.arange(6, 15)

    def results() -> tuple[torch.Tensor, ...]:
        lse, u = fmf.cosine_lse(x, w, labels, 20.0)
        gradients = torch.autograd.grad(lse.sum() + 3.0 * u.sum(), (x, w))
        return lse.detach(), u.detach(), *gradients

    expected = results()
    monkeypatch.setattr(single, "LOGITS", -1)
    for name in ("MIN_BLOCK", "MAX_BLOCK"):
        monkeypatch.setattr(sweep, name, 4)
    for got, want in zip(results(), expected, strict=True):
        _close(got, want)


def test_blocks_shrink_to_their_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep.block_size((256, 10**6, 128), 4) == 2048
    assert sweep.block_size((10**6, 10**6, 128), 4) == sweep.MIN_BLOCK
    assert sweep.block_size((0, 10**6, 1), 4) == sweep.MAX_BLOCK
    monkeypatch.setattr(sweep, "WEIGHT_BLOCK_BYTES", 1024 * 512 * 4)
    assert sweep.block_size((256, 10**6, 512), 4) == 1024


def test_what_is_kept_stays_within_its_budget() -> None:
    def kept(num_rows: int, num_classes: int, dtype: torch.dtype) -> int:
        x, w = torch.empty(num_rows, 8, dtype=dtype), torch.empty(1, 8).expand(num_classes, 8)
        return _cpu.kept_classes(x, w, dtype, int(_cpu.kept_bytes(x, w, -1)))

    assert kept(64, 1000, torch.float32) == 1000
    for num_rows in (1, 64, 256, 5000):
        classes = kept(num_rows, 10**8, torch.float32)
        budget = backend.KEPT_BYTES + max(0, num_rows - 256) * backend.KEPT_BYTES_PER_FURTHER_ROW
        assert 0 < classes * num_rows * 4 <= budget
        assert classes % sweep.block_size((num_rows, 10**8, 8), 4) == 0
    if _cpu.has_bf16_products():
        assert kept(256, 10**6, torch.bfloat16) == 2 * kept(256, 10**6, torch.float32)


@pytest.mark.parametrize(
    ("cosines", "formed"), [(0, 5), (9 * 10 - 1, 5), (9 * 20, 3), (9 * 41 - 1, 1), (9 * 41, 0)]
)
def test_what_is_kept_is_not_formed_again(
    monkeypatch: pytest.MonkeyPatch, cosines: int, formed: int
) -> None:
    """Of 5 blocks of 41 classes; without d_w the backward forms no product but of cosines."""
    calls: list[Any] = []
    multiply = sweep.multiply_transposed

    def counting(*operands: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        calls.append(out)
        return multiply(*operands, out=out)

    monkeypatch.setattr(sweep, "multiply_transposed", counting)
    monkeypatch.setattr(single, "LOGITS", -1)
    for name in ("MIN_BLOCK", "MAX_BLOCK"):
        monkeypatch.setattr(sweep, name, 10)
    before = problem(9, 41, 5)
    x, w = before.leaves(FP32)
    loss = fmf.arcface(x, w.detach(), before.labels, memory_budget=4 * cosines)
    assert len(calls) == 5
    loss.backward()
    assert len(calls) == 5 + formed


@pytest.mark.parametrize("kept_bytes", [0, 33 * 100 * 4, 1 << 20], ids="keeps {} bytes".format)
@pytest.mark.parametrize("mode_name", ["fp32", "bf16", "bf16_master_fp32"])
def test_blocks_in_lower_precision(
    monkeypatch: pytest.MonkeyPatch, mode_name: str, kept_bytes: int
) -> None:
    monkeypatch.setattr(backend, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(backend, "KEPT_BYTES_PER_FURTHER_ROW", 0)
    (mode,) = (mode for mode in MODES if mode.name == mode_name)
    monkeypatch.setattr(single, "LOGITS", -1)
    monkeypatch.setattr(sweep, "MIN_BLOCK", 16)
    monkeypatch.setattr(sweep, "MAX_BLOCK", 16)
    check_loss(ARCFACE, problem(33, 257, 64), mode, "cpu", **NONE)


@pytest.mark.parametrize("widened", [1, 10, 20], ids="{} elements".format)
@pytest.mark.parametrize("ignored", [0, 4], ids="{} ignored rows".format)
def test_steps_of_the_target_cosines_change_nothing(
    monkeypatch: pytest.MonkeyPatch, ignored: int, widened: int
) -> None:
    """A row at a time where not even one fits, and a last step of fewer rows than others."""
    before = problem(9, 41, 5)
    labels = before.labels.clone()
    labels[:ignored] = -100
    before = dataclasses.replace(before, labels=labels)
    expected = run(ARCFACE, before, FP64, "cpu", **NONE)
    monkeypatch.setattr(rows, "WIDENED", widened)
    actual = run(ARCFACE, before, FP64, "cpu", **NONE)
    for got, want in zip(actual, expected, strict=True):
        _close(got, want)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 84.3), (torch.float64, 674.0)], ids=str
)
@pytest.mark.parametrize("num_classes", [2, 10**6])
def test_where_a_shift_is_needed(num_classes: int, dtype: torch.dtype, limit: float) -> None:
    """Where s + ln C leaves too little room for cosines that rounding puts above 1."""
    scale = limit - math.log(num_classes)
    assert not _numerics.needs_shift(scale - 0.5, num_classes, dtype)
    assert _numerics.needs_shift(scale + 0.5, num_classes, dtype)


@pytest.mark.skipif(not _cpu.has_bf16_products(), reason="this CPU multiplies bf16 in fp32")
def test_only_large_products_are_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, below LOWERED multiplications, bf16 inputs are multiplied as fp32 ones are."""
    before, mode = problem(9, 41, 5), HALF_MODES[1]
    monkeypatch.setattr(tiny, "MULTIPLICATIONS", -1)

    def error() -> float:
        value = run(ARCFACE, before, mode, "cpu", **NONE).value
        return float((value - yardstick(ARCFACE, before, mode, **NONE).value).abs().max())

    monkeypatch.setattr(single, "LOWERED", 9 * 41 * 5 + 1)
    assert error() < 1e-4
    monkeypatch.setattr(single, "LOWERED", 9 * 41 * 5)
    assert error() > 1e-3


def test_memory_is_lent_to_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is used again, but not while anything can still read it."""
    monkeypatch.setattr(memory, "REUSED_BYTES", 1)
    lender = memory.Lender()
    first = lender.empty(30, 8, dtype=torch.float64).fill_(1.0)
    second = lender.empty(20, 8, dtype=torch.float64).fill_(2.0)
    view, address = first[3:], first.data_ptr()
    assert second.data_ptr() != address
    del first
    third = lender.empty(30, 8, dtype=torch.float64).fill_(3.0)
    assert bool((view == 1.0).all()), "a view keeps the memory of the tensor that was deleted"
    assert bool((second == 2.0).all())
    del view
    assert lender.empty(30, 7, dtype=torch.float64).data_ptr() == address
    del second, third
    assert len(lender.released) == 1, "no more than one piece is put aside"
    larger = lender.empty(1000, 131, dtype=torch.float64)
    assert larger.shape == (1000, 131)
    assert not lender.released, "a piece of another size is given up"


def test_which_memory_is_lent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the same size, and up to twice as much: more would be held for nothing."""
    monkeypatch.setattr(memory, "REUSED_BYTES", 1)
    lender = memory.Lender()

    def lent(size: int) -> Any:
        lender.empty(size, dtype=torch.uint8)
        (piece,) = lender.released
        return piece

    first = lent(100)
    assert lent(100) is first
    assert lent(50) is first
    second = lent(49)
    assert second is not first
    assert lent(49) is second


@pytest.mark.parametrize("name", ["kept_memory", "gradient_memory", "work_memory"])
def test_memory_put_aside_is_given_back(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(memory, "REUSED_BYTES", 1)
    lender = getattr(memory, name)
    lender.empty(8, dtype=torch.float32)
    assert lender.released
    _cpu.empty_cache()
    assert not lender.released


def test_gradients_are_lent_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that someone holds is never overwritten; a dropped one is used again."""
    monkeypatch.setattr(memory, "REUSED_BYTES", 1)
    monkeypatch.setattr(memory.gradient_memory, "released", deque(maxlen=1))
    given = problem(9, 41, 5)
    w = given.w.clone().requires_grad_()

    def step() -> torch.Tensor:
        w.grad = None
        fmf.arcface(given.x, w, given.labels).backward()
        assert w.grad is not None
        return w.grad

    held = step()
    copy = held.clone()
    address = step().data_ptr()
    assert held.data_ptr() != address
    torch.testing.assert_close(held, copy, rtol=0, atol=0)
    assert step().data_ptr() == address, "autograd takes the gradient over without a copy"
    _cpu.empty_cache()
    w.grad = None
    assert len(memory.gradient_memory.released) == 1
    _cpu.empty_cache()
    assert not memory.gradient_memory.released


def test_two_graphs_alive_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "REUSED_BYTES", 1)
    problems = [problem(9, 41, 5, seed=seed) for seed in range(3)]
    expected = [run(ARCFACE, each, FP64, "cpu", **NONE) for each in problems]
    leaves = [
        (each.x.clone().requires_grad_(), each.w.clone().requires_grad_()) for each in problems
    ]
    losses = [
        fmf.arcface(x, w, each.labels, reduction="none") @ each.upstream
        for (x, w), each in zip(leaves, problems, strict=True)
    ]
    for loss, (x, w), want in zip(losses, leaves, expected, strict=True):
        for _ in range(2):
            got = torch.autograd.grad(loss, (x, w), retain_graph=True)
            for gradient, value in zip(got, want[1:], strict=True):
                _close(gradient, value)


# --- repeatability --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_repeats_are_equal_to_the_bit(backend: str) -> None:
    shape = (20, 150, 40) if backend == "triton" else (64, 5000, 40)
    before = problem(*shape)
    for mode in (FP32, HALF_MODES[1]):
        first = run(ARCFACE, before, mode, backend, **NONE)
        for _ in range(2):
            again = run(ARCFACE, before, mode, backend, **NONE)
            for got, want in zip(again, first, strict=True):
                assert torch.equal(got, want)
