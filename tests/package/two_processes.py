"""Two workers in one process group (gloo, CPU), and what they train.

A test sends a function to both and gets both results. A worker that raises dies, and its traceback
is the test's failure.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fused_margin as fm

if not torch.distributed.is_available():
    pytest.skip("this build of PyTorch has no torch.distributed", allow_module_level=True)
if not torch.distributed.is_gloo_available():
    pytest.skip("this build of PyTorch has no gloo", allow_module_level=True)

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

RANKS = 2
SECONDS = 120  # for one test, the start of the workers included
Arrays = dict[str, np.ndarray]


def _serve(rank: int, ranks: int, folder: str, tasks: Connection) -> None:
    """What a worker does: calls of functions, one after the other, until the pipe is closed."""
    log = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's own name may not resolve
    # as torchrun sets them, for Accelerate; nothing listens at the address
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}  # its launcher's --cpu
    torch.set_num_threads(1)
    # a store in a file needs no port
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=SECONDS / 4),
    )
    while True:
        try:
            function, arguments = tasks.recv()
        except EOFError:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tasks.send(function(*arguments))


class Pair:
    """Two processes of one process group, or as many as are asked for."""

    def __init__(self, folder: Path, ranks: int = RANKS) -> None:
        self.ranks = ranks
        context = multiprocessing.get_context("spawn")
        self.folder = folder
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(ranks):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, ranks, str(folder), there), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(*arguments)`` in each, at the same time; each rank's result."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        try:
            return [self._result(rank) for rank in range(self.ranks)]
        except BaseException:
            self.stop()
            raise

    def _result(self, rank: int) -> Any:
        try:
            if self.pipes[rank].poll(SECONDS):
                return self.pipes[rank].recv()
            what = f"gave no result within {SECONDS} s"
        except (EOFError, ConnectionResetError):
            what = "died"
        self.stop()
        logs = [(self.folder / f"{r}.log").read_text(errors="replace") for r in range(self.ranks)]
        parts = [f"--- rank {r} ---\n{log[-4000:]}" for r, log in enumerate(logs)]
        raise AssertionError("\n".join([f"rank {rank} {what}", *parts]))

    def stop(self) -> None:
        """End all; they have nothing to save."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)


ROWS, FEATURES, DIM, CLASSES = 12, 6, 8, 11  # shards of 6 and 5 classes
LOSSES = ("ArcFaceLoss", "CosFaceLoss", "FixedAdaCosLoss", "NormalizedSoftmaxLoss")
STEPS = 3


class Trainee(nn.Module):
    """A backbone and its criterion in one module."""

    backbone: Any
    criterion: Any

    def __init__(self, backbone: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.criterion = criterion

    def forward(self, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.criterion(self.backbone(rows), labels)


def build(loss: str, seed: int = 1) -> Trainee:
    """In fp64, so that the order of sums doesn't show."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(FEATURES, DIM), nn.Tanh(), nn.Linear(DIM, DIM))
    return Trainee(backbone, getattr(fm, loss)(CLASSES, DIM)).double()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (ROWS,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def sgd(*modules: nn.Module) -> torch.optim.SGD:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def whole(module: nn.Module) -> Arrays:
    """Parameters under their names in a plain module, gathered from shards."""
    state = {}
    for name, value in module.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        state[name.replace("module.", "")] = value.detach().numpy().copy()
    return state


def regularizer(criterion: Any) -> torch.Tensor:
    """Of the whole weight: the module has the shards, or after a forward perhaps all of it."""
    weight = criterion.weight
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return fm.regularizers.center_invariant(weight)


def alone(loss: str, *, regularize: bool = False) -> Arrays:
    """What one process makes of all rows."""
    trainee = build(loss)
    optimizer = sgd(trainee)
    for rows, labels in batches():
        value = trainee(rows, labels)
        if regularize:
            value = value + regularizer(trainee.criterion)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(trainee)


def backbone_wrapped(trainee: Trainee) -> Trainee:
    return Trainee(DistributedDataParallel(trainee.backbone), trainee.criterion)


def mine(rows: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a batch."""
    return rows.chunk(RANKS)[dist.get_rank()]


def average(module: nn.Module) -> None:
    for parameter in module.parameters():
        dist.all_reduce(parameter.grad)
        assert parameter.grad is not None
        parameter.grad /= RANKS


def warnings_of(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    """Those of the guard; any other is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", fm.UnsynchronizedWeightsWarning)
        call()
    return caught


def assert_close(actual: Arrays, expected: Arrays) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=1e-9, err_msg=name)
