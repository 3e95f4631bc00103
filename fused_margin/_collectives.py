"""What ranks tell each other of a batch's statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_HAS_DISTRIBUTED = dist.is_available()


def of_each_rank(values: torch.Tensor, groups: tuple[Any, ...] = (None,)) -> torch.Tensor:
    """``values`` (k,) of every rank, (ranks, k); (1, k) without a process group.

    One all-reduce a group, of as many numbers on each rank however many rows of the batch it has.

    Args:
        values: of this rank. groups: process groups that make all the ranks together, as those of
            the dimensions of a mesh; None is the default one.
    """
    rows = values[None]
    if not (_HAS_DISTRIBUTED and dist.is_initialized()):
        return rows
    for group in groups:
        if dist.get_world_size(group) > 1:
            every = rows.new_zeros(dist.get_world_size(group), *rows.shape)
            every[dist.get_rank(group)] = rows
            dist.all_reduce(every, group=group)
            rows = every.flatten(0, 1)
    return rows
