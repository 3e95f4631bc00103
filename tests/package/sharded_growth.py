"""What ranks do in tests of new classes for sharded criteria: each beside one process."""

from __future__ import annotations

import copy
from typing import Any

import torch
from sharded_cases import DIM, FP64, built
from torch import Tensor, nn

# Not imported at all where torch has no gloo: two_processes skips the file.
# isort: split
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fused_margin as fm
from fused_margin import _setup, _states
from fused_margin.distributed import ClassShard, count_traffic, shard_classes
from fused_margin.distributed._shards import bounds
from fused_margin.optim import RowSparseAdam, RowSparseSGD

KINDS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, 0.9, foreach=False),
    "sgd of sampled classes": lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, foreach=False),
    "row-sparse sgd": lambda p: RowSparseSGD(p, 0.1, 0.9),
    "row-sparse adam": lambda p: RowSparseAdam(p, 0.1),
}
ROWS = 12


def _whole(value: Any) -> Tensor:
    value = _states.dense(value)
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def _train(criterion: Any, optimizer: Any, steps: int, ranks: int = 1, rank: int = 0) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(ROWS, DIM, generator=generator, dtype=FP64)
        labels = torch.randint(criterion.num_classes, (ROWS,), generator=generator)
        part = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
        criterion(x[part].requires_grad_(), labels[part]).backward()
        optimizer.step()
        optimizer.zero_grad()


def _apart(found: Any, expected: Tensor) -> float:
    return float((_whole(found) - expected).abs().max()) if expected.numel() else 0.0


def grown(
    num_classes: int, added: int, kind: str, sub_centers: int = 1, mesh: Any = None
) -> dict[str, float]:
    """How far the sharded criterion is from one process's, right after growing and after steps."""
    ranks = dist.get_world_size()
    margin = torch.linspace(0.1, 0.3, num_classes, dtype=FP64)
    torch.manual_seed(4)
    criterion: Any = fm.CosFaceLoss(
        num_classes, DIM, margin, 9.0, dtype=FP64, sub_centers=sub_centers
    )
    shard_classes(criterion, mesh)
    is_sparse = kind.startswith("row-sparse") or kind.endswith("sampled classes")
    rate = 0.6 if is_sparse and mesh is None and sub_centers == 1 else 1.0
    fm.sampling.sample_negatives(criterion, rate)
    optimizer = KINDS[kind](criterion.parameters())
    _train(criterion, optimizer, 3, ranks, dist.get_rank())
    weight: Any = criterion.weight

    plain: Any = fm.CosFaceLoss(num_classes, DIM, margin, 9.0, dtype=FP64, sub_centers=sub_centers)
    _setup._calls[plain] = _setup._DECIDED  # each rank has all rows of it
    with torch.no_grad():
        plain.weight.copy_(_whole(weight))
    other = KINDS[kind](plain.parameters())
    other.state[plain.weight] = {
        name: _whole(value) for name, value in optimizer.state[weight].items()
    }

    old, new = num_classes * sub_centers, (num_classes + added) * sub_centers
    here = dist.get_rank() if mesh is None else mesh.get_local_rank(1)
    size = ranks if mesh is None else mesh.size(1)
    (start, stop), (first, last) = (bounds(count, here, size) for count in (old, new))
    kept = max(0, min(stop, last) - max(start, first))
    torch.manual_seed(11 + dist.get_rank())  # rank 0's seed counts
    with count_traffic() as counted:
        assert criterion.grow(added, optimizer, margin=0.2) == range(
            num_classes, num_classes + added
        )
    torch.manual_seed(11)
    plain.grow(added, other, margin=0.2)

    assert criterion.weight is weight
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, DTensor)
    assert weight.shape == (new, DIM)
    assert weight.to_local().shape == (last - first, DIM)
    assert ClassShard.of(weight)[3:5] == (first, last)
    numbers = DIM + sum(
        (value.shape[1] if value.ndim > 1 else 1) * (2 if value.dtype is FP64 else 1) / 2
        for value in other.state[plain.weight].values()
        if value.ndim
    )
    assert counted["all_to_all"] == (stop - start - kept) * numbers * 8
    found = {"weight": _apart(weight, plain.weight.detach())}
    for name, value in other.state[plain.weight].items():
        found[name] = _apart(optimizer.state[weight][name], value)
    assert torch.equal(criterion.margin, plain.margin)
    exact = max(found.values())
    _train(criterion, optimizer, 2, ranks, dist.get_rank())
    if rate == 1.0:  # otherwise each shard samples its own
        _train(plain, other, 2)
    else:
        plain.weight.data.copy_(_whole(weight))
    return {"at once": exact, "after steps": _apart(weight, plain.weight.detach())}


