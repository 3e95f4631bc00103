"""Nearest classes and standings of this rank's rows among the classes of all ranks.

Every rank looks for the rows of all among its own classes. What it finds of each row goes to the
rank that has the row: embeddings and numbers for each row are sent, nothing that grows with C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fused_margin import _validate_shards
from fused_margin.distributed import _collectives
from fused_margin.distributed._logits import class_counts
from fused_margin.distributed._shards import ClassShard
from fused_margin.distributed._sweep import gather_rows, hardest_of_all, stand_in

Tensor = torch.Tensor


def nearest(
    local_nearest: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    x: Tensor,
    weight: Any,
    k: int,
    sub_centers: int,
) -> tuple[Tensor, Tensor]:
    """The k nearest classes of this rank's rows and their cosines, (n, k), nearest first.

    ``local_nearest``: the same of embeddings, weights and k; of no class, (N, 0). Of classes of
    different ranks that are equally near, the first comes first.
    """
    shard = ClassShard.of(weight)
    widths = class_counts(weight.shape[0], shard.ranks, sub_centers)
    told = _collectives.numbers([k], x.device, shard.group)
    _validate_shards.same_numbers("k", [one for (one,) in told])
    rows, x_all, _ = gather_rows(x.detach(), x.new_zeros(len(x), dtype=torch.int64), shard)
    most = [min(k, width) for width in widths]
    classes, cosines = local_nearest(x_all, weight.to_local().detach(), most[shard.rank])
    classes = rows.exchanged(classes + shard.start // sub_centers, most)
    cosines = rows.exchanged(cosines, most)
    cosines, order = cosines.sort(dim=1, descending=True, stable=True)
    return classes.gather(1, order[:, :k]), cosines[:, :k]


def standings(
    local_targets: Callable[[Tensor, Tensor, Tensor], Tensor],
    local_standings: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    weight: Any,
    labels: Tensor,
    sub_centers: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Target cosines, ranks, hardest other classes and their cosines, (n,), of this rank's rows.

    Args:
        local_targets: cosines of embeddings, weights and labels, 0 where a label is outside.
        local_standings: ranks, hardest classes and their cosines, of the same and the target
            cosines, (N,).
        x: (n, D).
        weight: (C K, D), sharded on classes.
        labels: (n,) int64.
        sub_centers: K.
    """
    shard = ClassShard.of(weight)
    _validate_shards.whole_classes(weight.shape[0], shard.ranks, sub_centers)
    rows, x_all, labels_all = gather_rows(x.detach(), labels, shard)
    w, first_class = weight.to_local().detach(), shard.start // sub_centers
    labels_here = labels_all - first_class
    is_empty = shard.start == shard.stop
    if is_empty:
        w, labels_here = stand_in(w, labels_here, sub_centers)
    mine = rows.added(local_targets(x_all, w, labels_here))
    u = rows.gathered(mine)
    assert u is not None
    rank, hardest, cosine = local_standings(x_all, w, labels_here, u)
    if is_empty:
        rank, cosine = torch.zeros_like(rank), torch.full_like(cosine, -float("inf"))
    hardest, cosine = hardest_of_all(hardest + first_class, cosine, rows)
    return mine, rows.added(rank), hardest, cosine
