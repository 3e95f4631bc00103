"""Processes that serve every test of distributed training: a pair, and 2, 3 or 4 for shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from two_processes import Pair  # which not every build of PyTorch can make


@pytest.fixture(scope="session")
def pairs() -> Iterator[list[Pair]]:
    """Those started so far, of which the last may be alive: a worker that raises dies."""
    made: list[Pair] = []
    yield made
    for one in made:
        one.stop()


@pytest.fixture
def pair(pairs: list[Pair], tmp_path: Path) -> Pair:
    from two_processes import Pair

    if not (pairs and pairs[-1].is_alive):
        pairs.append(Pair(tmp_path))
    return pairs[-1]


@pytest.fixture(scope="session", params=[2, 3, 4], ids=lambda ranks: f"{ranks} ranks")
def groups(request: pytest.FixtureRequest) -> Iterator[list[Pair]]:
    """As `pairs`, of as many processes each; pytest runs the tests of one number together."""
    made: list[Pair] = []
    yield made
    for one in made:
        one.stop()


@pytest.fixture
def ranks(groups: list[Pair], request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    """2, 3 and 4 processes of one process group."""
    from two_processes import Pair

    if not (groups and groups[-1].is_alive):
        groups.append(Pair(tmp_path, request.node.callspec.params["groups"]))
    return groups[-1]
