"""SGD in the backward: the weights of torch's SGD, without a gradient of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SHAPED_BACKENDS
from in_backward import (
    DIM,
    FEW_STEPS,
    MOMENTUM,
    STEPS,
    batches,
    chunks,  # noqa: F401 - a fixture
    criterion_of,
    each_backend,
    loss_of_a_batch,
    train,
)

import fused_margin as fm
from fused_margin.optim import SGDInBackward

Tensor = torch.Tensor


class _Both:
    """Two optimisers as one: of the class weights, and of what else a criterion learns."""

    def __init__(self, criterion: Any, kind: Any, settings: dict[str, Any]) -> None:
        rest = [p for name, p in criterion.named_parameters() if name != "weight"]
        self.optimizers = [kind([criterion.weight], **settings)]
        if rest:
            self.optimizers.append(torch.optim.SGD(rest, lr=1e-3, momentum=0.9))

    def step(self) -> None:
        for one in self.optimizers:
            one.step()

    def zero_grad(self) -> None:
        for one in self.optimizers:
            one.zero_grad()


def _check_as_sgd(make: Callable[[], Any], settings: dict[str, Any], **call: Any) -> None:
    expected, criterion = make(), make()
    count = FEW_STEPS if criterion.backend == "triton" else STEPS
    want = train(expected, _Both(expected, torch.optim.SGD, settings), count, **call)
    got = train(criterion, _Both(criterion, SGDInBackward, settings), count, **call)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    for one, other in zip(criterion.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@each_backend
@pytest.mark.parametrize("settings", [{"lr": 0.3}, MOMENTUM], ids=["plain", "momentum"])
@pytest.mark.parametrize("kind", [fm.ArcFaceLoss, fm.FixedAdaCosLoss])
def test_weights_are_those_of_sgd(backend: str, settings: dict[str, Any], kind: Any) -> None:
    _check_as_sgd(lambda: criterion_of(backend, kind), settings)


@pytest.mark.parametrize("backend", SHAPED_BACKENDS[1:])
@pytest.mark.parametrize(
    "make",
    [
        lambda b: criterion_of(b, label_smoothing=0.1),
        lambda b: criterion_of(b, sub_centers=3),
        lambda b: criterion_of(b, sub_centers=2, label_smoothing=0.2),
        lambda b: criterion_of(b, fm.CurricularFaceLoss),
        lambda b: criterion_of(b, fm.MVSoftmaxLoss, label_smoothing=0.1),
        lambda b: criterion_of(b, fm.AdaCosLoss),
        lambda b: criterion_of(b, memory_budget=0),
        lambda b: criterion_of(b, reduction="sum", focal_gamma=1.5),
        lambda b: criterion_of(b, scale=torch.nn.Parameter(torch.tensor(9.0, dtype=torch.float64))),
        lambda b: criterion_of(
            b, fm.MVSoftmaxLoss, scale=torch.nn.Parameter(torch.tensor(9.0, dtype=torch.float64))
        ),
    ],
    ids=["smoothed", "sub-centres", "both", "curricular", "mv, smoothed", "adacos", "no budget",
         "focal, sum", "learnt scale", "mv, learnt scale"],
)  # fmt: skip
def test_with_every_part_of_a_backward(backend: str, make: Callable[[str], Any]) -> None:
    _check_as_sgd(lambda: make(backend), MOMENTUM)


def test_the_bits_are_those_of_torch() -> None:
    """For the same gradient: that of a sweep which is lent nothing."""
    found = []
    for kind in (torch.optim.SGD, SGDInBackward):
        criterion = criterion_of(dtype=torch.float32)
        found.append(train(criterion, kind([criterion.weight], **MOMENTUM)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_statistics_of_the_batch_are_from_before_the_update() -> None:
    _check_as_sgd(lambda: criterion_of(), MOMENTUM, return_stats=True)


@each_backend
def test_a_batch_without_rows_is_a_gradient_of_zeros(backend: str) -> None:
    def train(kind: Any) -> Tensor:
        criterion = criterion_of(backend)
        optimizer = kind([criterion.weight], **MOMENTUM)
        for x, labels in batches(criterion.weight.device, torch.float64, 3):
            for some in (x, x.detach()[:0].requires_grad_()):
                criterion(some, labels[: len(some)]).backward()
                optimizer.step()
                optimizer.zero_grad()
        return criterion.weight.detach()

    torch.testing.assert_close(train(SGDInBackward), train(torch.optim.SGD), rtol=1e-9, atol=1e-11)


def test_schedulers_of_the_learning_rate() -> None:
    found = []
    for kind in (torch.optim.SGD, SGDInBackward):
        criterion = criterion_of()
        optimizer = kind([criterion.weight], lr=1.0, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for x, labels in batches(criterion.weight.device, torch.float64):
            criterion(x, labels).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        found.append(criterion.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


# --- state ------------------------------------------------------------------------------------


def test_a_state_goes_on_as_if_nothing_had_been() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        whole = criterion_of(dtype=dtype)
        expected = train(whole, SGDInBackward([whole.weight], **MOMENTUM, seed=3))[0]
        first = criterion_of(dtype=dtype)
        optimizer = SGDInBackward([first.weight], **MOMENTUM, seed=3)
        found = list(batches(first.weight.device, dtype))
        for x, labels in found[:7]:
            first(x, labels).backward()
            optimizer.step()
        saved = pickle.loads(pickle.dumps((first.state_dict(), optimizer.state_dict())))
        optimizer.release()
        second = criterion_of(dtype=dtype)
        second.load_state_dict(saved[0])
        optimizer = SGDInBackward([second.weight])
        optimizer.load_state_dict(saved[1])
        for x, labels in found[7:]:
            second(x, labels).backward()
            optimizer.step()
        assert torch.equal(second.weight, expected)


def test_momentum_of_torch_s_sgd_is_taken() -> None:
    expected = criterion_of()
    first = torch.optim.SGD([expected.weight], **MOMENTUM)
    train(expected, first, 4)
    criterion = copy.deepcopy(expected)
    optimizer = SGDInBackward([criterion.weight], **MOMENTUM)
    optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    train(expected, first, 4)
    train(criterion, optimizer, 4)
    torch.testing.assert_close(criterion.weight, expected.weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [torch.optim.SGD, fm.optim.RowSparseSGD])
def test_its_momentum_is_taken(kind: Any) -> None:
    expected = criterion_of()
    first = SGDInBackward([expected.weight], **MOMENTUM)
    train(expected, first, 4)
    criterion = copy.deepcopy(expected)
    first.release()
    optimizer = kind([criterion.weight], lr=1.0)
    optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    again = SGDInBackward([expected.weight])
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    train(expected, again, 4)
    train(criterion, optimizer, 4)
    torch.testing.assert_close(criterion.weight, expected.weight, rtol=1e-9, atol=1e-11)
    back = SGDInBackward([criterion.weight])
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(expected, again, 2)
    train(criterion, back, 2)
    torch.testing.assert_close(criterion.weight, expected.weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("setting", [{"nesterov": True}, {"dampening": 0.5}, {"maximize": True}])
def test_a_state_that_asks_for_more_is_refused(setting: dict[str, Any]) -> None:
    criterion = criterion_of()
    first = torch.optim.SGD([criterion.weight], lr=0.1, momentum=0.9, **setting)
    train(criterion, first, 1)
    optimizer = SGDInBackward([criterion.weight])
    with pytest.raises(ValueError, match=f"SGDInBackward can't do {next(iter(setting))}"):
        optimizer.load_state_dict(first.state_dict())


def test_copies_and_pickles_update_their_own_weights() -> None:
    criterion = criterion_of()
    optimizer = SGDInBackward([criterion.weight], **MOMENTUM)
    both = copy.deepcopy((criterion, optimizer)), pickle.loads(pickle.dumps((criterion, optimizer)))
    expected = train(criterion, optimizer, 3)[0]
    for other, its_own in both:
        assert torch.equal(train(other, its_own, 3)[0], expected)


def test_check_setup_knows_it() -> None:
    criterion = criterion_of()
    fm.check_setup(criterion, SGDInBackward([criterion.weight], lr=0.3))
    with pytest.raises(ValueError, match=r"two|several|more than one"):
        fm.check_setup(
            criterion,
            [SGDInBackward([criterion.weight]), torch.optim.SGD([criterion.weight], lr=0.1)],
        )


def test_scaled_losses() -> None:
    """As if they weren't scaled: by a power of 2, to the bit."""
    weights = []
    for is_scaled in (False, True):
        criterion = criterion_of(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=True)
        optimizer = SGDInBackward(
            [criterion.weight], **MOMENTUM, grad_scaler=scaler if is_scaled else None
        )
        for x, labels in batches(criterion.weight.device, torch.float32, 4):
            loss = criterion(x, labels)
            (scaler.scale(loss) if is_scaled else loss).backward()
            optimizer.step()
        weights.append(criterion.weight.detach())
    assert torch.equal(*weights)
    with pytest.raises(TypeError, match="grad_scaler must be"):
        SGDInBackward([criterion.weight], grad_scaler=128.0)


