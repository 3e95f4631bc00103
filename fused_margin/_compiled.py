"""What `torch.compile` needs, so that errors of arguments are the same under it.

An exception that leaves a function which Dynamo traces becomes one of Dynamo's own, a RuntimeError,
under ``fullgraph=True``: nothing has run that could raise it. An operator that raises as the graph
runs keeps its type and its text, as it does in eager code.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch

from fused_margin import _names

P = ParamSpec("P")
R = TypeVar("R")

_ERRORS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}

_lib = torch.library.Library("fused_margin", "FRAGMENT")
_lib.define(
    "refuse(Tensor like, str kind, str message) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)


def _refuse(like: torch.Tensor, kind: str, message: str) -> torch.Tensor:
    raise _ERRORS[kind](message)


_lib.impl("refuse", _refuse, "CompositeExplicitAutograd")


@torch.library.register_fake("fused_margin::refuse", lib=_lib)
def _(like: torch.Tensor, kind: str, message: str) -> torch.Tensor:
    return like.new_empty(())


def _is_exporting() -> bool:
    # in torch 2.11 Dynamo takes the public function for True, whatever it traces for
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a DTensor, without importing torch.distributed.tensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def _waits_for_ranks(values: Iterable[Any]) -> bool:
    """Whether class weights that are split over ranks, a DTensor, are among them, or a module's."""
    for value in values:
        weight = getattr(value, "weight", None) if isinstance(value, torch.nn.Module) else value
        # of a symbolic number Dynamo knows no attributes
        if isinstance(weight, torch.Tensor) and is_dtensor(weight):
            return True
    return False


def between_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that waits for other ranks if its class weights are split over them.

    It then runs as it is, outside of graphs. Dynamo would break them within, where rows are
    gathered: not for batches that vary, and in torch 2.11 with gradients of 0.
    """

    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling() and _waits_for_ranks((*args, *kwargs.values())):
            from fused_margin import _uncompiled

            return _uncompiled.call(function, *args, **kwargs)
        return function(*args, **kwargs)

    # Dynamo counts recompilations of code: each function gets some of its own
    code = wrapped.__code__.replace(co_name=function.__name__)
    own = types.FunctionType(code, wrapped.__globals__, closure=wrapped.__closure__)
    return functools.update_wrapper(own, function)


def raising(
    num_outputs: int = 1, returned: Callable[..., Any] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function that returns so many tensors, and checks what it is given.

    It runs `between_graphs`, too. ``returned``: what makes of them what the function returns.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> Any:
            try:
                return function(*args, **kwargs)
            except (TypeError, ValueError) as error:
                if not torch.compiler.is_dynamo_compiling() or _is_exporting():
                    if isinstance(error, TypeError):
                        _names.explain(error, function, args, kwargs)
                    raise
                kind = "TypeError" if isinstance(error, TypeError) else "ValueError"
                like = torch.empty((), device="cpu")
                output = torch.ops.fused_margin.refuse.default(like, kind, str(error))
                outputs = (output,) * num_outputs
                if returned is not None:
                    return returned(*outputs)
                return output if num_outputs == 1 else outputs

        return between_graphs(checked)

    return decorate


def known(value: Any) -> Any:
    """A number, or a shape as a tuple, that a message can show: in a graph it may be symbolic."""
    is_shape = isinstance(value, tuple)
    if not torch.compiler.is_dynamo_compiling():
        return tuple(value) if is_shape else value
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # which imports SymPy

    return tuple([guard_scalar(size) for size in value]) if is_shape else guard_scalar(value)
