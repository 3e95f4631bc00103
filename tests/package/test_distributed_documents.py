"""The documented ways to train in several processes, in two, and Accelerate."""

from __future__ import annotations

import gc
import importlib
import re
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from documents import Block, find_blocks
from helpers import ROOT
from two_processes import (
    LOSSES,
    Arrays,
    Pair,
    Trainee,
    alone,
    assert_close,
    batches,
    build,
    mine,
    sgd,
    warnings_of,
    whole,
)

# Not imported at all where torch has no gloo: two_processes skips the file.
# isort: split
import torch.distributed as dist

import fused_margin as fm

BLOCKS = [
    block
    for name in ("README.md", "README.ja.md")
    for block in find_blocks(ROOT / name)
    if re.search(r"torch\.distributed|accelerate", block.text) and block.language == "python"
]


def block_state(text: str) -> Arrays:
    """Run a block on rows of this rank's own; the ``state`` that it ends with."""
    gc.collect()
    torch.manual_seed(dist.get_rank())
    names: dict[str, Any] = {"__name__": "__main__"}
    with (
        mock.patch.object(dist, "init_process_group"),  # this worker's is used, and kept
        mock.patch.object(dist, "destroy_process_group"),
        mock.patch.object(fm, "check_setup", wraps=fm.check_setup) as check,
    ):
        exec(text, names)
    assert check.call_count == 1
    return {key: value.numpy().copy() for key, value in names["state"].items()}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_documented_code_in_two_processes(pair: Pair, block: Block) -> None:
    if "accelerate" in block.text:
        pytest.importorskip("accelerate", reason="Accelerate is not a dependency of the tests")
    first, second = pair.run(block_state, block.text)
    assert list(first) == list(second) == ["weight"]
    np.testing.assert_array_equal(first["weight"], second["weight"])


def test_each_way_is_documented() -> None:
    for name in ("README.md", "README.ja.md"):
        text = "".join(block.text for block in BLOCKS if block.path.name == name)
        for way in ("DistributedDataParallel", "accelerate", "fully_shard"):
            assert way in text


def accelerated(loss: str, accumulate: int, with_criterion: bool) -> tuple[Arrays, int, list[str]]:
    """Weights, number of warnings, and the keys of the criterion's state."""
    gc.collect()
    accelerate = importlib.import_module("accelerate")
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=accumulate)
    trainee = build(loss)
    model, criterion = trainee.backbone, trainee.criterion
    optimizer = sgd(model, criterion)
    if with_criterion:
        model, criterion, optimizer = accelerator.prepare(model, criterion, optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)

    def steps() -> None:
        for rows, labels in batches():
            parts = zip(mine(rows).chunk(accumulate), mine(labels).chunk(accumulate), strict=True)
            for some, targets in parts:
                with accelerator.accumulate(model, criterion):
                    accelerator.backward(criterion(model(some), targets))
                    optimizer.step()
                    if with_criterion and accelerator.sync_gradients:
                        fm.check_setup(criterion, optimizer)
                    optimizer.zero_grad()

    caught = warnings_of(steps)
    return whole(Trainee(model, criterion)), len(caught), list(criterion.state_dict())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_accelerate(pair: Pair, loss: str, accumulate: int) -> None:
    pytest.importorskip("accelerate", reason="Accelerate is not a dependency of the tests")
    for state, count, keys in pair.run(accelerated, loss, accumulate, True):
        assert_close(state, alone(loss))
        assert count == 0
        assert keys == ["module.weight"]
    (first, count, keys), (second, also, _) = pair.run(accelerated, loss, accumulate, False)
    assert np.abs(first["criterion.weight"] - second["criterion.weight"]).max() > 1e-3
    assert count == also == 1
    assert keys == ["weight"]
