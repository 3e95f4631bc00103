"""Every ValueError and TypeError about a margin, with the remedy in the message."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from fused_margin import _remedies, _transforms, _validate
from fused_margin._arguments import Margin
from fused_margin._compiled import known

LARGEST_ANGLE = 3.1415928  # pi in fp32 lies 9e-8 above pi
LARGEST_OFFSET = 2.0
LARGEST_MULTIPLIER = 16.0

MARGIN_OF_KIND = {"arc": 0.5, "cos": 0.35}
KINDS = tuple(MARGIN_OF_KIND)
CONTINUATIONS = ("none", "continuous")


def _margin(
    value: Any, labels: torch.Tensor | None, ignore_index: int, unit: str
) -> float | torch.Tensor:
    """A finite number, or an (N,) tensor that is 0 where a row is ignored."""
    if isinstance(value, torch.Tensor) and labels is not None:
        _validate.plain("margin", value)
        _validate.floating_numbers("margin", value)
        if value.shape != labels.shape:
            num_rows = known(labels.shape[0])
            raise ValueError(
                f"a tensor margin must have shape ({num_rows},), one {unit} per row, got"
                f" {known(value.shape)}{_remedies.of_margin_shape(value, num_rows)}"
            )
        if value.device != labels.device:
            raise ValueError(
                f"margin is on {value.device}, embeddings on {labels.device}; move the margin"
            )
        return value.masked_fill(labels.long() == ignore_index, 0.0)
    _validate._no_tensor("margin", value)
    if value is None:
        remedy = "; 0.0 is no margin"
    elif labels is not None and _remedies.holds_several(value):
        remedy = _remedies.of_margins(value, known(labels.shape[0]))
    else:
        remedy = ""
    kinds = "a number" if labels is None else "a number or an (N,) tensor"
    return _validate._real("margin", value, kinds, remedy)


def _beyond(margin: float | torch.Tensor, limit: float, place: str) -> tuple[float, str] | None:
    """A margin above ``limit`` or NaN, and its place; None too where it can't be read."""
    if not isinstance(margin, torch.Tensor):
        return None if abs(margin) <= limit else (known(margin), "")
    if not _transforms.is_readable(margin):
        return None
    beyond = ~(margin.detach().abs() <= limit)
    if not bool(beyond.any()):
        return None
    row = int(beyond.nonzero()[0])
    return round(margin[row].item(), 6), f" {place} {row}"


def angular_margin(
    value: float | torch.Tensor, labels: torch.Tensor | None = None, ignore_index: int = -100
) -> float | torch.Tensor:
    """Check ArcFace's margin, in radians, and return what to use.

    Only a functional call, which has ``labels``, may pass an (N,) tensor. Rows that are ignored may
    hold anything there; their margin is returned as 0.
    """
    return _angle(_margin(value, labels, ignore_index, "angle in radians"), "in row")


def cosine_margin(
    value: float | torch.Tensor, labels: torch.Tensor | None = None, ignore_index: int = -100
) -> float | torch.Tensor:
    """Check CosFace's margin, a cosine offset, as `angular_margin` does."""
    return _offset(_margin(value, labels, ignore_index, "cosine offset"), "in row")


def module_angular_margin(value: Any) -> float | torch.Tensor:
    """Check the margin of a module: a number, or one for each class, (C,)."""
    return _angle(_class_margin(value), "of class")


def module_cosine_margin(value: Any) -> float | torch.Tensor:
    """Check the margin of a module, a cosine offset, as `module_angular_margin` does."""
    return _offset(_class_margin(value), "of class")


kind = functools.partial(_validate.choice, "kind", allowed=KINDS)


def default_of_kind(value: Any, kind: str) -> Any:
    """A margin as it was given, or that of the kind for None."""
    return MARGIN_OF_KIND[kind] if value is None else value


def of_kind(
    value: Any, kind_name: str, labels: torch.Tensor | None = None, ignore_index: int = -100
) -> float | torch.Tensor:
    """Check the margin of a loss that has it as an angle or as an offset; None is the default."""
    value = default_of_kind(value, kind(kind_name))
    check = angular_margin if kind_name == "arc" else cosine_margin
    return check(value, labels, ignore_index)


def within_kind(value: float | torch.Tensor, kind_name: str) -> float | torch.Tensor:
    """Check a module's margin, whose kind may have been assigned after it."""
    if not isinstance(value, torch.Tensor):
        return of_kind(value, kind_name)
    check = _angle if kind(kind_name) == "arc" else _offset
    return check(value, "of row")


def angle(name: str, value: Any) -> float:
    """Check an angle in radians that isn't called margin."""
    hint = "it is an angle in radians, math.radians(degrees), and the scale comes after all margins"
    return _validate.between(name, value, -LARGEST_ANGLE, LARGEST_ANGLE, hint)


def offset(name: str, value: Any) -> float:
    """Check an offset of the cosine that isn't called margin."""
    hint = "it is a cosine offset, and the scale comes after all margins"
    return _validate.between(name, value, -LARGEST_OFFSET, LARGEST_OFFSET, hint)


