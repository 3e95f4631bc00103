"""Losses over classes that are sharded over 2, 3 and 4 ranks equal the loss in one process."""

from __future__ import annotations

import functools

import pytest
import sharded_cases as cases
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


@pytest.mark.parametrize(
    ("name", "foreach"),
    [("arcface", False), ("arcface, learnt scale", True), ("magface", False)],
)
def test_training_gives_the_weights_of_one_process(ranks: Pair, name: str, foreach: bool) -> None:
    expected = cases.train(name, False, foreach)
    for state in ranks.run(cases.train, name, True, foreach):
        assert_close(state, expected)
