"""One sweep over the classes by any backend, and what has to be known of the targets before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fused_margin import _ops, _reference, _validate, _validate_shards
from fused_margin._arguments import Extras, Found
from fused_margin._centers import nearest_centers
from fused_margin._numerics import accumulation_dtype, requested_dtype
from fused_margin.distributed import _sweep as _sharded
from fused_margin.metrics import ROUNDINGS
from fused_margin.negatives import Negatives
from fused_margin.sampling import taken_rows

Tensor = torch.Tensor


class Asked(NamedTuple):
    """What is asked of a sweep beside lse and u of plain cosines.

    Attributes:
        negatives: what becomes of the other classes' cosines. sub_centers: rows of W for each
            class. has_total: whether the other classes' phi(c) are added up. has_stats: whether
            the nearest other class is looked for.
    """

    negatives: Negatives | None = None
    sub_centers: int = 1
    has_total: bool = False
    has_stats: bool = False

    @property
    def is_nothing(self) -> bool:
        """Whether nothing is."""
        is_shaped = self.negatives is not None or self.sub_centers > 1
        return not (is_shaped or self.has_total or self.has_stats)


NOTHING = Asked()


class Sums(NamedTuple):
    """What a sweep finds: lse (eq. 2) and u (eq. 1), (N,), and what else was asked for."""

    lse: Tensor
    u: Tensor
    found: Found


def sweep(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    backend: str,
    memory_budget: int | None,
    asked: Asked = NOTHING,
    sampler: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Sums:
    """lse and u of checked arguments; a label outside [0, C) means no target.

    ``sampler``: which classes take part, see `sampling`.
    """
    if sampler is not None:
        _validate_shards.asked_of_a_sample(asked.sub_centers, asked.has_total, asked.has_stats)

    def of_classes(
        x: Tensor, w: Tensor, targets: Tensor, s: float | Tensor, ranks: _sharded.Rows | None,
        classes: Tensor | None = None,
    ) -> Sums:  # fmt: skip
        if classes is not None and backend != "triton":
            w, classes = taken_rows(w, classes), None
        extras = Extras(classes=classes)
        if not asked.is_nothing:
            targets, extras = _extras(x, w, targets, asked, ranks, classes)
        if backend == "reference":
            return Sums(*_reference.cosine_lse(x, w, targets, s, extras))
        dtype = compute_dtype(x, w, backend)
        return Sums(*_ops.cosine_lse(x, w, targets, s, dtype, backend, memory_budget, extras))

    if _validate.is_class_sharded(weight):
        return Sums(
            *_sharded.sweep(
                of_classes, embeddings, weight, labels, scale, asked.sub_centers, sampler
            )
        )
    classes = None
    if sampler is not None:
        classes, labels = sampler(labels, weight.shape[0])
    return of_classes(embeddings, weight, labels, scale, None, classes)


@torch.no_grad()
def target_cosines(embeddings: Tensor, weight: Tensor, labels: Tensor, sub_centers: int) -> Tensor:
    """u (eq. 1), (N,) in `sum_dtype`, without gradients; 0 for a label outside [0, C)."""

    def of_classes(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        return nearest_centers(x, w, targets, sub_centers)[1]

    if _validate.is_class_sharded(weight):
        return _sharded.target_cosines(of_classes, embeddings, weight, labels, sub_centers)
    return of_classes(embeddings, weight, labels)


def compute_dtype(embeddings: Tensor, weight: Tensor, backend: str) -> torch.dtype:
    """The dtype asked for in products; with FUSED_MARGIN_TUNE=1 tiles not yet tuned are."""
    dtype = requested_dtype(embeddings, weight)
    is_eager = not torch.compiler.is_compiling()
    if backend == "triton" and _validate.tunes_on_demand() and is_eager:
        from fused_margin import tuning

        tuning.tune_once(embeddings, weight, dtype)
    return dtype


@torch.no_grad()
def _extras(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    asked: Asked,
    ranks: _sharded.Rows | None,
    classes: Tensor | None,
) -> tuple[Tensor, Extras]:
    """The targets as rows of W, (N,), and what the sweep is told.

    Where classes are split over ranks, ``weight`` has this one's, and the rows are of all: each
    rank knows what is asked of its own. ``classes``: rows of W that take part, among which labels
    are numbers; None: all of them.
    """
    dtype = accumulation_dtype(embeddings, weight)
    threshold = phi = nearer = None
    rows = labels
    if asked.sub_centers > 1 or asked.negatives is not None or asked.has_stats:
        with torch.autocast(embeddings.device.type, enabled=False):
            if classes is None:
                rows, u = nearest_centers(embeddings, weight, labels, asked.sub_centers)
            else:  # whose classes have one row each
                own = classes[labels.clamp_min(0)].where(labels >= 0, _sharded.NO_TARGET)
                _, u = nearest_centers(embeddings, weight, own, 1)
            if ranks is not None and (asked.negatives is not None or asked.has_stats):
                u = ranks.added(u)
            if asked.negatives is not None:
                threshold = asked.negatives.thresholds(u, dtype)
                phi = asked.negatives.coefficients(embeddings.device)
            if asked.has_stats:
                nearer = (u + ROUNDINGS * torch.finfo(dtype).eps).to(dtype)
            if ranks is not None:
                threshold, nearer = ranks.gathered(threshold), ranks.gathered(nearer)
    return rows, Extras(
        threshold, phi, nearer, classes, centers=asked.sub_centers, has_total=asked.has_total
    )
