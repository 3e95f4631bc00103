"""What ranks tell each other of a batch's statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_HAS_DISTRIBUTED = dist.is_available()


def of_each_rank(values: torch.Tensor, group: Any = None) -> torch.Tensor:
    """``values`` (k,) of every rank of the group, (ranks, k); (1, k) without a process group.

    One all-reduce, of as many numbers on each rank however many rows it has.
    """
    if not (_HAS_DISTRIBUTED and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return values[None]
    rows = values.new_zeros(dist.get_world_size(group), values.shape[0])
    rows[dist.get_rank(group)] = values
    dist.all_reduce(rows, group=group)
    return rows
