"""What ranks do in tests of checkpoints: train, save, and load at another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sharded_cases import DIM, FP64
from torch import nn

# Not imported at all where torch has no gloo: two_processes skips the file.
# isort: split
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

import fused_margin as fm
from fused_margin import _setup
from fused_margin.optim import RowSparseAdam, RowSparseSGD, SGDInBackward

CLASSES, STEPS, ROWS = 11, 4, 12


class Training:
    """AdaFace, which has statistics, and a backbone; whole, or sharded over a mesh."""

    def __init__(self, optimizer: str, mesh: Any = None, *, is_sharded: bool = True) -> None:
        torch.manual_seed(4)
        backbone = nn.Linear(5, DIM, dtype=FP64)
        criterion = fm.AdaFaceLoss(CLASSES, DIM, dtype=FP64)
        _setup._calls[criterion] = _setup._DECIDED
        with torch.no_grad():
            criterion.weight.normal_()
        if is_sharded:
            fm.distributed.shard_classes(criterion, mesh)
        self.modules = nn.ModuleDict({"backbone": backbone, "criterion": criterion})
        groups = [{"params": backbone.parameters()}, {"params": criterion.parameters()}]
        sgd: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}
        kinds: dict[str, Any] = {
            "sgd": lambda: [torch.optim.SGD(groups, **sgd)],
            "adam": lambda: [torch.optim.Adam(groups, lr=0.01, foreach=False)],
            "row-sparse sgd": lambda: [RowSparseSGD(groups, **sgd)],
            "row-sparse adam": lambda: [RowSparseAdam(groups, lr=0.01)],
            "in backward": lambda: [
                torch.optim.SGD(backbone.parameters(), **sgd),
                SGDInBackward([criterion.weight], **sgd),
            ],
        }
        self.optimizers = kinds[optimizer]()
        self.is_sharded = is_sharded

    def train(self, first: int) -> None:
        """The same steps, of which each rank takes its part of the rows."""
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        generator = torch.Generator().manual_seed(first)
        for _ in range(STEPS):
            rows = torch.randn(ROWS, 5, generator=generator, dtype=FP64)
            labels = torch.randint(CLASSES, (ROWS,), generator=generator)
            rows, labels = rows.chunk(ranks)[rank], labels.chunk(ranks)[rank]
            self.modules["criterion"](self.modules["backbone"](rows), labels).backward()
            for parameter in self.modules["backbone"].parameters() if ranks > 1 else ():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad.div_(ranks))
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        modules, optimizer = get_state_dict(self.modules, self.optimizers)
        return {"modules": modules, "optimizer": optimizer}

    def load(self, folder: Path) -> None:
        state = self.state()
        load(state, checkpoint_id=folder)
        set_state_dict(
            self.modules,
            self.optimizers,
            model_state_dict=state["modules"],
            optim_state_dict=state["optimizer"],
        )

    def numbers(self) -> dict[str, Any]:
        """All that is trained or kept, whole."""
        found = dict(self.modules.state_dict())
        for index, parameter in enumerate(self.modules.parameters()):
            for optimizer in self.optimizers:
                for name, value in optimizer.state.get(parameter, {}).items():
                    found[f"{index}.{name}"] = value
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value)
            .detach().numpy().copy()
            for name, value in found.items()
        }  # fmt: skip


def saved(optimizer: str, folder: Path) -> dict[str, Any]:
    """Train, save, train on: what comes of it."""
    training = Training(optimizer)
    training.train(1)
    save(training.state(), checkpoint_id=folder)
    training.train(2)
    return training.numbers()


def taken_from_elsewhere() -> np.ndarray:
    """Whole class weights of another package's checkpoint in a sharded criterion."""
    training = Training("sgd")
    matrix = torch.arange(CLASSES * DIM, dtype=FP64).view(CLASSES, DIM)
    fm.convert.load_class_weights(training.modules["criterion"], {"kernel": matrix.t()})
    weight: Any = training.modules["criterion"].weight
    return (weight.full_tensor() - matrix).detach().numpy()


def saved_plainly(folder: Path) -> None:
    """What torch.save makes of the state, and of whole ones as docs/scaling.md has them."""
    training = Training("sgd")
    training.train(1)
    criterion, rank = training.modules["criterion"], dist.get_rank()
    torch.save(criterion.state_dict(), folder / f"rank-{rank}.pt")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(training.modules, options=options)
    optimizer = get_optimizer_state_dict(training.modules, training.optimizers, options=options)
    gathered = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in criterion.state_dict().items()
    }
    assert bool(state) == (rank == 0)
    numbers = training.numbers()
    if rank == 0:
        torch.save({"modules": state, "optimizer": optimizer}, folder / "whole.pt")
        torch.save(gathered, folder / "gathered.pt")
        torch.save({k: torch.from_numpy(v) for k, v in numbers.items()}, folder / "expected.pt")
    dist.barrier()


def loaded_plainly(folder: Path) -> list[bool]:
    """A rank's own file, in as many ranks."""
    criterion: Any = Training("sgd").modules["criterion"]
    with torch.no_grad():
        criterion.weight.zero_()
    path = folder / f"rank-{dist.get_rank()}.pt"
    criterion.load_state_dict(torch.load(path, weights_only=True))
    expected = torch.load(folder / "gathered.pt", weights_only=True)
    return [
        torch.equal(v.full_tensor() if isinstance(v, DTensor) else v, expected[k])
        for k, v in criterion.state_dict().items()
    ]


def resumed(optimizer: str, folder: Path, is_sharded: bool = True) -> dict[str, Any]:
    """Load, and train on."""
    training = Training(optimizer, is_sharded=is_sharded)
    training.load(folder)
    training.train(2)
    return training.numbers()


def loaded(folder: Path) -> dict[str, Any]:
    """What is in a checkpoint, in shards."""
    training = Training("sgd")
    training.load(folder)
    return training.numbers()
