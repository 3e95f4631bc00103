"""Training in two processes (gloo, CPU) equals training in one, and what doesn't is reported.

One pair of workers serves every test: a test sends a function to both and gets both results. A
worker that raises dies, and its traceback is the test's failure; the next test gets a new pair.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from documents import Block, find_blocks
from helpers import ROOT
from torch import nn

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import _setup

if not torch.distributed.is_available():
    pytest.skip("this build of PyTorch has no torch.distributed", allow_module_level=True)
if not torch.distributed.is_gloo_available():
    pytest.skip("this build of PyTorch has no gloo", allow_module_level=True)

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

RANKS = 2
SECONDS = 120  # for one test, the start of the workers included
Arrays = dict[str, np.ndarray]


# --- two workers ----------------------------------------------------------------------------------


def _serve(rank: int, folder: str, tasks: Connection) -> None:
    """What a worker does: calls of functions, one after the other, until the pipe is closed."""
    log = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's own name may not resolve
    # as torchrun sets them, for Accelerate; nothing listens at the address
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}  # its launcher's --cpu
    torch.set_num_threads(1)
    # a store in a file needs no port
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
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
    """Two processes of one process group."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = folder
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(RANKS):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder), there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(*arguments)`` in both, at the same time; each rank's result."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        try:
            return [self._result(rank) for rank in range(RANKS)]
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
        logs = [(self.folder / f"{r}.log").read_text(errors="replace") for r in range(RANKS)]
        parts = [f"--- rank {r} ---\n{log[-4000:]}" for r, log in enumerate(logs)]
        raise AssertionError("\n".join([f"rank {rank} {what}", *parts]))

    def stop(self) -> None:
        """End both; they have nothing to save."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)


@pytest.fixture(scope="module")
def pairs() -> Iterator[list[Pair]]:
    made: list[Pair] = []
    yield made
    for one in made:
        one.stop()


@pytest.fixture
def pair(pairs: list[Pair], tmp_path: Path) -> Pair:
    if not (pairs and pairs[-1].is_alive):
        pairs.append(Pair(tmp_path))
    return pairs[-1]


# --- training -------------------------------------------------------------------------------------

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


def _regularizer(criterion: Any) -> torch.Tensor:
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
            value = value + _regularizer(trainee.criterion)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(trainee)


def _inside(trainee: Trainee) -> nn.Module:
    return DistributedDataParallel(trainee)


def _both_wrapped(trainee: Trainee) -> nn.Module:
    return Trainee(
        DistributedDataParallel(trainee.backbone), DistributedDataParallel(trainee.criterion)
    )


def _criterion_sharded(trainee: Trainee) -> nn.Module:
    fully_shard(trainee.criterion)
    return Trainee(DistributedDataParallel(trainee.backbone), trainee.criterion)


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
    "both sharded": _both_sharded,
    "root sharded": _root_sharded,
    "criterion and root sharded": _criterion_and_root_sharded,
}


def _beside(trainee: Trainee) -> Trainee:
    return Trainee(DistributedDataParallel(trainee.backbone), trainee.criterion)


def _mine(rows: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a batch."""
    return rows.chunk(RANKS)[dist.get_rank()]


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
        parts = zip(_mine(rows).chunk(accumulate), _mine(labels).chunk(accumulate), strict=True)
        for index, (some, targets) in enumerate(parts):
            is_last = index == accumulate - 1
            with contextlib.nullcontext() if is_last else _no_sync(module):
                before = _regularizer(plain.criterion) if regularize == "before" else 0.0
                value = module(some, targets) + before
                if regularize == "after":
                    value = value + _regularizer(plain.criterion)
                (value / accumulate).backward()
        optimizer.step()
        fm.check_setup(module, optimizer)
        optimizer.zero_grad()
    return whole(module)


def assert_close(actual: Arrays, expected: Arrays) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=1e-9, err_msg=name)


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


# --- the fault, and the warning -------------------------------------------------------------------


