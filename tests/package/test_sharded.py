"""Losses over classes that are sharded over 2, 3 and 4 ranks equal the loss in one process."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import sharded_cases as cases
from combined_cases import SHARDED, cells
from helpers import needs_triton
from two_processes import Pair, assert_close

# Rows of each rank, and classes: even and uneven, a rank without rows, with fewer classes or none.
PROBLEMS: dict[int, list[tuple[list[int], int]]] = {
    2: [([4, 4], 10), ([5, 2], 11), ([0, 3], 3), ([0, 0], 7)],
    3: [([4, 4, 4], 11), ([5, 0, 2], 4), ([1, 2, 1], 2)],
    4: [([3, 3, 3, 3], 14), ([3, 1, 0, 5], 5), ([2, 2, 1, 1], 3)],
}
TOLERANCE = 1e-11  # of what is there, in fp64


def _check(found: list[dict[str, dict[str, float]]]) -> None:
    """Of every rank and loss: no value or gradient differs."""
    wrong = {
        (rank, name, key): value
        for rank, losses in enumerate(found)
        for name, parts in losses.items()
        for key, value in parts.items()
        if not value <= TOLERANCE
    }
    assert not wrong
    assert all(found)


@pytest.mark.parametrize("index", range(4))
def test_every_loss_equals_a_whole_one(ranks: Pair, index: int) -> None:
    problems = PROBLEMS[ranks.ranks]
    if index < len(problems):
        _check(ranks.run(cases.differences, list(cases.CRITERIA), *problems[index]))


def test_every_loss_of_the_table(ranks: Pair) -> None:
    """What README.md says of losses and shards; none is said not to be."""
    names = [loss for loss, column, goes in cells() if column == SHARDED and goes]
    assert sorted(names) == sorted(cases.OF_TABLE)
    if ranks.ranks == 2:
        found = ranks.run(cases.differences, names, *PROBLEMS[2][1])
        assert all(list(one) == names for one in found)
        _check(found)


@needs_triton
def test_triton(ranks: Pair) -> None:
    if ranks.ranks == 2:
        _check(ranks.run(cases.differences, list(cases.TRITON), *PROBLEMS[ranks.ranks][1]))


def test_even_batches_equal_one_process(ranks: Pair) -> None:
    """Of losses whose mean is over equally many rows on each rank, without statistics."""
    others = (
        "sum", "rows", "ignored", "adacos", "adaface", "weighed", "elastic", "curricular",
        "sub-centres",
    )  # fmt: skip
    names = [name for name in cases.CRITERIA if not any(word in name for word in others)]
    _check(ranks.run(cases.whole_batches, [*names, "fixed adacos"], 4, 11))


def test_sums_of_uneven_batches_equal_one_process(ranks: Pair) -> None:
    counts, num_classes = PROBLEMS[ranks.ranks][1]
    _check([{"sum": one} for one in ranks.run(cases.sums_of_uneven, counts, num_classes)])


@pytest.mark.parametrize("index", range(3))
def test_logits(ranks: Pair, index: int) -> None:
    for found in ranks.run(cases.logits_differ, *PROBLEMS[ranks.ranks][index]):
        assert all(value <= TOLERANCE for value in found)


@pytest.mark.parametrize("name", ["arcface", "smoothed, learnt scale"])
def test_an_optimiser_in_the_backward_too(ranks: Pair, name: str) -> None:
    expected = cases.train(name, False, False)
    for state in ranks.run(functools.partial(cases.train, in_backward=True), name, True, False):
        assert_close(state, expected)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("name", ["cosface", "sub-centres"])
def test_metrics(ranks: Pair, name: str, index: int) -> None:
    """Of this rank's rows, NaN and ignored ones among them, over the classes of all."""
    problems = PROBLEMS[ranks.ranks]
    if index < len(problems):
        for found in ranks.run(cases.metrics_differ, name, *problems[index]):
            assert all(value <= TOLERANCE for value in found.values()), found


def test_metrics_of_one_rank(tmp_path: Path) -> None:
    alone = Pair(tmp_path, 1)
    try:
        for name in ("cosface", "sub-centres"):
            (found,) = alone.run(cases.metrics_differ, name, [5], 8)
            assert found
            assert all(value <= TOLERANCE for value in found.values()), found
        _check(alone.run(cases.differences, ["inter-topk", "cosface"], [5], 8))
    finally:
        alone.stop()


def test_equally_near_classes(ranks: Pair) -> None:
    """The same order on all ranks, those of the first rank first."""
    found = ranks.run(cases.ties, 11)
    assert all(one == found[0] for one in found)
    for row in found[0]:
        shards = [number // -(-11 // ranks.ranks) for number in row]
        assert shards == sorted(shards)
        assert sorted(row) == list(range(11))


def test_ranks_that_ask_for_different_numbers(ranks: Pair) -> None:
    for message in ranks.run(cases.other_numbers):
        assert message.startswith("k differs between ranks, 1, 2")


def test_what_metrics_send_does_not_grow_with_the_classes(ranks: Pair) -> None:
    few, many = (ranks.run(cases.metrics_traffic, 6, count, 3) for count in (40, 4000))
    assert few == many
    of_row = ranks.run(cases.metrics_traffic, 12, 40, 3)[0] - few[0]  # of six rows
    limit = (ranks.ranks - 1) * (2 * 4 * cases.DIM + 12 * 3 + 100)
    assert of_row <= 6 * limit


@pytest.mark.parametrize(
    ("name", "foreach"),
    [("arcface", False), ("arcface, learnt scale", True), ("magface", False)],
)
def test_training_gives_the_weights_of_one_process(ranks: Pair, name: str, foreach: bool) -> None:
    expected = cases.train(name, False, foreach)
    for state in ranks.run(cases.train, name, True, foreach):
        assert_close(state, expected)
