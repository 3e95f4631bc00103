"""Errors of a loss that gets new classes, with the remedy in the message."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from fused_margin import _validate

# the Python object, and one node that accumulates gradients, as a loss that is still there keeps it
_OWN_REFERENCES = 2


def parameter(name: str, value: Any) -> None:
    """Check that a parameter can take the place of another size, and keep its identity."""
    if not isinstance(value, nn.Parameter):
        raise TypeError(
            f"{name} is no parameter ({type(value).__name__}), so that there is nothing to grow;"
            " grow the criterion itself, before it is parametrized or wrapped"
        )
    if value.is_meta:
        raise ValueError(
            f"{name} is on the meta device; build the criterion with as many classes as it needs"
        )
    if value.grad is not None:
        raise ValueError(
            f"{name} has a gradient, which growing would lose: call optimizer.step() if it is to be"
            " used, and optimizer.zero_grad()"
        )
    hooks: Any = value
    if hooks._backward_hooks or hooks._post_accumulate_grad_hooks:
        raise ValueError(
            f"{name} has hooks, which growing would lose; remove them, and register them afterwards"
        )
    if _is_held(value):
        gc.collect()  # graphs that nobody has any more may wait for it
    if _is_held(value):
        raise ValueError(
            f"something besides the criterion holds {name}: a loss whose backward wasn't called, or"
            " weak references to it; drop these first, as with del loss"
        )


def _is_held(value: Any) -> bool:
    return bool(weakref.getweakrefs(value)) or value._use_count() > _OWN_REFERENCES


def not_wrapped(name: str, wrapper: str | None) -> None:
    """Check that nothing has made buckets or shards of the old size."""
    if wrapper is not None:
        raise ValueError(
            f"the class weights of this {name} belong to a module of {wrapper}, which keeps their"
            " old size: take the criterion out (ddp.module; then del ddp), grow it, and wrap it"
            " anew. Weights of fully_shard() can't grow: load them into a criterion of the new"
            " size, or split the classes by fused_margin.distributed.shard_classes, which can"
        )


def held(name: str, optimizers: Collection[Any], weight: Any) -> None:
    """Check that what was given as optimisers has to do with the weight."""
    groups = [group for one in optimizers for group in one.param_groups]
    if optimizers and not any(weight is one for group in groups for one in group["params"]):
        raise ValueError(
            f"the optimizer doesn't hold the class weights of this {name}; give the one that does,"
            " or none if there is none yet"
        )


def given_all(left_out: list[str], num_new: int) -> None:
    """Check that no other optimiser keeps something of what grows, at its old size."""
    if left_out:
        raise ValueError(
            f"{' and '.join(left_out)} keeps momentum or moments of what grows, and"
            f" wasn't given: criterion.grow({num_new}, optimizer), or a list of all that keep some."
            " One that won't be used again can forget them: optimizer.state.clear()"
        )


def own_draw(name: str, size: tuple[int, int]) -> NoReturn:
    """A loss that draws its weights otherwise."""
    raise ValueError(
        f"{name} has a reset_parameters of its own, so how its rows are drawn isn't known here:"
        f" pass weight=, {size}, whose directions are drawn as it draws them, as torch.randn{size}"
    )


def rows(value: Any, size: tuple[int, int]) -> None:
    """Check the weights that are given for the new classes."""
    _validate._tensor("weight", value)
    _validate.plain("weight", value)
    _validate._dense("weight", value)
    if tuple(value.shape) != size:
        raise ValueError(
            f"weight must have shape {size}, one row for each new class"
            f" (sub_centers rows with sub-centres), got {tuple(value.shape)}"
        )
    largest = value.detach().abs().amax(dim=1)
    for wrong, what, remedy in (
        (~largest.isfinite(), "NaN or infinite", "leave such embeddings out of their mean"),
        (largest == 0, "zeros, which have no direction", "give it the direction of its class"),
    ):
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"row {row} of weight is {what} ({int(wrong.sum())} of {len(wrong)} rows are);"
                f" {remedy}, or let all rows be drawn, weight=None"
            )


def weights_so_far(largest: torch.Tensor) -> None:
    """Check rows of the weight by their largest elements: their norms are those of the new ones."""
    if not bool(largest.isfinite().all()):
        raise ValueError(
            "the class weights so far have NaN or infinite rows: training has diverged; go on from"
            " a checkpoint"
        )


def some_norm(count: int) -> None:
    """Check that there is a row which isn't 0; every rank raises."""
    if not count:
        raise ValueError(
            "all class weights so far are 0, so that there is no norm which new ones could have;"
            " draw them first, criterion.reset_parameters()"
        )


def names(
    kind: str,
    given: Mapping[str, Any],
    found: Mapping[str, torch.Tensor],
    counts: Mapping[str, int],
) -> None:
    """Check that each tensor with a number for each class is given more of them, and none else."""
    unknown = sorted(given.keys() - found.keys())
    if unknown:
        there = f"it has {', '.join(found)}" if found else "it has none"
        raise ValueError(
            f"this {kind} has no tensor {unknown[0]} with a number for each class; {there}"
        )
    missing = [name for name in found if name not in given]
    if missing:
        calls = ", ".join(
            f"{name}=a number or a tensor {(counts[name], *found[name].shape[1:])}"
            for name in missing
        )
        raise ValueError(
            f"this {kind} has tensors with a number for each class: give those of the new classes,"
            f" grow(..., {calls}), or None where the first dimension isn't that of classes"
        )


def values(name: str, value: Any, like: torch.Tensor, count: int) -> torch.Tensor:
    """What new classes have in a tensor that is like ``like``, (count, ...)."""
    shape = (count, *like.shape[1:])
    if not isinstance(value, torch.Tensor):
        number = _validate._real(name, value, f"a number or a tensor of shape {shape}")
        value = torch.full(shape, number, dtype=torch.float64, device="cpu")
    _validate.plain(name, value)
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{name} of the new classes must have shape {shape}, got {tuple(value.shape)}"
        )
    made = value.detach().to(device=like.device, dtype=like.dtype)
    if not like.is_floating_point() and bool((made != value.detach().to(like.device)).any()):
        raise ValueError(f"{name} has {like.dtype}, which can't hold what is given; round it first")
    return made


def state(name: str, value: Any) -> NoReturn:
    """What an optimiser keeps of the weight, and nobody can say how it grows."""
    shown = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value)
    raise ValueError(
        f"the optimizer keeps {name}, {shown}, of the class weights, which has no row for each"
        " class and can't grow: let it start anew, optimizer.state.pop(criterion.weight), or grow"
        " before it is built"
    )


def agreed(reports: list[Any], mine: int) -> None:
    """Check that all ranks ask for the same; every rank raises."""
    for rank, report in enumerate(reports):
        if report.error and rank != mine:
            raise ValueError(f"rank {rank} of the shards can't grow: {report.error}")
    asked = [report.asked for report in reports]
    if any(one != asked[0] for one in asked):
        raise ValueError(
            "ranks ask for different growths (new classes, sums of the bits of what is given,"
            f" optimisers' states), by rank: {asked}; give each rank the same"
        )
