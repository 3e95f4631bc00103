"""What ranks do in tests of sampled negatives beside torch's optimisers, wrappers and clipping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Not imported at all where torch has no gloo: two_processes skips the file.
# isort: split
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fused_margin as fm
from fused_margin.distributed import ClassShard, clip_grad_norm_, shard_classes
from fused_margin.optim import RowSparseAdam, RowSparseSGD
from fused_margin.sampling import sample_negatives

C, D, RATE = 21, 6, 0.4
Make = Callable[[Any], torch.optim.Optimizer]

# By whether they take a sparse gradient, of a plain weight and of a DTensor
OPTIMIZERS: dict[str, tuple[Make, bool, bool]] = {
    "sgd": (lambda p: torch.optim.SGD(p, 0.1), True, True),
    "sgd, foreach": (lambda p: torch.optim.SGD(p, 0.1, foreach=True), True, True),
    "sgd, momentum": (lambda p: torch.optim.SGD(p, 0.1, 0.9), True, True),
    "sgd, nesterov": (lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True), True, True),
    "sgd, decay": (lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1), False, False),
    "sgd, fused": (lambda p: torch.optim.SGD(p, 0.1, fused=True), False, False),
    "adam": (lambda p: torch.optim.Adam(p, 0.1), False, False),
    "adam, fused": (lambda p: torch.optim.Adam(p, 0.1, fused=True), False, False),
    "adamw, foreach": (lambda p: torch.optim.AdamW(p, 0.1, foreach=True), False, False),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, 0.1), False, False),
    "adagrad": (lambda p: torch.optim.Adagrad(p, 0.1), True, False),
    "sparse adam": (lambda p: torch.optim.SparseAdam(list(p), 0.1), True, False),
    "row-sparse sgd": (lambda p: RowSparseSGD(p, 0.1, 0.9, 0.1), True, True),
    "row-sparse adam": (lambda p: RowSparseAdam(p, 0.1), True, True),
}
TWINS = {"sparse adam", "row-sparse sgd", "row-sparse adam"}  # lazy: no dense gradient equals them
NORMS = (1.0, 2.0, 3.5, float("inf"))


def problem(num_classes: int = C) -> tuple[Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    criterion = fm.ArcFaceLoss(num_classes, D, scale=8.0, dtype=torch.float64)
    with torch.no_grad():
        criterion.weight.normal_(generator=generator)
    x = torch.randn(12, D, generator=generator, dtype=torch.float64)
    return criterion, x, torch.randint(num_classes, (12,), generator=generator)


def _dense(grad: Any) -> Tensor:
    local = grad._local_tensor if isinstance(grad, DTensor) else grad
    return local.to_dense() if local.layout is torch.sparse_coo else local


def _local(weight: Any) -> Tensor:
    return (weight.to_local() if isinstance(weight, DTensor) else weight).detach()


def _mine(rows: Tensor) -> Tensor:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    return rows[rank * len(rows) // ranks : (rank + 1) * len(rows) // ranks]


def _refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def steps(name: str, num_classes: int = C) -> float | str:
    """How far a sharded weight is from one with the same gradients, dense; or what was refused."""
    criterion, x, labels = problem(num_classes)
    sample_negatives(shard_classes(criterion), RATE)
    weight: Any = criterion.weight
    optimizer = OPTIMIZERS[name][0](criterion.parameters())
    other = nn.Parameter(_local(weight).clone())
    twin = OPTIMIZERS[name][0]([other])
    for _ in range(3):
        said = [_refusal(lambda: criterion(_mine(x), _mine(labels)).backward())]
        if said[0]:
            said.append(_refusal(lambda: fm.check_setup(criterion, optimizer)))
            assert said[0] == said[1]
            return said[0]
        other.grad = _dense(weight.grad).clone()
        if name in TWINS and weight.grad._local_tensor.layout is torch.sparse_coo:
            other.grad = weight.grad._local_tensor.clone()
        optimizer.step()
        twin.step()
        optimizer.zero_grad()
    return float((_local(weight) - other.detach()).abs().max()) if other.numel() else 0.0


def clipped(num_classes: int, norm_type: float, backwards: int) -> dict[str, float]:
    """The norm and the gradients after clipping, beside one process's dense ones."""
    criterion, x, labels = problem(num_classes)
    torch.manual_seed(1)
    backbone = nn.Linear(2, 2, dtype=torch.float64)  # whose gradients are those of every rank
    sample_negatives(shard_classes(criterion), RATE)
    weight: Any = criterion.weight
    for _ in range(backwards):
        criterion(_mine(x), _mine(labels)).backward()
    backbone(torch.ones(3, 2, dtype=torch.float64)).square().sum().backward()
    shard = ClassShard.of(weight)
    whole = torch.zeros(num_classes, D, dtype=torch.float64)
    whole[shard.start : shard.stop] = _dense(weight.grad)
    dist.all_reduce(whole)
    plain = [nn.Parameter(torch.zeros_like(whole)), *copy.deepcopy(backbone).parameters()]
    plain[0].grad = whole
    for one, parameter in zip(plain[1:], backbone.parameters(), strict=True):
        assert parameter.grad is not None
        one.grad = parameter.grad.clone()
    expected = nn.utils.clip_grad_norm_(plain, 0.1, norm_type)
    found = clip_grad_norm_([*backbone.parameters(), weight], 0.1, norm_type)
    here = _dense(weight.grad)
    part = whole[shard.start : shard.stop]
    assert backbone.weight.grad is not None
    assert plain[1].grad is not None
    return {
        "norm": float((found - expected).abs() / expected),
        "weight": float((here - part).abs().max()) if here.numel() else 0.0,
        "backbone": float((backbone.weight.grad - plain[1].grad).abs().max()),
    }


def wrapped(wrapper: str) -> list[str]:
    """What is said of sampled classes in DDP or FSDP2, before the first loss, or of a sampler."""
    said = []
    for is_sampled_first in (True, False):
        criterion, x, labels = problem()
        if is_sampled_first:
            sample_negatives(criterion, RATE)
        module: Any = (
            fully_shard(criterion) if wrapper == "fsdp" else DistributedDataParallel(criterion)
        )
        inner = module if wrapper == "fsdp" else module.module
        if is_sampled_first:
            said.append(_refusal(lambda: module(_mine(x), _mine(labels))))  # noqa: B023 - called at once
            inner.sampler.rate = 1.0
        else:
            said.append(_refusal(lambda: sample_negatives(inner, RATE)))  # noqa: B023 - called at once
            assert inner.sampler is None
            sample_negatives(inner, 1.0)
        module(_mine(x), _mine(labels)).backward()
    return said


def on_a_mesh_with_copies() -> str:
    """Of 4 ranks, two hold each shard."""
    criterion = shard_classes(problem()[0], init_device_mesh("cpu", (2, 2)))
    sample_negatives(criterion, 1.0)
    return _refusal(lambda: sample_negatives(criterion, RATE))
