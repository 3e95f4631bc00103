"""Logits of this rank's rows for the classes of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fused_margin import _validate_shards
from fused_margin.distributed import _collectives
from fused_margin.distributed._shards import ClassShard, bounds
from fused_margin.distributed._sweep import Rows, gather_rows, local_classes, scaled, shared_scale

Tensor = torch.Tensor


def logits(
    local_logits: Callable[[Tensor, Tensor, Any], Tensor], x: Tensor, weight: Tensor, scale: Any,
    sub_centers: int,
) -> Tensor:  # fmt: skip
    """(N, C), of ``local_logits(embeddings, weight, scale)`` of each shard.

    See `Rows.exchanged`.
    """
    shard, scale = ClassShard.of(weight), shared_scale(scale, weight)
    rows, x_all, _ = gather_rows(x, x.new_zeros(x.shape[0], dtype=torch.int64), shard)
    found = local_logits(x_all, local_classes(weight, shard), scaled(scale, shard))
    widths = class_counts(weight.shape[0], shard.ranks, sub_centers)
    return _Transposed.apply(found, rows, widths)


class _Transposed(torch.autograd.Function):
    """(R n, C_local), all rows for some classes, to (n, C), some rows for all classes."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, rows: Rows, widths: list[int]) -> Tensor:
        ctx.rows, ctx.widths, ctx.columns = rows, widths, found.shape[1]
        return rows.exchanged(found, widths)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        rows, shard = ctx.rows, ctx.rows.shard
        # slopes of the mean over ranks, as those of the loss
        padding = (0, 0, 0, rows.most - rows.mine)
        grad = torch.nn.functional.pad(grad_outputs[0], padding) / shard.ranks
        shapes = [torch.Size((rows.most, ctx.columns))] * shard.ranks
        parts = list(grad.split(ctx.widths, dim=1))
        return torch.cat(_collectives.exchange(parts, shapes, shard.group)), None, None


def class_counts(num_rows: int, ranks: int, sub_centers: int) -> list[int]:
    """How many classes each rank has."""
    _validate_shards.whole_classes(num_rows, ranks, sub_centers)
    limits = (bounds(num_rows, rank, ranks) for rank in range(ranks))
    return [(stop - start) // sub_centers for start, stop in limits]
