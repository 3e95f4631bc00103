"""Which of the K rows of W that a class has is the nearest, of the targets alone: O(N K D).

Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from fused_margin import _transforms
from fused_margin._numerics import normalized, sum_dtype

Tensor = torch.Tensor

_owners: weakref.WeakSet[Any] = weakref.WeakSet()


def own(criterion: Any) -> None:
    """Remember a loss with sub-centres, by whose weight `declared` knows how many they are."""
    _owners.add(criterion)


def declared(weight: Tensor) -> int | None:
    """K of the loss that a weight (C K, D) belongs to, or its memory; None of any other tensor."""
    if torch.compiler.is_compiling():
        return None
    for criterion in _owners:
        its = criterion._parameters.get("weight")
        if its is weight:
            return criterion.sub_centers
        if its is None or its.shape != weight.shape:
            continue
        is_plain = _transforms.is_plain(its) and _transforms.is_plain(weight)
        if is_plain and its.data_ptr() == weight.data_ptr():
            return criterion.sub_centers
    return None


@torch.no_grad()
def nearest_centers(
    embeddings: Tensor, weight: Tensor, labels: Tensor, sub_centers: int
) -> tuple[Tensor, Tensor]:
    """The row of W of each target that is nearest (eq. 24), the first of several; its cosine; (N,).

    Labels outside [0, C) become -1, with the cosine 0. A row that isn't finite has NaN.

    Args:
        embeddings: (N, D). weight: (C K, D), K rows for each class. labels: (N,).
        sub_centers: K.
    """
    wide = sum_dtype(embeddings, weight)
    labels = labels.long()
    has_target = (labels >= 0) & (labels < weight.shape[0] // sub_centers)
    first = labels.where(has_target, 0) * sub_centers
    x = normalized(embeddings.to(wide))[0]
    best, cosine = first, (x * normalized(weight[first].to(wide))[0]).sum(dim=1)
    for center in range(1, sub_centers):
        found = (x * normalized(weight[first + center].to(wide))[0]).sum(dim=1)
        is_nearer = found > cosine
        best = torch.where(is_nearer, first + center, best)
        cosine = torch.where(is_nearer, found, cosine)
    return best.where(has_target, -1), cosine.clamp(-1.0, 1.0).where(has_target, 0.0)
