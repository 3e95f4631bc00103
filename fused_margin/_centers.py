"""Which of the K rows of W that a class has is the nearest, of the targets alone: O(N K D).

Equations refer to ``docs/math.md``.
"""

from __future__ import annotations

import torch

from fused_margin._numerics import normalized, sum_dtype

Tensor = torch.Tensor


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
