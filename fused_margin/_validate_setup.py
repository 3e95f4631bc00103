"""Errors about a criterion and its optimisers as a whole, with the remedy in the message."""

from __future__ import annotations

from typing import Any

import torch

from fused_margin import _remedies


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
