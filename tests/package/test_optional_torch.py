"""Builds of torch that lack what not all of them have."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers import ROOT

STEP = """
import sys, types
import torch

{missing}

import fused_margin as fm
from fused_margin import _cpu

for size in (12, 5000):  # one block of classes, and several
    weight = torch.randn(size, 300, requires_grad=True)
    labels = torch.randint(size, (300,))
    for embeddings in (torch.randn(300, 300), torch.randn(300, 300).bfloat16()):
        loss = fm.functional.arcface(embeddings.requires_grad_(), weight, labels)
        loss.backward()
        exact = fm.functional.arcface(embeddings, weight, labels, backend="reference")
        torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-4)
    with torch.autocast("cpu"):
        fm.functional.arcface(embeddings.float(), weight, labels).backward()
    assert _cpu.product_dtype(torch.bfloat16, torch.float32) is torch.float32
fm.show_config()
"""


@pytest.mark.parametrize(
    "missing",
    [
        "torch.ops.mkldnn = types.SimpleNamespace()",
        "torch.cpu = types.SimpleNamespace()",
        "torch.backends.mkldnn.is_available = lambda: False; torch.ops.mkldnn = torch.Size()",
    ],
    ids=["no oneDNN", "no question for bf16 instructions", "oneDNN switched off"],
)
def test_products_are_fp32_and_the_report_says_so(missing: str) -> None:
    """As in the wheels for Apple's CPUs, whose torch has no oneDNN."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STEP.format(missing=missing)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no bf16 instructions" in done.stdout
