"""Class weights that are updated while their gradient is made, so that it never exists as a whole.

An optimiser that does so is found by the memory of the weights (`of`), in the forward; in the
backward the rows of the gradient go to its `Update`, one block after the other, when nothing has
yet to read those rows of W. What has taken the gradient's place meanwhile, as ``weight.grad``, is
`Spent`: whoever wants to clip, scale or accumulate it is told why that can't be.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch

from fused_margin import _validate, _validate_updates
from fused_margin._arguments import Update

Tensor = torch.Tensor

ZEROS = 1 << 22  # numbers of a part


class Updating(Protocol):
    """An optimiser that updates parameters in the backward."""

    def updated(self) -> Iterator[Tensor]:
        """The parameters that are."""
        ...

    def begin(self, parameter: Tensor) -> Update:
        """What takes the gradient of this one, in the backward that has come to it."""
        ...


class Updated(NamedTuple):
    """A parameter, and who updates it."""

    optimizer: Updating
    parameter: Tensor

    def begin(self) -> Update | None:
        """What takes rows of the gradient; None where the backward that runs is for another end.

        As `torch.autograd.grad` is, whether it asks for this gradient or only for others.

        Raises:
            RuntimeError: the weights have been updated by a backward already, or have a gradient.
        """
        if not _accumulates(self.parameter):
            return None
        grad = self.parameter.grad
        _validate_updates.no_gradient(grad, is_spent=isinstance(grad, Spent))
        update = self.optimizer.begin(self.parameter)
        self.parameter.grad = Spent(self.parameter)
        return update


def _accumulates(parameter: Tensor) -> bool:
    """Whether the backward that is running would add to this parameter's gradient."""
    executes = getattr(torch._C, "_will_engine_execute_node", None)
    if executes is None:
        return True
    try:
        return executes(torch.autograd.graph.get_gradient_edge(parameter).node)
    except RuntimeError:  # it hands the gradient to `torch.autograd.grad`
        return False


_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()


def add(optimizer: Updating) -> None:
    """Let an optimiser be found."""
    _optimizers.add(optimizer)


def remove(optimizer: Updating) -> None:
    """Let it be found no more."""
    _optimizers.discard(optimizer)


def of(w: Tensor) -> Updated | None:
    """Who updates class weights ``w``, a parameter or the local part of one."""
    if not _optimizers or not w.requires_grad or not w.numel():
        return None
    for optimizer in tuple(_optimizers):
        for parameter in optimizer.updated():
            with torch.no_grad():
                mine = _validate.local(parameter)
            is_same = mine.data_ptr() == w.data_ptr() and mine.shape == w.shape
            if is_same and mine.stride() == w.stride():
                return Updated(optimizer, parameter)
    return None


def by_zeros(update: Update, w: Tensor, dtype: torch.dtype) -> None:
    """Hand over a gradient of zeros, a part at a time: that of a batch without rows."""
    size = max(1, ZEROS // w.shape[1])
    for start in range(0, w.shape[0], size):
        update(start, torch.zeros_like(w[start : start + size], dtype=dtype))


class Spent(torch.Tensor):
    """In place of a gradient that has been used up: its shape, and an error for each use."""

    @staticmethod
    def __new__(cls, parameter: Any) -> Spent:
        return torch.Tensor._make_wrapper_subclass(
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(_validate_updates.SPENT)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """What it is; there are no contents."""
        return f"Spent(shape={tuple(self.shape)})"
