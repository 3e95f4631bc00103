"""SGD in the backward: the weights of torch's SGD, without a gradient of them."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import FUSED_BACKENDS, SHAPED_BACKENDS, device_of

import fused_margin as fm
from fused_margin import _updates
from fused_margin.optim import SGDInBackward

Tensor = torch.Tensor
CLASSES, DIM, ROWS = 70, 12, 9
STEPS, FEW_STEPS = 20, 3  # few in the interpreter
MOMENTUM: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}
each_backend = pytest.mark.parametrize("backend", FUSED_BACKENDS)


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Several chunks of classes in the kernels, the last of them shorter."""
    if "triton" in request.node.name:
        from fused_margin._triton import launch

        monkeypatch.setattr(launch, "CHUNK_BYTES", 33 * 8 * 16)


def _criterion(backend: str = "auto", kind: Any = fm.ArcFaceLoss, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"dtype": torch.float64, "device": device_of(backend)} | options
    return kind(CLASSES, DIM, backend=backend, **options)


def _batches(device: torch.device, dtype: torch.dtype, count: int = STEPS) -> Any:
    generator = torch.Generator().manual_seed(1)
    for step in range(count):
        rows = ROWS if step % 5 else ROWS - 2
        x = torch.randn(rows, DIM, generator=generator, dtype=torch.float64)
        labels = torch.randint(CLASSES, (rows,), generator=generator)
        labels[1] = -100 if step % 3 else labels[0]
        yield x.to(device, dtype).requires_grad_(), labels.to(device)


