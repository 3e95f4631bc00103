"""What ranks do in tests of how sharded criteria are made, saved, trained and measured."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest
import torch
from sharded_cases import DIM, FP64, batch, built, measured
from torch import nn

# Not imported at all where torch has no gloo: two_processes skips the file.
# isort: split
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import fused_margin as fm
from fused_margin import _setup, plan
from fused_margin.distributed import ClassShard, _shards, count_traffic, shard_classes
from fused_margin.functional import adaptive
from fused_margin.optim import SGDInBackward

SEED = 17


def _largest_difference(found: Any, expected: torch.Tensor) -> float:
    found = found.full_tensor() if isinstance(found, DTensor) else found
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def from_meta(num_classes: int) -> np.ndarray:
    """The whole weight of a criterion of which no rank ever had more than its shard."""
    with torch.device("meta"):
        criterion = fm.AdaCosLoss(num_classes, DIM)
    shard_classes(criterion)
    weight: Any = criterion.weight
    assert weight.is_meta
    shard = ClassShard.of(weight)
    criterion.to_empty(device="cpu")
    torch.manual_seed(SEED)
    criterion.reset_parameters()
    weight = criterion.weight
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape == (shard.stop - shard.start, DIM)
    assert criterion.scale == fm.AdaCosLoss(num_classes, DIM).scale
    shape, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    assert shape == weight.to_local().shape
    assert offset[0] == shard.start or shape[0] == 0
    return weight.full_tensor().detach().numpy()


def tasks_apart() -> dict[str, float]:
    """Losses with statistics over part of the ranks each, here one: they know nothing of others."""
    torch.manual_seed(SEED)
    weight = torch.randn(7, DIM)
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("tasks", "classes"))
    norm = 10.0 * (1.0 + dist.get_rank())
    x, labels = norm * nn.functional.normalize(torch.randn(6, DIM)), torch.randint(7, (6,))
    trained: dict[str, Any] = {}
    for kind in (fm.AdaFaceLoss, fm.CurricularFaceLoss, fm.AdaCosLoss):
        criterion: Any = shard_classes(kind(7, DIM), mesh["classes"])
        criterion.load_state_dict({**criterion.state_dict(), "weight": weight})
        criterion(x, labels)
        trained[kind.__name__] = criterion
    start = torch.tensor(fm.functional.fixed_adacos_scale(7))
    lse, u = fm.functional.cosine_lse(x, weight, labels, start)
    scale = adaptive.next_scale(lse, u, labels >= 0, start, ())
    return {
        "AdaFace": float((trained["AdaFaceLoss"].norm_mean - (20.0 + 0.01 * (norm - 20.0))).abs()),
        "CurricularFace": float((trained["CurricularFaceLoss"].t - 0.01 * u.mean()).abs()),
        "AdaCos": float((trained["AdaCosLoss"].scale - scale).abs()),
    }


def copies(on_meta: bool) -> np.ndarray:
    """This rank's copy of class weights that no two ranks have drawn alike."""
    torch.manual_seed(SEED + dist.get_rank())
    criterion = fm.ArcFaceLoss(7, DIM, device="meta" if on_meta else None)
    shard_classes(criterion, init_device_mesh("cpu", (dist.get_world_size(), 1)))
    if on_meta:
        criterion.to_empty(device="cpu")
        criterion.reset_parameters()
    weight: Any = criterion.weight
    return weight.to_local().detach().numpy()


def states(num_classes: int) -> None:
    """Whole and sharded states fit whole and sharded criteria."""
    plain = built("adaface", num_classes)
    sharded = shard_classes(copy.deepcopy(plain))
    assert repr(sharded) == repr(plain)
    assert sharded.num_classes == num_classes
    assert sharded.embedding_size == DIM
    state = sharded.state_dict()
    assert list(state) == list(plain.state_dict())
    assert isinstance(state["weight"], DTensor)
    other = fm.AdaFaceLoss(num_classes, DIM, dtype=FP64)
    other.load_state_dict(state)  # whole from sharded
    torch.testing.assert_close(other.weight, plain.weight, rtol=0, atol=0)
    again: Any = shard_classes(fm.AdaFaceLoss(num_classes, DIM, dtype=FP64))
    again.load_state_dict(plain.state_dict())  # sharded from whole
    torch.testing.assert_close(again.weight.full_tensor(), plain.weight, rtol=0, atol=0)
    again.load_state_dict(state, assign=True)
    assert isinstance(again.weight, nn.Parameter)
    wrong = {**plain.state_dict(), "weight": torch.zeros(num_classes + 1, DIM)}
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        again.load_state_dict(wrong)
    double = copy.deepcopy(sharded).float()
    assert isinstance(double.weight, DTensor)
    assert double.weight.dtype is torch.float32


