"""Every ValueError and TypeError about other classes' logits and sub-centres, with the remedy."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch

from fused_margin import _transforms, _validate
from fused_margin._compiled import known

LARGEST_TOP = 8


def none_of_the_callers(name: str, value: Any) -> None:
    """Refuse negatives for a loss that has its own."""
    if value is not None:
        raise TypeError(
            f"{name} has negatives of its own, and takes none; functional.margin_softmax takes any"
            " beside any margin"
        )


def smoothed(value: Any) -> None:
    """Refuse negatives that leave classes out where each class has a share of the target."""
    offset = value.phi[0]
    if not isinstance(offset, torch.Tensor) and offset == -math.inf:
        raise ValueError(
            "label_smoothing gives a share of the target to every class, and these negatives leave"
            " some out of the softmax; use negatives.filtered(threshold, zero=True), which keeps"
            " them with the logit 0, or no smoothing"
        )


def curriculum(value: Any) -> float | torch.Tensor:
    """Check CurricularFace's t, in [-1, 1] as a mean of cosines is."""
    return _statistic("t", value, -1.0, 1.0, "it is a mean of target cosines")


def of_norms(name: str, value: Any) -> float | torch.Tensor:
    """Check AdaFace's mean or standard deviation of norms."""
    return _statistic(name, value, 0.0, _validate.LARGEST_SCALE, "it is one of norms")


def _statistic(
    name: str, value: Any, lowest: float, highest: float, hint: str
) -> float | torch.Tensor:
    """Check a number or a 0-d tensor, whose value is looked at where that costs nothing."""
    if isinstance(value, torch.Tensor):
        _validate.floating_numbers(name, value)
        if value.ndim != 0:
            raise ValueError(
                f"{name} must be a number or a 0-d tensor, got shape {known(value.shape)}; use"
                " .squeeze() if it has one element"
            )
        if _transforms.is_readable(value):
            _validate.between(name, value.detach().item(), lowest, highest, hint)
        return value.detach()
    return _validate.between(name, value, lowest, highest, hint)


def batch(embeddings: Any, labels: Any) -> None:
    """Check embeddings (N, D) and labels (N,) where there is no weight beside them."""
    _validate._matrix("embeddings", embeddings)
    _validate._row_labels(labels, embeddings.shape[0], 0)


def threshold(value: Any, u: torch.Tensor) -> None:
    """Check the threshold of negatives for target cosines u, (N,)."""
    if not isinstance(value, torch.Tensor):
        number = _validate._real("the threshold of negatives", value, "a number or a tensor")
        if not -math.inf <= number <= math.inf:
            raise ValueError("the threshold of negatives must be a cosine, got nan")
    elif value.ndim > 0 and value.shape != u.shape:
        raise ValueError(
            f"the threshold of negatives must be a number or have shape ({known(u.shape[0])},), one"
            f" cosine per row, got {known(value.shape)}"
        )


def penalty(value: Any, rows: torch.Tensor) -> None:
    """Check what is added to the losses of rows, (N,)."""
    if not isinstance(value, torch.Tensor) or value.shape != rows.shape:
        raise ValueError(
            f"penalty must return a tensor of shape ({known(rows.shape[0])},), what is added to"
            f" each row's loss, or None; got {_validate._shown(value)}"
        )
    _validate.floating_numbers("penalty", value)


def top(value: Any) -> int:
    """Check how many of the nearest other classes get a penalty."""
    value = _validate.size("k", value, 1)
    return _validate.at_most("k", value, LARGEST_TOP)


def top_or_none(value: Any) -> int:
    """The same of a setting, where 0 is none."""
    value = _validate.size("k_top", value, 0)
    return _validate.at_most("k_top", value, LARGEST_TOP)


def coefficients(phi: Any) -> None:
    """Check that phi has all its numbers."""
    if not isinstance(phi, tuple) or len(phi) not in (6, 7):
        raise ValueError(
            "phi must be a tuple of the numbers d, a, b, e, f, l and, for a multiple of the sine,"
            f" h; got {_validate._shown(phi)}"
            + (f" of length {len(phi)}" if isinstance(phi, tuple) else "")
        )


def class_weights(value: torch.nn.Module) -> tuple[torch.Tensor, int]:
    """The class weights (C K, D) of a criterion, and K."""
    weight: Any = getattr(value, "weight", None) if hasattr(value, "psi") else None
    transposed = value._parameters.get("W")  # of pytorch-metric-learning's losses, (D, C K)
    if weight is None and transposed is not None:
        weight = transposed.t()
    if weight is None:
        raise TypeError(
            f"a criterion must be a loss with class weights (C, D), got {type(value).__name__};"
            " one that is wrapped, or part of a model, is given itself, as model.criterion"
        )
    return weight, getattr(value, "sub_centers", 1)


def same_centers(given: int | None, own: int) -> None:
    """Check sub_centers that are given beside a criterion, which knows its own."""
    if given not in (None, own):
        raise ValueError(
            f"sub_centers is {own} of this criterion, got {given}; leave it out, the criterion"
            " knows"
        )


def undeclared_centers(own: int) -> NoReturn:
    """Refuse the weight of a loss with sub-centres that is taken for one row a class."""
    raise ValueError(
        f"this weight is that of a loss with sub_centers={own}, {own} rows for each class; pass the"
        f" criterion in its place, or sub_centers={own} (sub_centers=1 to take each row for a"
        " class)"
    )


def one_center(own: int | None) -> None:
    """Refuse the weight of a loss with sub-centres where each row is to be a class."""
    if own is not None:
        raise ValueError(
            f"this weight is that of a loss with sub_centers={own}: {own} rows for each class,"
            " which would be pushed away from each other; use center_invariant, or one centre for"
            " each class, weight[fused_margin.metrics.dominant_centers(counts)]"
        )


def center_counts(value: Any) -> torch.Tensor:
    """Check how many rows are nearest to each centre, (C, K)."""
    _validate._tensor("counts", value)
    if value.ndim != 2 or value.dtype not in _validate.INTEGERS:
        raise ValueError(
            "counts must have shape (C, K) and an integer dtype, as metrics.center_counts makes"
            f" them; got {tuple(value.shape)} and {value.dtype}"
        )
    return value


def rows_of(name: str, value: Any, weight: torch.Tensor, sub_centers: int | None) -> int:
    """Check a row of the weight for each class, (C,), K of it if that is known; returns C."""
    _validate._tensor(name, value)
    if value.ndim != 1 or value.dtype is not torch.int64 or value.device != weight.device:
        raise ValueError(
            f"{name} must have shape (C,) and int64, on the weight's device {weight.device}, as"
            f" metrics.dominant_centers makes them; got {tuple(value.shape)}, {value.dtype} on"
            f" {value.device}"
        )
    num_rows = weight.shape[0]
    wrong = (value < 0) | (value >= num_rows)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name} must be rows of the weight, in [0, {num_rows}), got {int(value[first])} of"
            f" class {first}"
        )
    if value.shape[0] < 1 or num_rows % value.shape[0]:
        raise ValueError(
            f"{name} has {value.shape[0]} entries, one per class, and weight {num_rows} rows, which"
            " is no multiple"
        )
    if sub_centers not in (None, num_rows // value.shape[0]):
        raise ValueError(
            f"{name} has {value.shape[0]} entries, one per class, and weight {num_rows} rows, which"
            f" aren't {sub_centers} for each; sub_centers may be left out where {name} is given"
        )
    return value.shape[0]