def warnings_of(call: Callable[[], Any]) -> list[warnings.WarningMessage]:
    """Those of the guard; any other is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", fm.UnsynchronizedWeightsWarning)
        call()
    return caught


def _steps(module: nn.Module, count: int = STEPS) -> None:
    optimizer = sgd(module)
    for rows, labels in batches()[:count]:
        module(_mine(rows), _mine(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()


def beside(loss: str) -> tuple[Arrays, list[tuple[str, str]]]:
    module = _beside(build(loss))
    caught = warnings_of(lambda: _steps(module))
    return whole(module), [(str(item.message), Path(item.filename).name) for item in caught]


@pytest.mark.parametrize("loss", LOSSES)
def test_criterion_beside_the_wrapped_model_drifts(pair: Pair, loss: str) -> None:
    """The fault itself, which raises nothing by itself, and one warning where it is made."""
    (first, caught), (second, also_caught) = pair.run(beside, loss)
    np.testing.assert_array_equal(first["backbone.0.weight"], second["backbone.0.weight"])
    drift = np.abs(first["criterion.weight"] - second["criterion.weight"]).max()
    assert drift > 1e-3
    for ((message, file),) in (caught, also_caught):  # one, of three calls
        assert f"2 ranks, but the class weights of this {loss}" in message
        assert "criterion = DistributedDataParallel(criterion)" in message
        assert file == Path(__file__).name


def _average(module: nn.Module) -> None:
    for parameter in module.parameters():
        dist.all_reduce(parameter.grad)
        assert parameter.grad is not None
        parameter.grad /= RANKS


def _averaged_by_hand() -> None:
    trainee = build("CosFaceLoss")
    rows, labels = batches()[0]
    trainee(_mine(rows), _mine(labels)).backward()
    _average(trainee)
    fm.check_setup(trainee)


def _wrapping_failed() -> None:
    trainee = build("CosFaceLoss")
    backbone = copy.deepcopy(trainee.backbone).requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires a gradient") as caught:
        DistributedDataParallel(backbone)  # whose remains are alive as long as the traceback
    _steps(trainee)
    assert caught.tb is not None


def _evaluated() -> None:
    trainee = _beside(build("CosFaceLoss"))
    rows, labels = batches()[0]
    with torch.no_grad():
        trainee(rows, labels)
    trainee.criterion.requires_grad_(False)
    trainee(rows, labels).backward()
    trainee.criterion.logits(trainee.backbone(rows))


def _called_outside_of_the_wrapper() -> None:
    """Registered in what DDP wraps, which averages its gradients all the same."""
    trainee = build("CosFaceLoss")
    trainee.forward = trainee.backbone.forward
    wrapped = DistributedDataParallel(trainee)
    rows, labels = batches()[0]
    trainee.criterion(wrapped(_mine(rows)), _mine(labels)).backward()
    fm.check_setup(wrapped)


def _replicated() -> None:
    from torch.distributed._composable.replicate import replicate

    trainee = build("CosFaceLoss")
    replicate(trainee)
    rows, labels = batches()[0]
    trainee(_mine(rows), _mine(labels)).backward()
    fm.check_setup(trainee)


def _group_of_one() -> None:
    groups = [dist.new_group([rank]) for rank in range(RANKS)]
    trainee = build("CosFaceLoss")
    trainee.backbone = DistributedDataParallel(
        trainee.backbone, process_group=groups[dist.get_rank()]
    )
    _steps(trainee)
    fm.check_setup(trainee, group=groups[dist.get_rank()])


def _compiled() -> None:
    trainee = _beside(build("CosFaceLoss"))
    compiled = torch.compile(trainee.criterion, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("default", DeprecationWarning)  # Dynamo's own
        compiled(torch.randn(ROWS, DIM), batches()[0][1]).backward()


def _exported() -> None:
    _beside(build("CosFaceLoss"))
    criterion = fm.CosFaceLoss(CLASSES, DIM)
    rows, labels = torch.randn(ROWS, DIM), batches()[0][1]
    with warnings.catch_warnings():
        warnings.simplefilter("default", DeprecationWarning)
        exported = torch.export.export(criterion, (rows, labels))
    torch.testing.assert_close(exported.module()(rows, labels), criterion(rows, labels).detach())


def _transformed() -> None:
    wrapped = _beside(build("CosFaceLoss"))
    criterion = fm.CosFaceLoss(CLASSES, DIM, backend="reference")
    rows, labels = torch.randn(ROWS, DIM), batches()[0][1]

    def value(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(criterion, {"weight": weight}, (rows, labels))

    torch.func.grad(value)(criterion.weight.detach())
    torch.func.vmap(value)(criterion.weight.detach().expand(2, -1, -1))
    assert wrapped is not None


SILENT = {
    "averaged by hand": _averaged_by_hand,
    "wrapping failed": _wrapping_failed,
    "evaluated": _evaluated,
    "called outside of the wrapper": _called_outside_of_the_wrapper,
    "replicated": _replicated,
    "a group of one rank": _group_of_one,
    "compiled": _compiled,
    "exported": _exported,
    "transformed": _transformed,
}


def silent(name: str) -> int:
    gc.collect()  # models of other tests
    SILENT[name]()
    return 0


@pytest.mark.parametrize("name", SILENT)
def test_no_false_alarm(pair: Pair, name: str) -> None:
    """Warnings are errors in a worker; `train` makes the same test of every right set-up."""
    assert pair.run(silent, name) == [0, 0]


def _sharded_backbone() -> None:
    trainee = build("CosFaceLoss")
    fully_shard(trainee.backbone)
    _steps(trainee)


def _wrapped_after_a_dry_run() -> None:
    trainee = build("CosFaceLoss")
    _steps(trainee, 1)
    trainee.backbone = DistributedDataParallel(trainee.backbone)
    _steps(trainee)


def _in_an_evaluation_first() -> None:
    trainee = _beside(build("CosFaceLoss"))
    with torch.no_grad():
        trainee(*batches()[0])
    _steps(trainee)


LOUD = {
    "FSDP2": _sharded_backbone,
    "after a dry run": _wrapped_after_a_dry_run,
    "after an evaluation": _in_an_evaluation_first,
}


def loud(name: str) -> int:
    gc.collect()
    return len(warnings_of(LOUD[name]))


@pytest.mark.parametrize("name", LOUD)
def test_alarm(pair: Pair, name: str) -> None:
    assert pair.run(loud, name) == [1, 1]


# --- check_setup ----------------------------------------------------------------------------------


def refused(setup: str) -> str:
    """What `check_setup` says; warnings of the guard are for other tests."""
    seed = 1 + dist.get_rank() if setup == "drawn apart" else 1
    trainee = build("ArcFaceLoss", seed)
    rows, labels = batches()[0]
    optimizer = None
    warnings.simplefilter("ignore", fm.UnsynchronizedWeightsWarning)
    if setup != "drawn apart":
        trainee = _beside(trainee)
        trainee(_mine(rows), _mine(labels)).backward()
    if setup == "after the step":
        sgd(trainee).step()
        trainee.zero_grad()
    if setup == "forgotten on rank 1":
        _average(trainee)
        optimizer = sgd(trainee.backbone if dist.get_rank() == 1 else trainee)
    if setup == "other classes":
        trainee.criterion = fm.CosFaceLoss(CLASSES + dist.get_rank(), DIM)
    if setup == "no gradient on rank 1" and dist.get_rank() == 1:
        trainee.criterion.zero_grad()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        fm.check_setup(trainee.criterion, optimizer)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("drawn apart", "RuntimeError: weight of this ArcFaceLoss differs between ranks ([1]"),
        ("before the step", "RuntimeError: weight.grad of this ArcFaceLoss differs"),
        ("after the step", "RuntimeError: weight of this ArcFaceLoss differs"),
        ("no gradient on rank 1", "RuntimeError: weight.grad of this ArcFaceLoss differs"),
        ("forgotten on rank 1", "ValueError: the optimizer doesn't hold weight of this ArcFace"),
        ("other classes", "RuntimeError: this CosFaceLoss has other parameters on other ranks"),
    ],
)
def test_check_setup_refuses_on_every_rank(pair: Pair, setup: str, message: str) -> None:
    first, second = pair.run(refused, setup)
    assert first == second
    assert first.startswith(message)
    if "differs" in message:
        assert "Wrap the criterion too, criterion = DistributedDataParallel(criterion)" in first


def optimizer_before_sharding() -> str:
    trainee = build("ArcFaceLoss")
    optimizer = sgd(trainee)
    fully_shard(trainee)
    with pytest.raises(ValueError, match="doesn't hold") as caught:
        fm.check_setup(trainee, optimizer)
    assert _setup._checksum(trainee.criterion.weight) is None  # a shard: nothing to compare
    after = sgd(trainee)
    with torch.no_grad():
        trainee(*batches()[0])  # which leaves gathered parameters in the module
    fm.check_setup(trainee, after)
    return str(caught.value)


def test_optimizer_built_before_sharding(pair: Pair) -> None:
    for message in pair.run(optimizer_before_sharding):
        assert "criterion.weight" in message
        assert "after fully_shard()" in message


def test_check_setup_in_one_process() -> None:
    trainee = build("ArcFaceLoss")
    fm.check_setup(trainee.criterion)
    fm.check_setup(trainee.criterion, sgd(trainee))
    with pytest.raises(ValueError, match=r"doesn't hold weight of this ArcFaceLoss.*never be"):
        fm.check_setup(trainee.criterion, sgd(trainee.backbone))
    equal = fm.ArcFaceLoss(CLASSES, DIM)
    equal.load_state_dict(trainee.criterion.state_dict())
    with pytest.raises(ValueError, match="doesn't hold weight"):  # identity counts, not values
        fm.check_setup(equal, sgd(trainee))
    trainee.criterion.requires_grad_(False)
    fm.check_setup(trainee.criterion, sgd(trainee.backbone))


def test_check_setup_refuses_other_types() -> None:
    criterion = fm.ArcFaceLoss(CLASSES, DIM)
    with pytest.raises(TypeError, match=r"criterion must be a module.*got function"):
        fm.check_setup(fmf.arcface)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer.*got list"):
        fm.check_setup(criterion, list(criterion.parameters()))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"RegularFace has no parameters"):
        fm.check_setup(fm.regularizers.RegularFace())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_checksum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent of strides and blocks, and another one if the last bit of one element is."""
    tensor = torch.randn(6, 5).to(dtype)
    value = _setup._checksum(tensor)
    assert _setup._checksum(tensor.t().contiguous().t()) == value
    monkeypatch.setattr(_setup, "_BLOCK", 7)
    assert _setup._checksum(tensor) == value
    tensor[3, 2] = torch.nextafter(tensor[3, 2], torch.zeros((), dtype=dtype))
    assert _setup._checksum(tensor) != value
    assert _setup._checksum(torch.tensor(1.0, dtype=dtype)) is not None
    assert _setup._checksum(torch.empty(0, 3, dtype=dtype)) == 0