def traffic(counts: list[int], dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Bytes that the model says a rank sends in a step, and those that were counted."""
    ranks = dist.get_world_size()
    criterion = shard_classes(fm.ArcFaceLoss(13, DIM))
    count = counts[dist.get_rank()]
    x = torch.randn(count, DIM, dtype=dtype, requires_grad=True)
    with count_traffic() as counted:
        criterion(x, torch.zeros(count, dtype=torch.int64)).backward()
    expected = fm.distributed.bytes_per_step(max(counts), DIM, ranks, dtype)
    return expected, dict(counted)


def traffic_of(sub_centers: int) -> tuple[int, int]:
    """The bytes of the model, and those of a loss with sub-centres."""
    num_classes = 4 * dist.get_world_size()
    criterion = shard_classes(fm.ArcFaceLoss(num_classes, DIM, sub_centers=sub_centers))
    x = torch.randn(5, DIM, requires_grad=True)
    with count_traffic() as counted:
        criterion(x, torch.arange(5)).backward()
    return fm.distributed.bytes_per_step(5, DIM, dist.get_world_size()), counted.total()


def traffic_of_copies() -> tuple[int, int]:
    """What the planner says, and what is sent, in a mesh of data x classes of 4 ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    criterion = shard_classes(fm.ArcFaceLoss(12, DIM), mesh)
    x = torch.randn(5, DIM, requires_grad=True)
    with count_traffic() as counted:
        criterion(x, torch.arange(5)).backward()
    setting = plan.Setting(12, DIM, 2, rows=5, embeddings="fp32", copies=2)
    return plan.plan(setting).sent, counted.total()


def refusals() -> None:
    """Errors of what can't be sharded, and of what sharded classes can't do."""
    criterion = fm.ArcFaceLoss(7, DIM)
    with pytest.raises(TypeError, match="criterion must be a loss of fused_margin"):
        shard_classes(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"same on all ranks that share them, got \[\(7, "):
        shard_classes(fm.ArcFaceLoss(7 + dist.get_rank(), DIM))
    with pytest.raises(TypeError, match=r"mesh must be a .*DeviceMesh, got int"):
        shard_classes(criterion, 3)
    shard_classes(criterion)
    with pytest.raises(ValueError, match="is a DTensor already"):
        shard_classes(criterion)
    x, labels = torch.randn(2, DIM), torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"weight is a DTensor.*weight.full_tensor\(\)"):
        fm.metrics.center_counts(x, criterion.weight, labels, 1)
    with pytest.raises(TypeError, match="weight is a DTensor"):
        fm.metrics.outliers(x, criterion, labels)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 7\)"):
        criterion(x, labels + 6)
    mixed = x.bfloat16() if dist.get_rank() else x
    with pytest.raises(TypeError, match=r"different dtypes on different ranks, torch.float32, "):
        criterion(mixed, labels)
    columns = DTensor.from_local(torch.randn(7, 3), init_device_mesh("cpu", (2,)), [Shard(1)])
    with pytest.raises(TypeError, match="sharded on classes"):
        fm.functional.cosface(x, columns, labels)
    whole = fm.ArcFaceLoss(7, DIM)
    optimizer = SGDInBackward([whole.weight], lr=0.1)
    before = whole.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"each of 2 ranks.*shard_classes\(criterion\)"):
        whole(x, labels).backward()
    assert torch.equal(whole.weight, before)
    optimizer.release()
    with pytest.raises(ValueError, match="6 classes of sub_centers = 3 rows can't be split over 4"):
        plan.plan(plan.Setting(6, DIM, 4, sub_centers=3))
    with pytest.raises(ValueError, match="7 classes of sub_centers = 3 rows can't be split over 2"):
        shard_classes(fm.ArcFaceLoss(7, DIM, sub_centers=3))
    mesh = init_device_mesh("cpu", (2,))
    other = fm.ArcFaceLoss(7, DIM, device="meta")
    assert shard_classes(other, mesh) is other


