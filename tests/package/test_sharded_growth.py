"""New classes where classes are split over ranks: shards are cut anew, and nothing is lost."""

from __future__ import annotations

import pytest
import sharded_growth as growth
import torch
from two_processes import Pair

TOLERANCE = 1e-11  # of steps, in fp64; what is moved is the same to the bit


def _same(found: list[dict[str, float]]) -> None:
    for rank, differences in enumerate(found):
        assert differences["at once"] == 0.0, f"rank {rank}"
        assert differences["after steps"] < TOLERANCE, f"rank {rank}"


@pytest.mark.parametrize("kind", growth.KINDS)
@pytest.mark.parametrize(("num_classes", "added"), [(3, 1), (5, 2), (7, 13), (2, 1)])
def test_as_one_process(ranks: Pair, num_classes: int, added: int, kind: str) -> None:
    """Uneven shards, and ranks without classes before, after or both times."""
    _same(ranks.run(growth.grown, num_classes, added, kind))


def test_sub_centers(ranks: Pair) -> None:
    count = ranks.ranks
    _same(ranks.run(growth.grown, 2 * count, count, "sgd", 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_given_rows(ranks: Pair, dtype: torch.dtype) -> None:
    assert ranks.run(growth.given_rows, dtype) == [0.0] * ranks.ranks


def test_copies(ranks: Pair) -> None:
    if ranks.ranks == 4:  # those of a mesh of 2 x 2
        _same(ranks.run(growth.copies))


def test_every_rank_raises(ranks: Pair) -> None:
    for rank, said in enumerate(ranks.run(growth.disagreements)):
        different, none, other, missing, states, left_out, gradient = said
        for one in (different, other, missing, states):
            assert "ranks ask for different growths" in one
        assert ("rank 0 of the shards can't grow: " in none) == (rank > 0)
        assert "num_new must be >= 1, got 0" in none
        assert ("rank 0 of the shards can't grow: " in gradient) == (rank > 0)
        assert "has a gradient" in gradient
        assert ("rank 1 of the shards can't grow: " in left_out) == (rank == 0)
        assert "SGD keeps momentum or moments of what grows" in left_out


def test_no_norm_on_any_rank(ranks: Pair) -> None:
    for said in ranks.run(growth.of_zeros):
        assert "all class weights so far are 0" in said


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_between_forward_and_backward(ranks: Pair, rate: float) -> None:
    for said in ranks.run(growth.between_forward_and_backward, rate):
        assert "backward" in said


def test_of_fsdp(ranks: Pair) -> None:
    for said in ranks.run(growth.of_fsdp):
        assert "split the classes by fused_margin.distributed.shard_classes, which can" in said
