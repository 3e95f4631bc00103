"""Training in two processes equals training in one, and what wrapping and sharding change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from two_processes import (
    CLASSES,
    DIM,
    LOSSES,
    RANKS,
    Arrays,
    Pair,
    Trainee,
    alone,
    assert_close,
    batches,
    build,
    mine,
    regularizer,
    sgd,
    whole,
)

# Not imported at all where torch has no gloo: two_processes skips the file.
# isort: split
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin.compat import pml


def _inside(trainee: Trainee) -> nn.Module:
    return DistributedDataParallel(trainee)


def _both_wrapped(trainee: Trainee) -> nn.Module:
    return Trainee(
        DistributedDataParallel(trainee.backbone), DistributedDataParallel(trainee.criterion)
    )


def _criterion_sharded(trainee: Trainee) -> nn.Module:
    fully_shard(trainee.criterion)
    return Trainee(DistributedDataParallel(trainee.backbone), trainee.criterion)


def _backbone_sharded(trainee: Trainee) -> nn.Module:
    fully_shard(trainee.backbone)
    return Trainee(trainee.backbone, DistributedDataParallel(trainee.criterion))


def _both_sharded(trainee: Trainee) -> nn.Module:
    fully_shard(trainee.backbone)
    fully_shard(trainee.criterion)
    return trainee


def _root_sharded(trainee: Trainee) -> nn.Module:
    fully_shard(trainee)
    return trainee


def _criterion_and_root_sharded(trainee: Trainee) -> nn.Module:
    fully_shard(trainee.criterion)
    fully_shard(trainee)
    return trainee


SETUPS: dict[str, Callable[[Trainee], nn.Module]] = {
    "inside": _inside,
    "both wrapped": _both_wrapped,
    "criterion sharded": _criterion_sharded,
    "backbone sharded": _backbone_sharded,
    "both sharded": _both_sharded,
    "root sharded": _root_sharded,
    "criterion and root sharded": _criterion_and_root_sharded,
}


def _no_sync(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Of every DDP module in it."""
    stack = contextlib.ExitStack()
    for part in module.modules():
        if isinstance(part, DistributedDataParallel):
            stack.enter_context(part.no_sync())
    return stack


def train(setup: str, loss: str, accumulate: int = 1, regularize: str = "") -> Arrays:
    """Three steps on this rank's rows, in ``accumulate`` parts each; warnings are errors."""
    plain = build(loss)
    module = SETUPS[setup](plain)
    optimizer = sgd(module)
    for rows, labels in batches():
        parts = zip(mine(rows).chunk(accumulate), mine(labels).chunk(accumulate), strict=True)
        for index, (some, targets) in enumerate(parts):
            is_last = index == accumulate - 1
            with contextlib.nullcontext() if is_last else _no_sync(module):
                before = regularizer(plain.criterion) if regularize == "before" else 0.0
                value = module(some, targets) + before
                if regularize == "after":
                    value = value + regularizer(plain.criterion)
                (value / accumulate).backward()
        optimizer.step()
        fm.check_setup(module, optimizer)
        optimizer.zero_grad()
    return whole(module)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("setup", SETUPS)
def test_two_processes_equal_one(pair: Pair, setup: str, loss: str) -> None:
    for state in pair.run(train, setup, loss):
        assert_close(state, alone(loss))


@pytest.mark.parametrize("setup", SETUPS)
def test_accumulation(pair: Pair, setup: str) -> None:
    for state in pair.run(train, setup, "ArcFaceLoss", 3):
        assert_close(state, alone("ArcFaceLoss"))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("setup", SETUPS)
def test_regularizer(pair: Pair, setup: str, order: str) -> None:
    """Its gradient is the same on each rank, and so is the average."""
    for state in pair.run(train, setup, "CosFaceLoss", 1, order):
        assert_close(state, alone("CosFaceLoss", regularize=True))


