"""How many flops the operators do, for `torch.utils.flop_counter.FlopCounterMode`.

Products only, as for torch's own operators: an N x C x D product is 2 N C D.

`torch.utils.flop_counter` imports Triton where there is one, and a mode copies the registry of
formulas when it is made. So the formulas are registered as soon as that module is imported, by
whomever: at once if it is, else by a finder of modules that steps aside after it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from fused_margin import _cpu, _schemas

Tensor = torch.Tensor

COUNTER = "torch.utils.flop_counter"


def _product(x: Tensor, w: Tensor) -> int:
    return 2 * x.shape[0] * w.shape[0] * w.shape[1]


def _forward(*args: Any, **kwargs: Any) -> int:
    call = _schemas.named(torch.ops.fused_margin.cosine_lse, args, kwargs)
    return _product(call["x"], call["w"])


def _forward_of_all(x: Tensor, w: Tensor, *args: Any, **kwargs: Any) -> int:
    return _product(x, w)


def _backward(*args: Any, **kwargs: Any) -> int:
    """A product for each gradient, and the cosines as often as they are formed again."""
    call = _schemas.named(torch.ops.fused_margin.cosine_lse_backward, args, kwargs)
    x, w, kept, compute_dtype = (call[name] for name in ("x", "w", "kept", "compute_dtype"))
    gradients = (call["need_x"] or call["need_scale"]) + call["need_w"]
    product = _product(x, w)
    if call["backend"] == "cpu":
        kept_classes = _cpu.kept_classes(x, w, compute_dtype, kept.shape[0])
        return gradients * product + product * (w.shape[0] - kept_classes) // w.shape[0]
    from fused_margin._triton import planning

    strategy = planning.backward_strategy(x, w, planning.plan(x, w, compute_dtype), kept)
    products = {"kept": gradients, "chunked": gradients + 1, "fused": 2 * gradients}
    return products[strategy] * product


def _nearest_classes(w_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Each pair of classes once."""
    return w_shape[0] * w_shape[0] * w_shape[1]


def _register(counter: ModuleType) -> None:
    ops = torch.ops.fused_margin
    register = counter.register_flop_formula
    register(ops.cosine_lse, get_raw=True)(_forward)
    register(ops.margin_ce, get_raw=True)(_forward_of_all)
    register(ops.cosine_lse_backward, get_raw=True)(_backward)
    register(ops.nearest_classes)(_nearest_classes)


class _Loader(importlib.abc.Loader):
    """Loads the counter as its own loader does, and registers the formulas."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_when_imported() -> None:
    """Register the formulas of operators that are defined, now or once the counter is imported."""
    counter = sys.modules.get(COUNTER)
    if counter is not None:
        _register(counter)
    else:
        sys.meta_path.insert(0, _Finder())