# --- what wrapping changes ------------------------------------------------------------------------


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
        with pytest.raises(TypeError, match=r"weight is a DTensor.*register_fsdp_forward_method"):
            criterion.logits(embeddings)
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


# --- DTensors -------------------------------------------------------------------------------------


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
        placement = Replicate() if name == "scale" else Shard(0)
        wrong: dict[str, Any] = given | {name: distribute_tensor(value, mesh, [placement])}
        with pytest.raises(TypeError, match="is a DTensor") as caught:
            fmf.arcface(**wrong)
        messages[name] = str(caught.value)
    with pytest.raises(TypeError, match="weight is a DTensor") as caught:
        fm.regularizers.regular_face(distribute_tensor(w, mesh, [Shard(0)]))
    messages["regularizer"] = str(caught.value)
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
        assert "criterion(embeddings, labels)" in messages["weight"]
        assert 'register_fsdp_forward_method(criterion, "logits")' in messages["weight"]
        for name in ROWWISE:
            assert messages[name].startswith(f"{name} is a DTensor")
            assert f"{name}.to_local() if rows are sharded" in messages[name]
        assert "scale.full_tensor()" in messages["scale"]
        assert "criterion.weight.full_tensor()" in messages["regularizer"]


# --- README.md, and Accelerate --------------------------------------------------------------------