def test_a_grad_scaler_is_told() -> None:
    criterion = criterion_of(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = SGDInBackward([criterion.weight], grad_scaler=scaler)
    scaler.scale(loss_of_a_batch(criterion)).backward()
    with pytest.raises(RuntimeError, match=r"used up in the backward.*grad_scaler=scaler"):
        scaler.step(optimizer)


def test_a_grad_scaler_that_was_not_given_is_noticed() -> None:
    criterion = criterion_of(dtype=torch.float32)
    before = criterion.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    fm.check_setup(criterion, optimizer)  # nothing has been scaled yet
    with pytest.raises(RuntimeError, match=r"a GradScaler in use.*grad_scaler=scaler"):
        scaler.scale(loss_of_a_batch(criterion)).backward()
    assert torch.equal(criterion.weight, before)
    with pytest.raises(RuntimeError, match=r"a GradScaler in use.*enabled=False"):
        fm.check_setup(criterion, optimizer)
    off = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = SGDInBackward([criterion.weight], lr=0.3, grad_scaler=off)
    loss_of_a_batch(criterion).backward()
    optimizer.step()
    fm.check_setup(criterion, optimizer)
    expected = criterion_of(dtype=torch.float32)
    del scaler
    train(expected, SGDInBackward([expected.weight], lr=0.3), 1)
    assert torch.equal(criterion.weight, expected.weight)


@pytest.mark.parametrize(
    "kind", [fm.ArcFaceLoss, fm.FixedAdaCosLoss, fm.AdaFaceLoss, fm.CurricularFaceLoss]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_batch_that_overflowed_updates_nothing(kind: Any, value: float) -> None:
    """As `GradScaler.step` leaves out a step, and halves the scale."""
    criterion = criterion_of(kind=kind, dtype=torch.float32)
    layer = torch.nn.Linear(DIM, DIM)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    of_layer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer = SGDInBackward([criterion.weight], **MOMENTUM, grad_scaler=scaler)
    x, labels = next(batches(criterion.weight.device, torch.float32))
    for is_finite in (True, False, True):
        before = copy.deepcopy((criterion.weight, optimizer.state_dict(), layer.weight))
        factors = torch.ones(len(x), 1)
        factors[3] = 1.0 if is_finite else value
        scaler.scale(criterion(layer(x.detach()) * factors, labels)).backward()
        scaler.step(of_layer)
        optimizer.step()
        scaler.update()
        of_layer.zero_grad()
        assert torch.equal(criterion.weight, before[0]) == (not is_finite)
        assert torch.equal(layer.weight, before[2]) == (not is_finite)
        assert (str(optimizer.state_dict()) == str(before[1])) == (not is_finite)
        assert criterion.weight.isfinite().all()
    assert scaler.get_scale() == 4.0


# --- stochastic rounding ----------------------------------------------------------------------


def _rounding(weight: Tensor, seed: int = 0) -> Any:
    from fused_margin._in_backward import _Rounding, _Weights

    return _Rounding(_Weights(weight, None, 1.0, 0.0, 0.0, 1.0), seed)


def test_rounding_is_right_on_average_and_to_a_neighbour() -> None:
    values = torch.tensor([1.0, 1.001, -3.017, 1e-30, 2.5e-39, 3e38, 0.0, -0.0])
    many = values.repeat(20_000, 1)
    found = _rounding(torch.zeros(1, 1, dtype=torch.bfloat16)).rounded(many.clone())
    assert torch.equal(found.bfloat16().float(), found)
    bits = values.view(torch.int32) & -(1 << 16)
    low, high = bits.view(torch.float32), (bits + (1 << 16)).view(torch.float32)
    assert bool(((found == low) | (found == high)).all())
    share = (found == high).double().mean(dim=0)
    wanted = (values.double() - low.double()) / (high.double() - low.double())
    assert torch.allclose(share, wanted, atol=4 * 0.5 / 20_000**0.5)


def test_what_isn_t_finite_stays() -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan")])
    found = _rounding(torch.zeros(1, 1, dtype=torch.bfloat16)).rounded(values.clone())
    assert torch.equal(found[:2], values[:2])
    assert found[2].isnan()


def test_updates_too_small_for_bf16_get_through() -> None:
    """On average; rounded to nearest hardly any would."""
    rate, steps = 4e-5, 150
    criterion = criterion_of(dtype=torch.bfloat16).float()
    low = copy.deepcopy(criterion).bfloat16()
    before, nearest = criterion.weight.detach().clone(), low.weight.detach().clone()
    optimizers = SGDInBackward([criterion.weight], rate), SGDInBackward([low.weight], rate, seed=1)
    x, labels = next(batches(low.weight.device, torch.bfloat16))
    for _ in range(steps):
        last = criterion.weight.detach().clone()
        for one, optimizer in zip((criterion, low), optimizers, strict=True):
            one(x.detach(), labels).backward()
            optimizer.step()
        nearest += (criterion.weight.detach() - last).bfloat16()
    moved = criterion.weight.detach() - before
    errors = [
        float((weight.detach().float() - before - moved).norm() / moved.norm())
        for weight in (low.weight, nearest)
    ]
    assert errors[0] < 0.5 < 0.8 < errors[1]


def test_the_seed_decides() -> None:
    def weights_of(seed: int) -> Tensor:
        criterion = criterion_of(dtype=torch.bfloat16)
        return train(criterion, SGDInBackward([criterion.weight], **MOMENTUM, seed=seed), 5)[0]

    assert torch.equal(weights_of(1), weights_of(1))
    assert not torch.equal(weights_of(1), weights_of(2))
