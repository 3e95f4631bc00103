"""pytorch-metric-learning's own tests of its losses, on this package's classes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

SOURCE = os.environ.get("PYTORCH_METRIC_LEARNING_SOURCE", "")
MODULES = (
    "tests.losses.test_arcface_loss",
    "tests.losses.test_cosface_loss",
    "tests.losses.test_large_margin_softmax_loss",
    "tests.losses.test_losses_without_labels",
    "tests.losses.test_normalized_softmax_loss",
    "tests.losses.test_npairs_loss",
    "tests.losses.test_signal_to_noise_ratio_losses",
    "tests.losses.test_soft_triple_loss",
    "tests.losses.test_subcenter_arcface_loss",
    "tests.regularizers.test_center_invariant_regularizer",
    "tests.regularizers.test_regular_face_regularizer",
)

RUN = """
import sys, unittest
sys.path.insert(0, "src")
from pytorch_metric_learning import losses, regularizers
from fused_margin.compat import pml
for name in pml.__all__:
    home = regularizers if name.endswith("Regularizer") else losses
    assert hasattr(home, name), name
    setattr(home, name, getattr(pml, name))
import torch
torch.manual_seed(int(sys.argv[1]))
unittest.main(module=None, argv=["unittest", *sys.argv[2:]], verbosity=2)
"""


@pytest.mark.skipif(not SOURCE, reason="PYTORCH_METRIC_LEARNING_SOURCE names no checkout of it")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_its_own_tests_pass(dtype: str) -> None:
    environment = {
        "TEST_DTYPES": dtype,
        "TEST_DEVICE": "cpu",
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "0",
    }
    ran = subprocess.run(
        [sys.executable, "-c", RUN, "0", *MODULES],
        cwd=Path(SOURCE),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    count = re.search(r"^Ran (\d+) tests?", ran.stderr, re.MULTILINE)
    assert count is not None
    assert int(count[1]) >= len(MODULES)
