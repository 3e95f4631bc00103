"""What is wrong with a set-up of several processes is reported: the guard, and check_setup."""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from two_processes import (
    CLASSES,
    DIM,
    LOSSES,
    RANKS,
    ROWS,
    STEPS,
    Arrays,
    Pair,
    average,
    backbone_wrapped,
    batches,
    build,
    mine,
    sgd,
    warnings_of,
    whole,
)

# Not imported at all where torch has no gloo: two_processes skips the file.
# isort: split
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_margin as fm
import fused_margin.functional as fmf
from fused_margin import _setup
from fused_margin.compat import pml


def _steps(module: nn.Module, count: int = STEPS) -> None:
    optimizer = sgd(module)
    for rows, labels in batches()[:count]:
        module(mine(rows), mine(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()


def beside(loss: str) -> tuple[Arrays, list[tuple[str, str]]]:
    module = backbone_wrapped(build(loss))
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
        assert file == "two_processes.py"  # where it is called


def _averaged_by_hand() -> None:
    trainee = build("CosFaceLoss")
    rows, labels = batches()[0]
    trainee(mine(rows), mine(labels)).backward()
    average(trainee)
    fm.check_setup(trainee)


def _wrapping_failed() -> None:
    trainee = build("CosFaceLoss")
    backbone = copy.deepcopy(trainee.backbone).requires_grad_(False)
    with pytest.raises(RuntimeError, match="requires a gradient") as caught:
        DistributedDataParallel(backbone)  # whose remains are alive as long as the traceback
    _steps(trainee)
    assert caught.tb is not None


def _evaluated() -> None:
    trainee = backbone_wrapped(build("CosFaceLoss"))
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
    trainee.criterion(wrapped(mine(rows)), mine(labels)).backward()
    fm.check_setup(wrapped)


def _replicated() -> None:
    from torch.distributed._composable.replicate import replicate

    trainee = build("CosFaceLoss")
    replicate(trainee)
    rows, labels = batches()[0]
    trainee(mine(rows), mine(labels)).backward()
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
    trainee = backbone_wrapped(build("CosFaceLoss"))
    compiled = torch.compile(trainee.criterion, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("default", DeprecationWarning)  # Dynamo's own
        compiled(torch.randn(ROWS, DIM), batches()[0][1]).backward()


def _exported() -> None:
    backbone_wrapped(build("CosFaceLoss"))
    criterion = fm.CosFaceLoss(CLASSES, DIM)
    rows, labels = torch.randn(ROWS, DIM), batches()[0][1]
    with warnings.catch_warnings():
        warnings.simplefilter("default", DeprecationWarning)
        exported = torch.export.export(criterion, (rows, labels))
    torch.testing.assert_close(exported.module()(rows, labels), criterion(rows, labels).detach())


def _transformed() -> None:
    wrapped = backbone_wrapped(build("CosFaceLoss"))
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
    trainee = backbone_wrapped(build("CosFaceLoss"))
    with torch.no_grad():
        trainee(*batches()[0])
    _steps(trainee)


def _compatible() -> None:
    trainee = build("CosFaceLoss")
    trainee.criterion = pml.CosFaceLoss(CLASSES, DIM).double()
    _steps(backbone_wrapped(trainee))


LOUD = {
    "a class of another package": _compatible,
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


def refused(setup: str) -> str:
    """What `check_setup` says; warnings of the guard are for other tests."""
    seed = 1 + dist.get_rank() if setup == "drawn apart" else 1
    trainee = build("ArcFaceLoss", seed)
    rows, labels = batches()[0]
    optimizer = None
    warnings.simplefilter("ignore", fm.UnsynchronizedWeightsWarning)
    if setup != "drawn apart":
        trainee = backbone_wrapped(trainee)
        trainee(mine(rows), mine(labels)).backward()
    if setup == "after the step":
        sgd(trainee).step()
        trainee.zero_grad()
    if setup == "forgotten on rank 1":
        average(trainee)
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
    assert _setup._part(trainee.criterion.weight) == (
        dist.get_rank(),
    )  # with no other's to compare
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


def test_check_setup_with_several_optimizers() -> None:
    trainee = build("ArcFaceLoss")
    ours, theirs = sgd(trainee.criterion), sgd(trainee.backbone)
    fm.check_setup(trainee.criterion, [theirs, ours])
    fm.check_setup(trainee.criterion, (ours,))
    with pytest.raises(ValueError, match="doesn't hold weight"):
        fm.check_setup(trainee.criterion, [theirs])
    with pytest.raises(ValueError, match=r"two optimizers hold weight of this ArcFaceLoss.*twice"):
        fm.check_setup(trainee.criterion, [ours, sgd(trainee)])
    with pytest.raises(TypeError, match=r"a list of them or None, got list"):
        fm.check_setup(trainee.criterion, [ours, None])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["weight", "W"])
def test_check_setup_warns_of_weight_decay(name: str) -> None:
    """AdamW's default, 0.01, of a loss that normalises its class weights; not of others."""
    backbone = nn.Linear(DIM, DIM)
    criterion = fm.ArcFaceLoss(CLASSES, DIM) if name == "weight" else pml.CosFaceLoss(CLASSES, DIM)
    plain, keeps = pml.LargeMarginSoftmaxLoss(CLASSES, DIM), nn.Linear(DIM, DIM)
    parameters = {"params": [*criterion.parameters()]}
    rest = {"params": [*backbone.parameters(), *plain.parameters(), *keeps.parameters()]}
    adamw = torch.optim.AdamW
    message = rf"weight decay of 0\.01 for {name} of this {type(criterion).__name__}.*1/norm"
    for optimizer in (adamw([parameters, rest]), [adamw([rest]), adamw([parameters])]):
        with pytest.warns(fm.WeightDecayWarning, match=message) as caught:
            fm.check_setup(nn.ModuleList([backbone, criterion]), optimizer)
        assert len(caught) == 1
        assert caught[0].filename == __file__
    fm.check_setup(criterion, adamw([rest, parameters | {"weight_decay": 0.0}]))
    fm.check_setup(nn.ModuleList([backbone, plain, keeps]), adamw([rest]))


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
