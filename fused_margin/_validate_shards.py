"""Errors of classes that are split over ranks, with the remedy in the message."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from fused_margin import _validate


def criterion(value: Any) -> None:
    """Check that a module has class weights (C, D) of its own that are whole."""
    weight = value._parameters.get("weight") if isinstance(value, nn.Module) else None
    if weight is None or not callable(getattr(value, "psi", None)):
        raise TypeError(
            f"criterion must be a loss of fused_margin with its weight (C, D), got"
            f" {type(value).__name__}; one that is wrapped, or part of a model, is given itself, as"
            " model.criterion"
        )
    if _validate.is_dtensor(weight):
        raise ValueError(
            f"the weight of this {type(value).__name__} is a DTensor already; call shard_classes"
            " once, and neither fully_shard(criterion) nor fully_shard of a module that contains it"
        )


def mesh(value: Any, weight: torch.Tensor) -> None:
    """Check that this rank is in the mesh, whose devices are the weight's."""
    if not all(hasattr(value, name) for name in ("get_group", "get_coordinate", "device_type")):
        raise TypeError(
            f"mesh must be a torch.distributed.device_mesh.DeviceMesh, got {type(value).__name__};"
            ' init_device_mesh("cuda", (num_ranks,)) makes one'
        )
    if value.get_coordinate() is None:
        raise ValueError(
            f"this rank is not in the mesh {value}; call shard_classes on its ranks only"
        )
    if not weight.is_meta and weight.device.type != value.device_type:
        raise ValueError(
            f"the weight is on {weight.device}, the mesh of {value.device_type!r} devices; move the"
            f" criterion first, criterion.to({value.device_type!r})"
        )


def weight(value: Any) -> None:
    """Check that a DTensor is sharded on classes, and nothing else."""
    if not _validate.is_class_sharded(value):
        _validate.plain("weight", value)


WHOLE = (
    "save what get_model_state_dict(criterion, options=StateDictOptions(full_state_dict=True)) of"
    " torch.distributed.checkpoint.state_dict gives rank 0, or weight.full_tensor(); or let all"
    " ranks save and load with torch.distributed.checkpoint, which fits any number of them"
)


def rows_of_all(value: Any) -> None:
    """Check that the shards of a DTensor can be had, as in a state that torch.save has written."""
    if not dist.is_available() or not dist.is_initialized():
        rows = value._local_tensor.shape[0]
        raise ValueError(
            f"this weight is a DTensor, of which {rows} of {value.shape[0]} rows are here and the"
            f" others were on other ranks, which aren't; {WHOLE}"
        )


def same_dtypes(dtypes: list[torch.dtype]) -> None:
    """Check that all ranks' embeddings have one dtype; every rank raises the same error."""
    if len(set(dtypes)) > 1:
        raise TypeError(
            f"embeddings have different dtypes on different ranks, {', '.join(map(str, dtypes))} by"
            " rank; give a rank without rows embeddings of the same dtype too"
        )


def same_numbers(name: str, values: list[int]) -> None:
    """Check that all ranks ask for the same; every rank raises the same error."""
    if len(set(values)) > 1:
        raise ValueError(
            f"{name} differs between ranks, {', '.join(map(str, values))} by rank; give all the"
            " same"
        )


def same_size(before: torch.Size, now: torch.Size) -> None:
    """Check that the classes of a backward are those of its forward."""
    if before != now:
        raise ValueError(
            f"the criterion had {before[0]} rows of weights in this loss's forward and has {now[0]}"
            " now; call backward() before grow()"
        )


def no_copies(replicas: tuple[Any, ...]) -> None:
    """Check that sampled classes are held by one rank, whose gradient has rows of its own."""
    if replicas:
        raise ValueError(
            "sampled negatives need each class on one rank, but this mesh of several dimensions has"
            " copies, which would sample other rows; split the classes over all ranks, or set"
            " criterion.sampler.rate = 1.0"
        )


def first_of_all(
    criterion: str, wrappers: Iterable[str | None], optimizers: Iterable[str | None]
) -> None:
    """Check that no rank has anything yet that holds the parameter which shards replace."""
    wrapper, optimizer = (next(filter(None, found), None) for found in (wrappers, optimizers))
    if wrapper is not None:
        raise ValueError(
            f"this {criterion} is part of what {wrapper} has wrapped, which would go on with its"
            " whole weight; call shard_classes first, and wrap the backbone alone: shards need no"
            " wrapper"
        )
    if optimizer is not None:
        raise ValueError(
            f"an optimizer, {optimizer}, holds the weight of this {criterion} already, and would go"
            " on with the whole one, which nothing trains any more; call shard_classes first, then"
            " build the optimizer"
        )


def same_sizes(sizes: Iterable[tuple[int, int]]) -> None:
    """Check the weights (C, D) of the ranks that are to share one."""
    if len(set(sizes)) > 1:
        raise ValueError(
            "the class weights (C, D) must be the same on all ranks that share them, got"
            f" {sorted(set(sizes))}; count the classes of the whole data set, not of a rank's part"
        )