BLOCKS = [
    block
    for name in ("README.md", "README.ja.md")
    for block in find_blocks(ROOT / name)
    if re.search(r"torch\.distributed|accelerate", block.text) and block.language == "python"
]


def block_state(text: str) -> Arrays:
    """Run a block on rows of this rank's own; the ``state`` that it ends with."""
    gc.collect()
    torch.manual_seed(dist.get_rank())
    names: dict[str, Any] = {"__name__": "__main__"}
    with (
        mock.patch.object(dist, "init_process_group"),  # this worker's is used, and kept
        mock.patch.object(dist, "destroy_process_group"),
        mock.patch.object(fm, "check_setup", wraps=fm.check_setup) as check,
    ):
        exec(text, names)
    assert check.call_count == 1
    return {key: value.numpy().copy() for key, value in names["state"].items()}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_documented_code_in_two_processes(pair: Pair, block: Block) -> None:
    if "accelerate" in block.text:
        pytest.importorskip("accelerate", reason="Accelerate is not a dependency of the tests")
    first, second = pair.run(block_state, block.text)
    assert list(first) == list(second) == ["weight"]
    np.testing.assert_array_equal(first["weight"], second["weight"])


def test_each_way_is_documented() -> None:
    for name in ("README.md", "README.ja.md"):
        text = "".join(block.text for block in BLOCKS if block.path.name == name)
        for way in ("DistributedDataParallel", "accelerate", "fully_shard"):
            assert way in text


