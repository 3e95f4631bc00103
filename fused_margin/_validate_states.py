"""Errors of optimisers' states that don't fit, with the remedy in the message."""

from __future__ import annotations

from typing import Any

import torch

from fused_margin import _validate


def lacking(kind: str, asked: list[str]) -> None:
    """Check that nothing is asked for which torch's optimiser has and this one hasn't."""
    if asked:
        settings = ", ".join(f"{name.split('=')[0]}=0" for name in asked)
        raise ValueError(
            f"{kind} can't do {', '.join(asked)}; use torch's optimiser, or do without: of a state,"
            f' for group in state["param_groups"]: group.update({settings})'
        )


def family(kind: str, members: str, is_one: bool, unknown: list[str]) -> None:
    """Check that a state is of an optimiser that keeps the same."""
    if not is_one:
        what = f"with {', '.join(unknown)} " if unknown else ""
        raise ValueError(
            f"the state {what}is of another kind of optimiser: {kind} takes those of {members}; to"
            " begin without it, don't load it"
        )


def fits(kind: str, name: str, value: Any, parameter: Any) -> None:
    """Check that what an optimiser keeps of a parameter has its rows."""
    if not isinstance(value, torch.Tensor) or name == "step":
        return
    shape = tuple(parameter.shape)
    expected = (*shape[:1], *(1 for _ in shape[1:])) if name in ("updates", "behind") else shape
    if tuple(value.shape) != expected:
        raise ValueError(
            f"{name} of {kind} has shape {tuple(value.shape)}, its parameter {shape}: a criterion"
            " grows together with what its optimiser keeps, criterion.grow(num_new, optimizer)."
            " Load a state from before into a criterion of as many classes, then grow both; or let"
            " it start anew, optimizer.state.pop(criterion.weight, None)"
        )
    if _validate.is_dtensor(value) != _validate.is_dtensor(parameter):
        which = (
            "is a DTensor, and its parameter is not"
            if _validate.is_dtensor(value)
            else ("is no DTensor, and its parameter is one")
        )
        raise ValueError(
            f"{name} of {kind} {which}; torch.distributed.checkpoint loads whole states into"
            " sharded ones, and sharded into whole"
        )
