"""Checkpoints of sharded classes fit any number of ranks, and a criterion that is whole."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sharded_checkpoints as checkpoints
from two_processes import Pair

# Not imported at all where torch has no gloo: two_processes skips the file.
# isort: split
from torch.distributed.checkpoint.state_dict_saver import save

saved: dict[str, tuple[Path, dict[str, Any]]] = {}  # by the optimiser, of another number of ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def _close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    "optimizer", ["sgd", "adam", "in backward", "row-sparse sgd", "row-sparse adam"]
)
def test_any_number_of_ranks(ranks: Pair, folder: Path, optimizer: str) -> None:
    """What 2 ranks saved is loaded by 2, 3 and 4, and by one that isn't sharded."""
    if optimizer not in saved:
        path = folder / optimizer
        saved[optimizer] = path, ranks.run(checkpoints.saved, optimizer, path)[0]
    path, expected = saved[optimizer]
    assert any("momentum" in name or "exp_avg" in name for name in expected)
    for found in ranks.run(checkpoints.resumed, optimizer, path):
        _close(found, expected)
    with warnings.catch_warnings():  # that there is no process group
        warnings.simplefilter("ignore")
        _close(checkpoints.resumed(optimizer, path, False), expected)


def test_a_whole_checkpoint_fits_shards(ranks: Pair, tmp_path: Path) -> None:
    training = checkpoints.Training("sgd", is_sharded=False)
    training.train(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(training.state(), checkpoint_id=tmp_path / "whole")
    for found in ranks.run(checkpoints.loaded, tmp_path / "whole"):
        _close(found, training.numbers())
