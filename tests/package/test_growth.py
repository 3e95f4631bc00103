"""New classes for a loss in training: what stays, what is new, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sharded_cases import CRITERIA, FP64, TOO_FEW
from torch import Tensor, nn
from torch.optim import swa_utils
from two_processes import Pair

# Not imported at all where torch has no gloo: two_processes skips the file.
# isort: split
from torch.nn.parallel import DistributedDataParallel

import fused_margin as fm
from fused_margin import _setup
from fused_margin.compat import insightface, pml
from fused_margin.distributed import _shards
from fused_margin.optim import RowSparseAdam, RowSparseSGD, SGDInBackward

OLD, NEW, DIM = 7, 3, 6
ALL = OLD + NEW

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "sgd without momentum": lambda p: torch.optim.SGD(p, 0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "adam, fused": lambda p: torch.optim.Adam(p, 0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.1),
    "row-sparse sgd": lambda p: RowSparseSGD(p, 0.1, 0.9, 0.01),
    "sgd in the backward": lambda p: SGDInBackward(p, 0.1, 0.9, 0.01),
    "row-sparse adam": lambda p: RowSparseAdam(p, 0.1),
}


def _batch(num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, DIM, generator=generator, dtype=FP64)
    return x, torch.randint(num_classes, (8,), generator=generator)


def _train(criterion: Any, *optimizers: Any, steps: int = 3, seed: int = 0) -> Tensor:
    """The last loss, which holds its graph as the variable of a training loop does."""
    loss = torch.zeros(())
    for step in range(steps):
        x, labels = _batch(criterion.num_classes, seed + step)
        loss = criterion(x.requires_grad_(), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return loss


def _usual_norm(weight: Tensor) -> float:
    """The geometric mean of the norms of rows that aren't 0."""
    norms = weight.detach().double().norm(dim=1)
    return float(norms[norms > 0].log().mean().exp())


def _of_norm(rows: Tensor, norm: float) -> Tensor:
    rows = rows.double()
    return norm * rows / rows.norm(dim=1, keepdim=True)


def _padded(value: Any, rows: int) -> Any:
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != rows:
        return copy.deepcopy(value)
    return torch.cat([value, value.new_zeros(NEW, *value.shape[1:])])


def test_an_optimiser_of_other_parameters_keeps_no_state_of_the_weight() -> None:
    """Beside the one that holds it: its own state can be saved, and is as before."""
    criterion = fm.ArcFaceLoss(OLD, DIM, dtype=FP64)
    backbone = nn.Linear(DIM, DIM, dtype=FP64)
    of_model = torch.optim.SGD(backbone.parameters(), 0.1, momentum=0.9)
    of_classes = torch.optim.SGD(criterion.parameters(), 0.1, momentum=0.9)
    x, labels = _batch(OLD)
    criterion(backbone(x), labels).backward()
    for one in (of_model, of_classes):
        one.step()
        one.zero_grad()
    before = copy.deepcopy(of_model.state_dict())
    criterion.grow(NEW, [of_model, of_classes])
    assert criterion.weight not in of_model.state
    after = of_model.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, state in before["state"].items():
        assert torch.equal(after["state"][number]["momentum_buffer"], state["momentum_buffer"])
    assert of_classes.state_dict()["state"][0]["momentum_buffer"].shape == (ALL, DIM)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_with_all_classes_and_that_state(name: str) -> None:
    criterion = fm.ArcFaceLoss(OLD, DIM, scale=8.0, dtype=FP64)
    optimizer = OPTIMIZERS[name](criterion.parameters())
    last = _train(criterion, optimizer)
    weight, before = criterion.weight, criterion.weight.detach().clone()
    state = {key: _padded(value, OLD) for key, value in optimizer.state[weight].items()}

    given = torch.randn(NEW, DIM, dtype=FP64)
    assert criterion.grow(NEW, optimizer, weight=given) == range(OLD, ALL)
    assert criterion.weight is weight
    assert criterion.num_classes == ALL
    assert torch.equal(criterion.weight[:OLD], before)
    new = criterion.weight[OLD:].detach().clone()
    torch.testing.assert_close(new, _of_norm(given, _usual_norm(before)), rtol=1e-6, atol=0)
    for key, value in state.items():
        torch.testing.assert_close(optimizer.state[weight][key], value, rtol=0, atol=0)

    other = fm.ArcFaceLoss(ALL, DIM, scale=8.0, dtype=FP64)
    with torch.no_grad():
        other.weight.copy_(criterion.weight)
    expected = OPTIMIZERS[name](other.parameters())
    expected.state[other.weight] = state
    for one, opt in ((criterion, optimizer), (other, expected)):
        _train(one, opt, seed=10)
    torch.testing.assert_close(criterion.weight, other.weight, rtol=0, atol=0)
    assert (criterion.weight[OLD:] != new).any(dim=1).all()
    assert not last.isnan()


