"""What SGD in the backward refuses, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from in_backward import (
    CLASSES,
    DIM,
    MOMENTUM,
    batches,
    chunks,  # noqa: F401 - a fixture
    criterion_of,
    each_backend,
    has_gradient,
    loss_of_a_batch,
    train,
)

import fused_margin as fm
from fused_margin import _updates
from fused_margin.optim import SGDInBackward

Tensor = torch.Tensor


@each_backend
def test_accumulation_raises_and_changes_nothing(backend: str) -> None:
    criterion = criterion_of(backend)
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    first, second = loss_of_a_batch(criterion), loss_of_a_batch(criterion)
    first.backward()
    before = criterion.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"can't be accumulated.*optimizer\.step\(\)"):
        second.backward()
    assert torch.equal(criterion.weight, before)
    optimizer.step()
    loss_of_a_batch(criterion).backward()
    assert not torch.equal(criterion.weight, before)


@pytest.mark.parametrize("ends", ["step", "zero_grad"])
def test_either_ends_a_step(ends: str) -> None:
    criterion = criterion_of()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    for _ in range(2):
        loss_of_a_batch(criterion).backward()
        assert isinstance(criterion.weight.grad, _updates.Spent)
        getattr(optimizer, ends)()
        assert criterion.weight.grad is None


def test_a_second_backward_of_one_graph_raises() -> None:
    criterion = criterion_of()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    loss = loss_of_a_batch(criterion)
    loss.backward(retain_graph=True)
    optimizer.step()
    before = copy.deepcopy((criterion.weight, optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"changed since the forward.*retain_graph"):
        loss.backward()
    assert criterion.weight.grad is None
    assert torch.equal(criterion.weight, before[0])
    assert str(optimizer.state_dict()) == str(before[1])


def _clip_by_value(criterion: Any) -> None:
    torch.nn.utils.clip_grad_value_(criterion.parameters(), 1.0)


@pytest.mark.parametrize(
    "use",
    [
        lambda criterion: torch.nn.utils.clip_grad_norm_(criterion.parameters(), 1.0),
        lambda criterion: fm.distributed.clip_grad_norm_(criterion.parameters(), 1.0),
        _clip_by_value,
        lambda criterion: criterion.weight.grad.norm(),
        lambda criterion: torch.optim.SGD(criterion.parameters(), lr=0.1).step(),
        lambda criterion: torch.optim.SGD(criterion.parameters(), 0.1, weight_decay=0.1).step(),
        lambda criterion: torch.optim.Adam(criterion.parameters(), lr=0.1).step(),
        lambda criterion: criterion.weight.grad + 1.0,
    ],
    ids=["norm", "our norm", "value", "read", "sgd", "decay", "adam", "add"],
)
def test_whoever_uses_the_gradient_is_told(use: Callable[[Any], Any]) -> None:
    criterion = criterion_of()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    loss_of_a_batch(criterion).backward()
    with pytest.raises(RuntimeError, match=r"used up in the backward.*torch\.optim\.SGD"):
        use(criterion)
    assert "Spent" in repr(criterion.weight.grad)
    optimizer.step()


def _compiled(criterion: Any) -> Tensor:
    x, labels = next(batches(criterion.weight.device, criterion.weight.dtype))
    return torch.compile(criterion, backend="aot_eager")(x, labels)


def _on_the_reference(criterion: Any) -> Tensor:
    criterion.backend = "reference"
    return loss_of_a_batch(criterion)


@pytest.mark.parametrize(
    "loss",
    [
        lambda criterion: criterion.weight.square().sum(),
        lambda criterion: fm.regularizers.regular_face(criterion.weight),
        _compiled,
        _on_the_reference,
    ],
    ids=["plain", "regulariser", "compiled", "reference"],
)  # fmt: skip
def test_a_whole_gradient_raises_at_the_step(loss: Callable[[Any], Tensor]) -> None:
    criterion = criterion_of()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    before = criterion.weight.detach().clone()
    loss(criterion).backward()
    with pytest.raises(RuntimeError, match="gradient as a whole"):
        optimizer.step()
    assert torch.equal(criterion.weight, before)


def test_sampled_classes_are_refused() -> None:
    criterion = criterion_of()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    fm.sampling.sample_negatives(criterion, 0.3)
    with pytest.raises(ValueError, match=r"SGDInBackward .*use fused_margin\.optim\.RowSparseSGD"):
        loss_of_a_batch(criterion)
    optimizer.release()


def _of_another_loss(criterion: Any) -> Tensor:
    other = fm.CosFaceLoss(CLASSES, DIM)
    other.weight = criterion.weight
    return loss_of_a_batch(other)


@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "second",
    [
        loss_of_a_batch,
        _of_another_loss,
        lambda criterion: fm.regularizers.regular_face(criterion.weight),
        lambda criterion: fm.regularizers.center_invariant(criterion.weight),
    ],
    ids=["same loss", "shared weight", "regular_face", "center_invariant"],
)
def test_two_gradients_in_one_backward_raise_and_change_nothing(
    second: Callable[[Any], Tensor], is_first: bool
) -> None:
    criterion = criterion_of()
    optimizer = SGDInBackward([criterion.weight], **MOMENTUM)
    before = copy.deepcopy((criterion.weight, optimizer.state_dict()))
    losses = [second(criterion), loss_of_a_batch(criterion)]
    losses = losses if is_first else losses[::-1]
    with pytest.raises(RuntimeError, match=r"twice.*nothing has been changed.*sample_weight"):
        (losses[0] + 0.5 * losses[1]).backward()
    assert criterion.weight.grad is None
    assert torch.equal(criterion.weight, before[0])
    assert str(optimizer.state_dict()) == str(before[1])
    del losses
    loss_of_a_batch(criterion).backward()
    optimizer.step()


def test_a_second_loss_that_no_backward_comes_to_is_none() -> None:
    criterion = criterion_of()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    logged, loss = loss_of_a_batch(criterion), loss_of_a_batch(criterion)
    loss.backward()
    optimizer.step()
    assert logged.item() == loss.item()


def test_another_function_of_the_weights_beside_the_loss_raises() -> None:
    criterion = criterion_of()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    with pytest.raises(RuntimeError, match=r"another gradient.*load the last checkpoint"):
        (loss_of_a_batch(criterion) + criterion.weight.sum()).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"another gradient|modified by an inplace"):
        (loss_of_a_batch(criterion) + criterion.weight.square().sum()).backward()


@pytest.mark.parametrize("sub_centers", [1, 2])
def test_a_backward_in_eval_mode_updates_nothing(sub_centers: int) -> None:
    criterion = criterion_of(sub_centers=sub_centers).eval()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    before = criterion.weight.detach().clone()
    loss_of_a_batch(criterion).backward()
    assert torch.equal(criterion.weight, before)
    assert has_gradient(criterion)
    with pytest.raises(RuntimeError, match=r"eval mode.*criterion\.train\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    loss_of_a_batch(criterion.train()).backward()
    assert not torch.equal(criterion.weight, before)
    optimizer.step()


def test_columns_are_refused() -> None:
    criterion = fm.compat.pml.ArcFaceLoss(CLASSES, DIM)
    with pytest.raises(TypeError, match=r"in rows.*strides.*compat\.pml"):
        SGDInBackward([criterion.W])


def test_the_later_of_two_updates() -> None:
    criterion = criterion_of()
    first = SGDInBackward([criterion.weight], lr=0.1)
    second = SGDInBackward([criterion.weight], lr=0.3)
    before = criterion.weight.detach().clone()
    loss_of_a_batch(criterion).backward()
    expected = criterion_of()
    train(expected, SGDInBackward([expected.weight], lr=0.3), 1)
    assert torch.equal(criterion.weight, expected.weight)
    assert not torch.equal(criterion.weight, before)
    with pytest.raises(RuntimeError, match="another one was made"):
        first.step()
    second.step()


@pytest.mark.parametrize("clear", [torch.nn.Module.zero_grad, None], ids=["module", "optimiser"])
def test_gradients_set_to_zero_end_a_step(clear: Any) -> None:
    criterion = criterion_of()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    for _ in range(2):
        loss_of_a_batch(criterion).backward()
        if clear is None:
            optimizer.zero_grad(set_to_none=False)
        else:
            clear(criterion, set_to_none=False)
    optimizer.step()


@pytest.mark.parametrize("given", ["vector", "fp16", "tensor"])
def test_what_is_no_class_weight_is_refused(given: str) -> None:
    parameter: Any = {
        "vector": torch.nn.Parameter(torch.zeros(3)),
        "fp16": torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float16)),
        "tensor": torch.zeros(3, 2, requires_grad=True),
    }[given]
    with pytest.raises(TypeError, match="SGDInBackward takes class weights"):
        SGDInBackward([parameter])


def test_a_module_is_told_from_its_weights() -> None:
    module: Any = criterion_of()
    with pytest.raises(TypeError, match=r"got ArcFaceLoss; give \[criterion\.weight\]"):
        SGDInBackward(module)


@pytest.mark.parametrize("steps", [0, 2])
def test_weights_may_be_cast(steps: int) -> None:
    criterion = criterion_of(dtype=torch.float32)
    optimizer = SGDInBackward([criterion.weight], **MOMENTUM)
    train(criterion, optimizer, steps)
    criterion.double()
    expected = copy.deepcopy(criterion)
    of_expected = torch.optim.SGD([expected.weight], **MOMENTUM)
    if steps:
        velocity = optimizer.state[criterion.weight]["momentum_buffer"].double()
        of_expected.state[expected.weight]["momentum_buffer"] = velocity
    want = train(expected, of_expected, 3)
    for one, other in zip(train(criterion, optimizer, 3), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_other_gradients_update_nothing() -> None:
    criterion = criterion_of()
    SGDInBackward([criterion.weight], lr=0.3)
    before = criterion.weight.detach().clone()
    x, labels = next(batches(criterion.weight.device, torch.float64))
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    (d_x,) = torch.autograd.grad(criterion(x, labels), [x])
    (d_w,) = torch.autograd.grad(criterion(x, labels), [criterion.weight])
    criterion(x, labels).backward(inputs=[x])
    assert x.grad is not None
    assert torch.equal(d_x, x.grad)
    assert d_w.abs().max() > 0
    assert torch.equal(criterion.weight, before)
    assert criterion.weight.grad is None
    optimizer.release()


def test_frozen_weights_stay() -> None:
    criterion = criterion_of()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    criterion.weight.requires_grad_(False)
    before = criterion.weight.detach().clone()
    train(criterion, optimizer, 2)
    assert torch.equal(criterion.weight, before)


def test_release_and_the_end_of_an_optimiser_give_the_gradient_back() -> None:
    criterion: Any = criterion_of()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    optimizer.release()
    loss_of_a_batch(criterion).backward()
    assert has_gradient(criterion)
    criterion.weight.grad = None
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    del optimizer
    gc.collect()
    loss_of_a_batch(criterion).backward()
    assert has_gradient(criterion)
