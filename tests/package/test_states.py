"""States of optimisers that travel: between torch's own and those for class weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fused_margin as fm
from fused_margin.optim import RowSparseAdam, RowSparseSGD
from fused_margin.sampling import sample_negatives

C, D = 20, 6
Make = Callable[[Any], torch.optim.Optimizer]

SGD: dict[str, Make] = {
    "torch": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01),
    "ours": lambda p: RowSparseSGD(p, 0.1, 0.9, 0.01),
}
ADAM: dict[str, Make] = {
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.0),
    "ours": lambda p: RowSparseAdam(p, 0.1),
}


def _criterion(num_classes: int = C, dtype: torch.dtype = torch.float64) -> fm.ArcFaceLoss:
    torch.manual_seed(3)
    return fm.ArcFaceLoss(num_classes, D, scale=8.0, dtype=dtype)


def _train(criterion: Any, optimizer: Any, steps: int = 3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(12, D, generator=generator, dtype=criterion.weight.dtype)
        labels = torch.randint(criterion.num_classes, (12,), generator=generator)
        criterion(x, labels).backward()
        if isinstance(optimizer, torch.optim.SparseAdam) and criterion.sampler is None:
            criterion.weight.grad = criterion.weight.grad.to_sparse(1)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(family[a], family[b], id=f"{kind}, {a} and {b}")
        for kind, family in (("sgd", SGD), ("adam", ADAM))
        for a, b in itertools.permutations(family, 2)
    ],
)
def test_training_goes_on_with_the_other_and_back(first: Make, second: Make) -> None:
    """With dense gradients, as if the optimiser had been one all the time."""
    alone, travelling = _criterion(), _criterion()
    optimizer = first(alone.parameters())
    state = None
    for seed, make in enumerate((first, second, first)):
        _train(alone, optimizer, seed=seed)
        other = make(travelling.parameters())
        if state is not None:
            other.load_state_dict(state)
        _train(travelling, other, seed=seed)
        state = copy.deepcopy(other.state_dict())
    torch.testing.assert_close(travelling.weight, alone.weight, rtol=1e-10, atol=1e-10)


def test_of_sparse_adam_and_back() -> None:
    """Whose first steps differ by an epsilon, and whose count is that of steps."""
    alone, travelling = _criterion(), _criterion()
    optimizer = torch.optim.SparseAdam([alone.weight], 0.1)
    first = torch.optim.SparseAdam([travelling.weight], 0.1)
    for criterion, opt in ((alone, optimizer), (travelling, first)):
        _train(criterion, opt)
    ours = RowSparseAdam([travelling.weight], 0.1)
    ours.load_state_dict(first.state_dict())
    assert (ours.state[travelling.weight]["updates"] == 3.0).all()
    _train(travelling, ours, seed=1)
    back = torch.optim.SparseAdam([travelling.weight], 0.1)
    back.load_state_dict(ours.state_dict())
    _train(travelling, back, seed=2)
    for seed in (1, 2):
        _train(alone, optimizer, seed=seed)
    torch.testing.assert_close(travelling.weight, alone.weight, rtol=1e-5, atol=1e-5)


def test_the_sparse_momentum_of_torchs_sgd_becomes_dense() -> None:
    criterion = sample_negatives(_criterion(), 0.3)
    optimizer = torch.optim.SGD(criterion.parameters(), 0.1, 0.9)
    _train(criterion, optimizer, 1)
    momentum = optimizer.state[criterion.weight]["momentum_buffer"]
    assert momentum.layout is torch.sparse_coo
    ours = RowSparseSGD(criterion.parameters(), 0.1, 0.9)
    ours.load_state_dict(optimizer.state_dict())
    assert torch.equal(ours.state[criterion.weight]["momentum_buffer"], momentum.to_dense())
    _train(criterion, ours)
    criterion.sampler.rate = 1.0
    _train(criterion, ours)


def test_rows_updates_outlive_steps_of_torchs_adam() -> None:
    """Which counts steps alone: a row has still missed as many as before."""
    criterion = sample_negatives(_criterion(), 0.3)
    ours = RowSparseAdam(criterion.parameters(), 0.1)
    _train(criterion, ours, 5)
    updates = ours.state[criterion.weight]["updates"].clone()
    assert updates.min() < updates.max() <= 5.0
    again = RowSparseAdam(criterion.parameters(), 0.1)
    again.load_state_dict(ours.state_dict())
    for name, value in ours.state[criterion.weight].items():
        assert torch.equal(again.state[criterion.weight][name], value)
    criterion.sampler.rate = 1.0
    theirs = torch.optim.Adam(criterion.parameters(), 0.1)
    theirs.load_state_dict(ours.state_dict())
    _train(criterion, theirs, 4)
    again.load_state_dict(theirs.state_dict())
    state = again.state[criterion.weight]
    assert torch.equal(state["updates"], updates + 4.0)
    assert state["step"] == 9.0
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq", "updates"}


def test_counts_of_weights_in_half_precision() -> None:
    """bf16, in which 256 + 1 is 256, must not be where they are kept after loading."""
    weight = nn.Parameter(torch.randn(4, D, dtype=torch.bfloat16))
    optimizer = RowSparseAdam([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.state[weight]["updates"].add_(256.0)
    optimizer.state[weight]["step"].add_(256.0)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[weight]["updates"].flatten().tolist() == [258.0] * 4


def test_a_state_of_counts_alone() -> None:
    """As `convert.load_rank_files` makes it."""
    weight = nn.Parameter(torch.randn(4, D))
    optimizer = RowSparseAdam([weight])
    optimizer.state[weight] = {
        "exp_avg": torch.zeros(4, D), "exp_avg_sq": torch.zeros(4, D),
        "updates": torch.full((4, 1), 40.0),
    }  # fmt: skip
    state = copy.deepcopy(optimizer.state_dict())
    assert state["state"][0]["step"] == 40.0
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 41.0
    optimizer.load_state_dict(state)
    assert (optimizer.state[weight]["updates"] == 40.0).all()


REFUSED: dict[str, tuple[Make, Make]] = {
    "nesterov=True": (lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True), SGD["ours"]),
    "dampening=0.5": (lambda p: torch.optim.SGD(p, 0.1, 0.9, dampening=0.5), SGD["ours"]),
    "maximize=True": (lambda p: torch.optim.SGD(p, 0.1, maximize=True), SGD["ours"]),
    "amsgrad=True": (lambda p: torch.optim.Adam(p, 0.1, amsgrad=True), ADAM["ours"]),
    "differentiable=True": (lambda p: torch.optim.Adam(p, differentiable=True), ADAM["ours"]),
    "decoupled_weight_decay=True": (lambda p: torch.optim.AdamW(p, 0.1), ADAM["ours"]),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_that_ours_lack(setting: str) -> None:
    """In a state, and in a group; what they would be without is the remedy."""
    theirs, ours = REFUSED[setting]
    criterion = _criterion()
    state = theirs(criterion.parameters()).state_dict()
    optimizer = ours(criterion.parameters())
    with pytest.raises(ValueError, match=f"RowSparse.* can't do {setting}; .*group.update") as said:
        optimizer.load_state_dict(state)
    group = {**state["param_groups"][0], "params": [nn.Parameter(torch.ones(2))]}
    with pytest.raises(ValueError, match=f"can't do {setting}"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    remedy = str(said.value).split("group.update(")[1].split(")")[0]
    for saved in state["param_groups"]:
        saved.update({name.split("=")[0]: 0 for name in remedy.split(", ")})
    optimizer.load_state_dict(state)
    _train(criterion, optimizer)


def test_settings_that_do_nothing() -> None:
    """A way to compute, or what needs another setting, is no reason to refuse a state."""
    criterion = _criterion()
    for theirs, ours in (
        (torch.optim.SGD(criterion.parameters(), 0.3, dampening=0.5, foreach=True), SGD["ours"]),
        (torch.optim.AdamW(criterion.parameters(), 0.3, weight_decay=0.0), ADAM["ours"]),
        (torch.optim.Adam(criterion.parameters(), 0.3, fused=True), ADAM["ours"]),
    ):
        optimizer = ours(criterion.parameters())
        optimizer.load_state_dict(theirs.state_dict())
        group = optimizer.param_groups[0]
        assert group["lr"] == 0.3
        assert not any(group.get(name) for name in ("dampening", "decoupled_weight_decay"))
        _train(criterion, optimizer)


class WithSeed(RowSparseSGD):
    """As an optimiser with a setting that torch's has not."""

    def __init__(self, params: Any, seed: int) -> None:
        super().__init__(params, 0.1, 0.9)
        self.defaults["seed"] = self.param_groups[0]["seed"] = seed