def too_late(kind: str) -> str:
    """What is said where something holds the whole weight, on the last rank alone too."""
    criterion = fm.ArcFaceLoss(7, DIM)
    weight = criterion.weight
    is_last = dist.get_rank() == dist.get_world_size() - 1
    kept: Any = None
    if kind == "DDP":
        kept = nn.parallel.DistributedDataParallel(nn.ModuleList([nn.Linear(DIM, DIM), criterion]))
    elif kind == "optimizer" or is_last:
        kept = torch.optim.SGD(criterion.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="call shard_classes first") as caught:
        shard_classes(criterion)
    assert criterion.weight is weight
    if kind != "DDP":
        del kept
        gc.collect()
        shard_classes(criterion)
    return str(caught.value)


def check_copies(kind: str) -> str:
    """What `check_setup` says of copies that are alike, or of which one has been changed."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // 2, 2) if kind == "of shards" else (ranks, 1))
    criterion = shard_classes(fm.CosFaceLoss(7, DIM), mesh)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
    torch.manual_seed(dist.get_rank())
    criterion(torch.randn(5, DIM), torch.randint(7, (5,))).backward()
    optimizer.step()
    fm.check_setup(criterion, optimizer)
    if kind == "alike":
        return ""
    local: Any = criterion.weight
    if dist.get_rank() == ranks - 1:
        with torch.no_grad():
            local.to_local()[0, 0] += 1.0
    with pytest.raises(RuntimeError, match="hold copies of the same classes") as caught:
        fm.check_setup(criterion, optimizer)
    return str(caught.value)


def odd_calls() -> dict[str, float]:
    """Embeddings that need no gradient on one rank, frozen weights, graphs used twice, no grad."""
    part = batch([4, 3, 2, 5][: dist.get_world_size()], 9)[dist.get_rank()]
    plain = built("arcface", 9)
    criterion = shard_classes(copy.deepcopy(plain))
    expected = measured(plain, "arcface", part)
    dist.all_reduce(expected["d_weight"])
    expected["d_weight"] /= dist.get_world_size()
    found = {}

    x = part.x.clone().requires_grad_(dist.get_rank() != 0)
    criterion(x, part.labels).backward()
    found["one rank frozen"] = _largest_difference(criterion.weight.grad, expected["d_weight"])
    assert (x.grad is None) == (dist.get_rank() == 0)
    criterion.weight.grad = None

    criterion(part.x, part.labels).backward()
    found["all frozen"] = _largest_difference(criterion.weight.grad, expected["d_weight"])
    criterion(part.x, part.labels).backward()
    found["accumulated"] = _largest_difference(criterion.weight.grad, 2 * expected["d_weight"])
    criterion.weight.grad = None

    x = part.x.clone().requires_grad_()
    loss = criterion(x, part.labels)
    loss.backward(retain_graph=True)
    loss.backward()
    found["twice"] = _largest_difference(criterion.weight.grad, 2 * expected["d_weight"])
    criterion.weight.grad = None

    criterion.weight.requires_grad_(False)
    x = part.x.clone().requires_grad_()
    criterion(x, part.labels).backward()
    assert x.grad is not None
    found["weights frozen"] = _largest_difference(x.grad, expected["d_x"])
    with torch.no_grad():
        loss = criterion(part.x, part.labels)
    assert not loss.requires_grad
    found["no grad"] = _largest_difference(loss, expected["loss"])
    weights = criterion.weight, plain.weight.detach()
    (lse, u), (lse_of_all, u_of_all) = (
        fm.functional.cosine_lse(part.x, weight, part.labels, 7.0) for weight in weights
    )
    found["lse"] = _largest_difference(lse, lse_of_all)
    found["u"] = _largest_difference(u, u_of_all)
    return found


def meshes() -> dict[str, float]:
    """A mesh of data x classes, on 4 ranks: copies of shards, of which gradients are averaged."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    part = batch([4, 3, 2, 5], 9)[dist.get_rank()]
    found = {}
    for name in ("arcface, learnt scale", "adaface"):
        plain = built(name, 9)
        criterion = shard_classes(copy.deepcopy(plain), mesh)
        expected, actual = (measured(one, name, part) for one in (plain, criterion))
        for key, value in expected.items():
            if key in ("d_weight", "d_scale"):
                dist.all_reduce(value)
                value /= 4
            found[f"{name}, {key}"] = _largest_difference(actual[key], value)
        assert criterion.weight.to_local().shape[0] in (5, 4)
    optimizer = SGDInBackward([criterion.weight], lr=0.1)
    with pytest.raises(ValueError, match="the mesh holds copies"):
        criterion(part.x, part.labels)
    optimizer.release()
    criterion = shard_classes(built("cosface", 9), mesh["classes"])
    assert ClassShard.of(criterion.weight).replicas == ()
    return found


