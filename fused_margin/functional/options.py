"""The keywords that all losses share as functions: defaults, types, signatures."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, get_type_hints

import torch
from typing_extensions import TypedDict

from fused_margin import _compiled, _validate
from fused_margin.functional.sweeps import Asked
from fused_margin.negatives import Negatives

P = ParamSpec("P")


class CallOptions(TypedDict, total=False):
    """What ``**options`` of a function may be; `margin_softmax` describes each."""

    reduction: str
    ignore_index: int
    backend: str
    memory_budget: int | None
    class_weight: torch.Tensor | None
    sample_weight: torch.Tensor | None
    focal_gamma: float | None
    focal_alpha: float | None
    label_smoothing: float
    negatives: Negatives | None
    sub_centers: int
    return_stats: bool


class Options(NamedTuple):
    """All of `CallOptions`, with their defaults."""

    reduction: str = "mean"
    ignore_index: int = -100
    backend: str = "auto"
    memory_budget: int | None = None
    class_weight: torch.Tensor | None = None
    sample_weight: torch.Tensor | None = None
    focal_gamma: float | None = None
    focal_alpha: float | None = None
    label_smoothing: float = 0.0
    negatives: Negatives | None = None
    sub_centers: int = 1
    return_stats: bool = False

    @property
    def asked(self) -> Asked:
        """What the sweep is asked for."""
        has_total = False
        if self.label_smoothing != 0.0:  # a branch: Dynamo would keep a comparison symbolic
            has_total = True
        return Asked(self.negatives, self.sub_centers, has_total, self.return_stats)

    @property
    def is_weighed(self) -> bool:
        """Whether more is done to the losses of rows than a reduction."""
        return (
            self.class_weight is not None
            or self.sample_weight is not None
            or self.focal_gamma is not None
            or self.focal_alpha is not None
        )


# What is checked wherever it is given; the rest depends on tensors.
CHECKS: dict[str, Callable[[Any], Any]] = {
    "reduction": functools.partial(_validate.choice, "reduction", allowed=_validate.REDUCTIONS),
    "ignore_index": _validate.ignore_index,
    "memory_budget": _validate.memory_budget,
    "focal_gamma": functools.partial(_validate.optional, "focal_gamma"),
    "focal_alpha": functools.partial(_validate.optional, "focal_alpha"),
    "label_smoothing": _validate.smoothing,
    "negatives": _validate.negatives,
    "sub_centers": functools.partial(_validate.size, "sub_centers", minimum=1),
    "return_stats": functools.partial(_validate.flag, "return_stats"),
}


def choose(options: CallOptions, call: Callable[..., Any]) -> Options:
    """Options as they were given to ``call``, checked but for what depends on tensors."""
    _validate.keywords(options, Options._fields, call)
    chosen: dict[str, Any] = {}
    for name, value in options.items():
        check = CHECKS.get(name)
        chosen[name] = value if check is None else check(value)
    return Options(**chosen)


def expanded(function: Callable[..., Any], defaults: Mapping[str, Any], types: type) -> Any:
    """The signature of a function, with ``defaults`` by name in the place of its ``**options``."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(parameters) == len(signature.parameters):
        return signature
    hints = get_type_hints(types)
    keywords = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=hints[name],
        )
        for name, default in defaults.items()
        if name not in signature.parameters
    ]
    return signature.replace(parameters=[*parameters, *keywords])


def loss(function: Callable[P, torch.Tensor]) -> Callable[P, torch.Tensor]:
    """Decorate a loss: as `_compiled.raising`, with its ``**options`` shown in the signature."""
    decorated: Any = _compiled.raising()(function)
    decorated.__signature__ = expanded(function, Options._field_defaults, CallOptions)
    return decorated
