"""Sampled negatives beside torch's optimisers, wrappers, clipping and checkpoints."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import sampled_training as training
import torch
from sampled_training import OPTIMIZERS, RATE, TWINS, C, problem
from torch import nn
from two_processes import Pair

import fused_margin as fm
from fused_margin.distributed import clip_grad_norm_
from fused_margin.optim import RowSparseAdam, RowSparseSGD
from fused_margin.sampling import sample_negatives

REMEDY = r"doesn't take the sparse gradient.*use fused_margin.optim.RowSparseSGD \(momentum"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    """Those that take a sparse gradient do with it as with a dense one; others are refused."""
    make, fits, _ = OPTIMIZERS[name]
    criterion, x, labels = problem()
    sample_negatives(criterion, RATE)
    optimizer = make(criterion.parameters())
    before = criterion.weight.detach().clone()
    if not fits:
        for _ in range(3):
            with pytest.raises(ValueError, match=REMEDY):
                criterion(x, labels)
        with pytest.raises(ValueError, match=REMEDY):
            fm.check_setup(criterion, optimizer)
        assert criterion.sampler.step == 0
        criterion.sampler.rate = 1.0
        criterion(x, labels).backward()
        optimizer.step()
        return
    other = nn.Parameter(before)
    twin = make([other])
    for _ in range(4):
        criterion(x, labels).backward()
        sparse = criterion.weight.grad
        other.grad = sparse.clone() if name in TWINS else sparse.to_dense()
        optimizer.step()
        twin.step()
        optimizer.zero_grad()
    torch.testing.assert_close(criterion.weight.detach(), other.detach(), rtol=1e-12, atol=1e-12)


# By what is said at the first loss over all classes; the others train on
AFTERWARDS = {
    "sgd, momentum": r"momentum of SGD is sparse.*RowSparseSGD.*state_dict.*to_dense\(\)",
    "sgd, nesterov": r"momentum of SGD is sparse.*RowSparseSGD.*state_dict.*to_dense\(\)",
    "sparse adam": r"SparseAdam takes sparse gradients alone.*RowSparseAdam.*state_dict\(\)\)",
}


@pytest.mark.filterwarnings("ignore:the optimizer has a weight decay")
@pytest.mark.parametrize("name", [name for name, (_, fits, _) in OPTIMIZERS.items() if fits])
def test_all_classes_after_a_sample(name: str) -> None:
    """What can't go on says so before anything has changed, and its remedies work."""
    criterion, x, labels = problem()
    sample_negatives(criterion, RATE)
    optimizer = OPTIMIZERS[name][0](criterion.parameters())

    def step() -> None:
        criterion(x, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    criterion.sampler.rate = 1.0
    if name in AFTERWARDS:
        before = criterion.weight.detach().clone(), int(criterion.sampler.step)
        for _ in range(2):
            with pytest.raises(ValueError, match=AFTERWARDS[name]):
                criterion(x, labels)
            with pytest.raises(ValueError, match=AFTERWARDS[name]):
                fm.check_setup(criterion, optimizer)
        assert torch.equal(criterion.weight, before[0])
        assert criterion.sampler.step == before[1]
        kind = RowSparseAdam if "adam" in name else RowSparseSGD
        state, other = optimizer.state_dict(), kind(criterion.parameters(), 0.1)
        for group in state["param_groups"]:
            group.update({"nesterov": False} if "nesterov" in group else {})
        other.load_state_dict(copy.deepcopy(state))
        if "adam" in name:
            optimizer = other
        else:
            kept = optimizer.state[criterion.weight]
            kept["momentum_buffer"] = kept["momentum_buffer"].to_dense()
    step()
    assert criterion.weight.isfinite().all()
    fm.check_setup(criterion, optimizer)
    criterion.sampler.rate = RATE
    if "nesterov" in name:
        with pytest.raises(ValueError, match="without nesterov once its momentum is dense"):
            fm.check_setup(criterion, optimizer)
        return
    step()
    fm.check_setup(criterion, optimizer)


def test_nesterov_after_all_classes() -> None:
    criterion, x, labels = problem()
    sample_negatives(criterion, 1.0)
    optimizer = OPTIMIZERS["sgd, nesterov"][0](criterion.parameters())
    criterion(x, labels).backward()
    optimizer.step()
    criterion.sampler.rate = RATE
    with pytest.raises(ValueError, match="without nesterov once its momentum is dense"):
        criterion(x, labels)


def test_what_is_not_asked_about() -> None:
    """Evaluation, frozen weights, no optimiser yet, a stale one beside one that fits, others'."""
    criterion, x, labels = problem()
    sample_negatives(criterion, RATE)
    criterion(x, labels)
    adam = torch.optim.Adam(criterion.parameters())
    criterion.eval()(x, labels)
    with torch.no_grad():
        criterion.train()(x, labels)
    criterion.weight.requires_grad_(False)
    criterion(x, labels)
    criterion.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=REMEDY):
        criterion(x, labels)  # the second of those that train
    RowSparseSGD(criterion.parameters())
    gc.collect()
    with pytest.raises(ValueError, match=REMEDY):
        criterion(x, labels)
    fitting = RowSparseSGD(criterion.parameters())
    criterion(x, labels)
    assert adam.param_groups[0]["params"] == fitting.param_groups[0]["params"]

    class Mine(torch.optim.Adam):
        """Nobody knows what it does with a sparse gradient."""

    other, x, labels = problem()
    sample_negatives(other, RATE)
    mine = Mine(other.parameters())
    other(x, labels).backward()
    assert mine.param_groups


