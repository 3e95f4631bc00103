"""Forward-mode derivatives and torch.func: what an operator meets there, and how it refuses them.

An operator with a backward but neither a forward-mode rule nor one for `torch.func` drops tangents,
or fails in words about `autograd.Function`. Which of the two is at work can be seen in its
"Autograd" implementation only, where `torch.compile` and nested transforms arrive as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad


def is_transformed(*arguments: Any) -> bool:
    """Whether `torch.func` is at work or an argument carries a tangent.

    In an operator's "Autograd" implementation `torch.vmap` alone is not seen: it calls an operator
    without a rule of its own once for each sample. Outside of operators it is.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    tensors = (value for value in arguments if isinstance(value, torch.Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_batched(*tensors: torch.Tensor | None) -> bool:
    """Whether one is a batch of `torch.autograd.grad`'s own vmap, ``is_grads_batched``."""
    return any(tensor is not None and is_legacy_batchedtensor(tensor) for tensor in tensors)


def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The "Autograd" implementation of an operator of the fused backends, which refuses both."""

    def checked(*arguments: Any) -> Any:
        if is_transformed(*arguments):
            raise RuntimeError(
                'the "cpu" and "triton" backends have gradients by .backward() and'
                " torch.autograd.grad only, not by torch.func.grad and its kin, nor in forward"
                ' mode; use backend="reference", which is plain PyTorch and has them all'
            )
        return function(*arguments)

    return checked


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether `tensor.item()` gives a number, and without a synchronisation."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False  # a recording by make_fx or torch.func.linearize, or fake tensors
    while is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor):
            return False  # vmap: not one number
        tensor = get_unwrapped(tensor)
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory of its own, with an address."""
    if is_functorch_wrapped_tensor(tensor) or tensor.is_meta:
        return False
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)
