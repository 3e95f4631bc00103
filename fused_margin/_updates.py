"""Class weights that are updated while their gradient is made, so that it never exists as a whole.

An optimiser that does so is found by the memory of the weights (`of`), in the forward; in the
backward the rows of the gradient go to its `Update`, one block after the other, when nothing has
yet to read those rows of W. What has taken the gradient's place meanwhile, as ``weight.grad``, is
`Spent`: whoever wants to clip, scale or accumulate it is told why that can't be. Nodes of the graph
that have a gradient for such weights are `noted`, so that a backward that will come to two of them
is refused before the first changes anything.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch

from fused_margin import _transforms, _validate, _validate_updates
from fused_margin._arguments import Slopes, Update

Tensor = torch.Tensor

ZEROS = 1 << 22  # numbers of a part


class Updating(Protocol):
    """An optimiser that updates parameters in the backward."""

    def updated(self) -> Iterator[Tensor]:
        """The parameters that are."""
        ...

    def begin(self, parameter: Tensor, slopes: Slopes) -> Update:
        """What takes the gradient of this one, which ``slopes`` give, in a backward that is at it.

        Raises:
            RuntimeError: it may not be updated.
        """
        ...

    def replace(self) -> None:
        """Update nothing any more, since another one does."""
        ...


class Updated(NamedTuple):
    """A parameter, who updates it, and which version of it was found."""

    optimizer: Updating
    parameter: Tensor
    version: int

    def is_due(self, node: Any) -> bool:
        """Whether the backward that is at ``node`` updates; not one that is for another end.

        As `torch.autograd.grad` is, whether it asks for this gradient or only for others.

        Raises:
            RuntimeError: the weights have been updated by a backward already, or have a gradient
                or hooks, or this backward has another one for them.
        """
        if not _accumulates(self.parameter):
            return False
        _validate_updates.no_hooks(self.parameter)
        grad = self.parameter.grad
        is_spent = isinstance(grad, Spent)
        if not (is_spent and grad.is_over):
            _validate_updates.no_gradient(grad, is_spent=is_spent)
        _validate_updates.unchanged(_version(self.parameter) == self.version)
        others = [one for one in _nodes if one is not node and one.updating is not None]
        same = [one for one in others if one.updating.parameter is self.parameter]
        _validate_updates.alone(any(_will_run(one) for one in same))
        return True

    def begin(self, slopes: Slopes) -> Update:
        """What takes rows of the gradient, which ``slopes`` give, in a backward that is due."""
        update = self.optimizer.begin(self.parameter, slopes)
        self.parameter.grad = Spent(self.parameter)
        return update


@torch.no_grad()
def _version(parameter: Tensor) -> int:
    return _validate.local(parameter)._version


def _will_run(node: Any) -> bool:
    """Whether a node is of the graph that the running backward goes through."""
    executes = getattr(torch._C, "_will_engine_execute_node", None)
    return executes is None or executes(node)


def _accumulates(parameter: Tensor) -> bool:
    """Whether the backward that is running would add to this parameter's gradient."""
    try:
        return _will_run(torch.autograd.graph.get_gradient_edge(parameter).node)
    except RuntimeError:  # it hands the gradient to `torch.autograd.grad`
        return False


_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
_nodes: weakref.WeakSet[Any] = weakref.WeakSet()
_paused = threading.local()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Forwards whose backward makes a gradient and updates nothing: those of evaluation."""
    before = getattr(_paused, "is_on", False)
    _paused.is_on = True
    try:
        yield
    finally:
        _paused.is_on = before


def add(optimizer: Updating) -> None:
    """Let an optimiser be found, instead of any other that updates one of its parameters."""
    mine = {id(parameter) for parameter in optimizer.updated()}
    for other in tuple(_optimizers):
        if other is not optimizer and any(id(one) in mine for one in other.updated()):
            other.replace()
    _optimizers.add(optimizer)


def remove(optimizer: Updating) -> None:
    """Let it be found no more."""
    _optimizers.discard(optimizer)


def of(w: Tensor) -> Updated | None:
    """Who updates class weights ``w``, a parameter or the local part of one."""
    if not _optimizers or not w.requires_grad or not w.numel():
        return None
    if getattr(_paused, "is_on", False):
        return None
    for optimizer in tuple(_optimizers):
        for parameter in optimizer.updated():
            with torch.no_grad():
                mine = _validate.local(parameter)
            is_same = mine.data_ptr() == w.data_ptr() and mine.shape == w.shape
            if is_same and mine.stride() == w.stride():
                return Updated(optimizer, parameter, mine._version)
    return None


def noted(node: Any, w: Tensor) -> Updated | None:
    """Who updates W; the node of the graph, which has a gradient for W, is remembered for it."""
    found = of(w)
    if found is not None:
        _nodes.add(node)
    return found


def noted_whole(node: Any, w: Tensor) -> None:
    """Remember, in its attribute ``updating``, a node whose gradient for W is made as a whole."""
    is_plain = _transforms.is_plain(w) and torch._C._len_torch_dispatch_stack() == 0
    node.updating = noted(node, w) if is_plain and not torch.compiler.is_compiling() else None


def nothing(start: int, grad: Tensor) -> None:
    """An update that isn't made."""


def by_zeros(update: Update, w: Tensor, dtype: torch.dtype) -> None:
    """Hand over a gradient of zeros, a part at a time: that of a batch without rows."""
    size = max(1, ZEROS // w.shape[1])
    for start in range(0, w.shape[0], size):
        update(start, torch.zeros_like(w[start : start + size], dtype=dtype))


class Spent(torch.Tensor):
    """In place of a gradient that has been used up: its shape, and an error for each use.

    Attributes:
        is_over: whether it has been set to zero, as ``zero_grad(set_to_none=False)`` does, which
            ends a step.
    """

    is_over: bool

    @staticmethod
    def __new__(cls, parameter: Any) -> Spent:
        made = torch.Tensor._make_wrapper_subclass(
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
        made.is_over = False
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.zero_.default, aten._foreach_zero_.default):
            grads = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            for grad in grads:
                if isinstance(grad, Spent):
                    grad.is_over = True
                else:
                    grad.zero_()
            return args[0]
        if torch._C._current_graph_task_id() >= 0:  # in a backward, which has another gradient
            raise RuntimeError(_validate_updates.ADDED)
        raise RuntimeError(_validate_updates.SPENT)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """What it is; there are no contents."""
        return f"Spent(shape={tuple(self.shape)})"
