"""Whether several processes train the same class weights: a warning by itself, and a check.

Data parallelism averages gradients of the module that it wraps. A criterion beside that module
trains with the gradients of its own rank, without an error: the ranks' weights drift apart.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from fused_margin import _remedies, _validate, _validate_setup, _validate_shards, _warnings

__all__ = ["UnsynchronizedWeightsWarning", "WeightDecayWarning", "check_setup"]

Found = TypeVar("Found")

_HAS_DISTRIBUTED = dist.is_available()
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_BLOCK = 1 << 18  # elements at a time, whose int64 copies, 2 MiB, stay in cache

# Calls that trained a criterion while nothing could be said about it; afterwards `_DECIDED`.
_calls: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_DECIDED = -1
# the same of those with a sampler, by whether the gradient of the weights is sparse
_sampled_calls: weakref.WeakKeyDictionary[nn.Module, dict[bool, int]] = weakref.WeakKeyDictionary()


class UnsynchronizedWeightsWarning(UserWarning):
    """The class weights are trained on several ranks, and nothing averages their gradients."""


class WeightDecayWarning(UserWarning):
    """Weight decay shrinks class weights whose norms the loss doesn't depend on."""


def _ranks(group: Any = None) -> int:
    """Processes of the group; 1 where there is none."""
    if _HAS_DISTRIBUTED and dist.is_initialized():
        return dist.get_world_size(group)
    return 1


def _fsdp_module() -> type[Any] | None:
    """FSDP2's class, unless nobody has imported it: then nothing is an instance of it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def living(kinds: Iterable[type]) -> list[Any]:
    """Every object in this process of these classes, or of classes derived from them."""
    wanted = _with_subclasses(kinds)
    return [one for one in gc.get_objects() if type(one) in wanted]


def without_garbage(search: Callable[[], Found]) -> Found:
    """What a search among `living` objects finds, of those that somebody still has."""
    found = search()
    if found:
        gc.collect()  # what refers to itself may be there though nobody has it any more
        found = search()
    return found


def _with_subclasses(kinds: Iterable[type]) -> set[type]:
    found: set[type] = set()
    left = list(kinds)
    while left:
        kind = left.pop()
        found.add(kind)
        left += kind.__subclasses__()
    return found


def _wrappers() -> list[nn.Module]:
    """Every module of DDP or FSDP2 in this process.

    PyTorch keeps no list of them, and DDP leaves no mark on a parameter that Python can see.
    """
    ddp, fsdp = nn.parallel.DistributedDataParallel, _fsdp_module()
    modules = living([ddp] if fsdp is None else [ddp, fsdp])
    # not one whose constructor raised
    return [one for one in modules if not isinstance(one, ddp) or hasattr(one, "reducer")]


def _data_parallel_modules() -> list[nn.Module]:
    """Of these, those that average gradients over several ranks."""
    ddp = nn.parallel.DistributedDataParallel
    return [one for one in _wrappers() if not isinstance(one, ddp) or _ranks(one.process_group) > 1]


def wrapper_of(weight: Any) -> str | None:
    """What has made a module of which the weight is a parameter; None if nothing has."""

    def search() -> str | None:
        for module in _wrappers():
            if any(parameter is weight for parameter in module.parameters()):
                is_ddp = isinstance(module, nn.parallel.DistributedDataParallel)
                return "DistributedDataParallel" if is_ddp else "fully_shard()"
        return None

    return without_garbage(search)


def warn_if_unsynchronized(criterion: nn.Module, weight: Any = None) -> None:
    """Warn once if this process has data-parallel modules and the criterion's weight is in none.

    Without any such module nothing is said: DeepSpeed, pipelines, or gradients averaged by hand.
    The search looks at every Python object, so it is made on calls 1, 2, 4, 8, ... and only until
    there is a data-parallel module. Compiled code makes none.

    Args:
        criterion: a loss. weight: its class weights, where they are not ``criterion.weight``.
    """
    if not _HAS_DISTRIBUTED or not dist.is_initialized():
        return
    if torch.compiler.is_compiling() or dist.get_world_size() < 2:
        return
    weight = criterion.weight if weight is None else weight
    # FSDP1 and torch.func.functional_call put in a tensor that is no parameter
    is_trained = isinstance(weight, nn.Parameter) and weight.requires_grad
    if not (is_trained and torch.is_grad_enabled()) or _validate.is_dtensor(weight):
        return  # shards of classes get the gradients of all ranks' rows
    calls = _calls.get(criterion, 0)
    if calls == _DECIDED:
        return
    _calls[criterion] = calls = calls + 1
    if calls & (calls - 1):
        return
    modules = _data_parallel_modules()
    if not modules:
        return
    _calls[criterion] = _DECIDED
    if any(parameter is weight for module in modules for parameter in module.parameters()):
        return
    _warnings.warn(
        f"a model is trained on {_ranks()} ranks, but the class weights of this"
        f" {type(criterion).__name__} are in no data-parallel module: each rank trains them with"
        f" the gradients of its own batches. To average them {_validate_setup.REMEDY}."
        " fused_margin.check_setup(criterion, optimizer) says whether all is right. If you average"
        " the gradients yourself, ignore fused_margin.UnsynchronizedWeightsWarning with"
        " warnings.filterwarnings",
        UnsynchronizedWeightsWarning,
    )


def check_sampled(criterion: nn.Module, weight: Any, *, is_sparse: bool) -> None:
    """Refuse wrappers and optimisers that can't do with the gradient of a loss with a sampler.

    It is sparse below a rate of 1 and dense at 1, where what an optimiser keeps may be sparse
    still. Before anything is trained with it, and searched for as in `warn_if_unsynchronized`:
    until an optimiser is found that holds the weight.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
        return
    if is_sparse and not weight.is_leaf:
        _validate_shards.sampled_computed()
    of_kind = _sampled_calls.setdefault(criterion, {})
    calls = of_kind.get(is_sparse, 0) + 1
    if calls == _DECIDED + 1:
        return
    if calls & (calls - 1) == 0:
        wrapper = wrapper_of(weight) if is_sparse else None
        if wrapper is not None:
            _validate_shards.sampled_in(wrapper)
        found = holders(weight)
        # one that nobody steps any more may still be there beside the one that fits
        if found and not any(_fits_sampler(*one, weight, is_sparse) for one in found):
            _fits_sampler(*found[0], weight, is_sparse, raises=True)
        calls = _DECIDED if found else calls
    of_kind[is_sparse] = calls