def multiplier(name: str, value: Any, lowest: float = 1.0) -> float:
    """Check what multiplies an angle."""
    hint = "it multiplies the angle, and the scale comes after all margins"
    return _validate.between(name, value, lowest, LARGEST_MULTIPLIER, hint)


def class_counts(value: Any) -> torch.Tensor:
    """Check how many samples each class has, (C,), finite and >= 0."""
    if not isinstance(value, torch.Tensor):
        value = torch.as_tensor(value)
    if value.ndim != 1 or value.shape[0] < 1 or value.dtype is torch.bool or value.is_complex():
        raise ValueError(
            f"counts must have shape (C,), the samples of each class, as torch.bincount(labels,"
            f" minlength=C) makes them; got {tuple(value.shape)} and {value.dtype}"
        )
    wrong = ~((value >= 0) & value.isfinite())
    if _transforms.is_readable(value) and bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"counts must be finite and >= 0, the samples of each class; got"
            f" {value[first].item():g} of class {first}"
        )
    return value


def mean_margin(value: Any) -> None:
    """Refuse several as the mean of margins that are drawn."""
    if isinstance(value, torch.Tensor) or _remedies.holds_several(value):
        raise TypeError(
            "ElasticFace draws a margin for each row, and takes their mean as a number, got"
            f" {_validate._shown(value)}; for margins of your own use arcface or cosface"
        )


def module_number(value: Any) -> float:
    """Check the margin of a module that is an angle or an offset, as another setting says."""
    mean_margin(value)
    return _angle(_margin(value, None, 0, ""), "")  # pyright: ignore[reportReturnType]


def _class_margin(value: Any) -> float | torch.Tensor:
    if not isinstance(value, torch.Tensor) and _remedies.holds_several(value):
        raise TypeError(
            f"margin must be a number, or a tensor of one for each class, (C,), got"
            f" {_validate._shown(value)}; torch.as_tensor(margin, dtype=torch.float32) makes it,"
            " and margins per row go to the functional form"
        )
    if not isinstance(value, torch.Tensor):
        return _margin(value, None, 0, "")
    if isinstance(value, torch.nn.Parameter) or value.ndim != 1:
        if value.numel() == 1:
            remedy = "float(margin); a learnt one goes to the functional form"
        elif isinstance(value, torch.nn.Parameter):
            remedy = "margin.detach(); learnt margins go to the functional form, as margin[labels]"
        else:
            remedy = "margin.flatten()"
        raise TypeError(
            "margin must be a number, or a tensor of one for each class, (C,), that is not learnt;"
            f" got {_validate._shown(value)}; pass {remedy}"
        )
    return _validate.floating_numbers("margin", value).detach()


def _angle(value: float | torch.Tensor, place: str) -> float | torch.Tensor:
    beyond = _beyond(value, LARGEST_ANGLE, place)
    if beyond is not None:
        given, where = beyond
        _finite(given, where)
        if isinstance(value, torch.Tensor):
            remedy = "torch.deg2rad(margin)"
        else:
            remedy = f"math.radians({given:g}) = {math.radians(given):.4g}"
        raise ValueError(
            f"margin is an angle in radians, at most pi; got {given}{where}. If that is in degrees,"
            f" pass {remedy}; the scale comes after the margin"
        )
    return value


def _offset(value: float | torch.Tensor, place: str) -> float | torch.Tensor:
    beyond = _beyond(value, LARGEST_OFFSET, place)
    if beyond is not None:
        given, where = beyond
        _finite(given, where)
        raise ValueError(
            f"CosFace's margin is an offset of the cosine, at most 2; got {given}{where} (0.35 is"
            " usual; the scale comes after the margin)"
        )
    return value


def _finite(margin: float, where: str) -> None:
    if not -math.inf < margin < math.inf:
        raise ValueError(f"margin must be finite, got {margin}{where}")


def psi(value: Any) -> None:
    """Check that a margin is a function, or coefficients, which have a type of their own."""
    if not callable(value) and not isinstance(value, Margin):
        raise TypeError(
            "psi must be a function of the target cosines, or one of fused_margin.margins; got"
            f" {value!r}. For a number use arcface or cosface"
        )


def coefficients(margin: Margin, u: torch.Tensor) -> None:
    """Check the tensors of a margin for target cosines u, (N,)."""
    for value in margin:
        if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape != u.shape:
            num_rows = known(u.shape[0])
            raise ValueError(
                f"a tensor in a Margin must have shape ({num_rows},), one number per row, or be"
                f" 0-d, got {known(value.shape)}{_remedies.of_margin_shape(value, num_rows)}"
            )


def psi_values(value: Any, u: torch.Tensor) -> torch.Tensor:
    """Check what a function has made of target cosines u, (N,)."""
    if not isinstance(value, torch.Tensor) or value.shape != u.shape:
        given = f"shape {known(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise ValueError(
            f"psi must return a tensor of its argument's shape, {known(u.shape)}; got {given}"
        )
    if value.dtype not in _validate.FLOATS:
        raise TypeError(
            f"psi must return floating numbers, by which the loss is differentiated, got"
            f" {value.dtype}"
        )
    return value
