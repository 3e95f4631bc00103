"""What the settings of a loss module may be: of one argument each, returning what is kept."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Mapping, Set
from typing import Any, NoReturn

import torch

from fused_margin import _transforms, _validate


def number_scale(value: Any, remedy: str = "") -> float:
    """Check a scale that is a number: > 0."""
    _validate._no_tensor("scale", value, remedy)
    return _validate._scale_number(value, "a number")


def sizes_first(
    kind: type, num_classes: Any, embedding_size: Any, *, is_other: bool = False
) -> None:
    """Refuse margins and scales in the place of sizes, as layers without class weights have them.

    ``is_other``: whether another argument tells.
    """
    for value in (num_classes, embedding_size):
        is_fraction = _validate._is_real(value) and not isinstance(value, numbers.Integral)
        if is_other or (is_fraction and value < 2):  # 2.0 is told to become an int
            taken = [p for p in inspect.signature(kind).parameters.values() if p.kind != KEYWORD]
            raise TypeError(
                f"{kind.__name__} takes {', '.join(p.name for p in taken)} in this order, got"
                f" {num_classes} and {embedding_size} for its numbers of classes and of columns"
                + INSIGHTFACE.get(kind.__name__, "")
            )


KEYWORD = inspect.Parameter.KEYWORD_ONLY
INSIGHTFACE = {
    kind: f"; insightface's {call}, which has no class weights, is"
    f" fused_margin.compat.insightface.{call.partition('(')[0]}, for its PartialFC_V2"
    for kind, call in {
        "ArcFaceLoss": "ArcFace(s, margin)",
        "CosFaceLoss": "CosFace(s, m)",
        "CombinedMarginLoss": "CombinedMarginLoss(s, m1, m2, m3)",
    }.items()
}


def no_scale(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a scale for a loss that derives it."""
    if "scale" in options:
        given = options["scale"]
        shown = _validate._shown(given) if isinstance(given, torch.Tensor) else repr(given)
        raise TypeError(
            f"{name} derives its scale and takes none, got scale={shown};"
            " NormalizedSoftmaxLoss(num_classes, embedding_size, scale) takes one"
        )


def module_scale(value: Any) -> float | torch.nn.Parameter:
    """Check the scale of a module: a number > 0, or a Parameter of one element."""
    if not isinstance(value, torch.nn.Parameter):
        return number_scale(value, "; a Parameter, nn.Parameter(torch.tensor(64.0)), is learnt")
    _validate.floating_numbers("scale", value)
    if value.numel() != 1 or value.ndim > 1:
        raise ValueError(
            f"a scale that is learnt must have one element, of shape () or (1,), got"
            f" {tuple(value.shape)}; all rows share one scale"
        )
    if _transforms.is_readable(value):
        _validate.positive_scale(value.detach().item())
    return value


def filled(criterion: Any, emptied: Set[str]) -> None:
    """Refuse what ``to_empty()`` has left without values, which is NaN since."""
    tensors = {name: getattr(criterion, name) for name in emptied}
    left = [
        name
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and bool(tensor.isnan().any())
    ]
    if not left:
        return
    unknown = sorted(set(left) - set(criterion.initial_statistics()))
    if unknown:
        remedy = (
            f", and reset_parameters() can't know {', '.join(unknown)}: after it, assign"
            f" criterion.{unknown[0]} = ..."
        )
    else:
        remedy = ": call criterion.reset_parameters(), before class weights are loaded"
    raise ValueError(
        f"to_empty() has left {', '.join(sorted(left))} of this {type(criterion).__name__} without"
        f" values{remedy}"
    )


def per_class(name: str, value: torch.Tensor, num_classes: int) -> None:
    """Check that a module's tensor has one number for each class."""
    if value.shape != (num_classes,):
        raise ValueError(
            f"{name} must have shape ({num_classes},), one number per class, got"
            f" {tuple(value.shape)}"
        )


def module_class_weight(value: Any) -> torch.Tensor | None:
    """Check the class weights of a module's mean: None, or numbers >= 0, (C,)."""
    if value is None:
        return None
    _validate._tensor("class_weight", value)
    if isinstance(value, torch.nn.Parameter) or value.requires_grad:
        raise TypeError(
            "class_weight is not learnt, pass class_weight.detach(); the functional form takes one"
            " that requires a gradient"
        )
    _validate.floating_numbers("class_weight", value)
    if _transforms.is_readable(value) and not bool((value >= 0).all() & value.isfinite().all()):
        raise ValueError(
            f"class_weight must be finite and >= 0, got {value.min().item():g} to"
            f" {value.max().item():g}"
        )
    return value


