"""Errors of an optimiser that works in the backward, with the remedy in the message."""

from __future__ import annotations

from typing import Any

import torch

from fused_margin import _validate

SPENT = (
    "the gradient of these class weights has been used up in the backward: SGDInBackward has"
    " updated them, and no gradient is kept that could be clipped, scaled, read or given to an"
    " optimiser. Leave them out of clip_grad_norm_, other optimisers and GradScaler.step (give"
    " SGDInBackward the scaler, grad_scaler=scaler, and call optimizer.step() itself); call"
    " optimizer.step() or zero_grad() before the weights are moved or cast; or use torch.optim.SGD"
)
ADDED = (
    "a backward has another gradient for class weights that SGDInBackward has updated in it, as"
    " that of a regulariser of the weights, which is lost: load the last checkpoint, and use"
    " torch.optim.SGD"
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def betas(value: Any) -> tuple[float, float]:
    """Check Adam's two, in [0, 1)."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"betas must be two numbers, (0.9, 0.999), got {value!r}")
    first, second = (_validate._real("betas", beta, "two numbers") for beta in value)
    if not (0.0 <= first < 1.0 and 0.0 <= second < 1.0):
        raise ValueError(f"betas must be in [0, 1), got {first} and {second}")
    return first, second


def no_hooks(parameter: Any) -> None:
    """Check that nobody waits for a gradient that will not be made."""
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        raise RuntimeError(
            "class weights of SGDInBackward have hooks, which would be given no gradient; nothing"
            " has been changed. Remove them, or use torch.optim.SGD"
        )


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
    if not value.is_contiguous():
        raise TypeError(
            f"SGDInBackward takes class weights (C, D) in rows, got shape {tuple(value.shape)} with"
            f" strides {value.stride()}; compat.pml's W are columns (D, C): use a loss of"
            " fused_margin itself, or torch.optim.SGD"
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
            " last step() or zero_grad(): gradients can't be accumulated. Call optimizer.step()"
            " after each backward; or use torch.optim.SGD"
        )
    if grad is not None:
        _other_gradient()


def unchanged(is_unchanged: bool) -> None:
    """Check that class weights are those of the forward."""
    if not is_unchanged:
        raise RuntimeError(
            "class weights of SGDInBackward have changed since the forward of this loss, so that"
            " its gradient can't be formed any more: a graph's backward updates them, and neither"
            " its second one (retain_graph=True) nor that of a graph made before is possible. Call"
            " the criterion again; or use torch.optim.SGD"
        )


def alone(has_other: bool) -> None:
    """Check that a backward comes to class weights once only."""
    if has_other:
        raise RuntimeError(
            "this backward comes to the class weights twice, by two losses or a regulariser beside"
            " one, whose gradients SGDInBackward can't add; nothing has been changed. Mixtures of"
            " two labels go in one call, criterion(torch.cat([x, x]), torch.cat([a, b]),"
            " sample_weight=torch.cat([lam, 1 - lam])); for all else use torch.optim.SGD"
        )


def no_other_scaler(count: int) -> None:
    """Check that losses are not scaled by what the optimiser doesn't know of."""
    if count:
        raise RuntimeError(
            "there is a GradScaler in use that SGDInBackward wasn't given: class weights would be"
            " updated with gradients as scaled as the loss. Give it,"
            " SGDInBackward(..., grad_scaler=scaler); or, if that scaler scales other losses only,"
            " grad_scaler=torch.amp.GradScaler(enabled=False)"
        )


def not_replaced(is_replaced: bool) -> None:
    """Check that nobody else updates what a step ends."""
    if is_replaced:
        raise RuntimeError(
            "this SGDInBackward updates nothing any more: another one was made of the same class"
            " weights. Step that one, and keep one only"
        )


def nothing_left(grad: torch.Tensor | None) -> None:
    """Check, at a step, that no gradient was made that no update has seen."""
    if grad is not None and grad.numel():
        _other_gradient()


def _other_gradient() -> None:
    raise RuntimeError(
        "class weights of SGDInBackward have a gradient as a whole, which it can't apply. It comes"
        ' from a regulariser of the weights, from backend="reference", from a criterion in eval'
        " mode, from torch.compile, a torch.func transform or another mode, from a forward before"
        " SGDInBackward was made, or was there before it; call criterion.train(), use"
        " torch.optim.SGD, or set criterion.weight.grad = None"
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