def mixed_precision() -> dict[str, float]:
    """Autocast, accumulation, a GradScaler and clipping, with a backbone in DDP or FSDP2."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    found = {}
    for wrapper in ("ddp", "fsdp"):
        torch.manual_seed(3)
        backbone = nn.Linear(5, DIM)
        plain = fm.ArcFaceLoss(9, DIM, scale=16.0)
        _setup._calls[plain] = _setup._DECIDED  # it is trained on all rows of all ranks
        sharded = shard_classes(copy.deepcopy(plain))
        model: Any = copy.deepcopy(backbone)
        model = nn.parallel.DistributedDataParallel(model) if wrapper == "ddp" else model
        if wrapper == "fsdp":
            fully_shard(model)
        rows = torch.randn(8 * ranks, 5)
        labels = torch.randint(9, (8 * ranks,))
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        parameters = [*model.parameters(), *sharded.parameters()]
        # a GradScaler takes one kind of tensors for each optimiser
        optimizers = [torch.optim.SGD(one.parameters(), lr=0.5) for one in (model, sharded)]
        others = torch.optim.SGD([*backbone.parameters(), *plain.parameters()], lr=0.5)
        for half in (slice(0, 4), slice(4, 8)):
            with torch.autocast("cpu", torch.bfloat16):
                mine = slice(8 * rank, 8 * rank + 8)
                x, y = rows[mine][half], labels[mine][half]
                loss = sharded(model(x), y)
                chosen = [8 * r + i for r in range(ranks) for i in range(8)[half]]
                whole = plain(backbone(rows[chosen]), labels[chosen])
            scaler.scale(loss).backward()
            whole.backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = fm.distributed.clip_grad_norm_(parameters, 0.1)
        expected = nn.utils.clip_grad_norm_([*backbone.parameters(), *plain.parameters()], 0.1)
        found[f"{wrapper}, norm"] = _largest_difference(norm, expected)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        others.step()
        found[f"{wrapper}, weight"] = _largest_difference(sharded.weight, plain.weight)
        first = next(iter(model.parameters()))
        found[f"{wrapper}, backbone"] = _largest_difference(first, backbone.weight)
    return found


def same_draws(num_classes: int, cuts: list[int]) -> bool:
    """Whether weights that are drawn in pieces are those drawn at once."""
    whole = torch.empty(num_classes, 3)
    _shards.draw_rows(whole, 0, 0.5, SEED)
    pieces = torch.empty(num_classes, 3)
    for start, stop in zip([0, *cuts], [*cuts, num_classes], strict=True):
        _shards.draw_rows(pieces[start:stop], start, 0.5, SEED)
    return torch.equal(whole, pieces)


def compiled() -> dict[str, float]:
    """Compiled calls, outside of graphs where ranks talk, for batches that vary."""
    found: dict[str, float] = {}
    for name in ("arcface", "adacos", "curricularface"):
        criterion, eager = shard_classes(built(name, 9)), shard_classes(built(name, 9))
        in_graphs = torch.compile(criterion, backend="aot_eager")
        evaluate = torch.compile(fm.metrics.evaluate, backend="aot_eager")
        for step, sizes in enumerate(([4, 3, 2, 5], [5, 5, 5, 5], [3, 6, 7, 3])):
            part = batch(sizes[: dist.get_world_size()], 9)[dist.get_rank()]
            for one in (criterion, eager):
                one.zero_grad()
            expected, got = measured(eager, name, part), measured(in_graphs, name, part)
            for key, value in got.items():
                of_eager = expected[key.replace("_orig_mod.", "")]
                found[f"{name}, {step}, {key}"] = _largest_difference(value, of_eager)
            given = part.x, eager, part.labels
            cosines = [call(*given).target_cosine for call in (evaluate, fm.metrics.evaluate)]
            found[f"{name}, {step}, evaluate"] = _largest_difference(
                *(one.nan_to_num(-2.0) for one in cosines)
            )
    return found
