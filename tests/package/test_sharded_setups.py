"""How sharded criteria are made, saved, trained with all else, and what they send."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import sharded_setups as setups
import torch
from helpers import ROOT
from two_processes import Pair

import fused_margin as fm
from fused_margin.distributed import _shards

TOLERANCE = 1e-11  # of what is there, in fp64


def _close(found: list[dict[str, float]], tolerance: float = TOLERANCE) -> None:
    for rank, differences in enumerate(found):
        wrong = {key: value for key, value in differences.items() if not value <= tolerance}
        assert not wrong, f"rank {rank}"


@pytest.mark.parametrize("num_classes", [3, 5, 2500])
def test_from_the_meta_device(ranks: Pair, num_classes: int) -> None:
    """The same weights on any number of ranks, with norms of about 1."""
    torch.manual_seed(setups.SEED)
    expected = torch.empty(num_classes, setups.DIM)
    std = setups.DIM**-0.5
    _shards.draw_rows(expected, 0, std, int(torch.randint(1 << 62, ())))
    for weight in ranks.run(setups.from_meta, num_classes):
        np.testing.assert_array_equal(weight, expected.numpy())
    if num_classes > 100:
        assert float(expected.std()) == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("cuts", [[1], [1023], [1024, 1024], [1025, 3000], [0, 2048, 3100]])
def test_weights_are_drawn_alike_in_pieces(cuts: list[int]) -> None:
    assert setups.same_draws(3100, cuts)


@pytest.mark.parametrize("on_meta", [True, False])
def test_copies_of_shards_begin_alike(ranks: Pair, on_meta: bool) -> None:
    """Whatever seeds the ranks have."""
    first, *others = ranks.run(setups.copies, on_meta)
    for weight in others:
        np.testing.assert_array_equal(weight, first)


def test_statistics_of_part_of_the_ranks(ranks: Pair) -> None:
    _close(ranks.run(setups.tasks_apart), 1e-5)


def test_states(ranks: Pair) -> None:
    ranks.run(setups.states, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[4, 4, 4, 4], [7, 0, 2, 1]])
def test_bytes_are_those_of_the_model(ranks: Pair, counts: list[int], dtype: torch.dtype) -> None:
    for expected, counted in ranks.run(setups.traffic, counts[: ranks.ranks], dtype):
        assert sum(counted.values()) == expected
        assert set(counted) == {"all_gather", "all_reduce", "reduce_scatter"}


@pytest.mark.parametrize("sub_centers", [1, 2])
def test_bytes_with_sub_centers(ranks: Pair, sub_centers: int) -> None:
    """Nothing is sent for them: each rank finds the nearest of its own classes."""
    for expected, counted in ranks.run(setups.traffic_of, sub_centers):
        assert counted == expected


def test_bytes_of_copies(ranks: Pair) -> None:
    if ranks.ranks == 4:
        for expected, counted in ranks.run(setups.traffic_of_copies):
            assert counted == expected


def test_odd_calls(ranks: Pair) -> None:
    _close(ranks.run(setups.odd_calls))


def test_mixed_precision(ranks: Pair) -> None:
    """bf16 products, whose sums are ordered differently."""
    _close(ranks.run(setups.mixed_precision), 0.02)


@pytest.mark.slow
def test_compiled(ranks: Pair) -> None:
    if ranks.ranks == 2:
        _close(ranks.run(setups.compiled))


def test_two_dimensions(ranks: Pair) -> None:
    if ranks.ranks == 4:  # those of a mesh of 2 x 2
        _close(ranks.run(setups.meshes))


def test_refusals(ranks: Pair) -> None:
    if ranks.ranks == 2:
        ranks.run(setups.refusals)


@pytest.mark.parametrize("kind", ["DDP", "optimizer", "optimizer of one rank"])
def test_what_holds_the_whole_weight_already(ranks: Pair, kind: str) -> None:
    """It is refused on every rank, where it would have trained a weight that nothing reads."""
    first, *others = ranks.run(setups.too_late, kind)
    assert ("DistributedDataParallel" if kind == "DDP" else "an optimizer, SGD,") in first
    assert set(others) == {first}


@pytest.mark.parametrize("kind", ["alike", "whole", "of shards"])
def test_copies_are_compared(ranks: Pair, kind: str) -> None:
    if kind == "of shards" and ranks.ranks != 4:
        return
    for message in ranks.run(setups.check_copies, kind):
        expected = "weight of this CosFaceLoss differs between ranks that hold copies"
        assert (not message) if kind == "alike" else message.startswith(expected)
        assert (not message) or f"([{ranks.ranks - 1}] from" in message


def test_without_a_process_group() -> None:
    criterion = fm.ArcFaceLoss(5, 4)
    weight = criterion.weight
    assert fm.distributed.shard_classes(criterion) is criterion
    assert criterion.weight is weight


def test_importing_doesnt_import_dtensors() -> None:
    code = "import sys, fused_margin; print('torch.distributed.tensor' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ),
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert found.stdout.strip() == "False"
