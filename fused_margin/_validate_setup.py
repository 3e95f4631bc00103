"""Errors about a criterion and its optimisers as a whole, with the remedy in the message."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from fused_margin import _remedies

REMEDY = (
    "wrap the criterion too, criterion = DistributedDataParallel(criterion), or make it a"
    " submodule of the module that is wrapped; with Accelerate pass it to accelerator.prepare(),"
    " with FSDP2 to fully_shard()"
)


def module(value: Any) -> None:
    """Check what `check_setup` looks into."""
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"criterion must be a module with parameters, got {type(value).__name__}")


def optimizers(value: Any) -> list[torch.optim.Optimizer]:
    """Check that it is an optimiser, several, or None; as a list."""
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    several = [] if value is None else several
    if not all(isinstance(one, torch.optim.Optimizer) for one in several):
        kinds = "a torch.optim.Optimizer, a list of them or None"
        raise TypeError(f"optimizer must be {kinds}, got {type(value).__name__}")
    return several


def setup(criterion: str, forgotten: list[str], shared: list[str], *, has_parameters: bool) -> None:
    """Check that a criterion has parameters, and that one optimiser holds each of them."""
    if not has_parameters:
        raise ValueError(
            f"this {criterion} has no parameters, so there are no class weights to check; pass the"
            " loss module itself (FSDP1 moves them to the module that it wraps: pass that one)"
        )
    if forgotten:
        raise ValueError(_remedies.of_forgotten(criterion, forgotten))
    if shared:
        raise ValueError(_remedies.of_shared(criterion, shared))


def unlike(what: str, ranks: list[int], *, is_split: bool, is_sampled: bool) -> NoReturn:
    """Refuse parameters or gradients, or copies of shards, that differ between ranks."""
    if is_sampled and not is_split:
        raise RuntimeError(
            f"{what} differs between ranks ({ranks} from 0): its gradients are not averaged. Those"
            " of sampled classes are sparse, which no wrapper averages: split the classes over the"
            " ranks, fused_margin.distributed.shard_classes(criterion), before the optimiser is"
            " made"
        )
    if is_split:
        raise RuntimeError(
            f"{what} differs between ranks that hold copies of the same classes ({ranks} from the"
            " first that holds them): copies begin alike by shard_classes, and stay so if they are"
            " given the same state and all ranks of their mesh make the same calls. (Those of"
            " several meshes apart are no copies: compare them with group=)"
        )
    raise RuntimeError(
        f"{what} differs between ranks ({ranks} from 0): its gradients are not averaged. "
        f"{REMEDY[0].upper()}{REMEDY[1:]}. (If they are, call check_setup after optimizer.step(),"
        " where none are partly accumulated)"
    )