def _train(criterion: Any, optimizer: Any, count: int = STEPS, **call: Any) -> list[Tensor]:
    """Train; returns the weights and each step's gradient of the embeddings."""
    found = []
    dtype = criterion.weight.dtype
    for x, labels in _batches(criterion.weight.device, dtype, count):
        loss = criterion(x, labels, **call)
        (loss if isinstance(loss, Tensor) else loss[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert x.grad is not None
        found.append(x.grad)
    return [criterion.weight.detach(), *found]


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
    want = _train(expected, _Both(expected, torch.optim.SGD, settings), count, **call)
    got = _train(criterion, _Both(criterion, SGDInBackward, settings), count, **call)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    for one, other in zip(criterion.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@each_backend
@pytest.mark.parametrize("settings", [{"lr": 0.3}, MOMENTUM], ids=["plain", "momentum"])
@pytest.mark.parametrize("kind", [fm.ArcFaceLoss, fm.FixedAdaCosLoss])
def test_weights_are_those_of_sgd(backend: str, settings: dict[str, Any], kind: Any) -> None:
    _check_as_sgd(lambda: _criterion(backend, kind), settings)


@pytest.mark.parametrize("backend", SHAPED_BACKENDS[1:])
@pytest.mark.parametrize(
    "make",
    [
        lambda b: _criterion(b, label_smoothing=0.1),
        lambda b: _criterion(b, sub_centers=3),
        lambda b: _criterion(b, sub_centers=2, label_smoothing=0.2),
        lambda b: _criterion(b, fm.CurricularFaceLoss),
        lambda b: _criterion(b, fm.MVSoftmaxLoss, label_smoothing=0.1),
        lambda b: _criterion(b, fm.AdaCosLoss),
        lambda b: _criterion(b, memory_budget=0),
        lambda b: _criterion(b, reduction="sum", focal_gamma=1.5),
        lambda b: _criterion(b, scale=torch.nn.Parameter(torch.tensor(9.0, dtype=torch.float64))),
        lambda b: _criterion(
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
        criterion = _criterion(dtype=torch.float32)
        found.append(_train(criterion, kind([criterion.weight], **MOMENTUM)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_statistics_of_the_batch_are_from_before_the_update() -> None:
    _check_as_sgd(lambda: _criterion(), MOMENTUM, return_stats=True)


@each_backend
def test_a_batch_without_rows_is_a_gradient_of_zeros(backend: str) -> None:
    def train(kind: Any) -> Tensor:
        criterion = _criterion(backend)
        optimizer = kind([criterion.weight], **MOMENTUM)
        for x, labels in _batches(criterion.weight.device, torch.float64, 3):
            for some in (x, x.detach()[:0].requires_grad_()):
                criterion(some, labels[: len(some)]).backward()
                optimizer.step()
                optimizer.zero_grad()
        return criterion.weight.detach()

    torch.testing.assert_close(train(SGDInBackward), train(torch.optim.SGD), rtol=1e-9, atol=1e-11)


def test_schedulers_of_the_learning_rate() -> None:
    found = []
    for kind in (torch.optim.SGD, SGDInBackward):
        criterion = _criterion()
        optimizer = kind([criterion.weight], lr=1.0, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for x, labels in _batches(criterion.weight.device, torch.float64):
            criterion(x, labels).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        found.append(criterion.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


# --- what can't be ----------------------------------------------------------------------------


def _step(criterion: Any) -> Tensor:
    x, labels = next(_batches(criterion.weight.device, criterion.weight.dtype))
    return criterion(x, labels)


@each_backend
def test_accumulation_raises_and_changes_nothing(backend: str) -> None:
    criterion = _criterion(backend)
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    first, second = _step(criterion), _step(criterion)
    first.backward()
    before = criterion.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"can't be accumulated.*optimizer\.step\(\)"):
        second.backward()
    assert torch.equal(criterion.weight, before)
    optimizer.step()
    _step(criterion).backward()
    assert not torch.equal(criterion.weight, before)


@pytest.mark.parametrize("ends", ["step", "zero_grad"])
def test_either_ends_a_step(ends: str) -> None:
    criterion = _criterion()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    for _ in range(2):
        _step(criterion).backward()
        assert isinstance(criterion.weight.grad, _updates.Spent)
        getattr(optimizer, ends)()
        assert criterion.weight.grad is None


def test_a_second_backward_of_one_graph_raises() -> None:
    criterion = _criterion()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    loss = _step(criterion)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
        lambda criterion: torch.optim.Adam(criterion.parameters(), lr=0.1).step(),
        lambda criterion: criterion.weight.grad.zero_(),
    ],
    ids=["norm", "our norm", "value", "read", "sgd", "adam", "zero"],
)
def test_whoever_uses_the_gradient_is_told(use: Callable[[Any], Any]) -> None:
    criterion = _criterion()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    _step(criterion).backward()
    with pytest.raises(RuntimeError, match=r"used up in the backward.*torch\.optim\.SGD"):
        use(criterion)
    assert "Spent" in repr(criterion.weight.grad)
    optimizer.step()


def _compiled(criterion: Any) -> Tensor:
    x, labels = next(_batches(criterion.weight.device, criterion.weight.dtype))
    return torch.compile(criterion, backend="aot_eager")(x, labels)


def _on_the_reference(criterion: Any) -> Tensor:
    criterion.backend = "reference"
    return _step(criterion)


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
    criterion = _criterion()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    before = criterion.weight.detach().clone()
    loss(criterion).backward()
    with pytest.raises(RuntimeError, match="gradient as a whole"):
        optimizer.step()
    assert torch.equal(criterion.weight, before)


def test_sampled_classes_are_refused() -> None:
    criterion = _criterion()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    fm.sampling.sample_negatives(criterion, 0.3)
    with pytest.raises(ValueError, match=r"SGDInBackward .*use fused_margin\.optim\.RowSparseSGD"):
        _step(criterion)
    optimizer.release()


def _both(criterion: Any, optimizer: Any) -> None:
    (_step(criterion) + criterion.weight.square().sum()).backward()
    optimizer.step()


def test_a_regulariser_beside_the_loss_raises() -> None:
    criterion = _criterion()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    with pytest.raises(RuntimeError, match=r"gradient as a whole|used up|inplace"):
        _both(criterion, optimizer)


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
    module: Any = _criterion()
    with pytest.raises(TypeError, match=r"got ArcFaceLoss; give \[criterion\.weight\]"):
        SGDInBackward(module)


def test_weights_may_be_cast_before_the_first_step() -> None:
    criterion = _criterion(dtype=torch.float32)
    optimizer = SGDInBackward([criterion.weight], **MOMENTUM)
    criterion.double()
    expected = copy.deepcopy(criterion)
    want = _train(expected, torch.optim.SGD([expected.weight], **MOMENTUM), 3)
    for one, other in zip(_train(criterion, optimizer, 3), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_other_gradients_update_nothing() -> None:
    criterion = _criterion()
    SGDInBackward([criterion.weight], lr=0.3)
    before = criterion.weight.detach().clone()
    x, labels = next(_batches(criterion.weight.device, torch.float64))
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
    criterion = _criterion()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    criterion.weight.requires_grad_(False)
    before = criterion.weight.detach().clone()
    _train(criterion, optimizer, 2)
    assert torch.equal(criterion.weight, before)


def _has_gradient(criterion: Any) -> bool:
    return bool(criterion.weight.grad.abs().max() > 0)


def test_release_and_the_end_of_an_optimiser_give_the_gradient_back() -> None:
    criterion: Any = _criterion()
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    optimizer.release()
    _step(criterion).backward()
    assert _has_gradient(criterion)
    criterion.weight.grad = None
    optimizer = SGDInBackward([criterion.weight], lr=0.3)
    del optimizer
    gc.collect()
    _step(criterion).backward()
    assert _has_gradient(criterion)


# --- state ------------------------------------------------------------------------------------


def test_a_state_goes_on_as_if_nothing_had_been() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        whole = _criterion(dtype=dtype)
        expected = _train(whole, SGDInBackward([whole.weight], **MOMENTUM, seed=3))[0]
        first = _criterion(dtype=dtype)
        optimizer = SGDInBackward([first.weight], **MOMENTUM, seed=3)
        batches = list(_batches(first.weight.device, dtype))
        for x, labels in batches[:7]:
            first(x, labels).backward()
            optimizer.step()
        saved = pickle.loads(pickle.dumps((first.state_dict(), optimizer.state_dict())))
        optimizer.release()
        second = _criterion(dtype=dtype)
        second.load_state_dict(saved[0])
        optimizer = SGDInBackward([second.weight])
        optimizer.load_state_dict(saved[1])
        for x, labels in batches[7:]:
            second(x, labels).backward()
            optimizer.step()
        assert torch.equal(second.weight, expected)


def test_momentum_of_torch_s_sgd_is_taken() -> None:
    expected = _criterion()
    first = torch.optim.SGD([expected.weight], **MOMENTUM)
    _train(expected, first, 4)
    criterion = copy.deepcopy(expected)
    optimizer = SGDInBackward([criterion.weight], **MOMENTUM)
    optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    _train(expected, first, 4)
    _train(criterion, optimizer, 4)
    torch.testing.assert_close(criterion.weight, expected.weight, rtol=1e-9, atol=1e-11)


def test_copies_and_pickles_update_their_own_weights() -> None:
    criterion = _criterion()
    optimizer = SGDInBackward([criterion.weight], **MOMENTUM)
    both = copy.deepcopy((criterion, optimizer)), pickle.loads(pickle.dumps((criterion, optimizer)))
    expected = _train(criterion, optimizer, 3)[0]
    for other, its_own in both:
        assert torch.equal(_train(other, its_own, 3)[0], expected)


def test_check_setup_knows_it() -> None:
    criterion = _criterion()
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
        criterion = _criterion(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=True)
        optimizer = SGDInBackward(
            [criterion.weight], **MOMENTUM, grad_scaler=scaler if is_scaled else None
        )
        for x, labels in _batches(criterion.weight.device, torch.float32, 4):
            loss = criterion(x, labels)
            (scaler.scale(loss) if is_scaled else loss).backward()
            optimizer.step()
        weights.append(criterion.weight.detach())
    assert torch.equal(*weights)
    with pytest.raises(TypeError, match="grad_scaler must be"):
        SGDInBackward([criterion.weight], grad_scaler=128.0)


def test_a_grad_scaler_is_told() -> None:
    criterion = _criterion(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = SGDInBackward([criterion.weight], grad_scaler=scaler)
    scaler.scale(_step(criterion)).backward()
    with pytest.raises(RuntimeError, match="used up in the backward"):
        scaler.step(optimizer)


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
    criterion = _criterion(dtype=torch.bfloat16).float()
    low = copy.deepcopy(criterion).bfloat16()
    before, nearest = criterion.weight.detach().clone(), low.weight.detach().clone()
    optimizers = SGDInBackward([criterion.weight], rate), SGDInBackward([low.weight], rate, seed=1)
    x, labels = next(_batches(low.weight.device, torch.bfloat16))
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
    def train(seed: int) -> Tensor:
        criterion = _criterion(dtype=torch.bfloat16)
        return _train(criterion, SGDInBackward([criterion.weight], **MOMENTUM, seed=seed), 5)[0]

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))
