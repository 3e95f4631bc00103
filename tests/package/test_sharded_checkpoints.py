"""Checkpoints of sharded classes fit any number of ranks, and a criterion that is whole."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sharded_checkpoints as checkpoints
import torch
from helpers import ROOT
from two_processes import Pair

# Not imported at all where torch has no gloo: two_processes skips the file.
# isort: split
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

import fused_margin as fm
from fused_margin import convert

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


def test_whole_states_in_one_process(ranks: Pair, tmp_path: Path) -> None:
    """What docs/scaling.md says of files for one process."""
    ranks.run(checkpoints.saved_plainly, tmp_path)
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    training = checkpoints.Training("sgd", is_sharded=False)
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    with warnings.catch_warnings():  # that there is no process group
        warnings.simplefilter("ignore")
        set_state_dict(
            training.modules,
            training.optimizers,
            model_state_dict=state["modules"],
            optim_state_dict=state["optimizer"],
        )
    _close(training.numbers(), {name: value.numpy() for name, value in expected.items()})
    for name in ("whole.pt", "gathered.pt"):
        criterion = fm.CosFaceLoss(checkpoints.CLASSES, checkpoints.DIM, dtype=torch.float64)
        convert.load_class_weights(criterion, tmp_path / name)
        assert torch.equal(criterion.weight, expected["criterion.weight"])
    criterion = fm.AdaFaceLoss(checkpoints.CLASSES, checkpoints.DIM, dtype=torch.float64)
    criterion.load_state_dict(torch.load(tmp_path / "gathered.pt", weights_only=True))
    assert torch.equal(criterion.weight, expected["criterion.weight"])


def test_class_weights_of_other_packages(ranks: Pair) -> None:
    for found in ranks.run(checkpoints.taken_from_elsewhere):
        assert not found.any()


def test_a_state_of_shards_in_one_process(ranks: Pair, tmp_path: Path) -> None:
    """torch.save of it is for as many ranks, each of which has its rows."""
    ranks.run(checkpoints.saved_plainly, tmp_path)
    assert all(all(found) for found in ranks.run(checkpoints.loaded_plainly, tmp_path))
    criterion = fm.AdaFaceLoss(checkpoints.CLASSES, checkpoints.DIM, dtype=torch.float64)
    before = criterion.weight.detach().clone()
    here = -(-checkpoints.CLASSES // ranks.ranks)
    state = torch.load(tmp_path / "rank-0.pt", weights_only=True)
    with pytest.raises(ValueError, match=rf"of which {here} of 11 rows .*full_state_dict=True"):
        criterion.load_state_dict(state)
    with pytest.raises(ValueError, match=r"rank-0\.pt has the rows of one rank alone.*full_state"):
        convert.load_class_weights(criterion, tmp_path / "rank-0.pt")
    assert torch.equal(criterion.weight, before)
    code = (  # where nothing has imported DTensors
        "import sys; from fused_margin import convert\n"
        "try: convert.class_weights(sys.argv[1])\n"
        "except ValueError as error: print(error)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "rank-0.pt")], cwd=ROOT, env=dict(os.environ),
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "rank-0.pt has the rows of one rank alone" in found.stdout