def _fits_sampler(
    optimizer: Any, group: Any, weight: Any, is_sparse: bool, *, raises: bool = False
) -> bool:
    """Whether an optimiser takes the gradient of a loss with a sampler; an error if it is asked."""
    if is_sparse:
        is_sharded = _validate.is_class_sharded(weight)
        fits = _validate_shards.takes_sparse(optimizer, group, weight, is_sharded)
        if raises and not fits:
            _validate_shards.sampled_by(optimizer, is_sharded)
        return fits
    fits = _validate_shards.takes_dense(optimizer, weight)
    if raises and not fits:
        _validate_shards.dense_by(optimizer)
    return fits


def holders(parameter: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Every optimiser in this process that has a parameter, with its group."""
    return _holding(living([torch.optim.Optimizer]), parameter)


def not_recomputed(criterion: nn.Module, what: str) -> None:
    """Refuse the second forward of activation checkpointing, which a backward makes.

    Args:
        criterion: a loss in training mode. what: what a forward changes that the second one needs.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
        return
    raise RuntimeError(
        f"this {type(criterion).__name__} is part of what activation checkpointing runs twice, and"
        f" its second forward would have other {what} than the first: call it outside, loss ="
        " criterion(torch.utils.checkpoint.checkpoint(model, x), labels). It keeps no (N, C) matrix"
        " that checkpointing would save"
    )


def _holding(optimizers: Iterable[Any], weight: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The optimisers that have the weight, with its group."""
    return [
        (one, group)
        for one in optimizers
        for group in getattr(one, "param_groups", ())
        if any(parameter is weight for parameter in group["params"])
    ]


def _check_optimizers_of_samplers(
    criterion: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Refuse optimisers that don't take the gradients of criteria with a sampler."""
    for module in criterion.modules():
        sampler, weight = getattr(module, "sampler", None), getattr(module, "weight", None)
        if sampler is not None and hasattr(module, "psi"):
            for one in _holding(optimizers, weight):
                _fits_sampler(*one, weight, sampler.rate < 1.0, raises=True)


def _has_sampler(criterion: nn.Module, name: str) -> bool:
    """Whether a parameter is the class weights of a loss that trains with a part of the classes."""
    owner, _, own_name = name.rpartition(".")
    sampler = getattr(criterion.get_submodule(owner), "sampler", None)
    return own_name == "weight" and sampler is not None and sampler.rate < 1.0


class _Report(NamedTuple):
    """What one rank tells the others of one parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_forgotten: bool
    is_shared: bool
    part: tuple[int, ...]
    weight: int | None
    grad: int | None


def _part(parameter: Any) -> tuple[int, ...]:
    """Which part of it this rank has: its place in the dimensions of the mesh that split it."""
    if not _validate.is_dtensor(parameter):
        return ()
    places = zip(parameter.placements, parameter.device_mesh.get_coordinate(), strict=True)
    return tuple(place for placement, place in places if not placement.is_replicate())


def _checksum(tensor: Any) -> int | None:
    """The elements' bits, summed as integers: the same for equal tensors on any device.

    Of a DTensor those of this rank's shard.
    """
    if tensor is None:
        return None
    tensor = tensor.to_local() if _validate.is_dtensor(tensor) else tensor
    bits = tensor.detach().to_dense().view(_INTEGERS[tensor.element_size()]).flatten()
    return sum(int(block.sum(dtype=torch.int64)) for block in bits.split(_BLOCK))


def _report(criterion: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[_Report]:
    fsdp = _fsdp_module()
    if fsdp is not None:
        for module in criterion.modules():
            if isinstance(module, fsdp):
                fsdp.reshard(module)  # after a forward alone, its parameters are gathered copies
    held = [{id(p) for group in one.param_groups for p in group["params"]} for one in optimizers]
    is_alone = _ranks() < 2
    return [
        _Report(
            name,
            tuple(parameter.shape),
            str(parameter.dtype),
            bool(held) and parameter.requires_grad and not any(id(parameter) in h for h in held),
            sum(id(parameter) in one for one in held) > 1,
            _part(parameter),
            None if is_alone else _checksum(parameter),
            None if is_alone else _checksum(parameter.grad),
        )
        for name, parameter in criterion.named_parameters()
    ]


def _warn_of_weight_decay(criterion: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Warn of weight decay on the class weights of a loss with a psi, which normalises them."""
    decays = {
        id(parameter): float(group.get("weight_decay", 0.0))
        for one in optimizers
        for group in one.param_groups
        for parameter in group["params"]
    }
    for module in criterion.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decay = decays.get(id(parameter), 0.0)
            if hasattr(module, "psi") and name in ("weight", "W") and decay > 0.0:
                message = _remedies.of_weight_decay(type(module).__name__, name, decay)
                _warnings.warn(message, WeightDecayWarning)


def check_setup(
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    group: Any = None,
) -> None:
    """Raise unless all ranks train the same class weights, and one optimiser holds them.

    With several processes it is a collective: call it on every rank, once, after the first
    ``optimizer.step()`` and before ``optimizer.zero_grad()``, so that the gradients can be compared
    too. Before the first backward it can't tell what will be averaged. Ranks are compared bit for
    bit, as sums over the bits of each parameter and gradient. Of shards (DTensors) only copies of
    the same are compared: FSDP2 itself reduces gradients, and those of `shard_classes` are of all
    ranks' rows. Ranks that were given the same batches pass in any case.

    Args:
        criterion: a loss of this package, wrapped or not, or any module with parameters.
        optimizer: if given, it has to hold each parameter of ``criterion`` that requires a
            gradient, and of several exactly one has to; the only thing checked in a single process.
        group: the process group over which the data are split; by default all ranks.

    Raises:
        TypeError: ``criterion`` is no module, or ``optimizer`` no ``torch.optim.Optimizer``.
        ValueError: ``criterion`` has no parameters, or ``optimizer`` lacks some of them on a rank,
            or two optimisers hold the same, or one doesn't take the gradient of sampled classes,
            sparse below a rate of 1 and dense at 1: the error says which do.
        RuntimeError: the parameters or their gradients differ between ranks, or losses are scaled
            by a GradScaler that `optim.SGDInBackward` wasn't given.

    Warns:
        WeightDecayWarning: an optimiser decays class weights whose norms the loss doesn't depend
            on.
    """
    _validate_setup.module(criterion)
    optimizers = _validate_setup.optimizers(optimizer)
    reports = [_report(criterion, optimizers)]
    if _ranks(group) > 1:
        reports *= _ranks(group)
        dist.all_gather_object(reports, reports[0], group=group)
    # from here on every rank has the same reports, hence raises the same error
    name = type(criterion).__name__
    forgotten = sorted({item.name for report in reports for item in report if item.is_forgotten})
    shared = sorted({item.name for report in reports for item in report if item.is_shared})
    _validate_setup.setup(name, forgotten, shared, has_parameters=all(reports))
    _check_optimizers_of_samplers(criterion, optimizers)
    for one in optimizers:
        check_scaler = getattr(one, "check_scaler", None)  # SGDInBackward's
        if check_scaler is not None:
            check_scaler()
    _warn_of_weight_decay(criterion, optimizers)
    if len({tuple(item[:3] for item in report) for report in reports}) > 1:
        raise RuntimeError(
            f"this {name} has other parameters on other ranks; build the same module on each:"
            f" {[[item[:3] for item in report] for report in reports]}"
        )
    for items in zip(*reports, strict=True):
        for what in ("weight", "grad"):
            of_part: dict[tuple[int, ...], int | None] = {}
            sums = [(item.part, getattr(item, what)) for item in items]
            different = [
                rank for rank, one in enumerate(sums) if of_part.setdefault(*one) != one[1]
            ]
            if different:
                which = f"{items[0].name}{'.grad' if what == 'grad' else ''}"
                is_split = any(item.part for item in items)
                _validate_setup.unlike(
                    f"{which} of this {name}", different, is_split=is_split,
                    is_sampled=_has_sampler(criterion, items[0].name),
                )  # fmt: skip
