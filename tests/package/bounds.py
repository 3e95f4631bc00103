"""Addresses of kernels: in the interpreter a load beyond a tensor reads whatever lies there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

BUILDER = type(interpreter.interpreter_builder)


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _ranges(arguments: Iterable[Any]) -> np.ndarray:
    """First byte of each argument's storage, and the one after its last; (R, 2)."""
    storages = [tensor.untyped_storage() for tensor in _tensors(arguments)]
    found = {(one.data_ptr(), one.data_ptr() + one.nbytes()) for one in storages if one.nbytes()}
    return np.array(sorted(found), dtype=np.uint64)


@contextlib.contextmanager
def checked() -> Iterator[list[str]]:
    """Names of kernels that access what none of their arguments holds."""
    beyond: list[str] = []
    launch, load, store = (
        interpreter.GridExecutor.__call__, BUILDER.create_masked_load, BUILDER.create_masked_store
    )  # fmt: skip
    running: list[tuple[str, np.ndarray]] = []

    def check(pointers: Any, mask: Any) -> None:
        name, ranges = running[-1]
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        active = np.broadcast_to(mask.data, shape).astype(bool)
        first = np.broadcast_to(pointers.data, shape)[active].astype(np.uint64)
        holder = np.maximum(np.searchsorted(ranges[:, 0], first, side="right"), 1) - 1
        inside = (first >= ranges[holder, 0]) & (first + np.uint64(size) <= ranges[holder, 1])
        if not inside.all():
            beyond.append(name)

    def checked_launch(self: Any, *arguments: Any, **keywords: Any) -> Any:
        running.append((self.fn.__name__, _ranges((*arguments, *keywords.values()))))
        try:
            return launch(self, *arguments, **keywords)
        finally:
            running.pop()

    def checked_load(self: Any, pointers: Any, mask: Any, *others: Any, **named: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *others, **named)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *others)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", checked_launch),
        mock.patch.object(BUILDER, "create_masked_load", checked_load),
        mock.patch.object(BUILDER, "create_masked_store", checked_store),
    ):
        yield beyond