@pytest.mark.parametrize("factor", [1.0, 16.0, 0.01])
def test_drawn_rows_are_those_of_the_seed_and_of_the_usual_norm(factor: float) -> None:
    """Beside weights that are initialised, or trained to be, of another norm than here."""
    criterion = fm.CosFaceLoss(OLD, 400)
    with torch.no_grad():
        criterion.weight.mul_(factor)
    before = criterion.weight.detach().clone()
    torch.manual_seed(5)
    criterion.grow(2000)
    torch.manual_seed(5)
    drawn = torch.empty(2000, 400)
    _shards.draw_rows(drawn, 0, 400**-0.5, int(torch.randint(1 << 62, ())))
    expected = _of_norm(drawn, _usual_norm(before)).float()
    torch.testing.assert_close(criterion.weight[OLD:], expected, rtol=1e-6, atol=0)
    assert criterion.weight[OLD:].norm(dim=1).mean().item() == pytest.approx(factor, rel=0.1)
    assert isinstance(criterion.weight, nn.Parameter)
    assert criterion.weight.requires_grad


@pytest.mark.parametrize("dtype", [FP64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_given_rows_have_the_usual_norm_whatever_theirs(dtype: torch.dtype) -> None:
    """From those whose squares vanish to those whose squares overflow; one row of 0, one huge."""
    criterion = fm.ArcFaceLoss(40, DIM, dtype=dtype)
    with torch.no_grad():
        criterion.weight[:2] = 0.0
        criterion.weight[2] *= 1000.0
    before = criterion.weight.detach().clone()
    norm = _usual_norm(before)
    assert norm == pytest.approx(1.0, rel=0.5)  # of the mean the huge row would make 26
    given = torch.randn(4, DIM, dtype=FP64)
    sizes = torch.tensor([1e-200, 0.1, 20.0, 1e200], dtype=FP64)
    criterion.grow(4, weight=given * sizes[:, None])
    assert torch.equal(criterion.weight[:40], before)
    tolerance = max(1e-6, 2 * torch.finfo(dtype).eps)
    new = criterion.weight[40:].detach().double()
    torch.testing.assert_close(new, _of_norm(given, norm), rtol=tolerance, atol=1e-7)


def test_given_rows_train_as_fast_as_the_others() -> None:
    """Means of embeddings of norm 20 hardly moved beside rows of norm 1."""
    torch.manual_seed(0)
    criterion = fm.NormalizedSoftmaxLoss(40, 16, 16.0)
    optimizer = torch.optim.SGD(criterion.parameters(), 0.1)
    criterion.grow(40, optimizer, weight=20.0 * torch.nn.functional.normalize(torch.randn(40, 16)))
    before = criterion.weight.detach().clone()
    x = torch.randn(400, 16)
    criterion(x, torch.arange(400) % 80).backward()
    optimizer.step()
    turned = 1 - torch.cosine_similarity(criterion.weight.detach().double(), before.double())
    assert 0.2 < float(turned[40:].median() / turned[:40].median()) < 5.0


def test_rows_without_a_direction_are_named() -> None:
    criterion = fm.ArcFaceLoss(OLD, DIM)
    before = criterion.weight.detach().clone()
    for value, what in ((0.0, "zeros, which have no direction"), (float("inf"), "NaN or infinite")):
        given = torch.randn(NEW, DIM)
        given[1:] = value
        with pytest.raises(ValueError, match=rf"row 1 of weight is {what} \(2 of 3 rows are\)"):
            criterion.grow(NEW, weight=given)
    assert torch.equal(criterion.weight, before)
    with torch.no_grad():
        criterion.weight.zero_()
    with pytest.raises(ValueError, match="all class weights so far are 0"):
        criterion.grow(NEW)
    with torch.no_grad():
        criterion.weight[3] = float("nan")
    with pytest.raises(ValueError, match="so far have NaN or infinite rows"):
        criterion.grow(NEW)
    assert criterion.num_classes == OLD


def test_an_optimiser_that_is_left_out() -> None:
    """It would fail at its next step, with a momentum of the old size."""
    criterion: Any = Own()
    optimizer = OPTIMIZERS["sgd"]([criterion.weight])
    of_offsets = OPTIMIZERS["adam"]([criterion.offsets])
    new: dict[str, Any] = {"offsets": 0.0, "sizes": 1, "names": 1, "window": None}
    new["inner.means"] = 0.0
    criterion.grow(NEW, **new)  # neither has made a step yet
    del new["window"]
    _train(criterion, optimizer, of_offsets)
    for given, kind in ((None, "SGD"), (of_offsets, "doesn't hold"), (optimizer, "Adam")):
        with pytest.raises(ValueError, match=kind):
            criterion.grow(NEW, given, **new)
        assert criterion.num_classes == ALL
    criterion.grow(NEW, [optimizer, of_offsets], **new)
    _train(criterion, optimizer, of_offsets)
    criterion.zero_grad()
    optimizer.state.clear()
    of_offsets.state.clear()
    criterion.grow(NEW, **new)
    _train(criterion, optimizer, of_offsets)
    del of_offsets
    criterion.zero_grad()
    criterion.grow(NEW, optimizer, **new)


class Wrapping(torch.optim.Optimizer):
    """As Accelerate's, which has the groups and the state of the one that it wraps."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups, self.state = inner.param_groups, inner.state


def test_an_optimiser_that_wraps_another() -> None:
    criterion = fm.ArcFaceLoss(OLD, DIM, dtype=FP64)
    inner = OPTIMIZERS["sgd"](criterion.parameters())
    _train(criterion, inner)
    criterion.grow(NEW, Wrapping(inner))
    _train(criterion, inner)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_sparse_momentum_of_torchs_sgd(nesterov: bool) -> None:
    """As one that had all classes, none of which came."""

    def run(num_classes: int) -> tuple[Any, Any]:
        criterion = fm.sampling.sample_negatives(
            fm.CosFaceLoss(num_classes, DIM, dtype=FP64), 0.4, seed=3
        )
        with torch.no_grad():
            criterion.weight.fill_(0.5)
            criterion.weight[:OLD, 0] += torch.arange(OLD)
        return criterion, torch.optim.SGD(criterion.parameters(), 0.1, 0.9, nesterov=nesterov)

    criterion, optimizer = run(OLD)
    _train(criterion, optimizer)
    momentum = optimizer.state[criterion.weight]["momentum_buffer"].to_dense()
    criterion.grow(NEW, optimizer)
    grown = optimizer.state[criterion.weight]["momentum_buffer"]
    assert grown.layout is torch.sparse_coo
    assert torch.equal(grown.to_dense(), torch.cat([momentum, momentum.new_zeros(NEW, DIM)]))
    other, expected = run(ALL)
    other.load_state_dict(criterion.state_dict())
    expected.state[other.weight]["momentum_buffer"] = grown.clone()
    for one, opt in ((criterion, optimizer), (other, expected)):
        _train(one, opt, seed=10)
    assert torch.equal(criterion.weight, other.weight)


@pytest.mark.parametrize("kind", ["mean", "exponential"])
def test_a_moving_average_grows_too(kind: str) -> None:
    """As the docstring has it; it is refused, by torch, if it hasn't."""
    average: dict[str, Any] = (
        {} if kind == "mean" else {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}
    )
    criterion = fm.ArcFaceLoss(OLD, DIM, dtype=FP64)
    optimizer = OPTIMIZERS["sgd"](criterion.parameters())
    averaged: Any = swa_utils.AveragedModel(criterion, **average)
    averaged.update_parameters(criterion)
    _train(criterion, optimizer)
    averaged.update_parameters(criterion)
    before = averaged.module.weight.detach().clone()
    criterion.grow(NEW, optimizer)
    with pytest.raises(RuntimeError, match="size of tensor"):
        averaged.update_parameters(criterion)
    averaged.module.grow(NEW, weight=criterion.weight[-NEW:])
    assert torch.equal(averaged.module.weight[:OLD], before)
    directions = torch.cosine_similarity(averaged.module.weight[OLD:], criterion.weight[OLD:])
    torch.testing.assert_close(directions, torch.ones_like(directions))
    _train(criterion, optimizer)
    averaged.update_parameters(criterion)
    assert averaged.module(*_batch(ALL)).isfinite()


def test_twice_frozen_and_with_attributes() -> None:
    criterion = fm.CosFaceLoss(OLD, DIM)
    criterion.weight.requires_grad_(False)
    mark: Any = criterion.weight
    mark.lr_scale = 10.0
    assert criterion.grow(1) == range(OLD, OLD + 1)
    assert criterion.grow(2) == range(OLD + 1, ALL)
    assert not criterion.weight.requires_grad
    assert mark.lr_scale == 10.0


def test_several_optimizers_and_a_scheduler() -> None:
    criterion = fm.CosFaceLoss(OLD, DIM, dtype=FP64)
    backbone = nn.Linear(2, 2)
    optimizers = [OPTIMIZERS["sgd"](one.parameters()) for one in (backbone, criterion)]
    schedule = torch.optim.lr_scheduler.StepLR(optimizers[1], 2, 0.5)
    _train(criterion, optimizers[1])
    schedule.step()
    criterion.grow(NEW, optimizers)
    _train(criterion, optimizers[1])
    schedule.step()
    assert optimizers[1].param_groups[0]["lr"] == 0.05
    copied = OPTIMIZERS["sgd"](criterion.parameters())
    copied.load_state_dict(optimizers[1].state_dict())


@pytest.mark.parametrize("name", CRITERIA)
def test_every_loss(name: str) -> None:
    criterion = CRITERIA[name](max(OLD, TOO_FEW.get(name, 0)), dtype=FP64)
    optimizer = OPTIMIZERS["sgd"](criterion.parameters())
    _train(criterion, optimizer) if criterion.reduction != "none" else None
    given = {
        key: torch.linspace(0.2, 0.4, NEW, dtype=FP64)
        for key in criterion.settings
        if isinstance(getattr(criterion, key), Tensor) and getattr(criterion, key).numel() > 1
    }
    before = criterion.weight.detach().clone()
    criterion.grow(NEW, optimizer, **given)
    assert torch.equal(criterion.weight[: len(before)], before)
    assert criterion.weight.shape[0] == ALL * criterion.sub_centers
    for key, value in given.items():
        assert torch.equal(getattr(criterion, key)[OLD:], value)
        assert key not in criterion.state_dict()
    if criterion.reduction != "none":
        _train(criterion, optimizer)
    repr(criterion)


def test_settings_of_each_class() -> None:
    margin, counts = torch.linspace(0.1, 0.5, OLD), torch.linspace(1.0, 2.0, OLD)
    criterion: Any = fm.ArcFaceLoss(OLD, DIM, margin, class_weight=counts)
    before = criterion.weight.detach().clone()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"margin": 0.3}, r"class_weight=a number or a tensor \(3,\)"),
        ({"margin": 4.0, "class_weight": 1.0}, "margin"),
        ({"margin": torch.ones(2), "class_weight": 1.0}, r"margin .* must have shape \(3,\)"),
        ({"margin": 0.3, "class_weight": -1.0}, "class_weight must be finite and >= 0"),
        ({"margin": 0.3, "class_weight": 1.0, "scale": 2.0}, "no tensor scale .* class_weight"),
        ({"margin": "0.3", "class_weight": 1.0}, "margin must be a number or a tensor"),
    ]
    for given, message in wrong:
        with pytest.raises((ValueError, TypeError), match=message):
            criterion.grow(NEW, **given)
        assert torch.equal(criterion.weight, before)
        assert criterion.margin.shape == (OLD,)
    criterion.grow(NEW, margin=torch.full((NEW,), 0.2), class_weight=3.0)
    assert torch.equal(criterion.margin, torch.cat([margin, torch.full((NEW,), 0.2)]))
    assert torch.equal(criterion.class_weight[OLD:], torch.full((NEW,), 3.0))
    assert list(criterion.state_dict()) == ["weight"]