def accelerated(loss: str, accumulate: int, with_criterion: bool) -> tuple[Arrays, int, list[str]]:
    """Weights, number of warnings, and the keys of the criterion's state."""
    gc.collect()
    accelerate = importlib.import_module("accelerate")
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=accumulate)
    trainee = build(loss)
    model, criterion = trainee.backbone, trainee.criterion
    optimizer = sgd(model, criterion)
    if with_criterion:
        model, criterion, optimizer = accelerator.prepare(model, criterion, optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)

    def steps() -> None:
        for rows, labels in batches():
            parts = zip(_mine(rows).chunk(accumulate), _mine(labels).chunk(accumulate), strict=True)
            for some, targets in parts:
                with accelerator.accumulate(model, criterion):
                    accelerator.backward(criterion(model(some), targets))
                    optimizer.step()
                    if with_criterion and accelerator.sync_gradients:
                        fm.check_setup(criterion, optimizer)
                    optimizer.zero_grad()

    caught = warnings_of(steps)
    return whole(Trainee(model, criterion)), len(caught), list(criterion.state_dict())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_accelerate(pair: Pair, loss: str, accumulate: int) -> None:
    pytest.importorskip("accelerate", reason="Accelerate is not a dependency of the tests")
    for state, count, keys in pair.run(accelerated, loss, accumulate, True):
        assert_close(state, alone(loss))
        assert count == 0
        assert keys == ["module.weight"]
    (first, count, keys), (second, also, _) = pair.run(accelerated, loss, accumulate, False)
    assert np.abs(first["criterion.weight"] - second["criterion.weight"]).max() > 1e-3
    assert count == also == 1
    assert keys == ["weight"]
