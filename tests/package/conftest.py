"""One pair of processes, which serves every test of distributed training."""

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
