"""The collectives that sharded classes need, and how many bytes each rank sends in them.

All of them are made here, so that what `count_traffic` counts is everything.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

Tensor = torch.Tensor
Group = Any  # a torch.distributed.ProcessGroup

# their names from torch 2.13 on, and before
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_scatter: Any = getattr(
    dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None)
)

NUMBERS_TOLD = 3  # of each rank's embeddings before they are gathered

_counters: list[Counter[str]] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[Counter[str]]:
    """Count the bytes that this rank sends for sharded losses, forward and backward.

    They are those of ring algorithms, which send the least that is possible: (R - 1) n in an
    all-gather of n bytes of each of R ranks, (R - 1) n / R in a reduce-scatter of n bytes in all,
    2 (R - 1) n / R in an all-reduce of n. What data parallelism and checkpoints send is not in it.

    Yields:
        Bytes by the name of the collective; ``.total()`` is their sum.
    """
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def _count(kind: str, num_bytes: int, group: Group, rounds: int = 1) -> None:
    """Note a collective over ``num_bytes`` in all, of which a rank has 1 / R."""
    if _counters:
        ranks = dist.get_world_size(group)
        for counter in _counters:
            counter[kind] += rounds * (ranks - 1) * num_bytes // ranks


def gather(part: Tensor, group: Group) -> Tensor:
    """``part`` (k, ...) of every rank, (R k, ...), in the order of ranks."""
    ranks = dist.get_world_size(group)
    whole = part.new_empty(ranks * part.shape[0], *part.shape[1:])
    _count("all_gather", whole.nbytes, group)
    _all_gather(whole, part.contiguous(), group=group)
    return whole


def reduce_scatter(whole: Tensor, group: Group) -> Tensor:
    """Of the sum over ranks of ``whole`` (R k, ...) the part of this rank, (k, ...)."""
    part = whole.new_empty(whole.shape[0] // dist.get_world_size(group), *whole.shape[1:])
    _count("reduce_scatter", whole.nbytes, group)
    _reduce_scatter(part, whole.contiguous(), group=group)
    return part


def total(values: Tensor, group: Group) -> Tensor:
    """The sum over ranks, in place."""
    _count("all_reduce", values.nbytes, group, rounds=2)
    dist.all_reduce(values, group=group)
    return values


def largest(values: Tensor, group: Group) -> Tensor:
    """The maximum over ranks, in place."""
    _count("all_reduce", values.nbytes, group, rounds=2)
    dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values


def exchange(parts: list[Tensor], shapes: list[torch.Size], group: Group) -> list[Tensor]:
    """``parts[q]`` goes to rank q; what this rank gets from each, of ``shapes``."""
    flat = torch.cat([part.flatten() for part in parts])
    sizes = [shape.numel() for shape in shapes]
    found = flat.new_empty(sum(sizes))
    _count("all_to_all", flat.nbytes, group)
    dist.all_to_all_single(found, flat, sizes, [part.numel() for part in parts], group=group)
    return [one.view(shape) for one, shape in zip(found.split(sizes), shapes, strict=True)]


def move(rows: Tensor, found: Tensor, sent: list[int], kept: list[int], group: Group) -> None:
    """Send ``sent[q]`` of ``rows``, in their order, to rank q, and fill ``found`` with its own.

    Args:
        rows: (k, ...), contiguous.
        found: (l, ...), contiguous; ``kept[q]`` of its rows come from rank q.
        sent: how many go to each rank.
        kept: how many come from each.
        group: of these ranks.
    """
    rank, row_bytes = dist.get_rank(group), rows[:1].nbytes
    for counter in _counters:
        counter["all_to_all"] += (rows.shape[0] - sent[rank]) * row_bytes
    dist.all_to_all_single(found, rows.contiguous(), kept, sent, group=group)


def numbers(values: list[int], device: torch.device, group: Group) -> list[list[int]]:
    """Integers of every rank, as Python's.

    They travel by a backend of the group for CPU tensors, if it has one ("cpu:gloo,cuda:nccl"), so
    that no GPU is waited for.
    """
    device = torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device
    mine = torch.tensor([values], dtype=torch.int64, device=device)
    return gather(mine, group).tolist()


def bytes_per_step(
    num_rows: int, embedding_size: int, ranks: int, dtype: torch.dtype = torch.float32
) -> int:
    """Bytes that a rank sends in a step of a sharded loss, as `count_traffic` counts them.

    Whatever the number of classes: embeddings and their gradients, and 9 numbers of 8 bytes a row
    (its label, lse twice and u in the forward, where an all-reduce counts double, and two slopes).

    Args:
        num_rows: N of the rank with most rows.
        embedding_size: D.
        ranks: R, over which the classes are split.
        dtype: of the embeddings.
    """
    numbers_of_row = 1 + 2 * (1 + 2) + 2
    of_row = 2 * embedding_size * dtype.itemsize + 8 * numbers_of_row
    return (ranks - 1) * (num_rows * of_row + 8 * NUMBERS_TOLD)