focal_gamma = functools.partial(_validate.optional, "focal_gamma")
focal_alpha = functools.partial(_validate.optional, "focal_alpha")


def generator(value: Any) -> torch.Generator | None:
    """Check a source of random numbers; None is torch's own."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {_validate._shown(value)};"
            " a seed makes one with torch.Generator().manual_seed(seed)"
        )
    return value


def adaptive_scale(value: Any) -> torch.Tensor:
    """Check what takes the place of the scale that AdaCos adapts: a 0-d tensor, as it is loaded."""
    if not isinstance(value, torch.Tensor):
        raise AttributeError(
            "the scale of AdaCos follows from the batches and can't be set; to start from another,"
            " criterion.scale.fill_(scale), and for one of your choice use NormalizedSoftmaxLoss"
        )
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"the scale of AdaCos is one floating number, got {_validate._shown(value)}; all rows"
            " share it"
        )
    return value


def learnt(name: str, value: Any) -> NoReturn:
    """Refuse a number where a Parameter is trained, which an optimiser holds."""
    raise TypeError(
        f"{name} is learnt, and {_validate._shown(value)} would leave the Parameter in the"
        f" optimiser without effect; set its value with criterion.{name}.data.fill_({name}), or del"
        f" criterion.{name} first"
    )


def derived_scale(value: Any) -> NoReturn:
    """Refuse to set the scale of Fixed AdaCos, be it a number or a tensor."""
    raise AttributeError(
        "the scale of Fixed AdaCos follows from the number of classes and can't be set; for a scale"
        " of your choice use NormalizedSoftmaxLoss"
    )


def fixed(name: str, present: int, value: Any) -> None:
    """Refuse to change what the rows of the weight were made for."""
    if type(value) is int and value == present:
        return
    raise AttributeError(
        f"{name} is {present} and can't be set to {value!r}: the weight has that many rows for each"
        " class; make a loss with the other number"
    )


def assignable(module: torch.nn.Module) -> list[str]:
    """The names of what may be set of a loss, with the sub-centres, which its error explains."""
    settings: Mapping[str, Any] = module.settings  # pyright: ignore[reportAssignmentType]
    derived = (derived_scale, adaptive_scale)
    names = [name for name, check in settings.items() if check not in derived]
    scale = getattr(type(module), "scale", None)
    if "scale" not in settings and isinstance(scale, property) and scale.fset is not None:
        names.append("scale")
    return [*names, "sub_centers"]


def constructed(module: torch.nn.Module, name: str) -> None:
    """Refuse to set what has to be checked before there is a module."""
    if "_parameters" not in module.__dict__:
        raise AttributeError(
            f"{name} of {type(module).__name__} is set before super().__init__(), which has to come"
            " first"
        )


def is_method(name: str) -> NoReturn:
    """Refuse to assign what a subclass implements."""
    raise AttributeError(
        f"{name} of a loss is a method: implement {name}(self, embeddings, labels) in a subclass"
        + METHODS[name]
    )


# What a loss may implement, and what else can be done with such a thing.
METHODS = {
    "psi": ", or pass a function of the target cosines to functional.margin_softmax",
    "negatives": ", or pass negatives= to the function of the loss",
    "penalty": ", which returns what is added to each row's loss, (N,)",
    "update_statistics": ", which training mode calls before psi",
}


def methods(kind: type) -> None:
    """Check that what a subclass implements can be called with embeddings and labels."""
    for name in METHODS:
        if name not in vars(kind):
            continue
        found = vars(kind)[name]
        given = getattr(kind, name)
        arguments = 2 if isinstance(found, (staticmethod, classmethod)) else 3
        if callable(given) and _takes(given, arguments):
            continue
        what = f"{name}{inspect.signature(given)}" if inspect.isroutine(given) else repr(found)
        raise TypeError(
            f"{name} of {kind.__name__} must be a method that takes embeddings and labels,"
            f" {name}(self, embeddings, labels), got {what}"
            + (
                "; it returns the function of the target cosines: return lambda u: ..."
                if name == "psi"
                else ""
            )
        )


def _takes(call: Callable[..., Any], count: int) -> bool:
    """Whether so many positional arguments can be given."""
    try:
        inspect.signature(call).bind(*range(count))
    except TypeError:
        return False
    return True