class Own(fm.MarginSoftmaxLoss):
    """Numbers for each class of every kind, and a buffer of as many that isn't one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(OLD, DIM, 8.0, dtype=FP64, **options)
        self.register_buffer("sizes", torch.arange(OLD))
        self.offsets = nn.Parameter(torch.zeros(OLD, dtype=FP64))
        self.inner = nn.Module()
        self.inner.register_buffer("means", torch.ones(OLD, 2), persistent=False)
        self.names = torch.arange(OLD)
        self.register_buffer("window", torch.zeros(OLD))

    def psi(self, embeddings: Tensor, labels: Tensor) -> Any:
        return lambda u: u - self.offsets[labels.clamp(0, self.num_classes - 1)]


def test_what_a_subclass_registers() -> None:
    criterion: Any = Own()
    optimizer = OPTIMIZERS["adam"](criterion.parameters())
    _train(criterion, optimizer)
    offsets = criterion.offsets
    with pytest.raises(ValueError, match=r"sizes=.*inner.means=a number or a tensor \(3, 2\)"):
        criterion.grow(NEW, optimizer, offsets=0.0)
    given: dict[str, Any] = {"inner.means": torch.zeros(NEW, 2), "window": None}
    criterion.grow(NEW, optimizer, offsets=0.25, sizes=torch.tensor([4, 5, 6]), names=7, **given)
    assert criterion.offsets is offsets
    assert offsets.shape == (ALL,)
    assert (offsets[OLD:] == 0.25).all()
    assert optimizer.state[offsets]["max_exp_avg_sq"].shape == (ALL,)
    assert criterion.sizes[OLD:].tolist() == [4, 5, 6]
    assert criterion.names[OLD:].tolist() == [7, 7, 7]
    assert criterion.inner.means.shape == (ALL, 2)
    assert criterion.window.shape == (OLD,)
    given = {"inner.means": 0.0, "offsets": 0.0, "names": 7}
    for whole in (1.5, torch.tensor([1.0, 0.5, 2.0]), float("nan")):
        with pytest.raises(ValueError, match=r"sizes has torch.int64, which can't hold"):
            criterion.grow(NEW, optimizer, sizes=whole, **given)
    assert set(criterion.state_dict()) == {"weight", "offsets", "sizes", "window"}
    _train(criterion, optimizer)


def test_sub_centers_have_their_rows_together() -> None:
    criterion = fm.ArcFaceLoss(OLD, DIM, sub_centers=2)
    before = criterion.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weight must have shape \(6, 6\)"):
        criterion.grow(NEW, weight=torch.randn(NEW, DIM))
    given = torch.randn(2 * NEW, DIM)
    criterion.grow(NEW, weight=given)
    assert criterion.num_classes == ALL
    assert torch.equal(criterion.weight[: 2 * OLD], before)
    expected = _of_norm(given, _usual_norm(before)).float()
    torch.testing.assert_close(criterion.weight[2 * OLD :], expected, rtol=1e-6, atol=0)


def test_the_sampler_goes_on() -> None:
    """As one that has had all classes from this step on."""
    criterion = fm.sampling.sample_negatives(fm.CosFaceLoss(OLD, DIM, dtype=FP64), 0.5, seed=3)
    optimizer = RowSparseSGD(criterion.parameters(), 0.1, 0.9)
    _train(criterion, optimizer)
    criterion.grow(NEW, optimizer)
    assert criterion.sampler.step == 3
    other = fm.sampling.sample_negatives(fm.CosFaceLoss(ALL, DIM, dtype=FP64), 0.5, seed=3)
    other.load_state_dict(criterion.state_dict())
    x, labels = _batch(ALL)
    assert criterion(x, labels) == other(x, labels)


def test_scales_that_follow_the_classes() -> None:
    fixed = fm.FixedAdaCosLoss(OLD, DIM)
    fixed.grow(NEW)
    assert fixed.scale == fm.FixedAdaCosLoss(ALL, DIM).scale
    fresh = fm.AdaCosLoss(OLD, DIM, dtype=FP64)
    fresh.grow(NEW)
    assert fresh.scale == fm.AdaCosLoss(ALL, DIM, dtype=FP64).scale
    trained = fm.AdaCosLoss(OLD, DIM, dtype=FP64)
    trained(*_batch(OLD))
    scale = trained.scale.clone()
    trained.grow(NEW)
    assert trained.scale == scale
    assert trained.double().scale.dtype is FP64


def test_refusals() -> None:
    criterion = fm.ArcFaceLoss(OLD, DIM, dtype=FP64)
    optimizer = OPTIMIZERS["sgd"](criterion.parameters())
    before = criterion.weight.detach().clone()

    def refuses(match: str, *arguments: Any, **given: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=match):
            criterion.grow(*arguments, **given)
        assert torch.equal(criterion.weight, before)

    refuses("num_new must be >= 1, got 0", 0)
    refuses("optimizer must be a torch.optim.Optimizer", NEW, criterion.parameters())
    refuses("doesn't hold the class weights", NEW, OPTIMIZERS["sgd"](nn.Linear(2, 2).parameters()))
    refuses(r"weight must have shape \(3, 6\)", NEW, weight=torch.randn(NEW, DIM + 1))
    refuses("must be fp16, bf16", NEW, weight=torch.ones(NEW, DIM, dtype=torch.int64))
    refuses("row 0 of weight is NaN", NEW, weight=torch.full((NEW, DIM), float("nan")))
    refuses("weight must be a tensor, got list", NEW, weight=[1.0])
    x, labels = _batch(OLD)
    loss = criterion(x, labels)
    refuses("whose backward wasn't called", NEW, optimizer)
    loss.backward()
    refuses("has a gradient, which growing would lose", NEW, optimizer)
    criterion.weight.grad = None
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        handle = getattr(criterion.weight, register)(lambda grad: None)
        refuses("has hooks", NEW, optimizer)
        handle.remove()
    lbfgs = torch.optim.LBFGS(criterion.parameters())
    lbfgs.step(lambda: criterion(x, labels).backward() or torch.zeros(()))
    criterion.weight.grad = None
    before = criterion.weight.detach().clone()
    refuses("the optimizer keeps .* can't grow", NEW, lbfgs)
    lbfgs.state.clear()
    optimizer.state[criterion.weight] = {"buckets": torch.zeros(5)}
    refuses(r"keeps buckets, a tensor \(5,\)", NEW, optimizer)
    optimizer.state.clear()
    assert criterion.grow(NEW, optimizer) == range(OLD, ALL)


def test_refusals_of_kinds() -> None:
    with torch.device("meta"):
        criterion = fm.ArcFaceLoss(OLD, DIM)
    with pytest.raises(ValueError, match="meta device"):
        criterion.grow(NEW)
    with pytest.raises(ValueError, match=r"convert.from_pml\(loss\) makes a loss that can"):
        pml.ArcFaceLoss(OLD, DIM).grow(NEW)
    head = insightface.PartialFC_V2(insightface.CosFace(), DIM, OLD)
    with pytest.raises(ValueError, match=r"reset_parameters of its own.*pass weight=, \(3, 6\)"):
        head.grow(NEW)
    head.grow(NEW, weight=0.01 * torch.randn(NEW, DIM))
    assert head.num_classes == ALL
    parametrized: Any = fm.ArcFaceLoss(OLD, DIM)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Tanh())
    with pytest.raises(TypeError, match="weight is no parameter"):
        parametrized.grow(NEW)


def test_a_checkpoint_of_other_sizes_says_what_to_do() -> None:
    small = fm.ArcFaceLoss(OLD, DIM, sub_centers=2)
    grown = copy.deepcopy(small)
    grown.grow(NEW)
    with pytest.raises(RuntimeError, match=r"num_classes=7, load it, and .* criterion.grow\(3"):
        grown.load_state_dict(small.state_dict())
    with pytest.raises(RuntimeError, match="num_classes=10, as it had when it was saved"):
        small.load_state_dict(grown.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="other sub-centres than 2"):
        small.load_state_dict({"weight": torch.zeros(5, DIM)})
    again = fm.ArcFaceLoss(ALL, DIM, sub_centers=2)
    again.load_state_dict(grown.state_dict())


def test_compiled_code_takes_the_new_classes() -> None:
    criterion = fm.CosFaceLoss(OLD, DIM, dtype=FP64)
    compiled = torch.compile(criterion, backend="aot_eager")
    compiled(*_batch(OLD))
    criterion.grow(NEW)
    x, labels = _batch(ALL)
    assert compiled(x, labels) == criterion(x, labels)


def wrapped() -> list[str]:
    """Refused while the criterion is in DDP; grown and wrapped anew it trains on."""
    torch.manual_seed(3)
    criterion = fm.CosFaceLoss(OLD, DIM, dtype=FP64)
    optimizer = torch.optim.SGD(criterion.parameters(), 0.1, 0.9)
    ddp: Any = DistributedDataParallel(criterion)
    _train_wrapped(ddp, optimizer)
    said = []
    try:
        ddp.module.grow(NEW, optimizer)
    except ValueError as error:
        said.append(str(error))
    del ddp
    criterion.grow(NEW, optimizer)
    ddp = DistributedDataParallel(criterion)
    _train_wrapped(ddp, optimizer)
    fm.check_setup(ddp, optimizer)
    return said


def _train_wrapped(ddp: Any, optimizer: Any) -> None:
    for step in range(2):
        x, labels = _batch(ddp.module.num_classes, step + 5 * torch.distributed.get_rank())
        optimizer.zero_grad()
        ddp(x, labels).backward()
        optimizer.step()
    fm.check_setup(ddp, optimizer)
    optimizer.zero_grad()


def test_in_ddp(pair: Pair) -> None:
    for said in pair.run(wrapped):
        assert len(said) == 1
        assert re.search(r"DistributedDataParallel.*take the criterion out.*wrap it anew", said[0])


def test_only_what_wraps_the_weight_counts() -> None:
    assert _setup.wrapper_of(fm.CosFaceLoss(OLD, DIM).weight) is None