def test_settings_that_are_not_in_a_state_stay() -> None:
    criterion = _criterion()
    theirs = SGD["torch"](criterion.parameters())
    _train(criterion, theirs)
    optimizer = WithSeed(criterion.parameters(), 5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["seed"] == 5
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    theirs.load_state_dict(optimizer.state_dict())
    _train(criterion, theirs)
    assert schedule.get_last_lr() == [0.1]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (ADAM["adam"], SGD["ours"]),
        (SGD["torch"], ADAM["ours"]),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9), SGD["ours"]),
        (lambda p: torch.optim.NAdam(p), ADAM["ours"]),
    ],
)
def test_other_kinds_are_refused(theirs: Make, ours: Make) -> None:
    criterion = _criterion()
    optimizer = theirs(criterion.parameters())
    _train(criterion, optimizer)
    with pytest.raises(ValueError, match=r"of another kind of optimiser: RowSparse.* takes those"):
        ours(criterion.parameters()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("make", [SGD["ours"], ADAM["ours"]])
def test_of_other_sizes(make: Make) -> None:
    """A state from before new classes, and one that didn't grow with its criterion."""
    small = _criterion()
    optimizer = make(small.parameters())
    _train(small, optimizer)
    state, kept = copy.deepcopy(optimizer.state_dict()), optimizer.state[small.weight]
    larger = _criterion(C + 2)
    optimizer = make(larger.parameters())
    remedy = r"shape \(20, 6\), its parameter \(22, 6\).*criterion.grow\(num_new, optimizer\)"
    with pytest.raises(ValueError, match=remedy):
        optimizer.load_state_dict(state)
    before = larger.weight.detach().clone()
    optimizer.state[larger.weight] = kept
    with pytest.raises(ValueError, match=remedy):
        _train(larger, optimizer)
    assert torch.equal(larger.weight, before)
    with pytest.raises(ValueError, match="parameter group"):  # torch's own word
        make([larger.weight, nn.Parameter(torch.ones(1))]).load_state_dict(state)


@pytest.mark.parametrize("make", [SGD["ours"], ADAM["ours"]])
def test_numbers_and_vectors(make: Make) -> None:
    """A learnt scale () beside class weights; numbers of classes (C,), with a sparse gradient."""
    criterion = _criterion(dtype=torch.float32)
    criterion.scale = nn.Parameter(torch.tensor(8.0))
    optimizer = make(criterion.parameters())
    _train(criterion, optimizer)
    assert criterion.scale != 8.0
    optimizer.load_state_dict(optimizer.state_dict())
    _train(criterion, optimizer)
    numbers = nn.Parameter(torch.ones(5))
    optimizer = make([numbers])
    for index in ([1, 3], [3]):
        values = torch.ones(len(index))
        numbers.grad = torch.sparse_coo_tensor(
            torch.tensor([index]), values, (5,), check_invariants=True
        )
        optimizer.step()
    assert numbers[0] == 1.0
    assert numbers[3] < numbers[1] < 1.0
    if make is ADAM["ours"]:
        assert optimizer.state[numbers]["updates"].tolist() == [0.0, 1.0, 0.0, 2.0, 0.0]