@pytest.mark.parametrize(
    ("name", "num_classes"), [*((name, C) for name in OPTIMIZERS), ("row-sparse sgd", 3)]
)
def test_optimizers_of_shards(ranks: Pair, name: str, num_classes: int) -> None:
    """With a rank without classes, too (of 3 and 4 ranks)."""
    _, _, fits = OPTIMIZERS[name]
    for found in ranks.run(training.steps, name, num_classes):
        if fits:
            assert isinstance(found, float)
            assert found < 1e-12
        else:
            assert "use fused_margin.optim.RowSparseSGD" in str(found)


@pytest.mark.parametrize("norm_type", training.NORMS)
@pytest.mark.parametrize("backwards", [1, 3])
def test_clipping(norm_type: float, backwards: int) -> None:
    criterion, x, labels = problem()
    sample_negatives(criterion, RATE)
    for _ in range(backwards):
        criterion(x, labels).backward()
    plain = nn.Parameter(torch.zeros_like(criterion.weight))
    plain.grad = criterion.weight.grad.to_dense()
    with pytest.raises(NotImplementedError, match="Sparse"):  # which clip_grad_norm_ is there for
        nn.utils.clip_grad_norm_(criterion.parameters(), 0.1)
    expected = nn.utils.clip_grad_norm_([plain], 0.1, norm_type)
    found = clip_grad_norm_(criterion.parameters(), 0.1, norm_type)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert plain.grad is not None
    grad = criterion.weight.grad
    torch.testing.assert_close(grad.to_dense(), plain.grad, rtol=1e-12, atol=1e-14)
    assert grad.layout is torch.sparse_coo
    with pytest.raises(ValueError, match="norm_type must be > 0, got 0"):
        clip_grad_norm_(criterion.parameters(), 0.1, 0)


@pytest.mark.parametrize("norm_type", training.NORMS[1::2])
@pytest.mark.parametrize(("num_classes", "backwards"), [(C, 1), (C, 2), (3, 1)])
def test_clipping_of_shards(
    ranks: Pair, num_classes: int, norm_type: float, backwards: int
) -> None:
    for found in ranks.run(training.clipped, num_classes, norm_type, backwards):
        assert max(found.values()) < 1e-12, found


def test_a_grad_scaler_unscales_and_skips() -> None:
    """Of two backwards, and with an overflow; as without it."""
    criterion, x, labels = problem()
    plain = copy.deepcopy(criterion)
    for one in (criterion, plain):
        sample_negatives(one, RATE)
    optimizer, other = (RowSparseSGD(one.parameters(), 0.1, 0.9) for one in (criterion, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for factor in (1.0, float("inf"), 1.0):
        for _ in range(2):
            scaler.scale(criterion(x, labels) * factor).backward()
            loss = plain(x, labels)
            loss.backward() if factor == 1.0 else None
        scaler.step(optimizer)
        scaler.update()
        other.step()
        for one in (optimizer, other):
            one.zero_grad()
    assert scaler.get_scale() == 128.0
    torch.testing.assert_close(criterion.weight, plain.weight, rtol=1e-12, atol=1e-12)


def test_sampled_and_plain_checkpoints_fit_each_other() -> None:
    sampled, x, labels = problem()
    sample_negatives(sampled, RATE)
    sampled(x, labels)
    plain = fm.ArcFaceLoss(C, training.D, dtype=torch.float64)
    plain.load_state_dict(sampled.state_dict())
    assert torch.equal(plain.weight, sampled.weight)
    with torch.no_grad():
        plain.weight.mul_(2.0)
    for module, state in (
        (sampled, plain.state_dict()),
        (nn.ModuleDict({"a": sampled}), nn.ModuleDict({"a": plain}).state_dict()),
    ):
        module.load_state_dict(state)
        assert torch.equal(sampled.weight, plain.weight)
        assert sampled.sampler.step == 1
    nn.ModuleDict({"a": plain}).load_state_dict(nn.ModuleDict({"a": sampled}).state_dict())
    other: Any = fm.ArcFaceLoss(C, training.D)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*sampler.other"):
        other.load_state_dict({**plain.state_dict(), "sampler.other": torch.ones(1)})


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_sampled_classes_in_a_wrapper(ranks: Pair, wrapper: str) -> None:
    """At the first loss, and at once where the wrapper is there already."""
    kind = r"fully_shard()" if wrapper == "fsdp" else "DistributedDataParallel"
    for said in ranks.run(training.wrapped, wrapper):
        assert len(said) == 2
        for one in said:
            assert f"which {kind} can't average" in one


def test_copies_of_shards_are_refused_at_once(ranks: Pair) -> None:
    if ranks.ranks == 4:  # those of a mesh of 2 x 2
        for said in ranks.run(training.on_a_mesh_with_copies):
            assert "this mesh of several dimensions has copies" in said