def given_rows(dtype: torch.dtype) -> float:
    """Weights that are given go to their ranks, in any dtype, with the norm of all ranks' rows."""
    torch.manual_seed(1)
    criterion = fm.ArcFaceLoss(5, DIM, dtype=dtype)
    with torch.no_grad():
        criterion.weight.mul_(torch.tensor([0.0, 0.5, 1.0, 2.0, 9.0])[:, None])
    plain = copy.deepcopy(criterion)
    shard_classes(criterion)
    given = 20.0 * torch.randn(1100, DIM, generator=torch.Generator().manual_seed(2))
    for one in (criterion, plain):
        one.grow(1100, weight=given)
    return _apart(criterion.weight, plain.weight.detach())


def of_zeros() -> str:
    """No rank has a row that isn't 0."""
    criterion: Any = shard_classes(built("cosface", 9))
    with torch.no_grad():
        criterion.weight.zero_()
    try:
        criterion.grow(2)
    except ValueError as error:
        return str(error)
    return ""


def copies() -> dict[str, float]:
    """On a mesh of data x classes, of 4 ranks."""
    return grown(5, 4, "adam", mesh=init_device_mesh("cpu", (2, 2)))


def disagreements() -> list[str]:
    """What each rank is told where one can't, or asks for something else; then all grow."""
    rank = dist.get_rank()
    criterion: Any = shard_classes(built("cosface", 9))
    optimizer = KINDS["sgd"](criterion.parameters())
    shape = torch.Size((2, DIM))
    calls: list[Any] = [
        lambda: criterion.grow(2 + rank),
        lambda: criterion.grow(2 if rank else 0),
        lambda: criterion.grow(2, weight=torch.full(shape, rank + 1.0)),
        lambda: criterion.grow(2, weight=None if rank else torch.ones(shape)),
    ]
    said = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    _train(criterion, optimizer, 1, dist.get_world_size(), rank)
    if rank == 0:
        optimizer.state.clear()
    try:
        criterion.grow(2, optimizer)
    except ValueError as error:
        said.append(str(error))
    try:
        criterion.grow(2)  # of which rank 0's optimiser keeps nothing
    except ValueError as error:
        said.append(str(error))
    optimizer.state.clear()
    x, labels = torch.randn(3, DIM, dtype=FP64), torch.tensor([0, 1, 2])
    loss = criterion(x, labels)
    loss.backward()
    if rank:
        criterion.weight.grad = None
    try:
        criterion.grow(2)
    except ValueError as error:
        said.append(str(error))
    criterion.weight.grad = None
    assert criterion.num_classes == 9
    criterion.grow(2)
    assert criterion.num_classes == 11
    return said


def between_forward_and_backward(rate: float) -> str:
    """A loss whose backward comes after growing says so, and changes nothing."""
    criterion: Any = shard_classes(built("cosface", 9))
    fm.sampling.sample_negatives(criterion, rate)
    loss = criterion(torch.randn(3, DIM, dtype=FP64), torch.tensor([0, 1, 2]))
    try:
        criterion.grow(2)
        loss.backward()
    except ValueError as error:
        assert criterion.weight.grad is None
        return str(error)
    return ""


def of_fsdp() -> str:
    """Weights that fully_shard has cut."""
    criterion: Any = fully_shard(copy.deepcopy(built("cosface", 9)))
    try:
        criterion.grow(2)
    except ValueError as error:
        return str(error)
    return ""