def logits_of(setup: str) -> tuple[bool, list[str], str]:
    """Whether logits are those of the plain criterion; keys of the state, and what holds it."""
    trainee = build("ArcFaceLoss")
    embeddings = torch.randn(4, DIM)
    expected = trainee.criterion.logits(embeddings)
    criterion: Any = trainee.criterion
    if setup == "wrapped":
        criterion = DistributedDataParallel(trainee.criterion)
        actual = criterion.module.logits(embeddings)
    elif setup == "inside":
        criterion = DistributedDataParallel(trainee)
        actual = criterion.module.criterion.logits(embeddings)
    else:
        fully_shard(criterion)
        by_shards = criterion.logits(embeddings)  # of classes on both ranks
        assert torch.allclose(by_shards, expected, rtol=0, atol=1e-6)
        register_fsdp_forward_method(criterion, "logits")
        actual = criterion.logits(embeddings)
    is_equal = torch.allclose(actual, expected, rtol=0, atol=1e-6)
    state = criterion.state_dict()
    return is_equal, list(state), type(state[list(state)[-1]]).__name__


@pytest.mark.parametrize(
    ("setup", "key", "kind"),
    [
        ("wrapped", "module.weight", "Tensor"),
        ("inside", "module.criterion.weight", "Tensor"),
        ("sharded", "weight", "DTensor"),
    ],
)
def test_logits_and_state(pair: Pair, setup: str, key: str, kind: str) -> None:
    for is_equal, keys, what in pair.run(logits_of, setup):
        assert is_equal
        assert keys[-1] == key
        assert what == kind


def dtensors() -> dict[str, str]:
    """The message for each argument that is a DTensor, and the remedy named there taken."""
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    x, w, labels = torch.randn(4, DIM), torch.randn(CLASSES, DIM), torch.tensor([0, 3, 1, 2])
    given: dict[str, Any] = {
        "embeddings": x,
        "weight": w,
        "labels": labels,
        "margin": torch.full((4,), 0.5),
        "scale": torch.tensor(64.0),
    }
    messages = {}
    for name, value in given.items():
        placement = {"scale": Replicate(), "weight": Shard(1)}.get(name, Shard(0))
        wrong: dict[str, Any] = given | {name: distribute_tensor(value, mesh, [placement])}
        with pytest.raises(TypeError, match="is a DTensor") as caught:
            fmf.arcface(**wrong)
        messages[name] = str(caught.value)
    with pytest.raises(TypeError, match="weight is a DTensor") as caught:
        fm.regularizers.regular_face(distribute_tensor(w, mesh, [Shard(0)]))
    messages["regularizer"] = str(caught.value)
    compatible = pml.ArcFaceLoss(CLASSES, DIM)
    with pytest.raises(NotImplementedError, match="non-contiguous"):
        fully_shard(compatible)
    columns = distribute_tensor(w.t().contiguous(), mesh, [Shard(0)])  # .t() is sharded on D
    compatible.W = nn.Parameter(columns)
    with torch.no_grad(), pytest.raises(TypeError, match="weight is a DTensor"):
        compatible(x, labels)  # without a gradient there is nothing to synchronise
    rows: dict[str, Any] = dict(given)
    for name in ROWWISE:
        rows[name] = distribute_tensor(given[name], mesh, [Shard(0)]).to_local()
    mine = fmf.arcface(**rows, reduction="none")
    expected = fmf.arcface(**given, reduction="none").chunk(RANKS)[dist.get_rank()]
    torch.testing.assert_close(mine, expected)
    return messages


ROWWISE = ("embeddings", "labels", "margin")


def test_messages_for_dtensors(pair: Pair) -> None:
    for messages in pair.run(dtensors):
        assert "fused_margin.distributed.shard_classes(criterion)" in messages["weight"]
        for name in ROWWISE:
            assert messages[name].startswith(f"{name} is a DTensor")
            assert f"{name}.to_local() if rows are sharded" in messages[name]
        assert "scale.full_tensor()" in messages["scale"]
        assert "criterion.weight.full_tensor()" in messages["regularizer"]