def sampled_computed() -> NoReturn:
    """Refuse a sparse gradient of what is no parameter."""
    raise ValueError(
        "sampled negatives give the class weights a sparse gradient, which can't go on through what"
        " computes them, as a parametrization; remove it (parametrize.remove_parametrizations), or"
        " train with all classes, sample_negatives(criterion, 1.0)"
    )


def sampled_in(wrapper: str) -> NoReturn:
    """DDP or FSDP2 around a criterion with a sampler."""
    raise ValueError(
        f"the gradient of sampled classes is sparse, which {wrapper} can't average;"
        " split the classes over the ranks instead, fused_margin.distributed.shard_classes("
        "criterion), and wrap the backbone alone; or set criterion.sampler.rate = 1.0"
    )


def takes_sparse(optimizer: Any, group: Any, weight: Any, is_sharded: bool) -> bool:
    """Whether an optimiser updates weights by gradients of some rows; those not of torch may."""
    kind = type(optimizer)
    if kind.__name__ == "SGDInBackward":
        return False
    if not kind.__module__.startswith("torch.optim"):
        return True
    if group.get("fused") or group.get("weight_decay"):
        return False
    if kind.__name__ == "SGD":
        momentum = optimizer.state.get(weight, {}).get("momentum_buffer")
        # of which nesterov makes the sum with the gradient, in this order
        return not (group.get("nesterov") and momentum is not None and not _is_sparse(momentum))
    return not is_sharded and kind.__name__ in ("SparseAdam", "Adagrad")


def takes_dense(optimizer: Any, weight: Any) -> bool:
    """Whether an optimiser takes a dense gradient, after some that may have been sparse."""
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim"):
        return True
    momentum = optimizer.state.get(weight, {}).get("momentum_buffer")
    return kind.__name__ != "SparseAdam" and (momentum is None or not _is_sparse(momentum))


def _is_sparse(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and _validate.layout(value) is not torch.strided


def sampled_by(optimizer: Any, is_sharded: bool) -> NoReturn:
    """An optimiser that doesn't take the sparse gradient of sampled classes."""
    others = "" if is_sharded else ", as SparseAdam and Adagrad do"
    raise ValueError(
        f"{type(optimizer).__name__} with these settings doesn't take the sparse gradient of"
        " sampled classes; use fused_margin.optim.RowSparseSGD (momentum, weight decay) or"
        " RowSparseAdam for criterion.parameters(), which update the sampled rows alone. torch's"
        " SGD takes it without weight_decay and fused (and without nesterov once its momentum is"
        f" dense){others}; at criterion.sampler.rate = 1.0 the gradient is dense"
    )


def dense_by(optimizer: Any) -> NoReturn:
    """An optimiser that doesn't take the dense gradient of all classes."""
    kind = type(optimizer).__name__
    if kind == "SparseAdam":
        said, ours = "SparseAdam takes sparse gradients alone", "RowSparseAdam"
        remedy = "torch.optim.Adam takes dense ones alone"
    else:
        said, ours = f"after sampled steps the momentum of {kind} is sparse", "RowSparseSGD"
        remedy = (
            "or make the momentum dense first: state = optimizer.state[criterion.weight];"
            ' state["momentum_buffer"] = state["momentum_buffer"].to_dense()'
        )
    raise ValueError(
        f"{said}, and the gradient of all classes, at criterion.sampler.rate = 1.0, is dense. Use"
        f" fused_margin.optim.{ours}, which takes both, and takes this one's state:"
        f" load_state_dict(optimizer.state_dict()); {remedy}"
    )


def norm_type(value: float) -> float:
    """Check which norm of gradients is asked for."""
    number = _validate._real("norm_type", value, "a number")
    if not number > 0:
        raise ValueError(f"norm_type must be > 0, got {number:g}; inf is the largest element")
    return number


def sampled(value: Any) -> None:
    """Check that it is a loss that can have a sampler."""
    if not isinstance(value, nn.Module) or not hasattr(value, "sampler"):
        raise TypeError(
            f"criterion must be a loss of fused_margin, got {type(value).__name__}; one that is"
            " wrapped, or part of a model, is given itself, as model.criterion"
        )


def whole_classes(num_rows: int, ranks: int, sub_centers: int) -> None:
    """Check that no class has its sub-centres on two ranks."""
    if sub_centers > 1 and -(-num_rows // ranks) % sub_centers:
        raise ValueError(
            f"{num_rows // sub_centers} classes of sub_centers = {sub_centers} rows can't be split"
            f" over {ranks} ranks without cutting one; use a number of classes that is a multiple"
            f" of {ranks}"
        )


def can_be_planned(reason: str | None) -> None:
    """Refuse to plan what the package doesn't do, for a reason that names the remedy."""
    if reason is not None:
        raise ValueError(reason)


def asked_of_a_sample(sub_centers: int, has_total: bool, has_stats: bool) -> None:
    """Check that nothing is asked of classes which a sampler leaves out."""
    asked = {
        "sub_centers": sub_centers > 1,
        "label_smoothing": has_total,
        "return_stats": has_stats,
    }
    given = [name for name, is_given in asked.items() if is_given]
    if given:
        raise ValueError(
            f"{' and '.join(given)} can't be had with sampled negatives, which leave classes out;"
            " do without, or train with all classes: criterion.sampler.rate = 1.0, or no sampler"
        )
