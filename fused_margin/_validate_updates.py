"""Errors of an optimiser that works in the backward, with the remedy in the message."""

from __future__ import annotations

from typing import Any

import torch

from fused_margin import _validate

SPENT = (
    "the gradient of these class weights has been used up in the backward: SGDInBackward has"
    " updated them, and no gradient is kept that could be clipped, scaled, read or given to an"
    " optimiser. Leave them out of clip_grad_norm_, GradScaler.step and other optimisers; or use"
    " torch.optim.SGD"
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def parameters(value: Any) -> None:
    """Refuse a module, whose parameters are meant."""
    if isinstance(value, torch.nn.Module):
        raise TypeError(
            f"SGDInBackward takes class weights, got {type(value).__name__}; give [criterion"
            ".weight]"
        )


def parameter(value: Any) -> None:
    """Check that a parameter can be class weights that are updated by blocks of rows."""
    if not isinstance(value, torch.nn.Parameter) or value.ndim != 2:
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
        raise TypeError(
            "SGDInBackward takes class weights (C, D), criterion.weight, got"
            f" {type(value).__name__}{shape}; give other parameters, as a learnt scale, to another"
            " optimiser"
        )
    if value.dtype not in DTYPES:
        raise TypeError(
            f"SGDInBackward takes class weights in fp32, fp64 or bf16, got {value.dtype}; use"
            " criterion.float()"
        )


def grad_scaler(value: Any) -> Any:
    """Check that it has a scale."""
    if value is not None and not callable(getattr(value, "get_scale", None)):
        raise TypeError(
            f"grad_scaler must be a torch.amp.GradScaler or None, got {type(value).__name__}"
        )
    return value


def no_gradient(grad: torch.Tensor | None, *, is_spent: bool) -> None:
    """Check that a backward finds no gradient of the weights that it is about to update."""
    if is_spent:
        raise RuntimeError(
            "a second backward has come to class weights that SGDInBackward has updated since the"
            " last step() or zero_grad(): gradients can't be accumulated, nor those of two losses"
            " over the same weights added. Call optimizer.step() after each backward; or use"
            " torch.optim.SGD"
        )
    if grad is not None:
        _other_gradient()


def nothing_left(grad: torch.Tensor | None) -> None:
    """Check, at a step, that no gradient was made that no update has seen."""
    if grad is not None and grad.numel():
        _other_gradient()


def _other_gradient() -> None:
    raise RuntimeError(
        "class weights of SGDInBackward have a gradient as a whole, which it can't apply. It comes"
        ' from a regulariser of the weights, from backend="reference", from torch.compile, a'
        " torch.func transform or another mode, from the columns of compat.pml's W, or was there"
        " before; use torch.optim.SGD, or set criterion.weight.grad = None"
    )


def no_copies(replicas: tuple[Any, ...]) -> None:
    """Check that no rank holds a copy of these classes, with which gradients are averaged."""
    if replicas:
        raise ValueError(
            "SGDInBackward can't update class weights of which the mesh holds copies, since their"
            " gradients have to be averaged first; shard the classes over a mesh of one dimension,"
            " or use torch.optim.SGD"
        )


def one_process(weight: Any, ranks: int) -> None:
    """Check that ranks don't update whole weights each by itself."""
    if ranks > 1 and not _validate.is_dtensor(weight):
        raise RuntimeError(
            f"SGDInBackward would update these class weights on each of {ranks} ranks with the"
            " gradients of that rank's batch, which nothing averages; split them,"
            " fused_margin.distributed.shard_classes(criterion), before the optimiser is made, or"
            " use torch.optim.SGD"
        )
