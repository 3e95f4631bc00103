"""Regularisers of `pml`, and the form in which a reducer takes what is summed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fused_margin import _validate, _weight_sweeps
from fused_margin._numerics import accumulation_dtype
from fused_margin.compat import _refusals

Tensor = torch.Tensor


def part(losses: Any, indices: Tensor | None, **more: Any) -> dict[str, Any]:
    """A sub-loss, in the form in which reducers take it."""
    kind = "already_reduced" if indices is None else "element"
    return {"losses": losses, "indices": indices, "reduction_type": kind, **more}


def mean(losses: Tensor) -> Tensor:
    """0 of no rows."""
    return losses.sum() / max(losses.shape[0], 1)


class _Regularizer(nn.Module):
    """Values of rows (C, D), reduced by ``reducer`` or by their mean."""

    def __init__(
        self, *, reducer: Any = None, distance: Any = None, collect_stats: bool | None = None
    ) -> None:
        super().__init__()
        _refusals.reducer(reducer)
        _refusals.collect_stats(collect_stats)
        _refusals.distance(distance, self.distances, type(self).__name__)
        self.reducer = copy.deepcopy(reducer)

    distances: tuple[str, ...] = ("CosineSimilarity",)

    def _values(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def _more(self) -> dict[str, Any]:
        return {}

    def forward(self, rows: Tensor) -> Any:
        """Value of class weights (C, D) or embeddings (N, D): 0-d."""
        values = self._values(rows)
        if self.reducer is None:
            return self._mean(values)
        numbers = torch.arange(values.shape[0], device=values.device)
        labels = torch.arange(rows.shape[0], device=rows.device)
        return self.reducer({"loss": part(values, numbers, **self._more())}, rows, labels)

    def _mean(self, values: Tensor) -> Tensor:
        return mean(values)


class CenterInvariantRegularizer(_Regularizer):
    """See `fused_margin.regularizers.center_invariant`.

    Args:
        reducer: one of pytorch_metric_learning.reducers; None is the mean.
        distance: None, or LpDistance(power=1, normalize_embeddings=False).
        collect_stats: False or None.
    """

    distances = ("LpDistance",)

    def _values(self, rows: Tensor) -> Tensor:
        _validate.class_weights(rows)
        squared = _weight_sweeps.squared_norms(rows)
        return ((squared - squared.mean()).square() / 4.0).to(accumulation_dtype(rows, rows))


class RegularFaceRegularizer(_Regularizer):
    """See `fused_margin.regularizers.regular_face`; no (C, C) matrix.

    Args:
        reducer: one of pytorch_metric_learning.reducers; None is the mean.
        distance: None or CosineSimilarity.
        collect_stats: False or None.
    """

    def _values(self, rows: Tensor) -> Tensor:
        _validate.class_weights(rows)
        return _weight_sweeps.nearest_cosines(rows)


class LpRegularizer(_Regularizer):
    """Norm of each row, to a power.

    Args:
        p: which norm.
        power: to which power it is raised.
        reducer: one of pytorch_metric_learning.reducers; None is the mean.
        distance: not used.
        collect_stats: False or None.
    """

    distances = ("BaseDistance",)

    def __init__(self, p: float = 2, power: float = 1, **options: Any) -> None:
        super().__init__(**options)
        self.p, self.power = p, power

    def _values(self, rows: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, self.p, dim=1)
        return norms if self.power == 1 else norms**self.power


class ZeroMeanRegularizer(_Regularizer):
    """Absolute sum of each row's elements.

    Args:
        reducer: one of pytorch_metric_learning.reducers; None is the mean.
        distance: not used.
        collect_stats: False or None.
    """

    distances = ("BaseDistance",)

    def _values(self, rows: Tensor) -> Tensor:
        return rows.sum(dim=1).abs()


class SparseCentersRegularizer(_Regularizer):
    """Pull the centres of a class together: sqrt(2 - 2 cos) of each two of them, half its mean.

    Args:
        num_classes: C.
        centers_per_class: K >= 2.
        reducer: one of pytorch_metric_learning.reducers; None is the sum over twice the number of
            pairs, as there.
        distance: None or CosineSimilarity.
        collect_stats: False or None.

    References:
        Qian et al., SoftTriple Loss: Deep Metric Learning Without Triplet Sampling, 2019,
        arXiv:1909.05235, eq. 10.
    """

    def __init__(self, num_classes: int, centers_per_class: int, **options: Any) -> None:
        super().__init__(**options)
        _refusals.centers_per_class(num_classes, centers_per_class)
        self.num_classes, self.centers_per_class = num_classes, centers_per_class

    @property
    def _divisor(self) -> int:
        return self.num_classes * self.centers_per_class * (self.centers_per_class - 1)

    def _values(self, rows: Tensor) -> Tensor:
        _validate.class_weights(rows)
        _refusals.centers_per_class(self.num_classes, self.centers_per_class, rows.shape[0])
        rows = rows.to(accumulation_dtype(rows, rows))
        groups = nn.functional.normalize(rows).unflatten(0, (-1, self.centers_per_class))
        cosines = groups @ groups.transpose(1, 2)  # (C, K, K)
        first, second = torch.triu_indices(*cosines.shape[1:], offset=1, device=rows.device)
        doubled = (2.0 * cosines[:, first, second]).clamp_max(2.0).flatten()
        return (2.0 + torch.finfo(rows.dtype).tiny - doubled).sqrt()

    def _more(self) -> dict[str, Any]:
        return {"divisor": self._divisor}

    def _mean(self, values: Tensor) -> Tensor:
        return values.sum() / self._divisor
