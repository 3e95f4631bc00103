"""Whether a forward may use the memory of the gradient of W that its backward will write.

The gradient, (C, D), is going to be allocated anyway: earlier than without a loan, but at a time
when nothing else needs its place. There are two cases in which something does: a gradient of the
step before that is still there (it may be accumulated to, but it may be one that is about to be
dropped), and another forward with the same weights whose backward hasn't come yet. And where hooks
take what is saved, as activation checkpointing's do, a loan would pass them by.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from fused_margin._arguments import TAKEN, Loan

# by the address of W: the memory of loans that no backward has taken
_outstanding: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
_is_refused = contextvars.ContextVar("_is_refused", default=False)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Lend nothing: W is a part of a tensor that has a gradient, which can't be seen from W."""
    token = _is_refused.set(True)
    try:
        yield
    finally:
        _is_refused.reset(token)


def may_lend(w: torch.Tensor) -> bool:
    """Whether a gradient of W that is allocated now takes no memory on top."""
    has_gradient = (w.is_leaf and w.grad is not None) or _is_refused.get()
    autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    hooks = autograd._top_saved_tensors_default_hooks(True)
    return not has_gradient and hooks is None and w.data_ptr() not in _outstanding


def lend(ctx: Any, w: torch.Tensor, loan: Loan | None) -> None:
    """Note a loan of the gradient of W, for a backward to take."""
    ctx.loan = None if loan is None else [loan]
    if loan is not None:
        _outstanding[w.data_ptr()] = loan.d_w


def take(ctx: Any, w: torch.Tensor) -> Loan | None:
    """The loan, if there was one; `TAKEN` for all but the first, of several threads too."""
    if ctx.loan is None:
        return None
    try:
        loan = ctx.loan.pop()
    except IndexError:
        return TAKEN
    _outstanding.pop(w.data_ptr(), None)
    return loan
